"""From what was asked to what will be done: every `auto` settled, the model and corpus found, the stores' configs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from harvest.config import HarvestConfig
from harvest.corpus import SHUFFLED, Corpus, LocalCorpus, Source, open_corpus, require_other
from harvest.texts import Reader
from harvest.tokens import Packing
from pipeline.base.errors import DamagedError, StoreError
from pipeline.base.files import beside
from pipeline.base.runtime import resolve_device, resolve_dtype
from pipeline.model.files import architecture_sha256, tokenizer_sha256
from pipeline.model.points import Point
from pipeline.model.specials import first_ids, resolve_bos, resolve_separator, special_ids
from pipeline.model.split_lm import ModelInfo, load_tokenizer
from pipeline.store.layout import CHUNK_ROWS, EVAL_SHARE, estimate_bytes, shard_rows_for
from pipeline.store.prepare import extended, holds_tokens, segments
from pipeline.store.reader import Store

BATCH_ROWS = {"cpu": 2048, "cuda": 32_768}
"""Tokens of one forward pass when no batch size is asked for."""


@dataclass(frozen=True)
class Corpora:
    """Where documents come from; opened when first needed. Without one of its own, evaluation shares the training corpus."""

    training: Source
    evaluation: Source | None
    scratch: Path

    @cached_property
    def opened(self) -> tuple[Corpus, Corpus | None]:
        """Training corpus, separate evaluation corpus. Raises CorpusError, also when the one is in the other."""
        training = open_corpus(self.training)
        other = None if self.evaluation is None else open_corpus(self.evaluation)
        if other is not None:
            require_other(training, other)
        return training, other

    def identities(self, held: Mapping[str, Any], *, read: bool = True) -> dict[str, Any]:
        """What the store's config says of them. read: text is needed of them; otherwise files on record may be gone, and be those
        of a version that read them in another order."""
        ours = {"corpus": self.training} | ({} if self.evaluation is None else {"eval_corpus": self.evaluation})
        if not read and all(is_on_record(source, held.get(name)) for name, source in ours.items()):
            return {"eval_corpus": None} | {name: held[name] for name in ours}
        training, other = self.opened
        return {
            "corpus": keep_name(training.identity, held.get("corpus")),
            "eval_corpus": None if other is None else keep_name(other.identity, held.get("eval_corpus")),
        }


def is_on_record(source: Source, held: Mapping[str, Any] | None) -> bool:
    """Whether the files that a store's config names are those of this source, as far as can be told: read as then, and with the
    same bytes or gone."""
    if not held or {n: held.get(n) for n in source.about} != source.about:
        return False
    if held.get("skip_bad", 0) != source.skip_bad:
        return False
    local = Path(source.corpus).expanduser().exists()
    if "sha256" not in held:  # of the Hub
        before = SHUFFLED.format(buffer=source.buffer, seed=source.seed)
        asked = (source.corpus, source.subset, source.split, before)
        return not local and tuple(map(held.get, ("id", "subset", "split", "order"))) == asked
    if not local:
        return bool(held["id"] == source.corpus)
    return bool(LocalCorpus(source).sha256 == held["sha256"])


@dataclass(frozen=True)
class Plan:
    """A harvest with nothing left open. `stores`: point → path; `configs`: point → the config its store records;
    `segments`: cumulative training sequences, this harvest's last; `is_new`: no store of it is there yet;
    `asked_batch_size`: that of the config was asked for."""

    config: HarvestConfig
    info: ModelInfo
    tokenizer: Any
    corpora: Corpora
    device: torch.device
    packing: Packing
    segments: tuple[int, ...]
    n_train: int
    n_eval: int
    stores: Mapping[Point, str]
    configs: Mapping[Point, dict[str, Any]]
    is_new: bool
    asked_batch_size: bool

    def with_batch_size(self, batch_size: int) -> Plan:
        """The same with batches of so many sequences, as the stores will record."""
        configs = {point: config | {"batch_size": batch_size} for point, config in self.configs.items()}
        return dataclasses.replace(self, config=self.config.replace(batch_size=batch_size), configs=configs)

    @property
    def name(self) -> str:
        """The last part of the path of the store, or of the folder of several."""
        return self.config.store.rstrip("/").rpartition("/")[2] or "store"

    @property
    def reader(self) -> Reader:
        """How documents become tokens."""
        first = tuple(first_ids(self.packing.bos))
        return Reader(self.tokenizer, self.info.vocab, self.config.parse_special, self.config.roles, first)

    @property
    def estimate(self) -> int:
        """Bytes of all stores when finished; an upper bound when compressed."""
        return sum(estimate_bytes(config, self.n_train, self.n_eval) for config in self.configs.values())


def make_plan(config: HarvestConfig, *, repair: bool = False) -> Plan:
    """Settle a harvest; reads no text and no weights but to hash them. Raises UsageError, ModelError, CorpusError.

    With `repair` the corpus is taken to be the one on record, and a store whose root is damaged is as none.
    """
    stores = config.stores()
    info = ModelInfo.read(config.model, config.revision, trust_remote_code=config.trust_remote_code)
    info.require_layers(config.layers)
    info.require_context(config.context)
    tokenizer = load_tokenizer(config.model, config.revision, trust_remote_code=config.trust_remote_code)
    recorded = recorded_store(stores, repair)
    held: dict[str, Any] = recorded.config if recorded else {}
    asked_batch_size = bool(config.batch_size)
    config, device = settle(config, held)
    packing = make_packing(config, tokenizer)
    special = special_ids(tokenizer, *first_ids(packing.bos), packing.separator)
    shared = shared_config(config, info, device, packing, special, held)
    sources = find_corpora(config, held)
    kept = {"corpus": held["corpus"], "eval_corpus": held["eval_corpus"]} if repair and held else None
    n_evaluated = n_eval(config, recorded)
    read = not all(holds_tokens(path, config.n_train, n_evaluated) for path in stores.values())
    shared |= kept or sources.identities(held, read=read)
    earlier = next((found for path in stores.values() if (found := segments(path, repair=repair))), ())
    return Plan(
        config=config,
        info=info,
        tokenizer=tokenizer,
        corpora=sources,
        device=device,
        packing=packing,
        segments=extended(earlier, config.n_train),
        n_train=config.n_train,
        n_eval=n_evaluated,
        stores=stores,
        configs={point: shared | point.recorded for point in stores},
        is_new=recorded is None,
        asked_batch_size=asked_batch_size,
    )


def recorded_store(stores: Mapping[Point, str], repair: bool) -> Store | None:
    """The first of the stores that is there, read but not checked. Raises DamagedError unless `repair`."""
    for path in stores.values():
        try:
            return Store.load(path)
        except StoreError:
            continue
        except DamagedError:
            if not repair:
                raise
    return None


def settle(config: HarvestConfig, held: Mapping[str, Any]) -> tuple[HarvestConfig, torch.device]:
    """Replace every `auto` and None: by what the store on disk was made with, else by what suits the machine."""
    device = resolve_device(held.get("device_type", "auto") if config.device == "auto" else config.device)
    chunk = config.chunk_rows or held.get("chunk_rows") or max(CHUNK_ROWS // config.context, 1) * config.context
    shard = config.shard_rows or held.get("shard_rows") or shard_rows_for(config.tokens, chunk)
    fitting = max(1, min(BATCH_ROWS.get(device.type, BATCH_ROWS["cpu"]), shard) // config.context)
    computed = held.get("compute_dtype", held.get("dtype", "auto")) if config.dtype == "auto" else config.dtype
    stored = held.get("dtype", "bf16") if config.dtype == "auto" else config.dtype
    settled = config.replace(
        chunk_rows=chunk,
        shard_rows=shard,
        dtype=resolve_dtype(computed, device),
        store_dtype=stored if config.store_dtype == "auto" else config.store_dtype,
        batch_size=config.batch_size or held.get("batch_size") or 1 << (fitting.bit_length() - 1),
    )
    return settled, device


def make_packing(config: HarvestConfig, tokenizer: Any) -> Packing:
    """BOS and separator of the rows. Raises ModelError when the tokenizer has neither BOS nor EOS."""
    bos = resolve_bos(tokenizer, config.bos)
    return Packing(config.context, bos, resolve_separator(tokenizer, bos, config.model))


def n_eval(config: HarvestConfig, recorded: Store | None) -> int:
    """Evaluation sequences: as asked, as the store has them, or one for every EVAL_SHARE of training, at least one."""
    if config.eval_tokens is not None:
        return config.eval_tokens // config.context
    return recorded.eval.n_sequences if recorded else max(1, config.n_train // EVAL_SHARE)


def shared_config(
    config: HarvestConfig,
    info: ModelInfo,
    device: torch.device,
    packing: Packing,
    special: list[int],
    held: Mapping[str, Any],
) -> dict[str, Any]:
    """What the stores of all layers record, without the corpus and the layer. FORMAT.md lists the fields.

    A model that moved to another folder but has the same bytes keeps the name it has on record. Of a harvest that goes on
    elsewhere (`mixed`), `device_type` stays where it began.
    """
    files = {"weights_sha256": info.weights_sha256, "tokenizer_sha256": tokenizer_sha256(info.folder)}
    same = all(held.get(name) == value for name, value in files.items())
    return (
        {
            "model": held["model"] if same else config.model,
            "revision": held["revision"] if same else info.revision,
            **files,
            "n_layers": info.n_layers,
            "d_model": info.d_model,
            "vocab": info.vocab,
            "context": config.context,
            "seed": config.seed,
            "bos": packing.bos,
            "separator": packing.separator,
            "special_ids": special,
            "dtype": config.store_dtype,
            "attention": config.attention,
            "compile": config.compile,
            "batch_size": config.batch_size,
            "device_type": held["device_type"] if config.mixed and held else device.type,
            "shard_rows": config.shard_rows,
            "chunk_rows": config.chunk_rows,
            "codec": config.codec,
        }
        | architecture(info, held)
        | computed_config(config)
        | texts_config(config)
    )


def architecture(info: ModelInfo, held: Mapping[str, Any]) -> dict[str, Any]:
    """The hash of the model's config.json. Stores without this field go on without it."""
    found = None if held and "architecture_sha256" not in held else architecture_sha256(info.folder)
    return {} if found is None else {"architecture_sha256": found}


def computed_config(config: HarvestConfig) -> dict[str, Any]:
    """What the model computes in, where it is not what is stored; stores without this field were computed as stored."""
    return {} if config.dtype == config.store_dtype else {"compute_dtype": config.dtype}


def texts_config(config: HarvestConfig) -> dict[str, Any]:
    """How texts are read, where it is not the plain way; stores without these fields were read plainly."""
    special = {"parse_special": True} if config.parse_special else {}
    return special | ({"roles": list(config.roles)} if config.roles else {})


def keep_name(identity: dict[str, Any], held: Mapping[str, Any] | None) -> dict[str, Any]:
    """A local corpus that moved but has the same bytes keeps the name it has on record."""
    same = held is not None and "sha256" in identity and identity["sha256"] == held.get("sha256")
    return identity | {"id": held["id"]} if held is not None and same else identity


def find_corpora(config: HarvestConfig, held: Mapping[str, Any]) -> Corpora:
    """The sources that the options name; a streamed dataset stays at the commit on record."""

    def source(name: str, corpus: str, subset: str | None) -> Source:
        revision = (held.get(name) or {}).get("revision")
        return Source(
            corpus,
            subset=subset,
            split=config.split,
            text_field=config.text_field,
            seed=config.seed,
            buffer=config.max_buffer,
            revision=revision,
            skip_bad=config.skip_bad,
        )

    return Corpora(
        training=source("corpus", config.corpus, config.subset),
        evaluation=None if config.eval_corpus is None else source("eval_corpus", config.eval_corpus, None),
        scratch=beside(config.store),
    )
