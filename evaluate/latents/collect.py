"""Latents one can look at: where they fire most and where at all, what they promote, how well their label says when they fire,
and which specialised latents fire inside which shared one.

Everything is read from the store's rows and tokens in two streams (no language model runs), the second one for labels; memory
is the latents of a batch, a few contexts a latent, and a bounded block of the shared × specialised co-firing counts, whatever
the number of rows.
Files: `files.py`. The stages of `write_latents` in order: choose rows, stream, relate, judge labels, logit lens, write.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from evaluate.latents import files as latent_files
from evaluate.latents.files import PAGE_ROWS, PAGE_SIZE, Strings
from evaluate.latents.hierarchy import CHANCE, Blocks, Containment, Counts, Link, Pair, Related, both_ways, relate
from evaluate.scores.structure import MIN_COUNT
from pipeline.base.progress import Progress
from pipeline.base.runtime import numpy_rng
from pipeline.base.token_text import Tokenizer, TokenText
from pipeline.sae.nested import NestedSAE

if TYPE_CHECKING:
    from pipeline.store.reader import Split, Store

N_CONTEXTS, N_DRAWN, N_QUANTILES, N_LABEL, RADIUS, N_TOKENS = 10, 24, 6, 3, 10, 10
"""Top contexts a latent; firings drawn by lot, and how many of them are shown, evenly by rank; tokens of a label; tokens on
either side of a peak; tokens raised and lowered."""
N_BARS = 32
"""Bars of a histogram of activations, of which half or more are in use."""
BATCH_VALUES = 32_000_000
"""Latent values held at once: rows a batch × width."""
PAIR_VALUES = 200_000_000
"""Co-firing counts held at once, those of the null among them (float32); more shared latents than fit take another pass over
the rows."""


def write_latents(
    sae: NestedSAE,
    store: Store,
    tokenizer: Tokenizer,
    out_folder: Path,
    *,
    unembedding: Float[Tensor, "vocab d_model"] | None = None,
    rows: int = PAGE_ROWS,
    seed: int = 0,
    split: Literal["eval", "train"] = "eval",
    quiet: bool = False,
) -> dict[str, Any]:
    """Compute the pages of every latent of one SAE and write them to `out_folder`; return the summary in the index.

    `rows`: at most so many rows of the split are read, in whole chunks drawn with `seed`; special and massive rows are
    context only: they neither count nor peak. `unembedding` (`SplitLM.readout`) adds logit-lens tokens. Put the SAE on its
    device first.
    Raises DamagedError when the store's bytes changed.
    """
    part: Split = getattr(store, split)
    chunks = choose_chunks(part, rows, seed)
    found = collect(sae, part, store.context, chunks, seed, quiet)
    firing, related = found.firing, found.related
    text = TokenText(tokenizer)
    labels = [label_of(text, ids) for ids in found.top.peaks()]
    rules = judge(sae, part, store.context, chunks, labels, firing, quiet)
    lens = logit_lens(sae, unembedding) if unembedding is not None else None
    summary = {
        "format": latent_files.FORMAT,
        "version": latent_files.VERSION,
        "store": store.id,
        "split": split,
        "n_tokens": firing.n_tokens,
        "n_latents": sae.config.width,
        "levels": list(sae.config.levels),
        "n_shared": sae.config.n_shared,
        "page_size": PAGE_SIZE,
        "radius": RADIUS,
        "dead": int((firing.count == 0).sum()),
        "related_latents": sum(bool(links) for links in related[: sae.config.n_shared]),
        "criterion": {"count": MIN_COUNT, "chance": CHANCE},
        "containment": found.containment.summary(firing),
        "logit_lens": lens is not None,
    }
    write_files(out_folder, store.context, text, found, labels, rules, lens, summary)
    return summary


def choose_chunks(split: Split, rows: int, seed: int) -> list[tuple[int, int]]:
    """Row ranges [start, stop) of whole chunks of the split, drawn without replacement, in order; at least one."""
    n_chunks = math.ceil(split.n_rows / split.chunk_rows)
    n = min(n_chunks, max(1, rows // split.chunk_rows))
    chosen = np.sort(numpy_rng(seed, "latents").permutation(n_chunks)[:n])
    return [(int(k) * split.chunk_rows, min((int(k) + 1) * split.chunk_rows, split.n_rows)) for k in chosen]


def stream(
    sae: NestedSAE, split: Split, context: int, chunks: list[tuple[int, int]]
) -> Iterator[tuple[Float[Tensor, "seq pos latent"], int]]:
    """Latents of whole sequences, batch by batch, with the number of the first one; rows that are not kept are zero."""
    batch = max(1, BATCH_VALUES // (context * sae.config.width)) * context
    for chunk_start, chunk_stop in chunks:
        for start in range(chunk_start, chunk_stop, batch):
            stop = min(start + batch, chunk_stop)
            with torch.inference_mode():
                z = sae.encode(split.read(start, stop).to(sae.center.device)).float()
                z = z * kept_rows(split, start, stop)[:, None].to(z.device)
            yield z.view(-1, context, sae.config.width), start // context


def kept_rows(split: Split, start: int, stop: int) -> Bool[Tensor, " row"]:
    """Which of the rows of whole sequences count."""
    context = split.shape.layout.context
    return torch.from_numpy(split.kept_of(start // context, -(-stop // context)))


class Contexts:
    """The sequences with each latent's highest scores, one position a sequence, with the activations around it."""

    def __init__(self, width: int, n: int, device: torch.device) -> None:
        self.n = n
        self.score = torch.zeros(width, n, device=device)
        self.row = torch.full((width, n), -1, dtype=torch.int64, device=device)
        self.window = torch.zeros(width, n, 2 * RADIUS + 1, device=device)
        self.tokens: Int[np.ndarray, "latent context window"] | None = None

    def update(self, z: Float[Tensor, "seq pos latent"], score: Float[Tensor, "seq pos latent"], first: int) -> None:
        """Merge a batch whose first sequence is number `first`; a score of 0 is none."""
        context = z.shape[1]
        best, at = score.max(1)  # [seq, latent]
        rows = (torch.arange(z.shape[0], device=z.device) + first)[:, None] * context + at
        scores, order = torch.cat([self.score, best.T], 1).topk(self.n, 1)  # [latent, context]
        old = order.clamp(max=self.n - 1)
        self.window = self.window.gather(1, old[..., None].expand_as(self.window))
        latent, slot = (order >= self.n).nonzero(as_tuple=True)
        seq = order[latent, slot] - self.n
        self.window[latent, slot] = windows(z, seq, at[seq, latent], latent)
        self.row = torch.cat([self.row, rows.T], 1).gather(1, order)
        self.score = scores

    def read_tokens(self, split: Split) -> None:
        """Fill in `tokens`, those around each position, once all batches were merged."""
        self.tokens = tokens_around(split, self.row.cpu().numpy())

    def peaks(self) -> list[list[int]]:
        """Each latent's tokens at these positions, best first."""
        assert self.tokens is not None, "read_tokens first"
        ids = np.where(self.score.cpu().numpy() > 0, self.tokens[..., RADIUS], -1)
        return [[id for id in one if id >= 0] for one in ids.tolist()]

    @property
    def value(self) -> Float[Tensor, "latent context"]:
        """The latent's activation at each position; 0 where there is none."""
        return self.window[..., RADIUS] * (self.score > 0)


def lots(z: Float[Tensor, "seq pos latent"], first: int, seed: int) -> Float[Tensor, "seq pos latent"]:
    """A lot in (0, 1] for every firing, 0 elsewhere: the same for a row and a latent on every device, in every batch."""
    seq, pos, latent = (z > 0).nonzero(as_tuple=True)
    number = ((seq + first) * z.shape[1] + pos) * 0x9E3779B1 + latent * 0x85EBCA77 + seed * 0x27D4EB2F
    for factor in (0x2C1B3C6D, 0x297A2D39):  # an integer hash; 31 bits are kept at every step
        number = ((number ^ (number >> 15)) * factor) & 0x7FFFFFFF
    drawn = torch.zeros_like(z)
    drawn[seq, pos, latent] = ((number & 0xFFFFFF) + 1).float() / (1 << 24)
    return drawn


class Histogram:
    """Counts of positive activations in equal steps from 0 to a top of each latent, a power of two that doubles when it is too
    small: exact, in one pass, the same for all batches."""

    def __init__(self, width: int, device: torch.device) -> None:
        self.top = torch.zeros(width, device=device)
        self.count = torch.zeros(width, N_BARS, dtype=torch.int64, device=device)

    def update(self, z: Float[Tensor, "seq pos latent"]) -> None:
        """Count a batch."""
        peak = z.amax((0, 1)).clamp(min=0)
        power = torch.ldexp(torch.ones_like(peak), torch.frexp(peak).exponent)  # the first power of two above it
        wanted = torch.where(peak > 0, power, 0.0)
        self.top = torch.where(self.top == 0, wanted, self.top)
        while (small := wanted > self.top).any():
            merged = self.count[small].view(-1, N_BARS // 2, 2).sum(2)
            self.count[small] = torch.cat([merged, torch.zeros_like(merged)], 1)
            self.top[small] *= 2
        rows = z.flatten(0, 1)
        row, latent = (rows > 0).nonzero(as_tuple=True)
        bar = (rows[row, latent] / self.top[latent] * N_BARS).ceil().long().clamp(1, N_BARS) - 1
        flat = self.count.view(-1)
        flat += torch.bincount(latent * N_BARS + bar, minlength=len(flat))


def windows(
    z: Float[Tensor, "seq pos latent"], seq: Int[Tensor, " n"], at: Int[Tensor, " n"], latent: Int[Tensor, " n"]
) -> Float[Tensor, "n window"]:
    """Activations of one latent each at the RADIUS positions before and after `at`; zero outside the sequence."""
    pos = at[:, None] + torch.arange(-RADIUS, RADIUS + 1, device=z.device)
    inside = (pos >= 0) & (pos < z.shape[1])
    return z[seq[:, None], pos.clamp(0, z.shape[1] - 1), latent[:, None]] * inside


@dataclass
class Found:
    """What one stream of the rows tells of every latent: its peaks, firings drawn by lot, a histogram, counts, relatives."""

    top: Contexts
    drawn: Contexts
    histogram: Histogram
    firing: Counts
    containment: Containment
    related: Related = field(default_factory=list)


def collect(sae: NestedSAE, split: Split, context: int, chunks: list[tuple[int, int]], seed: int, quiet: bool) -> Found:
    """Stream the rows once for all but relatives; once more for each further block of shared latents."""
    config, device = sae.config, sae.center.device
    n_shared, n_special = config.n_shared, config.width - config.n_shared
    found = Found(
        Contexts(config.width, N_CONTEXTS, device),
        Contexts(config.width, N_DRAWN, device),
        Histogram(config.width, device),
        Counts(torch.zeros(config.width, dtype=torch.float64), n_shared),
        Containment(n_special),
    )
    found.firing.n_tokens = sum(int(kept_rows(split, a, b).sum()) for a, b in chunks)
    size = max(1, PAIR_VALUES // 2 // max(n_special, 1))
    blocks = [(s, min(s + size, n_shared)) for s in range(0, n_shared, size)] or [(0, 0)]
    pairs: list[Pair] = []
    total = len(blocks) * sum(b - a for a, b in chunks)
    with Progress(total, "latents", "row", quiet=quiet) as bar:
        for number, (a, b) in enumerate(blocks):
            counted = PairCounts(b - a, n_special, device)
            for z, first in stream(sae, split, context, chunks):
                fires = (z != 0).float()  # [seq, pos, latent]
                counted.update(fires[..., a:b], fires[..., n_shared:])
                if number == 0:
                    found.top.update(z, z, first)
                    found.drawn.update(z, lots(z, first, seed), first)
                    found.histogram.update(z)
                    found.firing.count += fires.sum((0, 1)).double().cpu()
                bar.advance(fires.shape[0] * fires.shape[1])
            block = counted.blocks()
            found.containment.update(block)
            pairs += relate(block, found.firing, sae.W_dec.detach(), a)
    for contexts in (found.top, found.drawn):
        contexts.read_tokens(split)
    found.related = both_ways(pairs, config.width)
    return found


@dataclass(frozen=True)
class Label:
    """The tokens a latent peaks on: their text, most frequent first, at most N_LABEL; and the ids that read so."""

    text: str
    ids: tuple[int, ...]


def tokens_around(split: Split, rows: Int[np.ndarray, "latent context"]) -> Int[np.ndarray, "latent context window"]:
    """Token ids at the RADIUS positions before and after some rows of a split, −1 outside a row's sequence and where it is −1.

    Reads one shard's tokens at a time, in order.
    """
    context, flat = split.shape.layout.context, rows.reshape(-1)
    found = np.full((len(flat), 2 * RADIUS + 1), -1, np.int32)
    shard = np.where(flat < 0, -1, flat // split.shard_rows)
    for k in np.unique(shard[shard >= 0]).tolist():
        here, tokens = np.flatnonzero(shard == k), split.shard_tokens(k)
        seq, pos = np.divmod(flat[here] - k * split.shard_rows, context)
        at = pos[:, None] + np.arange(-RADIUS, RADIUS + 1)
        found[here] = np.where((at >= 0) & (at < context), tokens[seq[:, None], at.clip(0, context - 1)], -1)
    return found.reshape(*rows.shape, -1)


def label_of(text: TokenText, ids: Sequence[int]) -> Label:
    """The label out of the tokens that top contexts peak on; those that differ only in spaces around them are one."""
    read: dict[str, set[int]] = {}
    for id in ids:
        read.setdefault(text(id).strip() or "␣", set()).add(id)
    often = Counter(text(id).strip() or "␣" for id in ids).most_common(N_LABEL)
    return Label(" · ".join(word for word, _ in often), tuple(sorted(id for word, _ in often for id in read[word])))


Rules = tuple[list[float | None], list[float | None]]
"""For each latent, precision and recall of "fires on the tokens of its label": the share of those tokens' occurrences on which it
fires, and the share of its firing that is on them. None where there is nothing to divide by."""


def judge(
    sae: NestedSAE,
    split: Split,
    context: int,
    chunks: list[tuple[int, int]],
    labels: Sequence[Label],
    firing: Counts,
    quiet: bool,
) -> Rules:
    """Stream the rows once more and count how often latents fire on the tokens of their labels."""
    device = sae.center.device
    longest = max(1, *(len(one.ids) for one in labels))
    ids = torch.tensor([[*one.ids, *[-1] * (longest - len(one.ids))] for one in labels], device=device)
    seen = np.zeros(int(ids.max()) + 1, dtype=np.int64)
    hits = torch.zeros(len(labels), dtype=torch.int64, device=device)
    with Progress(sum(b - a for a, b in chunks), "labels", "row", quiet=quiet) as bar:
        for z, first in stream(sae, split, context, chunks):
            row, latent = z.flatten(0, 1).nonzero(as_tuple=True)
            tokens = split.tokens_of(first, first + len(z)).reshape(-1)
            read = torch.from_numpy(tokens.astype(np.int64)).to(device)
            on = (ids[latent] == read[row][:, None]).any(1)
            hits += torch.bincount(latent[on], minlength=len(labels))
            counted = tokens[split.kept_of(first, first + len(z))]
            seen += np.bincount(counted[counted < len(seen)], minlength=len(seen))
            bar.advance(z.shape[0] * z.shape[1])
    occurrences = [int(seen[list(one.ids)].sum()) for one in labels]
    return (
        [hit / n if n else None for hit, n in zip(hits.tolist(), occurrences)],
        [hit / n if n else None for hit, n in zip(hits.tolist(), firing.count.tolist())],
    )


class PairCounts:
    """Counts of tokens on which a block of shared latents fires with specialised ones, and the null's, streamed.

    The null takes the specialised latents' firings from the sequence before, the first sequence's from the last.
    """

    def __init__(self, n_shared: int, n_special: int, device: torch.device) -> None:
        self.together, self.moved = torch.zeros(2, n_shared, n_special, device=device)
        self.first: Float[Tensor, "pos shared"] | None = None
        self.last: Float[Tensor, "pos special"] | None = None

    def update(self, shared: Float[Tensor, "seq pos shared"], special: Float[Tensor, "seq pos special"]) -> None:
        """Add the firings, 0 or 1, of some sequences."""
        flat = shared.flatten(0, 1)
        self.together += flat.T @ special.flatten(0, 1)
        self.moved += shared[1:].flatten(0, 1).T @ special[:-1].flatten(0, 1)
        if self.last is None:
            self.first = shared[0].clone()
        else:
            self.moved += shared[0].T @ self.last
        self.last = special[-1].clone()

    def blocks(self) -> Blocks:
        """The counts, once all sequences have been seen."""
        if self.first is not None and self.last is not None:
            self.moved += self.first.T @ self.last
            self.first = None
        return Blocks(self.together.cpu(), self.moved.cpu())


Lens = tuple[
    Float[Tensor, "latent top"], Int[Tensor, "latent top"], Float[Tensor, "latent top"], Int[Tensor, "latent top"]
]
"""Logits and token ids a latent raises most, then those it lowers most."""


def logit_lens(sae: NestedSAE, unembedding: Float[Tensor, "vocab d_model"]) -> Lens:
    """Each decoder row times the unembedding, the final norm's gain folded in: the direct effect of a unit latent on the logits.

    In float32, 64 latents at a time; in units of the raw residual stream, less the mean over the vocabulary.
    """
    weights = unembedding.float().to(sae.W_dec.device)
    n = min(N_TOKENS, len(weights))
    parts = []
    for rows in torch.split(sae.W_dec.detach().float(), 64):
        logits = (rows / sae.made_scale.float()) @ weights.T
        logits = logits - logits.mean(1, keepdim=True)
        up, down = logits.topk(n, 1), logits.topk(n, 1, largest=False)
        parts.append([t.cpu() for t in (up.values, up.indices, down.values, down.indices)])
    up_values, up_tokens, down_values, down_tokens = (torch.cat(column) for column in zip(*parts))
    return up_values, up_tokens, down_values, down_tokens


def write_files(
    folder: Path,
    context: int,
    text: TokenText,
    found: Found,
    labels: Sequence[Label],
    rules: Rules,
    lens: Lens | None,
    summary: dict[str, Any],
) -> None:
    """Write all pages, then the index."""
    width, related = summary["n_latents"], found.related
    latent_files.begin(folder, math.ceil(width / PAGE_SIZE))
    top, drawn = (shown_contexts(one, context) for one in (found.top, found.drawn))
    bars, tops = found.histogram.count.tolist(), found.histogram.top.tolist()
    for number, first in enumerate(range(0, width, PAGE_SIZE)):
        strings, latents = Strings(), []

        for j in range(first, min(first + PAGE_SIZE, width)):
            entry: dict[str, Any] = {"id": j, "related": [rounded_link(link) for link in related[j]]}
            entry["contexts"] = stored(top[j], text, strings)
            ranks, chosen = spread(drawn[j])
            entry["drawn"] = [[rank, *one] for rank, one in zip(ranks, stored(chosen, text, strings))]
            entry["bars"], entry["step"] = trimmed(bars[j]), tops[j] / N_BARS
            if lens is not None:
                entry["up"], entry["down"] = (token_scores(lens, k, j, text, strings) for k in (0, 2))
            latents.append(entry)
        latent_files.write_page(folder, number, strings.table, latents)
    columns = {
        "level": np.searchsorted(summary["levels"], np.arange(width), side="right").tolist(),
        "density": [short(v) for v in found.firing.density().tolist()],
        "max": [short(v) for v in found.top.value[:, 0].tolist()],
        "label": [one.text for one in labels],
        "related": [len(links) for links in related],
        "precision": [None if v is None else short(v) for v in rules[0]],
        "recall": [None if v is None else short(v) for v in rules[1]],
    }
    latent_files.write_index(folder, summary, columns)


def shown_contexts(contexts: Contexts, context: int) -> list[list[Context]]:
    """Each latent's contexts, of sequences of `context` positions, by falling activation."""
    assert contexts.tokens is not None, "read_tokens first"
    value, row, window = (t.cpu().numpy() for t in (contexts.value, contexts.row, contexts.window))
    order, near = np.argsort(-value, axis=1, kind="stable"), contexts.tokens
    return [
        [context_of(int(row[j, i]), context, near[j, i], window[j, i]) for i in best if value[j, i] > 0]
        for j, best in enumerate(order)
    ]


def spread(drawn: Sequence[Context]) -> tuple[list[float], list[Context]]:
    """At most N_QUANTILES of the firings drawn, evenly by rank, strongest first, and the share of all of them that is weaker
    than each, counted from the middle of its own rank."""
    n = min(N_QUANTILES, len(drawn))
    chosen = [int((i + 0.5) * len(drawn) / n) for i in range(n)]
    return [round(1 - (i + 0.5) / len(drawn), 2) for i in chosen], [drawn[i] for i in chosen]


def stored(contexts: Sequence[Context], text: TokenText, strings: Strings) -> list[list[Any]]:
    """Contexts as a page stores them: positions of strings instead of tokens."""
    return [[s, p, at, [strings(text(i)) for i in ids], acts] for s, p, at, ids, acts in contexts]


def trimmed(bars: Sequence[int]) -> list[int]:
    """Bars up to the last that is not empty."""
    return list(bars[: max((i + 1 for i, n in enumerate(bars) if n), default=0)])


Context = tuple[int, int, int, list[int], list[float]]
"""Sequence, position of the peak in it, index of the peak among the tokens shown, token ids, activations."""


def context_of(
    row: int, context: int, tokens: Int[np.ndarray, " window"], acts: Float[np.ndarray, " window"]
) -> Context:
    """The tokens around a peak and the latent's activation on each, cut at the ends of the sequence."""
    seq, pos = divmod(row, context)
    inside = slice(RADIUS - min(pos, RADIUS), RADIUS + min(context - pos, RADIUS + 1))
    shown = [short(a) if a else 0 for a in acts[inside].tolist()]
    return seq, pos, min(pos, RADIUS), tokens[inside].tolist(), shown


def token_scores(lens: Lens, k: int, latent: int, text: TokenText, strings: Strings) -> list[list[float]]:
    """Pairs of string position and logit of the tokens a latent raises (k = 0) or lowers (k = 2) most."""
    values, tokens = lens[k][latent].tolist(), lens[k + 1][latent].tolist()
    return [[strings(text(token)), short(value)] for value, token in zip(values, tokens)]


def rounded_link(link: Link) -> list[float]:
    """A relative as the page stores it."""
    other, count, share, null, cosine = link
    return [other, count, short(share), short(null), round(cosine, 3)]


def short(value: float) -> float:
    """Three significant digits: what a reader sees, in few bytes."""
    return float(f"{value:.3g}")
