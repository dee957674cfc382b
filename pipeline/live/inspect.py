"""Which latents a text wakes: tokens with their strongest latents, shared and specialised, for `python -m pipeline inspect`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.base.errors import UsageError
from pipeline.base.runtime import resolve_device
from pipeline.base.token_text import TokenText
from pipeline.live.attach import attach
from pipeline.model.split_lm import SplitLM, load_tokenizer
from pipeline.sae.foreign import load_sae
from pipeline.sae.hub import find_checkpoint
from pipeline.sae.nested import NestedSAE


@dataclass(frozen=True)
class Block:
    """The latents that one level adds: its name, and the strongest at a token as (latent, activation), largest first."""

    name: str
    strongest: tuple[tuple[int, float], ...]
    n_active: int


@dataclass(frozen=True)
class Token:
    """A token of the text. `blocks` is empty at special positions, which an SAE leaves alone."""

    text: str
    blocks: tuple[Block, ...]


def inspect_checkpoint(
    source: str, text: str, model: str | None, layer: int | None, top: int, device: str
) -> tuple[NestedSAE, list[Token]]:
    """Load a checkpoint (`pipeline.load` says what may name one) and its model, and read the latents of a text.

    Raises UsageError when neither the caller nor the checkpoint names the model or layer, ModelError, CheckpointError.
    """
    path = find_checkpoint(source)
    where = resolve_device(device)
    sae, header = load_sae(path, where)
    store = header.provenance.get("store") or {}
    model, layer = model or store.get("model"), layer if layer is not None else store.get("layer")
    if model is None or layer is None:
        raise UsageError(f"{path}: does not say which model and layer it is for; give --model and --layer")
    if (hook := store.get("hook", "resid_post")) != "resid_post":
        made_for = "rows of a place that nobody named" if hook is None else f"{hook} of layer {layer}"
        raise UsageError(f"{path}: made for {made_for}; only SAEs of the stream after a layer are shown")
    tokenizer = load_tokenizer(str(model))
    lm = SplitLM.load(str(model), dtype="auto", device=where, part="whole", layers=[int(layer)])
    return sae, inspect_text(lm.model, tokenizer, sae, int(layer), text, top)


def inspect_text(model: Any, tokenizer: Any, sae: NestedSAE, layer: int, text: str, top: int) -> list[Token]:
    """Run a text through the model with the SAE attached (its error kept: nothing changes) and read its latents."""
    inputs = tokenizer(text, return_tensors="pt").to(model.device)
    with torch.no_grad(), attach(model, sae, layer, keep_error=True) as live:
        model(**inputs)
    assert live.kept is not None
    names, shown = block_names(sae.config.n_levels), TokenText(tokenizer)
    rows = []
    for id, kept, z in zip(inputs["input_ids"][0].tolist(), live.kept[0].tolist(), live.latents[0].float()):
        blocks = [strongest(name, z, block, top) for name, block in zip(names, sae.config.blocks)] if kept else []
        rows.append(Token(shown(id), tuple(blocks)))
    return rows


def block_names(n_levels: int) -> tuple[str, ...]:
    """What the latents that each level adds are called."""
    if n_levels == 1:
        return ("latents",)
    return ("shared", "specialised") if n_levels == 2 else tuple(f"level {i}" for i in range(n_levels))


def strongest(name: str, z: Tensor, block: slice, top: int) -> Block:
    """The largest active latents of a block of one token's z [latent]."""
    own = z[block]
    values, latents = own.topk(min(top, len(own)))
    found = [(block.start + int(i), float(v)) for v, i in zip(values, latents) if v > 0]
    return Block(name, tuple(found), int((own > 0).sum()))


def as_lines(tokens: Sequence[Token]) -> list[str]:
    """One line a token for a terminal: the token, then each block's latents as latent:activation."""
    width = max((len(repr(token.text)) for token in tokens), default=0)
    return [
        f"{token.text!r:{width}}  " + ("  |  ".join(block_line(block) for block in token.blocks) or "(left alone)")
        for token in tokens
    ]


def block_line(block: Block) -> str:
    """`shared 12: 431:2.10 7:0.93`: how many fire, and the strongest."""
    return f"{block.name} {block.n_active}: " + " ".join(f"{latent}:{value:.3g}" for latent, value in block.strongest)


def as_page(tokens: Sequence[Token], names: Sequence[str], title: str) -> str:
    """A self-contained HTML page without scripts: a row a token, a column a block."""
    import jinja2

    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)
    return environment.get_template("inspect.html").render(tokens=tokens, names=names, title=title)
