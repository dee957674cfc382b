"""What an artefact on disk is, and whether it is whole: stores, checkpoints, members, training folders, results."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.base.errors import PipelineError
from pipeline.base.files import hash_file, read_json
from pipeline.sae import foreign
from pipeline.store.backend import is_url
from pipeline.store.reader import Store, describe_store


def kind_of(path: Path) -> str:
    """store, stores, checkpoint, foreign (made elsewhere), member, training, results or nothing we know (PipelineError)."""
    if path.suffix == ".safetensors":
        return "checkpoint"
    if path.suffix == ".json" and path.is_file():
        return "results"
    if (path / "zarr.json").exists():
        return "store"
    if foreign.is_foreign(path):
        return "foreign"
    if (path / "config.json").exists() and (path / "checkpoints").is_dir():
        return "member"
    if any(path.glob("*.zarr/zarr.json")):
        return "stores"
    if any(path.glob("*/config.json")):
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
    kind = kind_of(Path(place))
    return {"kind": kind, "path": place, **DESCRIBERS[kind](Path(place))}


def describe_checkpoint(path: Path) -> dict[str, Any]:
    header = foreign.read_sae(path)
    sae = header.sae
    files = [path / name for name in foreign.require_format(path).files] if path.is_dir() else [path]
    size = sum(file.stat().st_size for file in files)
    shape = {"d_model": sae.d_model, "width": sae.width, "levels": list(sae.levels), "shared": sae.n_shared}
    return {"step": header.step, **shape, "sae": sae.to_dict(), "bytes": size, **header.provenance}


def describe_member(path: Path) -> dict[str, Any]:
    found = sorted(p.name for p in (path / "checkpoints").glob("*.safetensors"))
    complete = path / "complete.json"
    return {
        **read_json(path / "config.json"),
        "checkpoints": found,
        "complete": read_json(complete) if complete.exists() else None,
    }


def describe_many(pattern: str, one: Callable[[Path], dict[str, Any]]) -> Callable[[Path], dict[str, Any]]:
    return lambda path: {p.parent.name: one(p.parent) for p in sorted(path.glob(pattern))}


DESCRIBERS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "store": lambda path: describe_store(Store.open(path, complete=False)),
    "stores": describe_many("*.zarr/zarr.json", lambda path: describe_store(Store.open(path, complete=False))),
    "checkpoint": describe_checkpoint,
    "foreign": describe_checkpoint,
    "member": describe_member,
    "training": describe_many("*/config.json", describe_member),
    "results": read_json,
}


def verify(place: str) -> list[str]:
    """Every problem found in an artefact, one line each; empty when it is whole. `place` as for `describe`."""
    return verify_store(place) if is_url(place) else verify_path(Path(place))


def verify_store(place: str | Path) -> list[str]:
    """Every problem of a store, a damaged root included."""
    try:
        return Store.open(place, complete=False, check=False).verify(quiet=False)
    except PipelineError as error:
        return [str(error)]


def verify_path(path: Path) -> list[str]:
    """Every problem of a local artefact."""
    kind = kind_of(path)
    try:
        if kind == "store":
            return verify_store(path)
        if kind == "stores":
            return [problem for store in sorted(path.glob("*.zarr")) for problem in verify_store(store)]
        if kind in ("checkpoint", "foreign"):  # of a folder made elsewhere: that it can be read, whole and exactly
            foreign.load_sae(path)
        if kind == "member":
            return verify_member(path)
        if kind == "training":
            return [problem for config in sorted(path.glob("*/config.json")) for problem in verify_path(config.parent)]
        if kind == "results":
            return verify_results(path)
    except PipelineError as error:
        return [str(error)]
    return []


def verify_member(path: Path) -> list[str]:
    """Every checkpoint whole; the final one is what complete.json recorded."""
    problems = [problem for p in sorted((path / "checkpoints").glob("*.safetensors")) for problem in verify_path(p)]
    if not (path / "complete.json").exists():
        return [*problems, f"{path}: training is not finished (no complete.json); run the same train command to go on"]
    complete = read_json(path / "complete.json")
    final = path / complete["final"]
    if not final.exists():
        return [*problems, f"{final}: gone, though complete.json names it; train this member again"]
    if hash_file(final) != complete["sha256"]:
        problems.append(f"{final}: is not the file that complete.json recorded; train this member again")
    metrics = path / "metrics.jsonl"
    if complete.get("metrics_sha256") not in (None, hash_file(metrics) if metrics.exists() else ""):
        problems.append(
            f"{metrics}: not the lines that complete.json recorded; put them back, or train this member again"
        )
    return problems


def verify_results(path: Path) -> list[str]:
    """The file is JSON of a known format and version."""
    data = read_json(path)
    if data.get("format") != "nested-sae-results" or data.get("version") != 1:
        return [f"{path}: expected nested-sae-results version 1, found {data.get('format')!r} {data.get('version')!r}"]
    return []
