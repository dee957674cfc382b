"""Experiments: one TOML file names every stage; what is on disk, described and verified."""
