"""What two stages need, or what defines bytes on disk. Stages meet only here and on disk; this package imports no stage.

Importing it loads nothing, so that a report needs no torch; `pipeline.load` is fetched when it is first asked for.
"""

from typing import Any


def __getattr__(name: str) -> Any:
    if name == "load":
        from pipeline.sae.hub import load

        return load
    raise AttributeError(f"module 'pipeline' has no attribute {name!r}")
