"""The model that made a store, and a checkpoint as one of that store's rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from evaluate.checkpoints.find import Checkpoint
from pipeline.base.errors import ModelError

if TYPE_CHECKING:
    from pipeline.model.split_lm import ModelInfo
    from pipeline.store.reader import Store


def info_of(store: Store, model: str | None) -> ModelInfo:
    """The files of the model that made a store, or of the one given for it. Raises ModelError, naming both, when the weights are
    not those that made the store."""
    from pipeline.model.split_lm import ModelInfo

    made_by = store.config
    name = model or str(made_by["model"])
    recorded = made_by.get("revision") if name == made_by["model"] else None
    info = ModelInfo.read(name, None if recorded == "local" else recorded)
    require_weights(info, store)
    return info


def require_weights(info: ModelInfo, store: Store) -> None:
    """Raise ModelError, naming both, when a model's weights, or its config.json, are not those that made the store."""
    from pipeline.model.files import require_architecture

    made_by, sha256 = store.config, info.weights_sha256
    if sha256 != made_by["weights_sha256"]:
        raise ModelError(
            f"{info.name}: its weights ({sha256[:10]}…) are not those that made store {store.where} "
            f"({made_by['model']}, {made_by['weights_sha256'][:10]}…); give that model"
        )
    require_architecture(info.folder, made_by.get("architecture_sha256"), f"store {store.where}")


def placed(checkpoint: Checkpoint, store: Store, info: Callable[[], ModelInfo]) -> Checkpoint:
    """A transcoder of Gemma Scope as one of the rows of a store of mlp_in, the gain of the norm folded in
    (`Checkpoint.behind_gain`); any other checkpoint, or beside any other store, as it is. Raises as `info`, ModelError."""
    if not (checkpoint.reads_before_gain and store.config.get("hook") == "mlp_in"):
        return checkpoint
    from pipeline.model.files import mlp_norm_weight

    return checkpoint.behind_gain(mlp_norm_weight(info().folder, int(store.config["layer"])))
