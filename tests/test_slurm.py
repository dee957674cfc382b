import os
import re
import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from pipeline.experiment.experiment import Experiment
from pipeline.experiment.slurm import GPU_FLOPS, Cluster, Jobs, Need, write_jobs

FAKE_SBATCH = """#!/usr/bin/env bash
# Runs the job's script up to its command, and prints a job id as --parsable does.
job=$(basename "${@: -1}" .sh)
echo "$@" >> "$SBATCH_LOG"
echo "1$job"
"""


def planned(flop: float, n_tokens: int = 1_000_000_000, device: str = "cpu") -> dict[str, Any]:
    """What a harvest's dry run says."""
    config = {"context": 128, "shard_rows": 1 << 20, "device_type": device}
    stores = [{"n_sequences": {"train": n_tokens // 128, "eval": 8}, "config": config}]
    cost = {"flop": flop, "seconds": 7e6, "memory": 6e9, "suffix_flop": 1e9, "suffix_seconds": 1e-3}
    return {"stores": stores, "cost": cost}


def trained(flop: float = 0.0, read: float = 0.0, device: str = "cpu") -> dict[str, Any]:
    """What a training's dry run says of a grid of two members."""
    return {
        "members": [{}, {}],
        "cost": {
            "memory": 20e9,
            "steps": 60_000.0,
            "flop": flop,
            "read": read,
            "seconds": 6000.0,
            "device_type": device,
        },
    }


def small(stage: str, words: Sequence[str], log: Path) -> dict[str, Any]:
    """A harvest of a minute, trainings that take no time."""
    return planned(1e15, 1_000_000) if stage == "harvest" else trained()


@pytest.fixture
def experiment(tmp_path: Path) -> Path:
    path = tmp_path / "mine.toml"
    path.write_text('[harvest]\nmodel = "m"\nlayer = [3, 5]\n[[train]]\nalpha = [0, 0.2]\n[[train]]\nlr = 1e-3\n')
    return path


def test_jobs_wait_for_what_they_need(tmp_path: Path, experiment: Path) -> None:
    """Jobs wait for what they need."""
    submit = write_jobs(
        Experiment.read(experiment), experiment, tmp_path / "out", Cluster("--partition=gpu --time=1:00:00"), small
    )
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
    write_jobs(Experiment.read(experiment), experiment, tmp_path / "out", Cluster("--partition=gpu"), small)
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
    text = write_jobs(Experiment.read(path), path, tmp_path / "out", Cluster(), small).read_text()
    assert "train_0=$(sbatch --parsable --dependency=afterok:$harvest " in text
    assert "train_1=$(sbatch --parsable --dependency=afterok:$harvest_1 " in text
    assert "--dependency=afterok:$train_0:$train_1 " in text
    assert "known-ones.zarr" in (tmp_path / "out/jobs/train_1.sh").read_text()


def asked(path: Path) -> dict[str, str]:
    """What a script asks of Slurm, by name."""
    return dict(re.findall(r"#SBATCH --([\w-]+)=?(.*)", path.read_text()))


def test_a_long_harvest_is_a_chain(tmp_path: Path, experiment: Path) -> None:
    """A harvest of ten hours: an array tokenises, a job prepares, an array makes parts, a job finishes; trainings wait for that.

    Time and memory are the plan's, doubled and with what loading takes."""
    flop = 10 * 3600 * 0.3 * GPU_FLOPS["a100"]
    cluster = Cluster("--partition=gpu", at_once=4)
    submit = write_jobs(
        Experiment.read(experiment),
        experiment,
        tmp_path / "o",
        cluster,
        lambda stage, *_: planned(flop) if stage == "harvest" else trained(),
    )
    folder, lines = submit.parent, submit.read_text().splitlines()
    order = [line.partition("=")[0] for line in lines if "sbatch" in line]
    assert order[:5] == ["harvest_tokenise", "harvest_prepare", "harvest_parts", "harvest", "train_0"]
    assert "--dependency=afterany:$harvest_tokenise " in lines[3]
    assert "--dependency=afterok:$harvest_prepare " in lines[4]
    assert "--dependency=afterany:$harvest_parts " in lines[5]
    assert "--dependency=afterok:$harvest " in lines[6]
    parts = asked(folder / "harvest_parts.sh")
    assert (parts["array"], parts["gpus"], parts["partition"]) == ("0-9%4", "1", "gpu")
    assert (parts["time"], parts["mem"]) == ("140", "17G")  # twice an hour and a quarter of one, by tens; 1.5 · 6 + 8
    text = (folder / "harvest_parts.sh").read_text()
    assert text.endswith('--device cuda --part "$SLURM_ARRAY_TASK_ID/10"\n')
    tokenise = asked(folder / "harvest_tokenise.sh")
    assert (tokenise["array"], "gpus" in tokenise) == ("0-2%4", False)  # 1e9 tokens at 1e5 a second: three hours
    assert "--prepare-only --part" in (folder / "harvest_tokenise.sh").read_text()
    assert "--prepare-only\n" in (folder / "harvest_prepare.sh").read_text()
    assert "--finish-only\n" in (folder / "harvest.sh").read_text()
    for path in folder.glob("*.sh"):
        subprocess.run(["bash", "-n", path], check=True)


def test_users_words_come_first(tmp_path: Path) -> None:
    """What the user says to sbatch is not said by us too."""
    jobs = Jobs(tmp_path, Cluster("--time=5 --mem=1G"))
    jobs.harvest("harvest", ["--store", "a"], planned(1e15, 1000), False)
    assert asked(tmp_path / "harvest.sh")["time"] == "5"
    assert (tmp_path / "harvest.sh").read_text().count("--mem=") == 1


def test_parts_are_shards_at_most(tmp_path: Path) -> None:
    """However many parts are asked for, each has a shard; a plan made on a GPU says its time itself."""
    assert Cluster(parts=100).n_parts(planned(1.0, 5 << 20)) == 6
    assert Cluster(parts=3).n_parts(planned(1.0)) == 3
    assert Cluster().seconds(planned(1e20, device="cuda")) == 7e6


def written(tmp_path: Path, experiment: Path, training: dict[str, Any]) -> Path:
    """The folder of an experiment's scripts, on A100s, where every grid's dry run says this."""
    plans = {"harvest": planned(1e15, 1_000_000), "train": training}
    return write_jobs(
        Experiment.read(experiment), experiment, tmp_path / "out", Cluster(), lambda stage, *_: plans[stage]
    ).parent


def test_training_asks_for_its_operations(tmp_path: Path, experiment: Path) -> None:
    """A training planned without a GPU asks for twice the time of its operations on the cluster's, one and a half times the
    memory of its dry run, and what every job has beside; the script says what that rests on."""
    flop = (2 * 3600 - 300) * 0.3 * GPU_FLOPS["a100"]
    path = written(tmp_path, experiment, trained(flop, read=500e6 * 600)) / "train_1.sh"
    assert (asked(path)["time"], asked(path)["mem"]) == ("260", "38G")  # 2 · 120 + 15 minutes, by tens; 1.5 · 20 + 8
    assert "20.0 GB of memory as in the memory line of train --dry-run" in path.read_text()
    assert (
        "at 30 % of an a100 and 5 ms for each of 60,000 steps: 2 h 00 min, 300.0 GB of rows at 500.0 MB/s: 10 min 00 s\n"
        in path.read_text()
    )


def test_training_asks_for_its_reading(tmp_path: Path, experiment: Path) -> None:
    """A training of small members takes as long as its rows take to be read."""
    path = written(tmp_path, experiment, trained(1.0, read=500e6 * 3600)) / "train_0.sh"
    assert asked(path)["time"] == "140"


def test_training_asks_for_measured_time(tmp_path: Path, experiment: Path) -> None:
    """Where the plan was made on a GPU, or the grid trains on a CPU, the time is that of the steps measured there."""
    path = written(tmp_path, experiment, trained(1e30, device="cuda")) / "train_0.sh"
    assert asked(path)["time"] == "220"  # 2 · 100 + 15
    assert "steps measured on cuda where this was written: 1 h 40 min" in path.read_text()
    assert Cluster().training(trained(1e30)["cost"], is_on_cpu=True).seconds == 6000
    unmeasured = trained(0.3 * GPU_FLOPS["a100"] * 9700, device="cuda")["cost"] | {"seconds": None}
    assert Cluster().training(unmeasured, is_on_cpu=False).seconds == pytest.approx(10_000)


def test_words_with_spaces_stay_whole(tmp_path: Path, experiment: Path) -> None:
    """Options of sbatch with their values behind them, values and folders with spaces: each script names them as sbatch reads
    them, in quotes; and a job whose needs failed does not wait for ever."""
    cluster = Cluster("-p gpu --account 'my lab' --mail-user=me --qos=\"a b\"")
    submit = write_jobs(Experiment.read(experiment), experiment, tmp_path / "my out", cluster, small)
    for script in submit.parent.glob("*.sh"):
        subprocess.run(["bash", "-n", script], check=True)
    lines = [line for line in (submit.parent / "harvest.sh").read_text().splitlines() if line.startswith("#SBATCH")]
    asked = [shlex.split(line)[1:] for line in lines]
    assert asked[1] == [f"--output={tmp_path}/my out/jobs/harvest.log"]
    assert asked[-4:] == [["-p", "gpu"], ["--account", "my lab"], ["--mail-user=me"], ["--qos=a b"]]
    assert all(words[0].startswith("-") for words in asked)
    assert all(
        "--kill-on-invalid-dep=yes" in line for line in submit.read_text().splitlines() if "--dependency" in line
    )


def test_finish_asks_for_all_scoring(tmp_path: Path, experiment: Path) -> None:
    """The last job asks for the memory of the model and of a training's largest pass, and the time of every site's passes."""
    path = written(tmp_path, experiment, trained()) / "finish.sh"
    assert asked(path)["mem"] == "50G"  # 1.5 · (6 + 2 of layers after the cut + 20) + 8
    rows, passes = 8 * 128, 2 * 4 + 2  # two grids of two members a layer, two layers
    need = Cluster().scoring(planned(1.0, device="cuda"), 4, 0.0)
    assert need.seconds == pytest.approx(passes * rows * 1e-3)
    assert Need.of_all([Need(1, 2, "a"), Need(3, 4, "a")]) == Need(3, 6, "a")
    assert asked(path)["time"] == "20"
    assert path.read_text().count("# 4 members: 28.0 GB of memory") == 1
    assert f"{passes} passes of {rows:,} rows" in path.read_text()
