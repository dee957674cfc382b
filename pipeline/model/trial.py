"""A model tried before a harvest: cut into prefix, suffix and head, it must compute what it computes whole."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
import transformers
from jaxtyping import Int
from torch import Tensor

from pipeline.base.errors import ModelError
from pipeline.base.runtime import DTYPES, available_memory
from pipeline.model.anatomy import forward, logits_of, one_line
from pipeline.model.files import hub_errors
from pipeline.model.split_lm import ModelInfo, SplitLM, named_tokens, plain_token, quiet

SPARE = 1.3
"""Memory that must be free to try a model, over its weights."""

N_SEQUENCES, N_POSITIONS = 2, 16


def trial_tokens(lm: SplitLM) -> Int[Tensor, "seq pos"]:
    """Two sequences of tokens that are nothing special, or as many positions as the model has."""
    n = min(N_POSITIONS, lm.context_limit or N_POSITIONS)
    ids = torch.randint(lm.vocab, (N_SEQUENCES, n), generator=torch.Generator().manual_seed(0))
    named = torch.tensor([id for id in named_tokens(lm.config) if id is not None])
    return torch.where(torch.isin(ids, named), plain_token(lm.config, lm.vocab), ids).to(lm.device)


@torch.no_grad()
def try_split(lm: SplitLM, layers: Sequence[int]) -> None:
    """Raise ModelError unless a whole model, cut after each of these layers, gives its own logits bit for bit.

    Where the whole model does not give the same bits twice itself (atomic additions on some GPUs), equal means within a
    hundredth of the logits' spread.
    """
    tokens = trial_tokens(lm)
    for layer in layers:
        try:
            whole, again = (logits_of(forward(lm.model, tokens)) for _ in range(2))
            cut = SplitLM(lm.model, lm.info, "whole", [layer])
            logits = cut.unembed(cut.suffix(cut.prefix(tokens)[layer], tokens))
        except (ModelError, torch.cuda.OutOfMemoryError):
            raise
        except Exception as error:  # whatever an architecture's own code raises
            raise ModelError(f"{lm.info.name}: cannot be cut after layer {layer} ({one_line(error)})") from error
        if whole.shape[-1] != lm.vocab:
            raise ModelError(
                f"{lm.info.name}: makes {whole.shape[-1]} logits, its config says {lm.vocab} tokens; it cannot be scored"
            )
        if not whole.isfinite().all():
            raise ModelError(
                f"{lm.info.name}: the model's own logits are not finite; try --dtype float32, or get it again"
            )
        same = torch.equal(logits, whole)
        if not torch.equal(whole, again) and logits.shape == whole.shape:
            same = bool((logits - whole).abs().max() <= 0.01 * whole.float().std())
        if not same:
            raise ModelError(
                f"{lm.info.name}: cannot be cut after layer {layer}: from the residual stream there, its later layers give "
                f"other logits than the whole model (they look at more than this stream); choose another layer or model"
            )


def try_model(
    info: ModelInfo,
    layers: Sequence[int],
    dtype: str,
    device: torch.device,
    attention: str,
    *,
    trust_remote_code: bool = False,
) -> bool:
    """Load a model whole, `try_split` it after each of these layers and let it go; False where it does not fit whole."""
    config = copy.deepcopy(info.config)
    auto: Any = transformers.AutoModelForCausalLM
    with hub_errors(info.name), quiet(), torch.device("meta"):
        n_weights = sum(p.numel() for p in auto.from_config(config, trust_remote_code=trust_remote_code).parameters())
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_memory()
    if SPARE * n_weights * DTYPES[dtype].itemsize > free:
        return False
    lm = SplitLM.load(
        str(info.folder),
        dtype=dtype,
        device=device,
        part="whole",
        layers=layers[:1],
        attention=attention,
        trust_remote_code=trust_remote_code,
    )
    try_split(lm, layers)
    return True
