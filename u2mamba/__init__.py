"""What the training loop calls: the step, checkpoints, reports, processes."""
