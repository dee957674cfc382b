"""Recorded steps: on a machine without CUDA a tape stands in for a CUDA graph, and keeps its rules to the letter.

A tape notes every operation with the very tensors it was given, and replays them: same memory, nothing of Python. What
a step reads from Python is frozen when it is recorded, and asking a tensor for its value is an error, as on CUDA.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from test_step import CPU, D_MODEL, batch_for, config_of, raw_rows
from train.config import RECIPES, TrainConfig
from train.step.graphs import Recorded
from train.step.latents import Latents
from train.step.member import Batch, Member, normalise_batch
from train.step.objectives import auxiliary_pool
from train.step.scratch import Scratch


class Tape(TorchDispatchMode):
    """Notes what is run under it. Raises RuntimeError where a value is fetched."""

    def __init__(self) -> None:
        super().__init__()
        self.notes: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            raise RuntimeError(f"{func} fetches a value within a recorded step")
        out = func(*args, **(kwargs or {}))
        self.notes.append((func, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        for func, args, kwargs, out in self.notes:
            new = func(*args, **kwargs)
            if any(result.alias_info for result in func._schema.returns):
                continue  # a view of, or a change in, memory that was there: it is in place
            for old, value in zip(tree_leaves(out), tree_leaves(new)):
                if isinstance(old, Tensor):
                    old.copy_(value)


def tape(step: Callable[[], None]) -> Callable[[], None]:
    """A Capture. Unlike CUDA's it also runs the step, so what it changed is put back."""
    recorded.append(Tape())
    with recorded[-1]:
        step()
    return recorded[-1].replay


recorded: list[Tape] = []


@pytest.fixture(autouse=True)
def as_on_an_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where CPU code fetches values, run what runs on CUDA."""

    def row_thresholds(z: Tensor, k: int) -> Tensor:
        return z.topk(k, dim=1, sorted=False).values.amin(1, keepdim=True)

    def pool(config: TrainConfig, rows_since_fired: Tensor) -> Tensor:
        order = torch.sort(rows_since_fired, descending=True, stable=True).indices
        return order[: 2 * config.aux_k]

    monkeypatch.setattr("train.step.latents.row_thresholds", row_thresholds)
    monkeypatch.setattr("train.step.objectives.row_thresholds", row_thresholds)
    monkeypatch.setattr(Latents, "find_threshold", lambda self, n: self.z.flatten().topk(n, sorted=False).values.amin())
    monkeypatch.setattr("train.step.objectives.auxiliary_pool", lambda c, rows: pool(c, rows) if c.aux_k else None)
    recorded.clear()


class OneStep:
    """Capture of a member's steps in which the state is what it was before the step was recorded."""

    def __init__(self) -> None:
        self.member: Member | None = None

    def __call__(self, step: Callable[[], None]) -> Callable[[], None]:
        assert self.member is not None
        member = self.member
        changed = {name: tensor.clone() for name, tensor in member.state().items()}
        low = {name: tensor.clone() for name, tensor in member.adam.low.items()}
        replay = tape(step)
        for name, tensor in member.state().items():
            tensor.copy_(changed[name])
        for name, tensor in member.adam.low.items():
            tensor.copy_(low[name])
        return replay


def member_of(config: TrainConfig, scratch: Scratch, capture: OneStep | None = None) -> Member:
    member = Member(config, D_MODEL, torch.full((D_MODEL,), 0.3), 1.7, CPU, scratch, None, capture)
    if capture is not None:
        capture.member = member
    return member


CHANGES: dict[str, dict[str, Any]] = {
    "paper": {"sparsity_warmup_steps": 4, "target_l0": 12.0},
    "batchtopk": {"k": 5, "aux_k": 8, "dead_after_rows": 200},
    "topk": {"k": 5, "aux_k": 8, "dead_after_rows": 200, "sparsity_warmup_steps": 3},
    "jumprelu": {"sparsity_warmup_steps": 4, "dead_after_rows": 200},
}


def alike(config: TrainConfig, n_steps: int) -> int:
    """Train with and without a tape; how often a step was recorded. Both members are stepped on one batch in turn."""
    capture, scratch = OneStep(), Scratch(CPU)
    plain, taped = member_of(config, Scratch(CPU)), member_of(config, scratch, capture)
    batch: Batch | None = None
    for step in range(n_steps):
        batch = normalise_batch(raw_rows(step), plain.center, plain.scale, out=batch)
        plain.step(batch)
        taped.step(batch)
        for name, tensor in plain.state().items():
            assert torch.equal(tensor, taped.state()[name]), f"{name} differs after step {step + 1}"
    assert plain.metrics() == taped.metrics()
    assert taped.recorded.is_trusted or not recorded
    return len(recorded)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("dtype", ["float32", "bf16"])
def test_replayed_step_is_bit_equal(recipe: str, dtype: str) -> None:
    """A recorded step replayed is bit for bit the step."""
    n_recorded = alike(config_of(recipe, dtype=dtype, **CHANGES[recipe]), 16)
    assert 1 <= n_recorded <= 4  # anew where the warm-up ends, and where latents may be dead for the first time


def test_adapting_ratio_is_recorded_anew() -> None:
    """A ratio that adapts is recorded anew when it does."""
    assert alike(config_of("paper", alpha="auto", steps=400), 40) >= 2


def test_random_prefixes_are_never_recorded() -> None:
    """Random prefixes are never recorded."""
    assert alike(config_of("paper", level_weighting="random", levels=(0.25, 0.5, 1.0)), 6) == 0


def test_warmup_of_counts_not_recorded() -> None:
    """While the number of kept latents falls, which makes nearly every step another kind, none is recorded; then one is."""
    assert alike(config_of("batchtopk", **CHANGES["batchtopk"] | {"aux_k": 0, "sparsity_warmup_steps": 12}), 12) == 0
    recorded.clear()
    assert alike(config_of("batchtopk", **CHANGES["batchtopk"] | {"aux_k": 0, "sparsity_warmup_steps": 12}), 16) == 1


def test_buffers_that_moved_are_noticed() -> None:
    """Buffers that moved are noticed."""
    capture, scratch = OneStep(), Scratch(CPU)
    small, large = config_of("paper"), config_of("paper", width=96)
    member, plain = member_of(small, scratch, capture), member_of(small, Scratch(CPU))
    batch = batch_for(plain, 0)
    for _ in range(4):
        member.step(batch)
        plain.step(batch)
    assert len(recorded) == 1
    member_of(large, scratch).step(batch)  # another member of the same device: every shared buffer grows
    for _ in range(4):
        member.step(batch)
        plain.step(batch)
    assert len(recorded) == 2
    assert torch.equal(member.weights["W_enc"], plain.weights["W_enc"])


def test_tape_catches_python_reads_and_fetches() -> None:
    """The tape catches a step that reads Python or fetches a value."""
    x, count = torch.zeros(3), [0]

    def reads_python() -> None:
        count[0] += 1
        x.add_(count[0])

    steps = Recorded(tape, dict)
    for _ in range(4):
        steps.run("kind", reads_python)
    assert x[0] != 1 + 2 + 3 + 4  # frozen at what was recorded
    with pytest.raises(RuntimeError, match="fetches a value"), Tape():
        float(x.sum())


def test_frozen_step_is_not_trusted(capsys: pytest.CaptureFixture[str]) -> None:
    """A record that reads Python is found out where it is first replayed; what it left is put right, and steps run as ever."""
    x, count = torch.zeros(1), [0]

    def reads_python() -> None:
        count[0] += 1
        x.add_(count[0])

    def capture(step: Callable[[], None]) -> Callable[[], None]:
        kept = x.clone(), count[0]
        replay = tape(step)
        x.copy_(kept[0])
        count[0] = kept[1]
        return replay

    steps = Recorded(capture, lambda: {"x": x})
    for _ in range(6):
        steps.run("kind", reads_python)
    assert x == 1 + 2 + 3 + 4 + 5 + 6
    assert capsys.readouterr().err.count("a recorded step differs from the step itself in x") == 1
    assert len(recorded) == 1


def test_record_is_trusted_after_one_comparison() -> None:
    """The third step of a kind is replayed and run, NaN or not; further ones are replayed alone."""
    x, runs, replays = torch.tensor([1.0, float("nan")]), [0], [0]

    def step() -> None:
        runs[0] += 1
        x.mul_(2)

    def replay() -> None:
        replays[0] += 1
        x.mul_(2)

    steps = Recorded(lambda step: replay, lambda: {"x": x})
    for _ in range(7):
        steps.run("kind", step)
    assert x[0] == 2.0**7
    assert (runs, replays) == ([3], [5])


def test_unrecordable_step_runs_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    """What cannot be recorded runs as ever and is said once."""

    def refuse(step: Callable[[], None]) -> Callable[[], None]:
        raise RuntimeError("no such thing here")

    x, steps = torch.zeros(()), Recorded(refuse, lambda: {"x": x})
    for _ in range(5):
        steps.run("kind", lambda: x.add_(1))
    assert x == 5
    assert capsys.readouterr().err.count("could not be recorded (no such thing here)") == 1


def test_auxiliary_pool_serves_dead_latents() -> None:
    """Auxiliary pool here is that of the objectives for dead latents."""
    config = config_of("batchtopk", **CHANGES["batchtopk"])
    rows = torch.arange(config.width) * 10
    found = auxiliary_pool(config, rows)
    assert found is not None
    assert torch.equal(found, torch.arange(config.width - 1, config.width - 17, -1))


ON_ANOTHER_DEVICE: list[tuple[str, dict[str, Any]]] = [
    *CHANGES.items(),
    ("paper", {"layernorm": "none"}),
    ("paper", {"layernorm": "post", "objective": "additive", "normalize_gradients": True}),
    ("jumprelu", {"layernorm": "pre", "penalty": "l1"}),
    ("batchtopk", {"k": 4, "levels": (0.25, 0.5, 1.0), "level_weighting": "random"}),
]


@pytest.mark.parametrize(("recipe", "changes"), ON_ANOTHER_DEVICE, ids=str)
def test_other_device_step_fetches_nothing(
    recipe: str, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step on another device fetches nothing and mixes no devices.
    Tensors without values stand in for an accelerator's: every operation but the fused Adam checks devices, and asking
    for a value is an error. With a CUDA build of torch, fake CUDA tensors pass the same (NOTES.md)."""
    monkeypatch.undo()  # the real code, which does not take a CPU's ways there
    meta = torch.device("meta")

    def fused_adam(
        params: Any, gradients: Any, first: Any, second: Any, _: Any, steps: Any, *, lr: Tensor, **kw: Any
    ) -> None:
        held = (*params, *gradients, *first, *second, *steps, lr)
        assert {(tensor.device, tensor.dtype) for tensor in held} == {(meta, torch.float32)}

    monkeypatch.setattr(torch, "_fused_adam_", fused_adam)
    config = config_of(recipe, dtype="bf16", **changes)
    center, batch = torch.zeros(D_MODEL, device=meta), None
    member = Member(config, D_MODEL, center, 1.0, meta, Scratch(meta))
    member.before_first.clear()  # that fetches, once, before the first step
    for _ in range(8):
        batch = normalise_batch(torch.zeros(48, D_MODEL, dtype=torch.bfloat16, device=meta), center, 1.0, out=batch)
        member.step(batch)
    with pytest.raises(RuntimeError, match="meta tensors"):
        member.was_finite(member.counters())  # which does fetch
