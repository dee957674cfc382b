"""Slow, obvious float64 versions of what the package computes fast. Each helper appends its own; none is shared."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor

from pipeline.sae.nested import NestedSAE
from train.config import TrainConfig
from train.step.member import Member

# ---- training: the objective by its formulas, for autograd ----


class Step(torch.autograd.Function):
    """H(p − θ), with the straight-through gradient for θ: −1/ε where |p − θ| < ε/2, and none for p."""

    @staticmethod
    def forward(ctx, p, theta, bandwidth):
        ctx.save_for_backward(p, theta)
        ctx.bandwidth = bandwidth * theta.detach()
        return (p > theta).to(p)

    @staticmethod
    def backward(ctx, g):
        p, theta = ctx.saved_tensors
        near = ((p - theta).abs() < ctx.bandwidth / 2).to(p)
        return None, -(near * g / ctx.bandwidth).sum(0), None


class JumpReLU(torch.autograd.Function):
    """p · H(p − θ): gradient H for p, and for θ the straight-through −θ/ε where |p − θ| < ε/2."""

    @staticmethod
    def forward(ctx, p, theta, bandwidth):
        ctx.save_for_backward(p, theta)
        ctx.bandwidth = bandwidth * theta.detach()
        return torch.where(p > theta, p, 0.0)

    @staticmethod
    def backward(ctx, g):
        p, theta = ctx.saved_tensors
        near = ((p - theta).abs() < ctx.bandwidth / 2).to(p)
        return g * (p > theta), -(near * g * theta / ctx.bandwidth).sum(0), None


def away_from_start(member: Member, seed: int = 1) -> Member:
    """The member with weights that are away from their initial zeros and ones."""
    generator = torch.Generator().manual_seed(seed)
    member.before_first.clear()
    if "log_threshold" in member.weights:
        member.weights["log_threshold"].fill_(math.log(0.1))
    for name, weight in member.weights.items():
        if name != "W_dec":
            weight.add_(0.1 * torch.randn(weight.shape, generator=generator))
    member.adam.refresh_low()
    return member


def reference_layernorm(a: Tensor, weights: dict[str, Tensor], config: TrainConfig) -> Tensor:
    """Each level's block by itself: subtract the mean, divide by the root of the biased variance plus eps, affine."""
    parts, start = [], 0
    for stop in config.level_sizes():
        block = a[:, start:stop]
        centred = block - block.mean(1, keepdim=True)
        parts.append(centred / (centred.pow(2).mean(1, keepdim=True) + config.layernorm_eps).sqrt())
        start = stop
    return torch.cat(parts, 1) * weights["ln_gain"] + weights["ln_bias"]


def reference_latents(
    weights: dict[str, Tensor], config: TrainConfig, x: Tensor, transcodes: bool = False
) -> tuple[Tensor, Tensor]:
    """Latents before selection, and the argument p of the activation."""
    a = p = (x if transcodes else x - weights["b_dec"]) @ weights["W_enc"] + weights["b_enc"]
    if config.layernorm == "pre":
        p = reference_layernorm(a, weights, config)
    z = p.clamp(min=0)
    if config.activation == "jumprelu":
        z = JumpReLU.apply(p, weights["log_threshold"].exp(), config.bandwidth)
    if config.layernorm == "post":
        z = reference_layernorm(z, weights, config)
    if config.layernorm != "none" and config.layernorm_rescale:
        z = z * x.norm(dim=1, keepdim=True) / x.shape[1] ** 0.5
    return z, p


def reference_selection(z: Tensor, config: TrainConfig) -> Tensor:
    """The k largest of each row, or the rows · k largest of the batch; everything else is 0."""
    if config.activation == "topk":
        top = z.topk(config.k, dim=1)
        return torch.zeros_like(z).scatter(1, top.indices, top.values)
    if config.activation == "batchtopk":
        flat = z.flatten()
        top = flat.topk(config.k * len(z))
        return torch.zeros_like(flat).scatter(0, top.indices, top.values).view_as(z)
    return z


def reference_auxiliary(
    weights: dict[str, Tensor], config: TrainConfig, x: Tensor, before: Tensor, z: Tensor, dead: Tensor
) -> Tensor:
    """coefficient · E ‖(x − x̂) − ẑ W_dec‖² with ẑ the aux_k largest latents of each row among `dead`, x − x̂ constant; x
    without what a skip connection makes."""
    left_over = (x - weights["b_dec"] - z @ weights["W_dec"]).detach()
    among = before * dead
    top = among.topk(min(config.aux_k, among.shape[1]), dim=1)
    chosen = torch.zeros_like(among).scatter(1, top.indices, top.values)
    return config.aux_coefficient * (left_over - chosen @ weights["W_dec"]).pow(2).sum(1).mean()


def reference_objective(
    weights: dict[str, Tensor],
    config: TrainConfig,
    x: Tensor,
    *,
    factor: float = 1.0,
    prefixes: tuple[int, ...] | None = None,
    prefix_weights: tuple[float, ...] | None = None,
    dead: Tensor | None = None,
    y: Tensor | None = None,
) -> Tensor:
    """The whole loss of one batch as DESIGN.md writes it. `dead`: 1 for latents the auxiliary loss may use, else 0. `y`: the
    rows that a transcoder is to make."""
    before, p = reference_latents(weights, config, x, y is not None)
    x = x if y is None else y - x @ weights["W_skip"] if config.skip else y
    z = reference_selection(before, config)
    levels = config.level_sizes()
    prefixes = prefixes or (levels if config.objective == "nested" else levels[-1:])
    prefix_weights = prefix_weights or (1.0,) * len(prefixes)
    loss = torch.zeros((), dtype=x.dtype)
    for m, w in zip(prefixes, prefix_weights):
        x_hat = weights["b_dec"] + z[:, :m] @ weights["W_dec"][:m]
        loss = loss + w * (x - x_hat).pow(2).sum(1).mean()
    n_shared = levels[0] if len(levels) > 1 else 0
    if config.penalty == "l1":
        size = z.abs() if config.layernorm == "post" else z
    else:
        theta = weights["log_threshold"].exp() if "log_threshold" in weights else None
        size = Step.apply(p, theta, config.bandwidth) if config.penalty == "l0" else torch.zeros_like(z)
    shared, specialised = size[:, :n_shared].sum(1).mean(), size[:, n_shared:].sum(1).mean()
    loss = loss + factor * (config.lambda_shared * shared + config.lambda_specialised * specialised)
    if dead is not None:
        loss = loss + reference_auxiliary(weights, config, x, before, z, dead)
    return loss


def reference_update(
    weights: dict[str, Tensor],
    optimizer: torch.optim.Adam,
    config: TrainConfig,
    lr: float,
    loss: Tensor,
    rates: Tensor | None = None,
) -> float:
    """Backward, clip, project, Adam, renormalise, with torch's own parts; returns the gradient norm before clipping.

    rates: latents' parts of the learning rate; None: 1."""
    optimizer.zero_grad()
    loss.backward()
    norm = torch.cat([w.grad.flatten() for w in weights.values()]).norm()
    with torch.no_grad():
        for w in weights.values():
            if config.normalize_gradients:
                w.grad /= norm
            elif config.clip_norm and norm > config.clip_norm:
                w.grad *= config.clip_norm / norm
        decoder, gradient = weights["W_dec"], weights["W_dec"].grad
        gradient -= (gradient * decoder).sum(1, keepdim=True) * decoder
        for group in optimizer.param_groups:
            group["lr"] = lr
        before = {name: w.clone() for name, w in weights.items() if rates is not None and name != "b_dec"}
        optimizer.step()
        for name, old in before.items():
            weights[name].copy_(old + (weights[name] - old) * (rates[:, None] if name == "W_dec" else rates))
        decoder /= decoder.norm(dim=1, keepdim=True)
    return float(norm)


# ---- store: statistics of the kept rows ----


def kept_mean_and_scale(rows: Tensor, special: Tensor, multiple: float | None) -> tuple[Tensor, Tensor, float]:
    """Kept mask, mean and (E‖x − mean‖²)^−½ of stored rows, two passes in float64 (FORMAT.md, "Kept rows")."""
    x = rows.double()
    norm = x.norm(dim=1).float().double()
    median = norm[~special].quantile(0.5).item()
    kept = ~special if multiple is None else ~special & (norm <= multiple * median)
    mean = x[kept].mean(0)
    return kept, mean, (x[kept] - mean).square().sum(1).mean().item() ** -0.5


def reference_reconstruction(x: Tensor, x_hat: Tensor, groups: Tensor) -> dict[str, float]:
    """Reconstruction scores in float64, row by row; `groups` [row] numbers the "batch" of the two older definitions."""
    x, x_hat = x.double(), x_hat.double()
    error = [float(((a - b) ** 2).sum()) for a, b in zip(x, x_hat)]
    variance = sum(float(((a - x.mean(0)) ** 2).sum()) for a in x)
    legacy, s, r = [], [], []
    for g in groups.unique():
        rows = (groups == g).nonzero()[:, 0].tolist()
        mean = x[rows].mean(0)
        legacy += [1 - error[i] / float(((x[i] - mean) ** 2).sum()) for i in rows]
        s.append(sum(float((x[i] ** 2).sum()) for i in rows) / len(rows))
        r.append(sum(error[i] for i in rows) / len(rows))
    s_mean, r_mean = sum(s) / len(s), sum(r) / len(r)
    n, d = x.shape
    norms, norms_hat = x.norm(dim=1), x_hat.norm(dim=1)
    return {
        "ev": 1 - sum(error) / variance,
        "ev_legacy": sum(legacy) / n,
        "ev_saebench": 1 - r_mean / (s_mean - (s_mean / d) ** 2),
        "mse": sum(error) / n,
        "mse_per_dim": sum(error) / n / d,
        "cosine": float(((x * x_hat).sum(1) / (norms * norms_hat)).mean()),
        "l2_ratio": float((norms_hat / norms).mean()),
        "relative_reconstruction_bias": float(norms_hat.square().sum() / (x * x_hat).sum()),
    }


def reference_behaviour(clean: Tensor, other: Tensor, tokens: Tensor, counted: Tensor) -> dict[str, float]:
    """Mean KL(clean ‖ other), CE and top-1 agreement in float64 from logits [seq pos vocab], position by position.

    `counted` [seq pos]: source positions that count; the last position of a sequence has no CE.
    """
    kl, ce, top1 = [], [], []
    for i, j in counted.nonzero().tolist():
        log_p, log_q = clean[i, j].double().log_softmax(0), other[i, j].double().log_softmax(0)
        kl.append(float((log_p.exp() * (log_p - log_q)).sum()))
        top1.append(float(clean[i, j].argmax() == other[i, j].argmax()))
        if j + 1 < tokens.shape[1]:
            ce.append(-float(log_q[tokens[i, j + 1]]))
    return {"kl": sum(kl) / len(kl), "ce": sum(ce) / len(ce), "top1": sum(top1) / len(top1)}


def reference_sparse_coding(x: Tensor, z: Tensor, W_dec: Tensor, b_dec: Tensor, n: int) -> float:
    """Explained variance in float64 when each row keeps its n latents largest by |z_j| times the decoder row's norm."""
    x, z, W_dec = x.double(), z.double(), W_dec.double()
    x_hat = []
    for row in z:
        order = (row.abs() * W_dec.norm(dim=1)).argsort(descending=True)[:n].tolist()
        x_hat.append(b_dec.double() + sum(row[j] * W_dec[j] for j in order))
    error = (x - torch.stack(x_hat)).square().sum()
    return 1 - float(error / (x - x.mean(0)).square().sum())


def reference_firing(z: Tensor) -> dict[str, float]:
    """L0, L1, dead share and density-weighted use of latents [row latent], in float64."""
    active = z != 0
    return {
        "l0": float(active.double().sum(1).mean()),
        "sparsity": 1 - float(active.double().mean()),
        "l1": float(z.double().abs().sum(1).mean()),
        "dead": float((active.sum(0) == 0).double().mean()),
        "alive": float((active.sum(0) > 0).double().mean()),
    }


def reference_pool_ablated(
    sae: NestedSAE, padded: Tensor, n_real: Tensor, latents: list[int], made: Tensor | None = None
) -> Tensor:
    """The long way of SCR's ablation, float64: [text pos d_model] with masked positions zero → [text d_model].

    Encodes every position, masked ones too, zeroes the latents, decodes, adds the SAE's error, sums over all positions and
    divides by the number of real ones (SAEBench 0.6). `made`: the rows that a transcoder makes of `padded`.
    """
    sae = copy.deepcopy(sae).double()
    x = padded.double()
    flat = (x - sae.center.double()) * sae.scale.double()
    center, scale = (sae.target_center, sae.target_scale) if sae.config.is_transcoder else (sae.center, sae.scale)
    beside = flat @ sae.W_skip if sae.config.skip else 0.0

    def decoded(z: Tensor) -> Tensor:
        return (z @ sae.W_dec + sae.b_dec + beside) / scale.double() + center.double()

    z = sae.encode_normalized(flat)
    error = (x if made is None else made.double()) - decoded(z)
    z[..., latents] = 0
    return (decoded(z) + error).sum(1) / n_real[:, None]


def reference_train_probe(
    x: tuple[Tensor, Tensor], y: tuple[Tensor, Tensor], start: tuple[Tensor, Tensor], orders: Tensor, recipe: Any
) -> tuple[Tensor, Tensor, float]:
    """One probe trained in a plain loop by autograd and torch's AdamW; (train, test) inputs and labels → w, b, accuracy.

    `orders` [epoch row]; keeps the weights of the first epoch with the best test accuracy.
    """
    w, b = (part.clone().requires_grad_() for part in start)
    optimizer = torch.optim.AdamW([w, b], lr=recipe.lr, weight_decay=recipe.weight_decay)
    best, best_accuracy = (w, b), -1.0
    for order in orders:
        for batch in order.split(recipe.batch_size):
            logits = x[0][batch] @ w + b
            loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, y[0][batch]) + recipe.l1 * w.abs().sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        found = float((((x[1] @ w + b) > 0) == (y[1] > 0.5)).double().mean())
        if found > best_accuracy:
            best, best_accuracy = (w.detach().clone(), b.detach().clone()), found
    return best[0], best[1], best_accuracy


def reference_scr(
    sae: NestedSAE,
    padded: Tensor,
    n_real: Tensor,
    draw: Any,
    probes: Any,
    n_latents: int,
    n: int,
    made: Tensor | None = None,
) -> dict[str, float | None]:
    """SCR of one seed at one n, the long way in float64: effects from masked latents, ablation at every position.

    draw: name → (train, test) contrasts with .positive and .negative; probes: name → (w, b).
    """
    keep = (padded.sum(-1) != 0).double()
    z = copy.deepcopy(sae).double().encode_normalized((padded.double() - sae.center.double()) * sae.scale.double())
    pooled = (z * keep[..., None]).sum(1) / n_real[:, None]
    decoder = sae.W_dec.double() / (sae.target_scale if sae.config.is_transcoder else sae.scale).double()

    def tested(name: str, data: str, means: Tensor) -> float:
        positive, negative = draw[data][1].positive, draw[data][1].negative
        w, b = (part.double() for part in probes[name])
        hits = int((means[positive] @ w + b > 0).sum()) + int((means[negative] @ w + b <= 0).sum())
        return hits / (len(positive) + len(negative))

    clean = (padded if made is None else made).double().sum(1) / n_real[:, None]
    before, scores = {}, {}
    for direction, ablated, data in (("scr_dir1", "second", "first"), ("scr_dir2", "first", "second")):
        train = draw[ablated][0]
        difference = pooled[train.positive].mean(0) - pooled[train.negative].mean(0)
        effects = (difference * (decoder @ probes[ablated][0].double())).abs()[:n_latents]
        chosen = effects.argsort(descending=True, stable=True)[: min(n, int((effects != 0).sum()))].tolist()
        after = tested("both", data, reference_pool_ablated(sae, padded, n_real, chosen, made))
        before[direction] = tested("both", data, clean)
        gap = tested(data, data, clean) - before[direction]
        scores[direction] = 0.0 if gap < 0.001 else (after - before[direction]) / gap
    lower = min(before, key=lambda name: before[name])
    equal = before["scr_dir1"] == before["scr_dir2"]
    return {**scores, "scr": None if equal else scores[lower]}


def reference_tpp(
    sae: NestedSAE,
    padded: Tensor,
    n_real: Tensor,
    draw: Any,
    probes: Any,
    n_latents: int,
    n: int,
    made: Tensor | None = None,
) -> dict[str, float]:
    """TPP of one seed at one n, the long way in float64; arguments as `reference_scr`."""
    keep = (padded.sum(-1) != 0).double()
    z = copy.deepcopy(sae).double().encode_normalized((padded.double() - sae.center.double()) * sae.scale.double())
    pooled = (z * keep[..., None]).sum(1) / n_real[:, None]
    decoder = sae.W_dec.double() / (sae.target_scale if sae.config.is_transcoder else sae.scale).double()

    def tested(name: str, means: Tensor) -> float:
        w, b = (part.double() for part in probes[name])
        test = draw[name][1]
        hits = int((means[test.positive] @ w + b > 0).sum()) + int((means[test.negative] @ w + b <= 0).sum())
        return hits / (len(test.positive) + len(test.negative))

    clean = (padded if made is None else made).double().sum(1) / n_real[:, None]
    intended, unintended = [], []
    for ablated in draw:
        train = draw[ablated][0]
        difference = (pooled[train.positive].mean(0) - pooled[train.negative].mean(0)).clamp(min=0)
        effects = (difference * (decoder @ probes[ablated][0].double()))[:n_latents]
        chosen = effects.argsort(descending=True, stable=True)[: min(n, int((effects != 0).sum()))].tolist()
        after = reference_pool_ablated(sae, padded, n_real, chosen, made)
        falls = {name: tested(name, clean) - tested(name, after) for name in draw}
        intended.append(falls.pop(ablated))
        unintended.append(sum(falls.values()) / len(falls))
    a, b = sum(intended) / len(intended), sum(unintended) / len(unintended)
    return {"tpp": a - b, "tpp_intended": a, "tpp_unintended": b}
