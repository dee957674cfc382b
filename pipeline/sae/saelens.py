"""The LayerNorm SAE as a SAELens class. Import this, then `sae_lens.SAE.load_from_disk(folder)` loads our export.

    import pipeline.sae.saelens
    from sae_lens import SAE
    sae = SAE.load_from_disk("exported")

Needs sae-lens 6, which is not among our own dependencies. The maths is `pipeline.sae.nested`'s in residual units.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from sae_lens.registry import register_sae_class
from sae_lens.saes.sae import SAE, SAEConfig
from torch import Tensor, nn

from pipeline.sae.export import SAELENS_NESTED


@dataclass
class NestedLayerNormConfig(SAEConfig):  # type: ignore[misc, unused-ignore]
    """cfg.json of the export; `latent_scale` is 1 when the row's norm is multiplied back, else 1 / scale."""

    levels: list[int] = field(default_factory=list)
    activation: str = "relu"
    layernorm: str = "pre"
    layernorm_eps: float = 1e-8
    layernorm_rescale: bool = True
    latent_scale: float = 1.0
    k: int = 0

    @classmethod
    def architecture(cls) -> str:
        return SAELENS_NESTED


class NestedLayerNormSAE(SAE[NestedLayerNormConfig]):  # type: ignore[misc, unused-ignore]
    """Encoder, LayerNorm inside each level's block, activation, the row's norm multiplied back, linear decoder."""

    def initialize_weights(self) -> None:
        super().initialize_weights()
        names = ["b_enc", "ln_gain", "ln_bias"]
        names += ["threshold"] if self.cfg.activation in ("jumprelu", "batchtopk") else []
        for name in names:
            setattr(self, name, nn.Parameter(torch.zeros(self.cfg.d_sae, dtype=self.dtype, device=self.device)))
        self.center = nn.Parameter(torch.zeros(self.cfg.d_in, dtype=self.dtype, device=self.device))

    def layernorm(self, a: Tensor) -> Tensor:
        starts = [0, *self.cfg.levels]
        blocks = [
            nn.functional.layer_norm(a[..., m:n], (n - m,), eps=self.cfg.layernorm_eps)
            for m, n in zip(starts, starts[1:], strict=False)
        ]
        out: Tensor = torch.cat(blocks, -1) * self.ln_gain + self.ln_bias
        return out

    def encode(self, x: Tensor) -> Tensor:
        """Latents in residual units of raw residual rows [..., d_in]."""
        config: Any = self.cfg
        a = self.hook_sae_acts_pre(self.process_sae_in(x) @ self.W_enc + self.b_enc)
        if config.layernorm == "pre":
            a = self.layernorm(a)
        z = torch.where(a > self.threshold, a.relu(), 0.0) if config.activation == "jumprelu" else a.relu()
        if config.layernorm == "post":
            z = self.layernorm(z)
        z = z * config.latent_scale
        if config.layernorm_rescale:
            z = z * ((x - self.center).norm(dim=-1, keepdim=True) / math.sqrt(config.d_in))
        if config.activation == "batchtopk":
            z = torch.where(z > self.threshold, z, 0.0)
        if config.activation == "topk":
            top = z.topk(config.k, dim=-1)
            z = torch.zeros_like(z).scatter(-1, top.indices, top.values)
        latents: Tensor = self.hook_sae_acts_post(z)
        return latents

    def decode(self, feature_acts: Tensor) -> Tensor:
        """Raw reconstruction [..., d_in], linear in the latents."""
        out = self.hook_sae_recons(feature_acts @ self.W_dec + self.b_dec)
        x_hat: Tensor = self.reshape_fn_out(self.run_time_activation_norm_fn_out(out), self.d_head)
        return x_hat


register_sae_class(SAELENS_NESTED, NestedLayerNormSAE, NestedLayerNormConfig)
