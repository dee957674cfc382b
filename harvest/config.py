"""What a harvest is asked for: one option each."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pipeline.base.errors import UsageError
from pipeline.base.files import is_url
from pipeline.model.points import HOOKS, Point, canonical, site_name


@dataclass(frozen=True)
class HarvestConfig:
    """Everything a harvest is asked for. None and `auto` are settled by `plan.settle`: from the store that is there, else
    from the machine. Raises UsageError when fields contradict.

    `tokens` and `eval_tokens` count BOS; `batch_size` is in sequences, `shard_rows` and `chunk_rows` in tokens,
    `max_buffer` in documents, `skip_bad` in records. `bos`: auto, none, or a token id. `dtype` is what the model computes in,
    `store_dtype` what is stored: `auto` is what `dtype` says, and bf16 where that is `auto` too. `mixed`: other versions or
    another device than made the rows that are there may go on with them.
    """

    store: str
    model: str = "google/gemma-2-2b"
    revision: str | None = None
    layers: tuple[int, ...] = (19,)
    hooks: tuple[str, ...] = ("resid_post",)
    corpus: str = "monology/pile-uncopyrighted"
    subset: str | None = None
    split: str = "train"
    text_field: str = "text"
    parse_special: bool = False
    roles: tuple[str, ...] = ()
    skip_bad: int = 0
    eval_corpus: str | None = None
    tokens: int = 10_000_000
    eval_tokens: int | None = None
    context: int = 128
    bos: str = "auto"
    seed: int = 0
    max_buffer: int = 10_000
    dtype: Literal["auto", "bf16", "float32"] = "auto"
    store_dtype: Literal["auto", "bf16", "float32"] = "auto"
    device: str = "auto"
    batch_size: int | None = None
    attention: str = "eager"
    compile: bool = False
    device_map: Literal["auto", "balanced", "sequential"] | None = None
    trust_remote_code: bool = False
    shard_rows: int | None = None
    chunk_rows: int | None = None
    codec: Literal["none", "lz4", "zstd"] = "none"
    mixed: bool = False

    def __post_init__(self) -> None:
        if not self.layers or len(set(self.layers)) != len(self.layers):
            raise UsageError(f"--layer: give at least one layer and each once, got {list(self.layers)}")
        if not self.hooks or (unknown := [hook for hook in self.hooks if hook not in HOOKS]):
            raise UsageError(f"--hook {', '.join(unknown) if self.hooks else ''}: known are {', '.join(HOOKS)}")
        if self.context < 2:
            raise UsageError(f"--context {self.context}: a sequence needs at least 2 tokens")
        for name, value in (("--tokens", self.tokens), ("--eval-tokens", self.eval_tokens)):
            if value is not None and value < self.context:
                raise UsageError(f"{name} {value}: fewer than one sequence of {self.context} tokens")
        for name in ("batch_size", "max_buffer", "shard_rows", "chunk_rows"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"--{name.replace('_', '-')} {value}: must be at least 1")

    @property
    def n_train(self) -> int:
        """Training sequences asked for."""
        return self.tokens // self.context

    @property
    def points(self) -> dict[Point, str]:
        """Point → the name of its store among several: layer_L.zarr, layer_L.HOOK.zarr. Raises UsageError for one named twice."""
        named: dict[Point, str] = {}
        for layer in self.layers:
            for hook in self.hooks:
                name = f"{site_name(layer, hook)}.zarr"
                if (point := canonical(layer, hook)) in named:
                    raise UsageError(f"--layer {layer} --hook {hook}: the same point as {named[point]}; give each once")
                named[point] = name
        return named

    def stores(self) -> dict[Point, str]:
        """Point → path or URL of its store: PATH itself for one, PATH/NAME (`points`) for several.

        Raises UsageError when PATH holds one store and several are asked for.
        """
        points = self.points
        if len(points) == 1:
            return dict.fromkeys(points, self.store)
        if not is_url(self.store) and (Path(self.store) / "zarr.json").exists():
            raise UsageError(f"{self.store}: holds the store of one layer; choose a folder for several layers")
        return {point: f"{self.store.rstrip('/')}/{name}" for point, name in points.items()}

    def replace(self, **changes: object) -> HarvestConfig:
        """The same config with some fields changed."""
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]
