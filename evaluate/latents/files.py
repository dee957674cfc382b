"""Latent pages on disk: what `latents.py` computes and the report renders. No torch, no language model.

    FOLDER/                    beside a results file: NAME.json has NAME.latents/
      page_0000.js ...         nestedLatents.page(0, {"strings": [...], "latents": [...]}), PAGE_SIZE latents each
      digests.json             the SHA-256 of each of these files
      index.js                 nestedLatents.index({"summary": {...}, "level": [...], ...}), written last: marks completion
      labels.json              where evaluate.explain read labels back: {"labels": {"17": "…"}}, sealed, no part of the digests

Nothing ever runs these files: the report parses them and writes what they hold anew. Corpus text in them is data: every
character outside ASCII, and `<`, is escaped, and characters that reorder or hide text are spelled out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.base.digests import DIGESTS, is_sealed, write_digests, write_sealed
from pipeline.base.errors import DamagedError
from pipeline.base.fields import Fields, require_plain
from pipeline.base.files import hash_file, read_bytes, read_json, sha256, write_bytes
from pipeline.base.token_text import visible

FORMAT, VERSION = "nested-sae-latents", 3
PAGE_SIZE = 256
PAGE_ROWS = 131_072
"""Rows that pages are made of, at most."""
LABELS, LABELS_FORMAT = "labels.json", "nested-sae-latent-labels"
LONGEST_LABEL = 300
INDEX_HEAD = "nestedLatents.index("


def latents_folder(results: Path) -> Path:
    """Where the latent pages of a results file are, if there are any: NAME.json → NAME.latents."""
    return results.with_suffix(".latents")


def has_pages(result: Path) -> bool:
    """Whether the latent pages of a results file are complete."""
    return (latents_folder(result) / "index.js").exists()


class Strings:
    """A page's table of strings: a context holds positions in it, so that repeated tokens are stored once."""

    def __init__(self) -> None:
        self.table: list[str] = []
        self._position: dict[str, int] = {}

    def __call__(self, text: str) -> int:
        """The position of a string, added when it is new."""
        if text not in self._position:
            self._position[text] = len(self.table)
            self.table.append(text)
        return self._position[text]


def script_json(data: Any) -> str:
    """JSON that is safe inside a script: ASCII only, and no `<`, so that no text of a corpus can end the element."""
    return json.dumps(data, separators=(",", ":"), allow_nan=False, ensure_ascii=True).replace("<", "\\u003c")


def page_name(number: int) -> str:
    """The file of a page of latents."""
    return f"page_{number:04d}.js"


def write_page(folder: Path, number: int, strings: Sequence[str], latents: Sequence[dict[str, Any]]) -> None:
    """Write one page of latents, in the order of their ids."""
    data = script_json({"strings": strings, "latents": latents})
    write_bytes(folder / page_name(number), f"nestedLatents.page({number},{data});\n".encode())


def begin(folder: Path, n_pages: int) -> None:
    """Empty a folder of older latent pages: its completion marker first, then pages that no one will overwrite."""
    (folder / "index.js").unlink(missing_ok=True)
    (folder / LABELS).unlink(missing_ok=True)
    (folder / DIGESTS).unlink(missing_ok=True)
    for path in folder.glob("page_*.js"):
        if int(path.stem.removeprefix("page_")) >= n_pages:
            path.unlink()


def write_index(folder: Path, summary: dict[str, Any], columns: dict[str, Iterable[Any]]) -> None:
    """Write the index of all latents: one list a column (level, density, max, token), in the order of their ids.

    Before it the digests of all files, its own included, so that it still marks completion.
    """
    data = {"summary": summary} | {name: list(values) for name, values in columns.items()}
    index = f"{INDEX_HEAD}{script_json(data)});\n".encode()
    pages = {path.name: hash_file(path) for path in sorted(folder.glob("page_*.js"))}
    write_digests(folder / DIGESTS, folder.name, pages | {"index.js": sha256(index)})
    write_bytes(folder / "index.js", index)


def write_labels(folder: Path, labels: Mapping[int, str]) -> None:
    """Write labels of latents beside their pages: what `evaluate.explain` read back, shown when a report is written."""
    data = {"format": LABELS_FORMAT, "version": 1, "labels": {str(latent): text for latent, text in labels.items()}}
    write_sealed(folder / LABELS, data)


def read_labels(folder: Path) -> dict[int, str]:
    """Labels beside the pages, as visible text; {} where there are none. Raises DamagedError for a file that is not ours."""
    path = folder / LABELS
    if not path.is_file():
        return {}
    fields = Fields(path, read_json(path))
    fields.one_of("format", (LABELS_FORMAT,))
    is_sealed(path, fields.data)
    texts = fields.texts("labels")
    if wrong := [name for name in texts if not re.fullmatch("[0-9]{1,18}", name)]:
        raise fields.wrong("labels", "texts by the number of a latent", wrong[0])
    return {int(name): visible(text[:LONGEST_LABEL]) for name, text in texts.items()}


def read_script(path: Path, call: str) -> Any:
    """The JSON in a file that is one call, `nestedLatents.index(JSON);` and the like; it is parsed and never run.

    Raises DamagedError when the file is anything else.
    """
    text = read_bytes(path).decode("ascii", errors="replace") if path.is_file() else ""
    head, tail = f"nestedLatents.{call}", ");\n"
    if not (text.startswith(head) and text.endswith(tail)):
        raise DamagedError(f"{path}: does not read as latent pages (expected one call of {head}…)); evaluate again")
    try:
        data = json.loads(text[len(head) : -len(tail)])
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"{path}: does not read as latent pages ({error}); evaluate again") from error
    require_plain(path, data)
    return data


def read_index(folder: Path) -> Fields:
    """A folder's index, its format checked. Raises DamagedError when the index is not ours or of another version."""
    index = Fields(folder / "index.js", read_script(folder / "index.js", "index("))
    summary = index.inner("summary").data
    if (summary.get("format"), summary.get("version")) != (FORMAT, VERSION):
        raise DamagedError(f"{folder}: index.js is no {FORMAT} of version {VERSION}; evaluate again")
    return index


def read_summary(folder: Path) -> dict[str, Any]:
    """The summary in a folder's index. Raises DamagedError when the index is not ours or of another version."""
    return dict(read_index(folder).inner("summary").data)


def read_page(folder: Path, number: int) -> Fields:
    """One page of latents. Raises DamagedError when it is not there or anything but data."""
    return Fields(folder / page_name(number), read_script(folder / page_name(number), f"page({number},"))
