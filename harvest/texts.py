"""From what a record holds to token ids: texts, chats rendered with the tokenizer's template, ids that were there before.

What looks like a special token inside a text is text: a corpus cannot put in a BOS. `parse_special` reads it as the token
that it names; that is how the turn markers of rendered chats stay what they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from harvest.corpus import Document, Message
from harvest.long_text import GIANT, TextFile, cut
from pipeline.base.errors import CorpusError, ModelError

Tokens = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Piece:
    """Tokens of a document, or of a part of one. `starts`: a document begins here. `kept`: which of them are kept (None:
    all). `bad`: what is wrong with a record that holds no document."""

    ids: Tokens
    starts: bool = True
    kept: npt.NDArray[np.bool_] | None = None
    bad: str | None = None

    def after(self, n: int) -> Piece:
        """What is left of it without its first n tokens."""
        return Piece(self.ids[n:], False, None if self.kept is None else self.kept[n:])


@dataclass(frozen=True)
class Part:
    """A text to tokenise, or ids as they are. `spans`: the characters that are kept, where not all are. `bad`: as of a Piece."""

    where: str
    text: str = ""
    ids: Sequence[int] = ()
    starts: bool = True
    spans: tuple[tuple[int, int], ...] | None = None
    bad: str | None = None


@dataclass(frozen=True)
class Reader:
    """How documents become tokens. `roles`: of chats, whose messages' tokens are kept; empty: all of everything. `first`: what
    begins a row, which texts that were rendered or tokenised before may have too."""

    tokenizer: Any
    vocab: int
    parse_special: bool = False
    roles: tuple[str, ...] = ()
    first: tuple[int, ...] = ()

    def parts(self, documents: Iterator[Document] | Iterator[Document | CorpusError]) -> Iterator[Part]:
        """What is tokenised at once. Raises CorpusError for a document that cannot be rendered or has ids out of range."""
        for document in documents:
            if isinstance(document, CorpusError):
                yield Part("", bad=str(document))
                continue
            content = document.content
            if isinstance(content, str | TextFile):
                require_chat(self.roles, document.where)
                cuts = cut(content, GIANT) if isinstance(content, str) else content.parts()
                yield from (Part(document.where, text, starts=start == 0) for start, text in cuts)
            elif isinstance(content[0], int):
                require_chat(self.roles, document.where)
                yield Part(document.where, ids=self.checked(content, document.where))
            else:
                yield self.rendered(content, document.where)

    def checked(self, ids: Sequence[Any], where: str) -> Sequence[int]:
        """Ids of the model's vocabulary, without what begins rows anyway, or a BOS, at their start."""
        low, high = min(ids), max(ids)
        if low < 0 or high >= self.vocab:
            bad = low if low < 0 else high
            raise CorpusError(f"{where}: token id {bad} is not one of the model's {self.vocab}; were other ids meant?")
        n = len(self.first)
        if n and tuple(ids[:n]) == self.first:
            return ids[n:]
        return ids[1:] if ids[0] == self.tokenizer.bos_token_id else ids

    def rendered(self, messages: Sequence[Message], where: str) -> Part:
        """A chat as the tokenizer's template writes it, and the characters of the turns that are kept."""
        text = self.template(messages, where)
        spans = self.turns(messages, text, where) if self.roles else None
        names = ("".join(self.tokenizer.convert_ids_to_tokens(self.first)), self.tokenizer.bos_token or "")
        n = next((len(name) for name in names if name and text.startswith(name)), 0)
        if n == 0:
            return Part(where, text, spans=spans)
        return Part(where, text[n:], spans=None if spans is None else tuple((a - n, b - n) for a, b in spans))

    def template(self, messages: Sequence[Message], where: str, *, prompt: bool = False) -> str:
        """Messages as text; `prompt`: with the beginning of an answer after them."""
        import jinja2

        if not self.tokenizer.chat_template:
            raise ModelError(f"{where}: is a chat, and the model's tokenizer has no chat template; choose --text-field")
        try:
            return str(self.tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=prompt))
        except (jinja2.TemplateError, ValueError, TypeError, KeyError) as error:
            raise CorpusError(
                f"{where}: the chat template refuses it ({error}); mend it, or another --text-field"
            ) from error

    def turns(self, messages: Sequence[Message], text: str, where: str) -> tuple[tuple[int, int], ...]:
        """Characters of the turns of `roles`, each from behind its header (where the template has one to say) to its end."""
        spans, start = [], 0
        for i, message in enumerate(messages, 1):
            end = len(text) if i == len(messages) else len(self.template(messages[:i], where))
            if message["role"] in self.roles:
                header = self.template(messages[: i - 1], where, prompt=True) if i > 1 else ""
                answers = message["role"] == "assistant" and text.startswith(header)
                spans.append((len(header) if answers and start <= len(header) <= end else start, end))
            if i < len(messages) and not text.startswith(self.template(messages[:i], where)):
                raise CorpusError(f"{where}: its chat template does not write turn after turn; --roles cannot be used")
            start = end
        return tuple(spans)

    def pieces(self, parts: Sequence[Part]) -> list[Piece]:
        """Token ids of some parts, in their order."""
        spans = any(part.spans is not None for part in parts)
        if spans and not self.tokenizer.is_fast:
            raise ModelError("--roles needs a fast tokenizer, which knows where in the text its tokens are")
        texts = [part.text for part in parts if part.text]
        options: dict[str, Any] = {"return_offsets_mapping": True} if spans else {}
        found: Any = {"input_ids": []}
        if texts:
            try:
                found = self.tokenizer(
                    texts,
                    add_special_tokens=False,
                    split_special_tokens=not self.parse_special,
                    return_attention_mask=False,
                    verbose=False,
                    **options,
                )
            except Exception as error:
                if type(error) is not Exception:  # the tokenizers library raises this alone
                    raise
                raise ModelError(
                    f"the tokenizer refuses {parts[0].where} ({error}); look at its tokenizer.json and tokenizer_config.json"
                ) from error
        ids = iter(found["input_ids"])
        offsets = iter(found["offset_mapping"] if spans else [None] * len(texts))
        return [
            piece_of(part, next(ids), next(offsets)) if part.text else piece_of(part, part.ids, None) for part in parts
        ]


def piece_of(part: Part, ids: Sequence[int], offsets: Sequence[tuple[int, int]] | None) -> Piece:
    """A part's tokens, marked as kept where they begin inside one of its spans."""
    tokens = np.asarray(ids, np.int32)
    if part.bad is not None:
        return Piece(tokens, bad=part.bad)
    if part.spans is None or offsets is None:
        return Piece(tokens, part.starts)
    begins = np.array([begin for begin, _ in offsets], np.int64).reshape(-1)
    kept = np.zeros(len(tokens), np.bool_)
    for start, end in part.spans:
        kept |= (begins >= start) & (begins < end)
    return Piece(tokens, part.starts, kept)


def require_chat(roles: tuple[str, ...], where: str) -> None:
    """Raise CorpusError when messages are needed and this is not a chat."""
    if roles:
        raise CorpusError(f"{where}: --roles {','.join(roles)} needs messages with roles; choose --text-field")
