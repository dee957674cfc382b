"""Linear probes: the batched loop against one probe at a time, the epoch kept, what is kept on disk."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from evaluate.probing.probes import (
    FORMAT,
    VERSION,
    ProbeConfig,
    ProbeData,
    Probes,
    accuracy,
    better,
    by_seed,
    draw_start,
    load_or_train,
    stacked,
    train_probes,
)
from evaluate.probing.tasks import Contrast, Task
from pipeline.base.errors import DamagedError
from pipeline.sae.checkpoint import save_tensors
from support.reference import reference_train_probe

RECIPE = ProbeConfig(epochs=4, lr=1e-2)


def case(n_probes: int = 3, n_rows: int = 50, d: int = 6) -> tuple[torch.Tensor, ProbeData]:
    """Texts with noisy labels, rows of each probe drawn anew; 50 rows do not divide by the batch of 16."""
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(200, d, generator=rng)
    rows = torch.stack([torch.randperm(200, generator=rng)[: n_rows + 30] for _ in range(n_probes)])
    labels = (
        (x[rows] @ torch.randn(n_probes, d, 1, generator=rng))[..., 0] + torch.randn(rows.shape, generator=rng) > 0
    ).float()
    return x, ProbeData(rows[:, :n_rows], labels[:, :n_rows], rows[:, n_rows:], labels[:, n_rows:])


@pytest.mark.parametrize("recipe", [RECIPE, ProbeConfig(epochs=3, lr=0.1, l1=0.05, batch_size=7)])
def test_stacked_probes_equal_single_ones(recipe: ProbeConfig) -> None:
    """A stack of probes is what each would be alone."""
    x, data = case()
    start = draw_start(["a", "b", "c"], 6, 50, recipe.epochs)
    found = train_probes(x, data, start, recipe)
    for p in range(3):
        w, b, best = reference_train_probe(
            (x[data.train_rows[p]], x[data.test_rows[p]]),
            (data.train_labels[p], data.test_labels[p]),
            (start.weight[p], start.bias[p]),
            start.orders[:, p],
            recipe,
        )
        torch.testing.assert_close(found.weight[p], w, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found.bias[p], b, rtol=1e-5, atol=1e-6)
        assert float(found.accuracy[p]) == best


def test_first_of_equal_epochs_wins() -> None:
    """Of equal epochs the first is kept."""
    old = Probes(torch.zeros(3, 2), torch.zeros(3), torch.tensor([0.5, 0.5, 0.5], dtype=torch.float64))
    new = Probes(torch.ones(3, 2), torch.ones(3), torch.tensor([0.5, 0.6, 0.4], dtype=torch.float64))
    kept = better(new, old)
    assert kept.bias.tolist() == [0, 1, 0]
    assert kept.weight[:, 0].tolist() == [0, 1, 0]
    assert kept.accuracy.tolist() == [0.5, 0.6, 0.5]


def test_zero_logit_is_negative() -> None:
    """A logit of zero counts as negative."""
    assert float(accuracy(torch.tensor([0.0, 0.1, -0.1, 0.0]), torch.tensor([0.0, 1, 1, 1]))) == 0.5


def test_draw_follows_its_name() -> None:
    """A draw is a function of the name alone."""
    one, two = draw_start(["a", "b"], 5, 10, 2), draw_start(["b"], 5, 10, 2)
    torch.testing.assert_close(one.weight[1:], two.weight, rtol=0, atol=0)
    assert (one.orders[:, 1] == two.orders[:, 0]).all()
    assert not (one.orders[:, 0] == one.orders[:, 1]).all()
    assert (one.weight.abs() <= 5**-0.5).all()


@given(n=st.integers(1, 40), epochs=st.integers(1, 3))
def test_every_epoch_visits_every_row_once(n: int, epochs: int) -> None:
    """Every epoch visits every row once."""
    orders = draw_start(["a"], 3, n, epochs).orders
    assert (orders.sort(-1).values == torch.arange(n)).all()


def small_task() -> Task:
    """Two seeds of two probes on 40 texts."""
    rng = np.random.default_rng(0)

    def contrast() -> Contrast:
        rows = rng.permutation(40).astype(np.int64)
        return Contrast(rows[:10], rows[10:20])

    draws = tuple({name: (contrast(), contrast()) for name in ("a", "b")} for _ in range(2))
    return Task("small", ("scr",), draws)


def test_probes_return_by_seed_and_name() -> None:
    """Probes come back by seed and name."""
    task, x = small_task(), torch.randn(40, 4, generator=torch.Generator().manual_seed(1))
    probes = load_or_train(x, task, (1, 2), RECIPE, {}, None)
    texts = by_seed(task, x, probes)
    flat = [texts[s].probes[name][0] for s in range(2) for name in ("a", "b")]
    torch.testing.assert_close(torch.stack(flat), probes.weight, rtol=0, atol=0)
    for s, t in enumerate(texts):
        assert [t.accuracy(n, n) for n in ("a", "b")] == pytest.approx(probes.accuracy[2 * s : 2 * s + 2].tolist())
    assert (stacked(task).train_labels.sum(1) == 10).all()


def test_kept_probes_serve_their_question_only(tmp_path: Path) -> None:
    """Kept probes are found again and only for the same question."""
    task, x = small_task(), torch.randn(40, 4, generator=torch.Generator().manual_seed(1))
    first = load_or_train(x, task, (1, 2), RECIPE, {"model": "m"}, tmp_path)
    (path,) = tmp_path.iterdir()
    again = load_or_train(
        torch.zeros(40, 4), task, (1, 2), RECIPE, {"model": "m"}, tmp_path
    )  # not trained: x is not read
    for a, b in zip(vars(first).values(), vars(again).values()):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    load_or_train(x, task, (1, 2), RECIPE, {"model": "other"}, tmp_path)
    load_or_train(x, task, (1, 3), RECIPE, {"model": "m"}, tmp_path)
    load_or_train(x, task, (1, 2), ProbeConfig(epochs=2), {"model": "m"}, tmp_path)
    assert len(list(tmp_path.iterdir())) == 4
    save_tensors(path, {"weight": first.weight}, {"format": FORMAT, "version": VERSION})
    with pytest.raises(DamagedError, match=r"expected the tensors .* delete it"):
        load_or_train(x, task, (1, 2), RECIPE, {"model": "m"}, tmp_path)
    save_tensors(path, vars(first), {"format": FORMAT, "version": VERSION})
    whole = bytearray(path.read_bytes())
    whole[-1] ^= 1
    path.write_bytes(whole)
    with pytest.raises(DamagedError):
        load_or_train(x, task, (1, 2), RECIPE, {"model": "m"}, tmp_path)
