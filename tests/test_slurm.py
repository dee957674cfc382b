import os
import subprocess
from pathlib import Path

import pytest

from pipeline.experiment.experiment import Experiment
from pipeline.experiment.slurm import write_jobs

FAKE_SBATCH = """#!/usr/bin/env bash
# Runs the job's script up to its command, and prints a job id as --parsable does.
job=$(basename "${@: -1}" .sh)
echo "$@" >> "$SBATCH_LOG"
echo "1$job"
"""


@pytest.fixture
def experiment(tmp_path: Path) -> Path:
    path = tmp_path / "mine.toml"
    path.write_text('[harvest]\nmodel = "m"\nlayer = [3, 5]\n[[train]]\nalpha = [0, 0.2]\n[[train]]\nlr = 1e-3\n')
    return path


def test_jobs_wait_for_what_they_need(tmp_path: Path, experiment: Path) -> None:
    """Jobs wait for what they need."""
    submit = write_jobs(Experiment.read(experiment), experiment, tmp_path / "out", "--partition=gpu --time=1:00:00")
    (tmp_path / "bin").mkdir()
    sbatch = tmp_path / "bin" / "sbatch"
    sbatch.write_text(FAKE_SBATCH)
    sbatch.chmod(0o755)
    environment = os.environ | {"PATH": f"{sbatch.parent}:{os.environ['PATH']}", "SBATCH_LOG": str(tmp_path / "log")}
    subprocess.run(["bash", submit], env=environment, check=True, capture_output=True)
    jobs = [line.split() for line in (tmp_path / "log").read_text().splitlines()]
    names = [Path(words[-1]).stem for words in jobs]
    assert names == ["harvest", "train_0", "train_1", "train_2", "train_3", "finish"]
    assert all("--dependency=afterok:1harvest" in words for words in jobs[1:5])
    assert "--dependency=afterok:1train_0:1train_1:1train_2:1train_3" in jobs[5]


def test_script_carries_directives_and_command(tmp_path: Path, experiment: Path) -> None:
    """A script carries the directives and the stage's own command."""
    write_jobs(Experiment.read(experiment), experiment, tmp_path / "out", "--partition=gpu")
    text = (tmp_path / "out/jobs/train_0.sh").read_text()
    assert "#SBATCH --partition=gpu\n" in text
    assert "-m train --alpha 0 --alpha 0.2" in text
    assert str(tmp_path / "out/stores/layer_3.zarr") in text
    assert f"run {experiment} --out" in (tmp_path / "out/jobs/finish.sh").read_text()
    subprocess.run(["bash", "-n", tmp_path / "out/jobs/train_0.sh"], check=True)


def test_trainings_wait_for_their_own_harvest(tmp_path: Path) -> None:
    """A part's trainings wait for the part's harvest, the last job for those of all parts."""
    path = tmp_path / "e.toml"
    path.write_text(
        '[harvest]\nmodel = "m"\nlayer = [3]\n[train]\nwidth = 8\n'
        '[[part]]\nname = "known-ones"\nharvest.truth = "forest"\ntrain.width = 8\n'
    )
    text = write_jobs(Experiment.read(path), path, tmp_path / "out", "").read_text()
    assert "train_0=$(sbatch --parsable --dependency=afterok:$harvest " in text
    assert "train_1=$(sbatch --parsable --dependency=afterok:$harvest_1 " in text
    assert "--dependency=afterok:$train_0:$train_1 " in text
    assert "known-ones.zarr" in (tmp_path / "out/jobs/train_1.sh").read_text()
