import contextlib
import errno
import os
import socket
import threading
from pathlib import Path

import google_crc32c
import numpy as np
import pytest

from pipeline.base import files
from pipeline.base.cli import OUT_FILE
from pipeline.base.errors import DamagedError, DiskError, MismatchError
from pipeline.base.files import hash_file, read_bytes, read_json, read_text, regular, require_replaceable


def test_file_appears_whole_or_never(tmp_path: Path) -> None:
    """A file appears whole or not at all."""
    path = tmp_path / "deep" / "a.bin"
    with pytest.raises(RuntimeError), files.atomic(path) as file:
        file.write(b"half")
        raise RuntimeError
    assert list(path.parent.iterdir()) == []
    files.write_bytes(path, b"whole")
    assert path.read_bytes() == b"whole"


def test_failed_write_keeps_old_file(tmp_path: Path) -> None:
    """An old file stays when writing its successor fails."""
    path = tmp_path / "a.json"
    files.write_json(path, {"old": True})
    with pytest.raises(ValueError, match="JSON"):
        files.write_json(path, {"new": float("nan")})
    assert files.read_json(path) == {"old": True}


def test_full_disk_error_names_path(tmp_path: Path) -> None:
    """A full disk is one error that names the path."""
    with pytest.raises(DiskError, match=r"a\.bin: the disk is full"), files.atomic(tmp_path / "a.bin"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert list(tmp_path.iterdir()) == []


def test_limit_of_a_file_names_it(tmp_path: Path) -> None:
    """What a disk says of a descriptor alone (ulimit -f) names the file and what to do."""
    with (
        pytest.raises(DiskError, match=r"a\.bin: File too large; raise the limit \(ulimit -f\)"),
        files.atomic(tmp_path / "a.bin"),
    ):
        raise OSError(errno.EFBIG, "File too large")
    assert not list(tmp_path.iterdir())


def test_readonly_folder_error_names_path(tmp_path: Path) -> None:
    """A read-only folder is one error that names the path."""
    with pytest.raises(DiskError, match="choose another folder"), files.atomic(tmp_path / "a"):
        raise OSError(errno.EROFS, "Read-only file system")


def test_what_killed_writers_left_is_swept(tmp_path: Path) -> None:
    """What killed writers left is swept."""
    (tmp_path / "x").mkdir()
    left, kept = tmp_path / "x" / f"c.{os.getpid()}.partial", tmp_path / "x" / "c"
    left.touch()
    kept.touch()
    assert files.sweep_partials(tmp_path) == [left]
    assert kept.exists()


def test_differing_configs_name_fields(tmp_path: Path) -> None:
    """Configs that differ are named field by field."""
    files.require_same(tmp_path, {"a": 1}, {"a": 1}, "the store")
    with pytest.raises(MismatchError, match=r"a: there 1, asked 2; b: there None, asked 3"):
        files.require_same(tmp_path, {"a": 1}, {"a": 2, "b": 3}, "the store")


def test_cut_json_error_names_file(tmp_path: Path) -> None:
    """JSON that was cut is an error that names the file."""
    (tmp_path / "a.json").write_text('{"a": 1')
    with pytest.raises(DamagedError, match=r"a\.json: not readable as JSON"):
        files.read_json(tmp_path / "a.json")


def test_too_little_room_says_need(tmp_path: Path) -> None:
    """Too little room says how much is needed."""
    files.require_free(tmp_path / "not" / "yet", 1, "a store")
    with pytest.raises(DiskError, match=r"a store needs 1000\.0 TB"):
        files.require_free(tmp_path, 10**15, "a store")


def test_equal_data_gives_equal_hash() -> None:
    """Equal data gives equal JSON and hash."""
    assert files.canonical_json({"b": 1, "a": [1.5, "é"]}) == '{"a":[1.5,"é"],"b":1}'
    assert files.hash_config({"a": 1, "b": 2}) == files.hash_config({"b": 2, "a": 1})
    assert files.crc32c(b"123456789") == 0xE3069283


@pytest.mark.parametrize("n", [0, 1, 65_535, 65_536, 300_001])
def test_array_crc_is_of_its_bytes(n: int) -> None:
    """The CRC of an array is that of its bytes whichever way it is computed."""
    data = np.random.default_rng(n).integers(0, 256, n, np.uint8)
    assert files.crc32c(data) == files.crc32c(data.tobytes()) == google_crc32c.value(data.tobytes())
    assert files.crc32c(data[n // 2 :], files.crc32c(data[: n // 2])) == files.crc32c(data)
    strided = np.stack([data, data], 1)[:, 0]
    assert files.crc32c(np.ascontiguousarray(strided)) == files.crc32c(data)


@pytest.mark.parametrize("text", ["a/b", "..", "", "a\0", "-rf", ".x", "ä", "x" * 101, "\ud800", "a b"])
def test_unsafe_text_makes_a_safe_name(text: str) -> None:
    """A name is never a path, hidden or too long, and tells different texts apart."""
    name = files.safe_name(text)
    assert Path(name).name == name
    assert 0 < len(name.encode()) <= files.LONGEST_NAME
    assert name[0] not in ".-"
    assert name != files.safe_name(text + "!")


def test_plain_names_stay_as_they_are() -> None:
    """What members are called stays readable."""
    assert files.safe_name("alpha0.2-seed0-1a2b3c4d5e") == "alpha0.2-seed0-1a2b3c4d5e"


def test_locks_are_let_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lock that is let go of in time is taken; one that is held is refused; a file system without locks is named."""
    held = files.lock_folder(tmp_path, "working")
    monkeypatch.setattr(files, "LET_GO_S", 0.1)
    with pytest.raises(DiskError, match="another process is working"):
        files.lock_folder(tmp_path, "working")
    monkeypatch.setattr(files, "LET_GO_S", 10.0)
    threading.Timer(0.2, os.close, [held]).start()
    os.close(files.lock_folder(tmp_path, "working"))

    def without(descriptor: int, how: int) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(files.fcntl, "flock", without)
    with pytest.raises(DiskError, match="cannot be locked"):
        files.lock_folder(tmp_path, "working")


@pytest.mark.parametrize(
    ("what", "says"), [("pipe", "a pipe"), ("device", "a device"), ("socket", "a socket"), ("link", "a pipe")]
)
def test_what_has_no_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, says: str) -> None:
    """A pipe is not waited for, by whoever reads or writes; a device, a socket and a link to one are refused, in one line."""
    path = tmp_path / "x.json"
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as listening:
        if what == "device":
            path.symlink_to("/dev/zero")
        elif what == "socket":
            monkeypatch.chdir(tmp_path)
            listening.bind("x.json")  # the whole path may be longer than a socket's name can be
        else:
            os.mkfifo(tmp_path / "pipe" if what == "link" else path)
            if what == "link":
                path.symlink_to("pipe")
        for work in (
            lambda: read_json(path),
            lambda: read_bytes(path),
            lambda: read_text(path),
            lambda: hash_file(path),
            lambda: regular(str(path), os.O_WRONLY | os.O_APPEND),
        ):
            with pytest.raises(DamagedError, match=f"x.json: {says}, expected a regular file; ") as caught:
                work()
            assert caught.value.strerror == f"{says}, expected a regular file"


def test_folders_and_gaps_stay(tmp_path: Path) -> None:
    """A folder, or nothing, at the place of a file is what `open` says of it, and a regular file is read."""
    (tmp_path / "a").write_text("é\r\n")
    assert read_text(tmp_path / "a") == "é\n"
    with pytest.raises(IsADirectoryError):
        read_bytes(tmp_path)
    with pytest.raises(FileNotFoundError):
        read_bytes(tmp_path / "b")


@pytest.mark.parametrize(("what", "says"), [("pipe", "a pipe"), ("socket", "a socket"), ("link", "a pipe")])
def test_no_output_replaces_a_pipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, says: str) -> None:
    """A pipe, a socket and a link to one stay where they are: refused before work and at the write, as readers say it."""
    path = tmp_path / "x.html"
    monkeypatch.chdir(tmp_path)
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as listening:
        if what == "socket":
            listening.bind(path.name)
        else:
            os.mkfifo("pipe" if what == "link" else path.name)
            if what == "link":
                path.symlink_to("pipe")
        before = path.lstat(), os.listdir()
        for work in (lambda: OUT_FILE.convert(str(path), None, None), lambda: files.write_bytes(path, b"page")):
            with pytest.raises(OSError, match=f"x.html: {says}, expected a regular file; remove it or give another"):
                work()
        assert (path.lstat(), os.listdir()) == before


@pytest.mark.parametrize("what", ["link", "pipe", "file"])
def test_planted_partials_are_not_followed(tmp_path: Path, what: str) -> None:
    """What stands where a temporary file will be is taken away: what a link there leads to stays, a pipe is not waited for."""
    partial, secret = tmp_path / f"a.{os.getpid()}.partial", tmp_path / "secret"
    secret.write_text("keep")
    if what == "link":
        partial.symlink_to(secret)
    elif what == "pipe":
        os.mkfifo(partial)
    else:
        partial.write_text("left by a killed process, and longer")
    files.write_bytes(tmp_path / "a", b"new")
    assert (secret.read_text(), (tmp_path / "a").read_text()) == ("keep", "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "secret"]
    assert not (tmp_path / "a").is_symlink()


def test_no_name_in_dev_is_replaced(tmp_path: Path) -> None:
    """No name in /dev is replaced, wherever it leads just now; a link elsewhere is, and what it leads to stays."""
    for name in ("null", "stdout", "stderr"):  # looked at only
        with pytest.raises(DamagedError, match=f"/dev/{name}: a device, expected a regular file"):
            require_replaceable(Path("/dev") / name)
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to("real")
    files.write_bytes(tmp_path / "link", b"new")
    assert ((tmp_path / "real").read_text(), (tmp_path / "link").read_text()) == ("old", "new")
    assert not (tmp_path / "link").is_symlink()


def test_closed_folder_names_the_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where what stands at an output cannot be looked at, it is one error that names it."""

    def closed(path: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(files, "require_replaceable", closed)
    with pytest.raises(DiskError, match=r"a\.bin: cannot write here \(Permission denied\); choose another folder"):
        files.write_bytes(tmp_path / "a.bin", b"")
