"""Rows: in which order they come, where they lie, and whether they are what was written."""
