from pathlib import Path

import pytest
import torch

from pipeline.base.errors import CheckpointError, DamagedError
from pipeline.sae.checkpoint import load_checkpoint, read_header, save_checkpoint, save_tensors
from test_sae import KINDS, random_sae


@pytest.mark.parametrize("kind", KINDS)
def test_checkpoint_roundtrips_the_sae(tmp_path: Path, kind: str) -> None:
    """A checkpoint comes back as the same SAE."""
    sae, path = random_sae(KINDS[kind]), tmp_path / "a.safetensors"
    save_checkpoint(path, sae, 7, {"member": "m"})
    loaded, header = load_checkpoint(path)
    assert header == read_header(path)
    assert (header.step, header.provenance, header.sae) == (7, {"member": "m"}, sae.config)
    raw = torch.randn(5, 16)
    assert torch.equal(loaded(raw), sae(raw))


def test_saving_twice_gives_equal_bytes(tmp_path: Path) -> None:
    """Saving the same SAE twice gives the same bytes."""
    sae = random_sae(KINDS["batchtopk"])
    for name in ("a", "b"):
        save_checkpoint(tmp_path / name, sae, 7, {"z": 1, "a": [1.5, None]})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_any_flipped_byte_is_an_error(tmp_path: Path) -> None:
    """A flipped byte anywhere is an error."""
    path = tmp_path / "a.safetensors"
    save_checkpoint(path, random_sae(KINDS["relu"]), 7, {"note": "x"})
    whole = path.read_bytes()
    for position in range(0, len(whole), 53):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 0x10]) + whole[position + 1 :])
        with pytest.raises((CheckpointError, DamagedError)):
            load_checkpoint(path)


def test_truncated_checkpoint_is_an_error(tmp_path: Path) -> None:
    """A truncated checkpoint is an error."""
    path = tmp_path / "a.safetensors"
    save_checkpoint(path, random_sae(KINDS["relu"]), 7, {})
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DamagedError, match=r"a\.safetensors"):
        load_checkpoint(path)


def test_unreadable_checkpoints_are_told_apart(tmp_path: Path) -> None:
    """A missing checkpoint, an unknown version and a foreign file are told apart."""
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        load_checkpoint(tmp_path / "none.safetensors")
    save_tensors(tmp_path / "v9", {"a": torch.zeros(1)}, {"format": "nested-sae-checkpoint", "version": 9})
    with pytest.raises(CheckpointError, match="version 9 is not known"):
        load_checkpoint(tmp_path / "v9")
    save_tensors(tmp_path / "other", {"a": torch.zeros(1)}, {"format": "other", "version": 1})
    with pytest.raises(CheckpointError, match="expected a nested-sae-checkpoint"):
        load_checkpoint(tmp_path / "other")
