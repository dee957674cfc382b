"""Special tokens: which ids they are, which one begins a text, which one stands between documents, where they are."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.base.errors import ModelError

First = int | Sequence[int] | None
"""What begins a row and a text, as a store records it (`bos`): a token, several of them, or none."""
BLOCK = 4096
"""Sequences that are marked at a time."""


def first_ids(first: First) -> list[int]:
    """The same as a list."""
    if first is None:
        return []
    return [first] if isinstance(first, int) else list(first)


def special_ids(tokenizer: Any, *others: int | None) -> list[int]:
    """Ids of every special token that the tokenizer declares (BOS, EOS, PAD, UNK, turn markers), and `others`; sorted."""
    added = {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
    return sorted(added | set(tokenizer.all_special_ids) | {id for id in others if id is not None})


def config_special_ids(model: Any) -> tuple[int, ...]:
    """BOS, EOS and PAD as a model's config names them."""
    text = model.config.get_text_config()
    found: set[int] = set()
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = getattr(text, name, None)
        found |= set(value) if isinstance(value, list | tuple) else set() if value is None else {int(value)}
    return tuple(sorted(found))


def plain_token(config: Any, vocab: int) -> int:
    """The smallest token id that the config does not name."""
    named = named_tokens(config)
    return next(id for id in range(vocab) if id not in named)


def named_tokens(config: Any) -> set[int]:
    """Token ids that a config names: padding, beginning, end, image and other special tokens."""
    named: set[int] = set()
    for part in (config, config.get_text_config()):
        for name, value in vars(part).items():
            if name.endswith(("token_id", "token_index")):
                named |= set(value) if isinstance(value, list | tuple) else {value}
    return named


def resolve_bos(tokenizer: Any, bos: str) -> First:
    """`auto`: what the tokenizer itself puts before a text, if anything; `none`; or ids with commas between them.

    Raises ModelError for an id that is no token.
    """
    if bos == "none":
        return None
    if bos != "auto":
        named = bos.split(",")
        if not all(re.fullmatch("[0-9]+", id) and int(id) < len(tokenizer) for id in named):
            raise ModelError(
                f"--bos {bos}: not a token id below {len(tokenizer)} (or several, as 3,5), nor auto or none"
            )
        return one_or_several([int(id) for id in named])
    return one_or_several(leading_ids(tokenizer))


def one_or_several(ids: list[int]) -> First:
    """Ids as a store records them."""
    return ids if len(ids) > 1 else next(iter(ids), None)


def leading_ids(tokenizer: Any) -> list[int]:
    """What the tokenizer puts before a text."""
    whole: list[int] = list(tokenizer("a")["input_ids"])
    plain: list[int] = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    starts = [k for k in range(len(whole) - len(plain) + 1) if whole[k : k + len(plain)] == plain]
    if not starts:
        raise ModelError(
            "the tokenizer reads a text differently behind its special tokens; say what begins a row: --bos ID, or none"
        )
    return whole[: starts[0]]


def resolve_separator(tokenizer: Any, bos: First, model: str) -> int:
    """What stands between documents: the BOS, or the EOS where there is none; of several first tokens the EOS too, or the last
    of them. Raises ModelError without either."""
    separator = bos if isinstance(bos, int) else tokenizer.eos_token_id
    if separator is None:
        separator = next(reversed(first_ids(bos)), None)
    if separator is None:
        raise ModelError(f"{model}: its tokenizer has no BOS and no EOS to put between documents; give --bos ID")
    return int(separator)


def mark_special(tokens: npt.NDArray[np.int32], special: Iterable[int], vocab: int, out: npt.NDArray[np.bool_]) -> None:
    """Set `out` to true at special tokens and at position 0 of every row, and leave it as it is elsewhere.

    Raises ModelError for an id that the model does not have.
    """
    table = np.zeros(vocab, np.bool_)
    table[[id for id in special if id < vocab]] = True
    for a in range(0, len(tokens), BLOCK):
        block = tokens[a : a + BLOCK]
        if int(block.max()) >= vocab:
            raise ModelError(
                f"the tokenizer makes token {int(block.max())}, the model knows {vocab}; give the model its own tokenizer"
            )
        out[a : a + BLOCK] |= table[block]
    out[:, 0] = True
