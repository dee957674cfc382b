"""SAELens and dictionary_learning folders, written by hand as their libraries write them, read as checkpoints."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import harvest.run
import pipeline
from evaluate.checkpoints.find import find_checkpoints, open_checkpoint, require_fit, require_module
from evaluate.run import EvaluateConfig, run
from pipeline.base.errors import CheckpointError, DamagedError, ModelError, PipelineError, UsageError
from pipeline.base.results import read_result
from pipeline.experiment.describe import describe
from pipeline.experiment.verify import verify
from pipeline.live.attach import attach
from pipeline.model.points import Point
from pipeline.model.split_lm import SplitLM
from pipeline.sae.export import FORMATS, export
from pipeline.sae.foreign.gemma_scope import behind_gain
from pipeline.sae.foreign.hooks import hook_point
from pipeline.sae.foreign.reader import load_foreign, load_sae, read_sae
from pipeline.store.reader import Store
from support import lm_stores, tiny_models
from support.harvests import harvest_config
from train.step.weights import named_by_content, path_of

D, F = 64, 96


def weights(seed: int = 0) -> dict[str, torch.Tensor]:
    """Random weights by our names: W_enc [d, F], W_dec [F, d]."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"W_enc": (D, F), "W_dec": (F, D), "b_enc": (F,), "b_dec": (D,)}
    return {name: 0.2 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def rows(seed: int = 1) -> torch.Tensor:
    return torch.randn(40, D, generator=torch.Generator().manual_seed(seed))


def saelens(folder: Path, tensors: dict[str, torch.Tensor], **cfg: Any) -> Path:
    folder.mkdir(parents=True)
    metadata = {"sae_lens_version": "6.54.12", "hook_name": "blocks.1.hook_resid_post", "model_name": "tiny"}
    plain = {"architecture": "standard", "d_in": D, "d_sae": F, "dtype": "float32", "metadata": metadata}
    (folder / "cfg.json").write_text(json.dumps(plain | cfg))
    save_file(tensors, folder / "sae_weights.safetensors")
    return folder


def dictionary(folder: Path, kind: str, state: Any, **trainer: Any) -> Path:
    folder.mkdir()
    about = {"dict_class": kind, "activation_dim": D, "dict_size": F, "layer": 1, "lm_name": "tiny"}
    (folder / "config.json").write_text(json.dumps({"trainer": about | trainer, "buffer": {"ctx_len": 16}}))
    torch.save(state, folder / "ae.pt")
    return folder


def linear_style(w: dict[str, torch.Tensor], bias: str = "bias") -> dict[str, torch.Tensor]:
    """nn.Linear names: encoder.weight [F, d], decoder.weight [d, F]."""
    return {"encoder.weight": w["W_enc"].T.clone(), "decoder.weight": w["W_dec"].T.clone()} | {
        "encoder.bias": w["b_enc"],
        bias: w["b_dec"],
    }


def same(folder: Path, z: torch.Tensor, w: dict[str, torch.Tensor]) -> None:
    """The folder's SAE has these latents on `rows()` and decodes them with W_dec and b_dec."""
    sae, _ = load_foreign(folder)
    torch.testing.assert_close(sae.encode(rows()), z, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(sae.decode(z), z @ w["W_dec"] + w["b_dec"], rtol=1e-4, atol=1e-5)


def centred(w: dict[str, torch.Tensor]) -> torch.Tensor:
    return (rows() - w["b_dec"]) @ w["W_enc"] + w["b_enc"]


def top(a: torch.Tensor, k: int) -> torch.Tensor:
    a = a.relu()
    return torch.where(a >= a.topk(k, dim=1).values[:, -1:], a, 0.0)


def test_saelens_standard_sae(tmp_path: Path) -> None:
    """A SAELens standard SAE computes the same here."""
    w = weights()
    same(saelens(tmp_path / "s", w), centred(w).relu(), w)


def test_saelens_without_b_dec_subtraction(tmp_path: Path) -> None:
    """A SAELens SAE that does not subtract b_dec is read as it is."""
    w = weights()
    same(saelens(tmp_path / "s", w, apply_b_dec_to_input=False), (rows() @ w["W_enc"] + w["b_enc"]).relu(), w)


def test_saelens_topk_sae(tmp_path: Path) -> None:
    """A SAELens TopK SAE computes the same here."""
    w = weights()
    same(saelens(tmp_path / "s", w, architecture="topk", k=7), top(centred(w), 7), w)


def test_saelens_jumprelu_sae(tmp_path: Path) -> None:
    """A SAELens JumpReLU SAE computes the same here."""
    w, threshold = weights(), torch.linspace(0, 1, F)
    a = centred(w)
    same(saelens(tmp_path / "s", w | {"threshold": threshold}, architecture="jumprelu"), a.relu() * (a > threshold), w)


def test_old_saelens_topk_is_topk(tmp_path: Path) -> None:
    """A folder of an old SAELens says topk in activation_fn_str: it is no ReLU."""
    w = weights()
    folder = saelens(tmp_path / "s", w, activation_fn_str="topk", activation_fn_kwargs={"k": 7}, hook_layer=1)
    same(folder, top(centred(w), 7), w)


def test_sparsify_sae(tmp_path: Path) -> None:
    """A sparsify SAE is a topk, and its folder names the hook."""
    w = weights()
    folder = tmp_path / "layers.1"
    folder.mkdir()
    (folder / "cfg.json").write_text(json.dumps({"k": 9, "d_in": D, "num_latents": F, "multi_topk": False}))
    tensors = {"encoder.weight": w["W_enc"].T.contiguous(), "encoder.bias": w["b_enc"]}
    save_file(tensors | {"W_dec": w["W_dec"], "b_dec": w["b_dec"]}, folder / "sae.safetensors")
    same(folder, top(centred(w), 9), w)
    assert load_foreign(folder)[1]["store"] == {"hook": "resid_post", "layer": 1}
    assert load_foreign(folder.rename(tmp_path / "run-2024"))[1]["store"] == {}
    with pytest.raises(CheckpointError, match=r"made for 'transformer.wte'"):
        load_foreign((tmp_path / "run-2024").rename(tmp_path / "transformer.wte"))
    (tmp_path / "transformer.wte" / "cfg.json").write_text(json.dumps({"k": 9, "d_in": D, "expansion_factor": 2}))
    with pytest.raises(CheckpointError, match="W_enc should be floats of shape"):
        load_foreign(tmp_path / "transformer.wte")


def test_gemma_scope_sae(tmp_path: Path) -> None:
    """A Gemma Scope SAE is a jumprelu that does not subtract b_dec, and its path names layer and hook."""
    w, threshold = weights(), torch.linspace(0, 1, F)
    folder = tmp_path / "gemma-scope-2b-pt-res" / "layer_20" / "width_16k" / "average_l0_71"
    folder.mkdir(parents=True)
    np.savez(folder / "params.npz", **{name: t.numpy() for name, t in (w | {"threshold": threshold}).items()})
    a = rows() @ w["W_enc"] + w["b_enc"]
    same(folder, a.relu() * (a > threshold), w)
    provenance = load_foreign(folder)[1]
    assert provenance["store"] == {"model": "gemma-2-2b", "hook": "resid_post", "layer": 20}
    assert provenance["member"] == "width_16k-average_l0_71"


def test_dictionary_learning_autoencoder(tmp_path: Path) -> None:
    """A dictionary_learning autoencoder computes the same here."""
    w = weights()
    same(dictionary(tmp_path / "d", "AutoEncoder", linear_style(w)), centred(w).relu(), w)


def test_dictionary_learning_topk_sae(tmp_path: Path) -> None:
    """A dictionary_learning TopK SAE computes the same here."""
    w = weights()
    state = linear_style(w, "b_dec") | {"k": torch.tensor(5), "threshold": torch.tensor(-1.0)}
    same(dictionary(tmp_path / "d", "AutoEncoderTopK", state), top(centred(w), 5), w)


def test_matryoshka_groups_become_levels(tmp_path: Path) -> None:
    """A dictionary_learning Matryoshka SAE keeps its groups as levels."""
    w = weights()
    state = w | {"threshold": torch.tensor(0.3), "k": torch.tensor(20), "group_sizes": torch.tensor([16, 32, 48])}
    folder = dictionary(tmp_path / "d", "MatryoshkaBatchTopKSAE", state)
    a = centred(w).relu()
    same(folder, a * (a > 0.3), w)
    assert load_foreign(folder)[0].config.levels == (16, 48, 96)


def test_jumprelu_without_b_dec_subtraction(tmp_path: Path) -> None:
    """A dictionary_learning JumpReLU SAE does not subtract b_dec."""
    w, threshold = weights(), torch.full((F,), 0.25)
    a = rows() @ w["W_enc"] + w["b_enc"]
    same(dictionary(tmp_path / "d", "JumpReluAutoEncoder", w | {"threshold": threshold}), a.relu() * (a > threshold), w)


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        ({"architecture": "temporal"}, "architecture 'temporal' cannot be read"),
        ({"rescale_acts_by_decoder_norm": True}, "rescale_acts_by_decoder_norm 'relu' cannot be read"),
        ({"normalize_activations": "expected_average_only_in"}, "normalize_activations 'expected_average"),
        ({"metadata": {"hook_name": "blocks.1.attn.hook_q"}}, "made for 'blocks.1.attn.hook_q'"),
        ({"activation_fn_str": "tanh-relu"}, "activation_fn_str 'tanh-relu' cannot be read"),
        ({"finetuning_scaling_factor": True}, "finetuning_scaling_factor 'True' cannot be read"),
        ({"metadata": {"hook_head_index": 3}}, "hook_head_index '3' cannot be read"),
        ({"temperature": 2.0}, "cfg.json says 'temperature'"),
        ({"d_sae": F + 1}, "W_enc should be floats of shape"),
        ({"activation_fn_str": "topk", "activation_fn_kwargs": {"k": F + 1}}, "topk cannot keep k"),
        ({"activation_fn": "topk"}, "topk needs k of at least 1"),
        ({"activation_fn": "relu", "activation_fn_str": "topk"}, "two activations"),
        ({"architecture": "topk", "k": 7, "activation_fn_kwargs": {"k": 9}}, "k of activation_fn_kwargs '9'"),
        ({"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 7, "postact_fn": "id"}}, "says 'postact_fn'"),
        ({"hook_name": "blocks.2.hook_resid_post"}, "hook_name .beside its metadata's. 'blocks.2.hook_resid_post'"),
        ({"model_name": "other"}, "model_name .beside its metadata's. 'other'"),
        ({"hook_layer": 2}, "hook_layer .of blocks.1.hook_resid_post. '2'"),
        (
            {"metadata": {"hook_name": "blocks.1.mlp.hook_in", "hook_name_out": "blocks.1.hook_mlp_out"}},
            "hook_name_out",
        ),
    ],
)
def test_what_cannot_be_expressed_is_refused(tmp_path: Path, cfg: dict[str, Any], message: str) -> None:
    """What cannot be expressed is refused."""
    with pytest.raises(CheckpointError, match=message):
        load_foreign(saelens(tmp_path / "s", weights(), **cfg))


def test_activation_fn_is_an_activation(tmp_path: Path) -> None:
    """A folder that says topk in activation_fn, as SAELens itself renames activation_fn_str, is a topk."""
    w = weights()
    same(saelens(tmp_path / "s", w, activation_fn="topk", activation_fn_kwargs={"k": 7}), top(centred(w), 7), w)
    same(saelens(tmp_path / "t", w, normalize_activations=False, activation_fn="relu"), centred(w).relu(), w)


def test_gated_sae_is_a_jumprelu(tmp_path: Path) -> None:
    """A gated SAE fires where its gate opens, with its own magnitude, of either library."""
    w = weights()
    gate, magnitude, gain = (0.3 * torch.randn(F, generator=torch.Generator().manual_seed(i)) for i in (5, 6, 7))
    u = (rows() - w["b_dec"]) @ w["W_enc"]
    z = (u * gain.exp() + magnitude).relu() * (u + gate > 0)
    plain = {name: w[name] for name in ("W_enc", "W_dec", "b_dec")}
    parts = {"b_gate": gate, "b_mag": magnitude, "r_mag": gain}
    same(saelens(tmp_path / "s", plain | parts, architecture="gated"), z, w)
    state = {"encoder.weight": w["W_enc"].T.clone(), "decoder.weight": w["W_dec"].T.clone(), "decoder_bias": w["b_dec"]}
    state |= {"r_mag": gain, "gate_bias": gate, "mag_bias": magnitude}
    same(dictionary(tmp_path / "d", "GatedAutoEncoder", state), z, w)


def test_saelens_training_folder_keeps_its_levels(tmp_path: Path) -> None:
    """A SAELens trainer's Matryoshka folder has levels, its threshold, and latents times the norms of decoder rows."""
    w, threshold = weights(), torch.tensor(0.4, dtype=torch.double)
    norm = w["W_dec"].norm(dim=1)
    options = {"k": 7.5, "matryoshka_widths": [32, F], "rescale_acts_by_decoder_norm": True}
    folder = saelens(tmp_path / "s", w | {"topk_threshold": threshold}, architecture="matryoshka_batchtopk", **options)
    z = centred(w).relu() * norm
    same(folder, torch.where(z > 0.4, z, 0.0), w | {"W_dec": w["W_dec"] / norm[:, None]})
    assert load_foreign(folder)[0].config.levels == (32, F)


def gemma_scope_2(folder: Path, w: dict[str, torch.Tensor], **cfg: Any) -> Path:
    """A folder as Gemma Scope 2 has them; without a config where none is given."""
    folder.mkdir(parents=True)
    lower = {name.lower(): tensor for name, tensor in w.items()}
    save_file(lower | {"threshold": torch.linspace(0, 1, F)}, folder / "params.safetensors")
    if cfg:
        (folder / "config.json").write_text(
            json.dumps({"architecture": "jump_relu", "model_name": "gemma-v3-1b-pt"} | cfg)
        )
    return folder


def test_gemma_scope_2_sae(tmp_path: Path) -> None:
    """A Gemma Scope 2 SAE is a jumprelu that does not subtract b_dec; config or path say where it sits."""
    w = weights()
    a = rows() @ w["W_enc"] + w["b_enc"]
    z = a.relu() * (a > torch.linspace(0, 1, F))
    told = gemma_scope_2(tmp_path / "told", w, hf_hook_point_in="model.layers.7.output", hf_hook_point_out=None)
    same(told, z, w)
    assert load_foreign(told)[1]["store"] == {"model": "gemma-3-1b-pt", "hook": "resid_post", "layer": 7}
    named = gemma_scope_2(tmp_path / "resid_post" / "layer_22_width_16k_l0_small", w)
    same(named, z, w)
    assert load_foreign(named)[1]["store"] == {"hook": "resid_post", "layer": 22}


def transcoded(folder: Path, z: torch.Tensor, y: torch.Tensor, store: dict[str, Any]) -> None:
    """The folder's transcoder has these latents on `rows()`, makes these rows of them, and says so where it is from."""
    sae, provenance = load_foreign(folder)
    assert sae.config.is_transcoder
    torch.testing.assert_close(sae.encode(rows()), z, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(sae.decode(z, rows()), y, rtol=1e-4, atol=1e-5)
    assert provenance["store"] == store


MLP = {
    "hf_hook_point_in": "model.layers.7.pre_feedforward_layernorm.output",
    "hf_hook_point_out": "model.layers.7.post_feedforward_layernorm.output",
}


@pytest.mark.parametrize("affine", [False, True])
def test_gemma_scope_2_transcoder(tmp_path: Path, affine: bool) -> None:
    """A Gemma Scope 2 transcoder goes from what the MLP reads to what it adds; config or path say so; affine ones have x W."""
    w = weights()
    a = rows() @ w["W_enc"] + w["b_enc"]
    z = a.relu() * (a > torch.linspace(0, 1, F))
    skip = torch.randn(D, D, generator=torch.Generator().manual_seed(9))
    y = z @ w["W_dec"] + w["b_dec"] + (rows() @ skip if affine else 0)
    held = w | ({"affine_skip_connection": skip} if affine else {})
    made = {"hook": "mlp_out", "layer": 7}
    place = {"hook": "mlp_in", "layer": 7}
    told = gemma_scope_2(tmp_path / "told", held, **MLP, affine_connection=affine)
    module = {"module": "post_feedforward_layernorm"}
    target = load_foreign(told)[1]["store"]["target"]
    assert target | made | module == target
    transcoded(told, z, y, {"model": "gemma-3-1b-pt", **place, "target": target})
    named = gemma_scope_2(tmp_path / "transcoder_all" / "layer_7_width_16k_l0_big", held)
    transcoded(named, z, y, place | {"target": made})


def scope_transcoder(folder: Path, layer: int = 1) -> tuple[Path, dict[str, torch.Tensor]]:
    """A Gemma Scope transcoder's folder, and its tensors."""
    place = folder / "gemma-scope-2b-pt-transcoders" / f"layer_{layer}" / "width_16k" / "average_l0_76"
    place.mkdir(parents=True)
    w = weights() | {"threshold": torch.linspace(0, 1, F)}
    np.savez(place / "params.npz", **{name: t.numpy() for name, t in w.items()})
    return place, w


def test_gemma_scope_transcoder(tmp_path: Path) -> None:
    """A Gemma Scope transcoder, told from an SAE by its release alone, reads a norm before its gain, and says so."""
    folder, w = scope_transcoder(tmp_path, 5)
    a = rows() @ w["W_enc"] + w["b_enc"]
    z = a.relu() * (a > w["threshold"])
    target = {"layer": 5, "hook": "mlp_out"}
    place = {"model": "gemma-2-2b", "layer": 5, "hook": "ln2.hook_normalized", "target": target}
    transcoded(folder, z, z @ w["W_dec"] + w["b_dec"], place)


def normed(x: torch.Tensor) -> torch.Tensor:
    """RMS norm without a gain, in float64."""
    x = x.double()
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def test_scope_transcoder_in_a_model(tmp_path: Path) -> None:
    """Attached, it takes the MLP's place: latents, of the normed stream before the gain, and logits are those of plain hooks."""
    folder, w = scope_transcoder(tmp_path)
    model = tiny_models.whole_model(tiny_models.make_model(tmp_path / "m", "gemma2"), torch.float32)
    layer, seen = model.model.layers[1], []

    def made(_module: Any, _args: Any, out: torch.Tensor) -> torch.Tensor:
        a = normed(seen[-1]) @ w["W_enc"].double() + w["b_enc"]
        seen.append(a.relu() * (a > w["threshold"]))
        y = (seen[-1] @ w["W_dec"].double() + w["b_dec"]).float()
        return torch.cat([out[:, :1], y[:, 1:]], 1)  # the first position is left alone

    tokens = tiny_models.tokens(2, 12)
    hooks = [
        layer.pre_feedforward_layernorm.register_forward_pre_hook(lambda _m, args: seen.append(args[0])),
        layer.post_feedforward_layernorm.register_forward_hook(made),
    ]
    with torch.no_grad():
        want = model(tokens).logits
        for hook in hooks:
            hook.remove()
        with attach(model, pipeline.load(folder)) as live:
            found = model(tokens).logits
        untouched = model(tokens).logits
    torch.testing.assert_close(live.latents[:, 1:].double(), seen[-1][:, 1:], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-4)
    assert (want - untouched).abs().max() > 0.1


def test_scope_transcoder_needs_its_norm(tmp_path: Path) -> None:
    """A model without Gemma's norm, and a gain that hides a dimension, are refused in a line."""
    sae = pipeline.load(scope_transcoder(tmp_path)[0])
    other = tiny_models.whole_model(tiny_models.make_model(tmp_path / "llama", "llama"), torch.float32)
    with pytest.raises(ModelError, match="has no such norm before its MLP"):
        attach(other, sae)
    gain = torch.zeros(D)
    gain[3] = -1
    with pytest.raises(CheckpointError, match="a gain of 0 in 1 dimensions"):
        behind_gain(sae, gain)


def saelens_transcoder(folder: Path, w: dict[str, torch.Tensor], kind: str, **cfg: Any) -> Path:
    """A transcoder's folder as SAELens writes it; b_dec and W_dec of D."""
    names = {"hook_name": "blocks.1.mlp.hook_in", "hook_name_out": "blocks.1.hook_mlp_out"}
    plain = {"architecture": kind, "d_out": D, "apply_b_dec_to_input": False, "metadata": names}
    return saelens(folder, w, **(plain | cfg))


@pytest.mark.parametrize("kind", ["transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder"])
def test_saelens_transcoder(tmp_path: Path, kind: str) -> None:
    """A SAELens transcoder subtracts no b_dec; its skip connection is [d_out, d_in], its threshold on pre-activations."""
    w, threshold = weights(), torch.linspace(0, 1, F)
    skip = torch.randn(D, D, generator=torch.Generator().manual_seed(9))
    a = rows() @ w["W_enc"] + w["b_enc"]
    z = a.relu() * (a > threshold) if "jumprelu" in kind else a.relu()
    y = z @ w["W_dec"] + w["b_dec"] + (rows() @ skip.T if "skip" in kind else 0)
    held = w | ({"threshold": threshold} if "jumprelu" in kind else {}) | ({"W_skip": skip} if "skip" in kind else {})
    store = {"hook": "mlp_in", "layer": 1, "target": {"hook": "mlp_out", "layer": 1}}
    transcoded(saelens_transcoder(tmp_path / "s", held, kind), z, y, store)


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        ({"apply_b_dec_to_input": True}, "apply_b_dec_to_input .of a transcoder. 'True' cannot be read"),
        ({"d_out": D + 1}, f"d_out '{D}' cannot be read"),
        ({"metadata": {"hook_name": "blocks.1.ln2.hook_normalized"}}, "inside a norm, before its gain"),
        ({"metadata": {"hook_head_index_out": 2}}, "hook_head_index_out '2' cannot be read"),
        ({"architecture": "clt"}, "architecture 'clt' cannot be read"),
    ],
)
def test_odd_transcoders_are_refused(tmp_path: Path, cfg: dict[str, Any], message: str) -> None:
    """A transcoder's folder that says what cannot be computed, or placed, is refused by name."""
    with pytest.raises(CheckpointError, match=message):
        load_foreign(saelens_transcoder(tmp_path / "s", weights(), "transcoder", **cfg))


@pytest.mark.parametrize("skips", [False, True])
def test_sparsify_transcoder(tmp_path: Path, skips: bool) -> None:
    """A sparsify transcoder goes from its module's input to its output; which module's the point is, the model says."""
    w = weights()
    skip = torch.randn(D, D, generator=torch.Generator().manual_seed(9))
    folder = tmp_path / "layers.1.mlp"
    folder.mkdir()
    cfg = {"k": 9, "d_in": D, "num_latents": F, "expansion_factor": 2, "transcode": True, "skip_connection": skips}
    (folder / "cfg.json").write_text(json.dumps(cfg))
    tensors = {"encoder.weight": w["W_enc"].T.contiguous(), "encoder.bias": w["b_enc"]}
    more = {"W_dec": w["W_dec"], "b_dec": w["b_dec"]} | ({"W_skip": skip} if skips else {})
    save_file(tensors | more, folder / "sae.safetensors")
    z = top(rows() @ w["W_enc"] + w["b_enc"], 9)
    store = load_foreign(folder)[1]["store"]
    assert store["target"]["module"] == "mlp"
    y = z @ w["W_dec"] + w["b_dec"] + (rows() @ skip.T if skips else 0)
    transcoded(folder, z, y, {"hook": "mlp_in", "layer": 1, "target": store["target"]})
    gemma2 = tiny_models.whole_model(tiny_models.make_model(tmp_path / "m", "gemma2"), torch.float32)
    with pytest.raises(UsageError, match="the SAE is of the output of 'mlp'"):
        attach(gemma2, pipeline.load(folder))


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        ({"hf_hook_point_in": "a", "hf_hook_point_out": "b"}, "made for 'b', a hook that is not known"),
        ({"affine_connection": True}, "affine_connection 'True'"),
        (MLP | {"affine_connection": True}, "affine_connection 'True'"),
        ({"hf_hook_point_in": MLP["hf_hook_point_in"]}, "cannot be placed"),
        ({"architecture": "topk"}, "architecture 'topk'"),
        ({"hf_hook_point_in": "model.layers.3.self_attn.o_proj.input"}, "cannot be placed"),
        ({"hf_hook_point_in": "model.layers.3.output", "width": F + 1}, "W_enc should be floats"),
        ({"hf_hook_point_in": "model.layers.3.output", "type": "crosscoder"}, "type 'crosscoder' cannot be read"),
        ({"hf_hook_point_in": "model.layers.3.output", "input_norm": "rms"}, "config.json says 'input_norm'"),
    ],
)
def test_odd_gemma_scope_2_is_refused(tmp_path: Path, cfg: dict[str, Any], message: str) -> None:
    """What sits at no point of ours, or says otherwise than its tensors, is refused by name."""
    with pytest.raises(CheckpointError, match=message):
        load_foreign(gemma_scope_2(tmp_path / "g", weights(), **cfg))


def openai(folder: Path, w: dict[str, torch.Tensor], **settings: Any) -> Path:
    """A state dict as OpenAI's Autoencoder saves it: settings among its tensors."""
    folder.mkdir()
    state = {"encoder.weight": w["W_enc"].T.clone(), "decoder.weight": w["W_dec"].T.clone(), "pre_bias": w["b_dec"]}
    state |= {"latent_bias": w["b_enc"], "stats_last_nonzero": torch.zeros(F, dtype=torch.long)}
    torch.save(state | settings, folder / "autoencoder.pt")
    return folder


def test_openai_sae(tmp_path: Path) -> None:
    """OpenAI's ReLU autoencoder is read; one of settings that nobody knows is refused by name."""
    w = weights()
    same(openai(tmp_path / "o", w, activation="ReLU", activation_state_dict={}), centred(w).relu(), w)
    with pytest.raises(CheckpointError, match=r"autoencoder.pt says 'normalize'"):
        load_foreign(openai(tmp_path / "n", w, activation="ReLU", normalize=True))


def matryoshka_sae(folder: Path, w: dict[str, torch.Tensor], **cfg: Any) -> Path:
    """A folder as bartbussmann's trainers save it: lists in the config are text."""
    folder.mkdir()
    about = {"sae_type": "global-matryoshka-topk", "group_sizes": "[32, 64]", "top_k": 9, "input_unit_norm": False}
    about |= {"act_size": D, "hook_point": "blocks.8.hook_resid_pre", "model_name": "gpt2-small"}
    (folder / "config.json").write_text(json.dumps(about | cfg))
    torch.save(w | {"threshold": torch.tensor(0.5)}, folder / "sae.pt")
    return folder


def test_matryoshka_sae_folder(tmp_path: Path) -> None:
    """Groups become levels, b_enc is not used but by vanilla, and the hook before layer 8 is that after layer 7."""
    w = weights()
    u = (rows() - w["b_dec"]) @ w["W_enc"]
    folder = matryoshka_sae(tmp_path / "m", w)
    same(folder, torch.where(u > 0.5, u, 0.0), w)
    sae, provenance = load_foreign(folder)
    assert (sae.config.levels, sae.config.k) == ((32, 96), 9)
    assert provenance["store"] == {"model": "gpt2-small", "hook": "resid_post", "layer": 7}
    same(matryoshka_sae(tmp_path / "t", w, sae_type="topk"), top(u, 9), w)
    same(matryoshka_sae(tmp_path / "v", w, sae_type="vanilla"), centred(w).relu(), w)


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        ({"input_unit_norm": None}, "input_unit_norm 'None' cannot be read"),
        ({"sae_type": "jumprelu"}, "sae_type 'jumprelu' cannot be read"),
        ({"group_sizes": "[32, 99]"}, "levels|do not agree"),
        ({"group_sizes": "many"}, "group_sizes"),
        ({"act_size": 7}, "W_enc should be floats"),
        ({"dict_size": 7}, "W_enc should be floats"),
        ({"layer": 7}, "layer .beside blocks.8.hook_resid_pre. '7'"),
        ({"tied_weights": True}, "tied_weights 'True' cannot be read"),
        ({"input_scale": 2.0}, "config.json says 'input_scale'"),
    ],
)
def test_other_matryoshka_saes_are_refused(tmp_path: Path, cfg: dict[str, Any], message: str) -> None:
    """Other settings, other trainers and sizes that do not add up are refused in one line."""
    with pytest.raises(PipelineError, match=message):
        load_foreign(matryoshka_sae(tmp_path / "m", weights(), **cfg))


@pytest.mark.slow
@pytest.mark.skipif("PEERS_PYTHON" not in os.environ, reason="PEERS_PYTHON names no environment with the peers")
def test_folders_of_their_own_libraries(tmp_path: Path) -> None:
    """SAEs that SAELens, dictionary_learning and sparsify made and saved encode and decode as they do themselves."""
    script = Path(__file__).parent / "peers" / "make_foreign.py"
    subprocess.run([os.environ["PEERS_PYTHON"], script, tmp_path], check=True, capture_output=True)
    made = sorted(tmp_path.glob("*/reference.safetensors"))
    assert len(made) >= 19
    for reference in made:
        (folder,) = (reference.parent / "sae").iterdir()
        expected, (sae, about) = load_file(reference), load_foreign(folder)
        if sae.config.is_transcoder:
            assert (about["store"]["hook"], about["store"]["target"]["hook"]) == ("mlp_in", "mlp_out")
        for name, found in (("z", sae.encode(expected["x"])), ("x_hat", sae.decode(expected["z"], expected["x"]))):
            error = float((found - expected[name]).norm() / expected[name].norm())
            assert error < 1e-6, (reference.parent.name, name, error)
        assert (expected["z"] != 0).any()


TOPK = {"k": torch.tensor(5), "threshold": torch.tensor(-1.0)}
NESTED = {"k": torch.tensor(5), "threshold": torch.tensor(0.3), "group_sizes": torch.tensor([16, 80])}


@pytest.mark.parametrize(
    ("kind", "state", "trainer", "message"),
    [
        ("AutoEncoder", {"threshold": torch.tensor(0.3)}, {}, r"tensors \['threshold'\] are not known"),
        ("AutoEncoder", {"b_dec": torch.zeros(D)}, {}, r"tensors \['b_dec'\] are not known"),
        ("AutoEncoderTopK", TOPK, {"k": 6}, "k of config.json's trainer '6' cannot be read; known are 5"),
        ("AutoEncoder", {}, {"normalize_activations": True}, "trainer says 'normalize_activations'"),
        ("AutoEncoder", {}, {"submodule_name": "resid_post_layer_2"}, "layer .beside resid_post_layer_2. '1'"),
        ("AutoEncoder", {}, {"submodule_name": "embed", "layer": None}, "made for 'embed_layer_1'"),
        ("JumpReluAutoEncoder", {}, {}, "has no tensor 'threshold'"),
        ("MatryoshkaBatchTopKSAE", NESTED | {"group_sizes": torch.tensor([16.0, 80.0])}, {}, "should be whole numbers"),
        ("MatryoshkaBatchTopKSAE", TOPK, {}, "has no tensor 'group_sizes'"),
    ],
)
def test_odd_dictionaries_are_refused(
    tmp_path: Path, kind: str, state: dict[str, Any], trainer: dict[str, Any], message: str
) -> None:
    """Tensors that a class does not have, or misses, and settings that nobody knows or that disagree are refused by name."""
    style = linear_style(weights(), "b_dec" if "TopK" in kind else "bias")
    folder = dictionary(tmp_path / "d", kind, style | state, **trainer)
    with pytest.raises(CheckpointError, match=message):
        load_foreign(folder)


@pytest.mark.parametrize("io", ["in", "in_and_out"])
def test_inputs_of_modules_are_refused(tmp_path: Path, io: str) -> None:
    """A dictionary of what a module reads is none of its output."""
    folder = dictionary(tmp_path / "d", "AutoEncoder", linear_style(weights()))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"buffer": {"io": io}}))
    with pytest.raises(CheckpointError, match=f"io of its buffer '{io}' cannot be read"):
        load_foreign(folder)


def test_hook_without_layer_is_compared(tmp_path: Path, tiny_store: Path) -> None:
    """A submodule without its layer still says the hook."""
    told = dictionary(tmp_path / "d", "AutoEncoder", linear_style(weights()), submodule_name="mlp_out", layer=None)
    with pytest.raises(CheckpointError, match="trained on hook 'mlp_out'"):
        require_fit(open_checkpoint(told), Store.open(tiny_store), allow_other_model=True)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_must_be_finite(tmp_path: Path, bad: float) -> None:
    """Weights that are no numbers are damage, found before anything is computed; a threshold that nothing passes is none."""
    w = weights()
    w["W_dec"][3, 5] = bad
    with pytest.raises(DamagedError, match=r"sae_weights.safetensors: W_dec holds numbers that are not finite"):
        load_foreign(saelens(tmp_path / "s", w))
    kept = weights() | {"threshold": torch.full((F,), torch.inf)}
    assert int((load_foreign(saelens(tmp_path / "t", kept, architecture="jumprelu"))[0].encode(rows()) != 0).sum()) == 0


def test_weights_of_other_names_refused(tmp_path: Path) -> None:
    """Weights under a name that no format has, as OpenAI publishes them, are told what to be called."""
    torch.save({"W_enc": torch.zeros(2, 2)}, tmp_path / "8.pt")
    for read in (read_sae, load_sae, pipeline.load, lambda path: describe(str(path))):
        with pytest.raises(CheckpointError, match=r"8\.pt: .*autoencoder\.pt \(OpenAI\)"):
            read(tmp_path / "8.pt")


def test_two_weights_are_refused(tmp_path: Path) -> None:
    """A folder with the weights of two trainers says nothing of which is meant."""
    folder = saelens(tmp_path / "s", weights())
    save_file(weights(), folder / "sae.safetensors")
    with pytest.raises(
        CheckpointError, match=r"holds sae_weights.safetensors .SAELens. and sae.safetensors .sparsify.;"
    ):
        load_foreign(folder)


def test_other_revisions_are_other_models(tmp_path: Path, tiny_store: Path) -> None:
    """A revision, or another option that makes other rows of the same name, is compared with the store as the model is."""
    store = Store.open(tiny_store)
    for i, (options, says) in enumerate(
        [
            ({"revision": "step1000"}, "trained on revision 'step1000'"),
            ({"checkpoint_index": 3}, "with checkpoint_index 3'"),
        ]
    ):
        about = {"hook_name": "blocks.3.hook_resid_post", "model_name": Path(store.config["model"]).name}
        plain = open_checkpoint(saelens(tmp_path / f"p{i}", weights(), metadata=about))
        require_fit(plain, store)
        other = about | {"model_from_pretrained_kwargs": options | {"n_devices": 2}}
        checkpoint = open_checkpoint(saelens(tmp_path / f"o{i}", weights(), metadata=other))
        with pytest.raises(CheckpointError, match=says + r".*--allow-other-model"):
            require_fit(checkpoint, store)
        require_fit(checkpoint, store, allow_other_model=True)


@pytest.mark.parametrize(
    ("path", "hook"),
    [
        ("gemma-scope-2b-pt-res/embedding/width_4k/average_l0_6", "embedding, before its scale"),
        ("gemma-scope-9b-it-att/layer_3/width_16k/average_l0_9", "attn.hook_z"),
    ],
)
def test_gemma_scopes_other_points(tmp_path: Path, path: str, hook: str) -> None:
    """Gemma Scope's SAEs of the embedding and of attention's heads are of none of our points; their release names the model."""
    (tmp_path / path).mkdir(parents=True)
    np.savez(
        tmp_path / path / "params.npz", **{n: t.numpy() for n, t in (weights() | {"threshold": torch.ones(F)}).items()}
    )
    store = load_foreign(tmp_path / path)[1]["store"]
    assert store["hook"] == hook
    assert store["model"] == ("gemma-2-2b" if "2b-pt" in path else "gemma-2-9b-it")


def test_gemma_scope_2_attention(tmp_path: Path) -> None:
    """Without a config, the path of Gemma Scope 2's attention is not the stream's."""
    folder = gemma_scope_2(tmp_path / "attn_out" / "layer_22_width_16k_l0_small", weights())
    assert load_foreign(folder)[1]["store"] == {"hook": "attn.hook_z", "layer": 22}


def test_batchtopk_without_threshold_is_refused(tmp_path: Path) -> None:
    """A BatchTopK SAE without a threshold is refused."""
    state = linear_style(weights(), "b_dec") | {"k": torch.tensor(5), "threshold": torch.tensor(-1.0)}
    with pytest.raises(CheckpointError, match="its threshold was never set"):
        load_foreign(dictionary(tmp_path / "d", "BatchTopKSAE", state))


def test_disagreeing_tensors_are_refused(tmp_path: Path) -> None:
    """Tensors that do not agree with the config are refused."""
    with pytest.raises(CheckpointError, match="config and tensors do not agree"):
        load_foreign(saelens(tmp_path / "s", weights() | {"b_enc": torch.zeros(3)}))


class Evil:
    """Unpickling this would run code."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return (print, ("code from a pickle ran",))


def test_no_code_of_a_pickle_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No code of a pickle runs."""
    folder = dictionary(tmp_path / "d", "AutoEncoder", {"encoder.weight": Evil()})
    with pytest.raises(DamagedError, match=r"ae\.pt: cannot be read"):
        load_foreign(folder)
    assert "ran" not in capsys.readouterr().out


def test_foreign_sae_is_evaluated_beside_ours(tmp_path: Path) -> None:
    """An SAE made elsewhere is evaluated beside ours."""
    store = lm_stores.make_lm_store(tmp_path, eval_sequences=4)
    lm_stores.save_member(tmp_path / "all", store, lm_stores.make_sae(store))
    saelens(tmp_path / "all" / "theirs", weights(), metadata={"hook_name": "model.layers.1", "model_name": "Model"})
    outcome = run(EvaluateConfig(store.path, tmp_path / "out", scores=("ev", "l0")), [tmp_path / "all"])
    assert not outcome.failed
    ours, theirs = (read_result(Path(entry["path"])) for entry in outcome.results)
    assert theirs["checkpoint"]["provenance"]["source"] == "SAELens"
    assert theirs["curve"] == {}
    assert theirs["levels"][0]["scores"].keys() == ours["levels"][1]["scores"].keys() - {"dead_in_training"}


def test_sae_of_another_layer_is_refused(tmp_path: Path, tiny_store: Path) -> None:
    """An SAE of another layer is refused."""
    folder = saelens(tmp_path / "s", weights(), metadata={"hook_name": "blocks.4.hook_resid_pre"})
    require_fit(open_checkpoint(folder), Store.open(tiny_store))  # resid_pre 4 is resid_post 3
    folder = saelens(tmp_path / "t", weights(), metadata={"hook_name": "blocks.4.hook_resid_post"})
    with pytest.raises(CheckpointError, match=r"trained on layer 4, store .* has 3"):
        require_fit(open_checkpoint(folder), Store.open(tiny_store))


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"hook_name": "blocks.3.hook_mlp_out"}, "trained on hook 'mlp_out', store .* has 'resid_post'"),
        (
            {"hook_name": "blocks.3.hook_resid_post", "model_name": "other"},
            "trained on model 'other'.*--allow-other-model",
        ),
    ],
)
def test_other_hook_or_model_is_refused(
    tmp_path: Path, tiny_store: Path, metadata: dict[str, Any], message: str
) -> None:
    """An SAE of another hook or model is refused; another model may be meant."""
    checkpoint, store = open_checkpoint(saelens(tmp_path / "s", weights(), metadata=metadata)), Store.open(tiny_store)
    with pytest.raises(CheckpointError, match=message):
        require_fit(checkpoint, store)
    if "model_name" in metadata:
        require_fit(checkpoint, store, allow_other_model=True)


PLACED = [
    ("blocks.4.hook_resid_pre", {"hook": "resid_post", "layer": 3}),
    ("blocks.0.hook_resid_pre", {"hook": "embed"}),
    ("blocks.3.hook_resid_mid", {"hook": "resid_mid", "layer": 3}),
    ("blocks.3.hook_mlp_out", {"hook": "mlp_out", "layer": 3}),
    ("blocks.3.hook_attn_out", {"hook": "attn_out", "layer": 3}),
    ("blocks.3.mlp.hook_in", {"hook": "mlp_in", "layer": 3}),
    ("model.layers.3", {"hook": "resid_post", "layer": 3}),
    ("model.language_model.layers.3.output", {"hook": "resid_post", "layer": 3}),
    ("model.layers.3.mlp", {"hook": "mlp_out", "layer": 3, "module": "mlp", "called": "model.layers.3.mlp"}),
    ("transformer.h.3.attn", {"hook": "attn_out", "layer": 3, "module": "attn", "called": "transformer.h.3.attn"}),
    ("mlp_out_layer_3", {"hook": "mlp_out", "layer": 3, "module": "mlp", "called": "mlp_out_layer_3"}),
    (
        "attention_out_layer_3",
        {"hook": "attn_out", "layer": 3, "module": "self_attn|attn|attention", "called": "attention_out_layer_3"},
    ),
    ("resid_post_layer_3", {"hook": "resid_post", "layer": 3}),
]


@pytest.mark.parametrize(("name", "about"), PLACED, ids=[name for name, _ in PLACED])
def test_same_points_have_one_name(name: str, about: dict[str, Any]) -> None:
    """Names of TransformerLens, transformers and dictionary_learning for one point mean that point."""
    assert hook_point(Path("s"), name) == about


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("blocks.3.hook_mlp_in", "the MLP's own copy of resid_mid, before its norm"),
        ("blocks.3.ln2.hook_normalized", "inside a norm, before its gain"),
        ("blocks.3.attn.hook_z", "inside attention, before its output matrix"),
        ("blocks.3.mlp.hook_post", "inside the MLP"),
        ("hook_embed", "a part of the embedding"),
        ("model.layers.3.mlp.input", "not known here"),
        ("model.layers.3.self_attn.o_proj", "not known here"),
    ],
)
def test_other_points_are_refused(name: str, says: str) -> None:
    """A point that none of ours equals is refused by its name, saying what it is."""
    with pytest.raises(CheckpointError, match=f"made for {re.escape(repr(name))}, a hook that is {re.escape(says)}"):
        hook_point(Path("s"), name)


def test_centred_rows_are_other_rows(tmp_path: Path, tiny_store: Path) -> None:
    """An SAE of rows that TransformerLens centred is loaded, and not scored on rows that nobody centred."""
    about = {"hook_name": "blocks.3.hook_resid_post", "model_from_pretrained_kwargs": {"center_writing_weights": True}}
    checkpoint = open_checkpoint(saelens(tmp_path / "s", weights(), metadata=about))
    with pytest.raises(CheckpointError, match=r"trained on hook 'centred resid_post', store .* has 'resid_post'"):
        require_fit(checkpoint, Store.open(tiny_store), allow_other_model=True)
    about["model_from_pretrained_kwargs"] = {"center_writing_weights": False}
    require_fit(open_checkpoint(saelens(tmp_path / "t", weights(), metadata=about)), Store.open(tiny_store))


@pytest.mark.parametrize(
    ("kind", "fits"), [("llama", "mlp"), ("gemma2", "post_feedforward_layernorm"), ("gpt2", "mlp")]
)
def test_modules_are_those_of_the_model(lm_folder: Callable[[str], Path], tmp_path: Path, kind: str, fits: str) -> None:
    """An SAE of a module's output is taken where that output is what is added to the stream, and refused where a norm comes
    between: by evaluation, and attached."""
    lm = SplitLM.load(str(lm_folder(kind)), dtype="float32", part="prefix", layers=[Point(1, "mlp_out")])
    assert lm.module_name() == fits
    whole = tiny_models.whole_model(lm_folder(kind), torch.float32)
    for module in ("mlp", "post_feedforward_layernorm"):
        name = f"model.layers.1.{module}"
        w = weights()
        checkpoint = open_checkpoint(saelens(tmp_path / f"{kind}-{module}", w, metadata={"hook_name": name}))
        sae = checkpoint.load()
        if module == fits:
            require_module(checkpoint, lm.module_name())
            attach(whole, sae)
            continue
        with pytest.raises(CheckpointError, match=f"output of '{module}'; in this model mlp_out, .* of '{fits}'"):
            require_module(checkpoint, lm.module_name())
        with pytest.raises(
            UsageError, match=f"output of '{module}'; in this model mlp_out of layer 1 is that of '{fits}'"
        ):
            attach(whole, sae)
        attach(whole, sae, hook="mlp_out")


@pytest.mark.parametrize(("kind", "fits"), [("llama", True), ("gemma2", False), ("gpt2", True), ("gpt_neox", True)])
@pytest.mark.parametrize("name", ["mlp_out_layer_1", "attn_out_layer_1", "attention_out_layer_1"])
def test_own_outputs_of_dictionaries(
    lm_folder: Callable[[str], Path], tmp_path: Path, kind: str, fits: bool, name: str
) -> None:
    """dictionary_learning's outputs of modules are what is added to the stream where nothing stands between, and are refused by
    name where a norm does."""
    point = Point(1, "mlp_out" if name.startswith("mlp") else "attn_out")
    lm = SplitLM.load(str(lm_folder(kind)), dtype="float32", part="prefix", layers=[point])
    checkpoint = open_checkpoint(
        dictionary(tmp_path / "d", "AutoEncoder", linear_style(weights()), submodule_name=name)
    )
    if fits:
        require_module(checkpoint, lm.module_name())
    else:
        with pytest.raises(CheckpointError, match="another point"):
            require_module(checkpoint, lm.module_name())


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize(
    "name",
    ["model.layers.1.mlp", "model.layers.1.post_feedforward_layernorm", "blocks.1.hook_mlp_out", "mlp_out_layer_1"],
)
def test_exports_keep_whose_output(tmp_path: Path, kind: Any, name: str) -> None:
    """An SAE made elsewhere of a module's output, exported and read again, is still of that module; one of what is added to the
    stream still of that."""
    made = saelens(tmp_path / "made", weights(), metadata={"hook_name": name})
    [folder] = export(made, kind, tmp_path / "out")
    assert load_foreign(folder)[1]["store"].items() >= hook_point(made, name).items()


def test_evaluation_asks_the_model(lm_folder: Callable[[str], Path], tmp_path: Path) -> None:
    """A job on a store of mlp_out scores an SAE of the module that is that point in its model, and no other."""
    corpus = tiny_models.make_corpus(tmp_path / "corpus.jsonl")
    config = harvest_config(
        lm_folder("gemma2"), corpus, tmp_path / "acts.zarr", hooks=("mlp_out",), dtype="float32", tokens=320
    )
    harvest.run.run(config, quiet=True)
    for module in ("mlp", "post_feedforward_layernorm"):
        saelens(tmp_path / "saes" / module, weights(), metadata={"hook_name": f"model.layers.1.{module}"})
    job = EvaluateConfig(Path(config.store), tmp_path / "out", scores=("ev", "l0"), device="cpu")
    outcome = run(job, [tmp_path / "saes"])
    assert [entry["member"] for entry in outcome.results] == ["post_feedforward_layernorm"]
    [(path, error)] = outcome.failed
    assert path.name == "mlp"
    assert "trained on the output of 'mlp'; in this model mlp_out" in str(error)


def test_suites_of_equal_names_stay_apart(tmp_path: Path) -> None:
    """trainer_0 of several folders is found in each, and has a name of its own."""
    for name in ("a", "b"):
        (tmp_path / "suite" / name).mkdir(parents=True)
        dictionary(tmp_path / "suite" / name / "trainer_0", "AutoEncoder", linear_style(weights()))
    found, failed = find_checkpoints([tmp_path / "suite"], all_steps=False)
    assert [open_checkpoint(path).member for path in found] == ["a-trainer_0", "b-trainer_0"]
    assert not failed


def test_foreign_saes_work_wherever_ours_do(tmp_path: Path) -> None:
    """load, describe, verify, export and init_from take a folder made elsewhere."""
    w = weights()
    folder = saelens(tmp_path / "s", w)
    torch.testing.assert_close(pipeline.load(folder).encode(rows()), centred(w).relu(), rtol=1e-4, atol=1e-5)
    assert describe(str(folder))["width"] == F
    assert verify(str(folder)).problems == []
    (exported,) = export(folder, "dictionary-learning", tmp_path / "e")
    same(exported, centred(w).relu(), w)
    assert load_foreign(exported)[1]["store"] == {"hook": "resid_post", "layer": 1, "model": "tiny"}
    assert path_of(named_by_content(str(folder))) == folder
    (folder / "sae_weights.safetensors").write_bytes(b"no")
    assert "cannot be read" in verify(str(folder)).problems[0]


@pytest.mark.parametrize("make", ["saelens", "dictionary"])
def test_weights_stand_for_their_folder(tmp_path: Path, tiny_store: Path, make: str) -> None:
    """The file that holds the weights names their folder wherever the folder may be named."""
    w = weights()
    folder = (
        saelens(tmp_path / "s", w, metadata={"hook_name": "blocks.3.hook_resid_post"})
        if make == "saelens"
        else dictionary(tmp_path / "d", "AutoEncoder", linear_style(w), layer=3, lm_name=None)
    )
    file = folder / ("sae_weights.safetensors" if make == "saelens" else "ae.pt")
    torch.testing.assert_close(pipeline.load(file).encode(rows()), centred(w).relu(), rtol=1e-4, atol=1e-5)
    assert (describe(str(file))["kind"], describe(str(file))["width"]) == ("foreign", F)
    assert verify(str(file)).problems == []
    assert [str(folder)] == [line.partition(": ")[0] for line in verify(str(file)).unvouched]
    assert path_of(named_by_content(str(file))) == folder
    [found], failed = find_checkpoints([file], all_steps=False)
    assert (found, failed) == (folder, [])


def test_folder_of_folders_is_searched(tmp_path: Path) -> None:
    """A folder of folders is searched."""
    saelens(tmp_path / "a", weights())
    dictionary(tmp_path / "b", "AutoEncoder", linear_style(weights()))
    (tmp_path / "notes").mkdir()
    assert find_checkpoints([tmp_path], all_steps=False) == ([tmp_path / "a", tmp_path / "b"], [])
