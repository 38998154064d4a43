"""What every room may stand on: errors for people, batches of tensors, whole files. It imports nothing of graf."""
