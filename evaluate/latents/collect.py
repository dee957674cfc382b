"""Latents one can look at: top contexts, what they promote, and which specialised latents fire with which shared one.

Everything is read from the store's rows and tokens in one stream (no language model runs); memory is the latents of a
batch, a few contexts a latent, and a bounded block of the shared × specialised co-firing counts.
Files: `latent_files.py`. The stages of `write_latents` in order: choose rows, stream, relate, logit lens, write.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from evaluate.latents import files as latent_files
from evaluate.latents.files import PAGE_SIZE, Strings
from evaluate.latents.hierarchy import CHANCE, Blocks, Containment, Counts, Link, Pair, Related, both_ways, relate
from evaluate.scores.structure import MIN_COUNT
from pipeline.base.progress import Progress
from pipeline.base.runtime import numpy_rng
from pipeline.base.token_text import Tokenizer, TokenText
from pipeline.sae.nested import NestedSAE

if TYPE_CHECKING:
    from pipeline.store.reader import Split, Store

N_CONTEXTS, RADIUS, N_TOKENS = 12, 10, 10
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
    rows: int = 131_072,
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
    contexts, firing, related, containment = collect(sae, part, store.context, chunks, quiet)
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
        "containment": containment.summary(firing),
        "logit_lens": lens is not None,
    }
    write_files(out_folder, part, TokenText(tokenizer), contexts, firing, related, lens, summary)
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
    kept = torch.from_numpy(split.kept())
    batch = max(1, BATCH_VALUES // (context * sae.config.width)) * context
    for chunk_start, chunk_stop in chunks:
        for start in range(chunk_start, chunk_stop, batch):
            stop = min(start + batch, chunk_stop)
            with torch.inference_mode():
                z = sae.encode(split.read(start, stop).to(sae.center.device)).float()
                z = z * kept[start:stop, None].to(z.device)
            yield z.view(-1, context, sae.config.width), start // context


class TopContexts:
    """The sequences on which each latent fires most, one peak a sequence, with the activations around the peak."""

    def __init__(self, width: int, device: torch.device) -> None:
        self.value = torch.zeros(width, N_CONTEXTS, device=device)
        self.row = torch.full((width, N_CONTEXTS), -1, dtype=torch.int64, device=device)
        self.window = torch.zeros(width, N_CONTEXTS, 2 * RADIUS + 1, device=device)

    def update(self, z: Float[Tensor, "seq pos latent"], first: int) -> None:
        """Merge the peaks of a batch whose first sequence is number `first`."""
        context = z.shape[1]
        peak, at = z.max(1)  # [seq, latent]
        rows = (torch.arange(z.shape[0], device=z.device) + first)[:, None] * context + at
        value, order = torch.cat([self.value, peak.T], 1).topk(N_CONTEXTS, 1)  # [latent, context]
        old = order.clamp(max=N_CONTEXTS - 1)
        self.window = self.window.gather(1, old[..., None].expand_as(self.window))
        latent, slot = (order >= N_CONTEXTS).nonzero(as_tuple=True)
        seq = order[latent, slot] - N_CONTEXTS
        self.window[latent, slot] = windows(z, seq, at[seq, latent], latent)
        self.row = torch.cat([self.row, rows.T], 1).gather(1, order)
        self.value = value


def windows(
    z: Float[Tensor, "seq pos latent"], seq: Int[Tensor, " n"], at: Int[Tensor, " n"], latent: Int[Tensor, " n"]
) -> Float[Tensor, "n window"]:
    """Activations of one latent each at the RADIUS positions before and after `at`; zero outside the sequence."""
    pos = at[:, None] + torch.arange(-RADIUS, RADIUS + 1, device=z.device)
    inside = (pos >= 0) & (pos < z.shape[1])
    return z[seq[:, None], pos.clamp(0, z.shape[1] - 1), latent[:, None]] * inside


def collect(
    sae: NestedSAE, split: Split, context: int, chunks: list[tuple[int, int]], quiet: bool
) -> tuple[TopContexts, Counts, Related, Containment]:
    """Stream the rows once for contexts and counts; once more for each further block of shared latents."""
    config, device = sae.config, sae.center.device
    n_shared, n_special = config.n_shared, config.width - config.n_shared
    contexts, firing, containment = (
        TopContexts(config.width, device),
        Counts(torch.zeros(config.width, dtype=torch.float64), n_shared),
        Containment(n_special),
    )
    kept = split.kept()
    firing.n_tokens = int(sum(kept[a:b].sum() for a, b in chunks))
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
                    contexts.update(z, first)
                    firing.count += fires.sum((0, 1)).double().cpu()
                bar.advance(fires.shape[0] * fires.shape[1])
            found = counted.blocks()
            containment.update(found)
            pairs += relate(found, firing, sae.W_dec.detach(), a)
    return contexts, firing, both_ways(pairs, config.width), containment


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
        logits = (rows / sae.scale.float()) @ weights.T
        logits = logits - logits.mean(1, keepdim=True)
        up, down = logits.topk(n, 1), logits.topk(n, 1, largest=False)
        parts.append([t.cpu() for t in (up.values, up.indices, down.values, down.indices)])
    up_values, up_tokens, down_values, down_tokens = (torch.cat(column) for column in zip(*parts))
    return up_values, up_tokens, down_values, down_tokens


def write_files(
    folder: Path,
    split: Split,
    text: TokenText,
    contexts: TopContexts,
    firing: Counts,
    related: Related,
    lens: Lens | None,
    summary: dict[str, Any],
) -> None:
    """Write all pages, then the index."""
    width, tokens = summary["n_latents"], split.tokens
    latent_files.begin(folder, math.ceil(width / PAGE_SIZE))
    value, row, window = (t.cpu().numpy() for t in (contexts.value, contexts.row, contexts.window))
    labels: list[str] = []
    for number, first in enumerate(range(0, width, PAGE_SIZE)):
        strings, latents = Strings(), []
        for j in range(first, min(first + PAGE_SIZE, width)):
            found = [context_of(tokens, int(r), w) for v, r, w in zip(value[j], row[j], window[j]) if v > 0]
            labels.append(label([text(ids[at]) for _, _, at, ids, _ in found]))
            entry: dict[str, Any] = {"id": j, "related": [rounded_link(link) for link in related[j]]}
            entry["contexts"] = [[s, p, at, [strings(text(i)) for i in ids], acts] for s, p, at, ids, acts in found]
            if lens is not None:
                entry["up"], entry["down"] = (token_scores(lens, k, j, text, strings) for k in (0, 2))
            latents.append(entry)
        latent_files.write_page(folder, number, strings.table, latents)
    peak = [short(v) for v in value[:, 0].tolist()]
    density = [short(v) for v in firing.density().tolist()]
    level = np.searchsorted(summary["levels"], np.arange(width), side="right").tolist()
    columns = {"level": level, "density": density, "max": peak, "label": labels, "related": [len(r) for r in related]}
    latent_files.write_index(folder, summary, columns)


Context = tuple[int, int, int, list[int], list[float]]
"""Sequence, position of the peak in it, index of the peak among the tokens shown, token ids, activations."""


def context_of(tokens: Int[np.ndarray, "seq pos"], row: int, window: Float[np.ndarray, " window"]) -> Context:
    """The tokens around a peak and the latent's activation on each, cut at the ends of the sequence."""
    seq, pos = divmod(row, tokens.shape[1])
    start, stop = max(pos - RADIUS, 0), min(pos + RADIUS + 1, tokens.shape[1])
    acts = window[start - pos + RADIUS : stop - pos + RADIUS]
    return seq, pos, pos - start, tokens[seq, start:stop].tolist(), [short(a) for a in acts.tolist()]


def label(peaks: list[str]) -> str:
    """The tokens a latent peaks on, most frequent first, at most three: what lists show and search finds."""
    return " · ".join(token.strip() or "␣" for token, _ in Counter(peaks).most_common(3))


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
