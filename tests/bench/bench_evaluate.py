"""What one checkpoint costs: the naive way (full forwards with hooks) against ours (from the cache, one clean pass).

    python tests/bench/bench_evaluate.py                       # Gemma-2-2B at 1/8 of its width: 26 layers, splice after 19
    python tests/bench/bench_evaluate.py --d-model 2304 --ff 9216 --head-dim 256 --vocab 256000 --width 16384 --device cuda

The vocabulary is sized so that the unembedding costs 7.6 layers, as in Gemma-2-2B. Naive: each level of each SAE is evaluated as
an SAE of its own, as the usual tool does with the folder of each exported level: for every batch a clean, a zero-ablated and a
spliced full forward (encode, decode and splice in a hook), float32 log-softmax and KL on all positions. It is timed for one SAE
and multiplied: nothing is shared. `_levels_together` grants it one clean and one ablated forward for all levels. Ours:
`evaluate.run` from the store to results on disk, without loading the model (both need it). The floor of a checkpoint: the bare
suffix, unembedding, log-softmax, KL, encode and decode of its levels, the clean distributions being there, no score besides.
Each of `--rounds` rounds runs naive, floor and all of ours, one after the other; what is printed is the median over rounds,
ratios being taken within a round. Naive runs in a process of its own, since ours sets the allocator.
"""

from __future__ import annotations

import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2]))

import transformers

from bench.options import placed
from evaluate.job import Job
from evaluate.run import EvaluateConfig, Outcome, score_all
from evaluate.scores.behaviour import clean_pass
from evaluate.scores.sample import Batch, Sample
from evaluate.select import select
from evaluate.work import plan
from pipeline.base.runtime import DTYPES
from pipeline.model.files import architecture_sha256
from pipeline.model.split_lm import SplitLM
from pipeline.sae.checkpoint import load_checkpoint, save_checkpoint
from pipeline.sae.config import SAEConfig
from pipeline.sae.nested import NestedSAE
from pipeline.store.prepare import SplitTokens, prepare
from pipeline.store.reader import Store
from support.stores import store_config

HEAD_IN_LAYERS = 7.6
"""Cost of Gemma-2-2B's unembedding in decoder layers."""


def make_model(folder: Path, o: dict[str, Any]) -> int:
    """Write a random Gemma-2 of the asked shape to a folder; returns its vocabulary."""
    heads = 8 * o["head_dim"]
    layer = o["d_model"] * (2 * heads + 2 * heads // 2 + 3 * o["ff"])
    vocab = o["vocab"] or round(HEAD_IN_LAYERS * layer / o["d_model"])
    config = transformers.Gemma2Config(
        vocab_size=vocab,
        hidden_size=o["d_model"],
        intermediate_size=o["ff"],
        num_hidden_layers=o["layers"],
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=o["head_dim"],
        max_position_embeddings=o["context"],
    )
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config, dtype=DTYPES[o["dtype"]]).save_pretrained(folder)
    return vocab


def make_store(folder: Path, vocab: int, o: dict[str, Any]) -> tuple[Store, float]:
    """A store of the model's residuals, and the seconds that its prefix took on the evaluation split."""
    lm = SplitLM.load(str(folder / "model"), dtype=o["dtype"], device=o["device"], part="prefix", layers=[o["layer"]])
    rows = o["batch"] * o["context"]
    config = store_config(
        d_model=o["d_model"], context=o["context"], shard_rows=64 * rows, chunk_rows=rows, dtype=o["dtype"]
    )
    config |= {"model": str(folder / "model"), "revision": "local", "weights_sha256": lm.weights_sha256}
    config |= {"architecture_sha256": architecture_sha256(folder / "model")}
    config |= {"layer": o["layer"], "n_layers": o["layers"], "vocab": vocab, "bos": 2, "special_ids": [2]}
    tokens = {
        name: random_tokens(n, vocab, o["context"]) for name, n in (("train", o["batch"]), ("eval", o["sequences"]))
    }
    writer, seconds = prepare(folder / "acts.zarr", config, tokens["train"], tokens["eval"], {}), 0.0
    for split, drawn in tokens.items():
        for k in writer.pending(split):
            start, stop = (row // o["context"] for row in writer.split(split).shard_rows_range(k))
            with writer.shard(split, k) as shard:
                for a in range(start, stop, o["batch"]):
                    ids = torch.from_numpy(drawn.tokens[a : min(a + o["batch"], stop)]).long().to(o["device"])
                    took, residual = timed(lambda ids=ids: lm.prefix(ids)[o["layer"]], o["device"])
                    seconds += took if split == "eval" else 0
                    shard.write(residual.flatten(0, 1).cpu())
    return writer.finish(), seconds


def random_tokens(n: int, vocab: int, context: int) -> SplitTokens:
    """Random tokens, BOS (2) first."""
    tokens = np.random.default_rng(0).integers(3, vocab, (n, context), dtype=np.int32)
    tokens[:, 0] = 2
    return SplitTokens(tokens, tokens == 2)


def make_checkpoints(folder: Path, store: Store, n: int, o: dict[str, Any]) -> list[Path]:
    """Random SAEs of the asked width, the first level a fifth of it, as checkpoint files."""
    sizes = [round(o["width"] * (0.2 + 0.8 * i / max(o["levels"] - 1, 1))) for i in range(o["levels"])]
    config = SAEConfig(o["d_model"], o["width"], tuple(sizes) if o["levels"] > 1 else (o["width"],))
    trained = {"id": store.id, "layer": o["layer"], "weights_sha256": store.config["weights_sha256"]}
    paths = []
    for seed in range(n):
        sae = NestedSAE(config).requires_grad_(False)
        decoder = torch.randn(o["width"], o["d_model"], generator=torch.Generator().manual_seed(seed))
        sae.W_dec.copy_(torch.nn.functional.normalize(decoder, dim=1))
        sae.W_enc.copy_(sae.W_dec.T)
        sae.b_enc.fill_(-0.1)
        sae.center, sae.scale = store.mean, torch.tensor(store.scale)
        paths.append(folder / f"sae{seed}.safetensors")
        save_checkpoint(paths[-1], sae, 1, {"member": f"sae{seed}", "store": trained})
    return paths


def timed(work: Callable[[], Any], device: str) -> tuple[float, Any]:
    """Seconds and result of some work, the device drained before and after."""
    drain = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    drain()
    start = time.perf_counter()
    result = work()
    drain()
    return time.perf_counter() - start, result


@torch.inference_mode()
def naive_seconds(folder: Path, checkpoint: Path, o: dict[str, Any]) -> tuple[float, float]:
    """Seconds that one SAE takes with full forwards: clean and ablated ones once, and the spliced ones of all levels."""
    store, sae = Store.open(folder / "acts.zarr"), load_checkpoint(checkpoint)[0].to(o["device"])
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder / "model", dtype=DTYPES[o["dtype"]], attn_implementation="eager"
    )
    model = model.to(o["device"]).eval()
    sample = Sample(store, o["sequences"], o["batch"], torch.device(o["device"]))

    def forward(batch: Batch, change: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        handle = model.model.layers[o["layer"]].register_forward_hook(lambda _m, _a, output: change(output))
        logits = model(input_ids=batch.tokens, use_cache=False).logits
        handle.remove()
        return torch.log_softmax(logits, -1, dtype=torch.float32)

    def spliced(residual: torch.Tensor, level: int, batch: Batch) -> torch.Tensor:
        new = residual.clone()
        new[batch.kept] = sae.decode_level(sae.encode(residual[batch.kept]), level).to(residual.dtype)
        return new

    def kl(clean: torch.Tensor, other: torch.Tensor, batch: Batch) -> torch.Tensor:
        return (clean.exp() * (clean - other)).sum(-1)[batch.kept].double().mean()

    def base(batch: Batch) -> torch.Tensor:
        clean = forward(batch, lambda residual: residual)
        kl(clean, forward(batch, torch.zeros_like), batch)
        return clean

    def levels(batch: Batch, clean: torch.Tensor) -> None:
        for n in range(sae.config.n_levels):
            kl(clean, forward(batch, lambda residual, n=n: spliced(residual, n, batch)), batch)

    batches, once, each = list(sample.batches()), 0.0, 0.0
    levels(batches[0], base(batches[0]))  # warm
    for batch in batches:
        took, clean = timed(lambda batch=batch: base(batch), o["device"])
        once, each = once + took, each + timed(lambda batch=batch, clean=clean: levels(batch, clean), o["device"])[0]
    return once, each


@torch.inference_mode()
def floor_seconds(lm: SplitLM, store: Store, sae: NestedSAE, chunk: int, o: dict[str, Any]) -> float:
    """Seconds of a checkpoint's own arithmetic and nothing else, the clean distributions being there."""

    def one(batch: Batch, p: torch.Tensor) -> None:
        for x_hat in sae.decode_levels(sae.encode(batch.x)):
            residual = batch.residual.clone()
            residual[batch.kept] = x_hat.to(residual.dtype)
            hidden = lm.suffix(residual, batch.tokens)[batch.kept]
            for start in range(0, len(hidden), chunk):
                log_q = torch.log_softmax(lm.unembed(hidden[start : start + chunk]), -1, dtype=torch.float32)
                torch.linalg.vecdot(p[start : start + chunk], log_q)

    seconds = 0.0
    for batch in Sample(store, o["sequences"], o["batch"], torch.device(o["device"])).batches():
        p = clean_pass(lm, batch, chunk).p
        if batch.first == 0:
            one(batch, p)  # warm
        seconds += timed(lambda batch=batch, p=p: one(batch, p), o["device"])[0]
    return seconds


def our_seconds(folder: Path, store: Store, job_lm: SplitLM, paths: list[Path], o: dict[str, Any]) -> tuple[float, int]:
    """Seconds of a whole job, from opening checkpoints to results on disk, and its chunk of rows; the model is loaded."""
    scores = tuple(o["scores"].split(","))
    with tempfile.TemporaryDirectory(dir=folder) as out:
        config = EvaluateConfig(store.path, Path(out), scores=scores, batch_size=o["batch"], device=o["device"])
        job = Job.of(config, store)
        job.models.suffix = job_lm
        plans: list[int] = []

        def work() -> None:
            outcome = Outcome()
            todo = select(job, paths).todo[job.config.families]
            plans.append(plan(job, todo, 0).chunk)
            score_all(job, todo, (), outcome)
            assert len(outcome.results) == len(paths), outcome.failed

        return timed(work, o["device"])[0], plans[0]


@click.command(context_settings={"show_default": True})
@click.option("--d-model", default=288)
@click.option("--ff", default=1152)
@click.option("--head-dim", default=32)
@click.option("--layers", default=26)
@click.option("--layer", default=19)
@click.option("--vocab", default=0, help="0: sized so that the unembedding costs 7.6 layers.")
@click.option("--context", default=128)
@click.option("--width", default=2048)
@click.option("--levels", default=2)
@click.option("--sequences", default=32)
@click.option("--batch", default=16)
@click.option("--counts", default="1,10", help="Checkpoints a job; 50 take five times as long as 10.")
@click.option("--rounds", default=3)
@click.option("--scores", default="kl,ev,l0", help="What ours computes; the naive way computes KL alone.")
@placed("the model")
def main(**o: Any) -> None:
    """Print a table and, last, one line of JSON."""
    o["device"] = str(o["device"])
    counts = sorted({1, *map(int, o["counts"].split(","))})
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        vocab = make_model(folder / "model", o)
        store, prefix = make_store(folder, vocab, o)
        paths = make_checkpoints(folder, store, counts[-1], o)
        lm = SplitLM.load(
            str(folder / "model"), dtype=o["dtype"], device=o["device"], part="suffix", layers=[o["layer"]]
        )
        sae = load_checkpoint(paths[0])[0].to(o["device"])
        our_seconds(folder, store, lm, paths[:1], o)  # warm
        rounds = [one_round(folder, store, lm, sae, paths, counts, o) for _ in range(o["rounds"])]
    report(rounds, prefix, vocab, o)


@dataclass(frozen=True)
class Round:
    """Seconds: naive for one SAE, and with all levels together; a checkpoint's floor; ours by number of checkpoints."""

    naive: float
    together: float
    floor: float
    ours: dict[int, float]

    @property
    def marginal(self) -> float:
        """Seconds of one more checkpoint."""
        few, many = min(self.ours), max(self.ours)
        return (self.ours[many] - self.ours[few]) / (many - few) if many > few else self.ours[few]


def one_round(
    folder: Path, store: Store, lm: SplitLM, sae: NestedSAE, paths: list[Path], counts: list[int], o: dict[str, Any]
) -> Round:
    """Everything once."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        once, each = pool.submit(naive_seconds, folder, paths[0], o).result()
    ours = {n: our_seconds(folder, store, lm, paths[:n], o) for n in counts}
    floor = statistics.median(floor_seconds(lm, store, sae, chunk, o) for _, chunk in ours.values())
    return Round(o["levels"] * once + each, once + each, floor, {n: seconds for n, (seconds, _) in ours.items()})


def report(rounds: list[Round], prefix: float, vocab: int, o: dict[str, Any]) -> None:
    """The table, then the JSON line."""

    def median(of: Callable[[Round], float]) -> float:
        return statistics.median(map(of, rounds))

    counts = sorted(rounds[0].ours)
    tokens = o["sequences"] * o["context"]
    print(f"{o['layers']} layers of {o['d_model']}, vocabulary {vocab}, splice after {o['layer']}; width {o['width']}, "
          f"{o['levels']} levels; {tokens} tokens, {o['batch']} sequences a batch; {o['dtype']} on {o['device']}")  # fmt: skip
    print(f"prefix of the cache, once a store: {prefix:.2f} s; floor of a checkpoint: {median(lambda r: r.floor):.2f} s; "
          f"{len(rounds)} rounds: {', '.join(f'{r.ours[counts[-1]]:.1f} s' for r in rounds)}")  # fmt: skip
    print(f"{'checkpoints':>12} {'naive s':>9} {'ours s':>9} {'faster':>7} {'with the prefix':>16}")
    for n in counts:
        naive, ours = median(lambda r, n=n: n * r.naive), median(lambda r, n=n: r.ours[n])
        faster = median(lambda r, n=n: n * r.naive / r.ours[n])
        with_prefix = median(lambda r, n=n: n * r.naive / (r.ours[n] + prefix))
        print(f"{n:12d} {naive:9.2f} {ours:9.2f} {faster:7.2f} {with_prefix:16.2f}")
    result = {f"speedup_{n}": round(median(lambda r, n=n: n * r.naive / r.ours[n]), 2) for n in counts}
    result |= {
        f"speedup_{n}_levels_together": round(median(lambda r, n=n: n * r.together / r.ours[n]), 2) for n in counts
    }
    result |= {"marginal_s": round(median(lambda r: r.marginal), 3), "floor_s": round(median(lambda r: r.floor), 3)}
    result |= {"marginal_over_floor": round(median(lambda r: r.marginal / r.floor), 3)}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
