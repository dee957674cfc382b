"""A transcoder attached to a live model, in place of its MLP: against plain hooks, with caches, edits and gradients."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import pipeline
from pipeline.base.errors import UsageError
from pipeline.live.attach import attach
from pipeline.live.edits import steer
from pipeline.live.inspect import inspect_checkpoint
from pipeline.model.split_lm import SplitLM, find_layers, load_tokenizer
from pipeline.sae.checkpoint import save_checkpoint
from pipeline.sae.config import SAEConfig
from pipeline.sae.nested import NestedSAE
from support import tiny_models

LAYER = 1
DTYPES = (torch.float32, torch.bfloat16)
PARTS = {
    "gemma2": ("mlp", "post_feedforward_layernorm"),
    "llama": ("mlp", "mlp"),
    "gpt2": ("mlp", "mlp"),
    "gpt_neox": ("mlp", "mlp"),
    "mixtral": ("post_attention_layernorm", "mlp"),
}
"""Parts of a layer whose input is read and whose output is replaced; of mixtral resid_mid is read."""

pytestmark = pytest.mark.usefixtures("one_thread")


def make_transcoder(kind: str = "llama", *, skip: bool = True) -> NestedSAE:
    """A random transcoder of two levels, of two spaces."""
    generator = torch.Generator().manual_seed(3)
    sae = NestedSAE(SAEConfig(64, 48, (16, 48), "batchtopk", k=8, d_out=64, skip=skip))
    for parameter in sae.parameters():
        parameter.data.normal_(0, 0.1, generator=generator)
    sae.W_dec.data /= sae.W_dec.data.norm(dim=1, keepdim=True)
    sae.threshold.data.fill_(0.05)
    for center in (sae.center, sae.target_center):
        center.normal_(0, 0.1, generator=generator)
    sae.scale.fill_(0.5)
    sae.target_scale.fill_(1.5)
    hook = "resid_mid" if kind == "mixtral" else "mlp_in"
    sae.made_for = {"layer": LAYER, "hook": hook, "target": {"layer": LAYER, "hook": "mlp_out"}}
    return sae


@pytest.fixture(scope="module")
def whole(lm_folder: Callable[[str], Path]) -> Callable[..., Any]:
    """`whole(kind, dtype)`: the untouched model."""
    return lambda kind="llama", dtype=torch.float32: tiny_models.whole_model(lm_folder(kind), dtype)


def inputs(n: int = 3, context: int = 12) -> Tensor:
    """Token ids, BOS first; no other special id among them."""
    tokens = tiny_models.tokens(n, context)
    tokens[:, 1:] = tokens[:, 1:].clamp(min=4)
    return tokens


def logits(model: Any, tokens: Tensor) -> Tensor:
    """Logits without gradients."""
    with torch.no_grad():
        found: Tensor = model(tokens).logits
    return found


def replaced(model: Any, kind: str, tokens: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """Logits with what the MLP adds replaced, but for the first position, by a function of the raw rows that it read."""
    layer, seen = find_layers(model, model.config.num_hidden_layers)[LAYER], list[Tensor]()
    reader, maker = PARTS[kind]

    def put(_module: Any, _args: Any, out: Any) -> Any:
        rows = (out if isinstance(out, Tensor) else out[0]).clone()
        rows[:, 1:] = change(seen[-1][:, 1:].float().flatten(0, 1)).view_as(rows[:, 1:]).to(rows.dtype)
        return rows if isinstance(out, Tensor) else (rows, *out[1:])

    handles = [
        getattr(layer, reader).register_forward_pre_hook(lambda _m, args: seen.append(args[0].clone())),
        getattr(layer, maker).register_forward_hook(put),
    ]
    found = logits(model, tokens)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", PARTS)
def test_it_replaces_the_mlp(whole: Callable[..., Any], kind: str, dtype: torch.dtype) -> None:
    """Logits equal, bit for bit, those of plain hooks that put what it makes of the MLP's input in place of its output; with
    its error kept those of the untouched model."""
    model, tokens, sae = whole(kind, dtype), inputs(), make_transcoder(kind)
    plain = logits(model, tokens)
    for level in (0, -1):
        with attach(model, sae, level=level) as live:
            attached = logits(model, tokens)
        expected = replaced(model, kind, tokens, lambda x, n=level: sae.decode_level(sae.encode(x), n, x).detach())
        assert torch.equal(attached, expected)
        assert not torch.equal(attached, plain)
    assert live.latents.shape == (3, 12, 48)
    assert (live.latents[:, 1:] > 0).any()
    with attach(model, sae, keep_error=True):
        assert torch.equal(logits(model, tokens), plain)


def test_steering_adds_decoder_rows(whole: Callable[..., Any]) -> None:
    """With the error kept, an edit adds its latent's decoder row in raw units of the rows that are made."""
    model, tokens, sae = whole(), inputs(), make_transcoder()
    row = 3.0 * sae.W_dec[5].detach() / sae.target_scale
    layer = find_layers(model, model.config.num_hidden_layers)[LAYER]

    def add(_module: Any, _args: Any, out: Tensor) -> Tensor:
        changed = out.clone()
        changed[:, 1:] += row
        return changed

    handle = layer.mlp.register_forward_hook(add)
    expected = logits(model, tokens)
    handle.remove()
    with attach(model, sae, keep_error=True, edit=steer(5, 3.0)):
        torch.testing.assert_close(logits(model, tokens), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["gemma2", "gpt2"])
def test_cache_changes_no_token(whole: Callable[..., Any], kind: str) -> None:
    """What is generated with a cache is what is generated without."""
    model, tokens, sae = whole(kind), inputs(), make_transcoder(kind)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with attach(model, sae):
        cached, plain = (model.generate(tokens, use_cache=use, **options) for use in (True, False))
    assert torch.equal(cached, plain)


def test_gradients_reach_its_latents(whole: Callable[..., Any]) -> None:
    """∂logit/∂z is what finite differences of an edit give, in float64."""
    model, sae, tokens = whole("llama", torch.float64), make_transcoder().double(), inputs(1, 6)
    with attach(model, sae, gradients=True, keep_error=True) as live:
        model(tokens).logits[0, -1, 7].backward()
    assert live.z is not None
    assert live.z.grad is not None
    at = live.z.grad.abs().argmax()
    row, latent = divmod(int(at), 48)

    def nudge(step: float) -> float:
        def edit(z: Tensor) -> Tensor:
            moved = z.clone()
            moved[row, latent] += step
            return moved

        with attach(model, sae, keep_error=True, edit=edit):
            return float(logits(model, tokens)[0, -1, 7])

    assert float(live.z.grad[row, latent]) == pytest.approx((nudge(1e-2) - nudge(-1e-2)) / 2e-2, rel=1e-3)


@pytest.mark.parametrize(
    ("made_for", "says"),
    [
        ({"layer": 1, "hook": "mlp_in"}, "does not say which point it makes"),
        ({"layer": 1, "hook": "mlp_out", "target": {"layer": 1, "hook": "mlp_in"}}, "before it has read"),
        ({"layer": 1, "hook": "mlp_in", "target": {"layer": 99, "hook": "mlp_out"}}, "layer 99 is out of range"),
    ],
    ids=str,
)
def test_impossible_points_are_refused(whole: Callable[..., Any], made_for: dict[str, Any], says: str) -> None:
    """A transcoder without a target, of an earlier one, or of a layer that is not there."""
    sae = make_transcoder()
    sae.made_for = made_for
    with pytest.raises(UsageError, match=says):
        attach(whole(), sae)


def test_loaded_transcoder_is_attached(
    lm_folder: Callable[[str], Path], whole: Callable[..., Any], tmp_path: Path
) -> None:
    """`pipeline.load` brings its points with it; inspect reads its latents of a text at the MLP's input."""
    folder, sae = lm_folder("llama"), make_transcoder()
    save_checkpoint(tmp_path / "c.safetensors", sae, 1, {"store": {"model": str(folder), **sae.made_for}})
    loaded = pipeline.load(str(tmp_path / "c.safetensors"))
    model, tokens = whole(), inputs()
    with attach(model, sae):
        expected = logits(model, tokens)
    with attach(model, loaded):
        assert torch.equal(logits(model, tokens), expected)
    _, shown = inspect_checkpoint(str(tmp_path / "c.safetensors"), "w17 w5 w9", None, None, None, 3, "cpu")
    assert any(block.n_active for token in shown for block in token.blocks)


def test_scope_transcoder_is_inspected(
    lm_folder: Callable[[str], Path], whole: Callable[..., Any], tmp_path: Path
) -> None:
    """inspect folds the norm's gain into a Gemma Scope transcoder as attach does, with its hook named or not."""
    folder, model, tokens = tmp_path / "gemma-scope-x-transcoders" / "layer_1", whole("gemma2"), inputs()
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    shapes = {"W_enc": (64, 96), "W_dec": (96, 64), "b_enc": (96,), "b_dec": (64,)}
    weights = {name: (0.2 * torch.randn(shape, generator=generator)).numpy() for name, shape in shapes.items()}
    np.savez(folder / "params.npz", **weights, threshold=np.full(96, 0.1, np.float32))
    sae = pipeline.load(folder)
    with attach(model, sae, keep_error=True) as live:
        logits(model, tokens)
    with attach(model, sae, hook="mlp_in", keep_error=True) as named:
        logits(model, tokens)
    assert torch.equal(live.latents, named.latents)
    words = "w17 w5 w9"
    _, shown = inspect_checkpoint(str(folder), words, str(lm_folder("gemma2")), None, None, 96, "cpu")
    model = SplitLM.load(str(lm_folder("gemma2")), dtype="auto", part="whole", layers=[LAYER]).model
    with attach(model, sae, keep_error=True) as live:
        logits(model, torch.tensor([load_tokenizer(str(lm_folder("gemma2")))(words)["input_ids"]]))
    for token, z in zip(shown[1:], live.latents[0, 1:]):
        latents, values = zip(*token.blocks[0].strongest)
        torch.testing.assert_close(z[list(latents)], torch.tensor(values), rtol=1e-3, atol=1e-3)
        assert token.blocks[0].n_active == pytest.approx(int((z > 0).sum()), abs=2)
