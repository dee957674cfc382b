"""Linear probes on mean-pooled residuals, to SAEBench's recipe, all probes of a task trained in one batched loop.

Loss of each probe: mean BCE-with-logits over its batch + l1 · ‖w‖₁; AdamW; after each epoch the test accuracy, and the
first epoch with the best one is kept (a choice made on the test set: SAEBench's protocol, so clean accuracies are a little
optimistic). Probes do not interact: AdamW is element-wise, so a stack of probes takes exactly the steps each would alone.
float32 on the CPU whatever the model's dtype.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from evaluate.probing.tasks import Contrast, Draw, Task
from pipeline.base.errors import DamagedError
from pipeline.base.files import hash_config
from pipeline.base.runtime import torch_rng
from pipeline.sae.checkpoint import load_tensors, save_tensors

FORMAT, VERSION = "nested-sae-probes", 1


@dataclass(frozen=True)
class ProbeConfig:
    """Probe training; the defaults are SAEBench's. `l1`: weight of ‖w‖₁; `weight_decay`: AdamW's, on the bias too.

    SAEBench's rate suits residuals of norm 100 and more; on a small model with few rows it leaves probes half trained.
    """

    batch_size: int = 16
    epochs: int = 20
    lr: float = 1e-3
    l1: float = 1e-3
    weight_decay: float = 0.01


@dataclass(frozen=True)
class Probes:
    """A stack of linear probes, float32: logit = x · weight + bias, positive when above 0.

    weight [probe, d_model], bias [probe]; accuracy [probe]: on the probe's own test rows, at the epoch kept.
    """

    weight: Float[Tensor, "probe d_model"]
    bias: Float[Tensor, " probe"]
    accuracy: Float[Tensor, " probe"]


@dataclass(frozen=True)
class ProbeData:
    """Rows and labels of a stack of probes: all have as many training rows, and as many test rows, as one another."""

    train_rows: Int[Tensor, "probe row"]
    train_labels: Float[Tensor, "probe row"]
    test_rows: Int[Tensor, "probe test_row"]
    test_labels: Float[Tensor, "probe test_row"]


@dataclass(frozen=True)
class ProbeStart:
    """Everything random in training: initial weight [probe, d_model] and bias [probe], and each epoch's order of rows."""

    weight: Float[Tensor, "probe d_model"]
    bias: Float[Tensor, " probe"]
    orders: Int[Tensor, "epoch probe row"]


def draw_start(names: Sequence[str], d_model: int, n_rows: int, epochs: int) -> ProbeStart:
    """nn.Linear's initialisation, uniform within 1/√d, and a permutation an epoch: of each name a pure function."""
    bound = d_model**-0.5
    weights, biases, orders = [], [], []
    for name in names:
        rng = torch_rng("probe", name)
        weights.append(torch.empty(d_model).uniform_(-bound, bound, generator=rng))
        biases.append(torch.empty(()).uniform_(-bound, bound, generator=rng))
        orders.append(torch.stack([torch.randperm(n_rows, generator=rng) for _ in range(epochs)]))
    return ProbeStart(torch.stack(weights), torch.stack(biases), torch.stack(orders, 1))


@torch.no_grad()
def train_probes(x: Float[Tensor, "text d_model"], data: ProbeData, start: ProbeStart, config: ProbeConfig) -> Probes:
    """Train every probe of the stack, each on its own rows of x. Accuracies are counted in float64, exact."""
    weight, bias = start.weight.clone(), start.bias.clone()
    optimizer = torch.optim.AdamW([weight, bias], lr=config.lr, weight_decay=config.weight_decay, foreach=False)
    best = Probes(weight.clone(), bias.clone(), torch.full_like(bias, -1, dtype=torch.float64))
    for order in start.orders:
        rows, labels = data.train_rows.gather(1, order), data.train_labels.gather(1, order)
        for batch, y in zip(torch.split(rows, config.batch_size, 1), torch.split(labels, config.batch_size, 1)):
            inputs = x[batch]  # [probe, row, d_model]
            logits = torch.einsum("prd,pd->pr", inputs, weight) + bias[:, None]
            error = (logits.sigmoid() - y) / y.shape[1]  # gradient of the mean BCE in the logits
            weight.grad = torch.einsum("pr,prd->pd", error, inputs).add_(weight.sign(), alpha=config.l1)
            bias.grad = error.sum(1)
            optimizer.step()
        now = Probes(weight, bias, accuracies(weight, bias, x, data.test_rows, data.test_labels))
        best = better(now, best)
    return best


def better(now: Probes, best: Probes) -> Probes:
    """Of each probe the one with the higher accuracy; the earlier one where they are equal."""
    up = now.accuracy > best.accuracy
    return Probes(
        torch.where(up[:, None], now.weight, best.weight),
        torch.where(up, now.bias, best.bias),
        torch.where(up, now.accuracy, best.accuracy),
    )


def accuracies(
    weight: Float[Tensor, "probe d_model"],
    bias: Float[Tensor, " probe"],
    x: Float[Tensor, "text d_model"],
    rows: Int[Tensor, "probe row"],
    labels: Float[Tensor, "probe row"],
) -> Float[Tensor, " probe"]:
    """Accuracy of each probe on its own rows; float64."""
    return accuracy((x @ weight.T + bias).T.gather(1, rows), labels)


def accuracy(logits: Float[Tensor, "*n row"], labels: Float[Tensor, "*m row"]) -> Float[Tensor, "*n"]:
    """Share of rows whose logit is above 0 exactly where the label is 1; float64."""
    return ((logits > 0) == (labels > 0.5)).double().mean(-1)


def stacked(task: Task) -> ProbeData:
    """The rows of all of a task's probes, seed after seed."""

    def stack(split: int, what: str) -> Tensor:
        arrays = [getattr(pair[split], what) for draw in task.draws for pair in draw.values()]
        return torch.from_numpy(np.stack(arrays))

    return ProbeData(stack(0, "rows"), stack(0, "labels"), stack(1, "rows"), stack(1, "labels"))


@dataclass(frozen=True)
class ProbedTexts:
    """One task and seed, ready to be tested: its contrasts, the pooled residuals they index, and its trained probes.

    mean_x [text, d_model]; probes: name → (weight [d_model], bias []).
    """

    draw: Draw
    mean_x: Float[Tensor, "text d_model"]
    probes: dict[str, tuple[Float[Tensor, " d_model"], Float[Tensor, ""]]]

    def logits(self, probe: str, rows: Int[Tensor, " row"]) -> Float[Tensor, " row"]:
        """A probe's logits on texts as they are."""
        weight, bias = self.probes[probe]
        return self.mean_x[rows] @ weight + bias

    def accuracy(self, probe: str, data: str) -> float:
        """Accuracy of one probe on the test rows of another (or its own)."""
        rows, labels = contrast_rows(self.draw[data][1])
        return float(accuracy(self.logits(probe, rows), labels))


def by_seed(task: Task, mean_x: Float[Tensor, "text d_model"], probes: Probes) -> list[ProbedTexts]:
    """A task's stack of probes taken apart, one ProbedTexts a seed."""
    pairs = iter(zip(probes.weight, probes.bias))
    return [ProbedTexts(draw, mean_x, {name: next(pairs) for name in draw}) for draw in task.draws]


def load_or_train(
    x: Float[Tensor, "text d_model"],
    task: Task,
    seeds: Sequence[int],
    config: ProbeConfig,
    identity: Mapping[str, Any],
    folder: Path | None,
) -> Probes:
    """A task's probes: read from `folder` when the same ones were trained before, else trained and kept there.

    The file's name is the hash of all that shapes them: `identity` (model, layer, dtype, context, data), the rows, the
    seeds and the recipe. Without a folder nothing is kept on disk.
    """
    data = stacked(task)
    key = {
        "identity": dict(identity),
        "task": task.name,
        "rows": [t.tolist() for t in (data.train_rows, data.test_rows)],
        "seeds": list(seeds),
        "recipe": asdict(config),
    }
    path = folder / f"probes-{hash_config(key)[:16]}.safetensors" if folder else None
    names = [f"{task.name}/{seed}/{name}" for seed in seeds for name in task.probes]
    if path is not None and path.is_file():
        tensors, _ = load_tensors(path, FORMAT, VERSION)
        n = len(names)
        require_shapes(path, tensors, {"weight": (n, x.shape[1]), "bias": (n,), "accuracy": (n,)})
        return Probes(**tensors)
    start = draw_start(names, x.shape[1], data.train_rows.shape[1], config.epochs)
    probes = train_probes(x, data, start, config)
    if path is not None:
        save_tensors(path, vars(probes), {"format": FORMAT, "version": VERSION, "task": task.name, "probes": names})
    return probes


def require_shapes(path: Path, tensors: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raise DamagedError unless a file of kept probes holds these tensors and no others."""
    if (found := {name: tuple(t.shape) for name, t in tensors.items()}) != expected:
        raise DamagedError(f"{path}: expected the tensors {expected}, found {found}; delete it, and it is made again")


def contrast_rows(contrast: Contrast) -> tuple[Int[Tensor, " row"], Float[Tensor, " row"]]:
    """A contrast's rows and labels as tensors."""
    return torch.from_numpy(contrast.rows), torch.from_numpy(contrast.labels)
