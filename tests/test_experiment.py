import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from harvest.__main__ import command as harvest_command
from harvest.config import HarvestConfig
from pipeline.base.cli import require_sources
from pipeline.base.errors import PipelineError, UsageError
from pipeline.experiment import experiment as experiments
from pipeline.experiment import stages

ROOT = Path(__file__).parents[1]
MINI = """
[harvest]
model = "{root}/data/tiny-gemma2"
layer = [3]
corpus = "{root}/data/corpus/train.jsonl.zst"
eval-corpus = "{root}/data/corpus/eval.jsonl.zst"
tokens = "8k"
eval-tokens = "1k"
shard-rows = 2048
[train]
recipe = "paper"
alpha = {alphas}
seed = [0, 1]
width = 64
batch-size = 128
steps = 20
lr-warmup-steps = 5
sparsity-warmup-steps = 5
checkpoint-every = 10
[evaluate]
scores = "kl,ev,l0,coding"
"""


def write(path: Path, alphas: str = "[0, 0.25]") -> Path:
    path.write_text(MINI.format(root=ROOT, alphas=alphas))
    return path


def command(path: Path, out: Path) -> list[str]:
    return [sys.executable, "-m", "pipeline", "run", str(path), "--out", str(out)]


def test_dot_paths_start_at_the_file(tmp_path: Path) -> None:
    """Paths that begin with a dot are taken from the file's own folder."""
    path = tmp_path / "a.toml"
    path.write_text('[harvest]\nmodel = "../m"\ncorpus = "owner/name"\n[train]\nalpha = 0.2\n')
    read = experiments.Experiment.read(path)
    assert read.harvest == {"model": str(tmp_path.parent / "m"), "corpus": "owner/name"}
    assert read.train == [{"alpha": 0.2}]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[harvest]\n[train]\n[trian]\n", "trian"),
        ("[harvest]\n", r"needs a \[harvest\] and a \[train\]"),
        ("x = [", "not readable as TOML"),
    ],
)
def test_broken_experiment_file_says_why(tmp_path: Path, text: str, message: str) -> None:
    """A file that is not an experiment says why."""
    (tmp_path / "a.toml").write_text(text)
    with pytest.raises(UsageError, match=message):
        experiments.Experiment.read(tmp_path / "a.toml")


def test_shipped_name_beside_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`run demo` means the shipped file where a demo has left its folder; a file of that name comes first."""
    monkeypatch.chdir(tmp_path)
    Path("demo").mkdir()
    assert len(experiments.Experiment.read(Path("demo")).parts) == 1
    Path("demo").rmdir()
    Path("demo").write_text('[harvest]\nmodel = "m"\n[train]\nrecipe = "topk"\n')
    assert experiments.Experiment.read(Path("demo")).train == [{"recipe": "topk"}]


def test_only_asked_members_are_evaluated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only members that the file asks for are evaluated and reported."""
    calls: list[tuple[str, list[str]]] = []

    def ask(stage: str, words: list[str], log: Path) -> Any:
        calls.append((stage, words))
        if stage == "train":
            return {"members": [{"folder": "/c/alpha0-seed0"}, {"folder": "/c/alpha0.25-seed0"}]}
        return {"results": [{"path": "/r/one.json"}, {"path": "/r/two.json"}]}

    monkeypatch.setattr(stages, "ask_stage", ask)
    monkeypatch.setattr(stages, "run_stage", lambda stage, words, log: calls.append((stage, words)))
    experiments.run(experiments.Experiment.read(write(tmp_path / "a.toml")), tmp_path / "out")
    assert [stage for stage, _ in calls] == ["harvest", "train", "evaluate", "evaluate.report"]
    assert calls[2][1][:2] == ["/c/alpha0-seed0", "/c/alpha0.25-seed0"]
    assert calls[3][1][:2] == ["/r/one.json", "/r/two.json"]


def test_experiment_names_its_primary_endpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the [report] table says goes to the report: which endpoints are tested, and its title."""
    file = write(tmp_path / "a.toml")
    file.write_text(file.read_text() + '\n[report]\nprimary = "ce_score,ev"\ntitle = "A talk"\n')
    said: list[list[str]] = []
    answers = {"train": {"members": []}, "evaluate": {"results": []}}
    monkeypatch.setattr(stages, "ask_stage", lambda stage, words, log: answers[stage])
    monkeypatch.setattr(stages, "run_stage", lambda stage, words, log: said.append(words))
    experiments.run(experiments.Experiment.read(file), tmp_path / "out")
    assert [said[-1][said[-1].index(name) + 1] for name in ("--primary", "--title")] == ["ce_score,ev", "A talk"]


def test_several_layers_get_own_folders(tmp_path: Path) -> None:
    """Several layers get a store each and folders of their own."""
    (tmp_path / "a.toml").write_text('[harvest]\nmodel = "m"\nlayer = [3, 5]\n[train]\nalpha = 0.2\n')
    read = experiments.Experiment.read(tmp_path / "a.toml")
    places = experiments.Places.of(read, tmp_path / "out")
    words = experiments.train_words(read.train[0], places, read.trained[1])
    assert words[-4:] == [
        "--store",
        str(tmp_path / "out/stores/layer_5.zarr"),
        "--out",
        str(tmp_path / "out/checkpoints/layer_5"),
    ]


def test_hooks_get_stores_of_their_own(tmp_path: Path) -> None:
    """Several layers and hooks get a store each, by the names that harvest gives them, and folders of their own."""
    hooks = ("resid_post", "mlp_out")
    (tmp_path / "a.toml").write_text(
        f'[harvest]\nmodel = "m"\nlayer = [3, 5]\nhook = {json.dumps(hooks)}\n[train]\nalpha = 0.2\n'
    )
    read = experiments.Experiment.read(tmp_path / "a.toml")
    assert read.sites == ["layer_3", "layer_3.mlp_out", "layer_5", "layer_5.mlp_out"]
    places = experiments.Places.of(read, tmp_path / "out")
    assert [str(places.store_of(site)) for site in read.sites] == list(
        HarvestConfig(str(places.store), layers=(3, 5), hooks=hooks).stores().values()
    )
    assert len({places.checkpoints(site) for site in read.sites} | {places.results(site) for site in read.sites}) == 8
    with pytest.raises(UsageError, match=r"harvest\.hook is 'hook_z', known are resid_post"):
        (tmp_path / "b.toml").write_text('[harvest]\nmodel = "m"\nhook = ["hook_z"]\n[train]\nalpha = 0.2\n')
        experiments.Experiment.read(tmp_path / "b.toml")


TRANSCODERS = """
[harvest]
model = "m"
layer = [3, 5]
hook = ["mlp_in", "mlp_out"]
[[train]]
store = "mlp_in"
target = "mlp_out"
alpha = [0, 0.2]
skip = true
[[train]]
store = "mlp_out"
width = 64
"""


def test_grids_name_their_hooks(tmp_path: Path) -> None:
    """A grid with a target trains transcoders from its store's hook to that, in a folder of their own, and they are evaluated
    with both stores; one with a store alone trains SAEs on that hook and no other."""
    (tmp_path / "a.toml").write_text(TRANSCODERS)
    read = experiments.Experiment.read(tmp_path / "a.toml")
    names = ["layer_3.mlp_out", "layer_5.mlp_out", "layer_3.mlp_in-to-mlp_out", "layer_5.mlp_in-to-mlp_out"]
    assert [site.name for site in read.trained] == names
    places, site = experiments.Places.of(read, tmp_path / "out"), read.trained[2]
    stores = [
        f"--{name}={tmp_path}/out/stores/layer_3.{hook}.zarr"
        for name, hook in (("store", "mlp_in"), ("target", "mlp_out"))
    ]
    trained = experiments.train_words(site.grids[0], places, site)
    scored = experiments.evaluate_words(read, places, site, ["MEMBER"])
    for words, out in ((trained, "checkpoints"), (scored, "results")):
        said = [f"{name}={value}" for name, value in zip(words, words[1:])]
        assert {*stores, f"--out={tmp_path}/out/{out}/layer_3.mlp_in-to-mlp_out"} <= set(said)
    assert "--skip" in trained
    assert "--target" not in experiments.train_words(read.trained[0].grids[0], places, read.trained[0])
    experiments.check(read, experiments.with_parts(read, tmp_path / "out"))


@pytest.mark.parametrize(
    ("grid", "says"),
    [
        ('target = "mlp_out"', "say which other hook its transcoders read"),
        ('store = "mlp_out"\ntarget = "mlp_out"', "say which other hook its transcoders read"),
        (
            'store = "mlp_in"\ntarget = "resid_post"',
            "train.target is 'resid_post': name a hook that .harvest. has, mlp_in, mlp_out",
        ),
        ('store = "acts.zarr"', "train.store is 'acts.zarr': name a hook"),
        ('store = "mlp_in"\ntarget = ["mlp_out"]', "say which other hook its transcoders read"),
    ],
)
def test_unharvested_hooks_are_refused(tmp_path: Path, grid: str, says: str) -> None:
    """A grid's store and target are hooks of the harvest, and no transcoder reads what it makes: said before any work."""
    (tmp_path / "a.toml").write_text(f'[harvest]\nmodel = "m"\nhook = ["mlp_in", "mlp_out"]\n[train]\n{grid}\n')
    with pytest.raises(UsageError, match=says):
        experiments.Experiment.read(tmp_path / "a.toml")


@pytest.mark.slow
def test_transcoders_run_as_an_experiment(tmp_path: Path) -> None:
    """Harvest of both hooks in one pass, SAEs of one and transcoders between them, scores of all and a report that tells them
    apart; run again, nothing is done."""
    text = MINI.format(root=ROOT, alphas="[0, 0.25]").replace("seed = [0, 1]", "seed = 0")
    text = text.replace("layer = [3]", 'layer = [3]\nhook = ["mlp_in", "mlp_out"]').replace("[train]", "[[train]]")
    grids = text[text.index("[[train]]") : text.index("[evaluate]")]
    both = grids + 'store = "mlp_out"\n' + grids + 'store = "mlp_in"\ntarget = "mlp_out"\nskip = true\n'
    (tmp_path / "a.toml").write_text(text.replace(grids, both))
    out = tmp_path / "out"
    for _ in range(2):
        subprocess.run(command(tmp_path / "a.toml", out), cwd=ROOT, check=True)
        made = {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    assert made == {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    results = sorted((out / "results").rglob("*.json"))
    assert [path.parent.name for path in results] == ["layer_3.mlp_in-to-mlp_out"] * 2 + ["layer_3.mlp_out"] * 2
    assert [json.loads(path.read_text())["store"].get("source", {}).get("hook") for path in results] == [
        "mlp_in"
    ] * 2 + [None] * 2
    assert "mlp_in" in (out / "report.html").read_text()


PART = '[[part]]\nname = "known"\nharvest.truth = "forest"\n[[part.train]]\nalpha = 0\n[part.evaluate]\nscores = "ev,truth"\n'


def test_parts_get_places_and_one_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A part is harvested, trained and scored in places of its own, and its results go to the one report."""
    file = write(tmp_path / "a.toml")
    file.write_text(file.read_text() + PART)
    calls: list[tuple[str, list[str]]] = []

    def ask(stage: str, words: list[str], log: Path) -> Any:
        calls.append((stage, words))
        n = len(calls)
        return {"members": [{"folder": f"/member{n}"}], "results": [{"path": f"/result{n}.json"}]}

    monkeypatch.setattr(stages, "ask_stage", ask)
    monkeypatch.setattr(stages, "run_stage", lambda stage, words, log: calls.append((stage, words)))
    experiments.run(experiments.Experiment.read(file), tmp_path / "out")
    assert [stage for stage, _ in calls] == [*["harvest", "train", "evaluate"] * 2, "evaluate.report"]
    own = [str(tmp_path / "out" / name) for name in ("stores/known.zarr", "checkpoints/known", "results/known")]
    assert calls[3][1] == ["--truth", "forest", "--store", own[0]]
    assert calls[4][1] == ["--alpha", "0", "--store", own[0], "--out", own[1]]
    assert calls[5][1] == ["/member5", "--scores", "ev,truth", "--store", own[0], "--out", own[2]]
    assert calls[6][1][:2] == ["/result3.json", "/result6.json"]


def test_parts_of_layers_differ_in_name(tmp_path: Path) -> None:
    """Layers of a part never share a folder with layers of the experiment."""
    (tmp_path / "a.toml").write_text(f'{HARVEST}{TRAIN}[[part]]\nname = "p"\nharvest.layer = [1, 2]\ntrain.width = 8\n')
    experiment = experiments.Experiment.read(tmp_path / "a.toml")
    (_, own), (_, part) = experiments.with_parts(experiment, tmp_path)
    folders = [own.checkpoints("layer_1"), part.checkpoints("layer_1"), part.checkpoints("layer_2")]
    assert [folder.name for folder in folders] == ["layer_1", "p-layer_1", "p-layer_2"]
    assert part.store_of("layer_2") == tmp_path / "stores/p/layer_2.zarr"


def test_dry_run_estimates_every_stage(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A dry run of what is not there yet says disk, memory and time of every stage."""
    experiments.dry_run(experiments.Experiment.read(write(tmp_path / "a.toml")), tmp_path / "out")
    said = capfd.readouterr().err
    for part in (
        r"store .* 8,832 rows × 1 stores, \d\.\d MB",
        r"time     about \d+ s .*FLOP",
        r"memory   about \d",
        "4 members, 1 passes over 7,936 rows of a store still to be made",
        r"4 side by side, memory: .*optimiser",
        "disk: at most",
        r"4 members, at most 10 passes of what follows layer_3 over 896 rows: about \d+ s",
    ):
        assert re.search(part, said), (part, said)
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"logs"}


def test_failing_stage_names_command_and_log(tmp_path: Path) -> None:
    """A stage that fails ends the run with its command and log."""
    with pytest.raises(PipelineError, match=r"python -m harvest --nope: exit code 2"):
        stages.run_stage("harvest", ["--nope"], tmp_path / "log")
    assert "$ python -m harvest --nope" in (tmp_path / "log").read_text()


def snapshot(out: Path) -> dict[str, bytes]:
    """Every file that must not depend on when or how often the run was killed, by path."""
    skipped = ("logs", "timings.jsonl", "timings.jsonl.sha256", "report_files", "report.html", "results")
    files = [p for p in out.rglob("*") if p.is_file() and not set(p.relative_to(out).parts) & set(skipped)]
    return {str(p.relative_to(out)): p.read_bytes() for p in files}


@pytest.mark.slow
def test_second_run_does_only_what_changed(tmp_path: Path) -> None:
    """A second run does nothing and a changed line does only what it asks."""
    out = tmp_path / "out"
    subprocess.run(command(write(tmp_path / "a.toml"), out), cwd=ROOT, check=True)
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*.safetensors")} | {
        p: p.stat().st_mtime_ns for p in (out / "results").rglob("*.json")
    }
    assert len(before) > 4
    subprocess.run(command(tmp_path / "a.toml", out), cwd=ROOT, check=True)
    assert all(p.stat().st_mtime_ns == t for p, t in before.items())
    subprocess.run(command(write(tmp_path / "a.toml", "[0, 0.25, 0.5]"), out), cwd=ROOT, check=True)
    assert all(p.stat().st_mtime_ns == t for p, t in before.items())
    assert len(list((out / "results").rglob("*.json"))) == 6
    assert "0.5" in (out / "report.html").read_text()


@pytest.mark.slow
def test_killed_run_ends_with_equal_bytes(tmp_path: Path) -> None:
    """Killed at random moments, the run ends with the same bytes."""
    path, whole, out = write(tmp_path / "a.toml"), tmp_path / "whole", tmp_path / "killed"
    start = time.monotonic()
    subprocess.run(command(path, whole), cwd=ROOT, check=True)
    length = time.monotonic() - start
    rng = random.Random(0)
    for _ in range(4):
        process = subprocess.Popen(command(path, out), cwd=ROOT, stderr=subprocess.DEVNULL)
        time.sleep(rng.uniform(0.2, 0.9) * length)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        time.sleep(0.5)
    subprocess.run(command(path, out), cwd=ROOT, check=True)
    assert snapshot(out) == snapshot(whole)
    shutil.rmtree(out)


HARVEST, TRAIN = '[harvest]\nmodel = "m"\nlayer = [1]\n', "[train]\nwidth = 64\n"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (f"{HARVEST}trust-remote-code = true\n{TRAIN}", "trust-remote-code"),
        (f"{HARVEST}trust_remote_code = true\n{TRAIN}", "trust-remote-code"),
        (f"harvest = 3\n{TRAIN}", "harvest is int, expected a table"),
        (f"{HARVEST}[[train]]\nwidth = 64\n[train.x]\ny = 1\n", "train.x is a table|not valid TOML|x"),
        (f"name = 3\n{HARVEST}{TRAIN}", "name is int"),
        (f"{HARVEST}{TRAIN}[part]\nname = 'p'\n", "part is no list of tables"),
        (f"{HARVEST}{TRAIN}[[part]]\nname = 'p'\n", r"part: needs a \[harvest\] and a \[train\]"),
        (f"{HARVEST}{TRAIN}[[part]]\nharvest.layer = 1\ntrain.width = 8\n", "part: name is ''; give each part its own"),
        (f"{HARVEST}{TRAIN}[[part]]\nname = '../p'\nharvest.layer = 1\ntrain.width = 8\n", "part: name is '../p'"),
        (f"{HARVEST}{TRAIN}[[part]]\nname = 'p'\nreport.title = 'x'\n", "part: unknown table 'report'"),
        (f"{HARVEST}store = 3\n{TRAIN}", "harvest.store is '3', expected a path"),
        (f"{HARVEST}{TRAIN}dry_run = true\n", "train.dry-run is what an experiment decides itself"),
        (f"{HARVEST}{TRAIN}[evaluate]\nout = 'x'\n", "evaluate.out is what an experiment decides itself"),
    ],
)
def test_odd_tables_are_refused(tmp_path: Path, text: str, says: str) -> None:
    """What a file may not ask for alone, and tables that are none, are refused when it is read."""
    (tmp_path / "e.toml").write_text(text)
    with pytest.raises(UsageError, match=says):
        experiments.Experiment.read(tmp_path / "e.toml")


def test_trusted_code_is_asked_for_twice(tmp_path: Path) -> None:
    """The file and the command line together allow a model's own code."""
    (tmp_path / "e.toml").write_text(f"{HARVEST}trust-remote-code = true\n{TRAIN}")
    assert experiments.Experiment.read(tmp_path / "e.toml", trust_remote_code=True).harvest["trust-remote-code"] is True


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (f"{HARVEST}tokns = 5\n{TRAIN}", "harvest: No such option.*tokns"),
        (f'{HARVEST}[train]\nwidth = "wide"\n', "train: .*wide"),
        (f"{HARVEST}{TRAIN}[evaluate]\nscore = 1\n", "evaluate: No such option.*score"),
        (f"{HARVEST}{TRAIN}[report]\ncolour = 1\n", "evaluate.report: No such option.*colour"),
        (f"{HARVEST}hook = ['mlp_in']\ntokens = 0\n{TRAIN}", "harvest: .*tokens"),
        (f"{HARVEST}{TRAIN}recipe = 'batchtopk'\nk = 65\n", "train: k must be at most the width, 64, got 65"),
        (f"{HARVEST}{TRAIN}alpha = 1.5\n", "train: alpha 1.5 is outside"),
        (f"{HARVEST}{TRAIN}[evaluate]\nscores = 'ev,foo'\n", "evaluate: --scores 'foo' is not one of"),
        (f"{HARVEST}{TRAIN}[evaluate]\nscores = 'scr'\n", "evaluate: --scores scr needs texts"),
        (f"{HARVEST}{TRAIN}[evaluate]\nscr = '/nowhere'\n", "evaluate: /nowhere: not a folder"),
        (f"{HARVEST}{TRAIN}[report]\nprimary = 'foo'\n", "evaluate.report: --primary foo: no such metric"),
        (f"{HARVEST}skip-bad = 1\nskip_bad = 2\n{TRAIN}", "harvest.skip-bad is given twice"),
        (f"{HARVEST}{TRAIN}processes = 0\n", "train: .*give 1 or more"),
        (f"{HARVEST}{TRAIN}device = 'cuda:99'\n", "train: --device cuda:99: "),
    ],
)
def test_options_are_checked_first(tmp_path: Path, text: str, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An option that a stage does not know, a value it cannot read, or what options mean together and no stage does, is named
    before the first stage starts."""
    monkeypatch.setattr(stages, "run_stage", lambda *_: pytest.fail("a stage was started"))
    (tmp_path / "e.toml").write_text(text)
    with pytest.raises(UsageError, match=says):
        experiments.run(experiments.Experiment.read(tmp_path / "e.toml"), tmp_path / "out")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--corpus", "/no/such"], "--corpus /no/such: no such file"),
        (["--truth", "./no.toml"], r"--truth \./no\.toml: no such file"),
        (["--model", "gpt2", "--corpus", "owner/name"], ""),
    ],
)
def test_sources_are_looked_for_first(words: list[str], says: str) -> None:
    """A path that an option names to be read and that is not there is refused; what may be an id of the Hub is not."""
    with harvest_command.make_context("harvest", ["--store", "s", *words]) as context:
        if not says:
            require_sources(context)
            return
        with pytest.raises(UsageError, match=says):
            require_sources(context)


def test_checking_starts_nothing(tmp_path: Path) -> None:
    """Stages that only read their options make no file, and epochs of a store that is not there are no contradiction."""
    (tmp_path / "e.toml").write_text(f"{HARVEST}{TRAIN}epochs = 2\n")
    experiment = experiments.Experiment.read(tmp_path / "e.toml")
    experiments.check(experiment, experiments.with_parts(experiment, tmp_path / "out"))
    assert [path.name for path in tmp_path.iterdir()] == ["e.toml"]


def test_url_stores_are_refused(tmp_path: Path) -> None:
    """A store at a URL, which an experiment would train from, is refused by name."""
    (tmp_path / "e.toml").write_text(f'{HARVEST}store = "s3://bucket/acts.zarr"\n{TRAIN}')
    with pytest.raises(UsageError, match=r"s3://bucket/acts\.zarr is a URL"):
        experiments.Places.of(experiments.Experiment.read(tmp_path / "e.toml"), tmp_path)


def test_models_have_a_default(tmp_path: Path) -> None:
    """An experiment that names no model takes harvest's, in evaluation too."""
    (tmp_path / "e.toml").write_text(f"[harvest]\nlayer = [1]\n{TRAIN}")
    experiment = experiments.Experiment.read(tmp_path / "e.toml")
    words = experiments.evaluate_words(
        experiment, experiments.Places.of(experiment, tmp_path), experiment.trained[0], ["x"]
    )
    assert "--model" not in words
