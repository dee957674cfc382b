"""Reading and writing documents: JSON lines compressed with zstandard, one object a line."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import zstandard


def read_documents(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a `.jsonl.zst` file in file order; raises OSError, ZstdError or JSONDecodeError."""
    with path.open("rb") as file:
        stream = zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True)
        return [json.loads(line) for line in io.TextIOWrapper(stream, encoding="utf-8")]


def write_documents(path: Path, documents: Iterable[dict[str, Any]]) -> None:
    """Write objects as a `.jsonl.zst` file; equal documents give equal bytes under one zstandard version."""
    lines = "".join(json.dumps(document, ensure_ascii=False) + "\n" for document in documents)
    path.write_bytes(zstandard.ZstdCompressor(level=19).compress(lines.encode("utf-8")))


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes in hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
