"""One SAE in training: everything between a batch and updated weights."""
