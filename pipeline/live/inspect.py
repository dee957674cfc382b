"""Which latents a text wakes: tokens with their strongest latents, shared and specialised, for `python -m pipeline inspect`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unicodedata import combining, east_asian_width

import torch
from torch import Tensor

from pipeline.base.errors import UsageError
from pipeline.base.files import human_bytes
from pipeline.base.memory import available_memory
from pipeline.base.progress import say
from pipeline.base.runtime import memory_limit, resolve_device
from pipeline.base.token_text import TokenText, spelled, visible
from pipeline.live.attach import attach, point_of, require_config
from pipeline.model.anatomy import forward
from pipeline.model.cost import model_sizes
from pipeline.model.files import model_folder, tokenizer_sha256
from pipeline.model.specials import first_ids, special_ids
from pipeline.model.split_lm import SplitLM, load_tokenizer
from pipeline.sae.foreign.reader import load_sae
from pipeline.sae.hub import find_checkpoint
from pipeline.sae.nested import NestedSAE

WIDEST = 24
"""Columns of a terminal to which the tokens' lines are aligned; a longer token moves its own line alone."""


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
    source: str, text: str, model: str | None, layer: int | None, hook: str | None, top: int, device: str
) -> tuple[NestedSAE, list[Token]]:
    """Load a checkpoint (`pipeline.load` says what may name one) and its model, and read the latents of a text.

    Raises UsageError when neither the caller nor the checkpoint names the model, layer or hook, ModelError, CheckpointError.
    """
    path = find_checkpoint(source)
    where = resolve_device(device)
    sae, _ = load_sae(path, where)
    made_of = sae.made_for.get("revision") if model is None else None
    revision = None if made_of == "local" else made_of
    model = model or sae.made_for.get("model")
    if model is None:
        raise UsageError(f"{path}: does not say which model it is for; give --model and --layer")
    try:
        point = point_of(sae, layer, hook)
    except UsageError as error:
        raise UsageError(f"{path}: {error} (--layer, --hook)") from error
    require_config(model_folder(str(model), revision)[0], sae)
    tokenizer = load_tokenizer(str(model), revision)
    lm = SplitLM.load(str(model), dtype="auto", device=where, part="whole", layers=[point], revision=revision)
    recorded = sae.made_for.get("tokenizer_sha256")
    as_stored = recorded is not None and recorded == tokenizer_sha256(lm.info.folder)
    if recorded is not None and not as_stored:
        say(
            "note     the model's tokenizer is not the one of the SAE's store: the text begins as this tokenizer begins one"
        )
    return sae, inspect_text(lm, tokenizer, sae, text, top, layer=layer, hook=hook, as_stored=as_stored)


def inspect_text(
    lm: SplitLM,
    tokenizer: Any,
    sae: NestedSAE,
    text: str,
    top: int,
    *,
    layer: int | None = None,
    hook: str | None = None,
    as_stored: bool = False,
) -> list[Token]:
    """Run a text through the model with the SAE attached (its error kept: nothing changes) and read its latents.

    layer, hook: as `attach`, whose errors it raises. Raises UsageError for a text that the model or the memory is too small for.
    `as_stored`: the row begins, and holds special tokens, as those of the SAE's store do; else as the tokenizer has it.
    """
    made = sae.made_for if as_stored else {}
    ids = token_ids(tokenizer, text, made)
    require_room(lm, sae, len(ids))
    special = special_ids(tokenizer, *(made.get("special_ids") or ()))
    inputs = torch.tensor([ids], device=lm.device)
    with (
        torch.no_grad(),
        attach(lm.model, sae, layer, hook=hook, keep_error=True, special_ids=special) as live,
    ):
        forward(lm.model, inputs)
    assert live.kept is not None
    names, shown = block_names(sae.config.n_levels), TokenText(tokenizer)
    rows = []
    for id, kept, z in zip(ids, live.kept[0].tolist(), live.latents[0].float()):
        blocks = [strongest(name, z, block, top) for name, block in zip(names, sae.config.blocks)] if kept else []
        rows.append(Token(spelled(shown(id)), tuple(blocks)))
    return rows


def require_room(lm: SplitLM, sae: NestedSAE, n_tokens: int) -> None:
    """Raise UsageError for more tokens than the model has positions, or than memory has room for."""
    limit = lm.context_limit
    if limit is not None and n_tokens > limit:
        raise UsageError(
            f"--text: {n_tokens:,} tokens, {lm.info.name} has {limit:,} positions; give a shorter text, or a part of it at a time"
        )
    _, activations, logits = model_sizes(lm, n_tokens)
    latents = 4 * sae.config.width  # of which encoding takes up to 5.1 times its bytes, by LayerNorm; then they stay
    needed = n_tokens * (max(6 * latents, latents + activations, latents + logits) + 12 * lm.d_model * 4)
    allowed = memory_limit(None, lm.device, available_memory(), 1)
    if needed > allowed:
        raise UsageError(
            f"--text: {n_tokens:,} tokens need {human_bytes(needed)} of memory, {human_bytes(allowed)} are allowed; give a "
            "shorter text, or a part of it at a time"
        )


def token_ids(tokenizer: Any, text: str, made: Mapping[str, Any]) -> list[int]:
    """A text's tokens as a store's rows have them, where `made` says how: its BOS first, special tokens read only where the
    store reads them; else as the tokenizer has it. Raises UsageError for a text without tokens, or of bytes that are none."""
    if any("\ud800" <= c <= "\udfff" for c in text):
        raise UsageError(f"--text {visible(text)}: holds bytes that are no text here; give UTF-8, in a locale of UTF-8")
    if "special_ids" in made:
        options = {"add_special_tokens": False, "split_special_tokens": not made.get("parse_special", False)}
        ids = list(tokenizer(text, **options)["input_ids"])
        ids = [*first_ids(made.get("bos")), *ids]
    else:
        ids = list(tokenizer(text)["input_ids"])
    if not ids:
        raise UsageError(f"--text {text!r}: holds no token")
    return ids


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
    width = min(max((columns(repr(token.text)) for token in tokens), default=0), WIDEST)
    return [
        f"{token.text!r}{' ' * (width - columns(repr(token.text)))}  "
        + ("  |  ".join(block_line(block) for block in token.blocks) or "(left alone)")
        for token in tokens
    ]


def columns(text: str) -> int:
    """Columns that a text takes in a terminal."""
    return sum(0 if combining(c) else 2 if east_asian_width(c) in "WF" else 1 for c in text)


def block_line(block: Block) -> str:
    """`shared 12: 431:2.10 7:0.93`: how many fire, and the strongest."""
    return " ".join(
        [f"{block.name} {block.n_active}:", *(f"{latent}:{value:.3g}" for latent, value in block.strongest)]
    )


def as_page(tokens: Sequence[Token], names: Sequence[str], title: str) -> str:
    """A self-contained HTML page without scripts: a row a token, a column a block."""
    import jinja2

    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)
    return environment.get_template("inspect.html").render(tokens=tokens, names=names, title=visible(title))
