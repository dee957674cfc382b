"""Architectures of all kinds, tiny and random: each is cut exactly, or refused in one line before a store is begun."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import harvest.run
from pipeline.base.errors import ModelError
from pipeline.model import trial
from pipeline.model.specials import plain_token
from pipeline.model.split_lm import ModelInfo, SplitLM, require_complete
from support import sweep_models, tiny_models
from support.harvests import harvest_config

pytestmark = pytest.mark.usefixtures("one_thread")

CUT = ("mixtral", "gemma3", "opt", "mamba", "bert", "granite", "zamba2", "modernbert-decoder")
"""A mixture of experts, a multimodal wrapper, a projected head, a state-space model, an older family, scaled logits, layers that
share weights, a head that is called the decoder."""


@pytest.mark.parametrize("kind", CUT)
def test_other_kinds_are_cut_exactly(kind: str, tmp_path: Path) -> None:
    """Prefix, suffix and head, each loaded by itself, give the whole model's logits bit for bit."""
    sweep_models.build(kind, tmp_path)
    assert sweep_models.verdict(tmp_path)[0] == "equal"


@pytest.mark.parametrize(
    ("kind", "says"), [("gemma3n_text", "a layer returns"), ("rwkv", "do not run without the others")]
)
def test_uncuttable_kinds_are_refused(kind: str, says: str, tmp_path: Path) -> None:
    """A stream that is no [seq, pos, d_model], and layers that reach for later ones, are refused in one line."""
    sweep_models.build(kind, tmp_path)
    verdict, said = sweep_models.verdict(tmp_path)
    assert verdict == "refused"
    assert says in said


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("musicgen", "its config has several language models"),
        ("gemma4_assistant", "cannot be loaded"),
        ("blt", "its config has no num_hidden_layers"),
    ],
)
def test_unreadable_kinds_are_refused(kind: str, says: str) -> None:
    """Kinds that are no one stack of layers, or that transformers itself makes no model of, are refused in one line."""
    [(_, verdict, said)] = sweep_models.sweep([kind])
    assert verdict == "refused"
    assert says in said


def test_gemma4_is_cut_exactly(tmp_path: Path) -> None:
    """A model that adds something of each token in every layer is cut exactly: the suffix is given the tokens."""
    sweep_models.build("gemma4", tmp_path)
    assert sweep_models.verdict(tmp_path)[0] == "equal"


def test_later_layers_names_are_no_adapter(tmp_path: Path) -> None:
    """Parts named like an adapter in layers that are left out are no reason to refuse; in layers that run they are."""
    report = {"unexpected_keys": ["model.layers.3.lora_A.weight"]}
    require_complete("m", report, ("model.layers.3.",))
    with pytest.raises(ModelError, match=r"layers\.3\.lora_A"):
        require_complete("m", report, ("model.layers.2.",))


@pytest.mark.slow
@pytest.mark.parametrize("kind", MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
def test_every_kind_is_equal_or_refused(kind: str) -> None:
    """Every causal LM that transformers can build is cut exactly or refused in one line."""
    [(_, verdict, said)] = sweep_models.sweep([kind])
    assert verdict in ("equal", "refused"), said


def leaking(lm: SplitLM) -> SplitLM:
    """The same model, its last layer now reading the input of its second one beside the stream."""
    seen: list[torch.Tensor] = []
    second, last = lm._blocks[1], lm._blocks[-1]
    second.register_forward_hook(lambda _m, args, _out: seen.__setitem__(slice(None), [args[0]]))
    last.register_forward_hook(lambda _m, _args, out: out + seen[0])
    return lm


def test_other_paths_are_noticed(tmp_path: Path) -> None:
    """A later layer that reads more than the residual stream makes the cut refused."""
    folder = str(tiny_models.make_model(tmp_path / "model", "llama"))
    lm = SplitLM.load(folder, dtype="float32", part="whole", layers=[1])
    trial.try_split(lm, [0, 1, 2, 3])
    with pytest.raises(ModelError, match=r"cannot be cut at layer 1: .* other logits than the whole model"):
        trial.try_split(leaking(lm), [1])


def test_failing_suffix_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a suffix raises in the trial is one line."""
    lm = SplitLM.load(str(tiny_models.make_model(tmp_path / "model", "llama")), part="whole", layers=[1])

    def fail(*_args: Any) -> None:
        raise AttributeError("no router_logits\nmore")

    monkeypatch.setattr(SplitLM, "suffix", fail)
    with pytest.raises(ModelError, match=r"cut at layer 1 \(AttributeError: no router_logits\)$"):
        trial.try_split(lm, [1])


def test_refused_before_a_store_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Harvest tries the cut before it begins a store; one that goes on is not tried again."""
    model, corpus = tiny_models.make_model(tmp_path / "lm", "llama"), tiny_models.make_corpus(tmp_path / "corpus.jsonl")
    config = harvest_config(model, corpus, tmp_path / "acts.zarr")

    def refuse(*_args: Any, **_kwargs: Any) -> bool:
        raise ModelError("cannot be cut")

    with monkeypatch.context() as patch:
        patch.setattr(harvest.run, "try_model", refuse)
        with pytest.raises(ModelError, match="cannot be cut"):
            harvest.run.run(config, quiet=True)
    assert not (tmp_path / "acts.zarr").exists()
    harvest.run.run(config, quiet=True)
    monkeypatch.setattr(harvest.run, "try_model", refuse)
    harvest.run.run(config, quiet=True)


def test_too_large_is_not_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that does not fit whole is not tried, and this is told."""
    info = ModelInfo.read(str(tiny_models.make_model(tmp_path, "llama")))
    cpu = torch.device("cpu")
    assert trial.try_model(info, [1], "float32", cpu, "eager")
    monkeypatch.setattr(trial, "available_memory", lambda: 1000)
    assert not trial.try_model(info, [1], "float32", cpu, "eager")


def test_square_head_is_found(tmp_path: Path) -> None:
    """The head is found where the vocabulary is as wide as the residual stream, so that layers have modules of its shape."""
    folder = tiny_models.make_model(tmp_path, "llama", hidden_size=tiny_models.VOCAB, intermediate_size=64)
    lm = SplitLM.load(str(folder), dtype="float32", part="whole", layers=[1])
    assert lm.unembedding is lm.model.lm_head.weight
    trial.try_split(lm, [1])


def test_trial_uses_plain_tokens(tmp_path: Path) -> None:
    """The trial's tokens are none that the config names."""
    lm = SplitLM.load(str(tiny_models.make_model(tmp_path, "gpt2")), part="whole", layers=[1])
    assert plain_token(lm.config, lm.vocab) == 0
    assert not torch.isin(trial.trial_tokens(lm), torch.tensor([1, 2])).any()


def test_lens_needs_a_norm_alone(tmp_path: Path) -> None:
    """No logit lens where more than a norm stands before the head."""
    lm = SplitLM.load(str(tiny_models.make_model(tmp_path, "llama")), dtype="float32", part="whole", layers=[1])
    assert lm.readout() is not None
    lm.model.model.norm.register_forward_hook(lambda _m, _args, out: out + out.roll(1, -1))
    assert lm.readout() is None
