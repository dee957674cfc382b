"""Rows that others saved become a store: the same numbers, in order, or one line that says why not."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

import pipeline
from evaluate.run import EvaluateConfig
from evaluate.run import run as evaluate
from evaluate.scores.scorer import default_scores
from pipeline.__main__ import cli
from pipeline.base.errors import DamagedError, DiskError, MismatchError, PipelineError, UsageError
from pipeline.experiment.describe import describe
from pipeline.experiment.verify import verify
from pipeline.imports.sources import Asked
from pipeline.imports.write import Import, import_files
from pipeline.store.reader import Store
from pipeline.store.writer import StoreWriter
from support.saved_rows import D, npy_folder, rows_of, saelens_folder, saev_folder, safetensors_folder, torch_folder
from support.stores import lose_shards
from train.config import batchtopk
from train.plan import RunConfig
from train.run import run as train


def all_rows(store: Store) -> Tensor:
    """Rows of both splits in the order of the source: which sequence is held out is said by FORMAT.md."""
    n, held = store.train.n_sequences + store.eval.n_sequences, store.eval.n_sequences
    parts = {s.name: s.read(0, s.n_rows).view(s.n_sequences, store.context, -1) for s in store.splits}
    out = [(i + 1) * held // n > i * held // n for i in range(n)]
    taken = {"train": iter(parts["train"]), "eval": iter(parts["eval"])}
    return torch.cat([next(taken["eval" if o else "train"]) for o in out])


def imported(kind: str, place: Path, store: Path, asked: Asked = Asked(), **changes: Any) -> Store:  # noqa: B008
    found = import_files(kind, place, Import(str(store), **changes), asked)
    assert found is not None
    return found


def contents(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


FOLDERS: dict[str, tuple[Callable[[Path], Tensor], Asked, int, str]] = {
    "npy": (npy_folder, Asked(), 4, "float32"),
    "safetensors": (safetensors_folder, Asked(), 8, "bf16"),
    "saelens": (saelens_folder, Asked(), 8, "float32"),
    "saev": (saev_folder, Asked(layer=23), 5, "float32"),
    "dictionary-learning": (torch_folder, Asked(), 8, "float32"),
}
"""Of each format: what makes a folder, what must be said beside the path, rows of a sequence, dtype of the store."""


@pytest.mark.parametrize("kind", FOLDERS)
def test_rows_of_every_format_arrive(kind: str, tmp_path: Path) -> None:
    """In order, not one number changed; nothing is wrong with the store, and it says where its rows come from."""
    make, asked, context, dtype = FOLDERS[kind]
    rows = make(tmp_path / "in")
    changes = {"context": context} if kind == "npy" else {}
    store = imported(kind, tmp_path / "in", tmp_path / "a.zarr", asked, **changes)
    assert store.context == context
    assert store.config["dtype"] == dtype
    assert torch.equal(all_rows(store), rows.to(store.dtype))
    assert verify(str(store.path)).problems == []
    said = describe(str(store.path))
    assert said["config"]["source"]["format"] == kind
    assert said["tokens_sha256"] == {}


def test_saelens_names_hook_and_specials(tmp_path: Path) -> None:
    """Layer and hook are those of the column; rows of a special token are marked."""
    saelens_folder(tmp_path / "in")
    store = imported("saelens", tmp_path / "in", tmp_path / "a.zarr", Asked(special_ids=(1000,)))
    assert (store.config["layer"], store.config["hook"]) == (3, "mlp_out")
    assert all(split.special[:, 0].all() and not split.special[:, 1:].any() for split in store.splits)


def test_saev_marks_cls_names_model(tmp_path: Path) -> None:
    """CLS, first of an example, is special; model and layer are the folder's."""
    saev_folder(tmp_path / "in")
    store = imported("saev", tmp_path / "in", tmp_path / "a.zarr", Asked(layer=23))
    assert store.statistics.n_special == store.train.n_sequences
    assert (store.config["model"], store.config["layer"]) == ("ViT-B/16", 23)


def test_older_saev_names_are_read(tmp_path: Path) -> None:
    """Protocol 1.0.0 called the same fields otherwise."""
    rows = saev_folder(tmp_path / "in")
    older = {"n_ex": "n_imgs", "d_model": "d_vit", "patches_per_ex": "n_patches_per_img", "ckpt": "vit_ckpt"}
    for name in ("metadata.json", "shards.json"):
        text = (tmp_path / "in" / name).read_text()
        for new, old in older.items():
            text = text.replace(f'"{new}"', f'"{old}"')
        (tmp_path / "in" / name).write_text(text.replace('"2.0"', '"1.0.0"'))
    assert torch.equal(all_rows(imported("saev", tmp_path / "in", tmp_path / "a.zarr", Asked(layer=23))), rows)


def spoil_nan(place: Path) -> None:
    rows = np.load(place / "acts_2.npy")
    rows[17, 2] = np.nan
    np.save(place / "acts_2.npy", rows)


def spoil_width(place: Path) -> None:
    np.save(place / "acts_2.npy", np.zeros((90, D + 1), np.float32))


def spoil_kind(place: Path) -> None:
    np.save(place / "acts_2.npy", np.zeros((90, D), np.int64))


def spoil_length(place: Path) -> None:
    data = (place / "acts_2.npy").read_bytes()
    (place / "acts_2.npy").write_bytes(data[:-5])


def spoil_pickle(place: Path) -> None:
    np.save(place / "acts_2.npy", np.array([{"a": 1}]), allow_pickle=True)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (spoil_nan, r"acts_2\.npy: row 17 holds nan"),
        (spoil_width, r"acts_2\.npy: expected rows like acts_1\.npy's, \[6\].*found \[7\]"),
        (spoil_kind, r"acts_2\.npy: expected float16, float32 or float64, found int64"),
        (spoil_length, r"acts_2\.npy: not a whole \.npy file"),
        (spoil_pickle, r"acts_2\.npy: not a whole \.npy file"),
    ],
)
def test_bad_rows_are_refused_by_name(tmp_path: Path, spoil: Callable[[Path], None], said: str) -> None:
    """One line, and no store that could be taken for whole."""
    npy_folder(tmp_path / "in")
    spoil(tmp_path / "in")
    with pytest.raises(PipelineError, match=said):
        imported("npy", tmp_path / "in", tmp_path / "a.zarr", context=4)
    with pytest.raises(PipelineError):
        Store.open(tmp_path / "a.zarr")


@pytest.mark.parametrize(
    ("kind", "change", "said"),
    [
        ("safetensors", lambda p: (p / "0.safetensors").write_bytes(b"\x08"), "not a whole safetensors file"),
        ("saev", lambda p: (p / "acts000001.bin").write_bytes(b"12"), r"acts000001\.bin: 2 bytes, expected 4 examples"),
        ("saev", lambda p: replace(p / "metadata.json", '"2.0"', '"3.0"'), "expected saev's protocol 1 or 2"),
        ("saev", lambda p: replace(p / "metadata.json", '"n_ex": 10', '"n_ex": 11'), "names 10 examples"),
        ("saev", lambda p: outside(p), "is no shard here"),
        ("saev", lambda p: replace(p / "metadata.json", '"d_model": 6', '"d_model": "6"'), "d_model"),
        ("saelens", lambda p: next(p.glob("*.arrow")).write_bytes(b"no"), "cannot be read as Arrow"),
        ("dictionary-learning", lambda p: (p / "a.pt").write_bytes(b"PK"), "not a whole file of tensors alone"),
        ("dictionary-learning", lambda p: torch.save({"x": [1]}, p / "a.pt"), "--key is needed; it holds none"),
    ],
)
def test_damaged_formats_are_one_line(tmp_path: Path, kind: str, change: Callable[[Path], Any], said: str) -> None:
    """Found when the source is opened, before a store is made."""
    make, asked, _, _ = FOLDERS[kind]
    make(tmp_path / "in")
    change(tmp_path / "in")
    with pytest.raises(PipelineError, match=said) as error:
        imported(kind, tmp_path / "in", tmp_path / "a.zarr", asked)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "a.zarr").exists()


def outside(place: Path) -> None:
    """Move a shard beside the folder, and name it there."""
    (place.parent / "x").mkdir()
    (place / "acts000001.bin").rename(place.parent / "x" / "acts000001.bin")
    replace(place / "shards.json", "acts000001.bin", "../x/acts000001.bin")


def replace(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


class Evil:
    """Leaves a file behind where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.mark,))


def test_torch_files_run_no_code(tmp_path: Path) -> None:
    """A pickle that would call something is refused, uncalled."""
    (tmp_path / "in").mkdir()
    torch.save({"states": Evil(tmp_path / "ran")}, tmp_path / "in" / "a.pt")
    with pytest.raises(DamagedError, match="not a whole file of tensors alone"):
        imported("dictionary-learning", tmp_path / "in", tmp_path / "a.zarr")
    assert not (tmp_path / "ran").exists()


def test_a_stopped_import_goes_on(tmp_path: Path) -> None:
    """Without two of its shards, the same command makes those again, from the first row that they need."""
    npy_folder(tmp_path / "in")
    sizes: dict[str, Any] = {"context": 4, "chunk_rows": 8, "shard_rows": 32}
    path = imported("npy", tmp_path / "in", tmp_path / "a.zarr", **sizes).path
    whole = contents(path)
    assert lose_shards(path, ("train", 3), ("eval", 0)).pending("train") == [3]
    assert contents(path) != whole
    imported("npy", tmp_path / "in", tmp_path / "a.zarr", **sizes)
    assert contents(path) == whole


def test_other_source_refused_at_path(tmp_path: Path) -> None:
    """A store of one folder is not gone on with from another."""
    npy_folder(tmp_path / "in")
    imported("npy", tmp_path / "in", tmp_path / "a.zarr", context=4)
    rows = np.load(tmp_path / "in" / "acts_1.npy")
    np.save(tmp_path / "in" / "acts_1.npy", rows + 1)
    with pytest.raises(MismatchError, match=r"source\.fingerprint"):
        imported("npy", tmp_path / "in", tmp_path / "a.zarr", context=4)


def test_disk_space_is_checked_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before a byte of the store is written."""
    npy_folder(tmp_path / "in")
    monkeypatch.setattr("pipeline.base.files.free_bytes", lambda path: 1000)
    with pytest.raises(DiskError, match="the store needs"):
        imported("npy", tmp_path / "in", tmp_path / "a.zarr", context=4)
    assert not (tmp_path / "a.zarr").exists()


def test_an_iterator_is_written_whole(tmp_path: Path) -> None:
    """Blocks of any size, of an iterator without end, as many rows as were asked for, and no block more."""
    asked = []

    def endless() -> Iterator[Tensor]:
        for k in range(10**9):
            asked.append(k)
            yield rows_of(k % 7 + 1, seed=k)

    store = pipeline.write_store(endless(), tmp_path / "a.zarr", n_rows=200, context=8, quiet=True)
    expected = torch.cat([rows_of(k % 7 + 1, seed=k) for k in range(80)])[:200]
    assert torch.equal(all_rows(store), expected)
    assert sum(k % 7 + 1 for k in asked[:-1]) < 200


@pytest.mark.parametrize(
    "rows", [rows_of(40, 5), rows_of(200), rows_of(200).double().numpy(), [*rows_of(200)], [*rows_of(40, 5).split(7)]]
)
def test_arrays_and_lists_are_rows(tmp_path: Path, rows: Any) -> None:
    """A tensor, an array, single rows, blocks of sequences."""
    first = rows[0] if isinstance(rows, list) else rows
    context = None if first.ndim == 3 else 5
    n_rows = 200 if isinstance(rows, list) else None
    store = pipeline.write_store(rows, tmp_path / "a.zarr", n_rows=n_rows, context=context, quiet=True)
    assert store.context == 5
    seed_rows = rows_of(40, 5).flatten(0, 1) if context is None else rows_of(200)
    assert torch.equal(all_rows(store), seed_rows)


@pytest.mark.parametrize(
    ("rows", "n_rows", "said"),
    [
        (iter([rows_of(50)]), 200, "the rows ended after 6 of 25 sequences"),
        ([rows_of(50)], 200, "200 rows are asked for, the source has 50"),
        (
            [rows_of(50), rows_of(50)[:, :5]],
            100,
            r"rows 50 and on: expected blocks of single rows of 6, found \[50, 5\]",
        ),
        ([rows_of(200) * torch.inf], 200, "row 0 holds"),
        ([rows_of(200).int()], 200, "expected floats .* found int32"),
        (["words"], 200, "expected floats|expected rows"),
        (iter([rows_of(200)]), None, "give n_rows"),
        ([], 200, "there are no rows"),
        ([rows_of(200) * 1e30], 200, "row 0 is too large for float32"),
    ],
)
def test_bad_python_rows_are_refused(tmp_path: Path, rows: Any, n_rows: int | None, said: str) -> None:
    """One line; what was begun is no store, and another call may write there."""
    with pytest.raises(PipelineError, match=said):
        pipeline.write_store(
            rows, tmp_path / "a.zarr", n_rows=n_rows, context=8, shard_rows=32, chunk_rows=8, quiet=True
        )
    with pytest.raises(PipelineError):
        Store.open(tmp_path / "a.zarr")


def test_a_failed_iterator_starts_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards of a call that failed are not kept for the next, whose rows may be others; a finished store is."""

    def fails() -> Iterator[Tensor]:
        yield rows_of(120)
        raise RuntimeError("the model broke")

    monkeypatch.setattr("pipeline.imports.write.BLOCK", 8)
    options: dict[str, Any] = {"n_rows": 160, "context": 8, "shard_rows": 32, "chunk_rows": 8, "quiet": True}
    with pytest.raises(RuntimeError, match="the model broke"):
        pipeline.write_store(fails(), tmp_path / "a.zarr", **options)
    assert StoreWriter.open(tmp_path / "a.zarr").pending("train") != list(range(5))
    store = pipeline.write_store([rows_of(160, seed=1)], tmp_path / "a.zarr", **options)
    assert torch.equal(all_rows(store), rows_of(160, seed=1))
    with pytest.raises(MismatchError, match="holds a finished store"):
        pipeline.write_store([rows_of(160, seed=2)], tmp_path / "a.zarr", **options)
    assert torch.equal(all_rows(store), rows_of(160, seed=1))


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "no space"), PermissionError(errno.EACCES, "denied"), KeyError("k")]
)
@pytest.mark.parametrize("n_before", [0, 120])
def test_an_iterators_errors_are_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, n_before: int
) -> None:
    """What an iterator raises comes through as it is, cause included, before the store is begun or in it, and is never taken for
    the disk's that is written to; what was begun is no store, and another call writes there."""

    def fails() -> Iterator[Tensor]:
        if n_before:
            yield rows_of(n_before)
        raise error from ValueError("why")

    monkeypatch.setattr("pipeline.imports.write.BLOCK", 8)
    options: dict[str, Any] = {"n_rows": 160, "context": 8, "shard_rows": 32, "chunk_rows": 8, "quiet": True}
    with pytest.raises(type(error)) as raised:
        pipeline.write_store(fails(), tmp_path / "a.zarr", **options)
    assert raised.value is error
    assert str(error.__cause__) == "why"
    with pytest.raises(PipelineError):
        Store.open(tmp_path / "a.zarr")
    assert torch.equal(all_rows(pipeline.write_store([rows_of(160)], tmp_path / "a.zarr", **options)), rows_of(160))


@pytest.mark.parametrize(
    ("make", "n_rows", "says"),
    [
        (lambda: [rows_of(50), rows_of(110)], None, "160 rows of 6, sequences of 8"),
        (lambda: (rows_of(50), rows_of(110)), 100, "64 not taken"),
        (lambda: rows_of(160), 100, "64 not taken"),
        (lambda: iter([rows_of(50), rows_of(110)]), 100, "4 not taken, nor what the iterator yields after them"),
    ],
)
def test_rows_left_out_are_announced(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], make: Callable[[], Any], n_rows: int | None, says: str
) -> None:
    """A list says itself how many rows it has; how many are not taken is said before work begins, and of an iterator that what it
    yields after them is not."""
    pipeline.write_store(make(), tmp_path / "a.zarr", n_rows=n_rows, context=8)
    assert says in " ".join(capsys.readouterr().err.split())


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with acts.zarr, written from Python, and a member trained on it in runs."""
    folder = tmp_path_factory.mktemp("rows")
    pipeline.write_store(rows_of(2000), folder / "acts.zarr", context=10, eval_rows=400, quiet=True)
    config = batchtopk(width=16, k=2, aux_k=2, steps=20, batch_size=100, seed=0)
    (outcome,) = train(RunConfig(folder / "acts.zarr", folder / "runs", (config,), device="cpu"))
    assert outcome.final is not None
    return folder


def test_rows_store_trained_and_scored(trained: Path, tmp_path: Path) -> None:
    """Every default score of it is there, and finite."""
    scores = default_scores(Store.load(trained / "acts.zarr"))
    outcome = evaluate(EvaluateConfig(store=trained / "acts.zarr", out=tmp_path, scores=scores), [trained / "runs"])
    assert not outcome.failed
    found = json.loads(Path(outcome.results[0]["path"]).read_text())
    assert scores == ("ev", "l0", "coding", "features", "structure")
    for level in found["levels"]:
        assert 0 < level["scores"]["ev"] < 1
        assert 0 < level["scores"]["l0"] < 16


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"scores": ("kl",)}, "made without a language model"),
        ({"scores": ("absorption",)}, "are of no text"),
        ({"scores": ("truth",)}, "does not know its features"),
        ({"scores": ("ev",), "latents": "all"}, "--latents: the rows of .* are of no text"),
    ],
)
def test_what_needs_text_is_refused_first(trained: Path, tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    """One line before any work."""
    with pytest.raises(UsageError, match=said):
        evaluate(EvaluateConfig(store=trained / "acts.zarr", out=tmp_path / "out", **changes), [trained / "runs"])
    assert not (tmp_path / "out").exists()


def test_an_export_invents_no_hook(trained: Path, tmp_path: Path) -> None:
    """Rows of a place that nobody named: no hook is named in the folder either, and it is read back."""
    from pipeline.sae.export import export
    from pipeline.sae.foreign.reader import read_sae
    from pipeline.sae.hub import find_checkpoint

    (folder,) = export(find_checkpoint(next((trained / "runs").iterdir())), "saelens", tmp_path / "sl", None)
    assert json.loads((folder / "cfg.json").read_text())["metadata"]["hook_name"] is None
    assert "hook" not in (read_sae(folder).provenance["store"] or {})


@pytest.mark.parametrize("command", ["neuronpedia", "inspect"])
def test_showing_text_is_refused_first(trained: Path, tmp_path: Path, command: str) -> None:
    """Without a model being looked for."""
    from evaluate.latents.neuronpedia import command as neuronpedia

    member, store = str(next((trained / "runs").iterdir())), str(trained / "acts.zarr")
    if command == "neuronpedia":
        result = CliRunner().invoke(neuronpedia, [member, "--store", store, "--out", str(tmp_path / "out")])
    else:
        result = CliRunner().invoke(cli, ["inspect", member, "--text", "hello"])
    assert isinstance(result.exception, UsageError)
    assert "of no text" in str(result.exception) or "a place that nobody named" in str(result.exception)


def test_scr_of_rows_store_refused(trained: Path, tmp_path: Path) -> None:
    """The command says it in one line, and reads no texts."""
    from evaluate.__main__ import evaluate as command

    words = [
        trained / "runs",
        "--store",
        trained / "acts.zarr",
        "--out",
        tmp_path / "out",
        "--scr",
        "LabHC/bias_in_bios",
    ]
    result = CliRunner().invoke(command, list(map(str, words)))
    assert isinstance(result.exception, UsageError)
    assert "--scores scr,tpp,k_sparse_probe: the rows of" in str(result.exception)


def test_the_import_command_writes_a_store(tmp_path: Path) -> None:
    """Options arrive; a dry run writes nothing."""
    saev_folder(tmp_path / "in")
    words = [
        "import",
        "saev",
        str(tmp_path / "in"),
        "--layer",
        "23",
        "--store",
        str(tmp_path / "a.zarr"),
        "--rows",
        "30",
    ]
    assert CliRunner().invoke(cli, [*words, "--dry-run"]).exit_code == 0
    assert not (tmp_path / "a.zarr").exists()
    result = CliRunner().invoke(cli, [*words, "--eval-rows", "7", "--model", "mine"], catch_exceptions=False)
    assert result.exit_code == 0
    store = Store.open(tmp_path / "a.zarr")
    assert (store.train.n_sequences, store.eval.n_sequences, store.config["model"]) == (4, 2, "mine")
    bad = CliRunner().invoke(cli, [*words, "--special-ids", "x"])
    assert isinstance(bad.exception, UsageError)


@pytest.mark.parametrize("kind", ["npy", "safetensors", "dictionary-learning"])
def test_pipe_among_files_is_named(tmp_path: Path, kind: str) -> None:
    """A pipe among the files of a folder is refused by name, not passed over."""
    make, asked, _, _ = FOLDERS[kind]
    make(tmp_path / "in")
    suffix = next(path.suffix for path in (tmp_path / "in").iterdir() if path.suffix != ".json")
    os.mkfifo(tmp_path / "in" / f"zz{suffix}")
    with pytest.raises(PipelineError, match=rf"zz\{suffix}: a pipe, expected a regular file"):
        imported(kind, tmp_path / "in", tmp_path / "acts.zarr", asked)
