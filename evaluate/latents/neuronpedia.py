"""An SAE's latents as Neuronpedia imports them, from a store's rows and tokens: no language model runs.

    OUT/MODEL/LAYER-SET/         what Neuronpedia's bulk import reads, from a bucket or a folder
      features/batch-0.jsonl.gz      a latent a line: density, histograms, logit lens, nearest decoder rows
      activations/batch-0.jsonl.gz   an example a line: a whole sequence, with the latent's value on each of its tokens
      release, model, sourceset, source .jsonl
    OUT/sae_dashboard/batch-0.json   the same latents as SAEDashboard's NeuronpediaRunner writes them

Meanings are those of sae-dashboard 0.8: a latent is taken along its unit decoder row in raw units, z · ‖w‖ / scale (of one that
normalises each row, in units of the row's deviation, as it is there); position 0
of a sequence is not shown, and special and massive rows do not fire; examples are the N_TOP largest activations, then up to
N_RANDOM positions drawn from each of N_INTERVALS equal parts of 0 to the maximum, the highest part first. Three things differ:
the logit lens is less its mean over the vocabulary for every model, random examples of the lowest part are drawn from rows that
count, and correlations of latents are over rows that count and among all latents, not those of a minibatch of them. Correlations
with dimensions of the stream, which Neuronpedia calls neurons, are left empty.
"""

from __future__ import annotations

if __name__ == "__main__":
    from pipeline.base import startup  # before what takes time to import

    startup.begin()

import gzip
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float
from scipy.sparse import csc_matrix
from torch import Tensor

from evaluate.checkpoints.find import open_checkpoint, require_fit
from evaluate.checkpoints.place import info_of, placed
from evaluate.latents.collect import choose_chunks, stream
from pipeline.base.cli import COUNT, NAMED_SOURCE, OUT_FOLDER, SOURCE, WHOLE, main
from pipeline.base.digests import DIGESTS, write_digests
from pipeline.base.errors import DiskError, ModelError, UsageError
from pipeline.base.files import PARTIAL, hash_file, lock_folder, safe_name, sweep_partials, write_bytes
from pipeline.base.progress import Progress
from pipeline.base.runtime import numpy_rng, resolve_device
from pipeline.base.token_text import TokenText
from pipeline.sae.nested import NestedSAE
from pipeline.store.kept import KeptRows

if TYPE_CHECKING:
    from pipeline.model.split_lm import ModelInfo
    from pipeline.store.reader import Split, Store

BATCH = 128
"""Latents a file."""
N_TOP, N_INTERVALS, N_RANDOM = 20, 5, 5
N_BINS, N_LOGITS, N_ALIGNED, N_NEAREST = 50, 10, 3, 26
"""Bars of a histogram; tokens raised and lowered; entries of a decoder row; nearest decoder rows, itself the first."""
N_DRAWN = 64
"""Rows drawn for the lowest part's examples, of which those in higher parts are left out."""
MOST_FIRINGS = 50_000_000
"""Firings held at once (12 bytes each), or those of BATCH latents where they are more; more latents than fit take another pass
over the rows."""
MOST_TOGETHER, N_CORRELATED = 16_000_000, 3
"""Firings whose coincidences are counted (16 bytes each); rows beyond are left out. Latents named that fire most alike."""
DEFAULT_CREATOR = "clkht01d40000jv08hvalcvly"
"""The user that a fresh installation of Neuronpedia imports as."""

Values = npt.NDArray[np.float32]
Rows = npt.NDArray[np.int64]
Tokens = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Source:
    """What Neuronpedia calls the SAE: model, layer, set, and what is said about it."""

    model: str
    layer: int
    set_name: str
    creator: str
    creator_id: str
    dataset: str
    n_sequences: int
    context: int
    hook: str
    n_layers: int
    d_model: int
    created: str

    @property
    def id(self) -> str:
        """LAYER-SET, as in Neuronpedia's addresses."""
        return f"{self.layer}-{self.set_name}"

    def records(self) -> dict[str, dict[str, Any]]:
        """The four descriptions, by the name of their file."""
        common = {"visibility": "PUBLIC", "creatorId": self.creator_id, "createdAt": self.created}
        named = {
            "creatorName": self.creator,
            "description": f"{self.hook} of layer {self.layer}, nested SAE",
            "urls": [],
        }
        return {
            "release": {"name": self.set_name, "descriptionShort": self.set_name} | named | common,
            "model": {
                "id": self.model,
                "displayName": self.model,
                "displayNameShort": self.model,
                "owner": "",
                "instruct": False,
                "inferenceEnabled": False,
                "layers": self.n_layers,
                "dimension": self.d_model,
                "neuronsPerLayer": 0,
                "updatedAt": self.created,
            }
            | common,
            "sourceset": {
                "modelId": self.model,
                "name": self.set_name,
                "type": "",
                "releaseName": self.set_name,
                "hasDashboards": True,
            }
            | named
            | common,
            "source": {
                "id": self.id,
                "modelId": self.model,
                "setName": self.set_name,
                "dataset": self.dataset,
                "num_prompts": self.n_sequences,
                "num_tokens_in_prompt": self.context,
                "hasDashboards": True,
                "inferenceEnabled": False,
            }
            | common,
        }


@dataclass(frozen=True)
class Sample:
    """The rows that are looked at: whole sequences of a split, and which of their rows count."""

    split: Split
    context: int
    chunks: list[tuple[int, int]]

    @property
    def n_rows(self) -> int:
        """Rows, whether they count or not."""
        return sum(stop - start for start, stop in self.chunks)

    def counted(self) -> Counted:
        """The rows that count."""
        masks = (self.split.kept_of(start // self.context, stop // self.context) for start, stop in self.chunks)
        starts = np.array([start for start, _ in self.chunks], np.int64)
        return Counted(KeptRows.of(masks, self.split.chunk_rows), starts)

    def tokens(self, sequences: Iterable[int]) -> dict[int, Tokens]:
        """Tokens of some sequences, int32 [position] each; reads one shard's at a time, in order."""
        each = self.split.shard_rows // self.context
        return {s: self.split.shard_tokens(s // each)[s % each].copy() for s in sorted(sequences)}


@dataclass(frozen=True)
class Counted:
    """The rows of a sample's chunks that count, a bit a row; starts: the first row of each chunk, int64 [chunk]."""

    kept: KeptRows
    starts: Rows

    @cached_property
    def ends(self) -> Rows:
        """How many rows count up to the end of each chunk, int64 [chunk]."""
        ends: Rows = self.kept.in_chunks().cumsum()
        return ends

    def __len__(self) -> int:
        return int(self.ends[-1])

    def rows(self, numbers: Rows) -> Rows:
        """The rows with these numbers among those that count."""
        chunk = np.searchsorted(self.ends, numbers, side="right")
        before = np.concatenate([[0], self.ends])[chunk]
        at: Rows = (self.kept.mask(chunk).cumsum(1) > (numbers - before)[:, None]).argmax(1)
        return self.starts[chunk] + at


def export_neuronpedia(
    sae: NestedSAE,
    unembedding: Float[Tensor, "vocab d_model"],
    text: TokenText,
    sample: Sample,
    source: Source,
    out: Path,
    *,
    seed: int = 0,
    quiet: bool = False,
) -> Path:
    """Write every latent of an SAE to `out`, digests last; return the folder that Neuronpedia imports. See the top of this file.

    unembedding: `SplitLM.readout`. Put the SAE on its device first. Raises DiskError when `out` holds something else or another
    process writes there, DamagedError when the store's bytes changed.
    """
    folder = out / safe_name(source.model) / safe_name(source.id)
    out.mkdir(parents=True, exist_ok=True)
    lock = lock_folder(out, "exporting into this folder")
    try:
        begin(out, folder, math.ceil(sae.config.width / BATCH))
        write_batches(sae, Lens(sae, unembedding), text, sample, source, folder, out / DASHBOARDS, seed, quiet)
        for name, record in source.records().items():
            write_bytes(folder / f"{name}.jsonl", (json.dumps(record) + "\n").encode())
        written = {str(path.relative_to(out)): hash_file(path) for path in sorted(out.rglob("*")) if path.is_file()}
        write_digests(out / DIGESTS, f"{source.model}, {source.id} for Neuronpedia", written)
    finally:
        os.close(lock)
    return folder


DASHBOARDS = "sae_dashboard"


def begin(out: Path, folder: Path, n_batches: int) -> None:
    """Take the digests of an older export away, what a killed one left, and batches that none will overwrite.

    Raises DiskError when `out` holds something else.
    """
    found = {path.relative_to(out) for path in [*out.iterdir(), *folder.parent.glob("*")]}
    ours = {folder.parent, folder, out / DASHBOARDS, out / DIGESTS}
    if other := sorted(
        str(path) for path in found - {path.relative_to(out) for path in ours} if path.suffix != PARTIAL
    ):
        raise DiskError(f"{out}: holds something else ({', '.join(other[:3])}); choose an empty folder")
    (out / DIGESTS).unlink(missing_ok=True)
    sweep_partials(out)
    for path in [*folder.glob("*/batch-*.jsonl.gz"), *(out / DASHBOARDS).glob("batch-*.json")]:
        if not (number := path.name.removeprefix("batch-").partition(".")[0]).isdecimal() or int(number) >= n_batches:
            path.unlink()


def write_batches(
    sae: NestedSAE,
    lens: Lens,
    text: TokenText,
    sample: Sample,
    source: Source,
    folder: Path,
    dashboards: Path,
    seed: int,
    quiet: bool,
) -> None:
    """Stream the rows and write BATCH latents at a time, in both formats."""
    counted, together = sample.counted(), Together(sae.config.width)
    readable = lru_cache(maxsize=None)(text.plain)
    for first, found in gather(sae, sample, quiet, together):
        features, lines, examples = [], [], []
        chosen = []
        for latent, (rows, values) in enumerate(found, first):
            rng = numpy_rng(seed, "neuronpedia", latent)
            chosen.append(list(choose(rows, values, counted, sample.n_rows, rng)))
        tokens = sample.tokens({e.row // sample.context for one in chosen for e in one})
        alike = together.most_alike(first, first + len(found))
        for latent, (rows, values) in enumerate(found, first):
            own = {"feature_index": latent, "frac_nonzero": len(values) / sample.n_rows}
            about = lens.about(latent, readable) | histogram(values, "freq_hist_data") | own | alike[latent - first]
            shown = [show(e, rows, values, tokens[e.row // sample.context], readable) for e in chosen[latent - first]]
            features.append(dashboard_feature(about, shown, source))
            lines.append(feature_line(about, shown, lens, latent, source))
            examples += [activation_line(one, latent, number, source) for number, one in enumerate(shown)]
        name = f"batch-{first // BATCH}"
        batch = {"model_id": source.model, "layer": source.layer, "sae_set": source.set_name, "sae_id_suffix": None}
        write_bytes(dashboards / f"{name}.json", json.dumps(batch | {"features": features}).encode())
        write_lines(folder / "features" / f"{name}.jsonl.gz", lines)
        write_lines(folder / "activations" / f"{name}.jsonl.gz", examples)


def write_lines(path: Path, records: Sequence[dict[str, Any]]) -> None:
    """Records as compressed JSON lines; the same bytes every time."""
    data = "".join(json.dumps(record) + "\n" for record in records).encode()
    write_bytes(path, gzip.compress(data, compresslevel=5, mtime=0))


Firing = tuple[Rows, Values]
"""A latent's rows, ascending, and its values there, in raw units."""


class Together:
    """Which latents fire together, over the first rows that count whose firings are at most MOST_TOGETHER."""

    def __init__(self, width: int) -> None:
        self.width, self.n_rows, self.n_firings, self.full = width, 0, 0, False
        self.parts: list[tuple[npt.NDArray[np.int64], npt.NDArray[np.int32], Values]] = []

    def update(self, z: Float[Tensor, "row latent"]) -> None:
        """Take in rows that count, unless some were left out before."""
        row, latent = z.nonzero(as_tuple=True)
        self.full = self.full or self.n_firings + len(row) > MOST_TOGETHER
        if self.full:
            return
        values = z[row, latent].cpu().numpy()
        self.parts.append(((row.cpu() + self.n_rows).numpy(), latent.int().cpu().numpy(), values))
        self.n_rows += len(z)
        self.n_firings += len(row)

    @cached_property
    def firings(self) -> csc_matrix:
        """Latents [row, latent], float64. Ask when all rows are in."""
        columns = zip(*self.parts) if self.parts else ([], [], [])
        rows, latents, values = (np.concatenate([*column, np.empty(0, np.int64)]) for column in columns)
        self.parts.clear()
        places = (rows.astype(np.int64), latents.astype(np.int64))
        return csc_matrix((values.astype(np.float64), places), shape=(self.n_rows, self.width))

    @cached_property
    def sums(self) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """Σ z and Σ z² of every latent."""
        return np.asarray(self.firings.sum(0)).ravel(), np.asarray(self.firings.power(2).sum(0)).ravel()

    def most_alike(self, first: int, stop: int) -> list[dict[str, list[Any]]]:
        """Of latents `first` to `stop` − 1, the others whose latents correlate most with theirs, as SAEDashboard names it:
        Pearson's coefficient and, as `l1`, the cosine. Latents that are silent on these rows, or never are, have none."""
        total, square = self.sums
        products = (self.firings[:, first:stop].T @ self.firings).toarray()
        deviation = np.sqrt(np.maximum(self.n_rows * square - total * total, 0))
        varies = deviation > 1e-9 * self.n_rows * np.sqrt(np.maximum(square, 1e-300))
        found = []
        for latent, product in zip(range(first, stop), products):
            others = varies.copy()
            others[latent] = False
            which = np.flatnonzero(others) if varies[latent] else np.empty(0, np.int64)
            covariance = self.n_rows * product[which] - total[latent] * total[which]
            pearson = covariance / (deviation[latent] * deviation[which])
            best = np.argsort(-pearson, kind="stable")[:N_CORRELATED]
            cosine = product[which[best]] / np.sqrt(square[latent] * square[which[best]])
            values = ([short(x) for x in column.tolist()] for column in (pearson[best], cosine))
            names = (f"correlated_features_{what}" for what in ("pearson", "l1"))
            found.append({"correlated_features_indices": which[best].tolist(), **dict(zip(names, values))})
        return found


def gather(
    sae: NestedSAE, sample: Sample, quiet: bool, together: Together | None = None
) -> Iterator[tuple[int, list[Firing]]]:
    """Where and how strongly latents fire, BATCH latents at a time: the first one's number, and all of theirs.

    One pass over the rows counts, and fills `together`; each further one takes as many latents as fit into MOST_FIRINGS.
    """
    width, unit = sae.config.width, (sae.W_dec.detach().float().norm(dim=1) / sae.made_scale.float()).cpu()
    counts = torch.zeros(width, dtype=torch.int64)
    with Progress(sample.n_rows, "latents, counting", "row", quiet=quiet) as bar:
        for z, first in stream(sae, sample.split, sample.context, sample.chunks):
            counts += (z != 0).sum((0, 1)).cpu()
            if together is not None:
                kept = torch.from_numpy(sample.split.kept_of(first, first + len(z)))
                together.update(z.flatten(0, 1)[kept.to(z.device)])
            bar.advance(z.shape[0] * z.shape[1])
    for start, stop in groups(counts.tolist()):
        bounds = counts[start:stop].cumsum(0)
        ends = bounds - counts[start:stop]
        rows, values = np.empty(int(bounds[-1]), np.int64), np.empty(int(bounds[-1]), np.float32)
        with Progress(sample.n_rows, f"latents {start} to {stop - 1}", "row", quiet=quiet) as bar:
            for z, first in stream(sae, sample.split, sample.context, sample.chunks):
                block = z[..., start:stop].flatten(0, 1)
                latent, row = block.T.nonzero(as_tuple=True)  # latent by latent
                fired, value = latent.cpu(), block[row, latent].cpu()
                n = torch.bincount(fired, minlength=stop - start)
                at = (torch.arange(len(fired)) + (ends - n.cumsum(0) + n)[fired]).numpy()
                rows[at], values[at] = row.cpu() + first * sample.context, value * unit[start + fired]
                ends += n
                bar.advance(len(block))
        found = [(rows[a:b], values[a:b]) for a, b in zip([0, *bounds.tolist()], bounds.tolist())]
        for first in range(0, stop - start, BATCH):
            yield start + first, found[first : first + BATCH]


def groups(counts: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Ranges of latents, of whole batches, whose firings together stay within MOST_FIRINGS where one batch alone does."""
    start, held = 0, 0
    for first in range(0, len(counts), BATCH):
        more = sum(counts[first : first + BATCH])
        if held and held + more > MOST_FIRINGS:
            yield start, first
            start, held = first, 0
        held += more
    yield start, len(counts)


def histogram(values: npt.NDArray[np.floating[Any]], name: str) -> dict[str, list[float]]:
    """N_BINS bars between the smallest and the largest value: their heights and middles; none without values."""
    if not len(values):
        return {f"{name}_bar_values": [], f"{name}_bar_heights": []}
    heights, edges = np.histogram(values, bins=N_BINS)
    middles = (edges[:-1] + edges[1:]) / 2
    return {f"{name}_bar_values": [short(x) for x in middles.tolist()], f"{name}_bar_heights": heights.tolist()}


class Lens:
    """What lies in decoder rows alone: logits raised and lowered, largest entries, nearest other rows."""

    def __init__(self, sae: NestedSAE, unembedding: Float[Tensor, "vocab d_model"]) -> None:
        self.unit = torch.nn.functional.normalize(sae.W_dec.detach().float().cpu(), dim=1)
        self.weights = unembedding.float().cpu()

    def about(self, latent: int, text: Callable[[int], str]) -> dict[str, Any]:
        """Fields of one latent that both formats have."""
        row = self.unit[latent]
        logits = self.weights @ row
        logits = logits - logits.mean()
        n = min(N_LOGITS, len(logits))
        up, down = logits.topk(n), logits.topk(n, largest=False)
        aligned = row.topk(min(N_ALIGNED, len(row)))
        return {
            "neuron_alignment_indices": aligned.indices.tolist(),
            "neuron_alignment_values": [short(x) for x in aligned.values.tolist()],
            "neuron_alignment_l1": [short(x) for x in (aligned.values.abs() / row.abs().sum()).tolist()],
            "pos_str": [text(id) for id in up.indices.tolist()],
            "pos_values": [short(x) for x in up.values.tolist()],
            "neg_str": [text(id) for id in down.indices.tolist()],
            "neg_values": [short(x) for x in down.values.tolist()],
            **histogram(logits.numpy(), "logits_hist_data"),
        }

    def nearest(self, latent: int) -> tuple[list[int], list[float]]:
        """Latents by the cosine of their decoder rows with this one's, itself the first, and the cosines."""
        cosines = self.unit @ self.unit[latent]
        cosines[latent] = torch.inf
        found = cosines.topk(min(N_NEAREST, len(cosines))).indices
        cosines[latent] = 1.0
        return found.tolist(), [round(x, 4) for x in cosines[found].tolist()]


@dataclass(frozen=True)
class Example:
    """A row to show, and the part of the range it stands for: limits, and the share of all rows within (−1 for the top)."""

    row: int
    low: float
    high: float
    share: float


def choose(rows: Rows, values: Values, counted: Counted, n_rows: int, rng: np.random.Generator) -> Iterator[Example]:
    """The largest activations, then random ones of equal parts of the range, the highest part first; none of a dead latent."""
    if not len(values):
        return
    peak = float(values.max())
    for at in np.argsort(-values, kind="stable")[:N_TOP]:
        yield Example(int(rows[at]), -1.0, peak, -1.0)
    limits = np.linspace(0, peak, N_INTERVALS + 1)
    for low, high in reversed(list(zip(limits[:-1], limits[1:]))):
        inside = rows[(values >= low) & (values <= high)]
        share = (len(inside) + (n_rows - len(values)) * (low == 0)) / n_rows
        if low == 0:  # rows on which it is silent are in the lowest part too
            drawn = counted.rows(rng.choice(len(counted), min(len(counted), N_DRAWN), replace=False))
            inside = drawn[~np.isin(drawn, rows[values > high])]
        for row in rng.choice(inside, min(N_RANDOM, len(inside)), replace=False):
            yield Example(int(row), float(low), float(high), share)


def show(example: Example, rows: Rows, values: Values, tokens: Tokens, text: Callable[[int], str]) -> dict[str, Any]:
    """An example as SAEDashboard has it: tokens of its sequence (`tokens` [position]) but the first, and the latent's value on
    each."""
    sequence, position = divmod(example.row, len(tokens))
    ids, start = tokens.tolist(), sequence * len(tokens)
    a, b = np.searchsorted(rows, [start, start + len(ids)])
    acts = [0.0] * len(ids)
    for row, value in zip(rows[a:b], values[a:b]):
        acts[int(row) - start] = short(float(value))
    return {
        "bin_min": short(example.low),
        "bin_max": short(example.high),
        "bin_contains": short(example.share),
        "tokens": [text(id) for id in ids[1:]],
        "values": acts[1:],
        "qualifying_token_index": position - 1,
    }


def dashboard_feature(about: dict[str, Any], shown: list[dict[str, Any]], source: Source) -> dict[str, Any]:
    """A latent as SAEDashboard writes it; correlations with dimensions of the stream are empty."""
    empty: dict[str, Any] = {f"correlated_neurons_{what}": [] for what in ("indices", "l1", "pearson")}
    rows = {"n_prompts_total": source.n_sequences, "n_tokens_in_prompt": source.context, "dataset": source.dataset}
    return about | empty | rows | {"decoder_weights_dist": [], "activations": shown, "vector": []}


def feature_line(
    about: dict[str, Any], shown: list[dict[str, Any]], lens: Lens, latent: int, source: Source
) -> dict[str, Any]:
    """A latent as a line of features/*.jsonl.gz."""
    near, cosines = lens.nearest(latent)
    peak = max((max(one["values"]) for one in shown), default=0.0)
    return {
        "modelId": source.model,
        "layer": source.id,
        "index": str(latent),
        "creatorId": source.creator_id,
        "createdAt": source.created,
        "maxActApprox": peak,
        "hasVector": False,
        "vector": [],
        "vectorDefaultSteerStrength": peak,
        "hookName": f"blocks.{source.layer}.{source.hook}",
        "topkCosSimIndices": near,
        "topkCosSimValues": cosines,
    } | {name: value for name, value in dashboard_feature(about, [], source).items() if name in NEURON_FIELDS}


NEURON_FIELDS = frozenset(
    [f"neuron_alignment_{what}" for what in ("indices", "values", "l1")]
    + [f"correlated_{kind}_{what}" for kind in ("neurons", "features") for what in ("indices", "pearson", "l1")]
    + [f"{kind}_hist_data_bar_{what}" for kind in ("freq", "logits") for what in ("heights", "values")]
    + ["neg_str", "neg_values", "pos_str", "pos_values", "frac_nonzero", "decoder_weights_dist"]
)
"""Columns of Neuronpedia's table of latents that carry SAEDashboard's names."""


def activation_line(shown: dict[str, Any], latent: int, number: int, source: Source) -> dict[str, Any]:
    """An example as a line of activations/*.jsonl.gz."""
    values = shown["values"]
    name = hashlib.sha256(f"{source.model} {source.id} {latent} {number}".encode()).hexdigest()
    return {
        "id": f"c{name[:24]}",
        "modelId": source.model,
        "layer": source.id,
        "index": str(latent),
        "creatorId": source.creator_id,
        "createdAt": source.created,
        "tokens": shown["tokens"],
        "values": values,
        "maxValue": max(values),
        "maxValueTokenIndex": values.index(max(values)),
        "minValue": min(values),
        "binMin": shown["bin_min"],
        "binMax": shown["bin_max"],
        "binContains": shown["bin_contains"],
        "qualifyingTokenIndex": shown["qualifying_token_index"],
        "dfaValues": [],
        "lossValues": [],
    }


def short(value: float) -> float:
    """Five significant digits."""
    return float(f"{value:.5g}")


def load_readout(info: ModelInfo) -> tuple[Tensor, TokenText, int]:
    """Unembedding with the final norm folded in, text of tokens, and the model's number of layers; the model is dropped.

    Raises ModelError where its logits are no such product.
    """
    from pipeline.model.split_lm import SplitLM, load_tokenizer

    revision = None if info.revision == "local" else info.revision
    lm = SplitLM.load(info.name, revision=revision, dtype="float32", part="suffix", layers=[info.n_layers - 1])
    if (readout := lm.readout()) is None:
        raise ModelError(
            f"{info.name}: its logits are no product of one matrix with the normed stream, so there is no logit lens"
        )
    return readout.cpu(), TokenText(load_tokenizer(info.name, revision)), info.n_layers


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.argument("checkpoint", type=NAMED_SOURCE)
@click.option("--store", "store_path", type=SOURCE, required=True, help="Its rows and tokens.")
@click.option("--out", type=OUT_FOLDER, required=True, help="Folder to write.")
@click.option("--model", type=NAMED_SOURCE, help="Folder or Hub id of the model.  [default: the store's]")
@click.option("--model-id", help="What Neuronpedia calls it.  [default: the last part of the model's name]")
@click.option("--set", "set_name", help="Name of the source set.  [default: nested-res-WIDTH]")
@click.option("--creator", default="", help="Who made the SAE, as shown.")
@click.option("--creator-id", default=DEFAULT_CREATOR, show_default=True, help="The Neuronpedia user that owns it.")
@click.option("--rows", type=COUNT, default=131_072, show_default=True, help="Rows to read, in whole chunks.")
@click.option("--split", type=click.Choice(["eval", "train"]), default="eval", show_default=True, help="Whose rows.")
@click.option("--level", type=COUNT, help="A level of the dictionary, 0 the innermost.  [default: the whole]")
@click.option("--seed", type=WHOLE, default=0, show_default=True, help="Of which rows and which random examples.")
@click.option("--device", default="auto", show_default=True, help="cpu, cuda, cuda:1 or auto.")
def command(
    checkpoint: str,
    store_path: Path,
    out: Path,
    model: str | None,
    model_id: str | None,
    set_name: str | None,
    creator: str,
    creator_id: str,
    rows: int,
    split: str,
    level: int | None,
    seed: int,
    device: str,
) -> None:
    """Write an SAE's latents as Neuronpedia imports them, and as SAEDashboard writes them, from a store's rows."""
    from pipeline.sae.hub import find_checkpoint
    from pipeline.store.reader import Store

    found, store = open_checkpoint(find_checkpoint(checkpoint)), Store.open(store_path)
    if not store.layout.has_tokens:
        raise UsageError(f"{store_path}: its rows are of no text, so there is nothing to show in Neuronpedia")
    info = info_of(store, model)
    found = placed(found, store, lambda: info)
    require_fit(found, store, allow_other_store=True)
    sae = found.load()
    if level is not None and level >= sae.config.n_levels:
        raise UsageError(f"{checkpoint}: has levels 0 to {sae.config.n_levels - 1}, asked for {level}")
    sae = (sae if level is None else sae.prefix(level)).to(resolve_device(device))
    part = getattr(store, split)
    sample = Sample(part, store.context, choose_chunks(part, rows, seed))
    unembedding, text, n_layers = load_readout(info)
    inner = "" if level is None else f"-level{level}"
    name = set_name or f"nested-res-{found.sae.width}{inner}"
    named = model_id or str(store.config["model"]).rstrip("/").rpartition("/")[2]
    for what, value in (("--set", name), ("--model-id", named)):
        if safe_name(value) != value:
            raise UsageError(f"{what} {value!r}: letters, digits and . _ - only, since it names a folder; give another")
    created = datetime.fromtimestamp(newest(found.path), UTC).isoformat()
    source = Source(
        named,
        int(store.config["layer"]),
        name,
        creator,
        creator_id,
        corpus_name(store, split),
        sample.n_rows // store.context,
        store.context,
        f"hook_{store.config.get('hook', 'resid_post')}",
        n_layers,
        store.d_model,
        created,
    )
    click.echo(export_neuronpedia(sae, unembedding, text, sample, source, out, seed=seed))


def newest(path: Path) -> float:
    """When a checkpoint's file, or the newest file of its folder, was written (seconds since 1970)."""
    return max(one.stat().st_mtime for one in (path.iterdir() if path.is_dir() else [path]))


def corpus_name(store: Store, split: str) -> str:
    """The corpus of a split, as the store's config names it; "" where it does not."""
    corpus = store.config.get("eval_corpus" if split == "eval" else "corpus") or store.config.get("corpus") or {}
    return str(corpus.get("id", "")) if isinstance(corpus, dict) else str(corpus)


if __name__ == "__main__":
    main(command, "pipeline export --format neuronpedia")
