"""Where benchmarks run, and in which dtype."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import click
import pytest
import torch

from pipeline.base.runtime import resolve_device, resolve_dtype
from pipeline.store.reader import Store

BENCH = Path(__file__).parent / "bench"
NAMES = sorted(path.stem for path in BENCH.glob("*.py") if "@click.command" in path.read_text())


@pytest.mark.parametrize("words", [[], ["--dtype", "float32", "--device", "cpu"]], ids=["auto", "given"])
@pytest.mark.parametrize("name", NAMES)
def test_benchmarks_take_device_and_dtype(
    name: str, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every benchmark is handed a device and a dtype, those of this machine unless it is told."""
    command = importlib.import_module(f"bench.{name}").main
    assert isinstance(command, click.Command)
    handed: dict[str, Any] = {}
    monkeypatch.setattr(command, "callback", lambda **options: handed.update(options))
    required = [word for option in command.params if option.required for word in (option.opts[0], str(tmp_path))]
    command.main([*words, *required], standalone_mode=False)
    device = resolve_device("cpu" if words else "auto")
    assert (handed["device"], handed["dtype"]) == (device, "float32" if words else resolve_dtype("auto", device))


@pytest.mark.parametrize("dtype", ["bf16", "float32"])
def test_stores_of_benchmarks_have_the_dtype(dtype: str, tmp_path: Path) -> None:
    """A benchmark that writes its own store writes rows of --dtype."""
    scale = importlib.import_module("bench.bench_scale")
    scale.write_store(tmp_path / "a.zarr", scale.Size(0, 2), dtype)
    importlib.import_module("bench.bench_store").write_store(tmp_path / "b.zarr", 0.0, 1, dtype)
    wanted = {"bf16": torch.bfloat16, "float32": torch.float32}[dtype]
    assert {Store.open(tmp_path / name).train.read(0, 1).dtype for name in ("a.zarr", "b.zarr")} == {wanted}
