"""What a user or a disk can cause. A command prints one of these as one line and exits 1.

Each message says what is wrong, where (path), what was expected and found, and what to do next. Classes also inherit
the builtin that a caller would expect to catch.
"""


class PipelineError(Exception):
    """Base of every error that is not our own bug."""


class UsageError(PipelineError, ValueError):
    """The options contradict each other or the data; a command exits 2."""


class CorpusError(PipelineError, ValueError):
    """The corpus is missing, empty, lacks the text field, or is shorter than asked."""


class ModelError(PipelineError, ValueError):
    """The language model or its tokenizer is missing, gated, or cannot be split where asked."""


class StoreError(PipelineError, ValueError):
    """The activation store is missing, unfinished, or of an unknown version."""


class DamagedError(PipelineError, OSError):
    """Bytes on disk are not the bytes that were written: truncated, flipped, or gone."""


class CheckpointError(PipelineError, ValueError):
    """A checkpoint is missing, malformed, or does not fit the store or the model it is used with."""


class MismatchError(PipelineError, ValueError):
    """An artefact on disk was made by another config; the message names the fields that differ."""


class DiskError(PipelineError, OSError):
    """No room, no permission, or an output folder that holds something else."""


class DivergedError(PipelineError, ArithmeticError):
    """Training met a loss that is not finite."""
