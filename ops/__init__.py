"""What `roberta`, `lora` and `data` share beneath them: cheap dropout, and care with files from strangers."""
