"""What each kind of damage meets, measured by breaking it: a table in Markdown, for NOTES.md. A program.

    python tests/support/break_everything.py FOLDER [--only KIND …] > table.md

In FOLDER two small experiments are made that differ in their seed alone. Of the first, one file of every kind is broken in each
way of DAMAGE, and every stage that reads it runs on the broken copy. A cell holds the words in which the stage refuses or
notes it, "passes" where it ends as it did on the whole copy, and **CHANGED** where it ends otherwise and says nothing, which is a
bug: the program ends in 1 then.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2]))

import torch

from evaluate.explain.__main__ import cli as explain_cli
from evaluate.latents.files import write_labels
from evaluate.report.write import write_report
from evaluate.run import EvaluateConfig
from evaluate.run import run as evaluate
from harvest.config import HarvestConfig
from harvest.run import dry_run
from harvest.run import run as harvest
from pipeline.base.digests import sealed
from pipeline.base.errors import PipelineError, explain
from pipeline.base.files import canonical_json, read_json, write_json
from pipeline.experiment.describe import describe
from pipeline.experiment.slurm import write_script
from pipeline.experiment.stages import run_stage
from pipeline.experiment.verify import verify
from pipeline.sae.export import export
from pipeline.sae.foreign.reader import load_sae
from pipeline.store import layout
from pipeline.store.staging import stage
from pipeline.watch import table, watched, write_page
from support import tiny_models
from support.harvests import harvest_config
from support.stores import lose_shards
from support.train_crasher import child, small
from train.dry_run import planned_rows
from train.plan import RunConfig
from train.run import run as train

layout.GROUP_SHARDS = 3  # 7 + 3 shards: three groups and one
CUT = 60  # the call that changes the disk at which half a training is killed


class World:
    """One experiment in a folder, and the same stages on it."""

    def __init__(self, root: Path, shared: Path, seed: int) -> None:
        self.root, self.shared, self.seed = root, shared, seed

    def make(self) -> None:
        """Store, half a store, members, half a member, results with pages, report, export, a job, a log."""
        self.root.mkdir()
        self.harvest("acts.zarr")
        shutil.copytree(self.root / "acts.zarr", self.root / "half.zarr")
        lose_shards(self.root / "half.zarr", ("train", 1), ("train", 4))
        train(self.training("runs"))
        if not os.fork():
            child(self.training("half"), die_at=CUT)
        os.wait()
        self.evaluate("results", "runs")
        write_labels(first(self.root, "results/*.latents"), {3: "rivers"})
        write_report([self.root / "results"], self.root / "report.html")
        export(first(self.root, "runs/*/checkpoints/*.safetensors"), "saelens", self.root / "exported")
        for name in ("train_0", "train_1"):
            write_script(
                self.root / "jobs" / f"{name}.sh", f"#!/usr/bin/env bash\n# {name}\npython -m train {self.seed}\n"
            )
        for name in ("harvest", "report"):
            run_stage("evaluate.report", ["--help"], self.root / "logs" / f"{name}.log")
        write_json(self.root / "logs" / "harvest-plan.json", sealed(dry_run(self.harvesting("acts.zarr"))))
        self.explain()
        self.watch()

    def harvesting(self, store: str) -> HarvestConfig:
        """Of a store."""
        corpus = self.shared / f"corpus{self.seed}.jsonl"
        if not corpus.exists():
            tiny_models.make_corpus(corpus, seed=self.seed)
        return harvest_config(self.shared / "model", corpus, self.root / store, eval_tokens=640, seed=self.seed)

    def harvest(self, store: str) -> None:
        """A store, made or gone on with."""
        harvest(self.harvesting(store), quiet=True)

    def explain(self) -> None:
        """Prompts, answers that say what a latent is, and what those are worth."""
        prompts, answers = self.root / "prompts.jsonl", self.root / "answers.jsonl"
        self.explain_command("--prompts", str(prompts))
        ids = [json.loads(line)["custom_id"] for line in prompts.read_text().splitlines()]
        answers.write_text("".join(json.dumps({"custom_id": one, "content": f"about {one}"}) + "\n" for one in ids))
        self.judge("explained.json")

    def judge(self, out: str) -> Path:
        """What the answers are worth."""
        self.explain_command("--answers", str(self.root / "answers.jsonl"), "--out", str(self.root / out))
        return self.root / out

    def explain_command(self, *more: str) -> None:
        """`python -m evaluate.explain` of three latents of the first member."""
        words = [str(first(self.root, "runs/*/checkpoints/*23.safetensors")), "--store", str(self.root / "acts.zarr")]
        explain_cli.main([*words, "--latents", "1,2,3", "--device", "cpu", *more], standalone_mode=False)

    def watch(self) -> object:
        """The table and the page of those who watch a training; what they say of members that run."""
        found = [one for folder in ("runs", "half") for one in watched(self.root / folder, 0.0)]
        write_page(self.root / "watch.html", found, self.root / "runs", 1.0)
        return table(found)

    def training(self, out: str, mode: str = "auto") -> RunConfig:
        """Two members; half a second."""
        members = tuple(small(alpha=0.25, seed=2 * self.seed + i, layernorm="none") for i in range(2))
        rows = 256 if mode == "window" else None
        chosen: Any = mode
        return RunConfig(
            self.root / "acts.zarr", self.root / out, members, "cpu", mode=chosen, window_rows=rows, threads=1
        )

    def evaluate(self, out: str, places: str) -> None:
        """Scores of rows, and pages of all latents. Raises what the first checkpoint failed with."""
        config = EvaluateConfig(self.root / "acts.zarr", self.root / out, scores=("ev",), latents="all", device="cpu")
        if failed := evaluate(config, [self.root / places]).failed:
            raise failed[0][1]

    # The stages: what each ends with, as data that are the same whenever it ends the same.

    def verified(self) -> object:
        """`verify` of everything: its first problem is raised; what carries no digest is returned."""
        found = verify(str(self.root))
        problems = [one for one in found.problems if "not finished" not in one and "unfinished" not in one]
        if problems:
            raise PipelineError(problems[0])
        others = ("/half/", "answers.jsonl")  # what is not finished, and what a chat model wrote, which has no digest
        if listed := [one for one in found.unvouched if not any(name in one for name in others)]:
            raise PipelineError(f"listed: {listed[0]}")
        return "whole"

    def opened(self) -> object:
        """`describe` of the store."""
        return describe(str(self.root / "acts.zarr"))

    def trained(self, mode: str) -> object:
        """The weights that a training from the store gives."""
        train(self.training("new", mode))
        return weights(self.root / "new")

    def gone_on(self) -> object:
        """The weights and metrics of the training that was killed, gone on with."""
        train(self.training("half"))
        return weights(self.root / "half")

    def trained_again(self) -> object:
        """The same command on members that are finished: what it wrote, and what is there then."""
        return written(self.root / "runs", lambda: train(self.training("runs")))

    def harvested(self, store: str) -> object:
        """The harvest gone on with: what it wrote or took away, and what is there then."""
        return written(self.root / store, lambda: self.harvest(store))

    def evaluated(self) -> object:
        """Scores of the members, in a new folder."""
        self.evaluate("new", "runs")
        return scores(self.root / "new")

    def evaluated_again(self) -> object:
        """The same command on results that are there."""
        self.evaluate("results", "runs")
        return scores(self.root / "results")

    def reported(self) -> object:
        """The numbers of a report."""
        write_report([self.root / "results"], self.root / "new.html")
        return tree(self.root / "new_files")

    def staged(self) -> object:
        """A copy of the store."""
        stage(str(self.root / "acts.zarr"), self.root / "new.zarr", quiet=True)
        return tree(self.root / "new.zarr")

    def described(self) -> object:
        """`describe` of the trainings."""
        said = describe(str(self.root / "runs"))
        for about in said.values():
            if isinstance(about, dict) and "problem" in about:
                raise PipelineError(about["problem"])
        return said

    def described_results(self) -> object:
        """`describe` of every results file."""
        return [describe(str(path)) for path in sorted(self.root.glob("results/*.json"))]

    def planned(self) -> object:
        """What a training asks of a harvest's plan."""
        path, plan = self.root / "acts.zarr", self.root / "logs" / "harvest-plan.json"
        recorded = next(iter(re.findall(r'"path": "([^"]*)"', plan.read_text(errors="replace"))), str(path))
        return repr(planned_rows(recorded, plan))

    def explained(self) -> object:
        """What the answers are worth, once more."""
        return {name: one for name, one in read_json(self.judge("again.json")).items() if name not in ("seal", "made")}

    def evaluated_export(self) -> object:
        """Scores of the export, in a new folder."""
        self.evaluate("new", "exported")
        return scores(self.root / "new")

    def exported_again(self) -> object:
        """The same command on an export that is there."""
        source = first(self.root, "runs/*/checkpoints/step_000023.safetensors")
        return written(self.root / "exported", lambda: export(source, "saelens", self.root / "exported"))

    def reported_again(self) -> object:
        """The same command on a report that is there."""
        return written(self.root, lambda: write_report([self.root / "results"], self.root / "report.html"))

    def loaded(self) -> object:
        """The exported SAE."""
        sae, _ = load_sae(self.root / "exported")
        return {name: sha256(value.numpy().tobytes()).hexdigest() for name, value in sae.state_dict().items()}

    def exported(self) -> object:
        """The first member's last checkpoint in another format."""
        export(first(self.root, "runs/*/checkpoints/step_000023.safetensors"), "saelens", self.root / "new")
        return tree(self.root / "new")


STORE: dict[str, Callable[[World], object]] = {
    "open (describe)": World.opened,
    "train, any order": lambda world: world.trained("global"),
    "train, windows": lambda world: world.trained("window"),
    "evaluate": World.evaluated,
    "harvest again": lambda world: world.harvested("acts.zarr"),
    "stage": World.staged,
    "verify": World.verified,
}
HALF: dict[str, Callable[[World], object]] = {
    "harvest goes on": lambda world: world.harvested("half.zarr"),
    "verify": World.verified,
}
MEMBER: dict[str, Callable[[World], object]] = {
    "describe": World.described,
    "train again": World.trained_again,
    "evaluate": World.evaluated,
    "evaluate again": World.evaluated_again,
    "export": World.exported,
    "verify": World.verified,
}
STATE: dict[str, Callable[[World], object]] = {
    "train goes on": World.gone_on,
    "watch": World.watch,
    "verify": World.verified,
}
RESULTS: dict[str, Callable[[World], object]] = {
    "describe": World.described_results,
    "evaluate again": World.evaluated_again,
    "report": World.reported,
    "verify": World.verified,
}
EXPORT: dict[str, Callable[[World], object]] = {
    "load": World.loaded,
    "evaluate": World.evaluated_export,
    "export again": World.exported_again,
    "verify": World.verified,
}
REPORT: dict[str, Callable[[World], object]] = {"report again": World.reported_again, "verify": World.verified}
PLAN: dict[str, Callable[[World], object]] = {"train plans": World.planned, "verify": World.verified}
ANSWERS: dict[str, Callable[[World], object]] = {"explain": World.explained}
ALONE: dict[str, Callable[[World], object]] = {"verify": World.verified}

GROUPS: dict[str, tuple[dict[str, Callable[[World], object]], dict[str, str]]] = {
    "A finished store (version 4, groups of three shards)": (
        STORE,
        {
            "root": "acts.zarr/zarr.json",
            "an array's zarr.json": "acts.zarr/train/*/zarr.json",
            "training rows": "acts.zarr/train/resid/c/*/0",
            "evaluation rows": "acts.zarr/eval/resid/c/*/0",
            "training tokens": "acts.zarr/train/tokens/c/*/0",
            "evaluation tokens": "acts.zarr/eval/tokens/c/*/0",
            "special mask": "acts.zarr/train/special/c/*/0",
            "norms": "acts.zarr/train/norm/c/*",
            "moments": "acts.zarr/train/moments/c/*/0",
            "commit records": "acts.zarr/train/commit/c/*/0",
            "commit records, evaluation": "acts.zarr/eval/commit/c/*/0",
            "mean": "acts.zarr/mean/c/0",
        },
    ),
    "A store half made": (
        HALF,
        {
            "root": "half.zarr/zarr.json",
            "training rows": "half.zarr/train/resid/c/*/0",
            "training tokens": "half.zarr/train/tokens/c/*/0",
            "special mask": "half.zarr/train/special/c/*/0",
            "commit records (with norms, moments)": "half.zarr/train/resid/record/*",
        },
    ),
    "A finished member": (
        MEMBER,
        {
            "config.json": "runs/*/config.json",
            "complete.json": "runs/*/complete.json",
            "metrics.jsonl": "runs/*/metrics.jsonl",
            "timings.jsonl": "runs/*/timings.jsonl",
            "timings' digest": "runs/*/timings.jsonl.sha256",
            "final checkpoint": "runs/*/checkpoints/step_000023.safetensors",
            "earlier checkpoint": "runs/*/checkpoints/step_000020.safetensors",
        },
    ),
    "A training that was killed": (
        STATE,
        {
            "config.json": "half/*/config.json",
            "state": "half/*/state.safetensors",
            "metrics.jsonl": "half/*/metrics.jsonl",
            "timings.jsonl": "half/*/timings.jsonl",
            "checkpoint": "half/*/checkpoints/*.safetensors",
        },
    ),
    "Results": (
        RESULTS,
        {
            "results": "results/*.json",
            "results.csv": "results/results.csv",
            "its digest": "results/results.csv.sha256",
            "latents' index": "results/*.latents/index.js",
            "latents' page": "results/*.latents/page_*.js",
            "latents' digests": "results/*.latents/digests.json",
            "labels": "results/*.latents/labels.json",
        },
    ),
    "An export": (
        EXPORT,
        {
            "weights": "exported/sae_weights.safetensors",
            "cfg.json": "exported/cfg.json",
            "digests": "exported/digests.json",
        },
    ),
    "A report": (
        REPORT,
        {
            "page": "report.html",
            "figure": "report_files/*.svg",
            "table": "report_files/*.csv",
            "latents' page": "report_files/latents/*.html",
            "digests": "report_files/digests.json",
        },
    ),
    "A plan": (PLAN, {"harvest-plan.json": "logs/harvest-plan.json"}),
    "Answers of a chat model": (ANSWERS, {"answers": "answers.jsonl"}),
    "A job, a log, explanations, a page of watch": (
        ALONE,
        {
            "job": "jobs/*.sh",
            "its digest": "jobs/*.sh.sha256",
            "log": "logs/*.log",
            "its digest ": "logs/*.log.sha256",
            "prompts": "prompts.jsonl",
            "explained.json": "explained.json",
            "watch.html": "watch.html",
        },
    ),
}


def flip(path: Path, other: Path | None, foreign: Path) -> None:
    """A bit in the middle."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path: Path, other: Path | None, foreign: Path) -> None:
    """The second half gone."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def lose(path: Path, other: Path | None, foreign: Path) -> None:
    """No file."""
    path.unlink()


def grow(path: Path, other: Path | None, foreign: Path) -> None:
    """Its first sixteen bytes once more at its end."""
    data = path.read_bytes()
    path.write_bytes(data + data[:16])


def swap(path: Path, other: Path | None, foreign: Path) -> None:
    """Exchanged with its neighbour's."""
    if other is None or other.read_bytes() == path.read_bytes():
        raise NoSuchDamage
    mine, its = path.read_bytes(), other.read_bytes()
    path.write_bytes(its)
    other.write_bytes(mine)


def take(path: Path, other: Path | None, foreign: Path) -> None:
    """Another experiment's under this name."""
    if foreign.read_bytes() == path.read_bytes():
        raise NoSuchDamage
    path.write_bytes(foreign.read_bytes())


class NoSuchDamage(Exception):
    """The damage would change nothing here."""


DAMAGE: dict[str, Callable[[Path, Path | None, Path], None]] = {
    "one bit": flip,
    "cut short": cut,
    "gone": lose,
    "grown": grow,
    "swapped with its neighbour": swap,
    "another run's": take,
}


def first(root: Path, pattern: str, n: int = 0) -> Path:
    """The n-th path of a pattern."""
    return sorted(root.glob(pattern))[n]


def tree(folder: Path) -> dict[str, str]:
    """Every file and the hash of its bytes."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): sha256(path.read_bytes()).hexdigest() for path in files}


def written(folder: Path, work: Callable[[], object]) -> dict[str, Any]:
    """What work wrote into a folder or took away, and all that is there then. A stage ends the same where either is the same."""
    before = tree(folder)
    work()
    after = tree(folder)
    wrote = {name: digest for name, digest in after.items() if before.get(name) != digest}
    return {"wrote": wrote | dict.fromkeys(before.keys() - after.keys(), ""), "holds": after}


def is_same(ended: str, before: str) -> bool:
    """Whether a stage ended as before."""
    mine, its = json.loads(ended), json.loads(before)
    if isinstance(mine, dict) and mine.keys() == {"wrote", "holds"}:
        return any(mine[name] == its[name] for name in mine)
    return bool(mine == its)


def weights(out: Path) -> dict[str, str]:
    """Hashes of the final checkpoints and of the metrics."""
    files = [path for name in ("*/checkpoints/step_000023.safetensors", "*/metrics.jsonl") for path in out.glob(name)]
    return {str(path.relative_to(out)): sha256(path.read_bytes()).hexdigest() for path in sorted(files)}


def scores(folder: Path) -> dict[str, Any]:
    """What results say, but for times and seals."""
    found = {path.name: read_json(path) for path in sorted(folder.glob("*.json"))}
    changing = ("seal", "evaluation", "versions", "made", "speed")
    return {name: {key: one for key, one in data.items() if key not in changing} for name, data in found.items()}


def outcome(work: Callable[[World], object], world: World) -> tuple[str, str, str]:
    """What a stage ended with, the refusal, and the lines that it said; a traceback is said to be one."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        try:
            ended = canonical_json(work(world))
        except BaseException as error:
            words = str(error) if isinstance(error, PipelineError) else explain(error)
            return "", words or f"**TRACEBACK** {type(error).__name__}: {error}", said.getvalue()
    return ended.replace(str(world.root), ""), "", said.getvalue()


def lines_of(said: str, world: World) -> set[str]:
    """What a stage said, without what is of this run alone."""
    mine = said.replace(str(world.root), "").splitlines()
    return {re.sub(r"[\d.,]+ ?(s|ms|min|GB|MB|kB|rows?|shards?)\b.*", "", one) for one in mine}


def shortened(words: str, world: World) -> str:
    """Words for a cell: without paths, hashes and numbers, and without what to do."""
    words = " ".join(words.replace(f"{world.root}/", "").replace("|", "/").split())
    words = re.sub(r"(alpha[\d.]+-\w+?-seed\d|alpha[\d.]+-seed\d)-[0-9a-f]{10}", "MEMBER", words)
    words = re.sub(r"\b(?=[0-9a-f]*\d)[0-9a-f]{8,64}\b…?|\b\d[\d,.]*\b", "N", words.partition(";")[0])
    words = re.sub(r"'?[\w./-]*/[\w./…-]*'?(, shard N)?: ", "", words, count=1)
    words = re.sub(r" \((?!seal|SHA|crc32c)[^()]*(\(.*?\))?[^()]*\)", "", words)
    return words if len(words) <= 70 else words[:67] + "…"


def cell(work: Callable[[World], object], whole: Path, broken: Path, shared: Path, before: tuple[str, str, str]) -> str:
    """What a stage makes of a broken copy, which it may change."""
    world = World(broken, shared, 0)
    ended, refused, said = outcome(work, world)
    if refused:
        return refused
    new = sorted(lines_of(said, world) - lines_of(before[2], World(whole, shared, 0)))
    told = [
        line
        for line in new
        if re.search("note|gone|lost|passed over|again|damage|failed|refus|differ|not |without", line)
    ]
    if told:
        said = shortened(told[0].removeprefix("note").strip(), world)
        return f"{'says' if is_same(ended, before[0]) else 'goes on, says'}: {said}"
    return "passes" if is_same(ended, before[0]) else "**CHANGED**"


def rows(folder: Path, wanted: list[str]) -> Iterator[str]:
    """The table, line by line."""
    shared = folder / "shared"
    shutil.rmtree(folder / "at", ignore_errors=True)
    if not shared.exists():
        shared.mkdir(parents=True)
        tiny_models.make_model(shared / "model", "gemma2")
    mine, foreign = World(folder / "mine", shared, 0), World(folder / "foreign", shared, 1)
    for world in (mine, foreign):
        with contextlib.redirect_stderr(io.StringIO()):
            if not world.root.exists():
                world.make()
    before: dict[str, tuple[str, str, str]] = {}
    for title, (stages, kinds) in GROUPS.items():
        yield f"\n**{title}**\n"
        yield f"| file | damage | {' | '.join(stages)} |"
        yield "|---" * (2 + len(stages)) + "|"
        for kind, pattern in kinds.items():
            if wanted and not any(one in f"{title}: {kind}" for one in wanted):
                continue
            found: dict[tuple[str, ...], list[str]] = {}
            for damage, harm in DAMAGE.items():
                cells = cells_of(folder, mine, foreign, (title, kind, pattern), harm, stages, before)
                found.setdefault(cells, []).append(damage)
            for cells, damages in found.items():
                yield f"| {kind} | {', '.join(damages)} | {' | '.join(cells)} |"


def cells_of(
    folder: Path,
    mine: World,
    foreign: World,
    about: tuple[str, str, str],
    harm: Callable[[Path, Path | None, Path], None],
    stages: dict[str, Callable[[World], object]],
    before: dict[str, tuple[str, str, str]],
) -> tuple[str, ...]:
    """One file broken in one way: what each stage makes of it."""
    title, _, pattern = about
    cells, broken = [], folder / "at" / "mine"
    for name, work in stages.items():
        if f"{title}{name}" not in before:
            shutil.copytree(mine.root, broken)
            before[f"{title}{name}"] = outcome(work, World(broken, mine.shared, 0))
            assert not before[f"{title}{name}"][1], before[f"{title}{name}"]
            shutil.rmtree(broken.parent)
        shutil.copytree(mine.root, broken)
        found = sorted(broken.glob(pattern))
        other, its = sorted(foreign.root.glob(pattern)), found[1] if len(found) > 1 else None
        try:
            harm(found[0], its, other[0])
        except NoSuchDamage:
            shutil.rmtree(broken.parent)
            return ("–",) * len(stages)
        words = shortened(
            cell(work, mine.root, broken, mine.shared, before[f"{title}{name}"]), World(broken, mine.shared, 0)
        )
        shutil.rmtree(broken.parent)
        cells.append("same" if words in cells and words != "passes" else words)
    return tuple(cells)


def main() -> int:
    """Print the table; 1 where a result changed and nothing was said, or a traceback came."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", nargs="*", default=[])
    options = parser.parse_args()
    torch.set_num_threads(1)
    os.fsync = lambda descriptor: None
    bad = 0
    for text in rows(options.folder, options.only):
        print(text, flush=True)
        bad += "**CHANGED**" in text or "**TRACEBACK**" in text
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
