"""Limits of memory that a job runs under, in trees of cgroups of every layout."""

from pathlib import Path

import pytest

from pipeline.base import memory

V1, V2 = memory.MEMORY_FILES["cgroup"], memory.MEMORY_FILES["cgroup2"]


def limit_memory(folder: Path, files: memory.MemoryFiles, name: str) -> None:
    """A cgroup that may use 5,000,000 bytes by one of its files and uses 4,000,000, half of them for files."""
    folder.mkdir(parents=True)
    for one in files.limits:
        (folder / one).write_text("max\n" if files is V2 else "9223372036854771712\n")
    (folder / name).write_text("5000000\n")
    (folder / files.used).write_text("4000000\n")
    v2 = "anon 1\ninactive_file 1500000\nactive_file 500000\n"
    v1 = "inactive_file 0\nactive_file 0\ntotal_inactive_file 1500000\ntotal_active_file 500000\n"  # its own, then all in it
    (folder / "memory.stat").write_text(v2 if files is V2 else v1)


STEP = "/system.slice/slurmstepd.scope/job_7/step_0/user/task_0"
V1_LINES = "3:pids:/elsewhere\n9:cpu,memory:/slurm/uid_0/job_7/step_0"
LAYOUTS = {
    "v2 root of a namespace": (V2, "memory.max", "0::/", "/ {at} rw - cgroup2 cgroup2 rw", ""),
    "v2 own": (V2, "memory.max", f"0::{STEP}", "/ {at} rw - cgroup2 cgroup2 rw,nsdelegate", STEP),
    "v2 job": (
        V2,
        "memory.max",
        f"0::{STEP}",
        "/ {at} rw - cgroup2 cgroup2 rw",
        "/system.slice/slurmstepd.scope/job_7",
    ),
    "v2 slice": (V2, "memory.max", f"0::{STEP}", "/ {at} rw - cgroup2 cgroup2 rw", "/system.slice"),
    "v2 high": (
        V2,
        "memory.high",
        f"0::{STEP}",
        "/ {at} rw - cgroup2 cgroup2 rw",
        "/system.slice/slurmstepd.scope/job_7",
    ),
    "v2 container": (V2, "memory.max", "0::/pod/abc/child", "/pod/abc {at} ro shared:1 - cgroup2 cgroup2 rw", "/child"),
    "v2 outside": (V2, "memory.max", "0::/../elsewhere", "/ {at} rw - cgroup2 cgroup2 rw", ""),
    "v1 own": (
        V1,
        "memory.limit_in_bytes",
        V1_LINES,
        "/ {at} rw - cgroup cgroup rw,memory",
        "/slurm/uid_0/job_7/step_0",
    ),
    "v1 job": (V1, "memory.limit_in_bytes", V1_LINES, "/ {at} rw - cgroup cgroup rw,cpu,memory", "/slurm/uid_0/job_7"),
    "v1 container": (
        V1,
        "memory.limit_in_bytes",
        V1_LINES,
        "/slurm/uid_0/job_7 {at} ro - cgroup x rw,memory",
        "/step_0",
    ),
    "hybrid": (V1, "memory.limit_in_bytes", f"{V1_LINES}\n0::/", "/ {at} rw - cgroup cgroup rw,memory", "/slurm"),
}
"""Files, limited by, /proc/self/cgroup, line of /proc/self/mountinfo behind its numbers, and the cgroup that is limited."""


@pytest.mark.parametrize("layout", LAYOUTS)
def test_job_memory_limit_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str) -> None:
    """A limit of the cgroup that a process is in, or of any around it, counts, less what is used and not for files."""
    files, name, own, mount, limited = LAYOUTS[layout]
    at = tmp_path / "a cgroup"
    limit_memory(at / limited[1:], files, name)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / name).write_text("1000\n")
    (tmp_path / "cgroup").write_text(f"{own}\n")
    numbers = "31 25 0:27"
    (tmp_path / "mountinfo").write_text(
        f"{numbers} / / rw - ext4 /dev/vda rw\n{numbers} / /cpu rw - cgroup cgroup rw,cpu\n"
        f"{numbers} {mount.format(at=str(at).replace(' ', chr(92) + '040'))}\n"
    )
    monkeypatch.setattr(memory, "PROC", tmp_path)
    assert memory.available_memory() == 3_000_000
    (at / limited[1:] / name).write_text("max\n")
    assert memory.available_memory() > 3_000_000


@pytest.mark.parametrize("gone", ["memory.current", "memory.stat"])
def test_cgroup_may_lack_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gone: str) -> None:
    """A cgroup whose use or statistics cannot be read still limits; a process without cgroups has the machine's memory."""
    limit_memory(tmp_path / "at", V2, "memory.max")
    (tmp_path / "at" / gone).unlink()
    (tmp_path / "cgroup").write_text("0::/\n")
    (tmp_path / "mountinfo").write_text(f"1 2 0:3 / {tmp_path / 'at'} rw - cgroup2 cgroup2 rw\n")
    monkeypatch.setattr(memory, "PROC", tmp_path)
    assert memory.available_memory() == {"memory.current": 5_000_000, "memory.stat": 1_000_000}[gone]
    monkeypatch.setattr(memory, "PROC", tmp_path / "none")
    assert memory.available_memory() > 5_000_000
