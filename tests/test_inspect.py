"""`python -m pipeline inspect`: the strongest latents of each token, in lines and on a page."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from click.testing import CliRunner

from pipeline.__main__ import cli
from pipeline.base.errors import ModelError, UsageError
from pipeline.live import inspect
from pipeline.live.attach import attach
from pipeline.live.inspect import Block, Token, as_lines, as_page, block_names, inspect_checkpoint
from pipeline.model.files import architecture_sha256, weights_sha256
from pipeline.model.split_lm import SplitLM, load_tokenizer
from pipeline.sae.checkpoint import save_checkpoint
from pipeline.sae.config import SAEConfig
from pipeline.sae.foreign.reader import load_sae
from pipeline.sae.nested import NestedSAE
from support.browser import browse, needs_chromium

ROOT = Path(__file__).parents[1]
MODEL = str(ROOT / "data" / "tiny-gemma2")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A random SAE for the shipped model's layer 3."""
    sae = NestedSAE(SAEConfig(192, 40, (10, 40)))
    with torch.no_grad():
        sae.W_enc.normal_(generator=torch.Generator().manual_seed(1))
        torch.nn.init.orthogonal_(sae.W_dec)
    path = tmp_path / "sae.safetensors"
    save_checkpoint(path, sae, 1, {"store": {"model": MODEL, "layer": 3}})
    return path


def test_strongest_are_those_of_encode(checkpoint: Path) -> None:
    """Numbers and activations are those of `encode` on the residual of a plain prefix, block by block."""
    sae, tokens = inspect_checkpoint(str(checkpoint), "It was late", None, None, None, 3, "cpu")
    ids = load_tokenizer(MODEL)("It was late", return_tensors="pt")["input_ids"]
    residual = SplitLM.load(MODEL, dtype="auto", part="whole", layers=[3]).prefix(ids)[3][0]
    assert tokens[0].blocks == ()
    for token, z in zip(tokens[1:], sae.encode(residual[1:])):
        for block, part in zip(token.blocks, sae.config.blocks):
            order = z[part].argsort(descending=True)[: len(block.strongest)]
            assert [latent for latent, _ in block.strongest] == (order + part.start).tolist()
            assert block.n_active == int((z[part] > 0).sum())


@pytest.mark.parametrize("loaded", ["inspect", "attach", "cached"])
def test_changed_config_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loaded: str) -> None:
    """A model of the recorded weights beside another config.json than the recorded one is refused, from a folder or the Hub's
    cache; other weights are another model, which may be meant, and a checkpoint that records no hash fits any."""
    if loaded == "cached":
        folder = tmp_path / "models--owner--model" / "snapshots" / ("1" * 40)
        (refs := folder.parents[1] / "refs").mkdir(parents=True)
        (refs / "main").write_text(folder.name)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    else:
        folder = tmp_path / "model"
    shutil.copytree(MODEL, folder)
    made_for = {"model": str(folder), "layer": 3, "weights_sha256": weights_sha256(folder)}
    known, path = json.loads((folder / "config.json").read_text()), tmp_path / "sae.safetensors"

    def look(**more: str) -> None:
        save_checkpoint(path, NestedSAE(SAEConfig(192, 4, (4,))), 1, {"store": made_for | more})
        if loaded == "inspect":
            inspect_checkpoint(str(path), "It", None, None, None, 3, "cpu")
        else:
            model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder)
            if loaded == "cached":
                model.config._name_or_path = "owner/model"
            attach(model, load_sae(path)[0])

    recorded = architecture_sha256(folder)
    assert recorded is not None
    look(architecture_sha256=recorded)
    (folder / "config.json").write_text(json.dumps(known | {"rms_norm_eps": 0.5}))
    with pytest.raises(ModelError, match=r"config\.json: not that of the model which made the SAE's store"):
        look(architecture_sha256=recorded)
    look()
    look(architecture_sha256=recorded, weights_sha256="0" * 64)


def test_recorded_revision_is_read(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model and tokenizer are those of the revision that the checkpoint records, unless another model is given."""
    asked: list[str | None] = []
    tokenizer, load = load_tokenizer, SplitLM.load
    monkeypatch.setattr(
        inspect, "model_folder", lambda _model, revision: asked.append(revision) or (Path(MODEL), "local")
    )
    monkeypatch.setattr(inspect, "load_tokenizer", lambda model, revision: asked.append(revision) or tokenizer(MODEL))

    def loaded(model: str, *, revision: str | None, **options: Any) -> SplitLM:
        asked.append(revision)
        return load(MODEL, **options)

    monkeypatch.setattr(SplitLM, "load", loaded)
    for revision in ("step1000", "local"):
        made_for = {"model": "owner/model", "layer": 3, "revision": revision}
        save_checkpoint(
            tmp_path / f"{revision}.safetensors", NestedSAE(SAEConfig(192, 4, (4,))), 1, {"store": made_for}
        )
        inspect_checkpoint(str(tmp_path / f"{revision}.safetensors"), "It", None, None, None, 3, "cpu")
    inspect_checkpoint(str(tmp_path / "step1000.safetensors"), "It", MODEL, None, None, 3, "cpu")
    assert asked == ["step1000"] * 3 + [None] * 6


def test_lines_show_what_fires() -> None:
    """A line a token; special ones are left alone."""
    block = Block("shared", ((7, 1.25), (2, 0.5)), 9)
    assert as_lines([Token("<bos>", ()), Token(" a", (block,))]) == [
        "'<bos>'  (left alone)",
        "' a'     shared 9: 7:1.25 2:0.5",
    ]


def test_page_is_inert() -> None:
    """Tokens that look like markup are text on the page."""
    block = Block("shared", ((7, 1.25),), 1)
    page = as_page([Token("<script>alert(1)</script>", (block,))], block_names(2), "<img src=x>")
    assert "<script" not in page
    assert "<img" not in page
    assert "&lt;script&gt;" in page


def test_command_writes_a_page(checkpoint: Path, tmp_path: Path) -> None:
    """--out writes the page and prints its path."""
    out = tmp_path / "deep" / "page.html"
    done = CliRunner().invoke(cli, ["inspect", str(checkpoint), "--text", "It was", "--out", str(out)])
    assert done.output.strip() == str(out)
    assert "shared" in out.read_text()


def test_unnamed_model_is_asked_for(tmp_path: Path) -> None:
    """A checkpoint that does not say where it is from needs --model and --layer."""
    save_checkpoint(tmp_path / "sae.safetensors", NestedSAE(SAEConfig(8, 4, (4,))), 1, {})
    with pytest.raises(UsageError, match="--model and --layer"):
        inspect_checkpoint(str(tmp_path / "sae.safetensors"), "x", None, None, None, 3, "cpu")


def test_tokens_are_visible(checkpoint: Path) -> None:
    """Line ends and the space before a word are seen."""
    _, tokens = inspect_checkpoint(str(checkpoint), "It was\n   a", None, None, None, 3, "cpu")
    assert [token.text for token in tokens] == ["<bos>", "It", " was", "↵", "␣␣", " a"]


def test_long_and_wide_tokens_are_aligned() -> None:
    """Wide characters take two columns; a token longer than the others' column moves its own line alone."""
    lines = as_lines([Token("日本", ()), Token("ab", ()), Token("x" * 60, ())])
    assert lines[0] == "'日本'" + " " * 18 + "  (left alone)"
    assert lines[1] == "'ab'" + " " * 20 + "  (left alone)"
    assert lines[2] == "'" + "x" * 60 + "'  (left alone)"


def test_other_modules_are_refused(tmp_path: Path) -> None:
    """An SAE of Gemma-2's `mlp`, behind which a norm stands, is of no point of ours, unless one is named."""
    path = tmp_path / "sae.safetensors"
    made_for = {"model": MODEL, "layer": 3, "hook": "mlp_out", "module": "mlp"}
    save_checkpoint(path, NestedSAE(SAEConfig(192, 4, (4,))), 1, {"store": made_for})
    with pytest.raises(UsageError, match="the SAE is of the output of 'mlp'"):
        inspect_checkpoint(str(path), "It", None, None, None, 3, "cpu")
    inspect_checkpoint(str(path), "It", None, None, "mlp_out", 3, "cpu")


def test_bytes_no_text_are_refused(checkpoint: Path) -> None:
    """What the command line could not decode is one line."""
    with pytest.raises(UsageError, match=r"--text a⟨U\+DCFF⟩: holds bytes that are no text"):
        inspect_checkpoint(str(checkpoint), "a\udcff", None, None, None, 3, "cpu")


def test_longer_texts_are_refused(checkpoint: Path) -> None:
    """More tokens than the model has positions are one line, before any pass."""
    with pytest.raises(UsageError, match=r"--text: 601 tokens, .*tiny-gemma2 has 512 positions; give a shorter text"):
        inspect_checkpoint(str(checkpoint), " a" * 600, None, None, None, 3, "cpu")


def test_texts_beyond_memory_are_refused(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a text's logits and latents need is held against what is free, by evaluation's formula, before any pass."""
    monkeypatch.setattr(inspect, "available_memory", lambda: 10_000)
    with pytest.raises(
        UsageError, match=r"--text: 4 tokens need \S+ [kM]B of memory, 8\.0 kB are allowed; give a shorter"
    ):
        inspect_checkpoint(str(checkpoint), "It was late", None, None, None, 3, "cpu")


@needs_chromium
def test_page_fits_a_phone(tmp_path: Path) -> None:
    """At 390 pixels nothing has to be scrolled sideways, and each block of a token stands on a line with its name."""
    blocks = tuple(Block(name, tuple((700 + i, 0.123) for i in range(5)), 40) for name in block_names(2))
    page = tmp_path / "page.html"
    page.write_text(as_page([Token(" internationalisation", blocks)] * 3, block_names(2), "A text"))
    with browse() as browser:
        browser.size(390)
        browser.open(page)
        assert browser.evaluate("document.documentElement.scrollWidth") <= 390
        assert browser.evaluate("[...document.querySelectorAll('tbody tr')].every(row => row.offsetHeight < 160)")
        heights = browser.evaluate("[...document.querySelectorAll('td[data-block]')].map(cell => cell.offsetLeft)")
        assert len(set(heights)) == 1
        assert browser.problems == []
