"""Which SAEs are evaluated: ours, and those of other trainers."""
