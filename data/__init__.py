"""Text in, batches out: where labelled text and checkpoints come from, and how texts become padded batches of ids."""
