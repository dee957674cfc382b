"""Latent pages as the report shows them: every value checked when it is read, and written anew as data that cannot run."""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evaluate.latents.files import read_index, read_labels, read_page, script_json
from pipeline.base.digests import DIGESTS, require_digests
from pipeline.base.fields import Fields

MOST_LATENTS = 1 << 22
FREQUENT = 5e-4
"""Density from which a latent's label has been tried on enough tokens to be judged by."""


@dataclass(frozen=True)
class Summary:
    """What latent pages hold: counts, and by which criterion latents are related."""

    split: str
    n_tokens: int
    n_latents: int
    sizes: tuple[int, ...]
    n_shared: int
    page_size: int
    dead: int
    related_latents: int
    chance: float
    least: int
    containment: float | None
    null: float | None
    excess: float | None
    half: float | None

    def as_json(self) -> dict[str, Any]:
        """What the page's script reads."""
        return {
            "n_tokens": self.n_tokens,
            "levels": self.sizes,
            "n_shared": self.n_shared,
            "page_size": self.page_size,
            "criterion": {"chance": self.chance, "count": self.least},
        }


@dataclass(frozen=True)
class LatentPages:
    """All latents of one checkpoint; `opens` is the one to show first."""

    summary: Summary
    columns: Mapping[str, Sequence[Any]]
    pages: tuple[Mapping[str, Any], ...]
    opens: int

    @property
    def index(self) -> str:
        """The index as JSON that is safe inside an inert script element."""
        return script_json({"summary": self.summary.as_json(), "opens": self.opens, **self.columns})

    @property
    def packed(self) -> list[str]:
        """Each page's JSON, deflated, as base64: text of an inert script element."""
        plain = (json.dumps(page, separators=(",", ":"), ensure_ascii=False).encode() for page in self.pages)
        return [base64.b64encode(zlib.compress(data, 6)).decode() for data in plain]


def read_latents(folder: Path) -> LatentPages:
    """Read the latent pages in a folder. Raises DamagedError, naming file and field, unless each value is what it should be."""
    index = read_index(folder)
    summary = summary_of(index.inner("summary"))
    n = summary.n_latents
    columns: dict[str, Sequence[Any]] = {
        "level": whole(index.full_list("level", n, least=0, most=len(summary.sizes) - 1)),
        "density": index.full_list("density", n, least=0, most=1),
        "max": index.full_list("max", n, least=0),
        "label": index.list_of_texts("label", n),
        "related": whole(index.full_list("related", n, least=0)),
        "precision": shares(index, "precision", n),
        "recall": shares(index, "recall", n),
    }
    labels, own = read_labels(folder), columns["label"]
    columns["label"] = [f"{labels[i]} — {own[i]}" if i in labels else own[i] for i in range(n)]
    pages = tuple(page_of(read_page(folder, i), i, summary) for i in range(-(-n // summary.page_size)))
    require_digests(folder / DIGESTS, folder, folder.name)
    return LatentPages(summary, columns, pages, opens(summary, columns, pages))


def whole(values: Sequence[float]) -> list[int]:
    """Numbers as whole ones."""
    return [int(value) for value in values]


def shares(fields: Fields, name: str, n: int) -> list[float | None]:
    """n numbers from 0 to 1, or null. Raises DamagedError."""
    values = fields.list_of_numbers(name, n)
    if bad := [value for value in values if value is not None and not 0 <= value <= 1]:
        raise fields.wrong(name, "numbers from 0 to 1", bad[0])
    return values


def summary_of(fields: Fields) -> Summary:
    """The summary. Raises DamagedError when its numbers contradict each other."""
    sizes, n_latents = tuple(fields.list_of_wholes("levels")), fields.whole("n_latents", least=1)
    if not sizes or sizes[-1] != n_latents or list(sizes) != sorted(sizes) or n_latents > MOST_LATENTS:
        raise fields.wrong("levels", f"sizes that grow to n_latents, {n_latents}", list(sizes))
    criterion, told = fields.inner("criterion"), fields.inner("containment")
    excess, low = told.some_number("excess"), told.some_number("low")
    return Summary(
        split=fields.text("split", ""),
        n_tokens=fields.whole("n_tokens"),
        n_latents=n_latents,
        sizes=sizes,
        n_shared=fields.whole("n_shared", 0),
        page_size=fields.whole("page_size", least=1),
        dead=fields.whole("dead", 0),
        related_latents=fields.whole("related_latents", 0),
        chance=criterion.some_number("chance") or 0.0,
        least=criterion.whole("count", 0),
        containment=told.some_number("containment"),
        null=told.some_number("null"),
        excess=excess,
        half=None if excess is None or low is None else excess - low,
    )


def page_of(fields: Fields, number: int, summary: Summary) -> dict[str, Any]:
    """One page: a table of strings, and its latents in order."""
    strings, first = fields.list_of_texts("strings"), number * summary.page_size
    latents = fields.objects("latents")
    n = min(summary.page_size, summary.n_latents - first)
    if len(latents) != n:
        raise fields.wrong("latents", f"a list of {n}", latents)
    return {"strings": strings, "latents": [latent_of(latent, len(strings), summary.n_latents) for latent in latents]}


def latent_of(fields: Fields, n_strings: int, n_latents: int) -> dict[str, Any]:
    """One latent: contexts, relatives, and the tokens whose logits it raises and lowers most."""
    found: dict[str, Any] = {
        "related": [related_of(fields, link, n_latents) for link in fields.items("related")],
        "contexts": [context_of(fields, context, n_strings) for context in fields.items("contexts")],
        "drawn": [drawn_of(fields, context, n_strings) for context in fields.items("drawn")],
        "bars": whole(fields.full_list("bars", len(fields.items("bars")), least=0)),
        "step": fields.number("step", least=0),
    }
    for name in ("up", "down"):
        if name in fields.data:
            found[name] = [pair_of(fields, name, pair, n_strings) for pair in fields.items(name)]
    return found


def related_of(fields: Fields, link: Any, n_latents: int) -> Any:
    """Another latent, tokens together, containment, its null, decoder cosine."""
    if not is_numbers(link, 5) or not is_index(link[0], n_latents):
        raise fields.wrong("related", "five numbers, the first a latent", link)
    return link


def context_of(fields: Fields, context: Any, n_strings: int) -> Any:
    """Sequence, position of the peak, its index among the tokens shown, positions of their strings, activations."""
    if isinstance(context, list) and len(context) == 5 and is_numbers(context[:3], 3) and isinstance(context[3], list):
        tokens, n = context[3], len(context[3])
        if is_numbers(context[4], n) and is_index(context[2], n) and all(is_index(t, n_strings) for t in tokens):
            return context
    raise fields.wrong("contexts", "sequence, position, peak, tokens and an activation each", context)


def drawn_of(fields: Fields, context: Any, n_strings: int) -> Any:
    """The share of a latent's firing that is weaker, and a context."""
    if isinstance(context, list) and context and is_numbers(context[:1], 1) and 0 <= context[0] <= 1:
        return [context[0], *context_of(fields, context[1:], n_strings)]
    raise fields.wrong("drawn", "a share and a context", context)


def pair_of(fields: Fields, name: str, pair: Any, n_strings: int) -> Any:
    """Position of a token's string, and its logit."""
    if not is_numbers(pair, 2) or not is_index(pair[0], n_strings):
        raise fields.wrong(name, "a token and its logit", pair)
    return pair


def is_numbers(value: Any, n: int) -> bool:
    """Whether a value is a list of n numbers."""
    return isinstance(value, list) and len(value) == n and all(type(x) in (int, float) for x in value)


def is_index(value: Any, n: int) -> bool:
    """Whether a value is a position in a list of n."""
    return type(value) is int and 0 <= value < n


def opens(summary: Summary, columns: Mapping[str, Sequence[Any]], pages: Sequence[Mapping[str, Any]]) -> int:
    """The latent to show first: the strongest parent that a person can name, or in a dictionary without parents the latent that
    its label names best.

    A parent is a shared latent inside which specialised ones fire beyond chance, its strength that excess summed over them; the
    strength counts by how well its label says when it fires (F1 of precision and recall), since the strongest of all are often
    dense latents that no few tokens describe.
    """
    size = summary.page_size

    def strength(latent: int) -> float:
        links = pages[latent // size]["latents"][latent % size]["related"]
        return float(sum(share - null for _, _, share, null, _ in links))

    def named(latent: int) -> float:
        precision, recall = columns["precision"][latent] or 0.0, columns["recall"][latent] or 0.0
        return 2 * precision * recall / (precision + recall) if precision and recall else 0.0

    if parents := [latent for latent in range(min(summary.n_shared, summary.n_latents)) if columns["related"][latent]]:
        return max(parents, key=lambda latent: (named(latent) * strength(latent), strength(latent)))
    density = columns["density"]
    return max(
        range(summary.n_latents), key=lambda latent: (density[latent] >= FREQUENT, named(latent), density[latent])
    )
