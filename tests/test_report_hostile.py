"""Results and latent pages made by an enemy end in one line that names the file, or in a report; never in a traceback."""

from __future__ import annotations

import json
import random
import unittest.mock
from pathlib import Path
from typing import Any

import pytest

from evaluate.latents.files import latents_folder
from evaluate.report.latents import read_latents
from evaluate.report.pages import environment
from evaluate.report.write import write_report
from evaluate.results import tabulate
from pipeline.base.digests import DIGESTS
from pipeline.base.errors import DamagedError
from pipeline.base.files import read_json
from support.fuzzing import as_bytes, mutated, one_line_or_none
from support.results_files import write_latent_pages, write_results


def fuzz_results(folder: Path, n: int, seed: int, *, drawn: bool) -> int:
    """Read and report n mutated results files beside good ones; how many were refused."""
    paths = write_results(folder, alphas=(0.0, 0.2), seeds=(0, 1), steps=(400,))
    target, rng = paths[2], random.Random(seed)
    good, refused = read_json(target), 0
    undrawn = {} if drawn else {"inline": lambda panel: ""}
    numbers = unittest.mock.MagicMock() if drawn else unittest.mock.patch("evaluate.report.write.write_numbers")
    with numbers, unittest.mock.patch.dict(environment().globals, undrawn):
        for _ in range(n):
            target.write_bytes(as_bytes(mutated(good, rng), rng))
            refused += one_line_or_none(lambda: write_report([folder], folder / "report.html"), target)
    return refused


def fuzz_csv(folder: Path, n: int, seed: int) -> int:
    """Make results.csv with n mutated results files beside a good one; how many were refused."""
    paths = write_results(folder, alphas=(0.0, 0.2), seeds=(0,), steps=(400,))
    good, rng, refused = read_json(paths[1]), random.Random(seed), 0
    for _ in range(n):
        paths[1].write_bytes(as_bytes(mutated(good, rng), rng))
        refused += one_line_or_none(lambda: tabulate(folder), paths[1])
    return refused


def fuzz_latents(folder: Path, n: int, seed: int) -> int:
    """Read n mutated latent indexes and pages; how many were refused."""
    path = write_results(folder, alphas=(0.2,), seeds=(0,), steps=(400,))[0]
    pages = latents_folder(path)
    rng, refused = random.Random(seed), 0
    for _ in range(n):
        (write_latent_pages(path, ["one", "two"]) / DIGESTS).unlink()  # an enemy can make them anew
        name, head = rng.choice((("index.js", "nestedLatents.index("), ("page_0000.js", "nestedLatents.page(0,")))
        data = json.loads((pages / name).read_text()[len(head) : -3])
        (pages / name).write_bytes(head.encode() + as_bytes(mutated(data, rng), rng) + b");\n")
        refused += one_line_or_none(lambda: read_latents(pages), pages / name)
    return refused


def test_hostile_results_end_in_one_line(tmp_path: Path) -> None:
    """Mutated results files are reported or refused in one line that names them."""
    assert 20 < fuzz_results(tmp_path, 60, seed=1, drawn=False) < 60


def test_hostile_latents_end_in_one_line(tmp_path: Path) -> None:
    """Mutated latent pages are read or refused in one line that names them."""
    assert 100 < fuzz_latents(tmp_path, 300, seed=1) < 300


def test_hostile_results_beside_csv(tmp_path: Path) -> None:
    """Mutated results files in a folder stand in results.csv or are refused in one line that names them."""
    assert 50 < fuzz_csv(tmp_path, 300, seed=1) < 300


@pytest.mark.slow
def test_hostile_results_end_in_line(tmp_path: Path) -> None:
    """Likewise, two thousand, with every number and figure written for a part of them."""
    assert fuzz_results(tmp_path / "drawn", 100, seed=2, drawn=True) > 30
    assert fuzz_results(tmp_path / "plain", 1900, seed=3, drawn=False) > 600


@pytest.mark.slow
def test_hostile_latents_end_in_line(tmp_path: Path) -> None:
    """Likewise, ten thousand."""
    assert fuzz_latents(tmp_path / "latents", 10_000, seed=4) > 3000
    assert fuzz_csv(tmp_path / "csv", 10_000, seed=5) > 2000


@pytest.mark.parametrize(("cut", "added"), [(0, "\nalert(1)"), (0, ";alert(1);\n"), (3, "alert(1));\n"), (3, "a()")])
def test_scripts_among_latents_are_refused(tmp_path: Path, cut: int, added: str) -> None:
    """A data file that holds anything but one call with JSON is refused by name and carried nowhere."""
    path = write_results(tmp_path, alphas=(0.0,), seeds=(0,), steps=(400,))[0]
    page = write_latent_pages(path, ["one"]) / "page_0000.js"
    text = page.read_text()
    page.write_text(text[: len(text) - cut] + added)
    with pytest.raises(DamagedError, match=r"page_0000\.js: does not read as latent pages"):
        write_report([tmp_path], tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_nesting_has_an_end(tmp_path: Path) -> None:
    """JSON that is nested deeper than ours ever is, in a part that nothing else reads, is refused by the field's name."""
    path = write_results(tmp_path, alphas=(0.0,), seeds=(0,), steps=(400,))[0]
    deep: Any = 1
    for _ in range(60):
        deep = {"a": deep}
    path.write_text(json.dumps(read_json(path) | {"features": deep}))
    with pytest.raises(DamagedError, match="nested deeper than"):
        write_report([tmp_path], tmp_path / "report.html")


@pytest.mark.parametrize(
    "bad", [[3, 1, 2, [0, 1], [0.5, 0.5]], [3, 1, 0, [0, 2], [0.5, 0.5]], [3, 1, 0, [0, 1], [0.5]]]
)
def test_positions_outside_their_lists_are_refused(tmp_path: Path, bad: list[Any]) -> None:
    """A peak beyond the tokens shown, a token beyond the strings, and an activation too few are refused."""
    folder = write_latent_pages(write_results(tmp_path, alphas=(0.0,), seeds=(0,), steps=(400,))[0], ["one", "two"])
    page = folder / "page_0000.js"
    page.write_text(page.read_text().replace("[3,1,1,[0,1],[0.5,0.5]]", json.dumps(bad), 1))
    with pytest.raises(DamagedError, match="contexts"):
        read_latents(folder)
