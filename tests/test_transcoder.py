"""Transcoders: a dictionary from the rows of one hook point to those of another, from the gradient to the trained folder."""

import dataclasses
import json
import math
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.base.errors import CheckpointError, DamagedError, MismatchError, UsageError
from pipeline.sae.checkpoint import load_checkpoint, read_header, save_checkpoint
from pipeline.sae.config import SAEConfig
from pipeline.sae.nested import NestedSAE
from pipeline.store.kept import KeptRows
from pipeline.store.reader import Store
from support.reference import away_from_start, reference_objective, reference_update
from support.stores import make_store
from support.train_crasher import small
from train import plan
from train.config import RECIPES, TrainConfig
from train.folder import Folder, member_name, plain
from train.log import run_id
from train.plan import RunConfig
from train.run import run
from train.step.member import Batch, Member, Pairs, Target
from train.step.objectives import reconstruction_terms
from train.step.schedules import learning_rate, sparsity_ramp
from train.step.scratch import Scratch
from train.stores import Stores
from train.trainee import Outcome, Trainee

D_IN, D_OUT, WIDTH, ROWS = 12, 9, 40, 24
CPU = torch.device("cpu")

pytestmark = pytest.mark.usefixtures("one_thread")
LEVELS: dict[int, dict[str, Any]] = {1: {"alpha": 0.0}, 3: {"levels": (0.1, 0.375, 1.0)}}
VARIANTS: dict[str, dict[str, Any]] = {
    "paper": {"recipe": "paper", "lambda_shared": 0.03, "lambda_specialised": 0.05},
    "paper, LayerNorm after": {"recipe": "paper", "layernorm": "post"},
    "paper, no LayerNorm, additive": {"recipe": "paper", "layernorm": "none", "objective": "additive"},
    "batchtopk": {"recipe": "batchtopk", "k": 5, "aux_k": 6, "dead_after_rows": 100},
    "topk": {"recipe": "topk", "k": 5, "aux_k": 6, "dead_after_rows": 100},
    "jumprelu": {"recipe": "jumprelu", "bandwidth": 1.0, "lambda_shared": 0.02},
}


def tiny(**changes: Any) -> TrainConfig:
    """A recipe at the size of these tests, with no schedule."""
    fixed = {"width": WIDTH, "batch_size": ROWS, "dtype": "float64", "encoder_scale": 1.0, "layernorm_bias": 0.0}
    fixed |= {"steps": 20, "lr_warmup_steps": 0, "lr_decay_steps": 0, "sparsity_warmup_steps": 0}
    changes = fixed | changes
    return RECIPES[changes.pop("recipe", "paper")](**changes)


def member_of(config: TrainConfig) -> Member:
    """A transcoder whose two spaces differ."""
    wide = torch.float64 if config.dtype == "float64" else torch.float32
    center, target = torch.full((D_IN,), 0.3, dtype=wide), Target(torch.full((D_OUT,), -0.2, dtype=wide), 0.6)
    return Member(config, D_IN, center, 1.7, CPU, Scratch(CPU), target=target)


def raw_pair(step: int) -> tuple[Tensor, Tensor]:
    """Rows of both points: what is to be made is a function of what is read, and noise."""
    generator = torch.Generator().manual_seed(step)
    through = torch.randn(D_IN, D_OUT, generator=torch.Generator().manual_seed(99))
    x = torch.randn(ROWS, D_IN, generator=generator) * (0.5 + torch.rand(ROWS, 1, generator=generator)) / D_IN**0.5
    return x + 0.3, (x.relu() @ through + 0.1 * torch.randn(ROWS, D_OUT, generator=generator) - 0.2)


def batch_for(member: Member, step: int) -> Batch:
    assert member.target is not None
    return Pairs(member.center, member.scale, member.target).normalise(*raw_pair(step))


@pytest.mark.parametrize("skip", [False, True], ids=["", "skip"])
@pytest.mark.parametrize("n_levels", LEVELS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_equal_autograd(variant: str, n_levels: int, skip: bool) -> None:
    """Loss and every gradient of a transcoder are autograd's of the formulas, in float64, auxiliary loss included."""
    config = tiny(**VARIANTS[variant], **LEVELS[n_levels], skip=skip)
    member, dead = away_from_start(member_of(config)), None
    if config.aux_k:
        member.n_rows = 200
        member.rows_since_fired[3:14] = torch.arange(101, 112)
        dead = (member.rows_since_fired >= config.dead_after_rows).double()
    terms = reconstruction_terms(config, member.shape.levels, member.n_steps)
    weights = {name: weight.clone().requires_grad_() for name, weight in member.weights.items()}
    batch = batch_for(member, 0)
    loss = reference_objective(
        weights, config, batch.x, prefixes=terms.sizes, prefix_weights=terms.weights, dead=dead, y=batch.y
    )
    loss.backward()
    forward = member._forward(batch)
    gradients, aux = member._backward(forward)
    found = member._loss(forward, member._sums_of(batch, forward, aux))
    torch.testing.assert_close(found, loss.detach(), rtol=1e-10, atol=1e-12)
    assert gradients.keys() == weights.keys()
    for name, weight in weights.items():
        assert weight.grad is not None
        assert weight.grad.abs().max() > 0, f"the reference says nothing about {name}"
        torch.testing.assert_close(gradients[name], weight.grad, rtol=1e-8, atol=1e-11)


def test_steps_equal_torch_adam() -> None:
    """Whole updates, skip connection included, are autograd, clip, projection, Adam and renormalisation."""
    config = tiny(recipe="paper", skip=True, alpha=0.2, lr=3e-3, sparsity_warmup_steps=4)
    member = member_of(config)
    member._aim_decoder(batch_for(member, 0))  # as its first step does, from the encoder and this batch alone
    weights = {name: weight.clone().requires_grad_() for name, weight in member.weights.items()}
    adam = torch.optim.Adam(list(weights.values()), betas=(config.beta1, config.beta2), eps=config.eps)
    for step in range(6):
        batch = batch_for(member, step)
        loss = reference_objective(weights, config, batch.x, factor=sparsity_ramp(config, step), y=batch.y)
        reference_update(weights, adam, config, learning_rate(config, step), loss)
        member.step(batch)
    for name, weight in weights.items():
        torch.testing.assert_close(member.weights[name], weight.detach(), rtol=1e-6, atol=1e-9)


def test_decoder_begins_where_encoder_leads() -> None:
    """Before the first step every decoder row points where ridge regression on the batch sends its encoder's direction, by
    numpy; an SAE to begin with keeps its own."""
    member, warm = (member_of(tiny(recipe="topk", k=5, aux_k=0, lr=1e-300)) for _ in range(2))
    batch, encoder = batch_for(member, 0), member.weights["W_enc"].clone().numpy()
    x, y = batch.x.numpy(), batch.made.numpy()
    square = x.T @ x / len(x)
    wanted = encoder.T @ np.linalg.inv(square + np.eye(D_IN) * np.trace(square) / D_IN) @ (x.T @ y / len(x))
    before = member.sae()
    member.step(batch)
    wanted /= np.linalg.norm(wanted, axis=1, keepdims=True)
    np.testing.assert_allclose(member.weights["W_dec"].numpy(), wanted, rtol=1e-7)
    warm.load_weights(before)
    warm.step(batch_for(warm, 0))
    torch.testing.assert_close(warm.weights["W_dec"].float(), before.W_dec.detach(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("recipe", RECIPES)
def test_transcoder_computes_what_trained(recipe: str) -> None:
    """The saved transcoder's raw rows have the error that training last saw, level by level."""
    extra: dict[str, Any] = {"k": 5, "aux_k": 6} if recipe in ("topk", "batchtopk") else {}
    config = tiny(recipe=recipe, dtype="float32", skip=True, levels=(0.25, 1.0), **extra)
    member = member_of(config)
    for step in range(5):
        member.step(batch_for(member, step))
    sae, batch, (x, y) = member.sae(), batch_for(member, 7), raw_pair(7)
    z = sae.encode(x)
    made = list(sae.decode_levels(z, x))
    assert made[0].shape == y.shape
    for level, y_hat in enumerate(made):
        inside = (y_hat - sae.target_center) * sae.target_scale
        m = sae.config.levels[level]
        expected = z[:, :m] @ sae.W_dec[:m] + sae.b_dec + batch.x @ sae.W_skip
        torch.testing.assert_close(inside, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(sae.decode_level(z, level, x), y_hat, rtol=1e-5, atol=1e-5)
    if recipe != "batchtopk":  # whose training selects by the batch, and inference by a threshold
        forward = member._forward(batch)
        error = (((y - made[-1]) * sae.target_scale) ** 2).sum()
        torch.testing.assert_close(forward.decoded.errors[-1].float(), error, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="decoding needs the rows that were encoded"):
        sae.decode(z)


@pytest.mark.parametrize("recipe", RECIPES)
def test_resumed_transcoder_is_bit_equal(recipe: str) -> None:
    """A resumed transcoder goes on bit for bit, in bf16."""
    extra: dict[str, Any] = {"k": 5, "aux_k": 6, "dead_after_rows": ROWS} if recipe in ("topk", "batchtopk") else {}
    config = tiny(recipe=recipe, dtype="bf16", skip=True, **extra)
    whole, first, second = (member_of(config) for _ in range(3))
    for step in range(12):
        whole.step(batch_for(whole, step))
        if step < 5:
            first.step(batch_for(first, step))
    second.load_state({name: tensor.clone() for name, tensor in first.state().items()})
    for step in range(5, 12):
        second.step(batch_for(second, step))
    for name, tensor in whole.state().items():
        assert torch.equal(tensor, second.state()[name]), f"{name} differs"


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two stores of the same tokens, as one pass of harvest makes them: mlp_in of 64 dimensions, mlp_out of 48."""
    folder = tmp_path_factory.mktemp("pair")
    make_store(folder / "in.zarr", hook="mlp_in")
    make_store(folder / "out.zarr", hook="mlp_out", d_model=48)
    return folder / "in.zarr", folder / "out.zarr"


MEMBERS = (small("batchtopk", skip=True), small("paper", alpha=0.25), small("topk", seed=1), small("jumprelu"))


def trained(pair: tuple[Path, Path], out: Path, *members: TrainConfig, **options: Any) -> list[Outcome]:
    """One run on the CPU."""
    return run(RunConfig(pair[0], out, members, device="cpu", threads=1, target=pair[1], **options))


@pytest.fixture(scope="module")
def whole(pair: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> list[Outcome]:
    """Transcoders of every recipe, trained side by side."""
    return trained(pair, tmp_path_factory.mktemp("whole"), *MEMBERS)


def assert_same(a: Outcome, b: Outcome) -> None:
    """Two members ended with the same weights and metrics, bit for bit."""
    assert a.final is not None
    assert b.final is not None
    assert a.final.read_bytes() == b.final.read_bytes()
    assert (a.folder / "metrics.jsonl").read_bytes() == (b.folder / "metrics.jsonl").read_bytes()


def test_checkpoint_names_both_stores(pair: tuple[Path, Path], whole: list[Outcome]) -> None:
    """A transcoder's checkpoint has both spaces, and says of which stores it is; a skip connection only where asked for."""
    read, made = map(Store.open, pair)
    for outcome, config in zip(whole, MEMBERS):
        assert outcome.final is not None
        sae, header = load_checkpoint(outcome.final)
        assert (sae.config.d_model, sae.config.d_out, sae.config.skip) == (64, 48, config.skip)
        assert header.provenance["store"]["id"] == read.id
        assert header.provenance["store"]["target"]["id"] == made.id
        assert header.provenance["store"]["target"]["hook"] == "mlp_out"
        torch.testing.assert_close(sae.target_center, made.mean)
        assert float(sae.target_scale) == pytest.approx(made.scale)
        assert float(sae.scale) == pytest.approx(read.scale)


def test_metrics_score_rows_made(pair: tuple[Path, Path], whole: list[Outcome]) -> None:
    """The last line's held-out explained variance is of the target's rows, by the saved transcoder; it learns."""
    read, made = map(Store.open, pair)
    kept = torch.from_numpy(read.eval.kept() & made.eval.kept())
    x, y = (store.eval.read(0, store.eval.n_rows)[kept].float() for store in (read, made))
    for outcome in whole:
        assert outcome.final is not None
        sae = load_checkpoint(outcome.final)[0]
        error = (y - sae(x).detach()).double().square().sum()
        ev = 1 - float(error / (y.double() - y.double().mean(0)).square().sum())
        lines = [json.loads(line) for line in (outcome.folder / "metrics.jsonl").read_text().splitlines()]
        assert lines[-1]["eval_ev"][-1] == pytest.approx(ev, abs=1e-5)
    assert lines[-1]["loss"] < lines[0]["loss"]


@pytest.mark.parametrize("options", [{}, {"mode": "window", "window_rows": 512}], ids=["global", "window"])
def test_stopped_transcoders_go_on(
    options: dict[str, Any], pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped and gone on with, alone or side by side, they end as those that ran through, in either order of rows."""
    members = MEMBERS[:2]
    through = [trained(pair, tmp_path / "through", member, **options)[0] for member in members]
    after_step = Trainee.after_step

    def after(self: Trainee, clock: Any) -> None:
        after_step(self, clock)
        if self.member.n_steps == 9:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(Trainee, "after_step", after)
        with pytest.raises(KeyboardInterrupt):
            trained(pair, tmp_path / "stopped", *members, **options)
    for a, b in zip(through, trained(pair, tmp_path / "stopped", *members, **options)):
        assert_same(a, b)


@pytest.mark.parametrize("room", ["all", "two windows"])
def test_pairs_on_the_device_train_alike(
    pair: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    room: str,
) -> None:
    """Rows of both stores in the device's memory, a CPU's here, train to the bits of those that the loader feeds."""
    options: dict[str, Any] = {"mode": "window", "window_rows": 512}
    expected = trained(pair, tmp_path / "loader", MEMBERS[0], **options)
    cuda = torch.device("cuda")
    place_on_device = plan.place_on_device

    def place(stores: Any, tasks: Any, _device: Any, _free: int) -> Any:
        members = sum(plan.on_device(plan.pass_memory(stores.train.shape, tasks, cuda), cuda).values())
        chunks = stores.train.n_chunks if room == "all" else 2 * plan.make_order(stores, tasks[0]).most_chunks
        a_chunk = sum(store.train.shape.layout.chunk_nbytes for store in stores.all)
        free = math.ceil((members + chunks * a_chunk) / (1 - plan.RESERVE)) + 1
        assert place_on_device(stores, tasks, cuda, int((members + a_chunk) / (1 - plan.RESERVE))) is None
        return place_on_device(stores, tasks, cuda, free)

    monkeypatch.setattr(plan, "place_on_device", place)
    for a, b in zip(expected, trained(pair, tmp_path / "device", MEMBERS[0], **options), strict=True):
        assert_same(a, b)
    where = "all rows" if room == "all" else "two windows of rows"
    assert where in capsys.readouterr().err


def test_rows_massive_anywhere_are_out(pair: tuple[Path, Path]) -> None:
    """A row that is massive in either store is in no batch."""
    stores = Stores.open(*pair)
    masks = [store.train.kept(1.1) for store in stores.all]
    assert (masks[0] != masks[1]).any()
    assert np.array_equal(
        stores.kept("train", 1.1).bits, KeptRows.of(iter([masks[0] & masks[1]]), stores.train.chunk_rows).bits
    )


@pytest.mark.parametrize("options", [{}, {"mode": "window", "window_rows": 512}], ids=["global", "window"])
def test_damage_of_the_target_is_found(pair: tuple[Path, Path], tmp_path: Path, options: dict[str, Any]) -> None:
    """Every byte of the rows to be made is checked, as of those that are read: no checkpoint is final on others."""
    shutil.copytree(pair[1], tmp_path / "out.zarr")
    path = tmp_path / "out.zarr/train/resid/c/1/0"
    data = bytearray(path.read_bytes())
    data[5000] ^= 1
    path.write_bytes(data)
    with pytest.raises(DamagedError, match=r"out\.zarr"):
        trained((pair[0], tmp_path / "out.zarr"), tmp_path / "runs", small("topk", steps=60), **options)
    assert not list(tmp_path.glob("runs/*/complete.json"))


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"seed": 1}, "tokens"),
        ({"n_sequences": 160}, "sequences"),
        ({"context": 32, "n_sequences": 76, "eval_sequences": 16}, "context"),
        ({"chunk_rows": 256}, "rows a chunk"),
    ],
    ids=str,
)
def test_other_rows_are_refused(changes: dict[str, Any], what: str, pair: tuple[Path, Path], tmp_path: Path) -> None:
    """A target whose rows are not those of the store is refused, saying what differs."""
    make_store(tmp_path / "other.zarr", hook="mlp_out", **({"d_model": 48} | changes))
    with pytest.raises(MismatchError, match=f"{what} .*harvest both in one pass"):
        trained((pair[0], tmp_path / "other.zarr"), tmp_path / "out", MEMBERS[0])


def test_refusals_name_what_is_meant(pair: tuple[Path, Path], whole: list[Outcome], tmp_path: Path) -> None:
    """The store itself as target, a skip connection without one, an SAE's folder, and an SAE to begin with."""
    with pytest.raises(MismatchError, match="is the store itself"):
        trained((pair[0], pair[0]), tmp_path / "out", MEMBERS[1])
    with pytest.raises(UsageError, match="--skip is of transcoders; give --target"):
        RunConfig(pair[0], tmp_path / "out", (MEMBERS[0],))
    sae = run(RunConfig(pair[0], tmp_path / "sae", (MEMBERS[1],), device="cpu", threads=1))[0]
    with pytest.raises(MismatchError, match="target"):
        trained(pair, tmp_path / "sae", MEMBERS[1])
    with pytest.raises(CheckpointError, match="init_from holds an SAE, this trains a transcoder to 48 dimensions"):
        trained(pair, tmp_path / "out", dataclasses.replace(MEMBERS[1], init_from=str(sae.final)))


def test_training_begins_from_a_transcoder(pair: tuple[Path, Path], whole: list[Outcome], tmp_path: Path) -> None:
    """--init-from of the same stores begins with its weights; of others it is refused."""
    config = dataclasses.replace(
        MEMBERS[1], init_from=str(whole[1].final), steps=1, lr=1e-12, lr_warmup_steps=0, sparsity_warmup_steps=0
    )
    (outcome,) = trained(pair, tmp_path / "out", config)
    assert outcome.final is not None
    assert whole[1].final is not None
    begun, source = load_checkpoint(outcome.final)[0], load_checkpoint(whole[1].final)[0]
    for name, tensor in source.state_dict().items():
        torch.testing.assert_close(begun.state_dict()[name], tensor, rtol=1e-6, atol=1e-7)
    with pytest.raises(CheckpointError, match="of other stores"):
        trained(pair, tmp_path / "other", dataclasses.replace(config, max_norm=1.2))


def test_longer_transcoder_extends_shorter(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """--extend goes on with a transcoder bit for bit, as with an SAE."""
    short = small("topk", skip=True, steps=12, lr_decay_steps=0, lr_warmup_steps=4, eval_every=0)
    longer = dataclasses.replace(short, steps=20)
    trained(pair, tmp_path / "out", short, keep="last:3", keep_state=True)
    (extended,) = trained(pair, tmp_path / "out", longer, keep="last:3", keep_state=True, extend=True)
    (at_once,) = trained(pair, tmp_path / "at_once", longer)
    assert extended.final is not None
    assert at_once.final is not None
    assert extended.final.read_bytes() == at_once.final.read_bytes()


def test_run_id_names_both_stores(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """So that a transcoder and an SAE of its store are two runs wherever metrics go."""
    stores = Stores.open(*pair)
    assert stores.target is not None
    config = MEMBERS[1]
    one, other = (run_id(Folder(tmp_path, config, s.identity(config))) for s in (stores, Stores(stores.read)))
    assert other == f"{member_name(config)}-{stores.read.id[:10]}"
    assert one == f"{other}-{stores.target.id[:10]}"


def test_config_without_skip_keeps_name() -> None:
    """Members trained before there were transcoders keep their folders' names."""
    assert "skip" not in plain(MEMBERS[1])
    assert plain(MEMBERS[0])["skip"] is True
    assert "d_out" not in SAEConfig(4, 8, (8,)).to_dict()


def test_sae_has_no_skip_connection() -> None:
    """An SAE with one would explain everything by it."""
    with pytest.raises(UsageError, match="a skip connection is a transcoder's"):
        SAEConfig(4, 8, (8,), skip=True)


@pytest.mark.parametrize("target", [7, "x", {"layer": "3"}, {"hook": 4}, {"d_model": 1.5}], ids=str)
def test_odd_targets_are_damage(tmp_path: Path, target: Any) -> None:
    """A header whose target is not what FORMAT.md says ends in one line."""
    sae = NestedSAE(SAEConfig(4, 8, (8,), d_out=3))
    save_checkpoint(tmp_path / "c.safetensors", sae, 1, {"store": {"target": target}})
    with pytest.raises(DamagedError, match="target"):
        read_header(tmp_path / "c.safetensors")


def test_prefix_is_a_transcoder(whole: list[Outcome]) -> None:
    """A level of a transcoder is one, with the same spaces and skip connection, as is what a header says of it."""
    assert whole[0].final is not None
    sae = load_checkpoint(whole[0].final)[0]
    x = torch.randn(5, 64)
    small_one: NestedSAE = sae.prefix(0)
    m = small_one.config.width
    torch.testing.assert_close(small_one(x), sae.decode_level(sae.encode(x), 0, x))
    assert small_one.config.d_out == 48
    assert m == sae.config.levels[0]
    assert read_header(whole[0].final).sae == sae.config
