"""The language model of a job: one part of it at a time, and proof that it is the one that made the store."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from evaluate.checkpoints.place import require_weights
from evaluate.config import EvaluateConfig
from pipeline.base.errors import ModelError
from pipeline.base.runtime import DTYPES, resolve_dtype
from pipeline.model.points import Point
from pipeline.store.reader import Store

if TYPE_CHECKING:
    from pipeline.model.cost import ForwardCost
    from pipeline.model.split_lm import ModelInfo, Part, SplitLM


def point_of(store: Store) -> Point:
    """Where the rows of a store come from; where nobody says the hook, the stream after the layer."""
    return Point(int(store.config["layer"]), str(store.config.get("hook") or "resid_post"))


class Models:
    """Loads parts of the language model on demand; every part is checked against the store.

    `source`: the store that transcoders read, of another point than `store`, which a prefix then gives too (`reads`).
    """

    def __init__(self, config: EvaluateConfig, store: Store, device: torch.device, source: Store | None = None) -> None:
        self.config, self.store, self.device = config, store, device
        self.name = config.model or str(store.config["model"])
        self.dtype = (
            str(store.config.get("compute_dtype", store.config["dtype"])) if config.dtype == "store" else config.dtype
        )
        self.point = point_of(store)
        self.reads = None if source is None or source is store else point_of(source)

    @property
    def revision(self) -> str | None:
        """As asked, else the store's when the model is the store's."""
        recorded = self.store.config.get("revision") if self.name == self.store.config["model"] else None
        return self.config.revision or (None if recorded == "local" else recorded)

    @cached_property
    def info(self) -> ModelInfo:
        """The model's config and the hash of its weights."""
        from pipeline.model.split_lm import ModelInfo

        return ModelInfo.read(self.name, self.revision, trust_remote_code=self.config.trust_remote_code)

    @cached_property
    def cost(self) -> ForwardCost:
        """What a token takes in its layers and in the unembedding, measured now."""
        from pipeline.model.cost import measure_forward

        store = self.store.config
        return measure_forward(
            self.info,
            self.dtype,
            self.device,
            self.config.batch_size,
            self.store.context,
            store["attention"],
            trust_remote_code=self.config.trust_remote_code,
        )

    def checked(self) -> ModelInfo:
        """`info`, of weights known to be those that made the store. Raises ModelError, naming both, when they are not."""
        require_weights(self.info, self.store)
        return self.info

    def load(self, part: Part) -> SplitLM:
        """A part of the model. Raises ModelError as `checked`."""
        from pipeline.model.split_lm import SplitLM

        self.checked()
        return SplitLM.load(
            self.name,
            revision=self.revision,
            dtype=self.dtype,
            device=self.device,
            part=part,
            layers=[self.point, *([self.reads] if part == "prefix" and self.reads is not None else [])],
            attention=self.store.config["attention"],
            device_map=self.config.device_map,
            trust_remote_code=self.config.trust_remote_code,
        )

    def require_room(self) -> None:
        """Raise ModelError when what scores of behaviour run is larger than what is free on a GPU, before any of it is read."""
        if "kl" in self.config.scores and self.config.device_map is None and self.device.type == "cuda":
            from pipeline.model.split_lm import require_room

            dtype, trust = DTYPES[resolve_dtype(self.dtype, self.device)], self.config.trust_remote_code
            require_room(self.info, "suffix", [self.point], dtype, self.device, trust_remote_code=trust)

    @cached_property
    def suffix(self) -> SplitLM | None:
        """The layers after the cut and the head; None when no score of behaviour is asked for."""
        return self.load("suffix") if "kl" in self.config.scores else None

    @cached_property
    def module(self) -> str:
        """What the module is called, in its layer, whose output or input the store's rows are."""
        return (self.suffix or self.load("prefix")).module_name()

    @cached_property
    def tokenizer(self) -> Any:
        """The model's. Raises ModelError when its files are not those that made the store's tokens, unless that is allowed."""
        from pipeline.model.files import tokenizer_sha256
        from pipeline.model.split_lm import load_tokenizer

        recorded, found = self.store.config.get("tokenizer_sha256"), tokenizer_sha256(self.info.folder)
        if recorded not in (None, found) and not self.config.allow_other_model:
            raise ModelError(
                f"{self.name}: its tokenizer's files ({found[:10]}…) are not those that made the tokens of store "
                f"{self.store.path} ({recorded[:10]}…); give that model, or --allow-other-model if they are meant to be alike"
            )
        return load_tokenizer(self.name, self.revision, trust_remote_code=self.config.trust_remote_code)
