import ast
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
    """Importing pipeline costs nothing."""
    assert not modules_after("import pipeline") & {"torch", "numpy", "zarr", "transformers"}


def test_training_loads_no_language_model() -> None:
    """Training loads no language model."""
    loaded = modules_after("import train.__main__, train.run, train.folder, train.feed.loader, train.step.member")
    assert "torch" in loaded
    assert not loaded & {"transformers", "datasets", "sklearn", "matplotlib", "evaluate", "harvest"}


def test_report_loads_no_torch() -> None:
    """A report loads no torch."""
    loaded = modules_after("import evaluate.report.__main__, evaluate.report.write")
    assert not loaded & {"torch", "transformers", "datasets", "zarr", "train", "harvest"}


def test_report_options_load_nothing_that_draws() -> None:
    """A report's options are read before what draws is loaded: an experiment checks them first of all."""
    assert not modules_after("import evaluate.report.__main__") & {"matplotlib", "jinja2", "scipy"}


def test_known_features_load_no_language_model() -> None:
    """Rows of known features are made without transformers."""
    assert not modules_after("import harvest.truth.run") & {"transformers", "datasets", "tokenizers"}


def test_garbage_is_looked_for_seldom() -> None:
    """A command that begins makes Python look for garbage seldom, and not at its end among what was there."""
    seldom = "from pipeline.base import startup; startup.begin(); import gc; print(gc.get_threshold()[0])"
    at_end = "import atexit, gc; atexit.register(lambda: print(gc.get_freeze_count() > 0)); "
    run = subprocess.run([sys.executable, "-c", at_end + seldom], cwd=ROOT, capture_output=True, text=True, check=True)
    threshold, frozen = run.stdout.split()
    assert int(threshold) >= 10_000
    assert frozen == "True"


def test_pipeline_command_starts_without_torch() -> None:
    """The pipeline command starts without torch."""
    assert not modules_after("import pipeline.__main__") & {"torch", "transformers", "train", "evaluate", "harvest"}


@pytest.mark.parametrize("stage", ["harvest", "train", "evaluate"])
def test_stage_options_need_no_torch(stage: str) -> None:
    """A stage reads its options, and says its help, without torch."""
    assert not modules_after(f"import {stage}.__main__") & {"torch", "transformers", "zarr"}


@pytest.mark.parametrize("package", ["pipeline", "harvest", "train", "evaluate"])
def test_packages_are_of_this_checkout(package: str) -> None:
    """Our packages are those of this checkout."""
    code = f"import {package}; print({package}.__file__)"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert Path(run.stdout.strip()) == ROOT / package / "__init__.py"


@pytest.mark.parametrize("command", ["harvest", "train", "evaluate", "pipeline"])
def test_commands_help_with_an_example(command: str) -> None:
    """Every command has a help with an example."""
    run = subprocess.run(
        [sys.executable, "-m", command, "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert f"python -m {command}" in run.stdout


def test_nothing_is_pickled() -> None:
    """Nothing is pickled, and only others' torch files are loaded, weights alone."""
    allowed = {
        "pipeline/sae/foreign/reader.py",
        "pipeline/sae/export.py",
        "pipeline/imports/sources.py",
    }  # DECISIONS.md 19
    for package in ("pipeline", "harvest", "train", "evaluate"):
        for path in (ROOT / package).rglob("*.py"):
            found = re.findall(r"\bimport pickle\b|\bpickle\.|\btorch\.load\(|\btorch\.save\(", path.read_text())
            assert not found or str(path.relative_to(ROOT)) in allowed, (path, found)
            assert re.findall(r"torch\.load\(", path.read_text()) == re.findall(
                r"torch\.load\((?=[^\n]*weights_only=True)", path.read_text()
            ), path


def test_test_names_are_short() -> None:
    """A test's name has two to six words after `test_`; its sentence stands in the docstring."""
    for path in (ROOT / "tests").glob("test_*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                assert 2 <= len(node.name.split("_")) - 1 <= 6, (path.name, node.name)
                assert ast.get_docstring(node), (path.name, node.name, "no sentence")
