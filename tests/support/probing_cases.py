"""Small made cases for the tests of probing scores: padded residuals with attributes in them, SAEs, draws, probes."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from evaluate.probing.ablation import Ablation, ablations
from evaluate.probing.probes import ProbedTexts
from evaluate.probing.tasks import Contrast, Draw
from evaluate.probing.texts import TextBank, pool_all, raw_decoder
from pipeline.sae.config import SAEConfig
from pipeline.sae.nested import NestedSAE

D, CONTEXT = 12, 9


def random_sae(
    seed: int = 0, d: int = D, width: int = 40, levels: tuple[int, ...] = (10, 40), **fields: object
) -> NestedSAE:
    """A random SAE with a centre and a scale, whose latents of the zero vector are not all zero."""
    rng = torch.Generator().manual_seed(seed)
    sae = NestedSAE(SAEConfig(d, width, levels, **fields))  # type: ignore[arg-type]
    sae.W_enc.data = torch.randn(d, width, generator=rng)
    sae.b_enc.data = 0.3 * torch.randn(width, generator=rng)
    sae.W_dec.data = torch.nn.functional.normalize(torch.randn(width, d, generator=rng), dim=1)
    sae.b_dec.data = 0.1 * torch.randn(d, generator=rng)
    sae.center.copy_(0.5 * torch.randn(d, generator=rng))
    sae.scale.fill_(0.4)
    if sae.config.has_threshold:
        sae.threshold.data.fill_(0.2)
    return sae.requires_grad_(False)


def padded_texts(n_texts: int, seed: int = 0, shift: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Residuals [text pos d_model] with the first and the last positions zero, and the number of real ones of each text."""
    rng = torch.Generator().manual_seed(seed)
    n_real = torch.randint(2, CONTEXT, (n_texts,), generator=rng)
    padded = torch.randn(n_texts, CONTEXT, D, generator=rng)
    if shift is not None:
        padded += shift[:, None]
    position = torch.arange(CONTEXT)
    padded[(position == 0) | (position > n_real[:, None])] = 0
    return padded, n_real


def bank_of(padded: Tensor, n_real: Tensor) -> TextBank:
    """The same texts as a bank: real positions only."""
    rows = padded[(padded != 0).any(-1)]
    return TextBank(rows, n_real, padded.shape[1] - n_real, padded.sum(1) / n_real[:, None])


def random_draw(names: tuple[str, ...], n_train: int, n_test: int, seed: int = 0) -> Draw:
    """Contrasts of random rows: training among the first n_train texts, test among the n_test after them."""
    rng = np.random.default_rng(seed)

    def contrast(first: int, n: int) -> Contrast:
        rows = first + rng.permutation(n)
        return Contrast(rows[: n // 2].astype(np.int64), rows[n // 2 :].astype(np.int64))

    return {name: (contrast(0, n_train), contrast(n_train, n_test)) for name in names}


def random_probes(draw: Draw, seed: int = 0, d: int = D) -> dict[str, tuple[Tensor, Tensor]]:
    """A random probe for each name."""
    rng = torch.Generator().manual_seed(seed)
    return {name: (torch.randn(d, generator=rng), 0.1 * torch.randn((), generator=rng)) for name in draw}


def one_ablation(sae: NestedSAE, bank: TextBank, draw: Draw, probes: dict[str, tuple[Tensor, Tensor]]) -> Ablation:
    """What the scores look at, for one seed."""
    return ablations([ProbedTexts(draw, bank.mean, probes)], pool_all([sae], bank)[0], raw_decoder(sae))[0]
