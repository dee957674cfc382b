"""Experiment files made by an enemy are read or refused in one line, run no code of a model, and name no option but their own."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from pipeline.base.errors import UsageError
from pipeline.experiment import experiment as experiments
from pipeline.experiment import stages
from support.fuzzing import mutated, one_line_or_none

GOOD: dict[str, Any] = {
    "name": "mine",
    "harvest": {"model": "m", "layer": [1, 2], "corpus": "./c.jsonl", "tokens": "8k", "compile": False},
    "train": [{"alpha": [0, 0.2], "seed": [0, 1], "width": 64}, {"recipe": "batchtopk", "k": 32}],
    "evaluate": {"scores": "kl,ev"},
    "report": {"title": "T"},
    "part": [{"name": "other", "harvest": {"truth": "tree"}, "train": {"width": 64}}],
}


def as_toml(value: Any) -> str:
    """A value of TOML; what TOML lacks, null, is a bare word that its reader refuses."""
    depth = 0
    while isinstance(value, list) and len(value) == 1:
        value, depth = value[0], depth + 1
    return "[" * depth + flat_toml(value) + "]" * depth


def flat_toml(value: Any) -> str:
    """A value that is no list of one."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(str(key))} = {as_toml(one)}" for key, one in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(as_toml(one) for one in value) + "]"
    return json.dumps(value).replace("NaN", "nan").replace("Infinity", "inf")


def as_file(data: Any) -> bytes:
    """An experiment file."""
    if not isinstance(data, dict):
        return as_toml(data).encode("utf-8", "surrogatepass")
    lines = [f"{json.dumps(str(key))} = {as_toml(value)}" for key, value in data.items()]
    return "\n".join(lines).encode("utf-8", "surrogatepass")


def read_everything(path: Path) -> None:
    """All that is made of a file before the first stage: places and every stage's words, which must be plain."""
    read = experiments.Experiment.read(path)
    for part in (read, *read.parts):
        places = experiments.Places.of(part, path.parent / "out", part.name if part is not read else "")
        words = experiments.harvest_words(part, places)
        for site in part.trained:
            for grid in site.grids:
                words += experiments.train_words(grid, places, site)
            words += experiments.evaluate_words(part, places, site, ["x"])
        assert "--trust-remote-code" not in words
        assert not any("\0" in word for word in words)
        stages.show("harvest", words)


def fuzz_experiment(folder: Path, n: int, seed: int) -> int:
    """Read n mutated experiment files; how many were refused."""
    path, rng, refused = folder / "e.toml", random.Random(seed), 0
    for _ in range(n):
        raw = bytearray(as_file(mutated(GOOD, rng)))
        if rng.random() < 0.1 and raw:
            raw[rng.randrange(len(raw))] = rng.randrange(256)
        path.write_bytes(bytes(raw))
        refused += one_line_or_none(lambda: read_everything(path), path)
    return refused


def test_hostile_experiments_end_in_one_line(tmp_path: Path) -> None:
    """Mutated experiment files are read or refused in one line that names them."""
    path = tmp_path / "e.toml"
    path.write_bytes(as_file(GOOD))
    read_everything(path)
    assert 250 < fuzz_experiment(tmp_path, 500, seed=1) < 500


@pytest.mark.slow
def test_hostile_experiments_end_in_line(tmp_path: Path) -> None:
    """Likewise, ten thousand."""
    assert 5000 < fuzz_experiment(tmp_path, 10_000, seed=2) < 10_000


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('compile = "--trust-remote-code"', "begins with a dash"),
        ('layer = ["-1", 3]', "begins with a dash"),
        ("trust-remote-code = 0", "asks for trust-remote-code"),
        ('trust_remote_code = ""', "asks for trust-remote-code"),
        ('"trust-remote-code=1" = true', "is no name of an option"),
        ('"x\\u0000" = 1', "is no name of an option"),
        ('"" = 1', "is no name of an option"),
        ("help = true", "is no name of an option"),
        ('corpus = "a\\u0000b"', "holds a character that no option may"),
        ("seed = [[1]]", "expected text, a number, true or false, or a list of them"),
        ("seed = 1979-05-27", "expected text, a number, true or false, or a list of them"),
        ("tokens = nan", "expected text, a number, true or false, or a list of them"),
        ('layer = "../../x"', "layer is '../../x', expected whole numbers"),
        ("layer = []", r"layer is '\[\]', expected whole numbers"),
        ("layer = true", "layer is 'True', expected whole numbers"),
    ],
)
def test_odd_options_are_refused_by_name(tmp_path: Path, line: str, says: str) -> None:
    """An option's value that could become another option, a name that is none, and values that are none are refused."""
    path = tmp_path / "e.toml"
    path.write_text(f'[harvest]\nmodel = "m"\n{line}\n[train]\nwidth = 64\n')
    with pytest.raises(UsageError, match=says):
        experiments.Experiment.read(path)


@pytest.mark.parametrize(
    "text", ["[" * 5000, "x = " + "9" * 5000, "\ud800", "[harvest]\n[harvest]\n", "train = []\n[harvest]"]
)
def test_no_experiment_is_one_line(tmp_path: Path, text: str) -> None:
    """Nesting without end, numbers without end, what is not UTF-8, tables twice and no grid at all are each one line."""
    path = tmp_path / "e.toml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(UsageError) as refusal:
        experiments.Experiment.read(path)
    assert "\n" not in str(refusal.value)
    assert str(path) in str(refusal.value)
