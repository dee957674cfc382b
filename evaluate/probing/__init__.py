"""Scores from labelled texts: SCR, TPP and sparse probing."""
