"""What a job will take, before it runs: memory by a stated formula that --max-memory holds, and arithmetic.

    peak = fixed + batch · sequence + chunk · row + group · checkpoint        (bytes)

    fixed       weights of the remaining layers and the head, probing's residuals; 2 · context · vocab · 4 for zero and mean
                ablation; the survey; copies while one checkpoint loads
    sequence    context · (vocab · 4 kept distributions + activations of one layer + 6 · width · 4 + 12 · d_model · 4)
    row         vocab · (itemsize + 8): logits, log-softmax, one more copy
    checkpoint  its weights in float32, counts of its latents, products of sampled latents
    and of the scores that keep more (`kept`): known features and their cosines with one dictionary, labelled rows, firings

`chunk` is rows unembedded at once, `batch` sequences, `group` checkpoints held at once. A job beyond the limit halves the
chunk, then holds fewer checkpoints (down to MIN_GROUP), then halves the batch, then holds fewer still.
"""

from __future__ import annotations

import ctypes
import functools
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from evaluate.checkpoints.find import Checkpoint, resolve_levels
from evaluate.latents.files import PAGE_ROWS
from evaluate.scores.absorption import CHUNK_ELEMENTS
from evaluate.scores.features import N_SAMPLED
from evaluate.scores.labels import LABELS, MAX_ROWS
from evaluate.scores.reconstruction import Reconstruction
from evaluate.scores.sample import GROUP_SEQUENCES, Survey
from evaluate.scores.structure import MAX_FIRINGS, N_PARTS
from pipeline.base.errors import UsageError
from pipeline.base.files import human_bytes
from pipeline.base.runtime import measured_seconds
from pipeline.sae.config import SAEConfig
from pipeline.store.beside import BesideRows

if TYPE_CHECKING:
    from pipeline.model.split_lm import SplitLM

MIN_GROUP = 8
CHUNK_BYTES = {"cpu": 32 << 20, "cuda": 2 << 30}
"""float32 log-probabilities of a chunk, unless memory is short: near a CPU's cache (measured: 1.6 times as fast as 8 times that
on Zen 4), large enough to fill a GPU."""
MIN_CHUNK = 64


@dataclass(frozen=True)
class Sizes:
    """Bytes of each part of the formula in this module's docstring."""

    fixed: int
    sequence: int
    row: int
    checkpoint: int

    def peak(self, batch: int, chunk: int, group: int) -> int:
        """The formula."""
        return self.fixed + batch * self.sequence + chunk * self.row + group * self.checkpoint


@dataclass(frozen=True)
class Plan:
    """How a job runs: sequences a batch, rows unembedded at once, checkpoints held at once.

    `peak` is its peak memory in bytes, `limit` what it may use.
    """

    batch: int
    chunk: int
    group: int
    peak: int
    limit: int

    @property
    def is_roomy(self) -> bool:
        """Whether twice the peak is allowed."""
        return 2 * self.peak <= self.limit


SHARE_FIRING = 1 / 8
"""Of the latents of a row where nothing bounds them: more would be no sparse code."""


def kept(
    scores: Sequence[str],
    configs: Sequence[SAEConfig],
    d_model: int,
    context: int,
    n_rows: int,
    n_features: int,
    n_words: int = 0,
) -> Sizes:
    """Bytes that the families truth, structure, absorption and first_letter keep beside what every score does.

    truth: directions; blocks of what fired (at most a tenth of the features a row) and a hash each; three matrices of cosines
    while a dictionary is matched; a mask [row, feature] and firings a batch; counts a level and feature.
    structure and absorption: the
    firings of each SAE (16 and 20 bytes, and their sparse matrices), on rows up to their limits; structure counts pairs
    of N_PARTS latents with all, twice; absorption holds the labelled rows, and once more while probes are trained;
    first_letter likewise its words' rows, whose latents are held for one checkpoint at a time.
    """
    width, levels = max(c.width for c in configs), max(c.n_levels for c in configs)
    a_row = max(c.k or math.ceil(SHARE_FIRING * c.width) for c in configs)
    fixed = sequence = checkpoint = 0
    if "truth" in scores:
        firings = math.ceil(n_features / 10)
        blocks = BesideRows.n_bytes(8 * (n_rows + 1)) + BesideRows.n_bytes(4 * n_rows * firings)
        fixed += n_features * (d_model * 4 + 40) + blocks + 3 * width * n_features * 4
        sequence += context * (n_features + width + 16 + 20 * firings)
        checkpoint += levels * n_features * 20
    if "structure" in scores:
        firings = min(MAX_FIRINGS, n_rows * a_row)
        fixed += 2 * (2 * N_PARTS * width * 4) + 24 * firings
        sequence += context * a_row * 16
        checkpoint += 16 * firings
    if "absorption" in scores:
        rows = min(MAX_ROWS, n_rows)
        fixed += rows * (3 * d_model * 4 + len(LABELS) + 17) + 24 * rows * a_row
        sequence += context * width * 4
        checkpoint += 20 * rows * a_row
    if "first_letter" in scores:
        fixed += (
            n_words * (3 * d_model * 4 + len(LABELS) + 17) + 44 * n_words * a_row + 3 * 4 * max(CHUNK_ELEMENTS, width)
        )
    return Sizes(fixed, sequence, 0, checkpoint)


def sizes(
    configs: Sequence[SAEConfig],
    lm: SplitLM | None,
    d_model: int,
    context: int,
    n_sequences: int,
    held: int,
    more: Sizes | None = None,
) -> Sizes:
    """The parts of the formula for the widest of the checkpoints; `held` bytes are taken already, `more` are kept beside."""
    more = more or Sizes(0, 0, 0, 0)
    width, levels = max(c.width for c in configs), max(c.n_levels for c in configs)
    weights = 4 * (2 * d_model * width + 4 * width + 2 * d_model)
    weights += 4 * d_model * d_model * any(c.skip for c in configs)
    groups = -(-n_sequences // GROUP_SEQUENCES)
    survey = Survey.n_bytes(groups, d_model)
    counts = (2 + levels) * width * 8 + levels * Reconstruction.n_bytes(groups) + 2 * min(2 * N_SAMPLED, width) ** 2 * 8
    model, activations, row, vocab = 0, 0, 0, 0
    if lm is not None:
        from pipeline.model.cost import model_sizes

        model, activations, row = model_sizes(lm, context)
        vocab = lm.vocab
    return Sizes(
        fixed=held + model + 2 * context * vocab * 4 + survey + 2 * weights + more.fixed,
        sequence=context * (vocab * 4 + activations + 6 * width * 4 + 12 * d_model * 4) + more.sequence,
        row=row,
        checkpoint=weights + counts + more.checkpoint,
    )


def make_plan(parts: Sizes, n_checkpoints: int, batch: int, context: int, vocab: int, limit: int, device: str) -> Plan:
    """The largest batch, chunk and group that hold the limit, in the order of this module's docstring.

    Raises UsageError when not even one sequence, a few rows and one checkpoint fit.
    """
    whole = batch * context
    chunk = min(whole, max(MIN_CHUNK, CHUNK_BYTES["cuda" if device == "cuda" else "cpu"] // max(4 * vocab, 1)))
    while parts.peak(batch, chunk, n_checkpoints) > limit and chunk > 32:
        chunk //= 2
    while True:
        group = (limit - parts.peak(batch, chunk, 0)) // parts.checkpoint
        if group >= min(MIN_GROUP, n_checkpoints) or (batch == 1 and group >= 1):
            group = min(group, n_checkpoints)
            return Plan(batch, chunk, group, parts.peak(batch, chunk, group), limit)
        if batch == 1:
            least = parts.peak(1, chunk, 1)
            raise UsageError(
                f"{human_bytes(limit)} of memory are allowed, at least {human_bytes(least)} are needed; raise --max-memory, or "
                "the limit of the job"
            )
        batch = max(1, batch // 2)


def suffix_passes(checkpoints: Sequence[Checkpoint], levels: str) -> int:
    """Suffix forwards a batch takes for all checkpoints together; clean and mean ablation come on top."""
    return sum(len(resolve_levels(levels, checkpoint)) for checkpoint in checkpoints)


def sae_flop(config: SAEConfig) -> float:
    """Floating-point operations a token takes to encode and decode: every level is decoded from the one before."""
    skip = 2.0 * config.d_model * config.d_made * config.skip
    return 2.0 * (config.d_model + config.d_made) * config.width + skip


MEASURED_ROWS = 512
SCORED, ENCODED, PAGED = 2.0, 0.5, 5.0
"""Time of a batch through an SAE over that of a bare pass, for estimates: with all that is counted of its latents; one way;
with all that pages of latents keep."""
PAGE_SECONDS = 4e-4
"""To write one latent of a page, on one core of a Xeon."""


def sae_cost(
    saes: Sequence[SAEConfig], d_model: int, device: torch.device, over: float = SCORED
) -> tuple[float, float]:
    """FLOP, and a rough time in seconds by a batch through the widest measured now, that each token takes in all SAEs.

    `over`: how often the time of a bare pass.
    """
    flop, width = sum(map(sae_flop, saes)), max(sae.width for sae in saes)
    return flop, over * flop * pass_seconds(d_model, width, device) / (4.0 * d_model * width)


def pages_seconds(sae: SAEConfig, d_model: int, lens_flop: float, n_rows: int, device: torch.device) -> float:
    """A rough time that the pages of a dictionary's latents take; lens_flop: of the logits of one latent."""
    rows, bare = min(n_rows, PAGE_ROWS), pass_seconds(d_model, sae.width, device)
    flop = rows * 2.0 * sae.n_shared * (sae.width - sae.n_shared) + sae.width * lens_flop
    return rows * PAGED * bare + flop * bare / (4.0 * d_model * sae.width) + sae.width * PAGE_SECONDS


@functools.cache
def pass_seconds(d_model: int, width: int, device: torch.device) -> float:
    """Seconds a row takes through a dictionary of this width, there and back, with a look at its latents: measured once a job."""
    x, w = (torch.zeros(shape, device=device) for shape in ((MEASURED_ROWS, d_model), (d_model, width)))

    def there_and_back() -> Tensor:
        z = torch.relu(x @ w)
        z = torch.where(z < 1, 0.0, z)
        z.sum(0)
        (z != 0).sum(0)
        return z @ w.T

    return measured_seconds(there_and_back, device) / MEASURED_ROWS


def settle_freed_memory(plan: Plan) -> None:
    """Tell glibc, where it is the allocator, what to do with large freed blocks: keep them where memory is plenty.

    Kept, a job is up to a fifth faster, since fresh pages are zeroed and faulted in one by one; but the heap splits up
    (measured: at times 1.6 times the plan's peak). Given back at once, the peak holds, and a job takes half as long again.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:
        return
    M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
    mallopt(M_MMAP_THRESHOLD, 1 << 30 if plan.is_roomy else 4 << 20)
    mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1 if plan.is_roomy else 4 << 20)
