"""Prompts for an explainer and for a judge, in the common chat format, and which answers are right.

    explain     windows of all strengths, firing tokens marked; asked for: what they share
    detection   a label, and windows without marks; asked for: in which does it fire
    fuzzing     a label, and windows with marks, half of them on tokens that it does not fire on; asked for: which marks are right

A line is {"custom_id": "…", "messages": [{"role": "system" | "user", "content": "…"}]}. Which answers are right is in no prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from evaluate.explain.examples import Examples, Window
from pipeline.base.runtime import numpy_rng

PER_PROMPT = 5
"""Windows that a judge sees at once."""
KINDS = ("detection", "fuzzing")
OPEN, CLOSE = "<<", ">>"
TOP_TOKENS = 3

EXPLAINER = (
    f"You study one unit of a sparse dictionary of a language model. Each line is a piece of text; tokens on which the unit is "
    f"active stand between {OPEN} and {CLOSE}, with the strength (1 to 10) behind. Pieces go from strong to weak. Say in one "
    "line, as briefly and as specifically as you can, what makes the unit active. Write that line and nothing else."
)
JUDGES = {
    "detection": "You are told what makes one unit of a language model active, and shown numbered pieces of text. For each, "
    "decide whether the unit is active somewhere in it.",
    "fuzzing": f"You are told what makes one unit of a language model active, and shown numbered pieces of text in which tokens "
    f"stand between {OPEN} and {CLOSE}. For each, decide whether the unit is active on the marked tokens.",
}
ANSWER = " Answer with one list of {n} numbers, 1 for yes and 0 for no, like [{like}], and nothing else."
Text = Callable[[int], str]


@dataclass(frozen=True)
class Question:
    """One prompt for a judge, and what is right: 1 or 0 a window. marked: positions of each window's marks."""

    id: str
    kind: str
    latent: int
    windows: tuple[Window, ...]
    marked: tuple[tuple[int, ...], ...]
    right: tuple[int, ...]


def marked_text(window: Window, marked: Sequence[int], text: Text, strength: float | None = None) -> str:
    """The text of a window, marks around some tokens; with `strength`, the largest activation of all, how strong each is."""
    parts = []
    for i, token in enumerate(window.tokens):
        shown = text(token)
        if i in marked:
            rank = "" if strength is None else f"({max(1, round(10 * window.acts[i] / strength))})"
            shown = f"{OPEN}{shown}{CLOSE}{rank}"
        parts.append(shown)
    return "".join(parts)


def message(custom_id: str, system: str, user: str) -> dict[str, Any]:
    """One line."""
    return {
        "custom_id": custom_id,
        "messages": [{"role": "system", "content": system}, {"role": "user", "content": user}],
    }


def explain_id(source: str, latent: int) -> str:
    """Names the explainer's prompt; `source` is the checkpoint's hash."""
    return f"{source[:12]}-{latent}-explain"


def explain_prompt(source: str, examples: Examples, text: Text) -> dict[str, Any]:
    """The explainer's prompt of a latent."""
    strength = max(max(window.acts) for window in examples.explain)
    lines = [f"{i + 1}. {marked_text(w, w.fired, text, strength)}" for i, w in enumerate(examples.explain)]
    return message(explain_id(source, examples.latent), EXPLAINER, "\n".join(lines))


def questions(source: str, examples: Examples, seed: int) -> Iterator[Question]:
    """A judge's questions about a latent, the same for every label; shuffled, PER_PROMPT windows each."""
    for kind in KINDS:
        rng = numpy_rng("explain", kind, seed, examples.latent)
        items = detection_items(examples) if kind == "detection" else fuzzing_items(examples, rng)
        items = [items[i] for i in rng.permutation(len(items))]
        for number, first in enumerate(range(0, len(items), PER_PROMPT)):
            windows, marked, right = zip(*items[first : first + PER_PROMPT], strict=True)
            yield Question(
                f"{source[:12]}-{examples.latent}-{kind}-{number}", kind, examples.latent, windows, marked, right
            )


Item = tuple[Window, tuple[int, ...], int]
"""A window, the positions of its marks, and whether yes is right."""


def detection_items(examples: Examples) -> list[Item]:
    """Windows that fire, and silent ones."""
    return [*((w, (), 1) for w in examples.score), *((w, (), 0) for w in examples.silent)]


def fuzzing_items(examples: Examples, rng: np.random.Generator) -> list[Item]:
    """Every other window with its marks, the others with as many on tokens that do not fire, where there are any."""
    items: list[Item] = []
    for i, w in enumerate(examples.score):
        others = [k for k in range(len(w.tokens)) if k not in w.fired]
        if i % 2 == 0 or not others:
            items.append((w, w.fired, 1))
        else:
            n = min(len(w.fired), len(others))
            items.append((w, tuple(sorted(int(k) for k in rng.choice(others, n, replace=False))), 0))
    return items


def judge_prompt(question: Question, label: str, text: Text) -> dict[str, Any]:
    """The prompt of a question for a label."""
    n = len(question.windows)
    system = JUDGES[question.kind] + ANSWER.format(n=n, like=", ".join("10"[i % 2] for i in range(n)))
    pieces = [f"{i + 1}. {marked_text(w, m, text)}" for i, (w, m) in enumerate(zip(question.windows, question.marked))]
    return message(question.id, system, "\n".join([f"The unit is active on: {label}", *pieces]))


def token_label(examples: Examples, text: Text) -> tuple[str, tuple[int, ...]]:
    """The rule-based explainer: the tokens on which the latent fires most, over the explainer's windows; and their ids."""
    total: dict[int, float] = {}
    for w in examples.explain:
        for i in w.fired:
            total[w.tokens[i]] = total.get(w.tokens[i], 0.0) + w.acts[i]
    top = tuple(sorted(total, key=lambda token: (-total[token], token))[:TOP_TOKENS])
    return "the tokens " + ", ".join(repr(text(token)) for token in top), top


def token_judge(question: Question, top: Sequence[int]) -> list[int]:
    """The rule-based judge: yes where one of the label's tokens is there, or is marked."""
    if question.kind == "detection":
        asked = [w.tokens for w in question.windows]
    else:
        asked = [tuple(w.tokens[i] for i in m) for w, m in zip(question.windows, question.marked)]
    return [int(any(token in top for token in tokens)) for tokens in asked]
