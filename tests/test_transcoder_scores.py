"""Transcoders evaluated: harvested in one pass, trained, spliced in place of the MLP, against plain hooks on the whole model."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import harvest.run
from evaluate.config import EvaluateConfig
from evaluate.explain.__main__ import cli as explain
from evaluate.latents.neuronpedia import command as neuronpedia
from evaluate.probing.first_letter import draw_words, first_letters, prompt_rows
from evaluate.probing.job import ProbingConfig, prepare, read_texts
from evaluate.probing.probes import ProbeConfig
from evaluate.probing.sparse_probing import fitted_accuracy
from evaluate.probing.texts import clipped, real_positions, text_model
from evaluate.report.runs import read_results
from evaluate.run import Outcome
from evaluate.run import run as evaluate
from evaluate.scores.absorption import AbsorptionScore
from evaluate.scores.labels import LABELS, Labelled, Probes
from pipeline.base.errors import CheckpointError, MismatchError
from pipeline.model.points import Point
from pipeline.model.split_lm import SplitLM, load_tokenizer
from pipeline.sae.checkpoint import load_checkpoint
from pipeline.sae.config import SAEConfig
from pipeline.sae.nested import NestedSAE
from pipeline.store.reader import Store
from support import tiny_models
from support.harvests import harvest_config
from support.reference import (
    reference_behaviour,
    reference_reconstruction,
    reference_scr,
    reference_sparse_coding,
    reference_tpp,
)
from support.train_crasher import small
from train.plan import RunConfig
from train.run import run as train

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def made(lm_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with stores of mlp_in and mlp_out of one pass, transcoders between them in `runs`, an SAE in `sae`."""
    folder = tmp_path_factory.mktemp("made")
    corpus = tiny_models.make_corpus(folder / "corpus.jsonl")
    config = harvest_config(
        lm_folder("gemma2"), corpus, folder / "stores", hooks=("mlp_in", "mlp_out"), dtype="float32"
    )
    harvest.run.run(config, quiet=True)
    read, target = folder / "stores/layer_1.mlp_in.zarr", folder / "stores/layer_1.mlp_out.zarr"
    members = (small("batchtopk", skip=True, steps=60), small("paper", alpha=0.25, steps=60))
    train(RunConfig(read, folder / "runs", members, device="cpu", threads=1, target=target))
    train(RunConfig(target, folder / "sae", members[1:], device="cpu", threads=1))
    return folder


def scored(made: Path, out: Path, places: str = "runs", target: bool = True, **options: Any) -> Outcome:
    """An evaluation on the CPU."""
    stores = made / "stores"
    path = stores / "layer_1.mlp_out.zarr" if target else None
    config = EvaluateConfig(stores / "layer_1.mlp_in.zarr", out, device="cpu", target=path, **options)
    return evaluate(config, [made / places])


@pytest.fixture(scope="module")
def results(made: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Results of both transcoders, all scores and pages of latents."""
    out = tmp_path_factory.mktemp("results")
    scores = ("kl", "ev", "l0", "coding", "features", "structure", "absorption")
    outcome = scored(made, out, scores=scores, latents="all")
    assert not outcome.failed
    return [json.loads(Path(entry["path"]).read_text()) | {"at": entry["path"]} for entry in outcome.results]


def logits(model: Any, tokens: Tensor, change: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Logits of the whole model with what its layer 1 adds for the MLP changed: a function of that and of what the MLP read."""
    layer, seen = model.model.layers[1], list[Tensor]()
    handles = [
        layer.mlp.register_forward_pre_hook(lambda _m, args: seen.append(args[0])),
        layer.post_feedforward_layernorm.register_forward_hook(lambda _m, _a, out: change(seen[-1], out)),
    ]
    with torch.no_grad():
        found: Tensor = model(tokens, use_cache=False).logits
    for handle in handles:
        handle.remove()
    return found


def scope_transcoder(release: Path) -> tuple[Path, dict[str, Tensor]]:
    """A folder of a Gemma Scope transcoder of layer 1, and its tensors."""
    folder = release / "layer_1" / "width_16k" / "average_l0_76"
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    d, f = 64, 96
    shapes = {"W_enc": (d, f), "W_dec": (f, d), "b_enc": (f,), "b_dec": (d,)}
    w = {name: 0.2 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    w["threshold"] = torch.linspace(0, 1, f)
    np.savez(folder / "params.npz", **{name: t.numpy() for name, t in w.items()})
    return folder, w


def test_scope_transcoders_are_scored(made: Path, tmp_path: Path, lm_folder: Callable[[str], Path]) -> None:
    """A Gemma Scope transcoder, which reads the norm before its gain, is scored on stores of mlp_in and mlp_out: L0 and KL are
    those of plain hooks before and behind the norms; the results say what was folded."""
    folder, w = scope_transcoder(tmp_path / "gemma-scope-2b-pt-transcoders")
    stores = made / "stores"
    target = stores / "layer_1.mlp_out.zarr"
    options: dict[str, Any] = {"device": "cpu", "target": target, "allow_other_model": True, "scores": ("kl", "l0")}
    outcome = evaluate(EvaluateConfig(stores / "layer_1.mlp_in.zarr", tmp_path / "out", **options), [folder])
    assert not outcome.failed
    result = json.loads(Path(outcome.results[0]["path"]).read_text())
    assert result["checkpoint"]["provenance"]["store"]["gain"] == "of the norm, ln2.hook_normalized, folded in"

    whole = tiny_models.whole_model(lm_folder("gemma2"), torch.float32)
    store = Store.open(target)
    tokens, kept = torch.from_numpy(store.eval.tokens.astype("int64")), ~torch.from_numpy(store.eval.special)
    layer, seen, fired = whole.model.layers[1], list[Tensor](), list[Tensor]()

    def change(_module: Any, _args: Any, out: Tensor) -> Tensor:
        x = seen[-1].double()
        a = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() @ w["W_enc"].double() + w["b_enc"]
        z = a.relu() * (a > w["threshold"])
        fired.append((z > 0).sum(-1)[kept].double().mean())
        return torch.where(kept[..., None], (z @ w["W_dec"].double() + w["b_dec"]).float(), out)

    with torch.no_grad():
        clean = whole(tokens, use_cache=False).logits
        layer.pre_feedforward_layernorm.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
        layer.post_feedforward_layernorm.register_forward_hook(change)
        spliced = whole(tokens, use_cache=False).logits
    scores = result["levels"][0]["scores"]
    assert scores["l0"] == pytest.approx(float(fired[0]), rel=1e-3)
    assert scores["kl_nats"] == pytest.approx(reference_behaviour(clean, spliced, tokens, kept)["kl"], rel=1e-3)


def test_scope_transcoders_are_shown(made: Path, tmp_path: Path, lm_folder: Callable[[str], Path]) -> None:
    """Neuronpedia's export and explanations of one read its latents of a store of mlp_in, before the gain; a store of another
    point is refused in a line."""
    folder, w = scope_transcoder(tmp_path / "gemma-scope-tiny-transcoders")
    store = made / "stores" / "layer_1.mlp_in.zarr"
    words = [str(folder), "--store", str(store), "--out", str(tmp_path / "np"), "--rows", "100000"]
    neuronpedia.main(words, standalone_mode=False)
    [path] = (tmp_path / "np").glob("*/*/features/*.gz")
    found = [json.loads(line)["frac_nonzero"] for line in gzip.decompress(path.read_bytes()).splitlines()]
    rows, gain = Store.open(store).eval, tiny_models.whole_model(lm_folder("gemma2"), torch.float32).model.layers[1]
    x = rows.read(0, rows.n_rows).double() / (1 + gain.pre_feedforward_layernorm.weight.detach().double())
    a = (x @ w["W_enc"].double() + w["b_enc"])[torch.from_numpy(rows.kept())]
    fired = (a.relu() > w["threshold"]).sum(0) / rows.n_rows
    torch.testing.assert_close(torch.tensor(found).double(), fired.double(), rtol=0, atol=2e-3)
    explain.main([*words[:3], "--sample", "8", "--out", str(tmp_path / "labels.json")], standalone_mode=False)
    assert json.loads((tmp_path / "labels.json").read_text())["latents"]
    words[2] = str(made / "stores" / "layer_1.mlp_out.zarr")
    for command, out in ((neuronpedia, "np"), (explain, "labels.json")):
        with pytest.raises(CheckpointError, match=r"trained on hook 'ln2\.hook_normalized', store .* has 'mlp_out'"):
            command.main([*words[:4], str(tmp_path / out)], standalone_mode=False)


def test_scores_are_of_plain_hooks(made: Path, results: list[dict[str, Any]], lm_folder: Callable[[str], Path]) -> None:
    """KL, CE and top-1 of every level are those of the model whose MLP is replaced by plain hooks; EV, L0 and sparse coding
    those of the rows that the target holds."""
    whole = tiny_models.whole_model(lm_folder("gemma2"), torch.float32)
    read, target = (Store.open(made / f"stores/layer_1.{hook}.zarr") for hook in ("mlp_in", "mlp_out"))
    tokens = torch.from_numpy(target.eval.tokens.astype("int64"))
    kept = ~torch.from_numpy(target.eval.special)
    x, y = (store.eval.read(0, store.eval.n_rows)[kept.flatten()].float() for store in (read, target))
    untouched = logits(whole, tokens, lambda _read, out: out)
    for result in results:
        sae = load_checkpoint(Path(result["checkpoint"]["path"]))[0].requires_grad_(False)
        z = sae.encode(x)
        for level in result["levels"]:
            replaced = logits(whole, tokens, splicing(sae, level["level"], kept))
            behaviour = reference_behaviour(untouched, replaced, tokens, kept)
            y_hat, m = sae.decode_level(z, level["level"], x), level["n_latents"]
            groups = (torch.arange(len(tokens)) // 16)[:, None].expand_as(kept)[kept]
            rebuilt = reference_reconstruction(y, y_hat, groups)
            found = level["scores"]
            assert found["kl_nats"] == pytest.approx(behaviour["kl"], rel=1e-4, abs=2e-6)
            assert found["ce"] == pytest.approx(behaviour["ce"], rel=1e-5)
            assert found["top1"] == pytest.approx(behaviour["top1"], abs=1e-6)
            for name in ("ev", "ev_saebench", "mse", "cosine", "l2_ratio"):
                assert found[name] == pytest.approx(rebuilt[name], rel=1e-4, abs=1e-5), name
            assert found["l0"] == pytest.approx(float((z[:, :m] != 0).sum(1).double().mean()))
        inside = (y - sae.target_center) * sae.target_scale
        rest = inside - (sae.normalize(x) @ sae.W_skip if sae.config.skip else 0.0)
        left = (1 - reference_sparse_coding(rest, z, sae.W_dec, sae.b_dec, 5)) * spread(rest)
        coded = {row["n"]: row["value"] for row in result["series"]["sparse_coding_ev"] if row["level"] == 1}
        assert coded[5] == pytest.approx(1 - left / spread(inside), abs=1e-5)


def spread(rows: Tensor) -> float:
    """Σ‖row − mean‖²."""
    return float((rows.double() - rows.double().mean(0)).square().sum())


def splicing(sae: NestedSAE, level: int, kept: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """What replaces the kept rows of the MLP's contribution."""
    return lambda given, out: torch.where(kept[..., None], sae.decode_level(sae.encode(given), level, given), out)


def test_results_name_both_stores(made: Path, results: list[dict[str, Any]]) -> None:
    """Results say where rows are read and where they are made; encoder and decoder are of different points, so their cosine
    is left out."""
    for result in results:
        assert (result["store"]["hook"], result["store"]["source"]["hook"]) == ("mlp_out", "mlp_in")
        assert result["store"]["source"]["id"] == Store.load(made / "stores/layer_1.mlp_in.zarr").id
        assert result["features"]["geometry"]["encoder_decoder"] == {}
        assert result["features"]["geometry"]["nearest"]
        assert result["structure"]["meta"]


def test_report_tells_it_from_an_sae(made: Path, results: list[dict[str, Any]], tmp_path: Path) -> None:
    """An SAE of the same settings on the rows that a transcoder makes is another group of a report, not the same run twice."""
    config = EvaluateConfig(made / "stores/layer_1.mlp_out.zarr", tmp_path, device="cpu", scores=("ev", "l0"))
    assert not evaluate(config, [made / "sae"]).failed
    found = read_results([tmp_path, Path(results[1]["at"])])
    assert len(found.groups) == 2
    assert {group.label for group in found.groups} == {"reads mlp_in", "reads mlp_out"}


def test_latent_pages_read_the_source(results: list[dict[str, Any]], made: Path) -> None:
    """Pages of a transcoder's latents count what it encodes of the rows that it reads."""
    result = results[1]
    index = Path(result["at"]).with_suffix(".latents") / "index.js"
    data = json.loads(
        index.read_text().removeprefix("nestedLatents.index(").rstrip().removesuffix(");").removesuffix(")")
    )
    store = Store.open(made / "stores/layer_1.mlp_in.zarr")
    kept = torch.from_numpy(store.eval.kept())
    sae = load_checkpoint(Path(result["checkpoint"]["path"]))[0]
    z = sae.encode(store.eval.read(0, store.eval.n_rows)[kept].float())
    assert data["density"] == pytest.approx((z > 0).double().mean(0).tolist(), abs=1e-3)


@pytest.mark.parametrize(
    ("places", "target", "what"),
    [
        ("runs", False, "is a transcoder; give the store of the rows that it reads"),
        ("sae", True, "is an SAE, which makes"),
    ],
)
def test_wrong_kind_is_refused(made: Path, tmp_path: Path, places: str, target: bool, what: str) -> None:
    """A transcoder without --target, and an SAE with one, are failures of their own, in a line each."""
    outcome = scored(made, tmp_path, places, target, scores=("ev",))
    assert not outcome.results
    assert all(what in str(error) for _, error in outcome.failed)
    assert outcome.failed


def test_other_target_is_refused(made: Path, tmp_path: Path, tiny_store: Path) -> None:
    """A target of other rows, and stores the wrong way round, are refused."""
    read, target = (made / f"stores/layer_1.{hook}.zarr" for hook in ("mlp_in", "mlp_out"))
    with pytest.raises(MismatchError, match="its rows are not those of"):
        evaluate(EvaluateConfig(read, tmp_path, device="cpu", target=tiny_store, scores=("ev",)), [made / "runs"])
    swapped = evaluate(EvaluateConfig(target, tmp_path, device="cpu", target=read, scores=("ev",)), [made / "runs"])
    assert all("trained on hook 'mlp_in'" in str(error) for _, error in swapped.failed)
    assert swapped.failed


def texts_folder(folder: Path) -> Path:
    """Texts of two attributes that their words give away, of different lengths."""
    words = {"austen": "residual stream", "other": "small model", "female": "best times", "male": "worst line"}
    folder.mkdir()
    for split, n in (("train", 40), ("test", 24)):
        pairs = [(a, b) for a in ("austen", "other") for b in ("female", "male")]
        lines = [
            {"text": f"{words[a]} {words[b]} " * (1 + i % 3) + f"line {i}", "author": a, "gender": b}
            for a, b in pairs
            for i in range(2 * n)
        ]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


PROBING = {"n_values": (2, 5), "k_values": (1, 3), "seeds": (42,), "train_size": 60, "test_size": 40, "context": 24}
READ, MADE = Point(1, "mlp_in"), Point(1, "mlp_out")


def test_text_scores_are_of_hooks(
    made: Path, results: list[dict[str, Any]], lm_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    """SCR and TPP take latents away from what the MLP adds, which the probes look at; sparse probes read latents of what the
    MLP reads: all of the whole model's rows, by plain hooks, one text at a time, in float64."""
    folder = lm_folder("gemma2")
    config = ProbingConfig((str(texts_folder(tmp_path / "texts")),), probe=ProbeConfig(epochs=3, lr=0.02), **PROBING)
    lm = SplitLM.load(str(folder), dtype="float32", part="prefix", layers=[MADE, READ])
    tokenizer = load_tokenizer(str(folder))
    model = text_model(lm, tokenizer, MADE, 2, reads=READ)
    (texts,) = read_texts(config)
    job = prepare(config, [texts], model)
    whole, padded, n_real = tiny_models.whole_model(folder, torch.float32), torch.zeros(2, len(texts.texts), 24, 64), []
    for i, text in enumerate(texts.texts):
        ids = clipped(tokenizer(text, add_special_tokens=False)["input_ids"], 2, 24)
        seen: list[Tensor] = []
        logits(whole, torch.tensor([ids]), lambda given, out, seen=seen: seen.extend((given, out)) or out)  # type: ignore[misc]
        kept = torch.from_numpy(real_positions(ids, model.special))
        for k in range(2):
            padded[k, i, : len(ids)][kept] = seen[k][0][kept]
        n_real.append(int(kept.sum()))
    x, y, real = padded[0], padded[1], torch.tensor(n_real)
    group, n_compared = job.groups[0], 0
    torch.testing.assert_close(group.bank.probed, y.sum(1) / real[:, None], rtol=1e-4, atol=1e-5)
    for result in results:
        sae = load_checkpoint(Path(result["checkpoint"]["path"]))[0].requires_grad_(False)
        scores = job.score(sae, [1])
        for task in group.tasks:
            draw, found = task.draws[0], {name: rows for name, rows in scores.tasks[task.name].items()}
            for reference, name in ((reference_scr, "scr"), (reference_tpp, "tpp")):
                for row in found.get(name, []):
                    probes = group.probed[task.name][0].probes
                    wanted = reference(sae, x, real, draw, probes, sae.config.width, row["n"], y)
                    assert row["value"] == pytest.approx(wanted[name], abs=1e-9), (task.name, name)
                    n_compared += 1
            for row in found.get("k_sparse_probe", []):
                (train, test) = next(iter(draw.values()))
                z = sae.encode(x) * (x.abs().sum(-1, keepdim=True) > 0)
                pooled = z.sum(1) / real[:, None] / sae.target_scale
                apart = (pooled[train.positive].mean(0) - pooled[train.negative].mean(0)).abs()
                best = apart.topk(row["n"]).indices
                assert row["value"] == pytest.approx(fitted_accuracy(pooled[:, best], train, test), abs=0.03)
                n_compared += 1
    assert n_compared == 2 * (2 + 2 + 2 * 2)  # transcoders; n of SCR, n of TPP, k of two attributes


def test_all_text_scores_are_given(made: Path, tmp_path: Path) -> None:
    """An evaluation of transcoders gives SCR, TPP and sparse probing like one of SAEs, and says why it has no first letters."""
    probing = ProbingConfig((str(texts_folder(tmp_path / "texts")),), probe=ProbeConfig(epochs=2, lr=0.02), **PROBING)
    outcome = scored(made, tmp_path / "out", scores=("ev", "first_letter"), probing=probing)
    assert not outcome.failed
    for entry in outcome.results:
        data = json.loads(Path(entry["path"]).read_text())
        assert {"scr", "tpp", "k_sparse_probe"} <= data["series"].keys()
        assert data["first_letter"]["why"].startswith("First letters were not scored")
        assert all(
            "accuracy_residual" in task
            for task in data["sample"]["probing"].values()
            if "k_sparse_probe" in task["scores"]
        )


def test_words_are_read_and_made(lm_folder: Callable[[str], Path], tmp_path: Path) -> None:
    """First letters of a transcoder: probes look at words' rows at the point that it makes, it encodes those at the point that
    it reads, of one pass; both as at that point alone."""
    words, tokenizer = (
        draw_words([" times", " stream", " best", "line", " qua", " worst"], 0),
        tiny_models.build_tokenizer(),
    )
    folder = str(tiny_models.make_model(tmp_path / "model", "gemma2", max_position_embeddings=512))

    def rows_at(*points: Point) -> Any:
        lm = SplitLM.load(folder, dtype="float32", part="prefix", layers=list(points))
        model = text_model(lm, tokenizer, points[0], 2, reads=points[1] if len(points) > 1 else None)
        return model, prompt_rows(words, 0, model, 4)

    model, (read, rebuilt) = rows_at(MADE, READ)
    assert torch.equal(read, rows_at(READ)[1][0])
    assert torch.equal(rebuilt, rows_at(MADE)[1][0])
    assert (
        first_letters(words, 0, model, torch.zeros(64), 4, torch.device("cpu")).probes is None
    )  # six words, few letters


def test_letters_are_encoded_where_read() -> None:
    """Latents of a transcoder on words are those of the rows that it reads, not of those that its probes look at."""
    g = torch.Generator().manual_seed(0)
    sae = NestedSAE(SAEConfig(6, 12, (12,), d_out=5))
    sae.W_enc.data, x, read = (torch.randn(shape, generator=g) for shape in ((6, 12), (50, 5), (50, 6)))
    at = np.arange(50)
    rows = Labelled(at, at, np.full((50, len(LABELS)), -1, np.int8), at < 30, "words", ())
    score = AbsorptionScore(sae.requires_grad_(False), Probes((), torch.zeros(0, 5), torch.zeros(0), (), {}, rows, x))
    score.encode(torch.zeros(5), read)
    z = torch.zeros(50, 12)
    z[np.concatenate(score.rows), np.concatenate(score.latents)] = torch.from_numpy(np.concatenate(score.values))
    torch.testing.assert_close(z, sae.encode(read))
