"""Whether what lies at a path is whole: any path that this project writes, up to the folder of a whole experiment.

Every artefact carries a digest of what it says: a store its seal, commit records and checksums, a checkpoint and a state a
crc32c, config.json, complete.json, results and other JSON a seal, metrics a hash in complete.json or the state, latent pages,
reports and exports a file of digests, tables, pages, scripts and logs a NAME.sha256. Names are compared with what lies under
them, a store's statistics with its rows' norms and moments. What carries none is listed, never called whole.

None of this vouches against a forger: whoever can write the files can write their digests too, and no secret is involved. Only
a hash kept elsewhere (a store's id, a checkpoint's SHA-256 in a paper) says more.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.base.digests import BESIDE, DIGESTS, beside, beside_problem, digest_problems, is_sealed, read_digests
from pipeline.base.errors import DamagedError, DiskError, PipelineError, UsageError, explain
from pipeline.base.fields import Fields
from pipeline.base.files import KINDS, PARTIAL, hash_config, hash_file, is_url, read_json
from pipeline.base.results import FORMAT as RESULTS
from pipeline.base.results import read_result
from pipeline.sae import member
from pipeline.sae.checkpoint import FORMAT, NAME, VERSION, read_header, verify_tensors
from pipeline.sae.folders import is_member
from pipeline.sae.foreign.reader import folder_of, is_foreign, load_sae
from pipeline.store.reader import Store
from pipeline.store.staging import keys_of

TENSORS = {
    member.STATE_FORMAT: member.STATE_VERSION,
    "nested-sae-probes": 1,
    "nested-sae-letter-probes": 1,
    FORMAT: VERSION,
}
"""Formats of files of tensors, checkpoints last: what is none of them is told that it is no checkpoint."""
IGNORED = (".jobs", ".lock")
"""Files of evaluate that say nothing."""
COPIES = {
    "tensorboard": "a copy for TensorBoard of metrics.jsonl, which is checked; TensorBoard appends to it",
    "wandb": "a copy for Weights & Biases of metrics.jsonl, which is checked; wandb appends to it",
}
"""Folders of a training that other programs write."""


@dataclass
class Findings:
    """What is wrong, and what nobody can vouch for, a line each; hashes of checkpoints and stores that were seen, and of those
    that results and members name."""

    problems: list[str] = field(default_factory=list)
    unvouched: list[str] = field(default_factory=list)
    checkpoints: set[str] = field(default_factory=set)
    named: dict[Path, str] = field(default_factory=dict)

    def unseal(self, path: Path, what: str = "carries no digest") -> None:
        """Note what cannot be vouched for, and why; of a temporary file it is always the same."""
        why = "left by a killed process; the next run sweeps it" if path.name.endswith(PARTIAL) else what
        self.unvouched.append(f"{path}: {why}")


def verify(place: str) -> Findings:
    """Every problem found at a path, or the URL of a store. Raises PipelineError for what this project does not write."""
    found = Findings()
    if is_url(place):
        found.problems += store_problems(place)
        return found
    path = Path(place)
    if not (check := checker_of(path)):
        there = "nothing" if not path.exists() else "an empty folder" if is_empty(path) else "none of these"
        raise PipelineError(
            f"{path}: expected a store, a checkpoint, a member, metrics, results, latent pages, a report, an export or a folder "
            f"of them, found {there}; check the path"
        )
    careful(check, path, found)
    found.problems += no_files(path)
    for result, sha256 in found.named.items():
        if found.checkpoints and sha256 not in found.checkpoints:
            found.unseal(result, "results of a checkpoint that is not here")
    return found


def no_files(path: Path) -> list[str]:
    """Everything in a folder that `regular` refuses (a pipe, a device, a socket), which no digest speaks of."""
    below = (os.path.join(folder, name) for folder, _, names in os.walk(path) for name in names)
    return [
        f"{file}: {kind}, which nothing here is; remove it" for file in below if (kind := KINDS.get(kind_of_file(file)))
    ]


def kind_of_file(file: str) -> int:
    """The kind of what a path leads to; 0 where it leads to nothing."""
    try:
        return stat.S_IFMT(os.stat(file).st_mode)
    except OSError:
        return 0


Check = Callable[[Path, Findings], None]


def careful(check: Check, path: Path, found: Findings) -> None:
    """Check one artefact; what is wrong with it ends it alone."""
    try:
        check(path, found)
    except (PipelineError, OSError) as error:
        problem = explain(error) or str(error)
        if problem not in found.problems:  # one config may be read for many checkpoints
            found.problems.append(problem)


def checker_of(path: Path) -> Check | None:
    """How an artefact is checked; None for what is none."""
    if path.is_dir():
        return folder_checker(path)
    if not path.is_file():
        return None
    if path.suffix == ".safetensors" and not is_foreign(path.parent):
        return check_tensors
    if path.name in ("config.json", "complete.json", "metrics.jsonl", "timings.jsonl") and is_member(path.parent):
        return check_part
    if path.suffix in (".html", ".htm") and report_digests(path).is_file():
        return check_report
    if (path.parent / DIGESTS).is_file():
        return check_listed
    return file_checker(path) or (check_weights if folder_of(path) != path else None)


def file_checker(path: Path) -> Check | None:
    """How a file is checked that stands for itself: by the digest beside it, as results, by its seal."""
    if beside(path).is_file():
        return check_beside
    return {RESULTS: check_results, SEALED: check_sealed}.get(file_format(path)) if path.suffix == ".json" else None


def folder_checker(path: Path) -> Check | None:
    """How a folder is checked."""
    if (path / "zarr.json").exists():
        return check_store
    if is_member(path):
        return check_member
    if is_foreign(path):
        return check_foreign
    if path.suffix == ".latents":
        return check_latents
    if path.name.endswith("_files") and (path / DIGESTS).is_file():
        return check_report_files
    if (path / DIGESTS).is_file():
        return check_digests
    return check_folder if any(checker_of(child) for child in children(path)) else None


def children(path: Path) -> Iterator[Path]:
    """What lies in a folder, in order; links to folders lead elsewhere and are left out."""
    return (child for child in sorted(path.iterdir()) if not (child.is_symlink() and child.is_dir()))


def is_empty(path: Path) -> bool:
    """Whether a path is an empty folder."""
    return path.is_dir() and not any(path.iterdir())


SEALED = "sealed"


def file_format(path: Path) -> str:
    """RESULTS for a JSON file that says so, or that cannot be read, so that this is said; SEALED for others with a seal."""
    try:
        data = read_json(path)
    except DamagedError:
        return RESULTS
    if not isinstance(data, dict):
        return ""
    return RESULTS if data.get("format") == RESULTS else SEALED if "seal" in data else ""


def check_folder(path: Path, found: Findings) -> None:
    """A folder of artefacts: an experiment, a training's --out, results, stores."""
    for child in children(path):
        if child.name in IGNORED:
            continue
        if child.name.endswith(PARTIAL):
            found.unseal(child)
        elif child.name.endswith(BESIDE) and not child.is_dir():
            if not child.with_name(child.name.removesuffix(BESIDE)).is_file():
                found.problems.append(f"{child}: the digest of a file that is gone; make it again")
        elif check := checker_of(child):
            careful(check, child, found)
        elif not is_empty(child):
            found.unseal(child, COPIES.get(child.name, "carries no digest"))


def check_beside(path: Path, found: Findings) -> None:
    """A file with its digest beside it."""
    if problem := beside_problem(path):
        found.problems.append(problem)


def check_sealed(path: Path, found: Findings) -> None:
    """A JSON file of ours that nothing else is known of: its seal."""
    is_sealed(path, read_json(path))


def check_store(path: Path, found: Findings) -> None:
    """A store: every byte, and what lies in its folder that is none of its files."""
    found.problems += store_problems(path)
    with contextlib.suppress(PipelineError):  # said above
        known = keys_of(Store.open(path))
        for file in sorted(one for one in path.rglob("*") if not one.is_dir()):
            if file.relative_to(path).as_posix() not in known:
                found.unseal(file, "no file of this store: nothing reads it")


def store_problems(place: str | Path) -> list[str]:
    """Every problem of a store, a damaged root included."""
    try:
        return Store.open(place, complete=False, check=False).verify(quiet=False)
    except (UsageError, DiskError):
        raise  # nothing is known of the store
    except PipelineError as error:
        return [str(error)]


def check_tensors(path: Path, found: Findings) -> None:
    """A checkpoint, a rolling state or kept probes: their bytes, and that a checkpoint is its folder's."""
    kind = verify_tensors(path, TENSORS)
    if kind == member.STATE_FORMAT and (state := member.read_state(path)).member != path.parent.name:
        found.problems.append(
            f"{path}: the state of {state.member[:100]!a}, not of {path.parent.name}; put the right one back"
        )
    if kind == FORMAT:
        found.checkpoints.add(hash_file(path))
        if path.parent.name == "checkpoints" and is_member(path.parent.parent):
            check_own(path, found)


def check_own(path: Path, found: Findings) -> None:
    """A checkpoint in a member's folder is that member's, under its own step's name."""
    if not NAME.fullmatch(path.name):
        found.problems.append(f"{path}: expected step_N.safetensors as its name; rename it or move it away")
    member.require_own(path, read_header(path).provenance)


def check_foreign(path: Path, found: Findings) -> None:
    """An export: its digests. An SAE made elsewhere: that it can be read, whole and exactly."""
    if (path / DIGESTS).is_file():
        check_digests(path, found)
        return
    load_sae(path)
    found.unseal(path, "made elsewhere, or exported by an older version: it can be read, and carries no digest")


def check_weights(path: Path, found: Findings) -> None:
    """The weights of an SAE made elsewhere, by the name of their file."""
    check_foreign(path.parent, found)


def check_digests(path: Path, found: Findings) -> None:
    """A folder that carries the digests of all that lies in it: an export."""
    found.problems += digest_problems(path / DIGESTS, path)
    check_others(path, path, found)


def check_others(path: Path, root: Path, found: Findings) -> None:
    """What lies in a folder whose digests, of files named from `root`, do not name it."""
    named = {root / name for name in read_digests(path / DIGESTS).texts("files")} | {path / DIGESTS}
    for other in sorted(one for one in path.rglob("*") if not one.is_dir() and one not in named):
        careful(check_other, other, found)


def check_other(path: Path, found: Findings) -> None:
    """A file in a folder with digests that they do not name."""
    if check := file_checker(path):
        check(path, found)
    elif not path.name.endswith(BESIDE):
        found.unseal(path)


def check_member(path: Path, found: Findings) -> None:
    """A member: config, every checkpoint, state, metrics, and what complete.json recorded."""
    for checkpoint in sorted((path / "checkpoints").iterdir()):
        if checkpoint.suffix == ".safetensors":
            careful(check_tensors, checkpoint, found)
        else:
            found.unseal(checkpoint)
    careful(check_config, path, found)
    careful(check_completion, path, found)
    careful(check_timings, path / "timings.jsonl", found)
    known = {"config.json", "complete.json", "metrics.jsonl", "checkpoints", "state.safetensors", "timings.jsonl"}
    for child in children(path):
        if child.name not in (*known, f"timings.jsonl{BESIDE}"):
            found.unseal(child)


def check_timings(path: Path, found: Findings) -> None:
    """Timings have a digest beside them once the member is finished; until then they are appended to."""
    if beside(path).is_file():
        check_beside(path, found)
    elif path.is_file():
        finished = (path.parent / "complete.json").is_file()
        found.unseal(path, "written by an older version" if finished else "appended to until training is finished")


def check_part(path: Path, found: Findings) -> None:
    """One file of a member."""
    if path.name == "config.json":
        check_config(path.parent, found)
    elif path.name == "timings.jsonl":
        check_timings(path, found)
    else:
        check_completion(path.parent, found)


def check_config(path: Path, found: Findings) -> None:
    """A member's config.json says what it said, and the folder's name is that of its config."""
    fields = member.read_config(path)
    if "seal" not in fields.data:
        found.unseal(fields.path, "store and order carry no digest (written by an older version)")
    if not path.name.endswith(f"-{hash_config(fields.inner('config').data)[:10]}"):
        found.problems.append(
            f"{path}: its name is not that of its config (last ten digits); give it its own name back"
        )


def check_completion(path: Path, found: Findings) -> None:
    """A finished member's final checkpoint and metrics are those recorded; an unfinished one's metrics those of its state."""
    metrics, completion = path / "metrics.jsonl", member.read_completion(path)
    if completion is None:
        found.problems.append(
            f"{path}: training is not finished (no complete.json); run the same train command to go on"
        )
        if (state := path / "state.safetensors").exists():
            careful(check_tensors, state, found)
            held = member.read_state(state)
            require_metrics(metrics, member.hash_lines(member.lines_until(metrics, held.step)), held.metrics_sha256)
        return
    if not completion.is_sealed:
        found.unseal(path / "complete.json", "carries no digest (written by an older version)")
    member.final_checkpoint(path, completion)
    if completion.metrics_sha256 is None:
        found.unseal(metrics, "complete.json holds no digest of it (written by an older version)")
    elif not metrics.exists():
        require_metrics(metrics, "", completion.metrics_sha256)
    member.require_recorded(path, completion)


def require_metrics(path: Path, found: str, recorded: str) -> None:
    """Raise DamagedError unless metrics are those that were recorded."""
    if found != recorded:
        raise DamagedError(f"{path}: not the lines that were recorded; put them back, or train this member again")


def check_results(path: Path, found: Findings) -> None:
    """A results file: what it says, and its name."""
    data = read_result(path)
    if "seal" not in data:
        found.unseal(path, "its numbers carry no digest (written by an older version)")
    found.named[path] = Fields(path, data).inner("checkpoint").text("sha256", "")


def check_latents(path: Path, found: Findings) -> None:
    """Latent pages: their digests, under their own name, beside their results."""
    if not (path / "index.js").is_file():
        found.problems.append(f"{path}: latent pages without their index; evaluate again")
    elif not (path / DIGESTS).is_file():
        found.unseal(path, "carries no digest (written by an older version)")
    else:
        found.problems += digest_problems(path / DIGESTS, path, path.name)
        check_others(path, path, found)
    if not path.with_suffix(".json").is_file():
        found.problems.append(f"{path}: latent pages without their results; evaluate again, or delete them")


def check_report(path: Path, found: Findings) -> None:
    """A report and the folder beside it."""
    found.problems += digest_problems(report_digests(path), path.parent, path.name)
    check_others(report_digests(path).parent, path.parent, found)


def check_report_files(path: Path, found: Findings) -> None:
    """The folder beside a report, where the report is checked itself: nothing twice; else it too."""
    if not any(report_digests(page) == path / DIGESTS for page in path.parent.glob("*.htm*")):
        found.problems.append(f"{path}: the files of a report that is gone; write it again")


def report_digests(path: Path) -> Path:
    """The digests of a report."""
    return path.with_name(f"{path.stem}_files") / DIGESTS


def check_listed(path: Path, found: Findings) -> None:
    """A file in a folder with digests: one that they name, or another."""
    root = path.parent.parent if path.parent.name.endswith("_files") else path.parent
    if path.name != DIGESTS and path.relative_to(root).as_posix() not in read_digests(path.parent / DIGESTS).texts(
        "files"
    ):
        check_other(path, found)
        return
    problems = digest_problems(path.parent / DIGESTS, root)
    found.problems += [problem for problem in problems if problem.startswith((f"{path}:", f"{path.parent / DIGESTS}:"))]


def describe_unvouched(found: Findings) -> list[str]:
    """What cannot be vouched for, a line a reason."""
    reasons: dict[str, list[str]] = {}
    for line in found.unvouched:
        path, _, reason = line.partition(": ")
        reasons.setdefault(reason, []).append(path)
    return [
        f"{paths[0]}{f' and {len(paths) - 1} more' if len(paths) > 1 else ''}: {reason}"
        for reason, paths in reasons.items()
    ]
