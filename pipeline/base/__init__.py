"""The machine, files and terminals: what every other room stands on. Knows nothing of SAEs."""
