"""What an evaluation job is asked for, and which part of that identifies its results."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from evaluate.checkpoints.find import valid_levels
from evaluate.probing.job import ProbingConfig
from evaluate.scores.coding import N_VALUES
from evaluate.scores.features import MIN_FIRED, N_SAMPLED
from evaluate.scores.sample import GROUP_SEQUENCES
from evaluate.scores.scorer import OF_A_MODEL, SCORES
from pipeline.base.errors import UsageError
from pipeline.base.files import hash_file, sha256
from pipeline.base.runtime import DTYPES


@dataclass(frozen=True)
class EvaluateConfig:
    """One evaluation job. Raises UsageError when fields contradict.

    store, out: paths. target: the store of the rows that transcoders make of those of `store`; None: SAEs.
    model: folder or Hub id, None: the one the store names; revision: None: the store's.
    scores: families of SCORES. levels: all, last, or indices like 0,1. rows: residual rows of the evaluation split, rounded
    up to whole sequences; None: all. dtype: of the language model, `store` takes what made the store; SAEs run in float32.
    probing: texts for scr, tpp and k-sparse probing; None: none. latents: also write pages of every latent of members
    whose name begins with it, `all` of every member; empty: none.
    batch_size (sequences), max_memory (bytes, None: four fifths of what is free) and device_map (how the model's layers are
    spread over GPUs; None: all on `device`) change speed and rounding only.
    seed draws the latents whose correlations are taken, and splits labelled tokens and words. words: a file of words for
    first_letter; None: those of the model's tokenizer.
    """

    store: Path | str
    out: Path
    model: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    scores: tuple[str, ...] = OF_A_MODEL
    levels: str = "all"
    rows: int | None = None
    batch_size: int = 16
    max_memory: int | None = None
    device: str = "auto"
    device_map: Literal["auto", "balanced", "sequential"] | None = None
    dtype: str = "store"
    seed: int = 0
    probing: ProbingConfig | None = None
    latents: str = ""
    words: Path | None = None
    allow_other_store: bool = False
    allow_other_model: bool = False
    target: Path | str | None = None
    cache: Path | None = None
    cache_size: int = 100 * 10**9

    def __post_init__(self) -> None:
        if unknown := sorted(set(self.scores) - set(SCORES)):
            raise UsageError(f"--scores {unknown[0]!r} is not one of {', '.join(SCORES)}")
        if not self.scores and self.probing is None and not self.latents:
            raise UsageError("no score is asked for; see --scores")
        if not valid_levels(self.levels):
            raise UsageError(f"--levels {self.levels!r}: use all, last, or indices like 0,1")
        if self.dtype not in ("store", *DTYPES):
            raise UsageError(f"--dtype {self.dtype!r}: use store, {' or '.join(DTYPES)}")
        if self.words is not None and "first_letter" not in self.scores:
            raise UsageError("--words names words for --scores first_letter, which is not asked for")
        if self.batch_size < 1 or (self.rows is not None and self.rows < 1):
            raise UsageError("--batch-size and --rows must be at least 1")

    @property
    def families(self) -> tuple[str, ...]:
        """All score families asked for, those of texts too, in the order of their lists."""
        return (*(name for name in SCORES if name in self.scores), *(self.probing.scores if self.probing else ()))

    def only(self, families: Sequence[str]) -> EvaluateConfig:
        """The same, of some of its families."""
        of_texts = tuple(name for name in families if name not in SCORES)
        probing = dataclasses.replace(self.probing, scores=of_texts) if self.probing and of_texts else None
        return dataclasses.replace(self.of_rows([f for f in families if f in SCORES]), probing=probing)

    def of_rows(self, families: Sequence[str]) -> EvaluateConfig:
        """The same, with these of SCORES instead."""
        words = self.words if "first_letter" in families else None
        return dataclasses.replace(self, scores=tuple(families), words=words)

    def sample_identity(self, n_sequences: int, massive_multiple: float) -> dict[str, Any]:
        """What every score of a results file has in common, and what names the file: plain JSON."""
        return {
            "levels": self.levels,
            "n_sequences": n_sequences,
            "massive_multiple": massive_multiple,
            "group_sequences": GROUP_SEQUENCES,
        }

    def family_identities(self, dtype: str) -> dict[str, dict[str, Any]]:
        """Family → what else shapes its numbers beyond rounding, plain JSON. A family is done where these are equal."""
        settings: dict[str, dict[str, Any]] = {
            "kl": {"dtype": dtype},
            "coding": {"n_values": list(N_VALUES)},
            "features": {"seed": self.seed, "n_sampled": N_SAMPLED, "min_fired": MIN_FIRED},
            "structure": {"seed": self.seed},
            "absorption": {"seed": self.seed},
            "first_letter": {
                "seed": self.seed,
                "dtype": dtype,
                "words": source_identity(str(self.words)) if self.words else "tokenizer",
            },
        }
        texts = (plain(self.probing) or {}) | {"dtype": dtype}
        unread_by = {
            "scr": ("scores", "k_values"),
            "tpp": ("scores", "k_values"),
            "k_sparse_probe": ("scores", "n_values"),
        }
        for family, unread in unread_by.items():
            settings[family] = {name: value for name, value in texts.items() if name not in unread}
        return {family: settings.get(family, {}) for family in self.families}

    def wants_latents(self, member: str) -> bool:
        """Whether pages of a member's latents are asked for."""
        return bool(self.latents) and (self.latents == "all" or member.startswith(self.latents))


def plain(config: ProbingConfig | None) -> dict[str, Any] | None:
    """A probing config as plain JSON data; local sources by the name and hash of what is in them."""
    if config is None:
        return None
    named = dataclasses.replace(config, sources=tuple(source_identity(source) for source in config.sources))
    return dict(json.loads(json.dumps(dataclasses.asdict(named))))


def source_identity(source: str) -> str:
    """A Hub id as it is; of local files their names and one hash over their contents, wherever they lie."""
    places = [Path(part) for part in source.split(",")]
    if not all(place.exists() for place in places):
        return source
    files = [
        file for place in places for file in (sorted(place.iterdir()) if place.is_dir() else [place]) if file.is_file()
    ]
    digest = sha256("".join(f"{file.name} {hash_file(file)}\n" for file in files))
    return f"{','.join(place.resolve().name for place in places)} sha256 {digest[:16]}"
