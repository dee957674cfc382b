"""Texts as rows of a hook point, pooled: by the mean over real positions, raw or as an SAE's latents.

SAEBench pads each text to `context` positions and sets special ones (BOS, EOS, PAD) to the zero vector; its ablation then
runs over all of them, so that each masked position contributes f(0), the latents of the zero vector (EVALUATION.md 2.5).
Here only real positions are kept and encoded, and f(0) once: the sums are the same and nothing is padded.

A transcoder reads one point and makes the rows of another, of the same forward pass: its latents are those of the first,
and the probes that its ablations move look at the second, where its decoder writes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from pipeline.base.errors import CorpusError, UsageError
from pipeline.base.files import human_bytes
from pipeline.base.progress import Progress
from pipeline.base.runtime import tf32
from pipeline.model.points import Point, as_point
from pipeline.model.specials import First, first_ids, special_ids
from pipeline.sae.nested import NestedSAE

if TYPE_CHECKING:
    from pipeline.model.split_lm import SplitLM

CHUNK_ELEMENTS = {"cpu": 1 << 22, "cuda": 1 << 26}
"""Latents of the largest chunk encoded at once; 16 MiB of float32 on a CPU, where larger ones took twice the time."""


@dataclass(frozen=True)
class TextModel:
    """What turns texts into residuals.

    `tokenize`: token ids of each text, no special tokens added. `residual`: tokens [seq pos] → [seq pos d_model], for
    causal models (texts are padded on the right and the padding dropped). `both`: for transcoders, the rows that they read
    and those that they make, which are `residual`'s, of one pass. `bos`: what begins every text.
    `special`: ids whose positions are masked; the first position always is. `identity`: plain JSON that names model,
    weights, layer and dtype, for cache keys. `context_limit`: the most positions it takes, None where nobody says.
    """

    tokenize: Callable[[Sequence[str]], list[list[int]]]
    residual: Callable[[Int[Tensor, "seq pos"]], Float[Tensor, "seq pos d_model"]]
    bos: First
    special: tuple[int, ...]
    identity: Mapping[str, Any]
    context_limit: int | None = None
    both: Callable[[Int[Tensor, "seq pos"]], tuple[Tensor, Tensor]] | None = None

    def read_and_made(self, tokens: Int[Tensor, "seq pos"]) -> tuple[Tensor, Tensor]:
        """The rows that are encoded and those that are rebuilt, [seq pos d]: the same ones, but for transcoders."""
        if self.both is not None:
            return self.both(tokens)
        rows = self.residual(tokens)
        return rows, rows


def text_model(
    lm: SplitLM,
    tokenizer: Any,
    layer: int | Point,
    bos: First,
    *,
    parse_special: bool = False,
    special: Sequence[int] | None = None,
    reads: Point | None = None,
) -> TextModel:
    """A SplitLM's prefix and its Hugging Face tokenizer as a TextModel; `bos`, `parse_special` and ids that are `special` as
    the store has them, by default what the tokenizer declares and the BOS. `reads`: the point that transcoders read, whose
    rows the prefix gives too, where `layer` is the one that they make."""
    ids = special_ids(tokenizer, *first_ids(bos), *(special or ()))
    point = as_point(layer)
    lm_identity = {"weights_sha256": lm.weights_sha256, **point.recorded, "dtype": str(lm.dtype), "bos": bos}
    lm_identity |= {"parse_special": parse_special, "special": ids}
    options = {"add_special_tokens": False, "split_special_tokens": not parse_special}

    def both(tokens: Tensor) -> tuple[Tensor, Tensor]:
        rows = lm.prefix(tokens.to(lm.device))
        return rows[reads], rows[layer]

    return TextModel(
        tokenize=lambda texts: tokenizer(list(texts), **options)["input_ids"],
        residual=lambda tokens: lm.prefix(tokens.to(lm.device))[layer],
        bos=bos,
        special=tuple(ids),
        identity=lm_identity,
        context_limit=lm.context_limit,
        both=None if reads is None else both,
    )


@dataclass(frozen=True)
class TextBank:
    """Residuals of the real positions of many texts, text after text, in the model's dtype, on the CPU.

    rows [row, d_model]: what is encoded; n_real int64 [text]: rows of each; n_masked int64 [text]: its masked positions, so
    that the two add up to `context`; mean float32 [text, d_model]: over real positions. mean_made [text, d_made]: the same of
    the rows that transcoders make; None: of SAEs.
    """

    rows: Float[Tensor, "row d_model"]
    n_real: Int[Tensor, " text"]
    n_masked: Int[Tensor, " text"]
    mean: Float[Tensor, "text d_model"]
    mean_made: Float[Tensor, "text d_made"] | None = None

    @property
    def probed(self) -> Float[Tensor, "text d_made"]:
        """What linear probes see: the means of the rows that are rebuilt, which ablation moves."""
        return self.mean if self.mean_made is None else self.mean_made

    @property
    def n_bytes(self) -> int:
        """Memory it holds: rows · d_model · itemsize, and texts · d_model · 4 for the means, twice for transcoders."""
        return self.rows.nbytes + self.mean.nbytes + (0 if self.mean_made is None else self.mean_made.nbytes)


def make_bank(
    texts: Sequence[str], model: TextModel, context: int, batch_size: int, label: str, limit: int | None = None
) -> TextBank:
    """Run the model over every text and keep the residuals of its real positions.

    Texts go through in order of length, so that batches hold little padding; what a text's residual is does not depend
    on its batch beyond the rounding of another kernel shape. limit: bytes that they may take. Raises CorpusError for a text
    without a real position, and UsageError where the residuals are larger, known after one batch.
    """
    tokens = [clipped(ids, model.bos, context) for ids in model.tokenize(texts)]
    real = [real_positions(ids, model.special) for ids in tokens]
    n_real = torch.tensor([int(mask.sum()) for mask in real])
    if (n_real == 0).any():
        text = texts[int(n_real.argmin())]
        raise CorpusError(f"{label}: a text has no token beside special ones ({text[:60]!r}); leave it out of the data")
    starts = torch.cat([torch.zeros(1, dtype=torch.long), n_real.cumsum(0)])
    rows, mean_made = None, None
    order = np.argsort([-len(ids) for ids in tokens], kind="stable")
    with Progress(len(texts), f"residuals of {label}", "text") as bar:
        for batch in np.split(order, range(batch_size, len(order), batch_size)):
            read, made = (part.cpu() for part in model.read_and_made(padded([tokens[i] for i in batch])))
            if rows is None:
                require_room(len(texts), int(starts[-1]), read, label, limit, n_means=1 if model.both is None else 2)
                rows = torch.empty(int(starts[-1]), read.shape[-1], dtype=read.dtype)
                mean_made = None if model.both is None else torch.empty(len(texts), made.shape[-1])
            for i, of_text, of_made in zip(batch, read, made):
                chosen = torch.from_numpy(real[i])
                rows[starts[i] : starts[i + 1]] = of_text[: len(tokens[i])][chosen]
                if mean_made is not None:
                    mean_made[i] = of_made[: len(tokens[i])][chosen].float().mean(0)
            bar.advance(len(batch))
    assert rows is not None, "make_bank needs at least one text"
    mean = torch.stack([part.float().mean(0) for part in torch.split(rows, n_real.tolist())])
    return TextBank(rows, n_real, context - n_real, mean, mean_made)


def require_room(n_texts: int, n_rows: int, residual: Tensor, label: str, limit: int | None, n_means: int = 1) -> None:
    """Raise UsageError where so many rows as those of `residual`, and means of texts, take more than `limit` bytes."""
    n_bytes = residual.shape[-1] * (n_rows * residual.element_size() + 4 * n_texts * n_means)
    if limit is not None and n_bytes > limit:
        raise UsageError(
            f"residuals of {n_texts:,} texts ({label}) take {human_bytes(n_bytes)} of the host's memory, "
            f"{human_bytes(max(limit, 0))} may be used; lower --scr-train-size, --scr-seeds or --scr-context"
        )


def clipped(ids: Sequence[int], bos: First, context: int) -> list[int]:
    """Token ids with BOS first, cut to `context` positions."""
    return [*first_ids(bos), *ids][:context]


def real_positions(ids: Sequence[int], special: Sequence[int]) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Which positions count: not special, and never the first."""
    mask = ~np.isin(np.array(ids, np.int64), special)
    mask[:1] = False
    return mask


def padded(batch: Sequence[Sequence[int]]) -> Int[Tensor, "seq pos"]:
    """Token ids as one tensor, padded on the right with 0; a causal model never looks there."""
    longest = max(map(len, batch))
    return torch.tensor([[*ids, *[0] * (longest - len(ids))] for ids in batch])


@dataclass(frozen=True)
class PooledLatents:
    """An SAE's latents pooled over each text, float32, on the SAE's device.

    mean [text, latent]: over real positions. at_zero [latent]: f(0), of the zero vector. masked_share [text]: masked over
    real positions, so that F̄ = mean + masked_share · at_zero is SAEBench's unmasked sum over all positions / real ones.
    """

    mean: Float[Tensor, "text latent"]
    at_zero: Float[Tensor, " latent"]
    masked_share: Float[Tensor, " text"]

    def over_all_positions(self, texts: Tensor, latents: Tensor) -> Float[Tensor, "text latent"]:
        """F̄ of chosen texts and latents."""
        return self.mean[texts[:, None], latents] + self.masked_share[texts, None] * self.at_zero[latents]


def pooling_bytes(n_texts: int, longest: int, d_model: int, width: int, device: str) -> tuple[int, int]:
    """Memory that `pool_all` takes on its device: once, and for each SAE, whose widest is `width`.

        once      chunk · (6 · d_model + 12 · width)      a chunk's rows as stored and in float32; latents, a copy, a mask
        an SAE    texts · (4 · width + 4) + 4 · width     pooled latents

    chunk: rows of whole texts that make CHUNK_ELEMENTS latents, but at least one text's.
    """
    chunk = max(CHUNK_ELEMENTS[device] // width, longest)
    return chunk * (6 * d_model + 12 * width), n_texts * (4 * width + 4) + 4 * width


@torch.no_grad()
def pool_all(saes: Sequence[NestedSAE], bank: TextBank) -> list[PooledLatents]:
    """Pooled latents of every SAE, all on one device: chunks of texts outside, which come to the device once, SAEs inside.

    Memory: `pooling_bytes` says.
    """
    device, width = saes[0].W_enc.device, max(sae.config.width for sae in saes)
    chunk_rows = max(CHUNK_ELEMENTS[device.type] // width, int(bank.n_real.max()))
    means = [torch.empty(len(bank.n_real), sae.config.width, device=device) for sae in saes]
    lengths = bank.n_real.tolist()
    first_text = first_row = 0
    while first_text < len(lengths):
        n_texts, n_rows = whole_texts(lengths[first_text:], chunk_rows)
        rows, texts = bank.rows[first_row : first_row + n_rows].to(device), slice(first_text, first_text + n_texts)
        for sae, mean in zip(saes, means):
            with tf32(device):
                latents = sae.weighed(sae.encode(rows).float(), rows)
            segment_means(latents, bank.n_real[texts], out=mean[texts])
        first_text, first_row = first_text + n_texts, first_row + n_rows
    masked_share = (bank.n_masked / bank.n_real).to(device)
    zero = [torch.zeros(1, sae.config.d_model, device=device) for sae in saes]
    zeros = [sae.weighed(sae.encode(x).float(), x)[0] for sae, x in zip(saes, zero)]
    return [PooledLatents(mean, at_zero, masked_share) for mean, at_zero in zip(means, zeros)]


def segment_means(
    values: Float[Tensor, "row latent"], lengths: Int[Tensor, " text"], out: Float[Tensor, "text latent"]
) -> None:
    """The mean over each text's rows, text after text. On a CPU one by one, whose rows are in cache then (4 times as fast);
    elsewhere in one launch. `lengths` are on the CPU."""
    if values.device.type != "cpu":
        out.copy_(torch.segment_reduce(values, "mean", lengths=lengths.to(values.device), unsafe=True))
        return
    for mean, part in zip(out, torch.split(values, lengths.tolist())):
        torch.mean(part, 0, out=mean)


def whole_texts(lengths: Sequence[int], limit: int) -> tuple[int, int]:
    """How many of the first texts fit into `limit` rows, at least one, and their rows."""
    n_rows = 0
    for n, length in enumerate(lengths):
        if n and n_rows + length > limit:
            return n, n_rows
        n_rows += length
    return len(lengths), n_rows


def raw_decoder(sae: NestedSAE) -> Float[Tensor, "latent d_model"]:
    """Decoder rows in the space of the raw rows that are rebuilt, float32: decode divides by their scale."""
    return sae.W_dec.detach().float() / sae.made_scale.float()
