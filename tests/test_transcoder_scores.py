"""Transcoders evaluated: harvested in one pass, trained, spliced in place of the MLP, against plain hooks on the whole model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import harvest.run
from evaluate.config import EvaluateConfig
from evaluate.probing.job import ProbingConfig
from evaluate.report.runs import read_results
from evaluate.run import Outcome
from evaluate.run import run as evaluate
from pipeline.base.errors import MismatchError, UsageError
from pipeline.sae.checkpoint import load_checkpoint
from pipeline.sae.nested import NestedSAE
from pipeline.store.reader import Store
from support import tiny_models
from support.harvests import harvest_config
from support.reference import reference_behaviour, reference_reconstruction, reference_sparse_coding
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
    (reads,) = {group.settings["reads"] for group in found.groups if "reads" in group.settings}
    assert reads == "mlp_in"


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
    """A target of other rows, texts for a transcoder, and stores the wrong way round are refused."""
    read, target = (made / f"stores/layer_1.{hook}.zarr" for hook in ("mlp_in", "mlp_out"))
    with pytest.raises(MismatchError, match="its rows are not those of"):
        evaluate(EvaluateConfig(read, tmp_path, device="cpu", target=tiny_store, scores=("ev",)), [made / "runs"])
    probing = ProbingConfig(sources=("nowhere",), scores=("scr",))
    with pytest.raises(UsageError, match="--scores scr: texts are read at the point"):
        scored(made, tmp_path, scores=("ev",), probing=probing)
    with pytest.raises(UsageError, match="--scores first_letter: words are read at the point"):
        scored(made, tmp_path, scores=("first_letter",))
    swapped = evaluate(EvaluateConfig(target, tmp_path, device="cpu", target=read, scores=("ev",)), [made / "runs"])
    assert all("trained on hook 'mlp_in'" in str(error) for _, error in swapped.failed)
    assert swapped.failed
