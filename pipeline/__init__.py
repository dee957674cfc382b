"""What two stages need, or what defines bytes on disk. Stages meet only here and on disk; this package imports no stage.

This file imports nothing, so that `import pipeline` costs nothing and a report loads no torch.
"""
