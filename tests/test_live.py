"""An SAE attached to a live model: bits, masks, edits, caches, gradients; against plain hooks and evaluation's splice."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import pipeline
from pipeline.base.errors import ModelError, UsageError
from pipeline.live.attach import Attached, attach
from pipeline.live.edits import ablate, clamp, steer
from pipeline.model.points import canonical
from pipeline.model.splicing import splice
from pipeline.model.split_lm import SplitLM, find_layers
from pipeline.sae.config import SAEConfig
from pipeline.sae.nested import NestedSAE
from support import tiny_models

LAYER = 1
KINDS = ("gemma2", "llama", "gpt2", "gpt_neox", "mixtral")
DTYPES = (torch.float32, torch.bfloat16)


def make_sae(activation: str = "batchtopk", d_model: int = 64) -> NestedSAE:
    """A random SAE of two levels in some space of its own; a fair share of its latents fires."""
    generator = torch.Generator().manual_seed(3)
    sae = NestedSAE(SAEConfig(d_model, 48, (16, 48), activation, k=0 if activation == "relu" else 8))  # type: ignore[arg-type]
    with torch.no_grad():
        for weight in (sae.W_enc, sae.W_dec, sae.b_enc, sae.b_dec):
            weight.normal_(0, 0.1, generator=generator)
        sae.W_dec /= sae.W_dec.norm(dim=1, keepdim=True)
    sae.center.normal_(0, 0.1, generator=generator)
    sae.scale.fill_(0.5)
    return sae


@pytest.fixture
def sae() -> NestedSAE:
    """Fresh for every test, since gradients gather in it."""
    return make_sae()


@pytest.fixture(scope="module")
def whole(lm_folder: Callable[[str], Path]) -> Callable[..., Any]:
    """`whole(kind, dtype)`: the untouched model."""
    return lambda kind="gemma2", dtype=torch.float32: tiny_models.whole_model(lm_folder(kind), dtype)


def inputs(n: int = 3, context: int = 12) -> torch.Tensor:
    """Token ids, BOS first; no other special id among them."""
    tokens = tiny_models.tokens(n, context)
    tokens[:, 1:] = tokens[:, 1:].clamp(min=4)
    return tokens


@contextlib.contextmanager
def hooked(model: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """A plain hook that changes the residual stream after LAYER, as one would write it by hand."""

    def hook(_module: Any, _args: Any, output: Any) -> Any:
        changed = change(output if isinstance(output, torch.Tensor) else output[0])
        return changed if isinstance(output, torch.Tensor) else (changed, *output[1:])

    handle = find_layers(model, model.config.num_hidden_layers)[LAYER].register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def logits(model: Any, tokens: torch.Tensor, **more: Any) -> torch.Tensor:
    """Logits without gradients."""
    with torch.no_grad():
        found: torch.Tensor = model(tokens, **more).logits
    return found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_keep_error_changes_no_bit(whole: Callable[..., Any], kind: str, dtype: torch.dtype, sae: NestedSAE) -> None:
    """With the error kept and no edit, logits are bit for bit those of the untouched model."""
    model, tokens = whole(kind, dtype), inputs()
    with attach(model, sae, LAYER, keep_error=True):
        attached = logits(model, tokens)
    assert torch.equal(attached, logits(model, tokens))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_splice_is_that_of_a_hook(whole: Callable[..., Any], kind: str, dtype: torch.dtype, sae: NestedSAE) -> None:
    """Spliced logits equal a full forward pass with a hook that replaces every row but the first by its reconstruction."""
    model, tokens = whole(kind, dtype), inputs()

    def change(residual: torch.Tensor) -> torch.Tensor:
        changed = residual.clone()
        changed[:, 1:] = sae(residual[:, 1:].flatten(0, 1).float()).view_as(residual[:, 1:]).to(residual.dtype)
        return changed

    with attach(model, sae, LAYER) as live:
        attached = logits(model, tokens)
    with hooked(model, change):
        assert torch.equal(attached, logits(model, tokens))
    assert not torch.equal(attached, logits(model, tokens))
    assert live.latents.shape == (3, 12, 48)


@pytest.mark.parametrize("dtype", ["float32", "bf16"])
def test_splice_is_that_of_evaluation(lm_folder: Callable[[str], Path], dtype: str, sae: NestedSAE) -> None:
    """Attached logits equal those that evaluation computes from the cached residual."""
    folder, tokens = str(lm_folder("gemma2")), inputs()
    lm = SplitLM.load(folder, dtype=dtype, part="whole", layers=[LAYER])
    residual = lm.prefix(tokens)[LAYER]
    kept = torch.ones_like(tokens, dtype=torch.bool)
    kept[:, 0] = False
    with torch.no_grad():
        evaluated = lm.unembed(lm.suffix(splice(residual, kept, sae(residual[kept].float())), tokens))
    with attach(lm.model, sae, LAYER):
        assert torch.equal(logits(lm.model, tokens), evaluated)


HOOKED = [
    ("gemma2", ("resid_pre", "resid_mid", "attn_out", "mlp_in", "mlp_out", "embed")),
    ("gpt2", ("resid_mid", "attn_out", "mlp_in", "mlp_out")),
    ("gpt_neox", ("attn_out", "mlp_in", "mlp_out")),
    ("mixtral", ("resid_mid", "mlp_out")),
]


@pytest.mark.parametrize(("kind", "hooks"), HOOKED, ids=lambda value: value if isinstance(value, str) else "")
def test_every_hook_is_evaluations(
    lm_folder: Callable[[str], Path], kind: str, hooks: tuple[str, ...], sae: NestedSAE
) -> None:
    """At every hook point the attached logits, latents and kept error are those that evaluation has there, bit for bit."""
    folder, tokens = str(lm_folder(kind)), inputs()
    kept = torch.ones_like(tokens, dtype=torch.bool)
    kept[:, 0] = False
    for hook in hooks:
        lm = SplitLM.load(folder, dtype="float32", part="whole", layers=[point := canonical(LAYER, hook)])
        rows = lm.prefix(tokens)[point]
        with torch.no_grad():
            evaluated = lm.unembed(lm.suffix(splice(rows, kept, sae(rows[kept])), tokens))
        plain = logits(lm.model, tokens)
        with attach(lm.model, sae, LAYER, hook=hook) as live:
            assert torch.equal(logits(lm.model, tokens), evaluated), hook
        assert torch.equal(live.latents[kept], sae.encode(rows[kept])), hook
        with attach(lm.model, sae, LAYER, hook=hook, keep_error=True):
            assert torch.equal(logits(lm.model, tokens), plain), hook
        assert not torch.equal(plain, evaluated), hook


@pytest.mark.parametrize("hook", ["resid_mid", "mlp_out"])
def test_hooks_generate_with_a_cache(whole: Callable[..., Any], hook: str, sae: NestedSAE) -> None:
    """At a point inside a layer a cache changes no token that is generated, nor gradients what is computed."""
    model, tokens = whole(), inputs()
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with attach(model, sae, LAYER, hook=hook):
        cached, plain = (model.generate(tokens, use_cache=use, **options) for use in (True, False))
    assert torch.equal(cached, plain)
    with attach(model, sae, LAYER, hook=hook) as live:
        expected = logits(model, tokens)
    with attach(model, sae, LAYER, hook=hook, gradients=True) as live:
        found = model(tokens).logits
        found.sum().backward()
    assert torch.equal(found, expected)
    assert live.z is not None
    assert live.z.grad is not None
    assert live.z.grad.abs().sum() > 0


def test_acts_where_it_was_trained(whole: Callable[..., Any], sae: NestedSAE) -> None:
    """Without a layer or hook it is where the checkpoint says; what is asked for goes first."""
    model, tokens = whole(), inputs()
    with attach(model, sae, 2, hook="mlp_out"):
        expected = logits(model, tokens)
    with attach(model, sae, 1):
        other = logits(model, tokens)
    sae.made_for = {"id": "x", "layer": 2, "hook": "mlp_out"}
    with attach(model, sae):
        assert torch.equal(logits(model, tokens), expected)
    with attach(model, sae, 1, hook="resid_post"):
        assert torch.equal(logits(model, tokens), other)


@pytest.mark.parametrize(
    ("recorded", "options", "says"),
    [
        ({}, {}, "does not say which layer"),
        ({"layer": 0, "hook": None}, {}, "rows of a place that nobody named"),
        ({"layer": 1}, {"hook": "hook_z"}, "hook hook_z: known are resid_post"),
    ],
)
def test_unknown_places_are_refused(
    whole: Callable[..., Any], sae: NestedSAE, recorded: dict[str, Any], options: dict[str, Any], says: str
) -> None:
    """Where nobody says where an SAE belongs, it is asked for."""
    sae.made_for = recorded
    with pytest.raises(UsageError, match=says):
        attach(whole(), sae, **options)


def test_missing_points_are_refused(whole: Callable[..., Any], sae: NestedSAE) -> None:
    """A layer whose parts run beside each other has no resid_mid to attach to."""
    with pytest.raises(ModelError, match=r"resid_mid was not found in layer 1 \(found: attn_out, mlp_out, mlp_in\)"):
        attach(whole("gpt_neox"), sae, LAYER, hook="resid_mid")


def test_special_positions_stay(whole: Callable[..., Any], sae: NestedSAE) -> None:
    """First positions, BOS and EOS in the middle, and padding are neither spliced nor have latents."""
    model, tokens = whole(), inputs()
    tokens[0, 5], tokens[1, 7] = 2, 1
    mask = torch.ones_like(tokens)
    mask[2, :4], tokens[2, :4] = 0, 4
    with attach(model, sae, LAYER) as live:
        logits(model, tokens, attention_mask=mask)
    assert live.kept is not None
    left_out = {tuple(where) for where in (~live.kept).nonzero().tolist()}
    assert left_out == {(0, 0), (1, 0), (0, 5), (1, 7), *((2, pos) for pos in range(5))}
    assert not live.latents[~live.kept].any()


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_left_padding_is_respected(whole: Callable[..., Any], kind: str, sae: NestedSAE) -> None:
    """A text in a left-padded batch gets the logits that it gets alone."""
    model, tokens = whole(kind), inputs()
    padded = torch.cat([torch.zeros(3, 4, dtype=torch.long), tokens], 1)
    mask = (torch.arange(16) >= 4).long().expand(3, -1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with attach(model, sae, LAYER, edit=steer(2, 3.0), keep_error=True):
        alone = logits(model, tokens)
        batch = logits(model, padded, attention_mask=mask, position_ids=positions)
    torch.testing.assert_close(batch[:, 4:], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_generation_with_a_cache(whole: Callable[..., Any], kind: str, dtype: torch.dtype, sae: NestedSAE) -> None:
    """Generation with a KV cache gives the tokens of generation without one, steered and spliced."""
    model, tokens = whole(kind, dtype), inputs(2, 6)
    mask = torch.ones_like(tokens)
    for options in ({"keep_error": True, "edit": steer(3, 20.0)}, {"level": 0}):
        with attach(model, sae, LAYER, **options):  # type: ignore[arg-type]
            cached, plain = (
                model.generate(tokens, attention_mask=mask, max_new_tokens=8, do_sample=False, use_cache=use)
                for use in (True, False)
            )
        assert torch.equal(cached, plain)


def test_level_restricts_latents(whole: Callable[..., Any], sae: NestedSAE) -> None:
    """A level splices its own reconstruction, and its latents are the first ones of the whole."""
    model, tokens = whole(), inputs()
    with attach(model, sae, LAYER) as outer:
        logits(model, tokens)
    with attach(model, sae, LAYER, level=0) as live:
        inner = logits(model, tokens)
    assert torch.equal(live.latents, outer.latents[..., :16])

    def change(residual: torch.Tensor) -> torch.Tensor:
        changed, rows = residual.clone(), residual[:, 1:].flatten(0, 1)
        changed[:, 1:] = sae.decode_level(sae.encode(rows), 0).view_as(residual[:, 1:])
        return changed

    with hooked(model, change):
        torch.testing.assert_close(inner, logits(model, tokens))


@pytest.mark.parametrize(
    ("edit", "changed"),
    [
        (steer(5, 2.0), lambda z: z + 2.0 * torch.eye(48)[5]),
        (ablate([1, 5]), lambda z: z * (1 - torch.eye(48)[1] - torch.eye(48)[5])),
        (clamp(5, 7.0), lambda z: z * (1 - torch.eye(48)[5]) + 7.0 * torch.eye(48)[5]),
        ([ablate([1]), steer(1, 2.0)], lambda z: z * (1 - torch.eye(48)[1]) + 2.0 * torch.eye(48)[1]),
    ],
)
def test_edits_move_the_residual(
    whole: Callable[..., Any], sae: NestedSAE, edit: Any, changed: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    """Each ready edit moves the residual by what the change of z decodes to, in raw units, and leaves z as encoded."""
    model, tokens = whole(), inputs()
    with attach(model, sae, LAYER, keep_error=True, edit=edit) as live:
        attached = logits(model, tokens)

    def change(residual: torch.Tensor) -> torch.Tensor:
        z = sae.encode(residual)
        moved = (sae.decode(changed(z)) - sae.decode(z)) * live.kept[..., None]  # type: ignore[index]
        assert torch.equal(z[:, 1:] * 1.0, live.latents[:, 1:])
        return residual + moved

    with hooked(model, change):
        torch.testing.assert_close(attached, logits(model, tokens), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["gemma2", "mixtral"])
def test_several_layers_at_once(whole: Callable[..., Any], kind: str, sae: NestedSAE) -> None:
    """SAEs on two layers see each other's effect, and both are gone at the end."""
    model, tokens = whole(kind), inputs()
    with attach(model, sae, 0) as first, attach(model, sae, 2) as second:
        both = logits(model, tokens)
        seen = second.latents
    with attach(model, sae, 2) as alone:
        logits(model, tokens)
    assert first.latents.any()
    assert not torch.equal(seen, alone.latents)
    assert not torch.equal(both, logits(model, tokens))
    assert not model._forward_pre_hooks


def test_sparse_latents_are_the_same(whole: Callable[..., Any], sae: NestedSAE) -> None:
    """The sparse tensor holds what the dense one holds."""
    model = whole()
    with attach(model, sae, LAYER) as live:
        logits(model, inputs())
    assert live.sparse_latents.is_sparse
    assert torch.equal(live.sparse_latents.to_dense(), live.latents)


@pytest.mark.parametrize("kind", ["gemma2", "mixtral"])
def test_gradients_reach_the_latents(whole: Callable[..., Any], kind: str, sae: NestedSAE) -> None:
    """∂logit/∂z with the error kept equals a finite difference of steering, and no logit changes."""
    model, tokens = whole(kind), inputs(1)
    before = logits(model, tokens)
    with attach(model, sae, LAYER, keep_error=True, gradients=True) as live:
        found = model(tokens).logits
        found[0, -1, 7].backward()
    assert torch.equal(found, before)
    assert live.z is not None
    assert live.z.grad is not None
    step, row = 1e-2, 4
    if kind == "mixtral":  # grouped products know no float64
        model.set_experts_implementation("eager")

    def nudged(by: float) -> torch.Tensor:
        def edit(z: torch.Tensor) -> torch.Tensor:
            changed = z.clone()
            changed[row, 5] += by
            return changed

        with attach(model.double(), sae.double(), LAYER, keep_error=True, edit=edit):
            return logits(model, tokens)[0, -1, 7]

    slope = (nudged(step) - nudged(-step)) / (2 * step)
    torch.testing.assert_close(live.z.grad[row, 5].double(), slope, rtol=2e-2, atol=1e-5)


def test_autocast_leaves_the_sae_alone(whole: Callable[..., Any], sae: NestedSAE) -> None:
    """Under autocast the SAE still computes in float32."""
    model = whole()
    with torch.autocast("cpu", torch.bfloat16), attach(model, sae, LAYER) as live:
        logits(model, inputs())
    assert live.z is not None
    assert live.z.dtype == torch.float32


def attached_badly(model: Any, sae: NestedSAE, **options: Any) -> Attached:
    """What should be refused."""
    return attach(model, sae, **({"layer": LAYER} | options))


@pytest.mark.parametrize(
    ("options", "message"),
    [({"layer": 9}, "layers 0 to"), ({"level": 2}, "levels 0 to 1"), ({"level": -3}, "levels 0")],
)
def test_bad_options_are_refused(
    whole: Callable[..., Any], sae: NestedSAE, options: dict[str, int], message: str
) -> None:
    """A layer or level that is not there is named."""
    with pytest.raises(UsageError, match=message):
        attached_badly(whole(), sae, **options)


def test_other_widths_are_refused(whole: Callable[..., Any]) -> None:
    """An SAE of another residual stream is refused before anything runs."""
    with pytest.raises(UsageError, match="residual stream of 32"):
        attached_badly(whole(), make_sae(d_model=32))


def test_gradients_need_autograd(whole: Callable[..., Any], sae: NestedSAE) -> None:
    """Asking for gradients under no_grad is refused."""
    model = whole()
    with attach(model, sae, LAYER, gradients=True), pytest.raises(UsageError, match="gradients are off"):
        logits(model, inputs())


def test_notebook_names_are_lazy() -> None:
    """`pipeline.attach` and the edits are what they are in their modules."""
    assert (pipeline.attach, pipeline.steer) == (attach, steer)
    assert (pipeline.ablate, pipeline.clamp) == (ablate, clamp)
