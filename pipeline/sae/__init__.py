"""The nested SAE, its checkpoint, its measure, and the ways it travels."""
