"""What runs on a GPU alone, on a pretended one: no operation mixes devices, the host waits where it may, numbers are a CPU's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from support.interpreter import DEVICE, put_right

pytest.importorskip("triton", reason="needs Triton: pip install triton")

from evaluate.config import EvaluateConfig
from evaluate.run import run as evaluate
from evaluate.scores import behaviour
from evaluate.scores.sample import Sample
from evaluate.scores.scorer import Scorer
from harvest import run as harvesting
from pipeline.base.errors import ModelError
from pipeline.base.results import read_result
from pipeline.model import split_lm
from pipeline.model.split_lm import SplitLM
from pipeline.sae.checkpoint import load_checkpoint
from pipeline.store.reader import Store
from support import harvests, lm_stores, pretend_gpu, tiny_models
from support.pretend_gpu import GPU, OnGpu, moved, pretended
from support.stores import make_store
from train import plan
from train.config import RECIPES, TrainConfig
from train.feed.loader import Loader
from train.feed.order import Order
from train.feed.resident import DeviceRows, Place, place_for
from train.plan import RunConfig
from train.run import run
from train.step.fused.choice import make_normalise, member_kind
from train.step.fused.step import FusedMember
from train.step.member import Member, Pairs, Target
from train.step.scratch import Scratch
from train.step.snapshot import Snapshot
from train.stores import Stores
from train.trainee import Trainee

pytestmark = [
    pytest.mark.triton,
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(DEVICE.type == "cuda", reason="there is a GPU, which tells more"),
]
AUXILIARY: dict[str, Any] = {"k": 5, "aux_k": 6, "dead_after_rows": 40}
FORMS: dict[str, dict[str, Any]] = {
    "paper": {"recipe": "paper", "target_l0": 9.0},
    "batchtopk": {"recipe": "batchtopk", **AUXILIARY},
    "topk": {"recipe": "topk", **AUXILIARY},
    "jumprelu": {"recipe": "jumprelu"},
    "random prefixes": {"recipe": "paper", "level_weighting": "random", "levels": (0.25, 0.5, 1.0)},
    "sparse": {"recipe": "topk", "k": 5, "aux_k": 0, "sparse": True},
    "float64": {"recipe": "batchtopk", "dtype": "float64", **AUXILIARY},
    "transcoder": {"recipe": "batchtopk", "skip": True, **AUXILIARY},
}
ONCE = {"jumprelu": 1}
"""Waits of a member's first step, beside tables that are brought up: thresholds are found on the first batch."""


@pytest.fixture(autouse=True)
def interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter put right, and few programs."""
    put_right(monkeypatch)
    monkeypatch.setattr("train.step.fused.tiles.TALL", 32)


def config_of(recipe: str, **changes: Any) -> TrainConfig:
    """A recipe at the size of these tests."""
    fixed = {"width": 40, "batch_size": 24, "steps": 20, "sparsity_warmup_steps": 0, "eps": 1e-5, "dtype": "bf16"}
    return RECIPES[recipe](**fixed | changes)


def rows(step: int, d_model: int = 12) -> Tensor:
    """A batch of raw rows on the GPU."""
    return torch.randn(24, d_model, generator=torch.Generator().manual_seed(step)).to(GPU)


@pytest.mark.parametrize("form", FORMS)
def test_step_waits_for_nothing(form: str) -> None:
    """Steps, and what a checkpoint takes of a member, make the host wait for nothing; a line of metrics is one fetch."""
    changes = dict(FORMS[form])
    is_sparse = changes.pop("sparse", False)
    config = config_of(**changes)
    with pretended() as waits:
        wide = torch.float64 if config.dtype == "float64" else torch.float32
        center, scratch = torch.full((12,), 0.1, dtype=wide, device=GPU), Scratch(GPU)
        target = Target(torch.zeros(8, device=GPU), 1.0) if form == "transcoder" else None
        kind = member_kind(config, GPU, is_transcoder=target is not None)
        assert (kind is FusedMember) == (form not in ("float64", "transcoder"))
        member = kind(config, 12, center, 1.3, GPU, scratch, target=target, is_sparse=is_sparse)
        normalise, pairs = make_normalise(config, GPU, scratch), Pairs(center, 1.3, target) if target else None
        batch = None
        for step in range(3):
            if pairs is not None:
                batch = pairs.normalise(rows(step), rows(step + 9, 8))
            else:
                batch = normalise(rows(step), center, 1.3, out=batch)
            waits.clear()
            member.step(batch)
            fetches = [wait for wait in waits if " up " not in wait]
            assert len(fetches) == (ONCE.get(form, 0) if step == 0 else 0), fetches
            assert step == 0 or not waits, waits
        make_sae = member.sae_of_state()
        snapshot = Snapshot(member.state())
        member.sae_here()
        assert not waits
        assert torch.isfinite(torch.tensor(member.metrics()["loss"]))
        assert len(waits) == 1
        make_sae(snapshot.tensors())
        assert member.was_finite(snapshot.tensors())


def trained(store: Path, out: Path, device: str, members: tuple[TrainConfig, ...], **options: Any) -> list[Tensor]:
    """Final weights of a run, one after another."""
    outcomes = run(RunConfig(store, out, members, device=device, threads=1, **options))
    found: list[Tensor] = []
    for outcome in outcomes:
        assert outcome.final is not None
        found += load_checkpoint(outcome.final)[0].state_dict().values()
    return found


@pytest.mark.parametrize("where", ["all rows", "two windows", "host"])
def test_run_waits_at_lines_alone(
    where: str,
    tiny_store: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A whole run on a GPU, rows there or on the host, ends near where it does on a CPU; the host waits once a line, for each
    batch that it has to copy, which is said once, and for no checkpoint between lines."""
    options: dict[str, Any] = {"mode": "window", "window_rows": 512} if where == "two windows" else {}
    feed = Loader if where == "host" else DeviceRows
    on_device = plan.place_on_device

    def place(stores: Stores, tasks: Any, device: torch.device, free: int) -> Place | None:
        if where == "all rows" or device.type == "cpu":
            return on_device(stores, tasks, device, free)
        order = plan.make_order(stores, tasks[0])
        windows = 2 * order.most_chunks * stores.train.shape.layout.chunk_nbytes
        return place_for(stores.train, order, windows if where == "two windows" else 0)

    monkeypatch.setattr(plan, "place_on_device", place)
    fixed = {"steps": 4, "log_every": 3, "checkpoint_every": 2, "batch_size": 16, "dtype": "float32", "width": 32}
    members = tuple(config_of("batchtopk", **fixed | AUXILIARY | {"k": 4, "seed": seed}) for seed in range(2))
    expected = trained(tiny_store, tmp_path / "cpu", "cpu", members, **options)
    seen: dict[str, list[int]] = {}

    def counted(kind: type, name: str) -> None:
        before = getattr(kind, name)

        def call(*arguments: Any, **named: Any) -> Any:
            start = len(waits)
            found = before(*arguments, **named)
            seen.setdefault(f"{kind.__name__}.{name}", []).append(len(waits) - start)
            return found

        monkeypatch.setattr(kind, name, call)

    counted(feed, "next")
    counted(Member, "step")
    counted(Trainee, "log")
    counted(Trainee, "save")
    with pretended() as waits:
        found = trained(tiny_store, tmp_path / "gpu", "cuda", members, **options)
    for a, b in zip(expected, found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    assert seen[f"{feed.__name__}.next"] == [1 if where == "host" else 0] * 4
    assert capsys.readouterr().err.count("which is slow; in a new --out, --mode window") == (where == "host")
    assert seen["Trainee.log"] == [1] * 4
    assert seen["Trainee.save"] == [0] * 4
    assert not any(seen["Member.step"][2:])


@pytest.mark.parametrize(("codec", "window_rows"), [("none", None), ("none", 256), ("zstd", 256)])
def test_copied_batches_are_the_cpus(
    codec: str, window_rows: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches that come to a GPU from the host are bit for bit a CPU's, one copy and one wait each, into the same memory; what
    the GPU still has to do before is no wait for rows."""
    split = make_store(tmp_path / "s.zarr", codec=codec).train
    order = Order(split.kept_rows(), 0, window_rows)

    def taken(device: torch.device | str) -> tuple[list[Tensor], set[int]]:
        with Loader(split, order, 90, position=30, share=(1, 2), device=device) as loader:
            found = [(batch.cpu().clone(), batch.data_ptr()) for batch in (loader.next() for _ in range(40))]
            assert (loader.n_delivered, loader.waited > 0) == (40, device == "cpu")
        return [rows for rows, _ in found], {pointer for _, pointer in found}

    expected, _ = taken("cpu")
    clock = [0.0]
    monkeypatch.setattr("train.feed.loader.time.perf_counter", lambda: clock[0])
    monkeypatch.setattr(pretend_gpu.Stream, "synchronize", lambda stream: clock.__setitem__(0, clock[0] + 1))
    with pretended() as waits:
        found, places = taken(GPU)
        assert len([wait for wait in waits if " up " in wait]) == len(found)
    assert len(places) == 1
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours.view(torch.int16), theirs.view(torch.int16))


def test_pretended_gpu_is_strict() -> None:
    """The stand-in refuses what a GPU refuses and notes what the host waits for."""
    from train.step.fused.latents import center_kernel

    with pretended() as waits:
        on_gpu, on_cpu = torch.arange(4.0, device=GPU), torch.arange(4.0)
        assert isinstance(on_gpu, OnGpu)
        assert on_gpu.is_cuda
        for mixed in (lambda: on_gpu + on_cpu, lambda: torch.cat([on_gpu, on_cpu]), lambda: on_cpu[on_gpu.long()]):
            with pytest.raises(RuntimeError, match="on the CPU"):
                mixed()
        with pytest.raises(RuntimeError, match="center_kernel: b_dec is on the CPU"):
            center_kernel[(1,)](on_gpu, on_cpu, on_gpu, 1, 4, TILE_R=1, TILE_D=4)
        assert not waits
        assert (on_gpu * torch.tensor(2.0)).tolist() == [0, 2, 4, 6]
        assert float(on_gpu[3]) == 3
        assert len(on_gpu[on_gpu > 1]) == 2
        on_gpu.copy_(on_cpu.add(1))
        assert len(waits) == 4
        on_gpu.copy_(on_cpu, non_blocking=True)
        assert len(waits) == 4


@pytest.fixture
def models_on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Language models come to the GPU when they are loaded."""
    load = SplitLM.load

    def there(model: str, *, device: Any = "cpu", **options: Any) -> SplitLM:
        lm = load(model, device="cpu", **options)
        if torch.device(device).type == "cuda":
            moved(lm.model, lambda tensor: tensor if tensor.is_meta else tensor.to(GPU))
        return lm

    monkeypatch.setattr(SplitLM, "load", staticmethod(there))


class Waits:
    """How often the host waits in calls of some functions, without what it waits for in the language model's own forward."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.patch, self.found = patch, dict[str, int]()
        self.count(split_lm, "forward")

    def count(self, owner: Any, name: str) -> None:
        """Watch a function from now on."""
        before = getattr(owner, name)
        self.found[name] = 0

        def call(*arguments: Any) -> Any:
            start, forward = len(pretend_gpu.waits), self.found["forward"]
            try:
                return before(*arguments)
            finally:
                self.found[name] += len(pretend_gpu.waits) - start - (self.found["forward"] - forward)

        self.patch.setattr(owner, name, call)


def test_scores_wait_for_nothing(tmp_path: Path, models_on_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """An evaluation on a GPU says what one on a CPU says; while batches come and go neither they nor a checkpoint's scores make
    the host wait."""
    store = lm_stores.make_lm_store(tmp_path, eval_sequences=2)
    lm_stores.save_member(tmp_path / "runs", store, lm_stores.make_sae(store))

    def levels(device: str) -> Any:
        config = EvaluateConfig(store=tmp_path / "acts.zarr", out=tmp_path / device, device=device, dtype="float32")
        outcome = evaluate(config, [tmp_path / "runs"])
        assert not outcome.failed
        return [level["scores"] for level in read_result(Path(outcome.results[0]["path"]))["levels"]]

    expected, waits = levels("cpu"), Waits(monkeypatch)
    waits.count(Scorer, "update")
    waits.count(Sample, "batch")
    waits.count(behaviour, "clean_pass")
    with pretended():
        found = levels("cuda")
    assert (waits.found["update"], waits.found["batch"], waits.found["clean_pass"]) == (0, 0, 0)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours == {name: x if x is None else pytest.approx(x, rel=1e-3, abs=1e-4) for name, x in theirs.items()}


def test_too_large_suffix_is_refused_first(
    tmp_path: Path, models_on_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What does not fit on the GPU is said before anything is read or run, a dry run included."""
    store = lm_stores.make_lm_store(tmp_path, eval_sequences=2)
    lm_stores.save_member(tmp_path / "runs", store, lm_stores.make_sae(store))
    config = EvaluateConfig(store=tmp_path / "acts.zarr", out=tmp_path / "out", device="cuda", dtype="float32")
    monkeypatch.setattr(SplitLM, "load", lambda *_, **__: pytest.fail("weights were read"))
    with pretended():
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 2000))
        for dry_run in (True, False):
            with pytest.raises(ModelError, match=r"its suffix take .* --device-map auto"):
                evaluate(config, [tmp_path / "runs"], dry_run=dry_run)


def test_harvest_waits_for_nothing(
    lm_folder: Any, tmp_path: Path, models_on_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A harvest on a GPU, whose model is tried there first, makes the rows that one on a CPU makes, with norms and moments
    from the device; while shards are made the host waits for nothing."""
    corpus, model = tiny_models.make_corpus(tmp_path / "corpus.jsonl"), lm_folder("gemma2")
    waits = Waits(monkeypatch)
    waits.count(harvesting, "harvest_shards")
    with pretended():
        for device in ("cpu", "cuda"):
            harvesting.run(harvests.harvest_config(model, corpus, tmp_path / device, device=device))
    cpu, gpu = (Store.open(tmp_path / device) for device in ("cpu", "cuda"))
    assert waits.found["harvest_shards"] == 0
    assert torch.equal(cpu.train.read(0, 1600), gpu.train.read(0, 1600))
    assert gpu.statistics.scale == pytest.approx(cpu.statistics.scale, rel=1e-12)
    assert gpu.statistics.median_norm == cpu.statistics.median_norm
