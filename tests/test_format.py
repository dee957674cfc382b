"""FORMAT.md against real files, read with nothing of ours: bytes, json, hashlib, zarr, safetensors."""

import dataclasses
import hashlib
import json
import re
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest
import safetensors
import torch
import zarr
from safetensors.torch import load_file

from pipeline.sae.checkpoint import save_checkpoint
from pipeline.sae.config import SAEConfig
from pipeline.sae.nested import NestedSAE
from pipeline.store.moments import Statistics

PAGE = (Path(__file__).parents[1] / "pipeline" / "FORMAT.md").read_text()
SIZES = {"context": 16, "d_model": 64, "n_sequences": 152, "n_rows": 2432, "n_shards": 3, "n_slots": 8}
CHUNK_NBYTES = 128 * 64 * 2


def section(title: str) -> str:
    """The text of one section of the page."""
    return PAGE.split(f"\n## {title}")[1].split("\n## ")[0]


def listed_fields(title: str, heading: str) -> list[str]:
    """The names in the first column of the table below a heading, several in one cell too."""
    table = section(title).split(heading)[1].split("| --- |")[-1]
    rows = re.findall(r"^\| ([a-z_0-9, ]+) \|", table, re.MULTILINE)
    return [name.strip() for row in rows if row != "field" for name in row.split(",")]


def canonical(data: Any) -> bytes:
    """Canonical JSON as the page defines it."""
    return json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def attributes(tiny_store: Path) -> dict[str, Any]:
    """The attributes of the root group, as any Zarr reader shows them."""
    return dict(zarr.open_group(tiny_store, mode="r").attrs)


@pytest.fixture
def train(tiny_store: Path) -> dict[str, Any]:
    """The arrays of the training split, as any Zarr reader shows them."""
    group = zarr.open_group(tiny_store, mode="r")["train"]
    assert isinstance(group, zarr.Group)
    return dict(group.arrays())


def test_arrays_are_those_of_the_page(tiny_store: Path) -> None:
    """The arrays are those of the page."""
    listed = re.findall(r"^ +(\w+) +(u?int\d+|float\d+) +\(([^)]*)\)", section("Store"), re.MULTILINE)
    assert [name for name, _, _ in listed] == ["tokens", "special", "resid", "norm", "moments", "commit", "mean"]
    group = zarr.open_group(tiny_store, mode="r")
    for name, dtype, shape in listed:
        array = group["mean" if name == "mean" else f"train/{name}"]
        expected = tuple(sum_of(term) for term in shape.split(",") if term.strip())
        assert (str(array.dtype), array.shape) == (dtype, expected), name


def sum_of(term: str) -> int:
    """The value of `n_rows`, `3` or `2 + d_model`."""
    return sum(SIZES[part.strip()] if part.strip() in SIZES else int(part) for part in term.split("+"))


def test_attributes_are_those_of_the_page(attributes: dict[str, Any]) -> None:
    """The attributes are those of the page."""
    assert sorted(attributes) == sorted(listed_fields("Store", "**Attributes**"))
    statistics = re.search(r"when complete: ([^|(]+)", section("Store"))
    assert statistics is not None
    listed = [name.strip() for name in statistics[1].split(",")]
    assert listed == [field.name for field in dataclasses.fields(Statistics)] == list(attributes["statistics"])


def test_config_fields_are_of_the_page(attributes: dict[str, Any]) -> None:
    """The config has every field of the page."""
    row = re.search(r"\| config \| what fixes the bytes: (.*) \|", section("Store"))
    assert row is not None
    listed = [name.strip() for name in re.sub(r"\([^)]*\)", "", row[1]).split(",")]
    assert sorted(attributes["config"]) == sorted(listed)


def test_hashes_are_as_the_page_says(tiny_store: Path, attributes: dict[str, Any]) -> None:
    """Hashes are as the page says."""
    group = zarr.open_group(tiny_store, mode="r")
    for split in ("train", "eval"):
        assert attributes["tokens_sha256"][split] == sha256(group[f"{split}/tokens"][:].astype("<i4").tobytes())
        assert attributes["special_sha256"][split] == sha256(group[f"{split}/special"][:].tobytes())
        again = {"segments": attributes["segments"]} if split == "train" else {}
        assert dict(group[split].attrs) == {"config_sha256": sha256(canonical(attributes["config"]))} | again
        (tokens,), (special,) = (attributes["groups"][split][name] for name in ("tokens", "special"))
        assert [tokens, special] == [attributes[f"{name}_sha256"][split] for name in ("tokens", "special")]  # one group
        commit = sha256((tiny_store / split / "commit/c/0/0").read_bytes())
        assert attributes["committed"][split] == {"commit": [commit]}
    assert attributes["statistics"]["mean_sha256"] == sha256(group["mean"][:].astype("<f8").tobytes())
    named = {"config": attributes["config"], "tokens_sha256": attributes["tokens_sha256"]}
    assert attributes["id"] == sha256(canonical(named))
    first = {
        split: {name: attributes[f"{name}_sha256"][split] for name in ("tokens", "special")}
        for split in ("train", "eval")
    }
    assert attributes["origin"] == sha256(canonical({"config": attributes["config"], "first": first}))
    assert attributes.pop("seal") == sha256(canonical(attributes))


def test_every_nested_zarr_json_is_hashed(tiny_store: Path, attributes: dict[str, Any]) -> None:
    """Every zarr.json below the root is hashed."""
    found = {str(p.relative_to(tiny_store)): sha256(p.read_bytes()) for p in tiny_store.rglob("*/zarr.json")}
    assert attributes["files"] == found
    assert len(found) == 2 + 1 + 2 * 6


def test_zarr_json_is_of_json_dumps(tiny_store: Path) -> None:
    """Every zarr.json is the bytes of json.dumps."""
    for path in tiny_store.rglob("zarr.json"):
        assert path.read_bytes() == json.dumps(json.loads(path.read_bytes()), indent=2).encode()


def test_fill_values_are_never_data(train: dict[str, Any]) -> None:
    """Fill values are never data."""
    fills = {name: array.fill_value for name, array in train.items()}
    bits = np.array([fills.pop("resid")], np.uint16).view(np.int16)
    assert torch.from_numpy(bits).view(torch.bfloat16).isnan().all()
    assert all(np.isnan(fills.pop(name)) for name in ("norm", "moments"))
    assert fills == {"tokens": -1, "special": 255, "commit": 0}


def test_shard_is_chunks_and_an_index(tiny_store: Path, train: dict[str, Any]) -> None:
    """A shard is chunks with their CRC32C and an index."""
    data = (tiny_store / "train/resid/c/2/0").read_bytes()  # the ragged one: 384 rows, 3 of 8 chunks
    body, index = data[: 3 * (CHUNK_NBYTES + 4)], data[3 * (CHUNK_NBYTES + 4) :]
    for i in range(3):
        chunk = body[i * (CHUNK_NBYTES + 4) :][: CHUNK_NBYTES + 4]
        assert google_crc32c.value(chunk[:-4]) == int.from_bytes(chunk[-4:], "little")
        rows = np.frombuffer(chunk[:-4], "<u2").reshape(128, 64)
        assert np.array_equal(rows, train["resid"][2048 + 128 * i : 2048 + 128 * (i + 1)])
    entries = np.frombuffer(index[:-4], "<u8").reshape(8, 2)
    assert entries[:3].tolist() == [[i * (CHUNK_NBYTES + 4), CHUNK_NBYTES + 4] for i in range(3)]
    assert (entries[3:] == 2**64 - 1).all()
    assert google_crc32c.value(index[:-4]) == int.from_bytes(index[-4:], "little")


def test_commit_record_is_tags_and_digests(tiny_store: Path, train: dict[str, Any], attributes: dict[str, Any]) -> None:
    """A commit record says in its upper halves whose it is, has the digests below, and what each chunk is."""
    norm = np.frombuffer((tiny_store / "train/norm/c/0").read_bytes()[:-4], "<f4").reshape(3, 1024)
    for k, n_chunks in enumerate((8, 8, 3)):
        resid = (tiny_store / f"train/resid/c/{k}/0").read_bytes()
        ends = [(i + 1) * (CHUNK_NBYTES + 4) for i in range(n_chunks)]
        crcs = [int.from_bytes(resid[end - 4 : end], "little") for end in ends]
        chunks = [2**32 * (CHUNK_NBYTES + 4) + crc for crc in crcs] + [0] * (8 - n_chunks)
        assert train["commit"][k, 3:].tolist() == chunks
        digests = [google_crc32c.value(np.array(chunks, "<u8").tobytes())]
        for part in (norm[k], train["moments"][k].astype("<f8")):
            digests.append(google_crc32c.value(google_crc32c.value(part.tobytes()).to_bytes(4, "little")))
        names = [f"{attributes['origin']}/train/{k}/{name}".encode() for name in ("resid", "norm", "moments")]
        tags = [google_crc32c.value(name) | 2**31 for name in names]
        assert train["commit"][k, :3].tolist() == [2**32 * tag + digest for tag, digest in zip(tags, digests)]


def test_shard_crc_says_nothing_of_rows(tiny_store: Path) -> None:
    """The CRC32C of a whole shard says nothing about its rows."""
    first, second = ((tiny_store / f"train/resid/c/{k}/0").read_bytes() for k in (0, 1))
    assert first != second
    assert google_crc32c.value(first) == google_crc32c.value(second)


def test_rows_are_positions_of_sequences(train: dict[str, Any]) -> None:
    """Rows are positions of sequences."""
    assert train["special"][:, 0].all()
    assert train["norm"][:].reshape(152, 16)[:, 0].mean() > 5 * train["norm"][:].reshape(152, 16)[:, 1:].mean()


def test_statistics_are_those_of_the_page(tiny_store: Path, train: dict[str, Any], attributes: dict[str, Any]) -> None:
    """Mean, scale and kept rows are those of the page."""
    found = attributes["statistics"]
    x = torch.from_numpy(train["resid"][:].view(np.int16)).view(torch.bfloat16).double().numpy()
    norm, special = train["norm"][:].astype(np.float64), train["special"][:].reshape(-1).astype(bool)
    assert norm == pytest.approx(np.linalg.norm(x, axis=1))
    assert found["median_norm"] == np.median(norm[~special])
    kept = ~special & (norm <= found["massive_multiple"] * found["median_norm"])
    counts = [found[name] for name in ("n_rows", "n_special", "n_massive", "n_kept")]
    assert counts == [2432, special.sum(), (~special & ~kept).sum(), kept.sum()]
    mean = zarr.open_group(tiny_store, mode="r")["mean"][:]
    assert mean == pytest.approx(x[kept].mean(0), rel=1e-9, abs=1e-9)
    assert found["scale"] == pytest.approx(np.square(x[kept] - mean).sum(1).mean() ** -0.5)
    assert found["mean_share"] == pytest.approx(np.square(mean).sum() / np.square(x[kept]).sum(1).mean())


def test_moments_are_those_of_the_page(train: dict[str, Any]) -> None:
    """Moments are those of the page."""
    x = torch.from_numpy(train["resid"][:].view(np.int16)).view(torch.bfloat16).double().numpy()
    usable = train["special"][:].reshape(-1) == 0
    for k in range(3):
        rows = x[1024 * k : 1024 * (k + 1)][usable[1024 * k : 1024 * (k + 1)]]
        expected = [len(rows), np.square(rows).sum(), *rows.sum(0)]
        assert train["moments"][k] == pytest.approx(np.array(expected), rel=1e-9, abs=1e-9)


def test_checkpoint_is_one_file(tmp_path: Path) -> None:
    """A checkpoint is one file as the page says."""
    config = SAEConfig(d_model=3, width=5, levels=(2, 5), activation="batchtopk", k=2, layernorm="pre")
    torch.manual_seed(0)
    sae = NestedSAE(config)
    torch.nn.init.normal_(sae.W_enc)
    save_checkpoint(tmp_path / "step.safetensors", sae, 7, {"member": "m"})
    tensors = load_file(tmp_path / "step.safetensors")
    text = section("Checkpoint").split("Tensors, float32:")[1].split("x_raw")[0]
    named = re.findall(r"(\w+) \[([a-z_, ]*)\]", text.replace("ln_gain,", "ln_gain [width],"))
    sizes = {"d_model": 3, "width": 5}
    expected = {name: [sizes[part.strip()] for part in shape.split(",") if part.strip()] for name, shape in named}
    assert {name: list(tensor.shape) for name, tensor in tensors.items()} == expected
    with safetensors.safe_open(tmp_path / "step.safetensors", framework="pt") as file:
        header = file.metadata()
    fixed = {"format": "nested-sae-checkpoint", "version": 1, "sae": config.to_dict(), "step": 7}
    values = fixed | {"provenance": {"member": "m"}}
    crc = google_crc32c.value(canonical(values))
    for name, tensor in sorted(tensors.items()):
        crc = google_crc32c.extend(crc, f"{name} torch.float32 {list(tensor.shape)}".encode())
        crc = google_crc32c.extend(crc, tensor.numpy().tobytes())
    assert header == {name: canonical(value).decode() for name, value in (values | {"crc32c": crc}).items()}
