"""A model tried before a harvest: cut into prefix, suffix and head, it must compute what it computes whole."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import transformers
from jaxtyping import Int
from torch import Tensor

from pipeline.base.errors import ModelError, kind_and_line
from pipeline.base.memory import available_memory
from pipeline.base.runtime import DTYPES
from pipeline.model.anatomy import forward, logits_of
from pipeline.model.files import hub_errors
from pipeline.model.points import Point, as_point
from pipeline.model.specials import named_tokens, plain_token
from pipeline.model.split_lm import ModelInfo, SplitLM, quiet

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
def try_split(lm: SplitLM, layers: Sequence[int | Point]) -> None:
    """Raise ModelError unless a whole model, cut after each of these layers or at these points, gives its own logits bit for
    bit, and other ones when the rows there are zero.

    Where the whole model does not give the same bits twice itself (atomic additions on some GPUs), equal means within a
    hundredth of the logits' spread.
    """
    tokens = trial_tokens(lm)
    name = lm.info.name
    for at in layers:
        point = as_point(at)
        try:
            whole, again = (logits_of(forward(lm.model, tokens)) for _ in range(2))
            cut = SplitLM(lm.model, lm.info, "whole", [at])
            rows = cut.prefix(tokens)[at]
            logits, zeroed = (cut.unembed(cut.suffix(r, tokens)) for r in (rows, torch.zeros_like(rows)))
        except (ModelError, torch.cuda.OutOfMemoryError):
            raise
        except Exception as error:  # whatever an architecture's own code raises
            raise ModelError(f"{name}: cannot be cut at {point} ({kind_and_line(error)})") from error
        if whole.shape[-1] != lm.vocab:
            raise ModelError(
                f"{name}: makes {whole.shape[-1]} logits, its config says {lm.vocab} tokens; it cannot be scored"
            )
        if not whole.isfinite().all():
            raise ModelError(f"{name}: the model's own logits are not finite; try --dtype float32, or get it again")
        same = torch.equal(logits, whole)
        if not torch.equal(whole, again) and logits.shape == whole.shape:
            same = close(logits, whole)
        if not same:
            raise ModelError(
                f"{name}: cannot be cut at {point}: from the rows there, what follows gives other logits than the whole "
                "model (it looks at more than these rows); choose another layer or model"
            )
        if torch.equal(zeroed, logits):
            raise ModelError(f"{name}: cannot be cut at {point}: its rows change nothing; choose another layer or hook")


def close(one: Tensor, other: Tensor) -> bool:
    """Whether no number differs by more than a hundredth of the spread."""
    return bool((one.float() - other.float()).abs().max() <= 0.01 * other.float().std())


@torch.no_grad()
def try_prefix(
    info: ModelInfo, layers: Sequence[int | Point], tokens: Tensor, rows: Mapping[Any, Tensor], **options: Any
) -> None:
    """Raise ModelError unless the prefix, loaded by itself, gives these rows of the whole model, but for rounding.

    (Weights that lie elsewhere in memory may be multiplied in another order.)
    """
    try:
        found = SplitLM.load(str(info.folder), part="prefix", layers=layers, **options).prefix(tokens)
    except (ModelError, torch.cuda.OutOfMemoryError):
        raise
    except Exception as error:  # whatever an architecture's own code raises
        raise ModelError(
            f"{info.name}: its first layers do not run without the others ({kind_and_line(error)})"
        ) from error
    if other := [str(as_point(at)) for at in layers if not close(found[at], rows[at])]:
        raise ModelError(
            f"{info.name}: without its later layers it has other rows at {other[0]}; it cannot be cut there"
        )


def try_model(
    info: ModelInfo,
    layers: Sequence[int | Point],
    dtype: str,
    device: torch.device,
    attention: str,
    *,
    trust_remote_code: bool = False,
) -> bool:
    """Load a model whole, `try_split` it at each of these layers or points and let it go, then its prefix alone.

    False where it does not fit whole.
    """
    config = copy.deepcopy(info.config)
    auto: Any = transformers.AutoModelForCausalLM
    with hub_errors(info.name), quiet(), torch.device("meta"):
        n_weights = sum(p.numel() for p in auto.from_config(config, trust_remote_code=trust_remote_code).parameters())
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_memory()
    if SPARE * n_weights * DTYPES[dtype].itemsize > free:
        return False
    options: dict[str, Any] = {
        "dtype": dtype,
        "device": device,
        "attention": attention,
        "trust_remote_code": trust_remote_code,
    }
    lm = SplitLM.load(str(info.folder), part="whole", layers=layers, **options)
    try_split(lm, layers)
    tokens = trial_tokens(lm)
    rows = lm.prefix(tokens)
    del lm
    try_prefix(info, layers, tokens, rows, **options)
    return True
