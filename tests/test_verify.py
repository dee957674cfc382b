"""Every kind of damage to every artefact of an experiment is found by `verify`, whatever path it is given, and named."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from evaluate.latents.files import write_labels
from evaluate.report.write import write_report
from evaluate.run import EvaluateConfig
from evaluate.run import run as evaluate
from pipeline.base.digests import sealed, write_digests, write_vouched
from pipeline.base.errors import DamagedError, PipelineError
from pipeline.base.files import write_json
from pipeline.experiment.describe import describe
from pipeline.experiment.slurm import write_script
from pipeline.experiment.stages import run_stage
from pipeline.experiment.verify import verify
from pipeline.live.inspect import Block, Token, as_page
from pipeline.sae.checkpoint import save_checkpoint
from pipeline.sae.export import export
from pipeline.sae.foreign.reader import load_sae
from pipeline.watch import watched, write_page
from support import lm_stores
from support.train_crasher import small
from test_checkpoint_hostile import PROVENANCE
from test_sae import KINDS, random_sae
from test_store_hostile import change_root
from train.plan import RunConfig
from train.run import run as train

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole experiment: store, two members, their results with latent pages, a report, an export. Read-only."""
    out = tmp_path_factory.mktemp("verify") / "out"
    store = lm_stores.make_lm_store(out.parent, eval_sequences=8)
    shutil.copytree(store.path, out / "stores" / "acts.zarr")
    members = (small(alpha=0.25), small(alpha=0.25, seed=1))
    train(RunConfig(store.path, out / "runs", members, device="cpu", threads=1))
    config = EvaluateConfig(store=store.path, out=out / "results", scores=("ev",), latents="all", device="cpu")
    assert not evaluate(config, [out / "runs"]).failed
    write_report([out / "results"], out / "report.html")
    export(first(out, "runs/*/checkpoints/*.safetensors"), "saelens", out / "exported")
    write_beside_them(out)
    return out


def write_beside_them(out: Path) -> None:
    """What else commands write: labels, an explanation, a page of watch and of inspect, a job's script, a log, a plan."""
    write_labels(first(out, "results/*.latents"), {3: "rivers"})
    write_json(out / "explained.json", sealed({"format": "nested-sae-explanations", "latents": [{"latent": 3}]}))
    write_page(out / "watch.html", watched(out / "runs", 0), out / "runs", 5)
    tokens = [Token("It", (Block("latents", ((7, 0.5),), 1),))]
    write_vouched(out / "inspect.html", as_page(tokens, ["latents"], "It").encode())
    write_script(out / "jobs" / "train_0.sh", "#!/usr/bin/env bash\npython -m train --lr 0.001\n")
    run_stage("evaluate.report", ["--help"], out / "logs" / "report.log")
    write_json(out / "logs" / "harvest-plan.json", sealed({"cost": {"seconds": 3.5}}))


@pytest.fixture
def root(made: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(made, tmp_path / "out"))


def first(root: Path, pattern: str, n: int = 0) -> Path:
    """The n-th path of a pattern."""
    return sorted(root.glob(pattern))[n]


def replace(path: Path, pattern: str, text: str) -> None:
    """Change one place of a text file."""
    changed, n = re.subn(pattern, text, path.read_text(), count=1)
    assert n == 1
    path.write_text(changed)


def flip(path: Path) -> None:
    """Flip a bit in the middle."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def swap(one: Path, other: Path) -> None:
    """Exchange two paths."""
    one.rename(one.with_name("between"))
    other.rename(one)
    one.with_name("between").rename(other)


def reseal(path: Path, field: str, value: object) -> None:
    """Change a field of a sealed file, and its seal with it."""
    write_json(path, sealed(json.loads(path.read_text()) | {field: value}))


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "a flipped byte of the store": (lambda r: flip(first(r, "stores/*/train/resid/c/0/0")), "resid"),
    "an EV of results": (lambda r: replace(first(r, "results/*.json"), r'"ev": 0\.', '"ev": 9.'), "what it says changed"),
    "results under another's name": (
        lambda r: swap(first(r, "results/*.json"), first(r, "results/*.json", 1)),
        "holds the results of",
    ),
    "results that are no JSON": (lambda r: first(r, "results/*.json").write_text("{"), "not readable as JSON"),
    "a lost line of metrics": (
        lambda r: replace(first(r, "runs/*/metrics.jsonl"), r"\A.*\n", ""),
        "not the lines that were recorded",
    ),
    "a changed loss of metrics": (
        lambda r: replace(first(r, "runs/*/metrics.jsonl"), r'"loss":\d', '"loss":7'),
        "not the lines that were recorded",
    ),
    "metrics that are gone": (lambda r: first(r, "runs/*/metrics.jsonl").unlink(), "not the lines that were recorded"),
    "a store's name in config.json": (
        lambda r: replace(first(r, "runs/*/config.json"), r'"revision": "local"', '"revision": "locol"'),
        "config.json: what it says changed",
    ),
    "a member's folder renamed": (
        lambda r: first(r, "runs/*").rename(r / "runs" / "alpha0.25-seed0-0123456789"),
        "its name is not that of its config",
    ),
    "another member's final checkpoint": (
        lambda r: swap(*(first(r, "runs/*/checkpoints/*", n) for n in (0, 3))),
        "is of member 'alpha0.25-seed1.*lies in the folder of alpha0.25-seed0",
    ),
    "statistics of a store, sealed anew": (
        lambda r: change_root(first(r, "stores/*"), lambda attributes: attributes["statistics"].update(scale=0.5)),
        "its statistics say scale 0.5, its rows",
    ),
    "a config sealed anew": (
        lambda r: reseal(first(r, "runs/*/config.json"), "order", {"mode": "window", "window_rows": 64}),
        "config.json: not the config that was recorded",
    ),
    "a field of complete.json": (
        lambda r: replace(first(r, "runs/*/complete.json"), r'"metrics_sha256": "..', '"metrics_sha256": "xx'),
        "complete.json: what it says changed",
    ),
    "a checkpoint under another step": (
        lambda r: shutil.copy(
            first(r, "runs/*/checkpoints/*"), first(r, "runs/*/checkpoints") / "step_000007.safetensors"
        ),
        "its name says step 7",
    ),
    "a flipped byte of a checkpoint": (lambda r: flip(first(r, "runs/*/checkpoints/*")), "bytes changed"),
    "a final checkpoint that is gone": (lambda r: first(r, "runs/*/checkpoints/*", -1).unlink(), "is gone"),
    "a config that is gone": (lambda r: first(r, "runs/*/config.json").unlink(), r"config\.json: gone; put it back"),
    "checkpoints that are gone": (lambda r: shutil.rmtree(first(r, "runs/*/checkpoints")), "checkpoints: No such file"),
    "no complete.json": (lambda r: first(r, "runs/*/complete.json").unlink(), "training is not finished"),
    "a number of latent pages": (
        lambda r: replace(first(r, "results/*.latents/page_0000.js"), r'"id":3\b', '"id":4'),
        "page_0000.js: SHA-256",
    ),
    "the index of latent pages": (
        lambda r: replace(first(r, "results/*.latents/index.js"), r'"density":\[\d', '"density":[1'),
        "index.js: SHA-256",
    ),
    "results that are gone, their pages left": (
        lambda r: first(r, "results/*.json").unlink(),
        "latent pages without their results",
    ),
    "a latent page that is gone": (lambda r: first(r, "results/*.latents/page_0000.js").unlink(), "page_0000.js: gone"),
    "another dictionary's latent pages": (
        lambda r: swap(first(r, "results/*.latents"), first(r, "results/*.latents", 1)),
        "digests of 'alpha0.25-seed",
    ),
    "a number in a report": (lambda r: replace(r / "report.html", r"0\.\d", "0.0!"), "report.html: SHA-256"),
    "a figure of a report": (lambda r: flip(first(r, "report_files/*.svg")), r"svg: SHA-256"),
    "a report's numbers": (lambda r: flip(r / "report_files" / "table1.csv"), r"table1.csv: SHA-256"),
    "a score in results.csv": (lambda r: replace(r / "results" / "results.csv", r"0\.\d", "0.!"), r"results\.csv: SHA-256"),
    "results.csv that is gone": (lambda r: (r / "results" / "results.csv").unlink(), "the digest of a file that is gone"),
    "a rate of timings": (
        lambda r: replace(first(r, "runs/*/timings.jsonl"), r'"rows_per_s":\d', '"rows_per_s":!'),
        r"timings\.jsonl: SHA-256",
    ),
    "a label of a latent": (
        lambda r: replace(first(r, "results/*.latents/labels.json"), "rivers", "lakes"),
        "labels.json: what it says changed",
    ),
    "labels that are no JSON": (
        lambda r: replace(first(r, "results/*.latents/labels.json"), '": "', '" "'),
        "labels.json: not readable as JSON",
    ),
    "an explanation": (lambda r: replace(r / "explained.json", '"latent": 3', '"latent": 4'), "what it says changed"),
    "a page of watch": (lambda r: replace(r / "watch.html", "step", "steq"), r"watch\.html: SHA-256"),
    "a number of inspect": (lambda r: replace(r / "inspect.html", r"0\.5", "0.7"), r"inspect\.html: SHA-256"),
    "an option of a job": (lambda r: replace(r / "jobs" / "train_0.sh", "0.001", "0.1"), r"train_0\.sh: SHA-256"),
    "a line of a log": (lambda r: replace(r / "logs" / "report.log", "report", "retort"), r"report\.log: SHA-256"),
    "a number of a plan": (lambda r: replace(r / "logs" / "harvest-plan.json", "3.5", "2.5"), "what it says changed"),
    "the digest beside a log": (
        lambda r: replace(r / "logs" / "report.log.sha256", r"\A..", "!!"),
        r"report\.log\.sha256: is no digest of report\.log",
    ),
    "a report that is gone": (lambda r: (r / "report.html").unlink(), "the files of a report that is gone"),
    "a byte of exported weights": (lambda r: flip(r / "exported" / "sae_weights.safetensors"), "weights.safetensors: SHA-256"),
    "a field of an export": (
        lambda r: replace(r / "exported" / "cfg.json", r'"context_size": \d+', '"context_size": 7'),
        "cfg.json: SHA-256",
    ),
    "the digests themselves": (
        lambda r: replace(r / "exported" / "digests.json", r'"cfg.json": "..', '"cfg.json": "xx'),
        "digests.json: what it says changed",
    ),
}  # fmt: skip


def test_whole_experiment_is_whole(made: Path) -> None:
    """Nothing is found in what nobody touched, and what carries no digest is listed."""
    found = verify(str(made))
    assert found.problems == []
    assert found.unvouched == []


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_found_in_an_experiment(root: Path, kind: str) -> None:
    """Each kind of damage is found from the experiment's folder, in lines that name a file of it."""
    harm, says = DAMAGE[kind]
    harm(root)
    problems = verify(str(root)).problems
    assert any(re.search(says, problem) for problem in problems), problems
    assert all(str(root) in problem and "\n" not in problem for problem in problems)


@pytest.mark.parametrize("kind", ["a field of complete.json", "a config sealed anew", "a changed loss of metrics"])
def test_changed_members_are_not_described(root: Path, kind: str) -> None:
    """What `describe` shows of a member is what completed it; a training's folder names the problem and shows the others."""
    DAMAGE[kind][0](root)
    member = first(root, "runs/*")
    with pytest.raises(DamagedError, match=r"what it says changed|not the config|not the lines"):
        describe(str(member))
    assert [name for name, about in describe(str(root / "runs")).items() if name != "kind" and "problem" in about] == [
        member.name
    ]


PLACES = {
    "stores": None,
    "stores/acts.zarr": ("stores/*/train/resid/c/0/0", flip),
    "runs": ("runs/*/checkpoints/*", flip),
    "runs/*": ("runs/*/metrics.jsonl", flip),
    "runs/*/checkpoints/*": ("runs/*/checkpoints/*", flip),
    "runs/*/metrics.jsonl": ("runs/*/metrics.jsonl", flip),
    "runs/*/config.json": ("runs/*/config.json", lambda path: replace(path, r'"seed": 0', '"seed": 2')),
    "runs/*/complete.json": ("runs/*/complete.json", lambda path: replace(path, r'"sha256": ".', '"sha256": "x')),
    "results": ("results/*.json", lambda path: replace(path, r'"ev": 0\.', '"ev": 9.')),
    "results/*.json": ("results/*.json", lambda path: replace(path, r'"ev": 0\.', '"ev": 9.')),
    "results/*.latents": ("results/*.latents/page_0000.js", flip),
    "results/*.latents/page_0000.js": ("results/*.latents/page_0000.js", flip),
    "report.html": ("report.html", flip),
    "report_files/table1.csv": ("report_files/table1.csv", flip),
    "results/results.csv": ("results/results.csv", flip),
    "results/*.latents/labels.json": ("results/*.latents/labels.json", lambda path: replace(path, "rivers", "lakes")),
    "runs/*/timings.jsonl": ("runs/*/timings.jsonl", flip),
    "logs": ("logs/report.log", flip),
    "explained.json": ("explained.json", lambda path: replace(path, '"latent": 3', '"latent": 4')),
    "inspect.html": ("inspect.html", flip),
    "exported": ("exported/cfg.json", flip),
    "exported/cfg.json": ("exported/cfg.json", flip),
}


@pytest.mark.parametrize("place", PLACES)
def test_any_path_can_be_verified(root: Path, place: str) -> None:
    """Any path that the project writes is whole, and no longer when what it stands for is changed."""
    assert verify(str(first(root, place))).problems == []
    if (damage := PLACES[place]) is not None:
        pattern, harm = damage
        harm(first(root, pattern))
        assert verify(str(first(root, place))).problems


def test_unfinished_state_is_checked(root: Path) -> None:
    """A rolling state that is another member's, and metrics that it does not speak of, are found."""
    from pipeline.sae.checkpoint import save_tensors
    from pipeline.sae.member import hash_lines, lines_until

    member = first(root, "runs/*")
    (member / "complete.json").unlink()
    lines = lines_until(member / "metrics.jsonl", 8)
    header = {"format": "nested-sae-training-state", "version": 2, "step": 8, "member": member.name}
    save_tensors(member / "state.safetensors", {}, header | {"metrics_sha256": hash_lines(lines)})
    assert ["not finished" in problem for problem in verify(str(member)).problems] == [True]
    save_tensors(member / "state.safetensors", {}, header | {"metrics_sha256": hash_lines(lines[:-1])})
    assert any("metrics.jsonl: not the lines" in problem for problem in verify(str(member)).problems)
    save_tensors(member / "state.safetensors", {}, header | {"member": "x", "metrics_sha256": hash_lines(lines)})
    assert any("the state of 'x', not of" in problem for problem in verify(str(member)).problems)


@pytest.mark.parametrize(
    "place",
    [
        *("exported", "report_files", "results/*.latents", "runs/*", "runs/*/checkpoints", "stores", "logs"),
        *("stores/acts.zarr", "stores/acts.zarr/train/resid"),
    ],
)
def test_strangers_are_listed(root: Path, place: str) -> None:
    """A file that nobody wrote for us, in any folder of ours, is no damage and is listed; in a log's place it is too."""
    stranger = first(root, place) / "numbers.csv"
    stranger.write_text("ev\n0.9\n")
    (root / "logs" / "report.log.sha256").unlink()
    found = verify(str(root))
    assert found.problems == []
    assert {line.partition(": ")[0] for line in found.unvouched} == {str(stranger), str(root / "logs" / "report.log")}


def test_running_training_is_listed(root: Path) -> None:
    """Timings that training still appends to carry no digest, which is said."""
    member = first(root, "runs/*")
    (member / "timings.jsonl.sha256").unlink()
    (member / "complete.json").unlink()
    assert any("timings.jsonl: appended to until" in line for line in verify(str(member)).unvouched)


def test_digests_are_sha256sums(made: Path) -> None:
    """`sha256sum -c` reads the digests that lie beside files."""
    for digest in (made / "logs" / "report.log.sha256", first(made, "runs/*/timings.jsonl.sha256")):
        subprocess.run(["sha256sum", "-c", "--strict", digest.name], cwd=digest.parent, check=True, capture_output=True)


def test_foreign_paths_are_named(tmp_path: Path) -> None:
    """A path that this project does not write is an error, not whole."""
    (tmp_path / "thesis.tex").write_text("x")
    for path in (tmp_path, tmp_path / "thesis.tex", tmp_path / "nothing"):
        with pytest.raises(PipelineError, match="expected a store"):
            verify(str(path))


def test_older_artefacts_are_not_vouched_for(root: Path) -> None:
    """Results and configs of before there were seals are read, and listed as what nobody can vouch for."""
    for path in (first(root, "results/*.json"), first(root, "runs/*/config.json"), first(root, "runs/*/complete.json")):
        data = json.loads(path.read_text())
        write_json(path, {name: data[name] for name in data if name not in ("seal", "config_sha256")})
    found = verify(str(root))
    assert found.problems == []
    assert sum("older version" in line for line in found.unvouched) == 3


def test_digests_lead_nowhere_else(tmp_path: Path) -> None:
    """Digests that name a path outside their folder are damage, and nothing there is read."""
    for name in ("../secret", "/etc/passwd", "a/../../b"):
        write_digests(tmp_path / "digests.json", "x", {name: "0" * 64})
        (tmp_path / "index.js").write_text("")
        folder = tmp_path.rename(tmp_path.with_suffix(".latents"))
        assert any("lies elsewhere" in problem for problem in verify(str(folder)).problems)
        folder.rename(tmp_path)


def test_report_and_evaluation_refuse_changed_results(root: Path) -> None:
    """Results whose numbers changed, that lie under another's name, and latent pages of others are no report."""
    result = first(root, "results/*.json")
    whole = result.read_text()
    replace(result, r'"ev": 0\.', '"ev": 9.')
    with pytest.raises(DamagedError, match="what it says changed"):
        write_report([root / "results"], root / "again.html")
    result.write_text(whole)
    swap(first(root, "results/*.json"), first(root, "results/*.json", 1))
    with pytest.raises(DamagedError, match="holds the results of"):
        write_report([root / "results"], root / "again.html")
    swap(first(root, "results/*.json"), first(root, "results/*.json", 1))
    swap(first(root, "results/*.latents"), first(root, "results/*.latents", 1))
    with pytest.raises(DamagedError, match="digests of"):
        write_report([root / "results"], root / "again.html")


def test_other_members_checkpoint_not_scored(root: Path, tmp_path: Path) -> None:
    """A checkpoint that was put into another member's folder, under its own step's name, is refused before scoring."""
    here, there = (first(root, "runs/*/checkpoints/step_000015.safetensors", n) for n in (0, 1))
    shutil.copy(there, here)
    config = EvaluateConfig(store=first(root, "stores/*"), out=tmp_path / "r", scores=("ev",), device="cpu")
    outcome = evaluate(config, [here])
    assert "lies in the folder of" in str(outcome.failed[0][1])


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (lambda m: replace(m / "metrics.jsonl", r'"loss":\d', '"loss":7'), r"metrics\.jsonl: not the lines that were recorded"),
        (lambda m: replace(m / "metrics.jsonl", r"\A.*\n", ""), r"metrics\.jsonl: not the lines that were recorded"),
        (lambda m: reseal(m / "config.json", "order", {"mode": "window"}), r"config\.json: not the config that was recorded"),
        (lambda m: reseal(m / "complete.json", "metrics_sha256", 3), r"complete\.json: 'metrics_sha256' should be text"),
        (lambda m: replace(m / "complete.json", r'"config_sha256": "..', '"config_sha256": "xx'), "what it says changed"),
    ],
)  # fmt: skip
def test_finished_members_are_compared_first(
    root: Path, tmp_path: Path, harm: Callable[[Path], object], says: str
) -> None:
    """Metrics, config or complete.json of a finished member that changed cost that member alone, before anything is scored."""
    harm(first(root, "runs/*"))
    config = EvaluateConfig(store=first(root, "stores/*"), out=tmp_path / "r", scores=("ev",), device="cpu")
    outcome = evaluate(config, [root / "runs"])
    assert len(outcome.results) == 1
    assert [re.search(says, str(error)) is not None for _, error in outcome.failed] == [True], outcome.failed


def test_changed_exports_are_not_loaded(tmp_path: Path) -> None:
    """What our own export's digests do not vouch for is no SAE; nor is an export whose digests changed."""
    save_checkpoint(tmp_path / "mine.safetensors", random_sae(KINDS["relu"]), 5, PROVENANCE)
    (exported,) = export(tmp_path / "mine.safetensors", "saelens", tmp_path / "exported")
    load_sae(exported)
    for harm, says in (
        (lambda: replace(exported / "cfg.json", r'"context_size": \d+', '"context_size": 7'), r"cfg\.json: SHA-256"),
        (lambda: replace(exported / "digests.json", '"name": "', '"name": "x'), "what it says changed"),
    ):
        harm()
        with pytest.raises(DamagedError, match=says):
            load_sae(exported)


def test_results_of_checkpoints_elsewhere_are_said(root: Path) -> None:
    """Results of a checkpoint that is not in the experiment are listed as what cannot be vouched for."""
    result = first(root, "results/*.json")
    data = json.loads(result.read_text())
    data["checkpoint"]["sha256"] = "0" * 64
    write_json(result, sealed(data))
    assert f"{result}: results of a checkpoint that is not here" in verify(str(root)).unvouched


def test_seals_ignore_how_data_lie(tmp_path: Path) -> None:
    """Numbers as keys and tuples, which JSON holds otherwise, seal like what is read back."""
    data = sealed({"by": {10: 1, 9: (1, 2.5)}})
    write_json(tmp_path / "a.json", data)
    assert sealed(json.loads((tmp_path / "a.json").read_text()))["seal"] == data["seal"]


def test_checkpoint_alone_needs_no_folder(root: Path, tmp_path: Path) -> None:
    """A checkpoint copied out of its member is whole by itself."""
    sae, header = load_sae(first(root, "runs/*/checkpoints/*"))
    save_checkpoint(tmp_path / "mine.safetensors", sae, header.step, header.provenance)
    assert verify(str(tmp_path / "mine.safetensors")).problems == []


@pytest.mark.parametrize("place", ["runs", "results", "stores/acts.zarr/train"])
def test_pipes_are_never_whole(made: Path, tmp_path: Path, place: str) -> None:
    """A pipe anywhere in an experiment is a problem, though no digest speaks of it and nothing waits for it."""
    shutil.copytree(made, tmp_path / "out")
    os.mkfifo(tmp_path / "out" / place / "pipe")
    assert any(f"{place}/pipe: a pipe" in problem for problem in verify(str(tmp_path / "out")).problems)
