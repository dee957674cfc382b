"""Results in, pages out. Never loads torch."""
