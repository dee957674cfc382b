"""Runs in an environment of its own with sae-lens, dictionary-learning and, if it is there, sparsify (eai-sparsify): each library
makes random SAEs of every architecture, saves them its own way, and encodes and decodes rows with them.

    PEERS_PYTHON=peers/bin/python python -m pytest tests/test_foreign.py -m slow

Writes OUT/NAME/sae/layers.1/ and OUT/NAME/reference.safetensors: x, z and x_hat, the decoded z.
"""

import json
import os
import sys
from pathlib import Path

import torch
from dictionary_learning import dictionary
from dictionary_learning.trainers.batch_top_k import BatchTopKSAE
from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKSAE
from dictionary_learning.trainers.top_k import AutoEncoderTopK
from sae_lens import SAE
from sae_lens.saes import (
    batchtopk_sae,
    gated_sae,
    jumprelu_sae,
    matryoshka_batchtopk_sae,
    standard_sae,
    topk_sae,
    transcoder,
)
from sae_lens.saes.sae import SAEMetadata
from safetensors.torch import save_file

D, F, OUT = 64, 96, Path(sys.argv[1])
torch.manual_seed(0)
x = torch.randn(200, D)


def perturb(module: torch.nn.Module, **values: float) -> None:
    """Random parameters, so that every one of them matters; buffers and thresholds as named."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(torch.rand_like(parameter) if name in values else 0.2 * torch.randn_like(parameter))
        for name, value in values.items():
            getattr(module, name).mul_(0).add_(value)


def keep(name: str, encode, decode) -> None:
    """Rows, latents and reconstructions."""
    with torch.no_grad():
        z = encode(x)
        z = z if isinstance(z, torch.Tensor) else z[0]  # SAELens's decode gives the last encoded rows' statistics back
        save_file({"x": x, "z": z.contiguous(), "x_hat": decode(z).contiguous()}, OUT / name / "reference.safetensors")


def place(name: str) -> Path:
    """An empty folder for the SAE, named as sparsify names hooks."""
    folder = OUT / name / "sae" / "layers.1"
    folder.mkdir(parents=True)
    return folder


common = {"d_in": D, "d_sae": F, "metadata": {"hook_name": "blocks.1.hook_resid_post", "model_name": "tiny"}}
LENS = {
    "lens-standard": (standard_sae.StandardSAE, standard_sae.StandardSAEConfig, {}, {}),
    "lens-standard-raw": (
        standard_sae.StandardSAE,
        standard_sae.StandardSAEConfig,
        {"apply_b_dec_to_input": False},
        {},
    ),
    "lens-topk": (topk_sae.TopKSAE, topk_sae.TopKSAEConfig, {"k": 7}, {}),
    "lens-topk-rescaled": (
        topk_sae.TopKSAE,
        topk_sae.TopKSAEConfig,
        {"k": 7, "rescale_acts_by_decoder_norm": True},
        {},
    ),
    "lens-topk-layer-norm": (
        topk_sae.TopKSAE,
        topk_sae.TopKSAEConfig,
        {"k": 7, "normalize_activations": "layer_norm"},
        {},
    ),
    "lens-gated-layer-norm": (
        gated_sae.GatedSAE,
        gated_sae.GatedSAEConfig,
        {"normalize_activations": "layer_norm"},
        {},
    ),
    "lens-jumprelu": (jumprelu_sae.JumpReLUSAE, jumprelu_sae.JumpReLUSAEConfig, {}, {"threshold": 0.3}),
    "lens-gated": (gated_sae.GatedSAE, gated_sae.GatedSAEConfig, {}, {}),
}
for name, (kind, config, options, values) in LENS.items():
    sae = kind(config(**{k: v for k, v in (common | options).items() if k != "metadata"}))
    perturb(sae, **values)
    sae.save_model(place(name))
    keep(name, sae.encode, sae.decode)

MADE = {
    "lens-transcoder": (transcoder.Transcoder, transcoder.TranscoderConfig, {}),
    "lens-skip-transcoder": (transcoder.SkipTranscoder, transcoder.SkipTranscoderConfig, {}),
    "lens-jumprelu-transcoder": (
        transcoder.JumpReLUTranscoder,
        transcoder.JumpReLUTranscoderConfig,
        {"threshold": 0.3},
    ),
    "lens-jumprelu-skip-transcoder": (
        transcoder.JumpReLUSkipTranscoder,
        transcoder.JumpReLUSkipTranscoderConfig,
        {"threshold": 0.3},
    ),
}
between = {"hook_name": "blocks.1.mlp.hook_in", "hook_name_out": "blocks.1.hook_mlp_out", "model_name": "tiny"}
for name, (kind, config, values) in MADE.items():
    sae = kind(config(d_in=D, d_sae=F, d_out=48, apply_b_dec_to_input=False, metadata=SAEMetadata(**between)))
    perturb(sae, **values)
    sae.save_model(place(name))
    keep(name, sae.encode, lambda z, sae=sae: sae(x))

TRAINED = {
    "lens-batchtopk": (batchtopk_sae.BatchTopKTrainingSAE, batchtopk_sae.BatchTopKTrainingSAEConfig, {}),
    "lens-matryoshka": (
        matryoshka_batchtopk_sae.MatryoshkaBatchTopKTrainingSAE,
        matryoshka_batchtopk_sae.MatryoshkaBatchTopKTrainingSAEConfig,
        {"matryoshka_widths": [32, F]},
    ),
}
for name, (
    kind,
    config,
    options,
) in TRAINED.items():  # the trainer's own folder, against what SAELens makes of it for inference
    sae = kind(config(d_in=D, d_sae=F, k=7, **options))
    perturb(sae, topk_threshold=0.4)
    sae.save_model(place(name))
    sae.save_inference_model(OUT / name / "inference")
    inference = SAE.load_from_disk(OUT / name / "inference")
    keep(name, inference.encode, inference.decode)


def dictionaries():
    """dictionary_learning's classes with random weights, their thresholds set."""
    yield "dl-autoencoder", dictionary.AutoEncoder(D, F), {}, {}
    yield "dl-gated", dictionary.GatedAutoEncoder(D, F), {}, {}
    yield "dl-jumprelu", dictionary.JumpReluAutoEncoder(D, F), {"threshold": 0.3}, {}
    yield "dl-topk", AutoEncoderTopK(D, F, 7), {}, {"k": 7}
    yield "dl-batchtopk", BatchTopKSAE(D, F, 7), {"threshold": 0.4}, {"k": 7}
    yield "dl-matryoshka", MatryoshkaBatchTopKSAE(D, F, 7, [32, F - 32]), {"threshold": 0.4}, {"k": 7}


for name, sae, values, more in dictionaries():
    perturb(sae, **values)
    folder = place(name)
    torch.save(sae.state_dict(), folder / "ae.pt")
    trainer = {"dict_class": type(sae).__name__, "activation_dim": D, "dict_size": F, "layer": 1, "lm_name": "tiny"}
    (folder / "config.json").write_text(json.dumps({"trainer": trainer | more, "buffer": {"ctx_len": 16}}))
    keep(name, sae.encode, sae.decode)

os.environ["SPARSIFY_DISABLE_TRITON"] = "1"
try:
    from sparsify import SparseCoder, SparseCoderConfig
except ImportError:
    sys.exit()
coder = SparseCoder(D, SparseCoderConfig(k=7, num_latents=F))
perturb(coder)
coder.save_to_disk(place("sparsify"))
with torch.no_grad():
    values, indices, _ = coder.encode(x)
    z = torch.zeros(len(x), F).scatter(1, indices, values)
    save_file({"x": x, "z": z, "x_hat": coder.decode(values, indices)}, OUT / "sparsify" / "reference.safetensors")
for name, skips in (("sparsify-transcoder", False), ("sparsify-skip-transcoder", True)):
    coder = SparseCoder(D, SparseCoderConfig(k=7, num_latents=F, transcode=True, skip_connection=skips))
    perturb(coder)
    folder = OUT / name / "sae" / "layers.1.mlp"
    folder.mkdir(parents=True)
    coder.save_to_disk(folder)
    with torch.no_grad():
        values, indices, _ = coder.encode(x)
        z = torch.zeros(len(x), F).scatter(1, indices, values)
        save_file({"x": x, "z": z, "x_hat": coder(x).sae_out}, OUT / name / "reference.safetensors")
