"""The nested SAE: one dictionary whose prefixes are dictionaries too.

    x  = (x_raw − center) · scale            in float32, before any cast                        [row, d_model]
    a  = (x − b_dec) W_enc + b_enc           pre-activations                                    [row, latent]
    a' = gain · (a − μ_l) / σ_l + bias       LayerNorm inside each level's own block (optional)
    z  = (‖x‖/√d) · act(a')                  the row's scale comes back only with LayerNorm
    x̂_l = b_dec + Σ_{j < m_l} z_j W_dec[j]   cumulative decode, one level from the one before   [row, d_model]

LayerNorm statistics never look outside a level's block, so a prefix of the dictionary is itself an SAE; only `topk`,
which selects over all latents of a row, is not. Raw residuals go in and come out: `encode` centres and scales, `decode`
undoes it. Paper: "Nested Dictionary Learning", Eq. 1-4; the levels generalise its two (shared, whole).

A transcoder (`d_out` is set) is the same from the rows of one hook point to those of another, y, with a space of its own:

    a  = x W_enc + b_enc                     b_dec is of the other point, so the encoder does not subtract it
    ŷ_l = b_dec + x W_skip + Σ_{j < m_l} z_j W_dec[j]       x W_skip where `skip` is set      [row, d_out]
    ŷ_raw = ŷ / target_scale + target_center

With `row_norm`, as some SAEs made elsewhere have it, every row is also measured by itself: x is less its own mean μ, over its
own deviation σ + ε, and x̂ times σ plus μ is what `decode` gives back, so it needs the rows.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pipeline.base.errors import UsageError
from pipeline.sae.config import SAEConfig

ROW_EPS = 1e-5
"""What is added to a row's own deviation before it divides; all libraries that know `row_norm` have this one."""


class NestedSAE(nn.Module):
    """A nested SAE, or transcoder, ready for use. Weights: W_enc [d_model, latent], b_enc [latent], W_dec [latent, d_made],
    b_dec [d_made], where d_made is d_model, or a transcoder's d_out.

    Further tensors where the config asks: threshold [latent] (jumprelu: on the pre-activation, strict; batchtopk: on the
    latent itself), ln_gain and ln_bias [latent]. Buffers center [d_model] and scale [] map raw residuals to the space
    it was trained in and stay float32 whatever the weights are cast to. A transcoder has target_center [d_out] and
    target_scale [] for the rows that it makes, and W_skip [d_model, d_out] with `skip`. Made with zeros: load or initialise
    the weights.
    """

    center: Tensor
    scale: Tensor
    target_center: Tensor
    target_scale: Tensor

    def __init__(self, config: SAEConfig) -> None:
        super().__init__()
        self.config = config
        self.made_for: Mapping[
            str, Any
        ] = {}  # what its checkpoint says of the rows it was trained on: model, layer, hook, …
        d, width = config.d_model, config.width
        self.W_enc = nn.Parameter(torch.zeros(d, width))
        self.b_enc = nn.Parameter(torch.zeros(width))
        self.W_dec = nn.Parameter(torch.zeros(width, config.d_made))
        self.b_dec = nn.Parameter(torch.zeros(config.d_made))
        if config.skip:
            self.W_skip = nn.Parameter(torch.zeros(d, config.d_made))
        if config.has_threshold:
            self.threshold = nn.Parameter(torch.zeros(width), requires_grad=config.activation == "jumprelu")
        if config.layernorm != "none":
            self.ln_gain = nn.Parameter(torch.ones(width))
            self.ln_bias = nn.Parameter(torch.zeros(width))
        self.register_buffer("center", torch.zeros(d))
        self.register_buffer("scale", torch.ones(()))
        if config.is_transcoder:
            self.register_buffer("target_center", torch.zeros(config.d_made))
            self.register_buffer("target_scale", torch.ones(()))

    @property
    def made_scale(self) -> Float[Tensor, ""]:
        """What the rows that it makes are multiplied by in the training space: W_dec / made_scale is in their raw units, with
        `row_norm` in those of a row whose own deviation is 1 (see `weighed`)."""
        return self.target_scale if self.config.is_transcoder else self.scale

    def _scaled(self, x: Tensor) -> Tensor:
        """Raw rows, centred and scaled, in float32."""
        return (x.float() - self.center.float()) * self.scale.float()

    def normalize(self, x: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows d_model"]:
        """Raw residuals to the training space, in float32: centred, then scaled so that the mean of ‖x‖² was 1; with `row_norm`
        then each less its own mean, over its own deviation."""
        scaled = self._scaled(x)
        if not self.config.row_norm:
            return scaled
        return (scaled - scaled.mean(-1, keepdim=True)) / (scaled.std(-1, keepdim=True) + ROW_EPS)

    def denormalize(
        self, made: Float[Tensor, "*rows d_made"], x: Float[Tensor, "*rows d_model"] | None = None
    ) -> Float[Tensor, "*rows d_made"]:
        """What is decoded, back to raw rows of the point it is of, in float32. x: the raw rows that were encoded, whose own means
        and deviations come back with `row_norm`. Raises ValueError where they are needed and not given."""
        if self.config.is_transcoder:
            return made.float() / self.target_scale.float() + self.target_center.float()
        if self.config.row_norm:
            made = self.weighed(made.float(), x) + self._scaled(needed(x)).mean(-1, keepdim=True)
        return made.float() / self.scale.float() + self.center.float()

    def weighed(
        self, z: Float[Tensor, "*rows some"], x: Float[Tensor, "*rows d_model"] | None
    ) -> Float[Tensor, "*rows some"]:
        """Latents, or what is decoded of them, times the deviation of their raw rows x with `row_norm`, else as they are: so
        weighed, z W_dec / made_scale is what latents add to a raw row. Raises ValueError where x is needed and not given."""
        return z * self._scaled(needed(x)).std(-1, keepdim=True) if self.config.row_norm else z

    def preactivations(self, x: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows latent"]:
        """(x − b_dec) W_enc + b_enc for normalised x, before LayerNorm; of a transcoder x W_enc + b_enc."""
        b_enc: Tensor = self.b_enc if self.config.is_transcoder else self.b_enc - self.b_dec @ self.W_enc
        return x.to(self.W_enc.dtype) @ self.W_enc + b_enc

    def layernorm(self, a: Float[Tensor, "*rows latent"]) -> Float[Tensor, "*rows latent"]:
        """LayerNorm inside each level's block (biased variance), then the affine per latent."""
        blocks = [
            nn.functional.layer_norm(a[..., b], (b.stop - b.start,), eps=self.config.layernorm_eps)
            for b in self.config.blocks
        ]
        return torch.cat(blocks, -1) * self.ln_gain + self.ln_bias

    def latents_before_selection(self, x: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows latent"]:
        """Non-negative latents of normalised rows, before topk, batchtopk or its threshold drop any (LayerNorm `post` may
        make them negative)."""
        a = self.preactivations(x)
        if self.config.layernorm == "pre":
            a = self.layernorm(a)
        z = torch.where(a > self.threshold, a.relu(), 0.0) if self.config.activation == "jumprelu" else a.relu()
        if self.config.layernorm == "post":
            z = self.layernorm(z)
        if self.config.layernorm != "none" and self.config.layernorm_rescale:
            z = z * (x.float().norm(dim=-1, keepdim=True) / math.sqrt(self.config.d_model)).to(z.dtype)
        return z

    def encode_normalized(self, x: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows latent"]:
        """Latents of rows that are already centred and scaled, as inference selects them."""
        z = self.latents_before_selection(x)
        if self.config.activation == "topk":
            top = z.topk(self.config.k, dim=-1)
            return torch.zeros_like(z).scatter(-1, top.indices, top.values)
        if self.config.activation == "batchtopk":
            return torch.where(z > self.threshold, z, 0.0)
        return z

    def encode(self, x: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows latent"]:
        """Latents of raw residual rows of any dtype. Steering, scores and exports all see this z."""
        return self.encode_normalized(self.normalize(x))

    def base(self, x: Float[Tensor, "*rows d_model"] | None = None) -> Float[Tensor, "... d_made"]:
        """What is decoded of no latent, in the training space: b_dec, [d_made], and with a skip connection what that makes of
        the raw rows x. Raises ValueError where x is needed and not given."""
        return self._base(None if x is None or not self.config.skip else self.normalize(x))

    def _base(self, x: Tensor | None) -> Tensor:
        """The same of normalised rows."""
        if not self.config.skip:
            return self.b_dec
        return needed(x).to(self.W_skip.dtype) @ self.W_skip + self.b_dec

    def decode_normalized_levels(
        self, z: Float[Tensor, "*rows latent"], x: Float[Tensor, "*rows d_model"] | None = None
    ) -> Iterator[Float[Tensor, "*rows d_made"]]:
        """Reconstructions of every level in turn in the training space; each adds its block to the one before. x: normalised
        rows, which a skip connection needs."""
        x_hat = self._base(x)
        for block in self.config.blocks:
            x_hat = x_hat + z[..., block] @ self.W_dec[block]
            yield x_hat

    def decode_levels(
        self, z: Float[Tensor, "*rows latent"], x: Float[Tensor, "*rows d_model"] | None = None
    ) -> Iterator[Float[Tensor, "*rows d_made"]]:
        """Raw reconstructions of every level in turn, innermost first, float32. x: as in `decode`."""
        normalized = None if x is None or not self.config.skip else self.normalize(x)
        return (self.denormalize(x_hat, x) for x_hat in self.decode_normalized_levels(z, normalized))

    def decode_level(
        self, z: Float[Tensor, "*rows latent"], level: int, x: Float[Tensor, "*rows d_model"] | None = None
    ) -> Float[Tensor, "*rows d_made"]:
        """Raw reconstruction of one level, 0 the innermost, -1 the whole dictionary, float32. x: as in `decode`."""
        m = self.config.levels[level]
        return self.denormalize(z[..., :m] @ self.W_dec[:m] + self.base(x), x)

    def decode(
        self, z: Float[Tensor, "*rows latent"], x: Float[Tensor, "*rows d_model"] | None = None
    ) -> Float[Tensor, "*rows d_made"]:
        """Raw reconstruction by the whole dictionary, float32. Linear in z; needs the raw rows x that were encoded only with a
        skip connection or `row_norm` (`config.needs_rows`), and raises ValueError without them there."""
        return self.decode_level(z, -1, x)

    def forward(self, x: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows d_made"]:
        """decode(encode(x), x): raw rows in, raw reconstructions out."""
        return self.decode(self.encode(x), x)

    def prefix(self, level: int) -> NestedSAE:
        """The SAE made of one level's latents, as a copy. Raises UsageError for topk, which selects over all latents."""
        config = self.config
        m = config.levels[level]
        if config.activation == "topk" and m < config.width:
            raise UsageError("a level of a topk SAE is not an SAE: topk selects over all latents of a row")
        levels = config.levels[: config.levels.index(m) + 1]
        small = NestedSAE(dataclasses.replace(config, width=m, levels=levels))
        small.load_state_dict({name: latent_slice(name, tensor, m) for name, tensor in self.state_dict().items()})
        return small.to(self.W_enc.device, self.W_enc.dtype)


def needed(x: Tensor | None) -> Tensor:
    """The rows that were encoded. Raises ValueError where there are none."""
    if x is None:
        raise ValueError("decoding needs the rows that were encoded: decode(z, x)")
    return x


def latent_slice(name: str, tensor: Tensor, m: int) -> Tensor:
    """The part of a named SAE tensor that belongs to the first m latents."""
    if name == "W_enc":
        return tensor[:, :m]
    return tensor[:m] if name in ("W_dec", "b_enc", "threshold", "ln_gain", "ln_bias") else tensor
