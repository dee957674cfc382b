"""What a reader of a format refuses, each by name: fields and tensors that are not known, sizes that do not agree."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from pipeline.base.errors import CheckpointError
from pipeline.sae.foreign.assembly import Tensors


def only(folder: Path, tensors: Tensors, names: str, optional: str = "") -> None:
    """Raise CheckpointError unless the tensors are exactly those named, and of the optional ones any."""
    needed = set(names.split())
    if unknown := sorted(tensors.keys() - needed - set(optional.split())):
        raise CheckpointError(f"{folder}: tensors {unknown} are not known here, so what they compute is not either")
    if missing := sorted(needed - tensors.keys()):
        raise CheckpointError(f"{folder}: has no tensor {missing[0]!r}; get it again")


def require_size(folder: Path, tensors: Tensors, d_model: object, width: object) -> None:
    """Raise CheckpointError unless W_enc is a matrix of the size that the config says, where it says one, and W_dec has as many
    rows as that columns; both of floats."""
    found = list(tensors["W_enc"].shape)
    said = [d_model if d_model is not None else found[0], width if width is not None else found[-1]]
    if len(found) != 2 or not tensors["W_enc"].is_floating_point() or found != said:
        kind = tensors["W_enc"].dtype
        raise CheckpointError(
            f"{folder}: its W_enc should be floats of shape {said}, found {found} of {kind}; get it again"
        )
    rows = list(tensors["W_dec"].shape)
    if len(rows) != 2 or not tensors["W_dec"].is_floating_point() or rows[0] != found[1]:
        raise CheckpointError(f"{folder}: its W_dec should be floats with {found[1]} rows, found {rows}; get it again")


def refuse_unless(folder: Path, name: str, value: object, known: tuple[object, ...]) -> None:
    """Raise CheckpointError naming the field, its value and what can be expressed."""
    if not any(value is one or (type(value) is type(one) and value == one) for one in known):
        shown = str(value)[:60]
        raise CheckpointError(f"{folder}: {name} {shown!r} cannot be read; known are {', '.join(map(repr, known))}")


def refuse_unknown(
    folder: Path,
    where: str,
    data: Mapping[str, Any],
    known: str,
    neutral: Mapping[str, tuple[object, ...]] | None = None,
) -> None:
    """Raise CheckpointError for a field that may change what is computed: one that is not known, or is one of `neutral` with
    another value than those, which change nothing."""
    for name, values in (neutral or {}).items():
        refuse_unless(folder, name, data.get(name, values[0]), values)
    if unknown := sorted(data.keys() - set(known.split()) - (neutral or {}).keys()):
        raise CheckpointError(
            f"{folder}: {where} says {unknown[0]!r}, of which is not known whether it changes latents"
        )


def set_threshold(folder: Path, threshold: Tensor) -> Tensor:
    """A batchtopk's threshold. Raises CheckpointError when training never set it."""
    if not float(threshold) > 0:
        raise CheckpointError(
            f"{folder}: its threshold was never set (it is {float(threshold):g}), so inference would differ from training"
        )
    return threshold
