"""First letters from prompts, as the field publishes them: rows at a word's last token before it is asked for its letter.

    ·the has the first letter: T⏎·quick has the first letter: Q⏎ … ·word has the first letter:

After arXiv 2409.14507 and SAEBench 0.6 (its template, ten examples, four fifths of words to train on, letters found with an F1
of at least 0.6, at least 20 of them): words are the tokenizer's tokens of letters alone, or those of a file; examples come
from the word's own part, training or testing, drawn anew for each word, which is never its own example. The rows are probed
and scored as a store's are (`evaluate/scores/labels.py`, `absorption.py`): centred by the store's mean, the cut of a probe
that of the best training F1. Probes are kept on disk; the rows, which each checkpoint encodes, are made once a job.

Memory: words · d_model · 4 bytes, twice while probes are trained.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float
from torch import Tensor

from evaluate.probing.probes import require_shapes
from evaluate.probing.texts import TextModel, clipped, padded
from evaluate.scores.labels import LABELS, LETTERS, MAX_ROWS, MIN_F1, Labelled, Letters, Probes, train_probes
from pipeline.base.errors import UsageError
from pipeline.base.files import hash_config, read_text, sha256
from pipeline.base.progress import Progress
from pipeline.base.runtime import numpy_rng
from pipeline.base.token_text import TokenText
from pipeline.model.specials import first_ids, special_ids
from pipeline.sae.checkpoint import load_tensors, save_tensors

QUESTION = " has the first letter:"
N_EXAMPLES, TRAIN_SHARE, MIN_LETTERS = 10, 0.8, 20
FORMAT, VERSION = "nested-sae-letter-probes", 1


@dataclass(frozen=True)
class Words:
    """Words, a leading space included where they have one, and whether each is one that probes are trained on."""

    text: tuple[str, ...]
    train: npt.NDArray[np.bool_]

    @property
    def letters(self) -> npt.NDArray[np.int64]:
        """Index of each one's first letter."""
        return np.array([LETTERS.index(word.strip()[0].lower()) for word in self.text], np.int64)


def draw_words(found: Sequence[str], seed: int) -> Words:
    """At most MAX_ROWS of the words, in an order of the seed, the first TRAIN_SHARE of which are to train on."""
    order = numpy_rng("first letter", seed).permutation(len(found))[:MAX_ROWS]
    train = np.arange(len(order)) < round(TRAIN_SHARE * len(order))
    return Words(tuple(found[i] for i in order), train)


def vocabulary(tokenizer: Any) -> list[str]:
    """The texts of all tokens that are letters of a to z alone, behind a space or not; each once, sorted."""
    text, special = TokenText(tokenizer), set(special_ids(tokenizer))
    found = {text.plain(token) for token in range(len(tokenizer)) if token not in special}
    return sorted(word for word in found if re.fullmatch(" ?[A-Za-z]+", word))


def read_words(path: Path) -> list[str]:
    """The words of a file, one a line, each once, in order; a leading space is the word's own.

    Raises UsageError, naming the line, where one is not letters of a to z alone, and for a file that cannot be read.
    """
    try:
        lines = read_text(path).splitlines()
    except (OSError, UnicodeDecodeError) as error:
        said = getattr(error, "strerror", None) or type(error).__name__
        raise UsageError(f"--words {path}: cannot be read as text ({said}); give words, one a line") from None
    for number, line in enumerate(lines, 1):
        if line.strip() and not re.fullmatch(" ?[A-Za-z]+", line.rstrip()):
            raise UsageError(f"--words {path}, line {number}: {line[:40]!r} is not one word of letters a to z")
    if not (words := list(dict.fromkeys(line.rstrip() for line in lines if line.strip()))):
        raise UsageError(f"--words {path}: there is no word in it; give words, one a line")
    return words


def make_prompts(words: Words, seed: int) -> list[str]:
    """Every word's prompt, the question about it at the end."""
    rng = numpy_rng("first letter examples", seed)
    asked = [f"\n{word}{QUESTION}" for word in words.text]
    answered = [f"{prompt} {LETTERS[letter].upper()}" for prompt, letter in zip(asked, words.letters)]
    prompts = []
    for part in (np.flatnonzero(words.train), np.flatnonzero(~words.train)):
        n = min(N_EXAMPLES, len(part) - 1)
        for at in range(len(part)):
            others = rng.choice(len(part) - 1, n, replace=False)
            prompts.append("".join(answered[part[i + (i >= at)]] for i in others) + asked[part[at]])
    return prompts


def word_ends(
    ids: Sequence[Sequence[int]], words: Words, tokenize: Callable[[Sequence[str]], list[list[int]]]
) -> list[int]:
    """How many of each prompt's tokens come before the end of its word.

    Raises UsageError where a tokenizer joins a word with what follows it.
    """
    heads = tokenize([f"\n{word}" for word in words.text])
    whole = tokenize([f"\n{word}{QUESTION}" for word in words.text])
    ends = []
    for word, head, full, prompt in zip(words.text, heads, whole, ids):
        tail = full[len(head) :]
        if full[: len(head)] != head or not tail or list(prompt[-len(tail) :]) != tail:
            raise UsageError(
                f"--scores first_letter: this tokenizer joins {word!r} with what follows it, so the word has no last token; "
                "leave the word out (--words FILE), or this score"
            )
        ends.append(len(prompt) - len(tail))
    return ends


@torch.inference_mode()
def prompt_rows(
    words: Words, seed: int, model: TextModel, batch_size: int
) -> tuple[Float[Tensor, "word d_model"], Float[Tensor, "word d_made"]] | int:
    """The rows of every word's last token in its prompt, float32: those that are encoded and those that are rebuilt, which
    are the same ones but for transcoders; or, where the model has too few positions for the longest prompt, its length.

    Raises UsageError as `word_ends`. Prompts go through in order of length, so that batches hold little padding.
    """
    tokens = model.tokenize(make_prompts(words, seed))
    ends = word_ends(tokens, words, model.tokenize)
    bos = first_ids(model.bos)
    longest = len(bos) + max(map(len, tokens))
    if model.context_limit is not None and longest > model.context_limit:
        return longest
    found: list[Tensor] = []
    order = np.argsort([-len(ids) for ids in tokens], kind="stable")
    with Progress(len(order), "first letters", "prompt") as bar:
        for batch in np.split(order, range(batch_size, len(order), batch_size)):
            last = torch.tensor([len(bos) + ends[i] - 1 for i in batch])
            both = model.read_and_made(padded([clipped(tokens[i], model.bos, longest) for i in batch]))
            for k, residual in enumerate(both[:1] if model.both is None else both):
                if len(found) <= k:
                    found.append(torch.empty(len(order), residual.shape[-1]))
                at = last.to(residual.device)
                found[k][torch.from_numpy(batch)] = residual[torch.arange(len(at), device=at.device), at].float().cpu()
            bar.advance(len(batch))
    return found[0], found[-1]


def first_letters(
    words: Words,
    seed: int,
    model: TextModel,
    center: Float[Tensor, " d_model"],
    batch_size: int,
    device: torch.device,
    probes_folder: Path | None = None,
) -> Letters:
    """Rows of the words in prompts, and probes of their first letters, read from `probes_folder` where they were trained before.

    Where the model is not one that shows first letters, no probes but a sentence that says so. Raises UsageError as
    `word_ends`, DamagedError for kept probes whose bytes changed.
    """
    about = {"template": "{word}" + QUESTION, "n_examples": N_EXAMPLES, "n_words": len(words.text)}
    both = prompt_rows(words, seed, model, batch_size)
    if isinstance(both, int):
        why = f"prompts are up to {both} tokens long and the model has {model.context_limit} positions"
        return Letters(about | {"why": f"First letters were not scored: {why}."}, None, center)
    read, rows = both
    label = np.full((len(words.text), len(LABELS)), -1, np.int8)
    label[:, : len(LETTERS)] = words.letters[:, None] == np.arange(len(LETTERS))
    position = np.arange(len(words.text))
    labelled = Labelled(position, position, label, words.train, "words", tuple(LETTERS))
    key = {**model.identity, **about, "seed": seed, "words": sha256("\n".join(words.text)), "center": center.tolist()}
    path = probes_folder / f"letters-{hash_config(key)[:16]}.safetensors" if probes_folder else None
    probes = kept_probes((rows - center.cpu()).to(device), labelled, path)
    if probes.n_letters < MIN_LETTERS:
        why = (
            f"First letters were not scored: {probes.n_letters} of them have a probe with an F1 of at least {MIN_F1} on "
            f"unseen words, and it takes {MIN_LETTERS}."
        )
        return Letters(about | probes.about() | {"why": why}, None, center)
    return Letters(about, probes, center.to(device), None if model.both is None else read.to(device))


def kept_probes(x: Float[Tensor, "word d_model"], rows: Labelled, path: Path | None) -> Probes:
    """Probes as a file of an earlier job has them, else trained and kept there."""
    if path is not None and path.is_file():
        tensors, header = load_tensors(path, FORMAT, VERSION)
        names, left_out = header.list_of_texts("names"), header.inner("left_out")
        n = len(names)
        require_shapes(path, tensors, {"weight": (n, x.shape[1]), "bias": (n,), "f1": (n,)})
        weight, bias = tensors["weight"].to(x), tensors["bias"].to(x)
        return Probes(tuple(names), weight, bias, tuple(tensors["f1"].tolist()), dict(left_out.data), rows, x)
    probes = train_probes(x, rows)
    if path is not None:
        f1 = torch.tensor(probes.f1, dtype=torch.float64)
        tensors = {"weight": probes.weight, "bias": probes.bias, "f1": f1}
        said = {"format": FORMAT, "version": VERSION, "names": list(probes.names), "left_out": probes.left_out}
        save_tensors(path, tensors, said)
    return probes
