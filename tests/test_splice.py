"""Splicing and its scores: bit for bit against a hooked full model, masks proven, ablations, float64 references."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from evaluate.scores.behaviour import (
    Baselines,
    Behaviour,
    Clean,
    Reference,
    TokenScores,
    behaviour_scores,
    clean_pass,
    compare,
    depends_on_position_alone,
    first_largest,
    readout_by_position,
    score_by_position,
    score_residual,
    splice,
)
from evaluate.scores.sample import Batch, Sample
from pipeline.base.errors import ModelError
from pipeline.base.runtime import numpy_rng
from pipeline.model.split_lm import SplitLM
from pipeline.store.reader import Store
from support import lm_stores, tiny_models
from support.reference import reference_behaviour

CPU = torch.device("cpu")
Made = tuple[Store, SplitLM, Any]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Made]:
    """`made(kind, dtype)`: a store, the suffix of its model, and the untouched whole model."""
    found: dict[tuple[str, str], Made] = {}

    def make(kind: str = "gemma2", dtype: str = "float32") -> Made:
        if (kind, dtype) not in found:
            folder = tmp_path_factory.mktemp("lm")
            store = lm_stores.make_lm_store(folder, dtype=dtype, kind=kind, eval_sequences=8)
            lm = SplitLM.load(str(folder / "model"), dtype=dtype, part="suffix", layers=[lm_stores.LAYER])
            whole = tiny_models.whole_model(folder / "model", store.dtype)
            found[kind, dtype] = (store, lm, whole)
        return found[kind, dtype]

    return make


def zero_ablated(lm: SplitLM, store: Store, chunk: int) -> torch.Tensor:
    """Log-probabilities by position after zero ablation."""
    return readout_by_position(lm, torch.zeros(1, store.context, lm.d_model, dtype=lm.dtype), chunk)


def batch_of(store: Store, stop: int = 8) -> Batch:
    return Sample(store, 8, 8, CPU).batch(0, stop)


def hooked_logits(whole: Any, tokens: torch.Tensor, change: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """Logits of the whole Hugging Face model with the output of layer LAYER changed by a hook."""
    layers = next(m for m in whole.get_decoder().modules() if isinstance(m, torch.nn.ModuleList))

    def hook(_module: Any, _args: Any, output: Any) -> Any:
        return change(output) if isinstance(output, torch.Tensor) else (change(output[0]), *output[1:])

    handle = layers[lm_stores.LAYER].register_forward_hook(hook)
    with torch.no_grad():
        logits: torch.Tensor = whole(input_ids=tokens, use_cache=False).logits
    handle.remove()
    return logits


def rebuilt(x: torch.Tensor) -> torch.Tensor:
    """A reconstruction of kept rows [row, d_model]."""
    return 0.3 * x + 1


@pytest.mark.parametrize(
    ("kind", "dtype"), [("gemma2", "float32"), ("gemma2", "bf16"), ("llama", "float32"), ("gpt2", "bf16")]
)
def test_spliced_logits_equal_a_hook(made: Any, kind: str, dtype: str) -> None:
    """Spliced logits equal a full forward with a hook bit for bit."""
    store, lm, whole = made(kind, dtype)
    batch = batch_of(store)

    def change(residual: torch.Tensor) -> torch.Tensor:
        new = residual.clone()
        new[batch.kept] = rebuilt(residual[batch.kept].float()).to(residual.dtype)
        return new

    ours = lm.unembed(lm.suffix(splice(batch, rebuilt(batch.x)), batch.tokens))
    assert torch.equal(ours, hooked_logits(whole, batch.tokens, change))


@pytest.mark.parametrize("kind", ["gemma2", "llama"])
def test_scores_equal_float64_reference(made: Any, kind: str) -> None:
    """Scores equal a float64 reference on the hooked model's logits."""
    store, lm, whole = made(kind)
    batch = batch_of(store)
    clean = clean_pass(lm, batch, chunk=50)
    scores = Behaviour(CPU)
    scores.update(batch, score_residual(lm, batch, clean, splice(batch, rebuilt(batch.x)), chunk=50))
    other = hooked_logits(whole, batch.tokens, lambda r: splice(batch, rebuilt(r[batch.kept].float())))
    expected = reference_behaviour(hooked_logits(whole, batch.tokens, lambda r: r), other, batch.tokens, batch.kept)
    assert scores.means(0) == pytest.approx(expected, rel=1e-5, abs=2e-7)


def test_special_positions_are_left_out(made: Any) -> None:
    """Special positions are neither spliced nor counted."""
    store, lm, _ = made()
    batch = batch_of(store)
    assert int((~batch.kept).sum()) == 8 + 3  # BOS of each, EOS in every third
    spliced = splice(batch, torch.full_like(batch.x, 7.0))
    assert torch.equal(spliced[~batch.kept], batch.residual[~batch.kept])
    assert (spliced[batch.kept] == 7).all()
    clean = clean_pass(lm, batch, 64)
    assert len(clean.p) == len(batch.x) == int(batch.kept.sum())


def test_clean_splice_changes_nothing(made: Any) -> None:
    """The clean residual spliced back changes nothing."""
    store, lm, _ = made("llama")
    batch = batch_of(store)
    clean = clean_pass(lm, batch, 64)
    scores = score_residual(lm, batch, clean, splice(batch, batch.x), 64)
    assert scores.kl.abs().max() < 2e-6
    assert torch.equal(scores.ce, clean.ce)
    assert scores.top1.eq(1).all()


def test_row_chunks_change_rounding_only(made: Any) -> None:
    """A chunk of rows changes rounding only."""
    store, lm, _ = made("llama")
    batch = batch_of(store)
    found = []
    for chunk in (1, 33, 1000):
        clean = clean_pass(lm, batch, chunk)
        found.append(score_residual(lm, batch, clean, splice(batch, rebuilt(batch.x)), chunk))
    for other in found[1:]:
        torch.testing.assert_close(other.kl, found[0].kl, rtol=1e-4, atol=2e-6)
        torch.testing.assert_close(other.ce, found[0].ce, rtol=1e-5, atol=1e-6)


def test_zero_ablation_of_gemma2_is_uniform(made: Any) -> None:
    """Zero ablation of Gemma-2 leaves a uniform distribution."""
    store, lm, _ = made("gemma2")
    batch = batch_of(store)
    clean = clean_pass(lm, batch, 64)
    zero = Behaviour(CPU)
    zero.update(batch, score_by_position(lm, batch, clean, zero_ablated(lm, store, 64), 64))
    assert zero.means(0)["ce"] == pytest.approx(math.log(lm.vocab), rel=1e-6)
    entropy = -float(clean.negative_entropy.double().mean())
    assert zero.means(0)["kl"] == pytest.approx(math.log(lm.vocab) - entropy, rel=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_zero_ablation_includes_bos(made: Any, kind: str) -> None:
    """Zero ablation zeroes every position, BOS included."""
    store, lm, whole = made(kind)
    batch = batch_of(store)
    clean = clean_pass(lm, batch, 64)
    zero = Behaviour(CPU)
    zero.update(batch, score_by_position(lm, batch, clean, zero_ablated(lm, store, 7), 64))
    other = hooked_logits(whole, batch.tokens, torch.zeros_like)
    expected = reference_behaviour(hooked_logits(whole, batch.tokens, lambda r: r), other, batch.tokens, batch.kept)
    assert zero.means(0) == pytest.approx(expected, rel=1e-5)


def count_sequences(lm: SplitLM, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """From now on: sequences of every run of the suffix."""
    run: list[int] = []
    suffix = lm.suffix

    def counted(residual: torch.Tensor, tokens: torch.Tensor | None = None) -> torch.Tensor:
        run.append(len(residual))
        return suffix(residual, tokens)

    monkeypatch.setattr(lm, "suffix", counted)
    return run


@pytest.mark.parametrize(("first", "stop", "sequences"), [(0, 8, [1, 8, 8]), (1, 3, [1, 2, 1])])
def test_mean_ablation_uses_training_mean(
    made: Any, monkeypatch: pytest.MonkeyPatch, first: int, stop: int, sequences: list[int]
) -> None:
    """Mean ablation replaces kept rows by the training mean.
    Sequences 1 and 2 have no special position but BOS, so that one suffix of one sequence serves all batches."""
    store, lm, whole = made("llama")
    batch = Sample(store, 8, 8, CPU).batch(first, stop)
    clean = clean_pass(lm, batch, 64)
    run = count_sequences(lm, monkeypatch)
    baselines = Baselines.empty(lm, store.mean, store.context, 64)
    baselines.update(batch, clean)
    baselines.n_sequences = 0  # as if the same rows came as another batch
    baselines.update(batch, clean)
    assert run == sequences  # zero ablation first

    def ablate(residual: torch.Tensor) -> torch.Tensor:
        return torch.where(batch.kept[..., None], store.mean, residual)

    clean_logits = hooked_logits(whole, batch.tokens, lambda r: r)
    expected = reference_behaviour(clean_logits, hooked_logits(whole, batch.tokens, ablate), batch.tokens, batch.kept)
    numbers = baselines.numbers(0)
    assert (numbers["kl_mean"], numbers["ce_mean"]) == pytest.approx((expected["kl"], expected["ce"]), rel=1e-5)
    assert numbers["ce_clean"] == pytest.approx(
        reference_behaviour(clean_logits, clean_logits, batch.tokens, batch.kept)["ce"], rel=1e-6
    )


def test_equal_residuals_differ_by_tokens(made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal residuals are not equal outputs where later layers look at the tokens."""
    store, lm, _ = made("llama")
    batch = Sample(store, 8, 8, CPU).batch(1, 3)
    ablated = splice(batch, store.mean.expand_as(batch.x))
    assert depends_on_position_alone(lm, batch, ablated)
    assert not depends_on_position_alone(lm, batch, batch.residual)
    suffix = lm.suffix
    monkeypatch.setattr(
        lm, "suffix", lambda residual, tokens: suffix(residual + 1e-3 * tokens[..., None] / lm.vocab, tokens)
    )
    assert not depends_on_position_alone(lm, batch, ablated)


def hand_made() -> tuple[Batch, Clean, torch.Tensor]:
    """Two rows, two tokens: p = (½, ½) then (¼, ¾), q = (0.9, 0.1) then (¼, ¾); the second row has no next token."""
    p, q = torch.tensor([[0.5, 0.5], [0.25, 0.75]]), torch.tensor([[0.9, 0.1], [0.25, 0.75]])
    clean = Clean(p, (p * p.log()).sum(1), p.argmax(1), torch.tensor([math.log(2), 0.0]))
    tokens = torch.tensor([[0, 1]])
    kept, weights = torch.ones(1, 2, dtype=torch.bool), torch.tensor([[1.0, 1.0], [0.0, 1.0]], dtype=torch.float64)
    x, group = torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64)
    return Batch(0, x[None], tokens, kept, x, weights, torch.tensor([1, -1]), group, torch.arange(2)), clean, q.log()


def test_kl_runs_clean_to_spliced() -> None:
    """KL is of clean from spliced and the last position has no CE."""
    batch, clean, log_q = hand_made()
    scores = compare(clean, slice(0, 2), log_q, batch.targets)
    kl = 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)
    assert scores.kl.tolist() == pytest.approx([kl, 0], abs=1e-6)
    assert scores.ce.tolist() == pytest.approx([-math.log(0.1), 0])
    assert scores.top1.tolist() == [1, 1]
    sums = Behaviour(CPU)
    sums.update(batch, scores)
    assert sums.means(0) == pytest.approx({"kl": kl / 2, "ce": -math.log(0.1), "top1": 1})
    without = sums.means(1)  # the only row with a next token is massive here
    assert without["kl"] == pytest.approx(0, abs=1e-6)
    assert math.isnan(without["ce"])


def test_scores_are_shares_of_ablation() -> None:
    """Scores are shares of what ablation destroys."""
    spliced = Behaviour(CPU)
    batch, _, _ = hand_made()
    spliced.update(batch, TokenScores(torch.tensor([1.0, 1.0]), torch.tensor([3.0, 0.0]), torch.tensor([1.0, 0.0])))
    baselines = {"kl_zero": 4.0, "kl_mean": 2.0, "ce_clean": 2.0, "ce_zero": 6.0, "ce_mean": 3.0, "entropy": 1.0}
    assert behaviour_scores(spliced, baselines, 0) == {
        "kl_nats": 1.0,
        "kl_score": 0.75,
        "kl_score_mean": 0.5,
        "ce": 3.0,
        "ce_score": 0.75,
        "ce_score_mean": 0.0,
        "top1": 0.5,
    }


def test_nothing_to_recover_is_undefined() -> None:
    """A score without anything to recover is undefined."""
    spliced = Behaviour(CPU)
    batch, _, _ = hand_made()
    spliced.update(batch, TokenScores(torch.ones(2), torch.ones(2), torch.ones(2)))
    baselines = {"kl_zero": 0.0, "kl_mean": 0.0, "ce_clean": 3.0, "ce_zero": 2.0, "ce_mean": 3.0, "entropy": 1.0}
    scores = behaviour_scores(spliced, baselines, 0)
    assert [scores[name] for name in ("kl_score", "kl_score_mean", "ce_score", "ce_score_mean")] == [None] * 4


def test_infinite_clean_output_is_an_error(made: Any) -> None:
    """A model whose clean output is not finite on any batch is an error when it is asked for."""
    store, lm, _ = made()
    batch = batch_of(store)
    reference = Reference.of(lm, store.mean, store.context, 64, len(batch.index))
    reference.clean_pass(batch)
    reference.require_finite()
    residual = batch.residual.clone()
    batch.residual[0, 3] = math.nan
    reference.clean_pass(batch)
    batch.residual.copy_(residual)
    reference.clean_pass(batch)
    with pytest.raises(ModelError, match="clean model's log-probabilities are not finite"):
        reference.require_finite()


@given(st.integers(1, 2000), st.integers(1, 6), st.integers(0, 99))
def test_first_largest_is_argmax(vocab: int, n_rows: int, seed: int) -> None:
    """The first largest is argmax, ties and ragged ends included."""
    values = torch.from_numpy(numpy_rng("largest", seed, vocab).integers(0, 4, (n_rows, vocab)).astype("float32"))
    values[0] = 1.0
    assert first_largest(values).tolist() == [row.index(max(row)) for row in values.tolist()]
