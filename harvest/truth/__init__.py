"""Rows of known features, without a model or text: the spec, its forest, and the rows as a function of their position."""
