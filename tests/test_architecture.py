import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def modules_after(statement: str) -> set[str]:
    """Top-level modules loaded by a fresh interpreter, in the checkout, after a statement."""
    code = f"{statement}\nimport sys; print(' '.join(sorted({{m.partition('.')[0] for m in sys.modules}})))"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(run.stdout.split())


def test_importing_pipeline_costs_nothing() -> None:
    assert not modules_after("import pipeline") & {"torch", "numpy", "zarr", "transformers"}


def test_training_loads_no_language_model() -> None:
    loaded = modules_after("import train.__main__, train.run, train.folder, train.feed.loader, train.step.member")
    assert "torch" in loaded
    assert not loaded & {"transformers", "datasets", "sklearn", "matplotlib", "evaluate", "harvest"}


def test_a_report_loads_no_torch() -> None:
    loaded = modules_after("import evaluate.report.__main__")
    assert not loaded & {"torch", "transformers", "datasets", "zarr", "train", "harvest"}


def test_the_pipeline_command_starts_without_torch() -> None:
    assert not modules_after("import pipeline.__main__") & {"torch", "transformers", "train", "evaluate", "harvest"}


@pytest.mark.parametrize("package", ["pipeline", "harvest", "train", "evaluate"])
def test_our_packages_are_those_of_this_checkout(package: str) -> None:
    code = f"import {package}; print({package}.__file__)"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert Path(run.stdout.strip()) == ROOT / package / "__init__.py"


@pytest.mark.parametrize("command", ["harvest", "train", "evaluate", "pipeline"])
def test_every_command_has_a_help_with_an_example(command: str) -> None:
    run = subprocess.run(
        [sys.executable, "-m", command, "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert f"python -m {command}" in run.stdout


def test_nothing_is_pickled() -> None:
    allowed = {
        "evaluate/checkpoints/foreign.py",
        "pipeline/sae/export.py",
    }  # dictionary_learning's ae.pt alone (DECISIONS.md 19)
    for package in ("pipeline", "harvest", "train", "evaluate"):
        for path in (ROOT / package).rglob("*.py"):
            found = re.findall(r"\bimport pickle\b|\bpickle\.|\btorch\.load\(|\btorch\.save\(", path.read_text())
            assert not found or str(path.relative_to(ROOT)) in allowed, (path, found)
