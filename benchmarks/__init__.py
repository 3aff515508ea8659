"""Speed and memory, measured: against peft + transformers, change by change, and as sizes grow."""
