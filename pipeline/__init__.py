"""What two stages need, or what defines bytes on disk. Stages meet only here and on disk; this package imports no stage.

Importing it loads nothing, so that a report needs no torch. What a notebook calls is fetched when it is first asked for:
`pipeline.load`, `pipeline.attach`, the edits `pipeline.steer`, `pipeline.ablate`, `pipeline.clamp`, and `pipeline.write_store`.
"""

from typing import Any

NOTEBOOK = {
    "load": "pipeline.sae.hub",
    "attach": "pipeline.live.attach",
    "steer": "pipeline.live.edits",
    "ablate": "pipeline.live.edits",
    "clamp": "pipeline.live.edits",
    "write_store": "pipeline.imports.write",
}


def __getattr__(name: str) -> Any:
    if name in NOTEBOOK:
        import importlib

        return getattr(importlib.import_module(NOTEBOOK[name]), name)
    raise AttributeError(f"module 'pipeline' has no attribute {name!r}")
