import errno
import os
from pathlib import Path

import google_crc32c
import numpy as np
import pytest

from pipeline.base import files, runtime
from pipeline.base.errors import DamagedError, DiskError, MismatchError


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "a.bin"
    with pytest.raises(RuntimeError), files.atomic(path) as file:
        file.write(b"half")
        raise RuntimeError
    assert list(path.parent.iterdir()) == []
    files.write_bytes(path, b"whole")
    assert path.read_bytes() == b"whole"


def test_an_old_file_stays_when_writing_its_successor_fails(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    files.write_json(path, {"old": True})
    with pytest.raises(ValueError, match="JSON"):
        files.write_json(path, {"new": float("nan")})
    assert files.read_json(path) == {"old": True}


def test_a_full_disk_is_one_error_that_names_the_path(tmp_path: Path) -> None:
    with pytest.raises(DiskError, match=r"a\.bin: the disk is full"), files.atomic(tmp_path / "a.bin"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert list(tmp_path.iterdir()) == []


def test_a_read_only_folder_is_one_error_that_names_the_path(tmp_path: Path) -> None:
    with pytest.raises(DiskError, match="choose another folder"), files.atomic(tmp_path / "a"):
        raise OSError(errno.EROFS, "Read-only file system")


def test_what_killed_writers_left_is_swept(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    left, kept = tmp_path / "x" / f"c.{os.getpid()}.partial", tmp_path / "x" / "c"
    left.touch()
    kept.touch()
    assert files.sweep_partials(tmp_path) == [left]
    assert kept.exists()


def test_configs_that_differ_are_named_field_by_field(tmp_path: Path) -> None:
    files.require_same(tmp_path, {"a": 1}, {"a": 1}, "the store")
    with pytest.raises(MismatchError, match=r"a: there 1, asked 2; b: there None, asked 3"):
        files.require_same(tmp_path, {"a": 1}, {"a": 2, "b": 3}, "the store")


def test_json_that_was_cut_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"a": 1')
    with pytest.raises(DamagedError, match=r"a\.json: not readable as JSON"):
        files.read_json(tmp_path / "a.json")


def test_too_little_room_says_how_much_is_needed(tmp_path: Path) -> None:
    files.require_free(tmp_path / "not" / "yet", 1, "a store")
    with pytest.raises(DiskError, match=r"a store needs 1000\.0 TB"):
        files.require_free(tmp_path, 10**15, "a store")


def test_equal_data_gives_equal_json_and_hash() -> None:
    assert files.canonical_json({"b": 1, "a": [1.5, "é"]}) == '{"a":[1.5,"é"],"b":1}'
    assert files.hash_config({"a": 1, "b": 2}) == files.hash_config({"b": 2, "a": 1})
    assert files.crc32c(b"123456789") == 0xE3069283


@pytest.mark.parametrize("n", [0, 1, 65_535, 65_536, 300_001])
def test_the_crc_of_an_array_is_that_of_its_bytes_whichever_way_it_is_computed(n: int) -> None:
    data = np.random.default_rng(n).integers(0, 256, n, np.uint8)
    assert files.crc32c(data) == files.crc32c(data.tobytes()) == google_crc32c.value(data.tobytes())
    assert files.crc32c(data[n // 2 :], files.crc32c(data[: n // 2])) == files.crc32c(data)
    strided = np.stack([data, data], 1)[:, 0]
    assert files.crc32c(np.ascontiguousarray(strided)) == files.crc32c(data)
    assert files.unlocked_crc32c() is not None


@pytest.mark.parametrize("version", [1, 2])
def test_available_memory_is_within_the_cgroup_and_counts_its_page_cache_as_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: int
) -> None:
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if version == 1 else ("memory.max", "memory.current")
    (tmp_path / names[0]).write_text("5000000\n")
    (tmp_path / names[1]).write_text("4000000\n")
    (tmp_path / "memory.stat").write_text("anon 1\ninactive_file 1500000\nactive_file 500000\n")
    monkeypatch.setattr(runtime, "CGROUPS", ((tmp_path, *names),))
    assert runtime.available_memory() == 3_000_000
    (tmp_path / names[0]).write_text("max\n")
    assert runtime.available_memory() > 3_000_000
