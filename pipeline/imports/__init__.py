"""Rows that others made, into a store: `sources` reads their formats, `write` writes any rows."""
