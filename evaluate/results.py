"""Results on disk: one JSON file a checkpoint, written whole, and a CSV made again from all of them. No torch.

Layout: FORMAT.md, "Results". Several jobs may write to one folder: files have names of their own, the CSV has a lock.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.base.digests import DIGESTS, sealed, unvouch, vouch
from pipeline.base.errors import CheckpointError, DamagedError
from pipeline.base.fields import Fields
from pipeline.base.files import disk_errors, regular, sweep_partials, write_csv, write_json
from pipeline.base.progress import say
from pipeline.base.results import FORMAT, VERSION, member_of, names_apart, read_result, result_name
from pipeline.definitions import METRICS

CSV_NAME = "results.csv"


def result_path(folder: Path, member: str, step: int, key: str) -> Path:
    """Where the results of a checkpoint are, or will be."""
    return folder / result_name(member, step, key)


def families_done(path: Path, key: str) -> dict[str, Any]:
    """The score families that a results file holds, each with its settings; none where there is no file.

    Raises DamagedError when it does not hold the whole key.
    """
    if not path.exists():
        return {}
    data = read_result(path)
    if (found := data.get("key")) != key:
        raise DamagedError(f"{path}: its key is {found!r}, its name says {key[:10]}; move it away")
    return dict(Fields(path, data).inner("evaluation").inner("families").data)


FAMILY_OF = {
    metric: family
    for family, metrics in {
        "scr": ("scr", "scr_dir1", "scr_dir2"),
        "tpp": ("tpp", "tpp_intended", "tpp_unintended"),
        "k_sparse_probe": ("k_sparse_probe",),
    }.items()
    for metric in metrics
}
"""Series that are means over tasks, of which a file holds each task's own too."""


def merged(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """Results with the families of `new` added to those of `old`, both of one checkpoint on one sample.

    A family in both is that of `new`: nothing of the old one stays, though it was scored on other texts.
    """
    old = {name: value for name, value in old.items() if name != "seal"}
    families = new["evaluation"]["families"]
    tasks: dict[str, dict[str, Any]] = {}
    for name, rows in old["features"].get("probing", {}).items():
        if kept := {metric: of for metric, of in rows.items() if FAMILY_OF.get(metric) not in families}:
            tasks[name] = kept
    added = new["features"].get("probing", {})
    told = {
        name: task | {"scores": [score for score in task["scores"] if score not in families]}
        for name, task in old["sample"]["probing"].items()
        if name in tasks
    }
    levels = {level["level"]: level for level in old["levels"]}
    for level in new["levels"]:
        before = levels.get(level["level"], {})
        both = {part: before.get(part, {}) | level[part] for part in ("scores", "scores_without_massive")}
        levels[level["level"]] = before | level | both
    series = {name: rows for name, rows in old["series"].items() if FAMILY_OF.get(name) not in families}
    features = old["features"] | new["features"]
    if tasks or added:
        features["probing"] = {name: tasks.get(name, {}) | added.get(name, {}) for name in tasks | added}
    probed = {
        name: told.get(name, {}) | task | {"scores": sorted({*told.get(name, {}).get("scores", ()), *task["scores"]})}
        for name, task in new["sample"]["probing"].items()
    }
    return {
        **old,
        **new,
        "evaluation": old["evaluation"]
        | new["evaluation"]
        | {"families": old["evaluation"]["families"] | dict(families)},
        "sample": old["sample"] | new["sample"] | {"probing": told | probed},
        "baselines": old["baselines"] | new["baselines"],
        "levels": [levels[number] for number in sorted(levels)],
        "series": series | new["series"],
        "features": features,
    }


def add_result(path: Path, data: Mapping[str, Any]) -> None:
    """Write one results file, or add its families to those that are there: one process at a time.

    Raises as `write_result`, and DamagedError for what is there and is not results.
    """
    with locked(path.parent):
        write_result(path, merged(read_result(path), data) if families_done(path, data["key"]) else data)


def write_result(path: Path, data: Mapping[str, Any]) -> None:
    """Write one results file. Raises CheckpointError naming the first number that is not finite: NaN is never written."""
    if bad := next(not_finite(data), None):
        raise CheckpointError(
            f"{data['checkpoint']['path']}: {bad} is not a finite number; its weights or latents overflow"
        )
    write_json(path, sealed({"format": FORMAT, "version": VERSION, **data}))


def not_finite(data: Any, name: str = "") -> Iterator[str]:
    """Paths, like levels.0.scores.ev, of floats that are NaN or infinite."""
    if isinstance(data, float) and not math.isfinite(data):
        yield name
    items = data.items() if isinstance(data, Mapping) else enumerate(data) if isinstance(data, list | tuple) else ()
    for key, value in items:
        yield from not_finite(value, f"{name}.{key}" if name else str(key))


def definitions() -> dict[str, dict[str, str]]:
    """Unit, direction and definition of every metric: results explain themselves."""
    return {m.id: {"unit": m.unit, "better": m.better, "definition": m.definition} for m in METRICS.values()}


@contextmanager
def working_in(folder: Path) -> Iterator[None]:
    """Say that a job works in the folder; the first of several sweeps what killed ones left.

    Leftovers are partly written files, and latent pages whose results never came. Where the file system has no locks
    nothing is swept, since nobody knows who else writes.
    """
    with open(folder / ".jobs", "a", opener=regular) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            fcntl.flock(file, fcntl.LOCK_SH)
        except OSError:
            yield
            return
        else:
            sweep(folder)
            fcntl.flock(file, fcntl.LOCK_SH)
        yield


def sweep(folder: Path) -> None:
    """Delete what killed jobs left. Call it only where nobody else writes."""
    sweep_partials(folder)
    for pages in folder.glob("*-step_*.latents"):
        if pages.is_dir() and not pages.is_symlink() and not pages.with_suffix(".json").exists():
            for path in (*pages.glob("page_*.js"), *pages.glob("index.js"), *pages.glob(DIGESTS)):
                path.unlink()
            with contextlib.suppress(OSError):  # what is not ours stays
                pages.rmdir()


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder's lock: one process at a time, let go of when it dies.

    Where the file system has no locks there is none, since what is written under it is written whole, and can be again.
    """
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / ".lock", "a", opener=regular) as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX)
            except OSError as error:
                if error.errno not in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK):
                    raise
                say(f"note     {folder}: its file system has no locks; let one evaluation at a time write there")
            yield


def tabulate(folder: Path) -> Path:
    """Make results.csv again from every results file in the folder: a row a checkpoint and level."""
    with locked(folder):
        results = [Fields(path, read_result(path)) for path in sorted(folder.glob("*-step_*.json"))]
        checkpoints = [result.inner("checkpoint") for result in results]
        members = names_apart([(member_of(one), one.text("path", "")) for one in checkpoints])
        rows = [row for result, member in zip(results, members) for row in csv_rows(result, member)]
        names = dict.fromkeys(name for part in zip(*rows) for columns in part for name in columns)
        flat = [{name: value for part in row for name, value in part.items()} for row in rows]
        unvouch(folder / CSV_NAME)
        write_csv(folder / CSV_NAME, flat, list(names))
        vouch(folder / CSV_NAME)
    return folder / CSV_NAME


def csv_rows(result: Fields, member: str) -> list[tuple[dict[str, Any], ...]]:
    """One results file, of a member called so, as rows in four parts: what was trained and the level, scores, series at each n,
    scores without massive rows.

    A score that is not defined is an empty field. Raises DamagedError, naming the field, where one is not what it should be.
    """
    checkpoint, store, series = result.inner("checkpoint"), result.inner("store"), result.inner("series")
    provenance, sae = checkpoint.inner("provenance"), checkpoint.inner("sae")
    train = provenance.inner("train").data
    about: dict[str, Any] = {"file": result.path.name, "member": member}
    about |= {"step": checkpoint.whole("step", 0)}
    about |= {name: train.get(name) for name in ("recipe", "objective", "alpha", "seed")}
    about |= {"width": sae.whole("width"), "activation": sae.text("activation", "") or None}
    about |= {"layer": store.some_whole("layer"), "store": store.text("id", "")[:10]}
    rows: list[tuple[dict[str, Any], ...]] = []
    for level in result.objects("levels"):
        which = about | {"level": level.whole("level"), "n_latents": level.whole("n_latents")}
        massive = level.numbers_or_nulls("scores_without_massive")
        without = {f"{name}_without_massive": value for name, value in massive.items()}
        scores = level.numbers_or_nulls("scores")
        rows.append((which, dict(scores), series_columns(series, level.whole("level")), without))
    return rows


def series_columns(series: Fields, level: int) -> dict[str, Any]:
    """A column a metric and n of one level: sparse_coding_rate_20, scr_10."""
    points = [(name, point) for name in series.data for point in series.objects(name)]
    return {
        f"{name}_{point.whole('n')}": point.some_number("value")
        for name, point in points
        if point.some_whole("level") == level
    }
