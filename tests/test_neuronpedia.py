"""Neuronpedia's format: values, intervals, histograms and lens by hand; the command; sae-dashboard's own classes and output."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from evaluate.latents import neuronpedia
from evaluate.latents.collect import choose_chunks
from evaluate.latents.neuronpedia import (
    Counted,
    Sample,
    Source,
    Together,
    choose,
    command,
    export_neuronpedia,
    gather,
    groups,
)
from pipeline.__main__ import cli
from pipeline.base.errors import DiskError, UsageError
from pipeline.base.token_text import TokenText
from pipeline.experiment.verify import verify
from pipeline.sae.checkpoint import save_checkpoint
from pipeline.sae.export import export
from pipeline.sae.nested import NestedSAE
from pipeline.store.kept import KeptRows
from pipeline.store.reader import Store
from support.lm_stores import make_lm_store
from test_latents import N_SHARED, Words, make_sae

SOURCE = Source("toy", 3, "set", "me", "id", "corpus", 32, 16, "hook_resid_post", 4, 64, "2026-01-01T00:00:00+00:00")


@pytest.fixture
def store(tiny_store: Path) -> Store:
    """A store of made-up rows and tokens."""
    return Store.open(tiny_store)


@pytest.fixture
def sae(store: Store) -> NestedSAE:
    """Decoder rows of different lengths and a scale, so that units matter."""
    sae = make_sae(store)
    sae.W_dec.data *= torch.linspace(0.5, 2, len(sae.W_dec))[:, None]
    sae.scale.fill_(0.25)
    return sae.requires_grad_(False)


def sample_of(store: Store) -> Sample:
    """All rows of the evaluation split."""
    return Sample(store.eval, store.context, choose_chunks(store.eval, 10**9, 0))


def written(store: Store, sae: NestedSAE, out: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]], Path]:
    """Features and activations of an export, and its folder."""
    unembedding = torch.randn(50, store.d_model, generator=torch.Generator().manual_seed(1))
    folder = export_neuronpedia(sae, unembedding, TokenText(Words()), sample_of(store), SOURCE, out, quiet=True)
    return lines(folder, "features"), lines(folder, "activations"), folder


def lines(folder: Path, kind: str) -> list[dict[str, Any]]:
    """Records of all batches, in order."""
    paths = sorted((folder / kind).iterdir(), key=lambda path: int(path.name[6:].partition(".")[0]))
    return [json.loads(line) for path in paths for line in gzip.decompress(path.read_bytes()).splitlines()]


def dense(store: Store, sae: NestedSAE) -> np.ndarray:
    """Latents of all evaluation rows in raw units along unit decoder rows, rows that do not count silent."""
    z = sae.encode(store.eval.read(0, store.eval.n_rows)) * sae.W_dec.norm(dim=1) / sae.scale
    return (z * torch.from_numpy(store.eval.kept())[:, None]).numpy()


def test_gathered_firings_are_all(store: Store, sae: NestedSAE, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows and values equal the dense matrix's, also when only a batch of latents fits at once."""
    expected = dense(store, sae)
    for most in (10**9, 1):
        monkeypatch.setattr(neuronpedia, "MOST_FIRINGS", most)
        found = [firing for _, batch in gather(sae, sample_of(store), True) for firing in batch]
        assert len(found) == sae.config.width
        for latent, (rows, values) in enumerate(found):
            assert rows.tolist() == expected[:, latent].nonzero()[0].tolist()
            np.testing.assert_allclose(values, expected[rows, latent], rtol=1e-5)


def test_groups_stay_within_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups are whole batches, together everything, none over the limit unless it is one batch."""
    monkeypatch.setattr(neuronpedia, "MOST_FIRINGS", 300)
    assert list(groups([1] * 256 + [2] * 128 + [0] * 10)) == [(0, 256), (256, 394)]
    assert list(groups([9] * 300)) == [(0, 128), (128, 256), (256, 300)]


def test_features_say_what_is_the_case(store: Store, sae: NestedSAE, tmp_path: Path) -> None:
    """Density, maximum, histogram, lens and nearest rows of a live latent equal those computed from dense matrices."""
    features, activations, _ = written(store, sae, tmp_path)
    z = dense(store, sae)
    latent = int((z > 0).sum(0).argmax())
    feature, values = features[latent], z[:, latent][z[:, latent] > 0]
    assert feature["index"] == str(latent)
    assert feature["frac_nonzero"] == len(values) / len(z)
    assert feature["maxActApprox"] == pytest.approx(values.max(), rel=1e-4)
    assert sum(feature["freq_hist_data_bar_heights"]) == len(values)
    assert feature["freq_hist_data_bar_heights"] == np.histogram(values, 50)[0].tolist()
    unit = torch.nn.functional.normalize(sae.W_dec, dim=1)
    logits = torch.randn(50, store.d_model, generator=torch.Generator().manual_seed(1)) @ unit[latent]
    np.testing.assert_allclose(feature["pos_values"], (logits - logits.mean()).topk(10).values, rtol=1e-3)
    assert feature["pos_str"] == [f" t{i}" for i in logits.topk(10).indices.tolist()]
    cosines = unit @ unit[latent]
    assert feature["topkCosSimIndices"] == cosines.topk(26).indices.tolist()
    assert feature["topkCosSimIndices"][0] == latent
    of_this = [one for one in activations if one["index"] == str(latent)]
    assert len({one["id"] for one in of_this}) == len(of_this)
    top = sorted((one["maxValue"] for one in of_this if one["binContains"] == -1), reverse=True)
    assert top[0] == feature["maxActApprox"]


def test_correlated_latents_are_numpys(store: Store, sae: NestedSAE, tmp_path: Path) -> None:
    """The three latents that correlate most with each, Pearson and cosine, are numpy's over rows that count; silent ones have
    none and are none's."""
    features, _, _ = written(store, sae, tmp_path)
    z = dense(store, sae)[store.eval.kept()].astype(np.float64)
    alive = z.std(0) > 0
    with np.errstate(invalid="ignore"):
        pearson = np.corrcoef(z.T)
    np.fill_diagonal(pearson, -np.inf)
    pearson[:, ~alive] = -np.inf
    assert alive.sum() > 20
    for latent, feature in enumerate(features):
        if not alive[latent]:
            assert feature["correlated_features_indices"] == []
            continue
        top = np.sort(pearson[latent])[::-1][:3]
        np.testing.assert_allclose(feature["correlated_features_pearson"], top, atol=1e-4)
        for other, value in zip(feature["correlated_features_indices"], feature["correlated_features_l1"]):
            cosine = z[:, latent] @ z[:, other] / np.linalg.norm(z[:, latent]) / np.linalg.norm(z[:, other])
            assert value == pytest.approx(cosine, abs=1e-4)


def test_coincidences_stay_within_memory(store: Store, sae: NestedSAE, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows whose firings do not fit are left out, and correlations are those of the rows before."""
    z = dense(store, sae)
    counted = np.flatnonzero(store.eval.kept())
    rows = torch.from_numpy(z[counted][:40])
    monkeypatch.setattr(neuronpedia, "MOST_TOGETHER", int((rows != 0).sum()))
    together = Together(sae.config.width)
    for block in torch.from_numpy(z[counted]).split(20):
        together.update(block)
    assert together.n_rows == 40
    alive = np.flatnonzero(rows.double().std(0, correction=0).numpy() > 0)
    expected = np.corrcoef(rows.numpy().T.astype(np.float64)[alive])
    np.fill_diagonal(expected, -np.inf)
    (found,) = together.most_alike(int(alive[0]), int(alive[0]) + 1)
    assert found["correlated_features_pearson"][0] == pytest.approx(expected[0].max(), abs=1e-4)


def test_examples_carry_their_tokens(store: Store, sae: NestedSAE, tmp_path: Path) -> None:
    """An example is its sequence without the first token, with the latent's value on each, at the position named."""
    _, activations, _ = written(store, sae, tmp_path)
    z, tokens = dense(store, sae).reshape(-1, store.context, sae.config.width), store.eval.tokens
    sequences = {tuple(f" t{id}" for id in ids[1:].tolist()): number for number, ids in enumerate(tokens)}
    for one in activations[:500]:
        row = sequences[tuple(one["tokens"])]
        np.testing.assert_allclose(one["values"], z[row, 1:, int(one["index"])], rtol=1e-4)
        if one["binContains"] == -1:
            assert one["values"][one["qualifyingTokenIndex"]] > 0


def test_intervals_hold_their_examples() -> None:
    """Parts of the range from the highest down, shares of all rows, silent rows in the lowest; examples lie within."""
    rows, values = np.arange(10), np.arange(1, 11, dtype=np.float32)
    all_counted = Counted(KeptRows.of(iter([np.ones(100, np.bool_)]), 8), np.arange(0, 100, 8))
    examples = list(choose(rows, values, all_counted, 100, np.random.default_rng(0)))
    top, others = examples[:10], examples[10:]
    assert [one.row for one in top] == list(range(9, -1, -1))
    parts = list(dict.fromkeys((one.low, one.high, one.share) for one in others))
    assert parts == [(8, 10, 0.03), (6, 8, 0.03), (4, 6, 0.03), (2, 4, 0.03), (0, 2, 0.92)]
    for one in others:
        assert one.low <= (values[one.row] if one.row < 10 else 0) <= one.high
    assert any(one.row >= 10 for one in others)


def test_dead_latents_have_no_examples(store: Store, tmp_path: Path) -> None:
    """A latent that never fires has its lens and nothing else."""
    sae = make_sae(store)
    sae.b_enc.data[7] = -1e9
    features, activations, _ = written(store, sae.requires_grad_(False), tmp_path)
    assert features[7]["frac_nonzero"] == 0
    assert features[7]["maxActApprox"] == 0
    assert features[7]["freq_hist_data_bar_heights"] == []
    assert len(features[7]["pos_str"]) == 10
    assert not [one for one in activations if one["index"] == "7"]


def test_same_bytes_every_time(store: Store, sae: NestedSAE, tmp_path: Path) -> None:
    """A second export writes the same bytes, takes older batches away and leaves no other files."""
    _, _, folder = written(store, sae, tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    (folder / "features" / "batch-77.jsonl.gz").touch()
    written(store, sae, tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_verify_finds_a_changed_export(store: Store, sae: NestedSAE, tmp_path: Path) -> None:
    """An export is whole; a byte changed or a batch lost in it is found by name."""
    _, _, folder = written(store, sae, tmp_path)
    assert verify(str(tmp_path)).problems == []
    path = folder / "features" / "batch-1.jsonl.gz"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    (tmp_path / "sae_dashboard" / "batch-0.json").unlink()
    changed, lost = sorted(verify(str(tmp_path)).problems, key=lambda problem: "gone" in problem)
    assert str(path) in changed
    assert "batch-0.json" in lost


def test_strange_folder_is_left_alone(store: Store, sae: NestedSAE, tmp_path: Path) -> None:
    """A folder that holds something else is refused."""
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(DiskError, match=r"thesis\.tex"):
        written(store, sae, tmp_path)


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, Path]:
    """A store of a tiny Gemma-2's residuals, and a checkpoint of two levels for it."""
    folder = tmp_path_factory.mktemp("neuronpedia")
    store = make_lm_store(folder)
    sae = make_sae(store)
    sae.center.copy_(store.mean)
    sae.scale.fill_(store.scale)
    made_by = {name: store.config[name] for name in ("model", "weights_sha256", "layer", "context")}
    save_checkpoint(folder / "sae.safetensors", sae, 1, {"store": made_by})
    return store, folder / "sae.safetensors"


def exported(real: tuple[Store, Path], out: Path, *options: str) -> Path:
    """Run the command; the folder that it prints."""
    store, checkpoint = real
    words = ["export", str(checkpoint), "--format", "neuronpedia", "--store", str(store.path), "--out", str(out)]
    done = subprocess.run(
        [sys.executable, "-m", "pipeline", *words, *options], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return Path(done.stdout.splitlines()[-1])


def test_command_describes_its_source(real: tuple[Store, Path], tmp_path: Path) -> None:
    """The command writes the four descriptions, which agree with each other and with the latents of the level asked for."""
    folder = exported(real, tmp_path / "out", "--level", "0", "--creator", "me")
    said = {path.stem: json.loads(path.read_text()) for path in folder.glob("*.jsonl")}
    features = lines(folder, "features")
    assert len(features) == N_SHARED
    assert folder == tmp_path / "out" / "model" / "1-nested-res-300-level0"
    assert said["source"]["id"] == features[0]["layer"] == folder.name
    assert said["source"]["setName"] == said["sourceset"]["name"] == "nested-res-300-level0"
    assert said["model"]["id"] == features[0]["modelId"] == "model"
    assert said["model"]["layers"] == 4
    assert said["release"]["creatorName"] == "me"


def test_other_formats_take_no_store(real: tuple[Store, Path], tmp_path: Path) -> None:
    """--store belongs to Neuronpedia's format, which needs it."""
    words = ["export", str(real[1]), "--out", str(tmp_path / "out"), "--format"]
    refused = CliRunner().invoke(cli, [*words, "saelens", "--store", str(real[0].path)])
    assert "--store" in str(refused.exception)
    needed = CliRunner().invoke(cli, [*words, "neuronpedia"])
    assert "--store" in str(needed.exception)


@pytest.mark.parametrize("options", [["--set", "../x"], ["--model-id", "a/b"], ["--level", "2"]])
def test_bad_names_are_refused(real: tuple[Store, Path], tmp_path: Path, options: list[str]) -> None:
    """Names that are no folder's and levels that are not there are refused before anything is written."""
    store, checkpoint = real
    words = [str(checkpoint), "--store", str(store.path), "--out", str(tmp_path / "out"), *options]
    refused = CliRunner().invoke(command, words)
    assert isinstance(refused.exception, UsageError)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.skipif(
    "DASHBOARD_PYTHON" not in os.environ, reason="DASHBOARD_PYTHON names no environment with sae-dashboard"
)
def test_dashboard_agrees(real: tuple[Store, Path], tmp_path: Path) -> None:
    """sae-dashboard's classes load the export, and its own output for the same SAE, rows and tokens is the same."""
    store, checkpoint = real
    exported(real, tmp_path / "out")
    export(checkpoint, "saelens", tmp_path / "saelens")
    model = load_file(Path(store.config["model"]) / "model.safetensors")
    rows = store.eval.read(0, store.eval.n_rows).view(-1, store.context, store.d_model)
    given = {"tokens": torch.from_numpy(store.eval.tokens).long(), "rows": rows.float()}
    given |= {"lm_head": model["model.embed_tokens.weight"].float(), "gain": 1 + model["model.norm.weight"].float()}
    save_file(given, tmp_path / "given.safetensors")
    (tmp_path / "special.json").write_text(json.dumps(store.config["special_ids"]))
    script = Path(__file__).parent / "peers" / "peer_neuronpedia.py"
    run = subprocess.run(
        [os.environ["DASHBOARD_PYTHON"], script, tmp_path], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout.splitlines()[-1])
    assert found.pop("features") == 0
    assert found.pop("live") > 200
    assert found.pop("correlated") > 200
    assert found.pop("examples") > 2000
    assert found.pop("logits_hist_data_bar_heights") <= 1, found  # a value on the edge of two bars
    assert found.pop("freq_hist_data_bar_heights") <= 1, found
    assert max(found.values()) < 6e-4, found  # theirs rounds to three decimals
