"""Which files of a path hold the records of a split: a file, a folder, what `datasets` saved, a copy of a Hub data set.

A folder is read as `datasets` would read it: what `save_to_disk` wrote by its own index, a data set's card (README.md) by the
configurations it names, else by the splits that file names show (train.jsonl, test-00000-of-00002.parquet). Where none shows,
every file is read. Hidden files, readmes and licences never are.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pipeline.base.errors import CorpusError
from pipeline.base.fields import Fields
from pipeline.base.files import read_json, regular, safe_name
from pipeline.base.progress import say
from pipeline.base.records import COMPRESSED, READERS, kind_of

ABOUT = (
    "readme",
    "license",
    "licence",
    "copying",
    "notice",
    "changelog",
    "dataset_info",
    "dataset_infos",
    "dataset_dict",
    "state",
)
"""Beginnings of names of files that are about a data set."""
TEXT = ".txt"


def record_files(root: Path, split: str, subset: str | None) -> list[Path]:
    """The files of a split, sorted. Raises CorpusError when there are none, naming the splits or subsets there are."""
    if not root.is_dir():
        return [require_kind(root)]
    if (root / "dataset_dict.json").is_file():
        index = read_fields(root / "dataset_dict.json")
        return saved_files(one_of(root, "split", split, index.list_of_texts("splits")), split)
    if (root / "state.json").is_file():
        return saved_files(root, split)
    if configs := card_configs(root):
        return card_files(root, configs, split, subset)
    if subset is not None:
        root = one_of(root, "subset", subset, [p.name for p in sorted(root.iterdir()) if p.is_dir()])
    return folder_files(root, split)


def require_kind(path: Path) -> Path:
    """The path. Raises CorpusError unless it names a file of records or of text."""
    if not is_read(path):
        raise CorpusError(f"{path}: not a corpus file; expected {expected()}")
    return path


def is_read(path: Path) -> bool:
    """Whether a file's name says that it holds records or text."""
    return kind_of(path) in (*READERS, TEXT)


def expected() -> str:
    """What can be read, for messages."""
    return f"{', '.join((*READERS, TEXT))}, or compressed ({', '.join(COMPRESSED)})"


def one_of(root: Path, what: str, asked: str, there: Iterable[str]) -> Path:
    """The folder of a split or subset. Raises CorpusError naming those that are there."""
    names = list(there)
    if asked not in names:
        raise CorpusError(f"{root}: no {what} {asked[:80]!r}; there are {listed(names)}; choose --{what}")
    return root / asked


MOST_LISTED = 20
"""Names that a message lists, of however many that there are."""


def listed(names: Sequence[str]) -> str:
    """Names of a file's, for a message of one line."""
    shown = [ascii(name[:40]) for name in names[:MOST_LISTED]]
    return (", ".join(shown) + (f" and {len(names) - MOST_LISTED} more" if len(names) > MOST_LISTED else "")) or "none"


def read_fields(path: Path) -> Fields:
    """A JSON object that `datasets` wrote. Raises DamagedError."""
    return Fields(path, read_json(path))


def saved_files(folder: Path, split: str | None) -> list[Path]:
    """The Arrow files that `Dataset.save_to_disk` wrote, in its order; `split`: which it should be, None for any."""
    if not (folder / "state.json").is_file():
        raise CorpusError(f"{folder}/state.json: gone; save the data set again")
    state = read_fields(folder / "state.json")
    held = state.some_text("_split")
    if None not in (held, split) and held != split:
        raise CorpusError(f"{folder}: holds the split {str(held)[:80]!a}, not {str(split)[:80]!r}; choose --split")
    names = [file.text("filename") for file in state.objects("_data_files")]
    if not names:
        raise CorpusError(f"{folder}/state.json: does not list its files; save the data set again")
    for name in names:
        if safe_name(name) != name:
            raise CorpusError(
                f"{name[:80]!a}: named by {folder}/state.json and no file's name; save the data set again"
            )
    found = [folder / name for name in names]
    for path in found:
        if path.parent != folder or not path.is_file():
            raise CorpusError(f"{path}: named by {folder}/state.json and not there; save the data set again")
    return found


def card_configs(root: Path) -> list[dict[str, Any]]:
    """The configurations that a data set's card names, if any: each with a name and data files."""
    import yaml
    from huggingface_hub import metadata_load

    card = root / "README.md"
    try:
        found: Any = metadata_load(card) if card.is_file() else None
    except (ValueError, OSError, RecursionError, yaml.YAMLError) as error:
        raise CorpusError(f"{card}: its header cannot be read ({type(error).__name__}); mend or remove it") from error
    configs = found.get("configs") if isinstance(found, dict) else None
    return (
        [c for c in configs or () if isinstance(c, dict) and c.get("data_files")] if isinstance(configs, list) else []
    )


def card_files(root: Path, configs: list[dict[str, Any]], split: str, subset: str | None) -> list[Path]:
    """The files that a card names for a subset's split."""
    by_name = {text_of(root, c.get("config_name", "default")): c for c in configs}
    default = next((name for name, c in by_name.items() if c.get("default") is True or name == "default"), None)
    chosen = subset or default or (next(iter(by_name)) if len(by_name) == 1 else None)
    if chosen is None or chosen not in by_name:
        raise CorpusError(f"{root}: which subset? there are {listed(list(by_name))}; choose --subset")
    given = by_name[chosen]["data_files"]
    entries = (
        given
        if isinstance(given, list) and given and isinstance(given[0], dict)
        else [{"split": "train", "path": given}]
    )
    patterns = {text_of(root, e.get("split", "train")): e.get("path") for e in entries if isinstance(e, dict)}
    one_of(root, "split", split, patterns)
    wanted = patterns[split]
    found = [path for pattern in (wanted if isinstance(wanted, list) else [wanted]) for path in matches(root, pattern)]
    return existing(root, [p for p in regular_files(found) if root.resolve() in p.resolve().parents], split)


def text_of(root: Path, value: object) -> str:
    """A name or pattern of a card. Raises CorpusError for what is no text."""
    if not isinstance(value, str):
        raise CorpusError(
            f"{root}/README.md: its header has a {type(value).__name__} where a name should be; mend or remove it"
        )
    return value


def matches(root: Path, value: object) -> list[Path]:
    """The files of a card's pattern. Raises CorpusError for one that is none, or that leads out of the folder."""
    pattern = text_of(root, value)
    try:
        if ".." in Path(pattern).parts:
            raise ValueError("it leads out of the folder")
        return list(root.glob(pattern))
    except (ValueError, NotImplementedError, OSError, RecursionError) as error:
        raise CorpusError(
            f"{root}/README.md: {pattern[:80]!a} is no pattern of its files ({str(error)[:80]}); mend or remove it"
        ) from error


def folder_files(root: Path, split: str) -> list[Path]:
    """The files of a split by their names, as `datasets` finds them; every file where no name shows a split."""
    from datasets.data_files import EmptyDatasetError, get_data_patterns, resolve_pattern

    candidates = regular_files(p for p in sorted(root.rglob("*")) if is_read(p) and not is_about(p, root))
    if not candidates:
        raise CorpusError(f"{root}: no corpus files in this folder; expected {expected()}")
    try:
        patterns = get_data_patterns(str(root))
    except EmptyDatasetError:
        patterns = {}
    if all(list(found) == ["**"] for found in patterns.values()):
        return candidates
    splits: dict[str, set[Path]] = {str(name): set() for name in patterns}
    for name, found in patterns.items():
        for pattern in found:
            with contextlib.suppress(FileNotFoundError):  # one of several ways to write a split's name
                splits[str(name)] |= {Path(path) for path in resolve_pattern(pattern, str(root))}
    one_of(root, "split", split, splits)
    return existing(root, [path for path in candidates if path.absolute() in splits[split]], split)


def regular_files(paths: Iterable[Path]) -> list[Path]:
    """Those that are files; folders are left out, and links to nothing (of a split that was not fetched) with a word.

    Raises DamagedError for a pipe, a device or a socket.
    """
    found = []
    for path in paths:
        if path.is_file():
            found.append(path)
        elif path.exists() and not path.is_dir():
            os.close(regular(os.fspath(path), os.O_RDONLY))  # raises
        elif path.is_symlink() and not path.exists():
            say(f"note     {path}: leads to nothing; passed over")
    return found


def is_about(path: Path, root: Path) -> bool:
    """Whether a file is hidden, or about the data rather than data."""
    parts = path.relative_to(root).parts
    return any(part.startswith((".", "__")) for part in parts) or path.name.lower().split(".")[0] in ABOUT


def existing(root: Path, files: list[Path], split: str) -> list[Path]:
    """Sorted, each once. Raises CorpusError when there are none that can be read."""
    found = sorted({path for path in files if is_read(path)})
    if not found:
        raise CorpusError(f"{root}: no file of split {split!r} that can be read; expected {expected()}")
    return found
