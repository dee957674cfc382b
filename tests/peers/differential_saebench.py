"""The same SAE, tokens and activations through sae-bench 0.6 and through us; prints a markdown table of both columns.

    python -m venv saebench && saebench/bin/pip install torch==2.13.0 sae-lens sae-bench google-crc32c
    saebench/bin/pip uninstall -y torchvision        # where it does not load beside a CPU torch; nothing here needs it
    saebench/bin/python tests/peers/differential_saebench.py

An environment of its own, because sae-bench pins numpy < 2 and old datasets. No download: a tiny random Gemma-2 stands in
for the language model behind the few methods of TransformerLens that sae-bench calls, and activations are made here.
A row is `equal` within float32 rounding, or says what differs; anything else is UNEXPLAINED and the exit code is 1.
"""

# ruff: noqa: E402 (our packages come from this checkout, after the path is set)
from __future__ import annotations

import contextlib
import copy
import io
import math
import sys
import tempfile
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

with contextlib.redirect_stdout(sys.stderr):
    import sae_bench.evals.core.main as core
    import sae_bench.evals.scr_and_tpp.dataset_creation as creation
    import sae_bench.evals.scr_and_tpp.main as theirs
    import sae_bench.evals.sparse_probing.probe_training as training
    import sae_bench.sae_bench_utils.activation_collection as collection
    import sae_bench.sae_bench_utils.dataset_utils as dataset_utils

from evaluate.probing.datasets import HUB, Table
from evaluate.probing.probes import ProbeConfig, ProbeData, ProbeStart, train_probes
from evaluate.probing.scr import scr_scores
from evaluate.probing.sparse_probing import k_sparse_scores
from evaluate.probing.tasks import Contrast, Draw, balanced, cells, scr_contrasts
from evaluate.probing.texts import pool_all, raw_decoder
from evaluate.probing.tpp import tpp_scores
from evaluate.scores.behaviour import (
    Baselines,
    Behaviour,
    behaviour_scores,
    clean_pass,
    score_residual,
    splice,
)
from evaluate.scores.firing import Firing
from evaluate.scores.reconstruction import Reconstruction, spread_in_group
from evaluate.scores.sample import GROUP_SEQUENCES, Batch, group_means, survey
from pipeline.model.split_lm import SplitLM
from pipeline.sae.nested import NestedSAE
from support import tiny_models
from support.probing_cases import bank_of, one_ablation, random_sae

SEED, CONTEXT, LAYER, D = 42, 12, 1, 12
N_VALUES = [2, 5, 10, 20]
SPECIAL = (0, 1, 2)
TOLERANCE = 2e-5
SCR_KEYS = ("male / female", "female_data_only", "professor / nurse", "nurse_data_only",
            "male_professor / female_nurse", "female_nurse_data_only")  # fmt: skip
OURS = {"second": "male / female", "first": "professor / nurse", "both": "male_professor / female_nurse"}


class Lines:
    """The table, and whether any of its rows is unexplained."""

    def __init__(self) -> None:
        self.failed = False
        print("| quantity | sae-bench 0.6.0 | ours | verdict |\n|---|---|---|---|")

    def row(
        self, name: str, their: float | None, our: float | None, why: str = "", tolerance: float = TOLERANCE
    ) -> None:
        """Print one row; `why` explains an expected difference."""
        if their is None or our is None:
            same = their is None and our is None
        else:
            same = math.isclose(their, our, rel_tol=tolerance, abs_tol=tolerance)
        self.failed |= not same and not why
        verdict = f"equal; {why}" if same and why else "equal" if same else why or "UNEXPLAINED"
        print(f"| {name} | {shown(their)} | {shown(our)} | {verdict} |")


def shown(value: float | None) -> str:
    """Seven significant digits, or missing."""
    return "missing" if value is None else f"{value:.7g}"


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """sae-bench prints as it goes."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


@contextlib.contextmanager
def without_randomness() -> Iterator[None]:
    """torch.randperm counts up, so that sae-bench draws the negatives that we name."""
    original = torch.randperm
    torch.randperm = lambda n, **_: torch.arange(n)  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.randperm = original


class TheirSAE:
    """Our SAE as sae-bench wants one: raw residuals in and out, decoder rows in raw space."""

    def __init__(self, sae: NestedSAE) -> None:
        self.sae, self.encode, self.decode = sae, sae.encode, sae.decode
        self.W_dec, self.device, self.dtype = torch.nn.Parameter(raw_decoder(sae)), torch.device("cpu"), torch.float32
        self.cfg = types.SimpleNamespace(
            hook_name="resid", hook_layer=LAYER, hook_head_index=None, d_sae=sae.config.width, d_in=sae.config.d_model
        )


# ---- core ----


class TheirModel:
    """A Hugging Face model behind the methods of TransformerLens that sae-bench's core calls."""

    def __init__(self, lm: SplitLM) -> None:
        self.model = lm.model

    def __call__(self, tokens: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            logits = self.model(tokens).logits
        log_p = logits[:, :-1].log_softmax(-1)
        return logits, -log_p.gather(-1, tokens[:, 1:, None])[..., 0]

    def run_with_hooks(self, tokens: Tensor, fwd_hooks: list[tuple[str, Callable[..., Tensor]]], **_: Any) -> Any:
        ((_, hook),) = fwd_hooks
        handle = self.model.model.layers[LAYER].register_forward_hook(lambda _m, _i, out: hook(out, hook=None))
        try:
            return self(tokens)
        finally:
            handle.remove()

    def run_with_cache(self, tokens: Tensor, **_: Any) -> tuple[None, dict[str, Tensor]]:
        kept = {}
        handle = self.model.model.layers[LAYER].register_forward_hook(lambda _m, _i, out: kept.update(resid=out))
        self(tokens)
        handle.remove()
        return None, kept


def core_rows(lines: Lines) -> None:
    """Reconstruction, sparsity and behaviour of one SAE on 64 rows of tokens, 16 a batch."""
    with tempfile.TemporaryDirectory() as folder, quiet():
        path = tiny_models.make_model(Path(folder) / "lm", "gemma2")
        lm = SplitLM.load(str(path), dtype="float32", part="whole", layers=[LAYER])
    tokens = tiny_models.tokens(64, CONTEXT, 3)
    tokens[::3, CONTEXT // 2] = 1
    sae = random_sae(1, d=lm.d_model, width=128, levels=(128,))
    sae.b_enc.data -= 2.0
    sae.W_dec.data = torch.nn.functional.normalize(sae.W_enc.data.T, dim=1)
    sae.W_enc.data /= 20.0
    sae.b_enc.data /= 20.0
    their = core_theirs(lm, tokens, TheirSAE(sae))
    our = core_ours(lm, tokens, sae)
    same = {"kl_div_with_sae": "kl_nats", "kl_div_with_ablation": "kl_zero", "kl_div_score": "kl_score",
            "ce_loss_with_sae": "ce", "ce_loss_without_sae": "ce_clean", "ce_loss_with_ablation": "ce_zero",
            "ce_loss_score": "ce_score", "l0": "l0", "l1": "l1", "cossim": "cosine", "l2_ratio": "l2_ratio",
            "explained_variance_legacy": "ev_legacy", "explained_variance": "ev_saebench"}  # fmt: skip
    for name, ours in same.items():
        why = (
            "a random model predicts no worse ablated: CE_zero ≤ CE_clean, where ours is undefined"
            if our[ours] is None
            else ""
        )
        lines.row(f"core {name} / {ours}", their[name], our[ours], why)
    lines.row("core mse · kept tokens a batch / mse", their["mse"] * our["kept_a_batch"], our["mse"], "sae-bench divides by a "
              "batch's token count once more; batches differ a little in it", 1e-2)  # fmt: skip
    name = "relative_reconstruction_bias"
    lines.row(f"core {name}", their[name], our[name], "theirs is a mean of batch ratios, ours a ratio of sums")
    lines.row("core explained_variance / ev", their["explained_variance"], our["ev"], "theirs squares after averaging over "
              "dimensions: not centred; ours is 1 − E‖x−x̂‖²/E‖x−Ex‖²")  # fmt: skip


def core_theirs(lm: SplitLM, tokens: Tensor, sae: TheirSAE) -> dict[str, float]:
    """sae-bench's core functions over the batches."""
    model = TheirModel(lm)
    found: dict[str, float] = {}
    for what in ("behaviour", "statistics"):
        batches = iter(tokens.split(16))
        store = types.SimpleNamespace(get_batch_tokens=lambda _n, it=batches: next(it))
        with quiet(), torch.no_grad():
            if what == "behaviour":
                found |= core.get_downstream_reconstruction_metrics(
                    sae, model, store, True, True, 4, 16, set(SPECIAL), exclude_special_tokens_from_reconstruction=True
                )
            else:
                found |= core.get_sparsity_and_variance_metrics(
                    sae, model, store, 4, True, True, True, True, 16, {}, set(SPECIAL)
                )[0]
    return found


def core_ours(lm: SplitLM, tokens: Tensor, sae: NestedSAE) -> dict[str, Any]:
    """Our scores from the residuals of the same batches, through the layers after the splice only."""
    batches = [make_batch(lm, tokens, first) for first in range(0, len(tokens), 16)]
    found = survey(batches, len(batches), lm.d_model, torch.device("cpu"))
    reconstruction, behaviour = Reconstruction(found), Behaviour("cpu")
    firing = Firing(sae.config.levels, torch.device("cpu"))
    baselines = Baselines.empty(lm, torch.zeros(lm.d_model), CONTEXT, 64)
    for batch in batches:
        clean = clean_pass(lm, batch, 64)
        baselines.update(batch, clean)
        z = sae.encode(batch.x)
        firing.update(z, batch)
        x_hat = sae.decode(z)
        group = batch.first // GROUP_SEQUENCES
        reconstruction.update(batch, x_hat, spread_in_group(batch, group_means([batch], group, group)))
        behaviour.update(batch, score_residual(lm, batch, clean, splice(batch, x_hat), 64))
    numbers = baselines.numbers(0)
    kept = sum(len(batch.x) for batch in batches) / len(batches)
    return {**numbers, **reconstruction.scores()[0], **behaviour_scores(behaviour, numbers, 0), **firing.scores(0)[0],
            "kept_a_batch": kept}  # fmt: skip


def make_batch(lm: SplitLM, tokens: Tensor, first: int) -> Batch:
    """Sixteen sequences as evaluation reads them from a store."""
    own = tokens[first : first + 16]
    residual = lm.prefix(own)[LAYER]
    kept = ~torch.isin(own, torch.tensor(SPECIAL))
    targets = torch.cat([own[:, 1:], torch.full_like(own[:, :1], -1)], 1)[kept]
    weights = torch.ones(2, int(kept.sum()), dtype=torch.float64)
    group = torch.full((weights.shape[1],), first // 16)
    return Batch(first, residual, own, kept, residual[kept], weights, targets, group, kept.flatten().nonzero()[:, 0])


# ---- rows of the data sets ----


def selection_rows(lines: Lines) -> None:
    """SCR lists and class rows of both Hub sets, from tables of the same shape."""
    for source, spec in HUB.items():
        rng = np.random.default_rng(0)
        values = sorted({v for pair in spec.first_pairs for v in pair} | set(spec.classes))
        columns = {
            spec.columns.text: [f"text {i}" for i in range(6000)],
            spec.columns.first: rng.choice(values, 6000).tolist(),
            spec.columns.second: rng.choice(spec.second_pair, 6000).tolist(),
        }
        table, frame = Table(*(tuple(column) for column in columns.values())), pd.DataFrame(columns)
        pair = spec.first_pairs[0]
        by_name = {v: k for k, v in theirs.dataset_info.dataset_metadata[source]["column1_mapping"].items()}
        seconds = {v: k for k, v in theirs.dataset_info.dataset_metadata[source]["column2_mapping"].items()}
        lists = creation.get_spurious_corr_data(
            frame, tuple(by_name[v] for v in pair), tuple(seconds[v] for v in spec.second_pair), source, 60, SEED
        )
        found = scr_contrasts(cells(table, pair, spec.second_pair), 60, SEED, False, source)
        ours = [part for name in OURS for part in (found[name].positive, found[name].negative)]
        same = [[table.text[i] for i in rows] == lists[key] for rows, key in zip(ours, SCR_KEYS)]
        lines.row(f"SCR lists of {source} that agree, of 6", 6, sum(same))
        with quiet():
            classes = dataset_utils.get_balanced_dataset(frame, source, 50, SEED)
        strata = {
            str(c): [
                np.array([i for i in range(6000) if table.first[i] == c and table.second[i] == v])
                for v in sorted(spec.second_pair)
            ]
            for c in spec.classes
        }
        rows = balanced(strata, 100, SEED, source)
        same = [[table.text[i] for i in rows[str(c)]] == classes[str(c)] for c in spec.classes]
        lines.row(f"class lists of {source} that agree, of {len(same)}", len(same), sum(same))


# ---- SCR, TPP, sparse probing ----


def made_activations(n: int, seed: int, shifts: dict[str, Tensor], length: int = 10) -> dict[str, Tensor]:
    """[text pos d_model] for each key: noise and the key's shift, the first and last positions zero (padding)."""
    rng = torch.Generator().manual_seed(seed)
    found = {}
    for key, shift in shifts.items():
        x = torch.randn(n, length, D, generator=rng) + shift
        n_real = torch.randint(3, length, (n,), generator=rng)
        position = torch.arange(length)
        x[(position == 0) | (position > n_real[:, None])] = 0
        found[key] = x
    return found


def scr_case(seed: int, n_train: int = 80, n_test: int = 60) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Six dictionaries of activations; the attributes lie along two axes, the spurious one ("second") is stronger."""
    a, b = 0.8 * torch.eye(D)[0], 1.2 * torch.eye(D)[1]
    return tuple(  # type: ignore[return-value]
        made_activations(n, seed + 100 * split, dict(zip(SCR_KEYS, (
            mixed(n, b + a, b - a), mixed(n, a - b, -a - b), mixed(n, a + b, a - b), mixed(n, b - a, -a - b),
            mixed(n, a + b, a + b), mixed(n, -a - b, -a - b),
        ))))
        for split, n in enumerate((n_train, n_test))
    )  # fmt: skip


def mixed(n: int, one: Tensor, other: Tensor) -> Tensor:
    """Shifts of n texts, every second one the other: [text 1 d_model]."""
    return torch.stack([one, other]).repeat(n // 2, 1)[:, None]


def as_draw(
    train: dict[str, Tensor], test: dict[str, Tensor], pairs: dict[str, tuple[str, list[str]]]
) -> tuple[Any, Draw]:
    """One bank of all texts and the contrasts that sae-bench's lists mean; negatives in order where several keys give them."""
    texts, place = [], {}
    for split, acts in (("train", train), ("test", test)):
        for key, x in acts.items():
            place[split, key] = sum(map(len, texts)) + np.arange(len(x))
            texts.append(x)
    padded = torch.cat(texts)
    draw = {}
    for name, (positive, negatives) in pairs.items():
        contrasts = []
        for split in ("train", "test"):
            n = len(place[split, positive])
            each = -(-n // len(negatives))
            pool = np.concatenate([place[split, key][:each] for key in negatives])[:n]
            contrasts.append(Contrast(place[split, positive], pool))
        draw[name] = (contrasts[0], contrasts[1])
    return bank_of(padded, (padded != 0).any(-1).sum(1)), draw


def train_theirs(train: dict[str, Tensor], test: dict[str, Tensor], scr: bool) -> dict[str, Any]:
    """sae-bench's probes on pooled activations, from its own seed."""
    torch.manual_seed(SEED)
    pooled = [collection.create_meaned_model_activations(acts) for acts in (train, test)]
    with quiet(), torch.enable_grad():
        return training.train_probe_on_activations(
            *pooled, use_sklearn=False, batch_size=16, epochs=20, lr=1e-3, perform_scr=scr, early_stopping_patience=20,
            l1_penalty=1e-3,
        )[0]  # fmt: skip


def replayed(n_keys: int, n_train: int, n_test: int, epochs: int) -> tuple[list[list[Tensor]], ProbeStart]:
    """What sae-bench draws for SCR probes after its seed: for each key the permutations of rows, and start and orders."""
    torch.manual_seed(SEED)
    shuffles, weights, biases, orders = [], [], [], []
    for _ in range(n_keys):
        shuffles.append([torch.randperm(n) for n in (n_train, 2 * n_train, n_test, 2 * n_test)])
        linear = torch.nn.Linear(D, 1)
        weights.append(linear.weight.detach()[0])
        biases.append(linear.bias.detach()[0])
        orders.append(torch.stack([torch.randperm(2 * n_train) for _ in range(epochs)]))
    return shuffles, ProbeStart(torch.stack(weights), torch.stack(biases), torch.stack(orders, 1))


def probe_rows(lines: Lines) -> None:
    """All six SCR probes, trained from the same start in the same order, theirs one by one and ours in one stack."""
    train, test = scr_case(0)
    probes = train_theirs(train, test, scr=True)
    partner = {a: b for i in range(0, 6, 2) for a, b in (SCR_KEYS[i : i + 2], SCR_KEYS[i : i + 2][::-1])}
    bank, draw = as_draw(train, test, {key: (key, [partner[key]]) for key in SCR_KEYS})
    shuffles, start = replayed(6, 80, 60, 20)
    stacked: list[list[Tensor]] = [[], [], [], []]
    for key, (neg_train, all_train, neg_test, all_test) in zip(SCR_KEYS, shuffles):
        for split, (negative, shuffle) in enumerate(((neg_train, all_train), (neg_test, all_test))):
            contrast = draw[key][split]
            rows = torch.from_numpy(np.concatenate([contrast.positive, contrast.negative[negative.numpy()]]))[shuffle]
            stacked[2 * split].append(rows)
            stacked[2 * split + 1].append(torch.from_numpy(contrast.labels)[shuffle])
    ours = train_probes(bank.mean, ProbeData(*(torch.stack(part) for part in stacked)), start, ProbeConfig())
    for i, key in enumerate(SCR_KEYS):
        weight = probes[key].net.weight.detach()[0]
        lines.row(f"probe {key!r}: ‖w‖", float(weight.norm()), float(ours.weight[i].norm()))
    worst = max(float((probes[k].net.weight.detach()[0] - ours.weight[i]).abs().max()) for i, k in enumerate(SCR_KEYS))
    lines.row("probes: largest difference of a weight", 0.0, worst)


def given(probes: dict[str, Any], names: dict[str, str]) -> dict[str, tuple[Tensor, Tensor]]:
    """sae-bench's probes as ours take them."""
    nets = {name: probes[key].net for name, key in names.items()}
    return {name: (net.weight.detach()[0], net.bias.detach()[0]) for name, net in nets.items()}


def scr_rows(
    lines: Lines, kind: str, seed: int, probes: dict[str, Any], sae: NestedSAE, *, equal: bool = False
) -> None:
    """Effects, both directions and the reported score with sae-bench's probes; `equal` makes both directions alike."""
    train, test = scr_case(seed)
    probes = copy.deepcopy(probes)
    if equal:
        probes[OURS["both"]].net.weight.data.zero_()
    chosen, their_sae = list(OURS.values()), TheirSAE(sae)
    with quiet(), torch.no_grad():
        effects = theirs.get_all_node_effects_for_one_sae(their_sae, probes, chosen, True, train, 16)
        pooled = collection.create_meaned_model_activations(test)
        clean = theirs.get_probe_test_accuracy(probes, chosen, pooled, 16, True)
        after = theirs.perform_feature_ablations(probes, their_sae, 16, test, effects, N_VALUES, chosen, 16, True)
        their = theirs.get_scr_plotting_dict(after, clean)
    pairs = {name: (key, [theirs.dataset_info.PAIRED_CLASS_KEYS[key]]) for name, key in OURS.items()}
    bank, draw = as_draw(train, test, pairs)
    ablation = one_ablation(sae, bank, draw, given(probes, OURS))
    for name, key in OURS.items() if not equal else ():
        gap = float((effects[key] - ablation.effects(name, signed=False)).abs().max() / effects[key].max())
        lines.row(f"SCR {kind}: effects of {key!r}, largest difference / largest", 0.0, gap)
    ours = scr_scores([ablation], {0: sae.config.width}, N_VALUES)
    for n in N_VALUES:
        for metric, key in (
            ("scr_dir1", "scr_dir1_threshold"),
            ("scr_dir2", "scr_dir2_threshold"),
            ("scr", "scr_metric_threshold"),
        ):
            lines.row(f"SCR {kind}: {key}_{n}", their.get(f"{key}_{n}"), ours[metric, 0, n][0])


def class_case(seed: int) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, tuple[str, list[str]]]]:
    """Five classes along five axes, and what each is told apart from."""
    shifts = {str(c): 0.6 * torch.eye(D)[c] for c in range(5)}
    pairs = {c: (c, [other for other in shifts if other != c]) for c in shifts}
    return made_activations(80, seed, shifts), made_activations(60, seed + 100, shifts), pairs


def tpp_rows(lines: Lines, width: int) -> None:
    """TPP with sae-bench's probes and its negatives fixed; once more with its own draws, to show their noise."""
    train, test, pairs = class_case(3)
    sae, names = random_sae(3, width=width, levels=(width,)), list(pairs)
    probes = train_theirs(train, test, scr=False)
    runs = []
    for fixed in (True, False):
        torch.manual_seed(SEED)
        with quiet(), torch.no_grad(), without_randomness() if fixed else contextlib.nullcontext():
            effects = theirs.get_all_node_effects_for_one_sae(TheirSAE(sae), probes, names, False, train, 16)
            pooled = collection.create_meaned_model_activations(test)
            clean = theirs.get_probe_test_accuracy(probes, names, pooled, 16, False)
            after = theirs.perform_feature_ablations(
                probes, TheirSAE(sae), 16, test, effects, N_VALUES, names, 16, False
            )
            runs.append(theirs.create_tpp_plotting_dict(after, clean)[0])
    bank, draw = as_draw(train, test, pairs)
    ours = tpp_scores([one_ablation(sae, bank, draw, given(probes, {n: n for n in names}))], {0: width}, N_VALUES)
    columns = {"tpp": "total_metric", "tpp_intended": "intended_diff_only", "tpp_unintended": "unintended_diff_only"}
    positive = min(int((effect > 0).sum()) for effect in effects.values())
    for n in N_VALUES:
        tied = f"only {positive} latents have a positive effect; which of those tied at 0 follow is torch.topk's choice"
        for metric, key in columns.items():
            their = runs[0][f"tpp_threshold_{n}_{key}"]
            name = f"TPP, {width} latents: tpp_threshold_{n}_{key}, fixed negatives"
            lines.row(name, their, ours[metric, 0, n][0], tied if n > positive else "")
        their = runs[1][f"tpp_threshold_{n}_total_metric"]
        why = "theirs draws test negatives anew at every call; ours once a seed"
        lines.row(f"TPP, {width} latents: tpp_threshold_{n}_total_metric", their, ours["tpp", 0, n][0], why)


def sparse_rows(lines: Lines) -> None:
    """k-sparse probing, with sae-bench's negatives fixed."""
    train, test, pairs = class_case(4)
    sae = random_sae(4)
    bank, draw = as_draw(train, test, pairs)
    ours = k_sparse_scores([draw], pool_all([sae], bank)[0], {0: 40}, (1, 2, 5), float(sae.scale))
    with quiet(), torch.no_grad(), without_randomness():
        pooled = [collection.get_sae_meaned_activations(acts, TheirSAE(sae), 16) for acts in (train, test)]
        for k in (1, 2, 5):
            their = float(np.mean([sparse_theirs(*pooled, name, k) for name in pairs]))
            with contextlib.redirect_stdout(sys.__stdout__):
                lines.row(f"sparse probing sae_top_{k}_test_accuracy", their, ours["k_sparse_probe", 0, k][0])


def sparse_theirs(train: dict[str, Tensor], test: dict[str, Tensor], name: str, k: int) -> float:
    """The steps of sae-bench's train_probe_on_activations, whose own shape check refuses them when run as a whole."""
    (x, y), (x_test, y_test) = (training.prepare_probe_data(acts, name) for acts in (train, test))
    mask = training.get_top_k_mean_diff_mask(x, y, k)
    parts = [training.apply_topk_mask_reduce_dim(part, mask) for part in (x, x_test)]
    return training.train_sklearn_probe(parts[0], y, parts[1], y_test)[1]


def main() -> None:
    """Print the table; exit 1 when a row differs without an explanation."""
    torch.set_num_threads(1)  # everything is small
    lines = Lines()
    core_rows(lines)
    selection_rows(lines)
    probe_rows(lines)
    probes = train_theirs(*scr_case(1), scr=True)
    for kind in ({}, {"layernorm": "pre"}, {"activation": "topk", "k": 6}):
        scr_rows(lines, "+".join(map(str, kind.values())) or "relu", 1, probes, random_sae(2, **kind))
    scr_rows(lines, "equal directions", 1, probes, random_sae(2), equal=True)
    tpp_rows(lines, 160)
    tpp_rows(lines, 40)
    sparse_rows(lines)
    sys.exit(1 if lines.failed else 0)


if __name__ == "__main__":
    main()
