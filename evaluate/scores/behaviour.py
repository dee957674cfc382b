"""Behaviour with a reconstruction spliced in: KL, cross-entropy, top-1 agreement, from the cached residual onwards.

The clean distributions of a batch are computed once and serve every checkpoint and level. The unembedding goes `chunk`
rows at a time: float32 log-softmax whatever the model's dtype, float64 sums. Only kept (not special) positions are
spliced and counted; zero ablation zeroes every position. KL is KL(clean ‖ spliced), in nats.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from evaluate.scores.sample import Batch
from pipeline.base.errors import ModelError
from pipeline.base.runtime import has_triton
from pipeline.model import splicing

if TYPE_CHECKING:
    from pipeline.model.split_lm import SplitLM


@dataclass(frozen=True)
class Clean:
    """The untouched model on a batch's kept rows, float32: distribution, Σ p log p, most likely token, CE of the target."""

    p: Float[Tensor, "row vocab"]
    negative_entropy: Float[Tensor, " row"]
    top: Int[Tensor, " row"]
    ce: Float[Tensor, " row"]


@dataclass(frozen=True)
class TokenScores:
    """Per kept row, float32: KL(clean ‖ other), CE of the target (0 without one), 1 where the most likely tokens agree."""

    kl: Float[Tensor, " row"]
    ce: Float[Tensor, " row"]
    top1: Float[Tensor, " row"]


def splice(batch: Batch, x_hat: Float[Tensor, "row d_model"]) -> Float[Tensor, "seq pos d_model"]:
    """The residual stream with its kept rows replaced, in the residual's dtype; special positions stay as they are."""
    return splicing.splice_at(batch.residual, batch.index, x_hat)


def kept_hidden(lm: SplitLM, batch: Batch, residual: Float[Tensor, "seq pos d_model"]) -> Float[Tensor, "row d_model"]:
    """Normed hidden states of the kept rows after the model's remaining layers: what `unembed` takes."""
    return lm.suffix(residual, batch.tokens).flatten(0, 1)[batch.index]


def log_probabilities(lm: SplitLM, hidden: Float[Tensor, "row d_model"]) -> Float[Tensor, "row vocab"]:
    """float32 log-softmax of the logits of some rows."""
    return torch.log_softmax(lm.unembed(hidden), -1, dtype=torch.float32)


def chunks(n_rows: int, chunk: int) -> Iterator[slice]:
    """Slices of at most `chunk` rows."""
    return (slice(start, min(start + chunk, n_rows)) for start in range(0, n_rows, chunk))


def cross_entropy(log_q: Float[Tensor, "row vocab"], targets: Int[Tensor, " row"]) -> Float[Tensor, " row"]:
    """−log q of each row's target in nats; 0 where there is none (−1)."""
    return -torch.where(targets >= 0, log_q.gather(1, targets.clamp(min=0)[:, None])[:, 0], 0.0)


def clean_pass(lm: SplitLM, batch: Batch, chunk: int, space: Float[Tensor, "most vocab"] | None = None) -> Clean:
    """Run the clean residual through the suffix once and keep its distributions: rows × vocab × 4 bytes.

    `space`: where to keep them, float32, for at least as many rows; what it held before is gone. Whether the model's own output
    is finite is not asked here, since the answer would be waited for (`Reference`).
    """
    hidden = kept_hidden(lm, batch, batch.residual)
    p = torch.empty(len(hidden), lm.vocab, device=hidden.device) if space is None else space[: len(hidden)]
    parts = []
    for rows in chunks(len(hidden), chunk):
        parts.append(clean_rows(lm, hidden[rows], batch.targets[rows], p[rows]))
    if not parts:
        return Clean(p, p.new_zeros(0), batch.targets, p.new_zeros(0))
    return Clean(p, *(torch.cat(column) for column in zip(*parts)))


def clean_rows(
    lm: SplitLM, hidden: Float[Tensor, "row d_head"], targets: Int[Tensor, " row"], p: Float[Tensor, "row vocab"]
) -> tuple[Tensor, Tensor, Tensor]:
    """Write the distributions of some rows into p; returns Σ p log p, the most likely tokens, cross-entropies."""
    if one_pass(hidden.device):
        from evaluate.scores import vocabulary

        return vocabulary.clean(capless(lm, hidden), targets, p, lm.softcap)
    log_p = log_probabilities(lm, hidden)
    torch.exp(log_p, out=p)
    return torch.linalg.vecdot(p, log_p), first_largest(log_p), cross_entropy(log_p, targets)


def capless(lm: SplitLM, hidden: Float[Tensor, "row d_head"]) -> Float[Tensor, "row vocab"]:
    """Logits without the soft cap that is left to who reads them (`softcap`)."""
    return lm.unembed(hidden, capped=lm.softcap is None)


def compare(clean: Clean, rows: slice, log_q: Float[Tensor, "row vocab"], targets: Int[Tensor, " row"]) -> TokenScores:
    """Scores of some rows from their log-probabilities under the changed model: Σ p log p − Σ p log q, and so on."""
    kl = clean.negative_entropy[rows] - torch.linalg.vecdot(clean.p[rows], log_q)
    return TokenScores(kl, cross_entropy(log_q, targets), (first_largest(log_q) == clean.top[rows]).float())


BLOCK = 512
"""Columns of which only the largest is looked at when the largest of all is searched."""


def first_largest(values: Float[Tensor, "row vocab"]) -> Int[Tensor, " row"]:
    """argmax(1), the first one among equals: by blocks, since torch's own takes half as long as a log-softmax on a CPU."""
    if values.shape[1] <= BLOCK:
        return torch.argmax(values, 1)
    n_blocks = values.shape[1] // BLOCK
    blocks = values[:, : n_blocks * BLOCK].view(len(values), n_blocks, BLOCK)
    rest = values[:, n_blocks * BLOCK :]
    largest = blocks.amax(2)
    block = largest.argmax(1)
    rows = torch.arange(len(values), device=values.device)
    found: Tensor = block * BLOCK + blocks[rows, block].argmax(1)
    if not rest.shape[1]:
        return found
    of_rest, where = rest.max(1)
    return torch.where(of_rest > largest.amax(1), n_blocks * BLOCK + where, found)


def score_residual(
    lm: SplitLM, batch: Batch, clean: Clean, residual: Float[Tensor, "seq pos d_model"], chunk: int
) -> TokenScores:
    """Run a changed residual stream through the suffix and compare it with the clean model on every kept row."""
    hidden = kept_hidden(lm, batch, residual)
    parts = [compare_hidden(lm, clean, rows, hidden[rows], batch.targets[rows]) for rows in chunks(len(hidden), chunk)]
    return joined(parts, clean)


def compare_hidden(
    lm: SplitLM, clean: Clean, rows: slice, hidden: Float[Tensor, "row d_head"], targets: Int[Tensor, " row"]
) -> TokenScores:
    """Scores of some rows from what their unembedding takes: in one pass over the vocabulary where kernels run."""
    if not one_pass(hidden.device):
        return compare(clean, rows, log_probabilities(lm, hidden), targets)
    return compare_logits(lm, clean, rows, capless(lm, hidden), targets)


def compare_logits(
    lm: SplitLM,
    clean: Clean,
    rows: slice,
    logits: Float[Tensor, "place vocab"],
    targets: Int[Tensor, " row"],
    places: Int[Tensor, " row"] | None = None,
) -> TokenScores:
    """In one pass, from logits that are `capless`; `places`: which of their rows is each row's, its own where None."""
    from evaluate.scores.vocabulary import compared

    of_rows = (clean.p[rows], targets, clean.top[rows], clean.negative_entropy[rows])
    return TokenScores(*compared(logits, *of_rows, lm.softcap, places))


def one_pass(device: torch.device) -> bool:
    """Whether the vocabulary is gone through once, by a kernel: on CUDA, with Triton."""
    return device.type == "cuda" and has_triton()


def readout_by_position(
    lm: SplitLM, residual: Float[Tensor, "1 pos d_model"], chunk: int
) -> Float[Tensor, "pos vocab"]:
    """What `score_by_position` reads after a residual stream that is the same in every sequence: log-probabilities, or where the
    vocabulary is gone through once, logits."""
    hidden = lm.suffix(residual)[0]
    read = capless if one_pass(hidden.device) else log_probabilities
    return torch.cat([read(lm, hidden[rows]) for rows in chunks(len(hidden), chunk)])


def score_by_position(
    lm: SplitLM, batch: Batch, clean: Clean, readout: Float[Tensor, "pos vocab"], chunk: int
) -> TokenScores:
    """Compare a changed model whose output depends on the position alone with the clean model on every kept row."""
    position = batch.index % batch.kept.shape[1]
    parts = []
    for rows in chunks(len(position), chunk):
        if one_pass(readout.device):
            parts.append(compare_logits(lm, clean, rows, readout, batch.targets[rows], position[rows]))
        else:
            parts.append(compare(clean, rows, readout[position[rows]], batch.targets[rows]))
    return joined(parts, clean)


def depends_on_position_alone(lm: SplitLM, batch: Batch, residual: Float[Tensor, "seq pos d_model"]) -> bool:
    """Whether the suffix gives every sequence the same: residuals are equal, and other tokens beside them change nothing.

    Tried on the first and the last sequence, since some models' later layers look at the tokens again.
    """
    if len(residual) < 2 or not torch.equal(residual, residual[:1].expand_as(residual)):
        return False
    one, other = lm.suffix(residual[[0, -1]], batch.tokens[[0, -1]])
    return torch.equal(one, other)


def joined(parts: list[TokenScores], clean: Clean) -> TokenScores:
    """Token scores of consecutive chunks as one."""
    if not parts:
        return TokenScores(clean.ce, clean.ce, clean.ce)
    return TokenScores(*(torch.cat(column) for column in zip(*((s.kl, s.ce, s.top1) for s in parts))))


class Behaviour:
    """Streaming float64 sums of token scores, over all kept rows and without massive ones; `means` at the end."""

    def __init__(self, device: torch.device | str) -> None:
        self.sums = torch.zeros(2, 3, dtype=torch.float64, device=device)  # Σ kl, ce, top1
        self.counts = torch.zeros_like(self.sums)

    def update(self, batch: Batch, scores: TokenScores) -> None:
        """Add a batch's rows; CE counts only rows with a target."""
        has_target = (batch.targets >= 0).double()
        self.sums += batch.weights @ torch.stack([scores.kl, scores.ce, scores.top1], 1).double()
        self.counts += batch.weights @ torch.stack(
            [torch.ones_like(has_target), has_target, torch.ones_like(has_target)], 1
        )

    def means(self, k: int) -> dict[str, float]:
        """Mean kl, ce, top1 for weighting k; NaN when no row counts or a score was not finite."""
        return dict(zip(("kl", "ce", "top1"), (self.sums[k] / self.counts[k]).tolist()))


@dataclass
class Baselines:
    """What a job computes once: the clean model, zero ablation of all positions, mean ablation of the kept ones.

    Zero ablation, BOS included, is the same in every sequence: one is enough for all. So is mean ablation in batches
    whose special positions and the residuals there are alike in all sequences, as after a BOS each. Neither holds at a
    point inside a layer, where the stream beside it differs: `zero_readout` is None there.
    """

    lm: SplitLM
    store_mean: Float[Tensor, " d_model"]
    chunk: int
    zero_readout: Float[Tensor, "pos vocab"] | None
    clean: Behaviour
    zero: Behaviour
    mean: Behaviour
    n_sequences: int = 0
    """Sequences counted so far, the first ones of the sample."""
    alike: tuple[Tensor, Tensor] | None = None
    """The last mean-ablated residual that served all sequences [1, pos, d_model], and its `readout_by_position`."""

    @staticmethod
    def empty(lm: SplitLM, store_mean: Float[Tensor, " d_model"], context: int, chunk: int) -> Baselines:
        """Baselines of no rows. `store_mean`: of the kept training rows; `chunk`: rows unembedded at once."""
        nothing = torch.zeros(1, context, lm.d_model, dtype=lm.dtype, device=lm.device)
        zero_readout = None if lm.point.is_inside else readout_by_position(lm, nothing, chunk)
        clean, zero, mean = (Behaviour(lm.device) for _ in range(3))
        return Baselines(lm, store_mean.to(lm.device), chunk, zero_readout, clean, zero, mean)

    def update(self, batch: Batch, clean: Clean) -> None:
        """Add a batch, unless an earlier pass over the sample has counted it."""
        if batch.first < self.n_sequences:
            return
        self.n_sequences = batch.first + len(batch.kept)
        self.clean.update(batch, TokenScores(-clean.negative_entropy, clean.ce, torch.ones_like(clean.ce)))
        self.zero.update(batch, self._zero_ablated(batch, clean))
        self.mean.update(batch, self._mean_ablated(batch, clean))

    def _zero_ablated(self, batch: Batch, clean: Clean) -> TokenScores:
        if self.zero_readout is not None:
            return score_by_position(self.lm, batch, clean, self.zero_readout, self.chunk)
        return score_residual(self.lm, batch, clean, torch.zeros_like(batch.residual), self.chunk)

    def _mean_ablated(self, batch: Batch, clean: Clean) -> TokenScores:
        ablated = splice(batch, self.store_mean.expand_as(batch.x))
        known = (
            not self.lm.point.is_inside
            and self.alike is not None
            and torch.equal(ablated, self.alike[0].expand_as(ablated))
        )
        if not known and not self.lm.point.is_inside and depends_on_position_alone(self.lm, batch, ablated):
            self.alike = ablated[:1], readout_by_position(self.lm, ablated[:1], self.chunk)
            known = True
        if known and self.alike is not None:
            return score_by_position(self.lm, batch, clean, self.alike[1], self.chunk)
        return score_residual(self.lm, batch, clean, ablated, self.chunk)

    def numbers(self, k: int) -> dict[str, float]:
        """Baselines of weighting k by the names that FORMAT.md gives them; entropy is the clean model's, in nats."""
        clean, zero, mean = (b.means(k) for b in (self.clean, self.zero, self.mean))
        return {
            "kl_zero": zero["kl"],
            "kl_mean": mean["kl"],
            "ce_clean": clean["ce"],
            "ce_zero": zero["ce"],
            "ce_mean": mean["ce"],
            "entropy": clean["kl"],
        }


@dataclass(frozen=True)
class Reference:
    """The clean model that every checkpoint is compared with, and its ablations, over the passes of a job.

    `chunk`: rows unembedded at once; `space` [most rows of a batch, vocab] float32: where a batch's distributions lie; `finite`:
    whether all were so far, on the device, where it is known without waiting.
    """

    lm: SplitLM
    baselines: Baselines
    chunk: int
    space: Float[Tensor, "most vocab"]
    finite: Bool[Tensor, ""]

    @staticmethod
    def of(lm: SplitLM, store_mean: Float[Tensor, " d_model"], context: int, chunk: int, rows: int) -> Reference:
        """For batches of at most `rows` rows."""
        space = torch.empty(rows, lm.vocab, device=lm.device)
        finite = torch.ones((), dtype=torch.bool, device=lm.device)
        return Reference(lm, Baselines.empty(lm, store_mean, context, chunk), chunk, space, finite)

    def clean_pass(self, batch: Batch) -> Clean:
        """The clean model on a batch, which lasts until the next; its baselines are counted once a job."""
        clean = clean_pass(self.lm, batch, self.chunk, self.space)
        self.finite.logical_and_(clean.negative_entropy.isfinite().all())
        self.baselines.update(batch, clean)
        return clean

    def require_finite(self) -> None:
        """Raise ModelError when the model's own output was not finite on a batch so far; waits for the device."""
        if not self.finite:
            raise ModelError(
                f"{self.lm.info.folder}: the clean model's log-probabilities are not finite; try --dtype float32"
            )


def behaviour_scores(spliced: Behaviour, baselines: dict[str, float], k: int) -> dict[str, float | None]:
    """Scores of one level for weighting k; a share whose baseline leaves nothing to remove is None."""
    means = spliced.means(k)
    kl, ce, clean = means["kl"], means["ce"], baselines["ce_clean"]
    return {
        "kl_nats": kl,
        "kl_score": share(baselines["kl_zero"] - kl, baselines["kl_zero"]),
        "kl_score_mean": share(baselines["kl_mean"] - kl, baselines["kl_mean"]),
        "ce": ce,
        "ce_score": share(baselines["ce_zero"] - ce, baselines["ce_zero"] - clean),
        "ce_score_mean": share(baselines["ce_mean"] - ce, baselines["ce_mean"] - clean),
        "top1": means["top1"],
    }


def share(part: float, whole: float) -> float | None:
    """part / whole; None where the whole is not positive."""
    return None if whole <= 0 else part / whole
