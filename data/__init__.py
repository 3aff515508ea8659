"""From text to batches: sources of labelled text and checkpoints, cleaning, augmentation, padded batches of ids."""
