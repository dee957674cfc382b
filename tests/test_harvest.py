"""The harvest stage: exact rows, whole stores, refusals that say why."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import threading
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

import harvest.forward
import harvest.plan
import harvest.run
import harvest.truth.run
from harvest.__main__ import command
from harvest.config import HarvestConfig
from harvest.forward import Block, HostCopies, Sequences, Shard
from harvest.plan import settle
from harvest.run import dry_run, run
from harvest.truth.run import TruthConfig, run_truth
from pipeline.base import runtime
from pipeline.base.errors import CorpusError, DamagedError, DiskError, MismatchError, ModelError, StoreError, UsageError
from pipeline.base.files import lock_folder
from pipeline.model.points import Point
from pipeline.model.split_lm import SplitLM, load_tokenizer
from pipeline.store.makers import record_makers
from pipeline.store.moments import Measured, measure_rows
from pipeline.store.reader import Store, describe_store
from pipeline.store.root import write_root
from pipeline.store.writer import ShardWriter
from support import tiny_models
from support.harvests import BATCH, CONTEXT, harvest_config, plain_rows, store_bytes
from support.stores import lose_shards

Folder = Callable[[str], Path]
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="session")
def corpus_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of 120 short documents."""
    return tiny_models.make_corpus(tmp_path_factory.mktemp("corpus") / "corpus.jsonl")


@pytest.fixture
def config(lm_folder: Folder, corpus_file: Path, tmp_path: Path) -> HarvestConfig:
    """A harvest of layer 1 of a tiny Gemma-2 in bf16."""
    return harvest_config(lm_folder("gemma2"), corpus_file, tmp_path / "acts.zarr")


@pytest.fixture(scope="session")
def finished(lm_folder: Folder, corpus_file: Path, tmp_path_factory: pytest.TempPathFactory) -> HarvestConfig:
    """The same harvest, done. Copy its store to damage it."""
    config = harvest_config(lm_folder("gemma2"), corpus_file, tmp_path_factory.mktemp("finished") / "acts.zarr")
    run(config, quiet=True)
    return config


@pytest.fixture
def copy(finished: HarvestConfig, tmp_path: Path) -> HarvestConfig:
    """The config of a copy of the finished harvest."""
    return finished.replace(store=str(shutil.copytree(finished.store, tmp_path / "copy.zarr")))


@pytest.mark.parametrize("dtype", ["float32", "bf16"])
@pytest.mark.parametrize("kind", tiny_models.KINDS)
def test_store_is_a_plain_forward(lm_folder: Folder, corpus_file: Path, tmp_path: Path, kind: str, dtype: Any) -> None:
    """What is stored is a plain forward bit for bit."""
    config = harvest_config(lm_folder(kind), corpus_file, tmp_path / "acts.zarr", dtype=dtype)
    run(config, quiet=True)
    store = Store.open(config.store)
    for split in (store.train, store.eval):
        plain = plain_rows(lm_folder(kind), store, split.name, layer=1)
        assert torch.equal(split.read(0, split.n_rows), plain)


def test_wide_layer_equals_at_recorded_batch(corpus_file: Path, tmp_path: Path) -> None:
    """A wide layer is stored bit for bit at the recorded batch size."""
    wide = {"hidden_size": 2304, "intermediate_size": 512, "num_hidden_layers": 1, "head_dim": 64}
    folder = tiny_models.make_model(tmp_path / "wide", "gemma2", dtype=torch.bfloat16, **wide)
    config = harvest_config(folder, corpus_file, tmp_path / "acts.zarr", layers=(0,), tokens=400, eval_tokens=64)
    run(config, quiet=True)
    store = Store.open(config.store)
    assert torch.equal(store.train.read(0, 400), plain_rows(folder, store, "train", layer=0))


def test_store_says_how_it_was_made(finished: HarvestConfig) -> None:
    """The store says how it was made."""
    store = Store.open(finished.store)
    held = store.config
    assert (store.train.n_sequences, store.eval.n_sequences, store.context) == (100, 20, CONTEXT)
    assert (held["layer"], held["n_layers"], held["d_model"], held["vocab"]) == (1, 4, 64, tiny_models.VOCAB)
    assert (held["bos"], held["separator"], held["special_ids"]) == (2, 2, [0, 1, 2, 3])
    assert (held["dtype"], held["attention"], held["batch_size"], held["device_type"]) == (
        "bf16",
        "eager",
        BATCH,
        "cpu",
    )
    assert held["corpus"]["order"] == "documents permuted by seed 0"
    assert all(len(held[name]) == 64 for name in ("weights_sha256", "tokenizer_sha256"))
    assert {"torch", "transformers", "zarr"} <= store.attributes["versions"].keys()


def test_sequences_start_with_marked_bos(finished: HarvestConfig) -> None:
    """Every sequence starts with BOS and special tokens are marked."""
    store = Store.open(finished.store)
    for split in (store.train, store.eval):
        assert (split.tokens[:, 0] == 2).all()
        assert (split.special == (split.tokens == 2)).all()
        assert not split.kept()[::CONTEXT].any()


def test_no_document_is_in_both_splits(finished: HarvestConfig) -> None:
    """No document is in both splits."""
    store, tokenizer = Store.open(finished.store), load_tokenizer(finished.model)
    names = {}
    for split in (store.train, store.eval):
        text = " ".join(tokenizer.decode(row[row != 2]) for row in split.tokens)
        names[split.name] = {n for n in range(120) if f"0-{n}:" in text}
    assert len(names["train"]) > 5
    assert len(names["eval"]) > 1
    assert not names["train"] & names["eval"]


def test_evaluation_sees_its_own_corpus(config: HarvestConfig, tmp_path: Path) -> None:
    """An evaluation corpus of its own is all that evaluation sees."""
    other = tiny_models.make_corpus(tmp_path / "other.jsonl", seed=7)
    config = config.replace(eval_corpus=str(other))
    run(config, quiet=True)
    store, tokenizer = Store.open(config.store), load_tokenizer(config.model)
    texts = {s.name: " ".join(tokenizer.decode(row) for row in s.tokens) for s in (store.train, store.eval)}
    assert ("0-" in texts["train"], "7-" in texts["train"]) == (True, False)
    assert ("0-" in texts["eval"], "7-" in texts["eval"]) == (False, True)
    assert store.config["eval_corpus"]["id"] == str(other)


@pytest.mark.parametrize(("field", "value"), [("sliding_window", 7), ("transformers_version", "9.9")])
def test_changed_model_config_is_another_model(
    config: HarvestConfig, tmp_path: Path, field: str, value: int | str
) -> None:
    """A harvest is not gone on with when a number of its model's config.json changed; who saved that file does not matter."""
    folder = Path(shutil.copytree(config.model, tmp_path / "model"))
    config = config.replace(model=str(folder))
    run(config, quiet=True)
    known = json.loads((folder / "config.json").read_text())
    assert known.get(field) != value
    (folder / "config.json").write_text(json.dumps(known | {field: value}))
    if field == "transformers_version":
        run(config, quiet=True)
        return
    with pytest.raises(MismatchError, match="architecture_sha256: there"):
        run(config.replace(tokens=3200), quiet=True)


def test_training_texts_are_no_evaluation_corpus(
    config: HarvestConfig, corpus_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The training corpus in other files is refused by its documents, before the model runs."""
    again = tmp_path / "again.jsonl"
    lines = corpus_file.read_text().splitlines()
    again.write_text("".join(json.dumps({"n": 1} | json.loads(line)) + "\n" for line in lines))
    monkeypatch.setattr(harvest.run, "make_shards", lambda *_: pytest.fail("the model ran"))
    with pytest.raises(CorpusError, match=r"--eval-corpus: .* documents are in the training corpus too"):
        run(config.replace(eval_corpus=str(again)), quiet=True)


def test_documents_in_both_splits_are_counted(
    config: HarvestConfig, corpus_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One document of an evaluation corpus that training has too is said."""
    others = tiny_models.make_corpus(tmp_path / "other.jsonl", seed=7).read_text().splitlines()[:2]
    (tmp_path / "other.jsonl").write_text("\n".join([corpus_file.read_text().splitlines()[0], *others]) + "\n")
    run(config.replace(eval_corpus=str(tmp_path / "other.jsonl"), tokens=5920, eval_tokens=160))
    assert "note     1 of 3 evaluation documents are in training too" in capsys.readouterr().err


def test_sequences_are_shuffled_by_the_seed(config: HarvestConfig, finished: HarvestConfig) -> None:
    """Sequences are shuffled by the seed."""
    other = config.replace(seed=1)
    run(other, quiet=True)
    one, two = Store.open(finished.store).train.tokens, Store.open(other.store).train.tokens
    assert not np.array_equal(one, two)


def test_joint_layers_equal_single_harvests(config: HarvestConfig, finished: HarvestConfig, tmp_path: Path) -> None:
    """Several layers in one pass are the stores of each alone."""
    several = config.replace(store=str(tmp_path / "stores"), layers=(2, 1))
    assert run(several, quiet=True) == [str(tmp_path / "stores" / f"layer_{layer}.zarr") for layer in (2, 1)]
    assert store_bytes(tmp_path / "stores" / "layer_1.zarr") == store_bytes(Path(finished.store))
    alone = config.replace(layers=(2,))
    run(alone, quiet=True)
    assert store_bytes(tmp_path / "stores" / "layer_2.zarr") == store_bytes(Path(alone.store))


def test_added_layer_spares_the_first(config: HarvestConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer added later leaves the one there alone."""
    both = config.replace(store=str(tmp_path / "stores"), layers=(1, 2))
    run(both, quiet=True)
    before = store_bytes(tmp_path / "stores" / "layer_1.zarr")
    shutil.rmtree(tmp_path / "stores" / "layer_2.zarr")
    loaded = record_loads(monkeypatch)
    run(both, quiet=True)
    assert store_bytes(tmp_path / "stores" / "layer_1.zarr") == before
    assert loaded == [[2]]


def record_loads(patch: pytest.MonkeyPatch) -> list[list[int]]:
    """The layers of every model that is loaded from now on."""
    loaded: list[list[int]] = []
    original = SplitLM.load

    def load(*args: Any, **options: Any) -> SplitLM:
        loaded.append([point.layer for point in options["layers"]])
        return original(*args, **options)

    patch.setattr(SplitLM, "load", load)
    return loaded


def test_one_and_several_layers_differ(copy: HarvestConfig) -> None:
    """One layer and several do not share a path."""
    with pytest.raises(UsageError, match="holds the store of one layer"):
        run(copy.replace(layers=(1, 2)), quiet=True)


def test_repeated_command_changes_nothing(copy: HarvestConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same command again changes nothing and loads no model."""
    before, loaded = store_bytes(Path(copy.store)), record_loads(monkeypatch)
    run(copy, quiet=True)
    assert store_bytes(Path(copy.store)) == before
    assert loaded == []


def test_more_tokens_extend_the_store(copy: HarvestConfig) -> None:
    """More tokens extend the store and leave its whole shards as they are."""
    before, store = store_bytes(Path(copy.store)), Store.open(copy.store)
    tokens = store.train.tokens.copy()
    run(copy.replace(tokens=2400), quiet=True)
    after, extended = store_bytes(Path(copy.store)), Store.open(copy.store)
    assert extended.attributes["segments"] == [100, 150]
    assert (extended.train.tokens[:100] == tokens).all()
    assert all(before[key] == after[key] for key in (f"train/resid/c/{k}/0" for k in range(6)))
    assert all(extended.train.record(k).digests == store.train.record(k).digests for k in range(6))
    assert {key for key in before if key.startswith("eval/resid")} <= {k for k in before if before[k] == after.get(k)}
    plain = plain_rows(Path(copy.model), extended, "train", layer=1)
    assert torch.equal(extended.train.read(0, 2400), plain)


def test_fewer_tokens_are_refused(copy: HarvestConfig) -> None:
    """Fewer tokens than there are is refused."""
    with pytest.raises(MismatchError, match="holds 100 training sequences, asked fewer"):
        run(copy.replace(tokens=800), quiet=True)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"layers": (2,)}, "layer: there 1, asked 2"),
        ({"dtype": "float32"}, "dtype: there 'bf16', asked 'float32'"),
        ({"seed": 1}, "seed: there 0, asked 1"),
        ({"batch_size": 4}, "batch_size: there 6, asked 4"),
        ({"bos": "3"}, "bos: there 2, asked 3"),
        ({"attention": "sdpa"}, "attention: there 'eager', asked 'sdpa'"),
        ({"shard_rows": 512}, "shard_rows: there 256, asked 512"),
        ({"codec": "zstd"}, "codec: there 'none', asked 'zstd'"),
        ({"context": 32, "chunk_rows": 64}, "context: there 16, asked 32"),
        ({"eval_tokens": 640}, "holds 20 evaluation sequences, asked 40"),
    ],
)
def test_changed_config_is_refused(copy: HarvestConfig, changes: dict[str, Any], field: str) -> None:
    """Another config on the same path is refused, naming the fields."""
    before = store_bytes(Path(copy.store))
    with pytest.raises(MismatchError, match=field):
        run(copy.replace(**changes), quiet=True)
    assert store_bytes(Path(copy.store)) == before


def test_machine_choices_come_from_the_record(copy: HarvestConfig) -> None:
    """What was left to the machine is taken from the record."""
    before = store_bytes(Path(copy.store))
    again = copy.replace(
        batch_size=None, shard_rows=None, chunk_rows=None, eval_tokens=None, dtype="auto", device="auto"
    )
    run(again, quiet=True)
    assert store_bytes(Path(copy.store)) == before


def test_computed_and_stored_dtypes_differ(lm_folder: Folder, corpus_file: Path, tmp_path: Path) -> None:
    """Rows computed in float32 may be stored in bf16: each is the float32 model's, rounded; a resume keeps both."""
    folder = lm_folder("llama")
    config = harvest_config(folder, corpus_file, tmp_path / "acts.zarr", dtype="float32", store_dtype="bf16")
    run(config, quiet=True)
    store = Store.open(config.store)
    assert (store.config["compute_dtype"], store.config["dtype"]) == ("float32", "bf16")
    whole = Store.open(run(config.replace(store=str(tmp_path / "whole.zarr"), store_dtype="auto"), quiet=True)[0])
    assert "compute_dtype" not in whole.config
    assert torch.equal(store.train.read(0, 1600), whole.train.read(0, 1600).bfloat16())
    before = store_bytes(Path(config.store))
    run(config.replace(dtype="auto", store_dtype="auto"), quiet=True)
    assert store_bytes(Path(config.store)) == before
    with pytest.raises(MismatchError, match="compute_dtype: there 'float32', asked"):
        run(config.replace(dtype="bf16"), quiet=True)


@pytest.mark.parametrize("fast", [True, False])
def test_auto_computes_what_is_fast(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fast: bool) -> None:
    """Without --dtype a harvest computes in bf16 only where the CPU multiplies it, and stores bf16."""
    monkeypatch.setattr(runtime, "cpu_has_bf16", lambda: fast)
    settled, _ = settle(HarvestConfig(store=str(tmp_path), device="cpu"), {})
    assert (settled.dtype, settled.store_dtype) == ("bf16" if fast else "float32", "bf16")


@pytest.mark.parametrize(("capability", "fast"), [("AVX512", True), ("AVX2", False), ("DEFAULT", False)])
def test_auto_sees_torch_held_back(monkeypatch: pytest.MonkeyPatch, capability: str, fast: bool) -> None:
    """On a CPU with bf16, `auto` is float32 where ATEN_CPU_CAPABILITY holds torch below what has it."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(Path, "exists", lambda path: True)
    monkeypatch.setattr(Path, "read_text", lambda path: "flags: fpu amx_bf16")
    assert runtime.cpu_has_bf16.__wrapped__() == fast


@pytest.mark.parametrize(
    ("flags", "most", "gain", "fast"),
    [
        ("amx_bf16 avx512_bf16", None, None, True),
        ("amx_bf16 avx512_bf16", "AVX512_CORE_AMX", None, True),
        ("amx_bf16 avx512_bf16", "AVX512_CORE_BF16", 0.6, False),
        ("amx_bf16 avx512_bf16", "AVX2", None, False),
        ("avx512_bf16", None, 2.0, True),
        ("avx512_bf16", None, 0.6, False),
        ("avx512f", None, None, False),
    ],
)
def test_auto_measures_without_amx(
    monkeypatch: pytest.MonkeyPatch, flags: str, most: str | None, gain: float | None, fast: bool
) -> None:
    """By AVX512-BF16 alone `auto` is bf16 where its product is the faster one; where flags decide nothing is measured."""
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    if most is not None:
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", most)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(Path, "exists", lambda path: True)
    monkeypatch.setattr(Path, "read_text", lambda path: f"flags: fpu {flags}")

    def rate(dtype: torch.dtype, *shape: object, rounds: int) -> float:
        assert gain is not None, "measured"
        return gain if dtype == torch.bfloat16 else 1.0

    monkeypatch.setattr(runtime, "product_rate", rate)
    assert runtime.cpu_has_bf16.__wrapped__() == fast


def test_moved_sources_continue_changed_do_not(copy: HarvestConfig, tmp_path: Path) -> None:
    """A model and a corpus that moved go on and changed ones do not."""
    moved = copy.replace(
        model=str(shutil.copytree(copy.model, tmp_path / "moved")),
        corpus=str(shutil.copy(copy.corpus, tmp_path / "corpus.jsonl")),
    )
    run(moved, quiet=True)
    with open(moved.corpus, "a") as file:
        file.write('{"text": "one more"}\n')
    with pytest.raises(MismatchError, match="corpus"):
        run(moved, quiet=True)
    weights = load_file(Path(moved.model) / "model.safetensors")
    save_file(
        {name: tensor + 1 for name, tensor in weights.items()},
        Path(moved.model) / "model.safetensors",
        {"format": "pt"},
    )
    with pytest.raises(MismatchError, match="weights_sha256"):
        run(moved.replace(corpus=copy.corpus), quiet=True)


def damage(kind: str, store: Path) -> None:
    """One way in which a store can be hurt."""
    shard, commit, root = store / "train/resid/c/2/0", store / "train/commit/c/0/0", store / "zarr.json"
    files = {
        "body": shard,
        "commit": commit,
        "metadata": store / "train/resid/zarr.json",
        "tokens": store / "train/tokens/c/0/0",
    }
    files |= {
        "norm": store / "train/norm/c/0",
        "root": root,
        "mean": store / "mean/c/0",
        "eval": store / "eval/resid/c/0/0",
    }
    if kind == "deleted":
        shard.unlink()
    elif kind == "truncated":
        shard.write_bytes(shard.read_bytes()[:-7])
    else:
        data = bytearray(files[kind].read_bytes())
        data[len(data) // 2] ^= 4
        files[kind].write_bytes(data)


DAMAGES = ("body", "commit", "metadata", "tokens", "norm", "root", "mean", "eval", "deleted", "truncated")


@pytest.mark.parametrize("kind", DAMAGES)
def test_repair_remakes_only_damaged_shards(copy: HarvestConfig, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Repair makes exactly the damaged shards again."""
    before = store_bytes(Path(copy.store))
    damage(kind, Path(copy.store))
    assert Store.open(copy.store).verify() if kind == "body" else store_bytes(Path(copy.store)) != before
    made: list[tuple[str, int]] = []
    original = harvest.forward.batches
    monkeypatch.setattr(
        harvest.forward, "batches", lambda w, shard, n: made.append((shard.split, shard.k)) or original(w, shard, n)
    )
    run(copy, quiet=True, repair=True)
    if kind == "root":  # it alone says who made the rows
        assert Store.load(copy.store).made_by == []
        store = Store.load(copy.store)
        write_root(store.files, store.attributes | {"made_by": [HERE]})
    assert store_bytes(Path(copy.store)) == before
    redone = {"body": [("train", 2)], "deleted": [("train", 2)], "truncated": [("train", 2)], "commit": [("train", 3)]}
    assert made == (redone | {"norm": [("train", 3)], "eval": [("eval", 0)]}).get(kind, [])


HERE = {"torch": version("torch"), "transformers": version("transformers"), "device": "cpu"}
OTHERS = [HERE | {"torch": "1.0"}, HERE | {"transformers": "1.0"}, HERE | {"device": "Voodoo 2"}]


@pytest.mark.parametrize("other", OTHERS)
def test_rows_of_others_are_refused(
    copy: HarvestConfig, monkeypatch: pytest.MonkeyPatch, other: dict[str, str]
) -> None:
    """After an upgrade of torch or transformers, or on another GPU, a stopped harvest is refused, and goes on when asked to:
    the store then says both."""
    lose_shards(copy.store, ("train", 2))
    before = store_bytes(Path(copy.store))
    monkeypatch.setattr(harvest.run, "maker", lambda device, packages: other)
    name = next(name for name in HERE if other[name] != HERE[name])
    with pytest.raises(
        MismatchError, match=f"made by others \\({name}: {re.escape(HERE[name])}, here {other[name]}\\)"
    ):
        run(copy, quiet=True)
    assert store_bytes(Path(copy.store)) == before
    run(copy.replace(mixed=True), quiet=True)
    assert Store.open(copy.store).verify() == []
    assert describe_store(Store.load(copy.store))["made_by"] == [HERE, other]
    monkeypatch.undo()
    lose_shards(copy.store, ("train", 3))
    run(copy, quiet=True)  # who is on record may go on
    assert Store.open(copy.store).made_by == [HERE, other]


def test_finished_stores_need_no_maker(copy: HarvestConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a finished store nothing is made, so another torch changes nothing, not a byte; to extend it is refused before a
    shard is given up."""
    before = store_bytes(Path(copy.store))
    monkeypatch.setattr(harvest.run, "maker", lambda device, packages: OTHERS[0])
    run(copy, quiet=True)
    assert store_bytes(Path(copy.store)) == before
    longer = copy.replace(tokens=copy.tokens + 160)
    with pytest.raises(MismatchError, match=r"made by others \(torch: "):
        run(longer, quiet=True)
    assert store_bytes(Path(copy.store)) == before
    run(longer.replace(mixed=True), quiet=True)
    assert Store.open(copy.store).made_by == [HERE, OTHERS[0]]


def test_lost_roots_forget_their_makers(copy: HarvestConfig) -> None:
    """A root that was lost took with it who made the rows: further ones are refused, or stand beside an unknown maker's."""
    damage("root", Path(copy.store))
    run(copy, quiet=True, repair=True)
    lose_shards(copy.store, ("train", 2))
    with pytest.raises(MismatchError, match="made by others \\(device: unknown, here cpu"):
        run(copy, quiet=True)
    run(copy.replace(mixed=True), quiet=True)
    assert Store.open(copy.store).made_by == [dict.fromkeys(HERE, "unknown"), HERE]


def test_no_shards_need_no_maker(config: HarvestConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """A harvest that was killed before its first shard goes on after an upgrade: no row is of the old version."""
    monkeypatch.setattr(harvest.run, "maker", lambda device, packages: OTHERS[0])
    monkeypatch.setattr(harvest.run, "make_shards", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(config, quiet=True)
    assert Store.load(config.store).made_by == [OTHERS[0]]
    monkeypatch.undo()
    run(config, quiet=True)
    assert Store.open(config.store).made_by == [HERE]


def test_processes_are_equal(tmp_path: Path, tiny_store: Path) -> None:
    """Processes of torchrun on two kinds of GPU are refused for a new store too, unless that is asked for."""
    store = Store.load(shutil.copytree(tiny_store, tmp_path / "s.zarr"))
    lose_shards(store.path, *((split.name, k) for split in store.splits for k in range(split.n_shards)))
    store = Store.load(store.path)
    with pytest.raises(MismatchError, match=r"processes of this harvest differ \(device: cpu, here Voodoo 2\)"):
        record_makers(store, [HERE, OTHERS[2]], mixed=False)
    record_makers(store, [HERE, OTHERS[2], HERE], mixed=True)
    assert Store.load(store.path).made_by == [HERE, OTHERS[2]]


def test_a_truth_knows_its_maker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of known features, which torch and numpy make, are of one maker too."""
    config = TruthConfig("tree", store=str(tmp_path / "t.zarr"), tokens=640, eval_tokens=320, context=16, chunk_rows=64)
    run_truth(config)
    here = {"torch": version("torch"), "numpy": version("numpy"), "device": "cpu"}
    assert Store.open(config.store).made_by == [here]
    lose_shards(config.store, ("eval", 0))
    monkeypatch.setattr(harvest.truth.run, "maker", lambda device, packages: here | {"numpy": "1.0"})
    for changes in ({}, {"tokens": 800}):
        with pytest.raises(MismatchError, match=r"made by others \(numpy: "):
            run_truth(dataclasses.replace(config, **changes))
    run_truth(dataclasses.replace(config, mixed=True))
    assert Store.open(config.store).made_by == [here, here | {"numpy": "1.0"}]


def test_shard_repair_needs_no_corpus(copy: HarvestConfig) -> None:
    """A repair of shards needs no corpus."""
    before = store_bytes(Path(copy.store))
    damage("body", Path(copy.store))
    run(copy.replace(corpus="/gone/corpus.jsonl"), quiet=True, repair=True)
    assert store_bytes(Path(copy.store)) == before


@pytest.mark.parametrize("kind", ["deleted", "truncated", "metadata", "root", "commit"])
def test_damage_is_refused_without_repair(copy: HarvestConfig, kind: str) -> None:
    """Damage is refused without repair."""
    damage(kind, Path(copy.store))
    with pytest.raises((DamagedError, StoreError), match="--repair"):
        run(copy, quiet=True)


def test_concurrent_harvests_are_refused(config: HarvestConfig) -> None:
    """Two harvests of one store at once are refused."""
    folder = Path(config.store)
    folder.mkdir()
    lock = lock_folder(folder, "testing")
    try:
        with pytest.raises(DiskError, match=r"acts.zarr: another process is writing this store; wait for it"):
            run(config, quiet=True)
    finally:
        os.close(lock)
    run(config, quiet=True)
    assert Store.open(folder).complete


def test_added_layer_follows_extension(config: HarvestConfig) -> None:
    """A layer added beside an extended store gets its tokens."""
    both = config.replace(layers=(0, 1))
    run(both.replace(tokens=800), quiet=True)
    run(both, quiet=True)
    shutil.rmtree(Path(config.store) / "layer_0.zarr")
    run(both, quiet=True)
    first, second = (Store.open(Path(config.store) / f"layer_{layer}.zarr") for layer in (0, 1))
    assert (first.train.tokens == second.train.tokens).all()


def test_failed_start_leaves_no_folder(config: HarvestConfig) -> None:
    """A harvest that cannot begin leaves no folder."""
    with pytest.raises(CorpusError, match="shorter than asked"):
        run(config.replace(tokens=10**8), quiet=True)
    assert not Path(config.store).exists()


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({"RANK": "3"}, "RANK=3 and WORLD_SIZE=1, so no such process; unset both"),
        ({"WORLD_SIZE": "4"}, "harvest: the environment has WORLD_SIZE=4 but no MASTER_ADDR; start with torchrun"),
        ({"WORLD_SIZE": "4", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}, "WORLD_SIZE=4 but no RANK"),
    ],
)
def test_stray_ranks_are_named(
    config: HarvestConfig, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], says: str
) -> None:
    """Variables that something other than torchrun left in the environment are named before anything is read."""
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=says):
        run(config, quiet=True)


def test_compiled_layers_are_recorded(config: HarvestConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """--compile compiles every layer that runs, and the store says so: its rows are no plain model's, so a harvest without
    --compile does not go on with it."""
    compiled: list[Any] = []

    def compile_to_twice(forward: Any) -> Any:
        compiled.append(forward)
        return lambda *args, **kwargs: forward(*args, **kwargs) * 2

    monkeypatch.setattr(torch, "compile", compile_to_twice)
    run(config.replace(compile=True), quiet=True)
    store = Store.open(config.store)
    assert len(compiled) >= 2, "layers 0 and 1"
    assert store.config["compile"] is True
    rows, plain = store.train.read(0, 1000), plain_rows(Path(config.model), store, "train", layer=1)
    assert not torch.equal(rows, plain[:1000]), "what ran is what torch.compile gave"
    with pytest.raises(MismatchError, match="compile"):
        run(config.replace(tokens=config.tokens * 2), quiet=True)


def test_failed_compilation_is_one_line(config: HarvestConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where torch.compile finds no compiler, a harvest says so and what to leave out."""

    from torch._dynamo.exc import TorchDynamoException  # slow to import

    def compile_to_nothing(_forward: Any) -> Any:
        def fails(*_args: Any, **_kwargs: Any) -> Any:
            raise TorchDynamoException("no working C++ compiler")

        return fails

    monkeypatch.setattr(torch, "compile", compile_to_nothing)
    with pytest.raises(
        ModelError, match=r"torch.compile cannot compile .*no working C\+\+ compiler.*leave out --compile"
    ):
        run(config.replace(compile=True), quiet=True)


def test_small_disk_is_refused_before_work(config: HarvestConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that is too small is refused before any work."""
    monkeypatch.setattr("pipeline.base.files.free_bytes", lambda path: 100_000)
    with pytest.raises(DiskError, match=r"the store needs 2\d\d\.\d kB, 100\.0 kB are free"):
        run(config, quiet=True)
    assert not Path(config.store).exists()


@pytest.mark.parametrize("codec", ["none", "zstd"])
def test_size_estimate_is_right(config: HarvestConfig, codec: Any) -> None:
    """The estimate of the size is right."""
    config = config.replace(codec=codec)
    run(config, quiet=True)
    estimate = harvest.plan.make_plan(config).estimate
    actual = sum(p.stat().st_size for p in Path(config.store).rglob("*") if p.is_file())
    assert actual <= estimate
    if codec == "none":
        assert estimate - actual < 8192  # the slack for the root's zarr.json


def test_dry_run_writes_nothing(config: HarvestConfig, capsys: pytest.CaptureFixture[str]) -> None:
    """A dry run says what it would do and writes nothing."""
    dry_run(config)
    said = capsys.readouterr().err
    assert "1,600 for training, 320 for evaluation" in said
    assert "1,920 rows × 1 stores" in said
    assert not Path(config.store).exists()


def test_writer_error_leaves_nothing_half(
    config: HarvestConfig, finished: HarvestConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error of the writing thread ends the harvest and leaves nothing half."""
    original, calls = ShardWriter.write, []

    def full(writer: ShardWriter, rows: torch.Tensor, measured: Measured | None) -> None:
        calls.append(1)
        if len(calls) == 8:
            raise OSError(28, "No space left on device")
        original(writer, rows, measured)

    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "write", full)
        with pytest.raises(DiskError, match="the disk is full"):
            run(config, quiet=True)
    assert not list(Path(config.store).rglob("*.partial"))
    run(config, quiet=True)
    assert store_bytes(Path(config.store)) == store_bytes(Path(finished.store))


def test_one_stores_error_ends_all(config: HarvestConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error in the thread of one store of several ends the harvest, and leaves nothing half of any."""
    original = ShardWriter.write

    def full(writer: ShardWriter, rows: torch.Tensor, measured: Measured | None) -> None:
        if "layer_0" in str(writer.stream.file.name) and writer.n_written:
            raise OSError(28, "No space left on device")
        original(writer, rows, measured)

    monkeypatch.setattr(ShardWriter, "write", full)
    before = threading.active_count()
    with pytest.raises(DiskError, match="the disk is full"):
        run(config.replace(layers=(0, 1), store=str(tmp_path / "two")), quiet=True)
    assert not list(tmp_path.rglob("*.partial"))
    assert threading.active_count() == before


def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are measured where they are computed, and not by the thread that writes them."""
    original = HostCopies.to_host

    def to_host(self: HostCopies, shard: Shard, residuals: Any, sequences: Sequences) -> dict[Point, Block]:
        blocks = original(self, shard, residuals, sequences)
        return {
            point: dataclasses.replace(block, measured=measure_rows(block.rows, sequences.special))
            for point, block in blocks.items()
        }

    monkeypatch.setattr(HostCopies, "to_host", to_host)


def test_device_sums_are_the_writers(
    config: HarvestConfig, finished: HarvestConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Norms that a device takes are those of the thread that writes, bit for bit, and so are all files but the sums, which
    are added in another order."""
    as_on_a_gpu(monkeypatch)
    run(config, quiet=True)
    found, expected = Store.open(config.store), Store.open(finished.store)
    for mine, theirs in zip(found.splits, expected.splits):
        assert (mine.norm == theirs.norm).all()
        assert mine.moments == pytest.approx(theirs.moments, rel=1e-12, abs=1e-12)
        assert torch.equal(mine.read(0, mine.n_rows), theirs.read(0, theirs.n_rows))
    assert found.statistics.scale == pytest.approx(expected.statistics.scale, rel=1e-12)


def short_of_memory(monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    """As on a GPU whose memory holds so many sequences of a forward pass."""
    original = SplitLM.prefix

    def prefix(lm: SplitLM, tokens: torch.Tensor) -> Any:
        if len(tokens) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(lm, tokens)

    monkeypatch.setattr(SplitLM, "prefix", prefix)
    monkeypatch.setattr(harvest.run, "try_cuts", lambda plan: None)
    monkeypatch.setattr(harvest.run, "finds_batch_size", lambda plan: plan.is_new and not plan.asked_batch_size)


def test_batch_size_is_halved_and_recorded(
    config: HarvestConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without a batch size the largest that fits is found before the store is begun, and is what the store records."""
    short_of_memory(monkeypatch, 5)
    run(config.replace(batch_size=None))
    assert Store.open(config.store).config["batch_size"] == 4
    assert "4 sequences, as 16 do not fit" in capsys.readouterr().err
    asked = config.replace(batch_size=4, store=str(tmp_path / "asked.zarr"))
    run(asked, quiet=True)
    assert store_bytes(Path(config.store)) == store_bytes(Path(asked.store))


def test_too_little_memory_is_said(config: HarvestConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where not even one sequence fits, that is the error, and no store is begun."""
    short_of_memory(monkeypatch, 0)
    with pytest.raises(ModelError, match="not even one sequence of 16 tokens"):
        run(config.replace(batch_size=None), quiet=True)
    assert not Path(config.store).exists()


def test_ctrl_c_resumes_cleanly(
    config: HarvestConfig, finished: HarvestConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C ends cleanly and the same command goes on."""
    original, calls = SplitLM.prefix, []

    def interrupted(lm: SplitLM, tokens: torch.Tensor) -> dict[int, torch.Tensor]:
        calls.append(1)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return original(lm, tokens)

    with monkeypatch.context() as patch:
        patch.setattr(SplitLM, "prefix", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(config, quiet=True)
    assert not list(Path(config.store).rglob("*.partial"))
    with pytest.raises(StoreError, match="unfinished"):
        Store.open(config.store)
    run(config, quiet=True)
    assert store_bytes(Path(config.store)) == store_bytes(Path(finished.store))


def test_infinite_residual_is_refused(config: HarvestConfig, tmp_path: Path) -> None:
    """A residual that is not finite is refused."""
    folder = Path(shutil.copytree(config.model, tmp_path / "broken"))
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.mlp.down_proj.weight"][0, 0] = float("nan")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match="not finite"):
        run(config.replace(model=str(folder)), quiet=True)


def test_eos_separates_without_bos(corpus_file: Path, tmp_path: Path) -> None:
    """Without a BOS documents are separated by EOS."""
    folder = tiny_models.make_model(tmp_path / "lm", "llama", adds_bos=False)
    config = harvest_config(folder, corpus_file, tmp_path / "acts.zarr")
    run(config, quiet=True)
    store = Store.open(config.store)
    assert (store.config["bos"], store.config["separator"]) == (None, 1)
    assert not (store.train.tokens == 2).any()
    assert (store.train.tokens == 1).any()
    assert (store.train.special == ((store.train.tokens == 1) | (np.arange(CONTEXT) == 0))).all()


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"layers": (4,)}, ModelError, "out of range; it has layers 0 to 3"),
        ({"context": 65, "chunk_rows": 65, "shard_rows": 65}, ModelError, "longer than the model's 64"),
        ({"corpus": "/no/corpus.jsonl"}, CorpusError, "no such file or folder"),
        ({"tokens": 10_000_000}, CorpusError, r"the training corpus is shorter than asked: [\d,]+ tokens"),
        ({"chunk_rows": 100}, UsageError, "must be a multiple"),
        ({"device": "cuda:99" if not torch.cuda.is_available() else "tpu"}, UsageError, "--device"),
        ({"bos": "first"}, ModelError, "--bos first"),
    ],
)
def test_bad_input_leaves_no_store(
    config: HarvestConfig, changes: dict[str, Any], error: type[Exception], says: str
) -> None:
    """Bad input is refused and leaves no store."""
    with pytest.raises(error, match=says):
        run(config.replace(**changes), quiet=True)
    assert not Path(config.store).exists()


@pytest.mark.parametrize(
    "changes",
    [{"layers": ()}, {"layers": (1, 1)}, {"context": 1}, {"tokens": 5}, {"eval_tokens": 0}, {"batch_size": 0}],
)
def test_senseless_config_is_refused(config: HarvestConfig, changes: dict[str, Any]) -> None:
    """A config that makes no sense is refused when it is made."""
    with pytest.raises(UsageError):
        config.replace(**changes)


def test_foreign_folder_is_left_alone(config: HarvestConfig) -> None:
    """A folder that holds something else is left alone."""
    Path(config.store).mkdir()
    (Path(config.store) / "thesis.tex").write_text("years of work")
    with pytest.raises(DiskError, match="holds something else"):
        run(config, quiet=True)
    assert [p.name for p in Path(config.store).iterdir()] == ["thesis.tex"]


def test_every_field_has_an_option() -> None:
    """The command has an option for every field."""
    names = {option.name for option in command.params} - {
        *("dry_run", "as_json", "repair", "truth", "prepare_only", "part", "finish_only"),
    }
    assert names == {field.name for field in dataclasses.fields(HarvestConfig)}
    assert {o.name: o.default for o in command.params if o.name in ("tokens", "context", "model", "dtype", "seed")} == {
        "tokens": 10_000_000, "context": 128, "model": "google/gemma-2-2b", "dtype": "auto", "seed": 0,
    }  # fmt: skip


def test_command_reads_count_suffixes(config: HarvestConfig) -> None:
    """The command reads counts with suffixes and makes the store."""
    arguments = f"--model {config.model} --layer 1 --corpus {config.corpus} --store {config.store} --tokens 1.6k"
    arguments += " --eval-tokens 320 --context 16 --batch-size 6 --chunk-rows 64 --shard-rows 256 --device cpu"
    result = CliRunner().invoke(command, arguments.split(), catch_exceptions=False)
    assert result.exit_code == 0
    assert Store.open(config.store).train.n_rows == 1600


def test_help_shows_example_and_defaults() -> None:
    """The help shows an example and the defaults."""
    text = CliRunner().invoke(command, ["--help"]).output
    assert "python -m harvest --model data/tiny-gemma2" in text
    assert "10000000" in text
    assert "kB a token" in text


def test_zarr_reader_sees_the_activations(finished: HarvestConfig) -> None:
    """A zarr reader sees what the model computed."""
    import zarr

    group = zarr.open_group(finished.store, mode="r")
    assert json.loads(json.dumps(dict(group.attrs)))["state"] == "complete"
    bits = np.asarray(group["train/resid"][:])
    rows = Store.open(finished.store).train.read(0, 1600)
    assert (bits == rows.view(torch.uint16).numpy()).all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_gpu_store_is_a_plain_forward(config: HarvestConfig) -> None:
    """On a GPU the store is a plain forward bit for bit too."""
    config = config.replace(device="cuda")
    run(config, quiet=True)
    store = Store.open(config.store)
    model = SplitLM.load(config.model, device="cuda", part="whole", layers=[1])
    seen = []
    for start in range(0, 100, 16):
        for batch in torch.from_numpy(store.train.tokens[start : start + 16].astype("int64")).split(BATCH):
            with torch.no_grad():
                seen.append(model.model(batch.cuda(), output_hidden_states=True).hidden_states[2].flatten(0, 1).cpu())
    assert torch.equal(store.train.read(0, 1600), torch.cat(seen))
