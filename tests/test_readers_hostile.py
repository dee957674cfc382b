"""Every other format that is read, one file of it mutated: what is read ends, or is refused in one line that names it.

Stores, checkpoints, results, latent pages, corpora, probing's texts and experiment files have fuzzers of their own, which know
more of them: test_*_hostile and test_datasets.
"""

from __future__ import annotations

import contextlib
import io
import json
import random
import re
import shutil
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from evaluate.checkpoints.find import find_checkpoints, loss_curve, open_checkpoint
from evaluate.explain.answers import label_of, read_answers, verdicts_of
from evaluate.latents.files import read_labels, write_labels
from harvest.plan import architecture
from harvest.steps import Note, Share, read_notes
from harvest.truth.spec import SHIPPED, load_spec
from pipeline.base.digests import require_digests, sealed, write_digests, write_vouched
from pipeline.base.errors import explain
from pipeline.base.files import hash_file
from pipeline.experiment.describe import describe
from pipeline.experiment.experiment import is_complete
from pipeline.experiment.verify import verify
from pipeline.imports.sources import FORMATS as SOURCES
from pipeline.imports.sources import Asked
from pipeline.model.split_lm import ModelInfo, load_tokenizer
from pipeline.sae.export import export
from pipeline.sae.foreign.reader import load_sae
from pipeline.sae.hub import model_card, read_results
from pipeline.store.backend import LocalFiles
from pipeline.watch import page, table, watched
from support import saved_rows, tiny_models
from support.fuzzing import BAD, as_bytes, hurt, mutated
from support.results_files import write_results
from support.stores import make_store
from support.train_crasher import small
from test_foreign import (
    dictionary,
    gemma_scope_2,
    matryoshka_sae,
    openai,
    saelens,
    saelens_transcoder,
    scope_transcoder,
    weights,
)
from test_store_hostile import SIZES
from train.dry_run import planned_rows
from train.extend import siblings
from train.folder import Folder
from train.plan import RunConfig
from train.run import run as train

F, D = 96, 64
ODD: tuple[Any, ...] = (
    torch.zeros(0), torch.zeros(()), torch.zeros(3), torch.zeros(2, 3), torch.full((F,), float("nan")), torch.tensor(-7),
    torch.zeros(F, dtype=torch.int64), torch.zeros(D, F), torch.zeros(F, D, dtype=torch.bool), torch.full((D,), 1e38),
    torch.zeros(F, D, dtype=torch.complex64), torch.zeros(F, D).to_sparse(), torch.zeros(1).expand(F),
    torch.zeros(F, D).half(), torch.zeros(0, F),
)  # fmt: skip
"""Tensors that are not what a format says."""


@dataclass(frozen=True)
class Format:
    """make: writes one into a folder that is not there, returns what is read; read: everything that reads it, each alone, since
    what one refuses the next might not; files: which of its files are mutated; n: how many in the suite, of which `least` are
    refused, so that the test is seen to mutate."""

    make: Callable[[Path], Path]
    read: tuple[Callable[[Path], object], ...]
    files: str = ".*"
    least: int = 100
    n: int = 300


def harmed(path: Path, whole: bytes, rng: random.Random) -> bytes:
    """A file's bytes mutated: as what its ending says it is, mostly, so that the harm gets past the first look."""
    if rng.random() < 0.1:
        return hurt(whole, rng)
    if path.suffix == ".json":
        data = mutated(json.loads(whole), rng)
        if isinstance(data, dict) and "seal" in data and rng.random() < 0.8:
            with contextlib.suppress(ValueError):  # NaN, half a surrogate: nobody can seal that
                data = sealed({name: value for name, value in data.items() if name != "seal"})
        return as_bytes(data, rng)
    if path.suffix == ".jsonl":
        lines = whole.splitlines()
        at = rng.randrange(len(lines))
        lines[at] = as_bytes(mutated(json.loads(lines[at]), rng), rng)
        return b"\n".join(lines) + b"\n"
    if path.suffix == ".toml":
        return as_toml(mutated(tomllib.loads(whole.decode()), rng))
    if path.suffix == ".safetensors":
        n = int.from_bytes(whole[:8], "little")
        head = as_bytes(mutated(json.loads(whole[8 : 8 + n]), rng), rng)
        return len(head).to_bytes(8, "little") + head + whole[8 + n :]
    if path.suffix in (".pt", ".npz"):
        return of_tensors(path, whole, rng)
    return hurt(whole, rng)


def of_tensors(path: Path, whole: bytes, rng: random.Random) -> bytes:
    """A table of tensors, one of them, or a setting beside them, another."""
    file = io.BytesIO()
    if path.suffix == ".npz":
        arrays: dict[str, Any] = dict(np.load(io.BytesIO(whole)))
        name = rng.choice(sorted(arrays))
        arrays[rng.choice([name, "more"])] = numpy_of(rng.choice([*ODD, *BAD]))
        if rng.random() < 0.2:
            arrays.pop(name)
        np.savez(file, **arrays)
        return file.getvalue()
    state = torch.load(io.BytesIO(whole), weights_only=True)
    name = rng.choice(sorted(state))
    if isinstance(state[name], Tensor) and rng.random() < 0.8:
        state[name] = rng.choice(ODD)
    else:
        state = mutated(state, rng)
    torch.save(state, file)
    return file.getvalue()


def numpy_of(value: Any) -> Any:
    """As an array, of objects where it is nothing else."""
    if isinstance(value, Tensor):
        return value.to_dense().numpy()
    array = np.empty((), object)
    array[()] = value
    return array


def as_toml(data: Any) -> bytes:
    """Tables of a specification as TOML; a value of another kind where one of ours was."""
    if not isinstance(data, dict):
        return f"x = {toml_value(data)}\n".encode("utf-8", "surrogatepass")
    lines = [f"{toml_value(str(name))} = {toml_value(value)}" for name, value in data.items()]
    return ("\n".join(lines) + "\n").encode("utf-8", "surrogatepass")


def toml_value(value: Any) -> str:
    """A value, inline."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{toml_value(str(name))} = {toml_value(one)}" for name, one in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml_value, value)) + "]"
    return json.dumps(value) if value is not None else '""'


def fuzz(name: str, folder: Path, n: int, seed: int) -> int:
    """Read n of a format with one file mutated; how many were refused. Whatever else is raised is a traceback."""
    form, rng, refused = FORMATS[name], random.Random(seed), 0
    place = form.make(folder / "whole")
    top = folder / "whole"
    whole = {path: path.read_bytes() for path in sorted(top.rglob("*")) if path.is_file()}
    chosen = [path for path in whole if re.fullmatch(form.files, path.name)]
    for read in form.read:
        read(place)  # what is whole is read by all
    for _ in range(n):
        path = rng.choice(chosen)
        path.write_bytes(harmed(path, whole[path], rng))
        refused += any([is_refused(read, place, path, top) for read in form.read])
        path.write_bytes(whole[path])
    return refused


def is_refused(read: Callable[[Path], object], place: Path, path: Path, top: Path) -> bool:
    """Whether it was refused; if so in one line that names the file or what it belongs to."""
    try:
        read(place)
    except Exception as error:
        if (said := explain(error)) is None:
            raise
        assert "not enough memory" not in said
        assert "\n" not in said
        assert len(said) < 2000, said[:3000]
        assert str(top) in said or path.name in said, said
        return True
    return False


def problems(place: Path) -> None:
    """`verify`, and the first of what it finds."""
    found = [line for line in verify(str(place)).problems if "training is not finished" not in line]
    assert not any("\n" in line or len(line) >= 2000 for line in found)
    if found:
        raise ProblemError(found[0])


class ProblemError(OSError):
    """What `verify` found."""


# SAEs made elsewhere


def foreign(make: Callable[[Path], object]) -> Format:
    """A folder of another trainer."""

    def made(folder: Path) -> Path:
        found = make(folder)
        return found if isinstance(found, Path) else folder

    return Format(made, (open_and_card, lambda place: describe(str(place))))


def open_and_card(place: Path) -> None:
    """Read for evaluation, and as a repository's card would show it."""
    found = open_checkpoint(place)
    found.load()
    model_card(load_sae(place)[1], None, "owner/name")


def sparsify(folder: Path) -> Path:
    """Of EleutherAI."""
    w, place = weights(), folder / "layers.1"
    place.mkdir(parents=True)
    cfg = {"k": 9, "d_in": D, "num_latents": F, "multi_topk": False, "expansion_factor": 2, "normalize_decoder": True}
    (place / "cfg.json").write_text(json.dumps(cfg))
    tensors = {"encoder.weight": w["W_enc"].T.contiguous(), "encoder.bias": w["b_enc"]}
    save_file(tensors | {"W_dec": w["W_dec"], "b_dec": w["b_dec"]}, place / "sae.safetensors")
    return place


def gemma_scope(folder: Path) -> Path:
    """Of Gemma Scope: a table of arrays, the rest in its path."""
    place = folder / "gemma-scope-2b-pt-res" / "layer_20" / "width_16k" / "average_l0_71"
    place.mkdir(parents=True)
    arrays = {name: tensor.numpy() for name, tensor in weights().items()}
    np.savez(place / "params.npz", **arrays, threshold=np.linspace(0, 1, F, dtype=np.float32))
    return place


def some_saelens(folder: Path) -> Path:
    more = {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 7}, "apply_b_dec_to_input": False}
    return saelens(folder, weights(), **more)


def some_dictionary(folder: Path) -> Path:
    state = weights() | {"threshold": torch.tensor(0.3), "k": torch.tensor(20), "group_sizes": torch.tensor([16, 80])}
    return dictionary(folder, "MatryoshkaBatchTopKSAE", state, submodule_name="resid_post_layer_1")


def some_openai(folder: Path) -> Path:
    return openai(folder, weights(), activation="TopK", activation_state_dict={"k": 8, "postact_fn": "ReLU"})


def some_gemma_scope_2(folder: Path) -> Path:
    return gemma_scope_2(folder, weights(), hf_hook_point_in="model.layers.7.output", hf_hook_point_out=None)


def some_transcoder(folder: Path) -> Path:
    skip = {"W_skip": torch.zeros(D, D)}
    return saelens_transcoder(
        folder, weights() | skip | {"threshold": torch.linspace(0, 1, F)}, "jumprelu_skip_transcoder"
    )


# What this project writes


def member(folder: Path, recipe: str = "batchtopk", **more: Any) -> Path:
    """A training of one member, finished."""
    store = make_store(folder / "acts.zarr", **SIZES)
    train(RunConfig(Path(store.path), folder / "runs", (small(recipe),), "cpu", threads=1, **more))
    shutil.rmtree(folder / "acts.zarr")
    return folder / "runs"


def half(folder: Path) -> Path:
    """A member as it is while it is trained."""
    runs = member(folder, keep_state=True)
    for path in runs.glob("*/complete.json"):
        path.unlink()
    return runs


def read_members(runs: Path) -> None:
    """As evaluation finds them, and their curves."""
    found, failed = find_checkpoints([runs], all_steps=True)
    for path in found:
        loss_curve(open_checkpoint(path))
    for _, error in failed:
        raise error


def watch(runs: Path) -> None:
    """The table and the page of those who watch."""
    found = watched(runs, 0.0)
    table(found)
    page(found, str(runs), 1.0)


def go_on(runs: Path) -> None:
    """What training asks of a member that is there, and of the shorter ones beside it."""
    config = small("batchtopk")
    if str(runs) not in CONFIG_STORE:
        CONFIG_STORE[str(runs)] = json.loads(first(runs, "*/config.json").read_bytes())["store"]
    store = CONFIG_STORE[str(runs)]
    folder = Folder(runs, config, store)
    folder.recorded_order()
    folder.step()
    if folder.state_path.exists():
        state = folder.read_state()
        folder.require_metrics(state.step, state.metrics_sha256)
    list(siblings(Folder(runs, small("batchtopk", steps=46), store)))


CONFIG_STORE: dict[str, Any] = {}
"""What the store said of itself when a member was made, by its folder."""


def first(folder: Path, pattern: str) -> Path:
    """The first path of a pattern."""
    return sorted(folder.glob(pattern))[0]


def exported(kind: Any) -> Format:
    """An export with its digests."""

    def make(folder: Path) -> Path:
        runs = member(folder)
        export(first(runs, "*/checkpoints/step_000023.safetensors"), kind, folder / "out")
        shutil.rmtree(runs)
        return folder / "out"

    return Format(make, (load_sae, problems))


def pages(folder: Path) -> Path:
    """Labels beside latent pages."""
    place = folder / "a.latents"
    place.mkdir(parents=True)
    write_labels(place, {3: "rivers", 17: "<b>brackets</b>"})
    return place


def answers(folder: Path) -> Path:
    """Of a chat model, in the three forms that are read."""
    folder.mkdir()
    said = "Explanation: rivers [1, 0, 1]"
    forms: list[Any] = [
        {"custom_id": "a", "content": said},
        {"custom_id": "b", "messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": said}]},
        {"custom_id": "c", "response": {"body": {"choices": [{"message": {"content": said}}]}}},
    ]
    (folder / "answers.jsonl").write_text("".join(json.dumps(form) + "\n" for form in forms))
    return folder / "answers.jsonl"


def read_said(path: Path) -> None:
    """Answers, and what they say."""
    for text in read_answers(path).values():
        label_of(text), verdicts_of(text, 3)


def notes(folder: Path) -> Path:
    """Of parts of a harvest."""
    folder.mkdir()
    for i in range(2):
        Note(Share(i, 2), 1, ({"torch": "2", "device": "cpu"},), "node-7", i == 0).write(LocalFiles(folder))
    return folder


def listed(folder: Path) -> Path:
    """Files, and the digests of them."""
    folder.mkdir()
    (folder / "a.svg").write_text("<svg/>")
    (folder / "b.csv").write_text("a,b\n1,2\n")
    write_digests(folder / "digests.json", "report", {name: hash_file(folder / name) for name in ("a.svg", "b.csv")})
    return folder


def vouched(folder: Path) -> Path:
    """A table, and its digest beside it."""
    folder.mkdir()
    write_vouched(folder / "results.csv", b"a,b\n1,2\n")
    return folder


def planned(folder: Path) -> Path:
    """What `harvest --dry-run --json` said, for a training of stores that are not there yet."""
    store = make_store(folder / "acts.zarr", **SIZES)
    about = {"path": "acts.zarr", "config": store.config, "n_sequences": {"train": 19, "eval": 5}}
    (folder / "harvest-plan.json").write_text(json.dumps({"stores": [about], "cost": {"suffix_seconds": 1.0}}))
    return folder / "harvest-plan.json"


def root_of(folder: Path) -> Path:
    """A store's root as an experiment asks whether the store is finished."""
    store = make_store(folder / "acts.zarr", **SIZES)
    return Path(store.path)


def spec(folder: Path) -> Path:
    """Of known features."""
    folder.mkdir()
    shutil.copy(sorted(SHIPPED.glob("*.toml"))[0], folder / "own.toml")
    return folder / "own.toml"


def results(folder: Path) -> Path:
    """A results file as a repository carries it."""
    folder.mkdir()
    return write_results(folder)[0]


def results_card(path: Path) -> None:
    """What a card shows of them."""
    from pipeline.sae.hub import score_table

    score_table(read_results(path))


def model(folder: Path) -> Path:
    """A language model's folder, with the index of its weights."""
    tiny_models.make_model(folder, "gemma2")
    return folder


def read_model(folder: Path) -> None:
    """All that is read of it before weights."""
    info = ModelInfo.read(str(folder))
    assert info.n_layers * info.d_model * info.vocab * len(info.weights_sha256) > 0
    info.require_context(8)
    architecture(info, {})
    load_tokenizer(str(folder))


def saved(kind: str, make: Callable[[Path], object], **asked: Any) -> Format:
    """Rows that others saved."""

    def made(folder: Path) -> Path:
        make(folder)
        return folder

    def read(place: Path) -> None:
        source = SOURCES[kind](place, Asked(**asked))
        for _ in source.blocks(0):
            pass

    return Format(made, (read,))


MEMBER = (lambda runs: describe(str(runs)), problems, read_members, watch, go_on)
FORMATS = {
    "saelens": foreign(some_saelens),
    "dictionary_learning": foreign(some_dictionary),
    "sparsify": foreign(sparsify),
    "gemma_scope": foreign(gemma_scope),
    "gemma_scope_2": foreign(some_gemma_scope_2),
    "matryoshka": foreign(lambda folder: matryoshka_sae(folder, weights())),
    "openai": foreign(some_openai),
    "scope_transcoder": foreign(lambda folder: scope_transcoder(folder)[0]),
    "saelens_transcoder": foreign(some_transcoder),
    "exported_saelens": exported("saelens"),
    "exported_dictionary": exported("dictionary-learning"),
    "member": Format(member, MEMBER, r"config\.json|complete\.json|.*\.jsonl|.*\.sha256", 80, 100),
    "member_half": Format(half, MEMBER, r"config\.json|state\.safetensors|.*\.jsonl", 80, 100),
    "labels": Format(pages, (read_labels,)),
    "answers": Format(answers, (read_said,)),
    "notes": Format(notes, (lambda place: read_notes(LocalFiles(place)),)),
    "digests": Format(
        listed, (problems, lambda place: require_digests(place / "digests.json", place)), r"digests\.json"
    ),
    "beside": Format(vouched, (problems,)),
    "planned": Format(planned, (lambda path: planned_rows("acts.zarr", path),), r"harvest-plan\.json"),
    "root": Format(root_of, (is_complete,), r"zarr\.json", 1),
    "spec": Format(spec, (lambda path: load_spec(str(path)),)),
    "hub_results": Format(results, (results_card,), least=1),
    "model": Format(model, (read_model,), r".*\.json", 40, 100),
    "rows_npy": saved("npy", saved_rows.npy_folder),
    "rows_safetensors": saved("safetensors", saved_rows.safetensors_folder),
    "rows_saelens": saved("saelens", saved_rows.saelens_folder),
    "rows_saev": saved("saev", saved_rows.saev_folder, layer=23),
    "rows_torch": saved("dictionary-learning", saved_rows.torch_folder),
}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.filterwarnings("ignore")
def test_mutated_files_are_one_line(tmp_path: Path, name: str) -> None:
    """Some hundreds of each."""
    assert fuzz(name, tmp_path, FORMATS[name].n, seed=0) >= FORMATS[name].least


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.filterwarnings("ignore")
def test_many_mutated_files_are_one_line(tmp_path: Path, name: str) -> None:
    """Ten thousand of each."""
    assert fuzz(name, tmp_path, 10_000, seed=1) >= 10 * FORMATS[name].least
