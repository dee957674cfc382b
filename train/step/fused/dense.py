"""The large products over all latents, and the passes between those of the backward."""

from __future__ import annotations

import torch

from train.step.fused import auxiliary, sparse
from train.step.fused.backward import b_dec_gradient, latents_backward
from train.step.fused.context import Step


def decode(step: Step) -> None:
    """Every prefix from the one before it."""
    w_dec = step.member.adam.low["W_dec"]
    step.decoded = step.take("decoded", len(step.terms.sizes), step.n_rows, step.d_model)
    for i, block in enumerate(step.terms.blocks):
        if i == 0:
            torch.mm(step.z[:, block], w_dec[block], out=step.decoded[0])
        else:
            torch.addmm(step.decoded[i - 1], step.z[:, block], w_dec[block], out=step.decoded[i])


def backward(step: Step) -> None:
    """Gradients of all weights: matrices in the products' dtype, vectors in float32, one behind the other."""
    low, reducer = step.member.adam.low, step.member.reducer
    step.gradients = step.take("gradients", 2, step.width * step.d_model)
    step.w_dec = step.gradients[0].view(step.width, step.d_model)
    by_latent = step.member.is_sparse  # how W_enc lies in memory
    step.w_enc = step.gradients[1].view((step.width, step.d_model) if by_latent else (step.d_model, step.width))
    dz = step.take_dz()
    for block, gradient in zip(step.terms.blocks, step.decoded):
        torch.mm(step.z[:, block].T, gradient, out=step.w_dec[block])
    auxiliary.backward(step)
    reducer.add_whole(step.w_dec)
    for block, gradient in zip(step.terms.blocks, step.decoded):
        torch.mm(gradient, low["W_dec"][block].T, out=dz[:, block])
    latents_backward(step, dz)
    if by_latent:
        reducer.product(dz.T, step.x_low, out=step.w_enc)
        sparse.b_dec_gradient(step)
    else:
        reducer.product(step.x_low.T, dz, out=step.w_enc)
        b_dec_gradient(step)
