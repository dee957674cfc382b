"""Which folders are training members', by what lies in them alone: for who looks at many, without reading any. Loads no torch."""

from __future__ import annotations

import os
from pathlib import Path


def is_member(folder: Path) -> bool:
    """Whether a folder is a training member's, by any of what training writes there, whatever became of the rest: a config.json
    that is gone, a pipe or a link to nothing is its damage, not another kind of folder."""
    if (folder / "checkpoints").is_dir() and os.path.lexists(folder / "config.json"):
        return True
    written = ("complete.json", "metrics.jsonl", "state.safetensors")
    return any(os.path.lexists(folder / name) for name in written) or any(folder.glob("checkpoints/step_*.safetensors"))


def may_be_member(folder: Path) -> bool:
    """Whether a folder is a training member's, or has a config.json, which may be all that is left of one."""
    return os.path.lexists(folder / "config.json") or is_member(folder)


def member_folder(checkpoint: Path) -> Path | None:
    """The member's folder that a checkpoint lies in; None where it lies in none."""
    folder = checkpoint.parent.parent
    return folder if checkpoint.parent.name == "checkpoints" and (folder / "config.json").exists() else None
