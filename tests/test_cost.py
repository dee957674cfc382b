"""Estimates before a job: what they count. How near they are is a matter of benchmarks, not of tests."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from pipeline.model.cost import measure_forward, small_model
from pipeline.model.split_lm import ModelInfo
from pipeline.store.layout import SplitLayout
from pipeline.store.reader import Store
from train import plan
from train.config import RECIPES, TrainConfig
from train.folder import Folder
from train.plan import Task

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")


def test_flop_counts_multiplied_weights() -> None:
    """Two operations a weight that is multiplied: those of a layer's own, and the unembedding's."""
    name = str(ROOT / "data/tiny-gemma2")
    info = ModelInfo.read(name)
    cost = measure_forward(info, "float32", CPU, 2, 16, "eager")
    model = AutoModelForCausalLM.from_pretrained(name)
    each = sum(p.numel() for p in model.model.layers[0].parameters())
    assert cost.prefix(3)[0] == 4 * 2 * each
    assert cost.suffix(3)[0] == (info.n_layers - 4) * 2 * each + 2 * model.lm_head.weight.numel()
    assert 0 < cost.prefix(0)[1] < cost.prefix(3)[1]
    assert cost.suffix(5)[1] == cost.head_seconds


def test_measured_model_reads_no_weight() -> None:
    """The model that is timed is made from the config, on no device, with hardly any vocabulary."""
    small = small_model(ModelInfo.read(str(ROOT / "data/tiny-gemma2")), 2, "eager", trust_remote_code=False)
    assert {p.device.type for p in small.parameters()} == {"meta"}
    assert small.get_input_embeddings().weight.shape[0] == 8
    assert len(small.model.layers) == 2


def test_seeds_are_one_kind(tiny_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of each kind of member is measured once; what is left of each member is multiplied by it."""
    timed: list[TrainConfig] = []
    monkeypatch.setattr(plan, "step_seconds", lambda config, *_: timed.append(config) or config.k)
    rows: SplitLayout = Store.open(tiny_store).train.shape
    base = RECIPES["batchtopk"](k=4, width=32, steps=10)
    members = [base, dataclasses.replace(base, seed=1), dataclasses.replace(base, k=8)]
    tasks = [Task(Folder(tmp_path, c, {}), {"mode": "global"}, 4, False) for c in members]
    finished = Task(Folder(tmp_path, dataclasses.replace(base, k=2), {}), {"mode": "global"}, 10, True)
    assert plan.estimate_seconds(rows, [*tasks, finished], CPU) == 6 * (4 + 4 + 8)
    assert sorted(config.k for config in timed) == [4, 8]
