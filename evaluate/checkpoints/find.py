"""Which checkpoints to evaluate, what they say about themselves, and whether they fit the store."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from pipeline.base.errors import CheckpointError, DamagedError, PipelineError
from pipeline.base.fields import Fields, require_plain
from pipeline.base.files import read_bytes
from pipeline.base.progress import say
from pipeline.sae.config import SAEConfig
from pipeline.sae.folders import may_be_member, member_folder
from pipeline.sae.foreign.gemma_scope import BEFORE_GAIN, behind_gain
from pipeline.sae.foreign.hooks import is_module
from pipeline.sae.foreign.reader import folder_of, is_foreign, load_sae, read_sae, sha256_of
from pipeline.sae.member import final_checkpoint, read_completion, read_config, require_recorded
from pipeline.sae.nested import NestedSAE

if TYPE_CHECKING:
    from pipeline.store.reader import Store

MAX_CURVE = 500
Failure = tuple[Path, PipelineError]
"""A checkpoint or member that cannot be evaluated, and why."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was found: the file it is named by, its content's hash, and its header. Weights are not loaded."""

    path: Path
    sha256: str
    sae: SAEConfig
    step: int
    provenance: dict[str, Any]
    norm_weight: Tensor | None = field(default=None, compare=False)

    def behind_gain(self, norm_weight: Tensor) -> Checkpoint:
        """A transcoder that reads the MLP's norm before its gain, as one of what the MLP reads; its weights are changed when
        they are loaded."""
        store = self.provenance["store"] | {"hook": "mlp_in", "gain": f"of the norm, {BEFORE_GAIN}, folded in"}
        return replace(self, provenance=self.provenance | {"store": store}, norm_weight=norm_weight)

    @property
    def reads_before_gain(self) -> bool:
        """Whether it is a transcoder of Gemma Scope."""
        return self.sae.is_transcoder and (self.provenance.get("store") or {}).get("hook") == BEFORE_GAIN

    @property
    def member(self) -> str:
        """The training run's name; of an SAE made elsewhere, its file's or folder's."""
        return str(self.provenance.get("member") or self.path.stem)

    @property
    def made_for(self) -> dict[str, Any]:
        """What it says of the rows that it makes: of an SAE, those that it reads."""
        store: dict[str, Any] = self.provenance.get("store") or {}
        return (store.get("target") or {}) if self.sae.is_transcoder else store

    def load(self) -> NestedSAE:
        """The SAE in float32 on the CPU. Raises CheckpointError or DamagedError."""
        sae = load_sae(self.path)[0]
        return sae if self.norm_weight is None else behind_gain(sae, self.norm_weight)

    def to_dict(self) -> dict[str, Any]:
        """What results say about their checkpoint."""
        return {
            "path": str(self.path),
            "sha256": self.sha256,
            "step": self.step,
            "sae": self.sae.to_dict(),
            "provenance": self.provenance,
        }


def open_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint's header and hash its bytes; an SAE made elsewhere has step 0. Raises CheckpointError or DamagedError."""
    try:
        header = read_sae(path)
        found = Checkpoint(path, sha256_of(path), header.sae, header.step, header.provenance)
    except PipelineError:
        raise
    except OSError as error:
        raise unreadable(path, error) from error
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: its header is not one of ours ({type(error).__name__}: {str(error)[:80]}); use an earlier checkpoint"
        ) from error
    require_plain(path, {"provenance": found.provenance})
    fields = Fields(path, {"step": found.step, "provenance": found.provenance})
    fields.whole("step")
    fields.inner("provenance").text("member", "")
    fields.inner("provenance").inner("store")
    require_completed(path)
    return found


def require_completed(path: Path) -> None:
    """Raise DamagedError where a finished member's config or metrics, of which results take over parts, are not those that
    completed it."""
    if (folder := member_folder(path)) is None:
        return
    if (completion := read_completion(folder)) is not None:
        require_recorded(folder, completion)
        if completion.metrics_sha256 is not None and not (folder / "metrics.jsonl").exists():
            say(
                f"note     {folder / 'metrics.jsonl'}: gone, so results of this member are without its curve; put it back"
            )


def unreadable(path: Path, error: OSError) -> CheckpointError:
    """What a disk says of a file that is there, as one line."""
    return CheckpointError(f"{path}: cannot be read ({error.strerror}); look at its permissions and its disk")


def find_checkpoints(places: Sequence[Path], all_steps: bool) -> tuple[list[Path], list[Failure]]:
    """What to evaluate, each once, in order. A file, or a folder with an SAE made elsewhere, stands for itself, a member's
    folder for its final checkpoint (or all steps), any other folder for what is in it. A member without a final checkpoint
    is a failure: its latest step is never guessed at.

    Raises CheckpointError when a place does not exist or holds nothing of ours.
    """
    found: dict[Path, None] = {}
    failed: list[Failure] = []
    for place in places:
        for part in saes_in(place):
            try:
                itself = not part.is_dir() or is_foreign(part)
                found |= dict.fromkeys([part] if itself else member_checkpoints(part, all_steps))
            except PipelineError as error:
                failed.append((part, error))
            except OSError as error:
                failed.append((part, unreadable(part, error)))
    return list(found), failed


DEEPEST_SUITE = 4
"""Folders in folders that are searched for SAEs: suites of others lie as MODEL/LAYER/trainer_0."""


def saes_in(place: Path) -> list[Path]:
    """A file, a member's folder or an SAE made elsewhere as it is; of another folder those in it, sorted by name."""
    if not place.exists():
        raise CheckpointError(f"{place}: no such checkpoint or folder")
    if not (place := folder_of(place)).is_dir() or holds_sae(place):
        return [place]
    if not (members := list(below(place, DEEPEST_SUITE))):
        raise CheckpointError(
            f"{place}: holds no training member (folder with config.json); name a checkpoint or train's --out"
        )
    return members


def below(folder: Path, depth: int) -> Iterator[Path]:
    """Members and SAEs made elsewhere in a folder and, where a folder in it is neither, in that; a folder that cannot be looked
    into is among them, so that whoever reads it says why."""
    try:
        children = sorted(path for path in folder.iterdir() if path.is_dir())
    except OSError:
        yield folder
        return
    for child in children:
        if holds_sae(child):
            yield child
        elif depth > 1 and not child.is_symlink():
            yield from below(child, depth - 1)


def holds_sae(folder: Path) -> bool:
    """Whether a folder is a training member or an SAE made elsewhere, or cannot be looked into."""
    try:
        return may_be_member(folder) or is_foreign(folder)
    except OSError:
        return True


def member_checkpoints(folder: Path, all_steps: bool) -> list[Path]:
    """The final checkpoint of a training member, or all its steps. Raises CheckpointError when there is none."""
    read_config(folder)
    if all_steps:
        steps = sorted((folder / "checkpoints").glob("step_*.safetensors"))
        if not steps:
            raise CheckpointError(f"{folder}: has no checkpoint yet; train it further")
        return steps
    if (completion := read_completion(folder)) is None:
        raise CheckpointError(
            f"{folder}: its training is not complete; finish it, or use --all-steps or name a checkpoint"
        )
    return [final_checkpoint(folder, completion)]


def require_fit(
    checkpoint: Checkpoint,
    store: Store,
    *,
    allow_other_store: bool = False,
    allow_other_model: bool = False,
    makes: bool = False,
) -> None:
    """Raise CheckpointError, naming both sides, unless the checkpoint was trained on rows like the store's: to read them, or
    where `makes`, of a transcoder, to make them.

    Checked are width of the rows, hook and layer (unless nobody named the store's), and, unless they are allowed to differ,
    model, weights, the model's config.json and the store itself: another store may have trained it on what is this one's
    evaluation split. What an SAE made elsewhere, or of before it was recorded, does not say is not checked; a model's name is
    compared without its owner.
    """
    where, trained = f"{checkpoint.path}", checkpoint.provenance.get("store") or {}
    trained, d_model = (
        (trained.get("target") or {}, checkpoint.sae.d_made) if makes else (trained, checkpoint.sae.d_model)
    )
    if "id" in trained:  # a store of this pipeline, which names no hook where it is the stream after the layer
        trained = {"hook": "resid_post"} | trained
    if d_model != store.d_model:
        raise CheckpointError(
            f"{where}: its rows have {d_model} dimensions, those of store {store.where} have {store.d_model}; use the store it "
            "was trained on"
        )
    here = {"hook": store.config.get("hook", "resid_post"), "layer": store.config["layer"]}
    if here["hook"] is None:  # rows that others made, of a place that nobody named
        here = {}
    if not allow_other_model and "weights_sha256" in trained:
        here |= {"weights_sha256": store.config["weights_sha256"]}
    elif not allow_other_model:
        here |= {"model": store.config["model"]}  # by name, where no hash says more: a path may differ between machines
        here |= {"revision": store.config["revision"]}
    if not allow_other_model and "architecture_sha256" in store.config:
        here |= {"architecture_sha256": store.config["architecture_sha256"]}
    if not allow_other_store:
        here |= {"id": store.id}
    words = {"weights_sha256": "model weights", "architecture_sha256": "a model's config.json", "id": "store"}
    hints = {
        "weights_sha256": "; --allow-other-model if that is meant",
        "architecture_sha256": "; --allow-other-model if that is meant",
        "model": "; --allow-other-model if that is meant",
        "revision": "; --allow-other-model if that is meant",
        "id": "; --allow-other-store if no evaluation text was trained on",
    }
    for name, value in here.items():
        if name in trained and not agree(name, trained[name], value):
            named = f" ({trained.get('model')} against {store.config['model']})" if name == "weights_sha256" else ""
            raise CheckpointError(
                f"{where}: trained on {words.get(name, name)} {trained[name]!r}, store {store.where} has {value!r}{named}; "
                f"use the store it was trained on{hints.get(name, '')}"
            )


def require_module(checkpoint: Checkpoint, found: str) -> None:
    """Raise CheckpointError for an SAE made elsewhere of the output of a module that is not the one, called `found`, whose output
    the store's rows are: on some models a norm stands between an MLP's module and the stream."""
    trained = checkpoint.made_for
    if not is_module(trained, found):
        raise CheckpointError(
            f"{checkpoint.path}: trained on the output of {trained['module']!r}; in this model {trained['hook']}, what is added "
            f"to the stream, is that of {found!r}, another point"
        )


def require_kind(checkpoint: Checkpoint, has_target: bool) -> None:
    """Raise CheckpointError for a transcoder without the store of what it makes, and for an SAE beside one."""
    if checkpoint.sae.is_transcoder and not has_target:
        raise CheckpointError(
            f"{checkpoint.path}: is a transcoder; give the store of the rows that it reads as --store, of those that it makes "
            "as --target"
        )
    if has_target and not checkpoint.sae.is_transcoder:
        raise CheckpointError(f"{checkpoint.path}: is an SAE, which makes the rows that it reads; leave --target out")


def agree(name: str, one: object, other: object) -> bool:
    """Whether two values mean the same; models are compared by the last part of their name, in any case."""
    if name != "model" or not isinstance(one, str) or not isinstance(other, str):
        return one == other
    first, second = ({"gpt2-small": "gpt2"}.get(short, short) for short in map(short_name, (one, other)))
    return first == second


def short_name(model: str) -> str:
    """google/gemma-2-2b and /models/Gemma-2-2B/ as gemma-2-2b."""
    return model.rstrip("/").rpartition("/")[2].casefold()


def resolve_levels(levels: str, checkpoint: Checkpoint) -> list[int]:
    """Indices, innermost first, that `all`, `last` or a list like 0,1 means for a checkpoint.

    Indices that a flatter SAE does not have are left out. Raises CheckpointError when none is left.
    """
    n = checkpoint.sae.n_levels
    if levels in ("all", "last"):
        return list(range(n)) if levels == "all" else [n - 1]
    chosen = sorted({int(part) for part in levels.split(",")})
    if not (had := [level for level in chosen if level < n]):
        raise CheckpointError(f"{checkpoint.path}: has levels 0 to {n - 1}, --levels {levels} names none of them")
    return had


def valid_levels(levels: str) -> bool:
    """Whether a text is `all`, `last` or a list of indices."""
    return levels in ("all", "last") or re.fullmatch(r"\d+(,\d+)*", levels) is not None


def loss_curve(checkpoint: Checkpoint) -> dict[str, list[Any]]:
    """The run's logged metrics up to the checkpoint's step, thinned to MAX_CURVE points that keep the first and the last.

    Columns by name, null where a line lacks one; empty when no metrics.jsonl lies beside the checkpoint. A last line cut
    short by a running training is left out. Raises DamagedError for a broken line elsewhere, or a file that cannot be read.
    """
    path = checkpoint.path.parent.parent / "metrics.jsonl"
    if not path.exists() or is_foreign(checkpoint.path):
        return {}
    try:
        text = read_bytes(path).split(b"\n")
    except OSError as error:
        raise DamagedError(f"{path}: cannot be read ({error.strerror}); restore it or move it away") from error
    lines = [
        read_line(path, i, line) for i, line in enumerate(text[:-1]) if line
    ]  # what follows the last \n is unfinished
    lines = [line for line in lines if line["step"] <= checkpoint.step]
    if len(lines) > MAX_CURVE:
        lines = [lines[round(i * (len(lines) - 1) / (MAX_CURVE - 1))] for i in range(MAX_CURVE)]
    names = dict.fromkeys(name for line in lines for name in line)
    return {name: [line.get(name) for line in lines] for name in names}


def read_line(path: Path, number: int, line: bytes) -> dict[str, Any]:
    """One line of a JSON lines file: an object of finite numbers with a step."""
    try:
        data: dict[str, Any] = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DamagedError(
            f"{path}: line {number + 1} is not JSON ({error}); restore it or train the member again"
        ) from error
    where = path.with_name(f"{path.name}: line {number + 1}")
    require_plain(where, data)
    Fields(where, data).whole("step")
    return data
