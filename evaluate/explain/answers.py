"""Answers of a chat model, read back as data that anyone may have written, and what they are worth."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from evaluate.explain.prompts import KINDS, Question
from pipeline.base.errors import DamagedError, UsageError
from pipeline.base.fields import Fields, require_plain
from pipeline.base.files import read_lines

LONGEST_LABEL = 300
Z = 1.959963984540054
"""Of a 95 % interval."""


def read_answers(path: Path) -> dict[str, str]:
    """custom_id → text. A line is {"custom_id", "content"}, or holds `messages` whose last is the assistant's, or what batch
    services write: `response.body.choices[0].message.content`. Raises UsageError or DamagedError, naming the line."""
    try:
        lines = read_lines(path)
    except OSError as error:
        raise UsageError(f"--answers {path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise DamagedError(f"{path}: is not UTF-8 ({error.reason}); save the answers again") from error
    found: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = path.with_name(f"{path.name}: line {number}")
        try:
            data = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DamagedError(f"{where} is not JSON ({error}); save the answers again") from error
        require_plain(where, data)
        fields = Fields(where, data)
        name = fields.text("custom_id")
        if name in found:
            raise DamagedError(f"{where}: answers {name[:60]!r} again; keep one answer a prompt")
        found[name] = content_of(fields)
    return found


def content_of(fields: Fields) -> str:
    """The assistant's text of a line."""
    if "content" in fields.data:
        return fields.text("content")
    if "messages" in fields.data:
        last = fields.objects("messages")[-1:]
        if not last or last[0].text("role", "") != "assistant":
            raise fields.wrong("messages", "a list that ends with the assistant's message", None)
        return last[0].text("content")
    choices = fields.inner("response").inner("body").objects("choices")
    if not choices:
        raise fields.wrong("response.body.choices", "a list with an answer", None)
    return choices[0].inner("message").text("content")


def label_of(answer: str) -> str:
    """The last line of an explainer's answer, at most LONGEST_LABEL characters; "" where it says nothing."""
    lines = [line.strip() for line in answer.splitlines() if line.strip()]
    return re.sub(r"(?i)^\W*explanation\W*:\s*", "", lines[-1])[:LONGEST_LABEL] if lines else ""


def verdicts_of(answer: str, n: int) -> list[int] | None:
    """The last list of `n` zeros and ones in a judge's answer; None where there is none: it is counted, never guessed."""
    lists = re.findall(r"\[([01](?:\s*,\s*[01])*)\]", answer)
    found = [int(word) for word in re.findall("[01]", lists[-1])] if lists else []
    return found if len(found) == n else None


def wilson(hits: int, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share."""
    p, z2 = hits / n, Z * Z / n
    middle, half = (p + z2 / 2) / (1 + z2), Z * math.sqrt(p * (1 - p) / n + z2 / (4 * n)) / (1 + z2)
    return max(0.0, middle - half), min(1.0, middle + half)


def balanced_accuracy(right: Sequence[int], said: Sequence[int]) -> dict[str, float] | None:
    """Mean of the shares of yes and of no that were said rightly, with a 95 % interval out of Wilson's of both (square and add,
    Newcombe 1998). None where one of the two was never right."""
    shares = []
    for value in (1, 0):
        chosen = [s for r, s in zip(right, said, strict=True) if r == value]
        if not chosen:
            return None
        hits = sum(s == value for s in chosen)
        shares.append((hits / len(chosen), *wilson(hits, len(chosen))))
    (p, p_low, p_high), (q, q_low, q_high) = shares
    below, above = math.hypot(p - p_low, q - q_low) / 2, math.hypot(p_high - p, q_high - q) / 2
    mean = (p + q) / 2
    return {"balanced_accuracy": mean, "low": max(0.0, mean - below), "high": min(1.0, mean + above), "n": len(right)}


def score(asked: Sequence[Question], answers: Mapping[str, str]) -> dict[str, Any]:
    """By kind of question: balanced accuracy, and how many prompts were not answered, or not readably."""
    said = {q.id: verdicts_of(answers[q.id], len(q.right)) for q in asked if q.id in answers}
    return {
        kind: scored([q for q in asked if q.kind == kind], said)
        | {"unanswered": sum(q.kind == kind and q.id not in answers for q in asked)}
        for kind in KINDS
    }


def scored(asked: Sequence[Question], said: Mapping[str, Sequence[int] | None]) -> dict[str, Any]:
    """Balanced accuracy of one kind of question over the prompts that were answered readably."""
    pairs = [(q.right, verdicts) for q in asked if (verdicts := said.get(q.id)) is not None]
    right, told = ([one for part in parts for one in part] for parts in zip(*pairs)) if pairs else ([], [])
    nothing: dict[str, Any] = {"balanced_accuracy": None, "low": None, "high": None, "n": len(right)}
    return (
        nothing
        | (balanced_accuracy(right, told) or {})
        | {"unreadable": sum(q.id in said and said[q.id] is None for q in asked)}
    )
