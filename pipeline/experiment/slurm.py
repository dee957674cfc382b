"""Job scripts for a Slurm cluster: harvest, then every training grid side by side, then the rest and the report.

A long harvest is a chain of its own: an array that tokenises, a job that prepares the store, an array that makes its parts, a job
that finishes it or names the parts that were lost. Parts are many more than run at once, so that a slow node holds nobody up.
Memory and time are those that the stages' dry runs say, unless the user's words for sbatch say others; each script says what
they rest on.

Every stage goes on where it was, so the scripts are the stages' own commands: a job that was preempted or timed out is
put in the queue again, and the last job is `pipeline run`, which finds all that is done and does what is missing.
"""

from __future__ import annotations

import math
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.base.digests import write_vouched
from pipeline.base.files import human_bytes
from pipeline.base.processes import ROOT
from pipeline.base.progress import format_seconds
from pipeline.experiment import experiment as experiments
from pipeline.experiment import stages

HEAD = """#!/usr/bin/env bash
#SBATCH --job-name={name}
#SBATCH {log}
#SBATCH --open-mode=append
#SBATCH --requeue
{extra}{why}
set -euo pipefail
cd {root}
"""
GIVE_UP = "--kill-on-invalid-dep=yes"
"""A job whose needs failed goes, where it would wait for ever."""
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
STEP_SECONDS = 5e-3
"""What a training step is taken to last beside its products: starting kernels, the optimiser."""
READ = 500e6
"""Bytes of rows a second that a training is taken to get from a cluster's file system."""
HOST_BYTES = 8e9
"""Memory that any job has beside what the plan says."""

Plan = Mapping[str, Any]
"""What `harvest --dry-run --json` or `train --dry-run --json` prints."""


@dataclass(frozen=True)
class Need:
    """Bytes of memory and seconds that a job's work takes, and what they rest on, in a line."""

    memory: float
    seconds: float
    why: str

    @staticmethod
    def of_all(needs: Sequence[Need]) -> Need:
        """What works one after the other need."""
        why = dict.fromkeys(need.why for need in needs)
        return Need(max(need.memory for need in needs), sum(need.seconds for need in needs), "\n".join(why))

    @property
    def words(self) -> list[str]:
        """What is asked of Slurm for it."""
        return [memory_word(self.memory), time_word(self.seconds)]


@dataclass(frozen=True)
class Cluster:
    """What is asked of Slurm. `sbatch`: further words for every job, as "--partition=gpu"; what they say is not said by us.
    `gpu`: one of GPU_FLOPS. `parts`: of a harvest, None as many as make parts of about an hour. `at_once`: of them, None all."""

    sbatch: str = ""
    gpu: str = "a100"
    parts: int | None = None
    at_once: int | None = None

    def directives(self, *ours: str) -> str:
        """#SBATCH lines: ours, but for those that the user's words have, then the user's; sbatch reads quotes as a shell does."""
        theirs = shlex.split(self.sbatch)
        named = {word.partition("=")[0] for word in theirs}
        lines = [shlex.quote(word) for word in ours if word.partition("=")[0] not in named]
        for word in theirs:
            if word.startswith("-") or not lines:
                lines.append(shlex.quote(word))
            else:  # an option's value
                lines[-1] += f" {shlex.quote(word)}"
        return "".join(f"#SBATCH {line}\n" for line in lines)

    def seconds(self, plan: Plan) -> float:
        """Of all of a harvest's rows on one GPU: as measured where the plan was made on one, else from its operations."""
        cost = plan["cost"]
        on_gpu = plan["stores"][0]["config"].get("device_type") == "cuda"
        return float(cost["seconds"] if on_gpu or not cost["flop"] else cost["flop"] / (USED * GPU_FLOPS[self.gpu]))

    def training(self, cost: Plan, *, is_on_cpu: bool) -> Need:
        """What a grid needs, by its dry run: time as measured where that ran on a GPU, or where the grid trains on a CPU; else
        from its operations on this cluster's GPU, or the rows that it reads, whichever takes longer."""
        memory = f"{human_bytes(cost['memory'])} of memory as in the memory line of train --dry-run, on GPU and host together"
        if cost["seconds"] is not None and (is_on_cpu or cost["device_type"] == "cuda"):
            time = f"steps measured on {cost['device_type']} where this was written"
            return Need(cost["memory"], cost["seconds"], f"# {memory}; {time}: {format_seconds(cost['seconds'])}")
        computing, reading = (
            cost["flop"] / (USED * GPU_FLOPS[self.gpu]) + cost["steps"] * STEP_SECONDS,
            cost["read"] / READ,
        )
        time = (
            f"{cost['flop']:.2g} FLOP at {100 * USED:.0f} % of an {self.gpu} and {1000 * STEP_SECONDS:g} ms for each of "
            f"{cost['steps']:,.0f} steps: {format_seconds(computing)}, "
            f"{human_bytes(cost['read'])} of rows at {human_bytes(READ)}/s: {format_seconds(reading)}"
        )
        return Need(cost["memory"], max(computing, reading), f"# {memory}; {time}")

    def scoring(self, plan: Plan, n_members: int, member_bytes: float) -> Need:
        """What evaluating the members of one site needs, by the harvest's dry run: its memory with the rest of the model's
        weights and what a training's largest pass took, and the passes of that rest that KL takes at most."""
        cost, store = plan["cost"], plan["stores"][0]
        rows = store["n_sequences"]["eval"] * store["config"]["context"]
        n_passes, on_gpu = experiments.evaluate_passes(n_members), store["config"].get("device_type") == "cuda"
        each = cost["suffix_seconds"] if on_gpu else cost["suffix_flop"] / (USED * GPU_FLOPS[self.gpu])
        memory = cost["memory"] + 4 * cost["suffix_flop"] / 2 + member_bytes  # float32: two operations a weight
        why = (
            f"# {n_members} members: {human_bytes(memory)} of memory: the model, and a training's largest pass; "
            f"{n_passes} passes of {rows:,} rows through the layers after the cut: {format_seconds(n_passes * rows * each)}; "
            "scores of texts come on top"
        )
        return Need(memory, n_passes * rows * each, why)

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
    ask: experiments.Ask = stages.ask_stage,
) -> Path:
    """Write the scripts to `out/jobs` and return `submit.sh`, which hands them to sbatch in order. `ask`: for the stages' plans.

    Raises PipelineError where a harvest or a training cannot be planned here.
    """
    every = experiments.with_parts(experiment, out)
    experiments.check(experiment, every, here=False)
    jobs = Jobs(every[0][1].out / "jobs", cluster)
    trained, scored = list[str](), list[Need]()
    for i, (one, places) in enumerate(every):
        words, is_truth = experiments.harvest_words(one, places), "truth" in one.harvest
        planned = experiments.ask_harvest(one, places, ask)
        ends = jobs.harvest(f"harvest_{i}" if i else "harvest", words, planned, is_truth)
        for site in one.trained:
            n_members, member_bytes = 0, 0.0
            for grid in site.grids:
                name, words = f"train_{len(trained)}", experiments.train_words(grid, places, site)
                found = experiments.ask_train(grid, places, site, ask, elsewhere=True)
                need = cluster.training(found["cost"], is_on_cpu=grid.get("device") == "cpu")
                jobs.add(name, "train", words, ["--gpus=1", *need.words], after=[ends], why=need.why)
                trained.append(name)
                n_members, member_bytes = n_members + len(found["members"]), max(member_bytes, found["cost"]["memory"])
            scored.append(cluster.scoring(planned, n_members, member_bytes))
    need = Need.of_all(scored)
    words = ["run", str(file.absolute() if file.exists() else file), "--out", str(every[0][1].out)]
    jobs.add("finish", "pipeline", words, ["--gpus=1", *need.words], after=trained, why=need.why)
    return jobs.write_submit()


class Jobs:
    """Scripts in a folder, and in which order they are handed in."""

    def __init__(self, folder: Path, cluster: Cluster) -> None:
        self.folder, self.cluster, self.submitted = folder, cluster, list[str]()

    def harvest(self, name: str, words: list[str], plan: Plan, is_truth: bool) -> str:
        """A harvest's jobs; the name of the last one."""
        cluster, n = self.cluster, self.cluster.n_parts(plan)
        memory = memory_word(plan["cost"]["memory"])
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
        why: str = "",
    ) -> None:
        """One job's script: the directives, `why` they are so (lines of comment), then the stage's command with this
        interpreter; of n parts, an array. It waits for those before it to have succeeded, or, `whatever` became of them, to
        have ended."""
        log = self.folder / (f"{name}.log" if n is None else f"{name}_%a.log")
        command, array = shlex.join([sys.executable, "-m", stage, *words]), list[str]()
        if n is not None:
            at_once = f"%{self.cluster.at_once}" if self.cluster.at_once else ""
            array, command = [f"--array=0-{n - 1}{at_once}"], f'{command} --part "$SLURM_ARRAY_TASK_ID/{n}"'
        extra = self.cluster.directives(*asked, *array)
        head = HEAD.format(
            name=name, log=shlex.quote(f"--output={log}"), extra=extra, why=why, root=shlex.quote(str(ROOT))
        )
        write_script(self.folder / f"{name}.sh", head + command + "\n")
        kind = "afterany" if whatever else "afterok"
        needs = f"--dependency={kind}:{':'.join(f'${one}' for one in after)} {GIVE_UP} " if after else ""
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


def memory_word(n_bytes: float) -> str:
    """Memory for a job whose work takes so much, in GB."""
    return f"--mem={math.ceil((1.5 * n_bytes + HOST_BYTES) / 1e9)}G"


def time_word(seconds: float) -> str:
    """Time for a job, in minutes, by tens."""
    return f"--time={10 * math.ceil((SLACK * seconds + LOADING_SECONDS) / 600)}"


def write_script(path: Path, text: str) -> None:
    write_vouched(path, text.encode())
    path.chmod(0o755)
