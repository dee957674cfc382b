"""Job scripts for a Slurm cluster: harvest, then every training grid side by side, then the rest and the report.

A long harvest is a chain of its own: an array that tokenises, a job that prepares the store, an array that makes its parts, a job
that finishes it or names the parts that were lost. Parts are many more than run at once, so that a slow node holds nobody up.
Memory and time are those of the harvest's plan, unless the user's words for sbatch say others.

Every stage goes on where it was, so the scripts are the stages' own commands: a job that was preempted or timed out is
put in the queue again, and the last job is `pipeline run`, which finds all that is done and does what is missing.
"""

from __future__ import annotations

import math
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.base.digests import write_vouched
from pipeline.base.processes import ROOT
from pipeline.experiment import experiment as experiments
from pipeline.experiment import stages

HEAD = """#!/usr/bin/env bash
#SBATCH --job-name={name}
#SBATCH --output={log}
#SBATCH --open-mode=append
#SBATCH --requeue
{extra}
set -euo pipefail
cd {root}
"""
GPU_FLOPS = {"a100": 312e12, "h100": 989e12, "h200": 989e12, "l40s": 362e12, "a6000": 155e12}
"""Products of dense bf16 matrices a second, as their maker names them."""
USED = 0.3
"""Share of that which a forward pass is taken to reach."""
TOKENS_PER_SECOND = 100_000
"""What a job that tokenises is taken to do."""
PART_SECONDS = 3600
"""Aim of a part's length."""
SLACK = 2.0
"""Time asked for over that of the plan."""
LOADING_SECONDS = 900
"""Time that any job has beside its work."""
HOST_BYTES = 8e9
"""Memory that any job has beside what the plan says."""

Plan = Mapping[str, Any]
"""What `harvest --dry-run --json` prints."""


@dataclass(frozen=True)
class Cluster:
    """What is asked of Slurm. `sbatch`: further words for every job, as "--partition=gpu"; what they say is not said by us.
    `gpu`: one of GPU_FLOPS. `parts`: of a harvest, None as many as make parts of about an hour. `at_once`: of them, None all."""

    sbatch: str = ""
    gpu: str = "a100"
    parts: int | None = None
    at_once: int | None = None

    def directives(self, *ours: str) -> str:
        """#SBATCH lines: ours, but for those that the user's words have, then the user's."""
        theirs = shlex.split(self.sbatch)
        named = {word.partition("=")[0] for word in theirs}
        return "".join(
            f"#SBATCH {word}\n" for word in (*(w for w in ours if w.partition("=")[0] not in named), *theirs)
        )

    def seconds(self, plan: Plan) -> float:
        """Of all of a harvest's rows on one GPU: as measured where the plan was made on one, else from its operations."""
        cost = plan["cost"]
        on_gpu = plan["stores"][0]["config"].get("device_type") == "cuda"
        return float(cost["seconds"] if on_gpu or not cost["flop"] else cost["flop"] / (USED * GPU_FLOPS[self.gpu]))

    def n_parts(self, plan: Plan) -> int:
        """Parts of a harvest: never more than shards."""
        store = plan["stores"][0]
        rows = int(sum(store["n_sequences"].values()) * store["config"]["context"])
        wanted = self.parts or math.ceil(self.seconds(plan) / PART_SECONDS)
        return max(1, min(wanted, math.ceil(rows / int(store["config"]["shard_rows"]))))


def write_jobs(
    experiment: experiments.Experiment,
    file: Path,
    out: Path,
    cluster: Cluster,
    ask: Callable[[Sequence[str], Path], Plan] = lambda words, log: stages.ask_stage(
        "harvest", [*words, "--dry-run"], log
    ),
) -> Path:
    """Write the scripts to `out/jobs` and return `submit.sh`, which hands them to sbatch in order. `ask`: for a harvest's plan.

    Raises PipelineError where a harvest cannot be planned here.
    """
    every = experiments.with_parts(experiment, out)
    jobs = Jobs(every[0][1].out / "jobs", cluster)
    trained = list[str]()
    for i, (one, places) in enumerate(every):
        words = experiments.harvest_words(one, places)
        ends = jobs.harvest(
            f"harvest_{i}" if i else "harvest", words, ask(words, places.log("dry-run")), "truth" in one.harvest
        )
        for site in one.trained:
            for grid in site.grids:
                name = f"train_{len(trained)}"
                jobs.add(name, "train", experiments.train_words(grid, places, site), ["--gpus=1"], after=[ends])
                trained.append(name)
    words = ["run", str(file.absolute() if file.exists() else file), "--out", str(every[0][1].out)]
    jobs.add("finish", "pipeline", words, ["--gpus=1"], after=trained)
    return jobs.write_submit()


class Jobs:
    """Scripts in a folder, and in which order they are handed in."""

    def __init__(self, folder: Path, cluster: Cluster) -> None:
        self.folder, self.cluster, self.submitted = folder, cluster, list[str]()

    def harvest(self, name: str, words: list[str], plan: Plan, is_truth: bool) -> str:
        """A harvest's jobs; the name of the last one."""
        cluster, n = self.cluster, self.cluster.n_parts(plan)
        memory = f"--mem={math.ceil((1.5 * plan['cost']['memory'] + HOST_BYTES) / 1e9)}G"
        gpu = [memory] if is_truth else ["--gpus=1", memory]
        seconds = cluster.seconds(plan)
        if n == 1 or is_truth:
            self.add(name, "harvest", words, [*gpu, time_word(seconds)])
            return name
        if "--device" not in words:
            words = [*words, "--device", "cuda"]
        store = plan["stores"][0]
        n_tokens = sum(store["n_sequences"].values()) * store["config"]["context"]
        n_tokenise = max(1, math.ceil(n_tokens / TOKENS_PER_SECOND / PART_SECONDS))
        here = [f"--mem={math.ceil(HOST_BYTES / 1e9)}G", "--cpus-per-task=8"]
        tokenise, prepare, parts = (f"{name}_{step}" for step in ("tokenise", "prepare", "parts"))
        asked = [*here, time_word(n_tokens / n_tokenise / TOKENS_PER_SECOND)]
        self.add(tokenise, "harvest", [*words, "--prepare-only"], asked, n=n_tokenise)
        asked = [*gpu, "--cpus-per-task=8", time_word(n_tokens / TOKENS_PER_SECOND / 4)]
        self.add(prepare, "harvest", [*words, "--prepare-only"], asked, after=[tokenise], whatever=True)
        self.add(parts, "harvest", words, [*gpu, time_word(seconds / n)], after=[prepare], n=n)
        self.add(name, "harvest", [*words, "--finish-only"], [*gpu, time_word(0)], after=[parts], whatever=True)
        return name

    def add(
        self,
        name: str,
        stage: str,
        words: Sequence[str],
        asked: Sequence[str],
        *,
        after: Sequence[str] = (),
        n: int | None = None,
        whatever: bool = False,
    ) -> None:
        """One job's script: the directives, then the stage's command with this interpreter; of n parts, an array. It waits for
        those before it to have succeeded, or, `whatever` became of them, to have ended."""
        log = self.folder / (f"{name}.log" if n is None else f"{name}_%a.log")
        command, array = shlex.join([sys.executable, "-m", stage, *words]), list[str]()
        if n is not None:
            at_once = f"%{self.cluster.at_once}" if self.cluster.at_once else ""
            array, command = [f"--array=0-{n - 1}{at_once}"], f'{command} --part "$SLURM_ARRAY_TASK_ID/{n}"'
        extra = self.cluster.directives(*asked, *array)
        head = HEAD.format(name=name, log=log, extra=extra, root=shlex.quote(str(ROOT)))
        write_script(self.folder / f"{name}.sh", head + command + "\n")
        kind = "afterany" if whatever else "afterok"
        needs = f"--dependency={kind}:{':'.join(f'${one}' for one in after)} " if after else ""
        script = f"{shlex.quote(str(self.folder))}/{name}.sh"
        self.submitted.append(f"{name}=$(sbatch --parsable {needs}{script})")

    def write_submit(self) -> Path:
        """The script that submits all jobs, each after those it needs."""
        lines = [
            "#!/usr/bin/env bash",
            "set -euo pipefail",
            *self.submitted,
            'echo "submitted, the last is job $finish"',
        ]
        write_script(self.folder / "submit.sh", "\n".join(lines) + "\n")
        return self.folder / "submit.sh"


def time_word(seconds: float) -> str:
    """Time for a job, in minutes, by tens."""
    return f"--time={10 * math.ceil((SLACK * seconds + LOADING_SECONDS) / 600)}"


def write_script(path: Path, text: str) -> None:
    write_vouched(path, text.encode())
    path.chmod(0o755)
