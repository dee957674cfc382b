"""Which latent the pages open on: hand-made columns."""

from __future__ import annotations

from typing import Any

from evaluate.report.latents import Summary, opens


def summary(n_latents: int, n_shared: int) -> Summary:
    """A summary of so many latents, of which so many are shared, on pages of two."""
    sizes = (n_shared, n_latents) if n_shared else (n_latents,)
    return Summary("eval", 1000, n_latents, sizes, n_shared, 2, 0, 0, 0.01, 20, None, None, None, None)


def opened(n_shared: int, latents: list[tuple[float, float | None, float | None, list[float]]]) -> int:
    """The latent opened of dictionaries given as (density, precision, recall, excess of each relative)."""
    columns: dict[str, list[Any]] = {
        "density": [density for density, *_ in latents],
        "precision": [precision for _, precision, _, _ in latents],
        "recall": [recall for _, _, recall, _ in latents],
        "related": [len(links) for *_, links in latents],
    }
    rows = [{"related": [[0, 30, excess + 0.1, 0.1, 0.0] for excess in links]} for *_, links in latents]
    pages = [{"latents": rows[at : at + 2]} for at in range(0, len(rows), 2)]
    return opens(summary(len(latents), n_shared), columns, pages)


def test_named_parent_beats_stronger_one() -> None:
    """A parent whose label says when it fires is opened rather than a somewhat stronger one that no token describes."""
    dense, named = (0.2, 1.0, 0.1, [0.8, 0.8, 0.8]), (0.07, 1.0, 0.6, [0.8, 0.7])
    assert opened(3, [dense, named, (0.01, 1.0, 1.0, []), (0.01, 1.0, 1.0, [0.5])]) == 1


def test_unnamed_parents_go_by_strength() -> None:
    """Where no label was judged the strongest parent is opened; specialised latents never are."""
    assert (
        opened(3, [(0.2, None, None, [0.3]), (0.2, None, None, [0.4]), (0.2, 0.9, 0.9, []), (0.1, 0.9, 0.9, [0.9])])
        == 1
    )


def test_flat_opens_on_the_best_named() -> None:
    """A flat dictionary opens on the latent that its label names best, not on one that fired a time or two."""
    assert opened(0, [(1e-4, 1.0, 1.0, []), (0.01, 0.9, 0.8, []), (0.02, 0.9, 0.4, []), (0.0, None, None, [])]) == 1


def test_dead_dictionary_opens_somewhere() -> None:
    """A dictionary that never fired still opens on a latent."""
    assert opened(0, [(0.0, None, None, []), (0.0, None, None, [])]) in (0, 1)
