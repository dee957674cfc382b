"""Stores of a real tiny language model's residuals, and SAEs that rebuild them passably, without harvest or train."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.base.files import hash_file, write_json
from pipeline.model.files import architecture_sha256, tokenizer_sha256
from pipeline.model.split_lm import SplitLM
from pipeline.sae.checkpoint import save_checkpoint
from pipeline.sae.config import SAEConfig
from pipeline.sae.nested import NestedSAE
from pipeline.store.prepare import SplitTokens, prepare
from pipeline.store.reader import Store
from support import tiny_models
from support.stores import store_config

LAYER, CONTEXT = 1, 16
BOS, EOS = 2, 1


def make_tokens(n_sequences: int, seed: int) -> SplitTokens:
    """Random tokens, BOS first, and an EOS in the middle of every third sequence."""
    tokens = tiny_models.tokens(n_sequences, CONTEXT, seed).numpy().astype(np.int32)
    tokens[::3, CONTEXT // 2] = EOS
    return SplitTokens(tokens, np.isin(tokens, (BOS, EOS)))


def make_lm_store(
    folder: Path,
    *,
    dtype: str = "float32",
    kind: str = "gemma2",
    eval_sequences: int = 70,
    model: Path | None = None,
) -> Store:
    """`folder/model` (or the model given) and a complete `folder/acts.zarr` of its residuals after layer LAYER; 64 training
    sequences."""
    torch_dtype = torch.bfloat16 if dtype == "bf16" else torch.float32
    model = model or tiny_models.make_model(folder / "model", kind, dtype=torch_dtype)
    lm = SplitLM.load(str(model), dtype=dtype, part="prefix", layers=[LAYER])
    config = store_config(context=CONTEXT, dtype=dtype, shard_rows=512, chunk_rows=64)
    config |= {"model": str(model), "revision": "local", "weights_sha256": lm.weights_sha256, "layer": LAYER}
    config |= {"tokenizer_sha256": tokenizer_sha256(model), "architecture_sha256": architecture_sha256(model)}
    config |= {
        "n_layers": lm.n_layers,
        "d_model": lm.d_model,
        "vocab": lm.vocab,
        "bos": BOS,
        "special_ids": [0, 1, 2, 3],
    }
    splits = {"train": make_tokens(64, 1), "eval": make_tokens(eval_sequences, 2)}
    writer = prepare(folder / "acts.zarr", config, splits["train"], splits["eval"], {"numpy": np.__version__})
    for split, drawn in splits.items():
        for k in writer.pending(split):
            with writer.shard(split, k) as shard:
                shard.write(residual_rows(lm, drawn.tokens, *writer.split(split).shard_rows_range(k)))
    return writer.finish()


def residual_rows(lm: SplitLM, tokens: np.ndarray, start: int, stop: int) -> torch.Tensor:
    """Rows start … stop of a split: whole shards, so whole sequences, one at a time."""
    sequences = tokens[start // CONTEXT : -(-stop // CONTEXT)]
    rows = [lm.prefix(torch.from_numpy(row[None]).long())[LAYER][0] for row in sequences]
    return torch.cat(rows)[start % CONTEXT :][: stop - start]


def make_sae(
    store: Store, *, levels: tuple[int, ...] = (32, 128), bias: float = -0.02, seed: int = 0, **config: Any
) -> NestedSAE:
    """A relu SAE from principal directions of the training rows, each with both signs, in order of variance."""
    d_model = store.d_model
    sae = NestedSAE(SAEConfig(d_model=d_model, width=levels[-1], levels=levels, **config))
    rows = store.train.read(0, store.train.n_rows)[torch.from_numpy(store.train.kept())].float()
    sae.center, sae.scale = store.mean.clone(), torch.tensor(store.scale)
    directions = torch.linalg.svd(sae.normalize(rows), full_matrices=False).Vh  # [d_model, d_model]
    both = torch.stack([directions, -directions], 1).reshape(-1, d_model)
    noise = torch.randn(levels[-1], d_model, generator=torch.Generator().manual_seed(seed))
    decoder = torch.nn.functional.normalize(
        both.repeat(levels[-1] // len(both) + 1, 1)[: levels[-1]] + 0.02 * noise, dim=1
    )
    sae.W_dec.data, sae.W_enc.data = decoder, decoder.T.clone()
    sae.b_enc.data = torch.full((levels[-1],), bias)
    return sae.requires_grad_(False)


def save_member(out: Path, store: Store, sae: NestedSAE, *, seed: int = 0, step: int = 20, **provenance: Any) -> Path:
    """A finished training member's folder as train writes it, with a metrics file; returns the folder."""
    folder = out / f"alpha0.25-seed{seed}-0123456789"
    about = {"id": store.id, "model": store.config["model"], "revision": store.config["revision"]}
    about |= {
        "weights_sha256": store.config["weights_sha256"],
        "layer": store.config["layer"],
        "d_model": store.d_model,
    }
    about |= {"context": store.context, "massive_multiple": store.statistics.massive_multiple, "max_norm": None}
    train = {"recipe": "paper", "alpha": 0.25, "seed": seed, "width": sae.config.width, "objective": "nested"}
    given = {"member": folder.name, "train": train, "store": about, "rows_seen": 4096, "fired_rows": 4096, "dead": 0.25}
    final = f"checkpoints/step_{step:06d}.safetensors"
    save_checkpoint(folder / final, sae, step, given | provenance)
    write_json(folder / "config.json", {"format": "nested-sae-member", "version": 1, "config": train, "store": about})
    lines = "".join(f'{{"step": {i}, "loss": {1 / i}, "ev": [0.1, 0.2]}}\n' for i in range(1, step + 11))
    (folder / "metrics.jsonl").write_text(lines)
    write_json(folder / "complete.json", {"final": final, "sha256": hash_file(folder / final)})
    return folder
