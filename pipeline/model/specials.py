"""Special tokens: which ids they are, which one begins a text, which one stands between documents, where they are."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.base.errors import ModelError

BLOCK = 4096
"""Sequences that are marked at a time."""


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


def resolve_bos(tokenizer: Any, bos: str) -> int | None:
    """`auto`: the token that the tokenizer itself puts before a text, if any; `none`; or an id.

    Raises ModelError for an id that is no token, and where `auto` finds several tokens before a text.
    """
    if bos == "none":
        return None
    if bos != "auto":
        if not bos.isdigit() or int(bos) >= len(tokenizer):
            raise ModelError(f"--bos {bos}: not a token id below {len(tokenizer)}, nor auto or none")
        return int(bos)
    leading = leading_ids(tokenizer)
    if len(leading) > 1:
        names = " ".join(tokenizer.convert_ids_to_tokens(leading))
        raise ModelError(
            f"the tokenizer puts {len(leading)} tokens before a text ({names}), a row begins with at most one; "
            f"say which: --bos {leading[-1]}, or --bos none"
        )
    return leading[0] if leading else None


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


def resolve_separator(tokenizer: Any, bos: int | None, model: str) -> int:
    """What stands between documents: the BOS, or the EOS where there is none. Raises ModelError without either."""
    separator = tokenizer.eos_token_id if bos is None else bos
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
