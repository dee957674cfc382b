"""`python -m train`: options, grids, files, exit codes, and what a person sees."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from pipeline.base.cli import main
from pipeline.base.errors import MismatchError, PipelineError, UsageError
from pipeline.store.reader import Store
from train import plan as plan_module
from train.__main__ import command
from train.config import DEFAULT, RECIPES, TrainConfig
from train.options import make_grid
from train.plan import RunConfig

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).parents[1]
SMALL = [
    "--width", "96", "--batch-size", "64", "--lr-warmup-steps", "4", "--sparsity-warmup-steps", "4", "--dtype", "float32",
    "--device", "cpu", "--threads", "1",
]  # fmt: skip


def invoke(*words: object) -> Result:
    """The command in this process; errors of ours are raised."""
    result = CliRunner().invoke(command, [str(word) for word in words], standalone_mode=False)
    if result.exception is not None:
        raise result.exception
    return result


def start(*words: object, **environment: str) -> subprocess.Popen[str]:
    """The command as a person starts it."""
    return subprocess.Popen(
        [sys.executable, "-m", "train", *map(str, words)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_every_field_has_an_option() -> None:
    """Every field has an option with a text and a default."""
    assert all(field.metadata["text"] for field in dataclasses.fields(TrainConfig))
    shown = invoke("--help").output
    for field in dataclasses.fields(TrainConfig):
        assert "--" + field.name.replace("_", "-") in shown
    assert "[paper 0, batchtopk 64, topk 64, jumprelu 0]" in " ".join(shown.split())


def test_repeated_options_span_a_product() -> None:
    """Repeated options span their product without duplicates."""
    grid = make_grid({"recipe": ("paper",), "alpha": (0.0, 0.2, 0.2), "seed": (0, 1), "lambda_": (0.02, 0.04)})
    assert len(grid) == 8
    assert {(c.alpha, c.seed, c.lambda_shared, c.lambda_specialised) for c in grid} == {
        (alpha, seed, weight, weight) for alpha in (0.0, 0.2) for seed in (0, 1) for weight in (0.02, 0.04)
    }


def test_no_option_is_the_default_recipe() -> None:
    """No option is one member of the default recipe."""
    assert make_grid({"alpha": ()}) == (RECIPES[DEFAULT](),)
    assert make_grid({"recipe": ("paper",)}) == (TrainConfig(),)


def test_option_reaches_the_recipes_it_concerns() -> None:
    """An option goes to the recipes in which it means something."""
    grid = make_grid({"recipe": ("paper", "batchtopk"), "lambda_": (0.01, 0.02), "k": (8, 16)})
    assert [(c.recipe, c.lambda_shared, c.k) for c in grid] == [
        ("paper", 0.01, 0), ("paper", 0.02, 0), ("batchtopk", 0.0, 8), ("batchtopk", 0.0, 16)
    ]  # fmt: skip


def test_levels_take_the_place_of_alpha() -> None:
    """Levels take the place of alpha."""
    (config,) = make_grid({"levels": ((0.25, 0.5, 1.0),)})
    assert config.alpha is None
    assert config.level_sizes() == (4096, 8192, 16384)


def test_double_lambda_is_refused() -> None:
    """Lambda beside one of its two is refused."""
    with pytest.raises(UsageError, match="--lambda sets both"):
        make_grid({"lambda_": (0.1,), "lambda_shared": (0.2,)})


def test_empty_grid_is_refused(tmp_path: Path) -> None:
    """An empty grid is refused."""
    with pytest.raises(UsageError, match="the grid is empty"):
        RunConfig(tmp_path, tmp_path, ())
    (tmp_path / "grid.toml").write_text("seed = []\n")
    with pytest.raises(UsageError, match="seed is an empty list, so the grid is empty"):
        invoke("--store", tmp_path, "--out", tmp_path, "--config", tmp_path / "grid.toml")


def test_options_win_over_the_file(tiny_store: Path, tmp_path: Path) -> None:
    """A file holds the same names and an option wins over it."""
    file = tmp_path / "grid.toml"
    file.write_text(
        f'store = "{tiny_store}"\nrecipe = "paper"\nwidth = 96\nalpha = [0, 0.25]\nlambda = 0.01\nsteps = 6\n'
        "lr_warmup_steps = 2\nseed = 3\n"
        'sparsity-warmup-steps = 2\nbatch_size = 64\ndtype = "float32"\nlayernorm_rescale = false\ndevice = "cpu"\n'
    )
    words = ("--config", file, "--out", tmp_path / "out", "--seed", 4, "--seed", 5, "--json")
    members = json.loads(invoke(*words).stdout)["members"]
    configs = [json.loads((Path(m["folder"]) / "config.json").read_text())["config"] for m in members]
    assert [(c["alpha"], c["seed"]) for c in configs] == [(0.0, 4), (0.0, 5), (0.25, 4), (0.25, 5)]
    assert all(c["lambda_shared"] == 0.01 and c["layernorm_rescale"] is False for c in configs)


@pytest.mark.parametrize(
    ("text", "message"), [("witdh = 3\n", "'witdh' is not an option"), ("width = \n", "not readable as TOML")]
)
def test_broken_file_is_refused(tmp_path: Path, text: str, message: str) -> None:
    """A file with a wrong name or wrong TOML is refused."""
    (tmp_path / "grid.toml").write_text(text)
    with pytest.raises(UsageError, match=message):
        invoke("--store", tmp_path, "--out", tmp_path, "--config", tmp_path / "grid.toml")


@pytest.mark.parametrize(
    "words", [("--width", "many"), ("--levels", "a,b"), ("--max-norm", "much"), ("--recipe", "other"), ("--mode", "x")]
)
def test_wrong_kind_is_wrong_usage(tmp_path: Path, words: tuple[str, str]) -> None:
    """A value of the wrong kind is wrong usage."""
    with pytest.raises(click.BadParameter):
        invoke("--store", tmp_path, "--out", tmp_path, *words)


def test_dry_run_writes_nothing(tiny_store: Path, tmp_path: Path) -> None:
    """A dry run prints the plan and writes nothing."""
    words = ("--store", tiny_store, "--out", tmp_path / "out", *SMALL, "--steps", 20, "--alpha", 0, "--alpha", 0.25)
    shown = invoke(*words, "--dry-run").stderr
    for part in (
        "2 members, 0 finished, 1 passes",
        "memory:",
        "disk: at most",
        "time: about",
        "width 96, 20 steps, new",
    ):
        assert part in shown
    assert not (tmp_path / "out").exists()


def test_plan_needs_its_missing_store(tmp_path: Path) -> None:
    """A plan for a store that is not there needs that store in the plan."""
    plan = tmp_path / "plan.json"
    plan.write_text('{"stores": []}')
    words = ("--store", tmp_path / "s.zarr", "--out", tmp_path / "out", *SMALL, "--steps", 20, "--planned", plan)
    with pytest.raises(UsageError, match="plans no store at"):
        invoke(*words, "--dry-run")
    with pytest.raises(UsageError, match="--planned goes with --dry-run"):
        invoke(*words)


def test_plan_refuses_members_of_another_store(tiny_store: Path, tmp_path: Path) -> None:
    """A plan for a store still to be made counts its rows, and refuses members that an older store has made."""
    store = Store.open(tiny_store)
    about = {"path": str(tmp_path / "s.zarr"), "config": store.config, "n_sequences": store.attributes["n_sequences"]}
    (plan := tmp_path / "plan.json").write_text(json.dumps({"stores": [about]}))
    words = ("--out", tmp_path / "out", *SMALL, "--steps", 6)
    shown = invoke("--store", tmp_path / "s.zarr", *words, "--planned", plan, "--dry-run").stderr
    assert f"1 passes over {store.train.n_rows:,} rows of a store still to be made" in shown
    invoke("--store", tiny_store, *words)
    with pytest.raises(MismatchError, match="trained on another store"):
        invoke("--store", tmp_path / "s.zarr", *words, "--planned", plan, "--dry-run")


def test_plan_for_another_machine(tiny_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Members too large for this machine's memory are planned for another, each in a pass of its own; no step is measured."""
    monkeypatch.setattr(plan_module, "available_memory", lambda: 1000)
    words = ("--store", tiny_store, "--out", tmp_path / "out", *SMALL, "--steps", 6, "--seed", 0, "--seed", 1)
    with pytest.raises(PipelineError, match="lower --width or --batch-size"):
        invoke(*words, "--dry-run", "--json")
    found = invoke(*words, "--dry-run", "--json", "--elsewhere")
    assert "2 members, 0 finished, 2 passes" in found.stderr
    assert "time: not measured" in found.stderr
    cost = json.loads(found.stdout)["cost"]
    assert (cost["seconds"], cost["steps"]) == (None, 12)
    assert 1000 < cost["memory"] < 10**9
    with pytest.raises(UsageError, match="--elsewhere goes with --dry-run"):
        invoke(*words, "--elsewhere")


def test_json_names_members_and_checkpoints(tiny_store: Path, tmp_path: Path) -> None:
    """The JSON names every member and its final checkpoint."""
    words = ("--store", tiny_store, "--out", tmp_path / "out", *SMALL, "--steps", 6, "--seed", 0, "--seed", 1, "--json")
    found = json.loads(invoke(*words).stdout)
    assert [member["step"] for member in found["members"]] == [6, 6]
    assert all(Path(member["final"]).is_file() for member in found["members"])
    assert json.loads(invoke(*words, "--dry-run").stdout)["members"] == found["members"]


def test_dry_run_counts_what_is_left(tiny_store: Path, tmp_path: Path) -> None:
    """The JSON of a dry run counts operations, rows read once a pass, and memory of the members that are left."""
    words = ("--store", tiny_store, "--out", tmp_path / "out", *SMALL, "--steps", 6, "--seed", 0, "--seed", 1, "--json")
    cost = json.loads(invoke(*words, "--dry-run").stdout)["cost"]
    store, batch, width = Store.open(tiny_store), 64, 96
    assert cost["flop"] == 2 * 6 * batch * 6.0 * 2 * store.d_model * width
    assert cost["steps"] == 2 * 6
    assert cost["read"] == 6 * batch * store.d_model * store.train.shape.layout.torch_dtype.itemsize
    assert min(cost["memory"], cost["seconds"]) > 0
    assert cost["device_type"] == "cpu"
    invoke(*words)
    left = json.loads(invoke(*words, "--dry-run").stdout)["cost"]
    assert (left["memory"], left["flop"], left["read"], left["seconds"]) == (0, 0, 0, 0)


def test_training_imports_no_language_model(tiny_store: Path, tmp_path: Path) -> None:
    """Training imports no language model and ends with exit code 0."""
    code = (
        "import sys, runpy\n"
        "try: runpy.run_module('train', run_name='__main__', alter_sys=True)\n"
        "except SystemExit as stop: print(stop.code, sorted({'transformers', 'datasets'} & sys.modules.keys()))"
    )
    words = ["--store", tiny_store, "--out", tmp_path / "out", *SMALL, "--steps", 6]
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, words)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "0 []\n"
    assert "train: 100 %, 384 of 384 rows" in done.stderr
    assert "Traceback" not in done.stderr


def test_store_problem_exits_1_briefly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What a store is the cause of is one line and exit code 1."""
    monkeypatch.setattr(sys, "argv", ["train", "--store", str(tmp_path / "nothing"), "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as stop:
        main(command, "train")
    error = capsys.readouterr().err
    assert stop.value.code == 1
    assert error.startswith("error: ")
    assert error.count("\n") == 1


def test_diverged_member_exits_1_last(
    tiny_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A member that diverged is exit code 1 after the others are done."""
    words = [
        "train",
        "--store",
        tiny_store,
        "--out",
        tmp_path / "out",
        *SMALL,
        "--steps",
        6,
        "--lr",
        "1e38",
        "--lr",
        "1e-3",
    ]
    monkeypatch.setattr(sys, "argv", [*map(str, words), "--clip-norm", "0", "--json"])
    with pytest.raises(SystemExit) as stop:
        main(command, "train")
    shown = capsys.readouterr()
    assert stop.value.code == 1
    assert "1 of 2 members diverged" in shown.err
    problems = [member["problem"] for member in json.loads(shown.out)["members"]]
    assert "not finite between steps" in problems[0]
    assert problems[1] is None


def test_ctrl_c_exits_130_with_advice(tiny_store: Path, tmp_path: Path) -> None:
    """Ctrl-C ends cleanly, says how to go on and exits 130."""
    words: list[Any] = ["--store", tiny_store, "--out", tmp_path / "out", *SMALL, "--steps", 100_000]
    process = start(*words, "--checkpoint-every", 50_000)
    deadline = time.monotonic() + 600
    while not list(tmp_path.glob("out/*/metrics.jsonl")) and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=600)
    assert process.returncode == 130
    assert "run the same command again to go on" in error
    assert "Traceback" not in error
    assert len(list(tmp_path.glob("out/*/state.safetensors"))) == 1
