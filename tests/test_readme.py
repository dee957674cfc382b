"""The pages for people: every command in them runs at toy size, every option they name exists, none is left out."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any, NoReturn

import click
import pytest
import torch
import zstandard

from evaluate.__main__ import evaluate
from evaluate.explain.__main__ import cli as explain
from harvest.__main__ import command as harvest
from pipeline.__main__ import cli
from pipeline.sae.checkpoint import save_checkpoint
from pipeline.sae.config import SAEConfig
from pipeline.sae.nested import NestedSAE
from support.saved_rows import saelens_folder, saev_folder
from train.__main__ import command as train

ROOT = Path(__file__).parents[1]
COMMANDS: dict[str, click.Command] = {"harvest": harvest, "train": train, "evaluate": evaluate, "pipeline": cli}
PAGES = ("README.md", "harvest/README.md", "train/README.md", "evaluate/README.md")
TEXT = {page: (ROOT / page).read_text() for page in PAGES}
README = TEXT["README.md"]
CI = {
    "pip install -c constraints.txt -e . && python -m pipeline demo",
    "pip install -c constraints.txt -e '.[test]' && python -m pytest -n auto",
}
"""Lines that .ci/run takes over from the README."""

TOY = {
    "google/gemma-2-2b": str(ROOT / "data" / "tiny-gemma2"),
    "monology/pile-uncopyrighted": "train.jsonl",
    "data/corpus/train.jsonl.zst": "train.jsonl",
    "train.jsonl.zst": "train.jsonl",
    "eval.jsonl.zst": "eval.jsonl",
    "LabHC/bias_in_bios": str(ROOT / "data" / "scr"),
}
TOY |= {
    "10M": "2k",
    "50M": "4k",
    "200k": "2k",
    "512k": "1k",
    "500k": "1k",
    "100k": "256",
    "mlp/layer_19.mlp_in.zarr": "mlp/layer_3.mlp_in.zarr",
    "mlp/layer_19.mlp_out.zarr": "mlp/layer_3.mlp_out.zarr",
    "16384": "64",
    "65536": "128",
}
"""Words of the pages and what stands for them at toy size."""
OPTION = {"--layer": {"12": "1", "19": "3"}, "--steps": {"1000": "4"}, "--target-l0": {"64": "8"}}
OPTION |= {"--nproc-per-node": {"8": "2"}}
TORCHRUN = {"--nproc-per-node", "--max-restarts", "--rdzv-backend"}
"""Options of torchrun that pages name."""
DEFAULTS = {
    "harvest": {"--eval-tokens": "1k", "--corpus": "train.jsonl", "--context": "128"},
    "train": {"--width": "64", "--steps": "4", "--batch-size": "64", "--checkpoint-every": "2", "--dtype": "float32"},
    "evaluate": {"--scr-train-size": "40", "--scr-test-size": "40", "--scr-seeds": "1"},
}
"""Options that a toy needs where the page leaves them out."""


def commands(page: str) -> list[str]:
    """The commands in a page's code blocks, continued lines joined, comments gone; those of CI apart."""
    joined = re.sub(r"\s*\\\n\s*", " ", TEXT[page])
    lines = re.findall(r"^    ((?:python -m|torchrun|pip install) .*)", joined, re.M)
    return [line for line in (re.sub(r"\s+#.*", "", line) for line in lines) if line not in CI]


def is_slow(command: str) -> bool:
    """Whether it is left to the slow test: several processes, whole experiments, pages of latents, every step's scores."""
    return any(word in command for word in ("torchrun", " pipeline run ", "--latents", "--all-steps"))


def toy(command: str) -> list[str]:
    """A page's command as words, small, with the member that it means in place of the one it names."""
    words = shlex.split(command)
    for i, word in enumerate(words):
        words[i] = OPTION.get(words[i - 1], {}).get(word, TOY.get(word, word))
        if match := re.fullmatch(r"(.*)-[0-9a-f]{10}(/checkpoints/step_\d+\.safetensors)?", word):
            (member,) = Path().glob(f"{match[1]}-*")
            words[i] = str(max(member.glob("checkpoints/*")) if match[2] else member)
    stage = words[words.index("-m") + 1]
    if "--truth" not in words:
        words += [word for pair in DEFAULTS.get(stage, {}).items() if pair[0] not in words for word in pair]
    if stage == "train" and "paper" not in words and "--config" not in words:
        words += ["--k", "8"]
    return words


def run(command: str) -> None:
    """Run a page's command at toy size: in this process, or under torchrun. Fails where it fails."""
    words = toy(command)
    if words[0] == "torchrun":
        path = str(Path(sys.executable).with_name("torchrun"))
        subprocess.run([path, *words[1:]], check=True, env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"})
        return
    code: Any = 0
    try:
        COMMANDS[words[2]].main(words[3:], standalone_mode=False)
    except SystemExit as stop:
        code = stop.code
    assert code in (0, None), f"{command}: exit code {code}"


def write_experiment(name: str, folder: Path) -> None:
    """A shipped experiment, small: its tables' values replaced, its paths as seen from the folder."""
    data = tomllib.loads((ROOT / "pipeline" / "experiment" / f"{name}.toml").read_text())
    lines = [f"name = {json.dumps(name)}"]
    for table in ("harvest", "train", "evaluate"):
        small = {key: TOY.get(value, value) if isinstance(value, str) else value for key, value in data[table].items()}
        small |= {key.removeprefix("--"): value for key, value in DEFAULTS[table].items()}
        small |= {
            "harvest": {"layer": [3], "corpus": str(folder / "train.jsonl")},
            "train": {"steps": 8, "seed": [0, 1]},
            "evaluate": {},
        }[table]
        lines += [f"[{table}]", *(f"{key} = {json.dumps(value)}" for key, value in small.items())]
    (folder / f"{name}.toml").write_text("\n".join(lines))


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to run a page's commands in: the shipped data, two small corpora, small experiments."""
    raw = zstandard.ZstdDecompressor().stream_reader((ROOT / "data/corpus/eval.jsonl.zst").read_bytes()).read()
    documents = raw.decode().splitlines(keepends=True)
    (tmp_path / "train.jsonl").write_text("".join(documents[:8]))
    (tmp_path / "eval.jsonl").write_text("".join(documents[8:12]))
    (tmp_path / "grid.toml").write_text("width = [64, 128]\nk = 8\nsteps = 4\nbatch-size = 64\n")
    (tmp_path / "data").symlink_to(ROOT / "data")
    saelens_folder(tmp_path / "cached")
    (tmp_path / "shards").mkdir()
    saev_folder(tmp_path / "shards" / "07aed612")
    write_experiment("paper", tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(TOY, "s3://bucket/acts.zarr", f"memory://{tmp_path.name}/acts.zarr")
    monkeypatch.setitem(OPTION, "run", {"paper": str(tmp_path / "paper.toml")})
    monkeypatch.setitem(DEFAULTS["harvest"], "--corpus", str(tmp_path / "train.jsonl"))
    monkeypatch.setattr("os.execve", become)
    return tmp_path


def become(path: str, words: list[str], environment: dict[str, str]) -> NoReturn:
    """Instead of `os.execve`: the other program runs and ends, and then its caller, as if it had been that one."""
    sys.exit(subprocess.run(words, executable=path, env=environment).returncode)


BEFORE = {
    "train/README.md": ["python -m harvest --model google/gemma-2-2b --layer 19 --tokens 10M --store acts.zarr"],
    "evaluate/README.md": [
        "python -m harvest --model google/gemma-2-2b --layer 19 --tokens 10M --store acts.zarr",
        "python -m train --store acts.zarr --out runs/l19 --alpha 0 --alpha 0.2",
        "python -m harvest --model google/gemma-2-2b --layer 19 --hook mlp_in --hook mlp_out --tokens 10M --store mlp",
        "python -m train --store mlp/layer_19.mlp_in.zarr --target mlp/layer_19.mlp_out.zarr --out runs/mlp --skip",
    ],
}
"""What a page takes for granted: a store, a training."""


@pytest.mark.parametrize("page", PAGES)
def test_commands_of_the_page_run(page: str, place: Path) -> None:
    """The quick commands of a page run in its order at toy size."""
    for line in BEFORE.get(page, []) + commands(page):
        if not is_slow(line):
            run(line)


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_slow_commands_run_too(page: str, place: Path) -> None:
    """All commands of a page run in its order at toy size, whole experiments and several processes included."""
    for line in BEFORE.get(page, []) + commands(page):
        run(line)


@pytest.mark.parametrize("page", PAGES)
def test_no_command_is_left_out(page: str) -> None:
    """Every line of a page that begins like a command is run, by these tests or by .ci/run."""
    joined = re.sub(r"\s*\\\n\s*", " ", TEXT[page])
    lines = [line for line in joined.splitlines() if re.match(r"[^\w`]*(python|torchrun|pip|bash|sh|hf)\b", line)]
    assert len(lines) == len(commands(page)) + sum(line.strip() in CI for line in lines)
    assert page != "README.md" or all(line in README for line in CI)


def options_of(command: click.Command) -> set[str]:
    """Every long option of a command."""
    return {flag for p in command.params for flag in (*p.opts, *p.secondary_opts) if flag.startswith("--")}


@pytest.mark.parametrize("stage", ["harvest", "train", "evaluate"])
def test_page_names_every_option(stage: str) -> None:
    """A stage's table of options by purpose names all of them and no other."""
    text = TEXT[f"{stage}/README.md"]
    table = text[text.index("## Options by purpose") :].split("\n## ")[0]
    named = set(re.findall(r"`(--[a-z0-9-]+)`", table))
    known = options_of(COMMANDS[stage]) - {"--store", "--out", "--help"}
    assert known - named - {flag for flag in known if flag.startswith("--no-")} == set()
    assert named <= options_of(COMMANDS[stage])


@pytest.mark.parametrize("page", PAGES)
def test_named_options_exist(page: str) -> None:
    """Whatever a page calls an option is one of some command."""
    groups = [*COMMANDS.values(), *cli.commands.values(), explain]
    known = set().union(*map(options_of, groups)) | TORCHRUN | {"--help"}
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", TEXT[page])) <= known
    for name in re.findall(r"python -m pipeline ([a-z]+)", TEXT[page]):
        assert name in cli.commands


def test_tree_names_every_folder() -> None:
    """The README's tree shows every folder that holds code, a line each, and no other."""
    parents: list[str] = []
    listed = set()
    for indent, name in re.findall(r"^    ( *)([a-z]+)/ ", README[README.index("## Folders") :], re.M):
        parents[len(indent) // 2 :] = [name]
        listed.add("/".join(parents))
    top = ("pipeline", "harvest", "train", "evaluate", "data", "tests")
    assert listed == {str(path.parent.relative_to(ROOT)) for folder in top for path in (ROOT / folder).rglob("*.py")}


def test_readme_fits_three_screens() -> None:
    """The README is at most 120 lines of at most 130 characters."""
    lines = [line for line in README.splitlines() if not line.startswith("| ")]  # of a table, hosts wrap cells
    assert len(README.splitlines()) <= 120
    assert max(map(len, lines)) <= 130


@pytest.mark.parametrize("page", [*PAGES, "NOTES.md", "CHANGELOG.md", "data/README.md", "pipeline/FORMAT.md"])
def test_links_have_their_targets(page: str) -> None:
    """Every link of a page to a file leads to one."""
    text = (ROOT / page).read_text()
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert ((ROOT / page).parent / target).exists(), target


def test_notebook_example_steers_the_model(tmp_path: Path) -> None:
    """The notebook example sees latents and steers the model as the README says."""
    sae = NestedSAE(SAEConfig(192, 32, (8, 32)))
    torch.nn.init.orthogonal_(sae.W_dec)
    sae.W_enc.data.copy_(sae.W_dec.data.T)
    save_checkpoint(tmp_path / "sae.safetensors", sae, 1, {})
    code = re.search(r"```python\n(.*?)```", README, re.S)
    assert code is not None
    text = re.sub(r'pipeline\.load\("[^"]*"\)', f'pipeline.load("{tmp_path}/sae.safetensors")', code[1])
    said = []
    for strength in (0.0, 0.0, 300.0):
        space: dict[str, Any] = {"name": TOY["google/gemma-2-2b"], "latent": 5, "layer": 3, "strength": strength}
        exec(text, space)
        said.append(space["text"])
        assert space["z"].shape[2] == 32
        assert bool((space["z"] > 0).any())
    assert said[0] == said[1] != said[2]


@pytest.mark.parametrize(
    "command", ["pip install -c constraints.txt -e .", "python -m pytest -n auto", "python -m pipeline demo"]
)
def test_ci_runs_the_readmes_commands(command: str) -> None:
    """The commands that a newcomer types first are those that CI runs."""
    assert command in README
    assert command.replace("-e .", "-e '.[test,large]'") in (ROOT / ".ci" / "run").read_text()
