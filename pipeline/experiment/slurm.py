"""Job scripts for a Slurm cluster: harvest, then every training grid side by side, then the rest and the report.

Every stage goes on where it was, so the scripts are the stages' own commands: a job that was preempted or timed out is
put in the queue again, and the last job is `pipeline run`, which finds all that is done and does what is missing.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from pathlib import Path

from pipeline.base.digests import write_vouched
from pipeline.base.processes import ROOT
from pipeline.experiment import experiment as experiments

HEAD = """#!/usr/bin/env bash
#SBATCH --job-name={name}
#SBATCH --output={log}
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --gpus=1
{extra}
set -euo pipefail
cd {root}
"""


def write_jobs(experiment: experiments.Experiment, file: Path, out: Path, sbatch: str) -> Path:
    """Write the scripts to `out/jobs` and return `submit.sh`, which hands them to sbatch in order.

    `sbatch`: further words for every job, such as "--partition=gpu --time=12:00:00".
    """
    every = experiments.with_parts(experiment, out)
    folder, needs = every[0][1].out / "jobs", dict[str, str]()
    for i, (one, places) in enumerate(every):
        harvest = f"harvest_{i}" if i else "harvest"
        write_job(folder, harvest, "harvest", experiments.harvest_words(one, places), sbatch)
        for site in one.trained:
            for grid in site.grids:
                train = f"train_{len(needs)}"
                write_job(folder, train, "train", experiments.train_words(grid, places, site), sbatch)
                needs[train] = harvest
    words = ["run", str(file.absolute() if file.exists() else file), "--out", str(every[0][1].out)]
    write_job(folder, "finish", "pipeline", words, sbatch)
    return write_submit(folder, needs)


def write_job(folder: Path, name: str, stage: str, words: list[str], sbatch: str) -> None:
    """One job's script: the directives, then the stage's command with this interpreter."""
    extra = "".join(f"#SBATCH {word}\n" for word in shlex.split(sbatch))
    head = HEAD.format(name=name, log=folder / f"{name}.log", extra=extra, root=shlex.quote(str(ROOT)))
    write_script(folder / f"{name}.sh", head + shlex.join([sys.executable, "-m", stage, *words]) + "\n")


def write_submit(folder: Path, needs: Mapping[str, str]) -> Path:
    """The script that submits all jobs, each after those it needs: a training after its harvest, the rest after all."""
    here = shlex.quote(str(folder))
    lines = ["#!/usr/bin/env bash", "set -euo pipefail"]
    lines += [f"{name}=$(sbatch --parsable {here}/{name}.sh)" for name in dict.fromkeys(needs.values())]
    lines += [
        f"{name}=$(sbatch --parsable --dependency=afterok:${harvest} {here}/{name}.sh)"
        for name, harvest in needs.items()
    ]
    needed = ":".join(f"${name}" for name in needs)
    lines += [
        f"finish=$(sbatch --parsable --dependency=afterok:{needed} {here}/finish.sh)",
        'echo "submitted, the last is job $finish"',
    ]
    write_script(folder / "submit.sh", "\n".join(lines) + "\n")
    return folder / "submit.sh"


def write_script(path: Path, text: str) -> None:
    write_vouched(path, text.encode())
    path.chmod(0o755)
