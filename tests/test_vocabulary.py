"""The pass over the vocabulary, in Triton's interpreter or on a GPU, against log-softmax, dot and argmax one after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from support.interpreter import DEVICE, put_right

pytest.importorskip("triton", reason="needs Triton: pip install triton")

from evaluate.scores import behaviour
from evaluate.scores.behaviour import (
    Clean,
    TokenScores,
    clean_rows,
    compare,
    compare_hidden,
    cross_entropy,
    first_largest,
    readout_by_position,
    score_by_position,
)
from evaluate.scores.sample import Batch
from evaluate.scores.vocabulary import clean, compared
from pipeline.model.split_lm import SplitLM

pytestmark = [pytest.mark.triton, pytest.mark.gpu] if DEVICE.type == "cuda" else pytest.mark.triton


@pytest.fixture(autouse=True, scope="module")
def interpreter() -> Iterator[None]:
    """The interpreter put right, and several blocks a row."""
    with pytest.MonkeyPatch.context() as patch:
        if DEVICE.type == "cpu":
            put_right(patch)
        patch.setattr("evaluate.scores.vocabulary.SIZE", 256)
        yield


def clean_of(n_rows: int, vocab: int) -> Clean:
    """Some distributions."""
    log_p = torch.log_softmax(3 * torch.randn(n_rows, vocab, generator=torch.Generator().manual_seed(1)), 1).to(DEVICE)
    p = log_p.exp()
    return Clean(p, (p * log_p).sum(1), p.argmax(1), -log_p[:, 0])


def assert_alike(found: TokenScores, expected: TokenScores) -> None:
    for name, tensor in vars(expected).items():
        torch.testing.assert_close(vars(found)[name], tensor, rtol=2e-5, atol=2e-5, msg=name)


@pytest.mark.parametrize("cap", [None, 5.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab", [700, 256, 3])
def test_pass_equals_its_parts(vocab: int, dtype: torch.dtype, cap: float | None) -> None:
    """KL, cross-entropy and the first of the largest; a ragged end, whole blocks, less than one; ties, a row without a target."""
    clean = clean_of(7, vocab)
    logits = (4 * torch.randn(7, vocab, generator=torch.Generator().manual_seed(0))).to(DEVICE, dtype)
    logits[2, [0, vocab - 1]] = logits.amax()
    logits[3] = 1.0
    clean.top[3] = 0
    targets = torch.tensor([0, vocab - 1, 1, 2, -1, 1, 0], device=DEVICE)
    capped = logits if cap is None else torch.tanh(logits / cap) * cap
    expected = compare(clean, slice(0, 7), torch.log_softmax(capped, 1, dtype=torch.float32), targets)
    found = TokenScores(*compared(logits, clean.p, targets, clean.top, clean.negative_entropy, cap))
    assert_alike(found, expected)
    assert found.ce[4] == 0
    assert found.top1[3] == 1


@pytest.mark.parametrize("cap", [None, 5.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab", [700, 3])
def test_clean_pass_equals_its_parts(vocab: int, dtype: torch.dtype, cap: float | None) -> None:
    """Probabilities, Σ p log p, the first of the largest, cross-entropy of the clean model: as by a log-softmax."""
    logits = (4 * torch.randn(5, vocab, generator=torch.Generator().manual_seed(0))).to(DEVICE, dtype)
    logits[2, [0, vocab - 1]] = logits.amax()
    logits[3] = 1.0
    targets = torch.tensor([0, vocab - 1, 1, 2, -1], device=DEVICE)
    capped = logits if cap is None else torch.tanh(logits / cap) * cap
    log_p = torch.log_softmax(capped, 1, dtype=torch.float32)
    p = torch.full((5, vocab), torch.nan, device=DEVICE)
    negative_entropy, top, ce = clean(logits, targets, p, cap)
    torch.testing.assert_close(p, log_p.exp(), rtol=2e-5, atol=1e-7)
    torch.testing.assert_close(negative_entropy, (log_p.exp() * log_p).sum(1), rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(ce, cross_entropy(log_p, targets), rtol=2e-5, atol=2e-5)
    assert torch.equal(top, first_largest(log_p))


def test_rows_share_logits_by_place() -> None:
    """Rows compared with logits of places, as an ablation by position has them, are compared with those places' logits."""
    clean, places = clean_of(5, 300), torch.tensor([1, 0, 1, 2, 0], device=DEVICE)
    logits, targets = torch.randn(3, 300, generator=torch.Generator().manual_seed(2)).to(DEVICE), places
    found = compared(logits, clean.p, targets, clean.top, clean.negative_entropy, None, places)
    expected = compare(clean, slice(0, 5), torch.log_softmax(logits[places], 1), targets)
    assert_alike(TokenScores(*found), expected)


def test_diverged_row_is_seen() -> None:
    """A logit that is not a number makes the row's KL so."""
    clean, logits = clean_of(2, 300), torch.zeros(2, 300, device=DEVICE)
    logits[1, 7] = torch.nan
    kl = compared(
        logits, clean.p, torch.zeros(2, dtype=torch.int64, device=DEVICE), clean.top, clean.negative_entropy, None
    )[0]
    assert kl.isfinite().tolist() == [True, False]


@pytest.mark.parametrize(("kind", "cap"), [("gemma2", True), ("gpt2", False)])
def test_cap_is_left_to_the_pass(
    lm_folder: Callable[[str], Path], kind: str, cap: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A soft cap that is bit for bit c · tanh(l / c) is taken in the pass, and the scores are those of the plain way."""
    lm = SplitLM.load(str(lm_folder(kind)), part="suffix", layers=[1], device=str(DEVICE))
    assert (lm.softcap is not None) == cap
    hidden = (20 * torch.randn(6, lm.d_model, generator=torch.Generator().manual_seed(0))).to(DEVICE, lm.dtype)
    clean, targets = clean_of(6, lm.vocab), torch.tensor([1, 2, 3, -1, 5, 6], device=DEVICE)
    whole = lm.unembed(hidden)
    if cap:
        raw = lm.unembed(hidden, capped=False)
        assert not torch.equal(raw, whole)
        assert torch.equal(torch.tanh(raw / lm.softcap) * lm.softcap, whole)
    monkeypatch.setattr(behaviour, "one_pass", lambda device: False)
    plain = compare_hidden(lm, clean, slice(0, 6), hidden, targets)
    monkeypatch.setattr(behaviour, "one_pass", lambda device: True)
    assert_alike(compare_hidden(lm, clean, slice(0, 6), hidden, targets), plain)
    assert first_largest(whole).shape == (6,)
    ways: list[tuple[Tensor, ...]] = []
    index, kept = torch.tensor([0, 2, 3, 7], device=DEVICE), torch.ones(2, 4, dtype=torch.bool)
    x, tokens, ones = hidden[:4].float(), torch.zeros(2, 4, dtype=torch.int64), torch.ones(2, 4)
    batch = Batch(0, torch.zeros(2, 4, lm.d_model), tokens, kept, x, ones, targets[:4], index, index)
    for passes in (False, True):
        monkeypatch.setattr(behaviour, "one_pass", lambda device, passes=passes: passes)
        p = torch.empty(4, lm.vocab, device=DEVICE)
        of_clean = clean_rows(lm, hidden[:4], targets[:4], p)
        same = Clean(p, *of_clean)
        readout = readout_by_position(lm, torch.zeros(1, 4, lm.d_model, dtype=lm.dtype, device=DEVICE), 3)
        scored = score_by_position(lm, batch, same, readout, 3)
        ways.append((p, *of_clean, scored.kl, scored.ce, scored.top1))
    for found, expected in zip(*ways, strict=True):
        torch.testing.assert_close(found, expected, rtol=5e-5, atol=5e-5)


def test_logits_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every logit and every clean probability is loaded once, and nothing of their length is written."""
    if DEVICE.type == "cuda":
        pytest.skip("addresses are seen in the interpreter only")
    from triton.runtime import interpreter

    n_loaded, n_stored = [0], [0]
    load, store = (getattr(interpreter.InterpreterBuilder, f"create_masked_{name}") for name in ("load", "store"))

    def create_masked_load(self: object, ptrs: Tensor, mask: Tensor, *rest: object) -> object:
        n_loaded[0] += int(mask.data.sum())
        return load(self, ptrs, mask, *rest)

    def create_masked_store(self: object, ptrs: Tensor, value: Tensor, mask: Tensor, *rest: object) -> object:
        n_stored[0] += int(mask.data.sum())
        return store(self, ptrs, value, mask, *rest)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_masked_load", create_masked_load)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_masked_store", create_masked_store)
    clean = clean_of(3, 700)
    compared(clean.p * 5, clean.p, torch.zeros(3, dtype=torch.int64), clean.top, clean.negative_entropy, None)
    assert 3 * 2 * 700 <= n_loaded[0] <= 3 * (2 * 700 + 5)
    assert n_stored[0] <= 9
