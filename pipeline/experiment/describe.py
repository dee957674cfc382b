"""What an artefact on disk says about itself: stores, checkpoints, members, training folders, results. Whether it is whole:
`verify.py`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.base.errors import PipelineError, explain
from pipeline.base.files import is_url, read_json
from pipeline.base.results import read_result
from pipeline.sae.folders import is_member, may_be_member
from pipeline.sae.foreign.reader import folder_of, is_foreign, names_for, read_sae, require_format
from pipeline.sae.member import read_completion, read_config, require_recorded
from pipeline.store.reader import Store, describe_store


def kind_of(path: Path) -> str:
    """store, stores, checkpoint, foreign (made elsewhere), member, training, results or nothing we know (PipelineError)."""
    if path.suffix == ".safetensors":
        return "checkpoint"
    if path.suffix == ".json" and path.is_file():
        return "results"
    if (path / "zarr.json").exists():
        return "store"
    if is_foreign(path) or names_for(path):
        return "foreign"
    if is_member(path):
        return "member"
    if any(path.glob("*.zarr/zarr.json")):
        return "stores"
    if any(map(may_be_member, path.glob("*/"))):
        return "training"
    found = "an empty folder" if path.is_dir() and not any(path.iterdir()) else "none of these"
    raise PipelineError(
        f"{path}: expected a store (.zarr), a checkpoint (.safetensors), a training folder or results (.json), "
        f"found {found if path.exists() else 'nothing'}; check the path"
    )


def describe(place: str) -> dict[str, Any]:
    """Everything an artefact says about itself, as plain JSON data. Raises PipelineError when it cannot be read.

    `place` is a path, or the URL of a store.
    """
    if is_url(place):
        return {"kind": "store", "path": place, **describe_store(Store.open(place, complete=False))}
    path = folder_of(Path(place))
    kind = kind_of(path)
    return {"kind": kind, "path": place, **DESCRIBERS[kind](path)}


def describe_checkpoint(path: Path) -> dict[str, Any]:
    header = read_sae(path)
    sae = header.sae
    files = [path / name for name in require_format(path).files] if path.is_dir() else [path]
    size = sum(file.stat().st_size for file in files)
    shape = {"d_model": sae.d_model, "width": sae.width, "levels": list(sae.levels), "shared": sae.n_shared}
    return {"step": header.step, **shape, "sae": sae.to_dict(), "bytes": size, **header.provenance}


def describe_member(path: Path) -> dict[str, Any]:
    found = sorted(p.name for p in (path / "checkpoints").glob("*.safetensors"))
    complete = path / "complete.json"
    if (completion := read_completion(path)) is not None:
        require_recorded(path, completion)
    return {
        **read_config(path).data,
        "checkpoints": found,
        "complete": read_json(complete) if complete.exists() else None,
    }


def describe_stores(path: Path) -> dict[str, Any]:
    return {p.parent.name: DESCRIBERS["store"](p.parent) for p in sorted(path.glob("*.zarr/zarr.json"))}


def describe_training(path: Path) -> dict[str, Any]:
    """Its members by name; one that cannot be read is its `problem`, and the others are described."""
    return {folder.name: careful(folder) for folder in sorted(path.glob("*/")) if may_be_member(folder)}


def careful(folder: Path) -> dict[str, Any]:
    try:
        return describe_member(folder)
    except (PipelineError, OSError) as error:
        return {"problem": explain(error) or str(error)}


DESCRIBERS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "store": lambda path: describe_store(Store.open(path, complete=False)),
    "stores": describe_stores,
    "checkpoint": describe_checkpoint,
    "foreign": describe_checkpoint,
    "member": describe_member,
    "training": describe_training,
    "results": read_result,
}
