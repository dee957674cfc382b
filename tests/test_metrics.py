"""Streaming moments and the explained variance that train logs and evaluate reports."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.sae.metrics import Moments, explained_variance, row_squares


def moments_of(x: torch.Tensor, sizes: list[int]) -> Moments:
    moments = Moments.zeros(x.shape[1])
    for part in x.split(sizes):
        moments.update(part)
    return moments


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6))
def test_moments_ignore_how_rows_split(sizes: list[int]) -> None:
    """Moments do not depend on how rows are split."""
    x = torch.randn(sum(sizes), 5, generator=torch.Generator().manual_seed(1))
    split, whole = moments_of(x, sizes), moments_of(x, [len(x)])
    assert float(split.n) == len(x)
    torch.testing.assert_close(split.sum_x, whole.sum_x, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(
        split.centred_sum_sq, (x.double() - x.double().mean(0)).square().sum(), rtol=1e-10, atol=1e-12
    )


def test_ev_of_a_hand_case() -> None:
    """Explained variance of a hand-computed case."""
    x = torch.tensor([[0.0, 0.0], [2.0, 0.0], [4.0, 0.0]])  # mean 2, total variance 8
    moments = moments_of(x, [3])
    x_hat = torch.tensor([[1.0, 0.0], [2.0, 0.0], [4.0, 1.0]])  # error 1 + 0 + 1
    assert float(explained_variance(row_squares(x - x_hat).sum(), moments)) == 0.75
    assert explained_variance(torch.tensor([0.0, 8.0, 16.0]), moments).tolist() == [1.0, 0.0, -1.0]


def test_mean_reconstruction_explains_nothing() -> None:
    """The mean as reconstruction explains nothing far from the origin."""
    x = (torch.randn(1000, 8, generator=torch.Generator().manual_seed(0)) + 300).float()
    moments = moments_of(x, [400, 600])
    error = row_squares(x.double() - x.double().mean(0)).double().sum()
    assert float(explained_variance(error, moments)) == pytest.approx(0, abs=1e-6)


def test_constant_rows_have_no_ev() -> None:
    """Rows that do not vary have no explained variance."""
    moments = moments_of(torch.full((7, 3), 0.1), [3, 4])
    assert math.isnan(float(explained_variance(torch.tensor(0.0), moments)))


def test_zero_weight_rows_are_left_out() -> None:
    """Rows of weight zero are left out."""
    x = torch.tensor([[1.0], [2.0], [1e6]])
    moments = Moments.zeros(1)
    moments.update(x, torch.tensor([1.0, 1.0, 0.0]))
    assert (float(moments.n), float(moments.sum_x), float(moments.sum_sq)) == (2, 3, 5)


def test_squares_of_bf16_rows_are_float32() -> None:
    """Squares of bf16 rows are float32."""
    x = torch.full((1, 4096), 1.0078125, dtype=torch.bfloat16)
    assert row_squares(x).dtype == torch.float32
    assert float(row_squares(x)) == pytest.approx(4096 * 1.0078125**2, rel=1e-6)
