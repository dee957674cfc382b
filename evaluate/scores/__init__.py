"""Scores that need no text: from the store's evaluation rows and the layers after the cut."""
