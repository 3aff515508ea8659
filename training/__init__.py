"""What the training loop leans on: settings, precision, scores, progress, the run folder, reports and plots."""
