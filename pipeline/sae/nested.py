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
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pipeline.base.errors import UsageError
from pipeline.base.fields import Fields

Activation = Literal["relu", "topk", "batchtopk", "jumprelu"]
LayerNorm = Literal["none", "pre", "post"]


@dataclass(frozen=True)
class SAEConfig:
    """Shape and activation of a nested SAE; saved whole in every checkpoint.

    `levels` are cumulative sizes, strictly increasing, the last one equal to `width`; a flat SAE has one.
    `layernorm`: none; `pre` on pre-activations; `post` after the activation. `layernorm_rescale` multiplies ‖x‖/√d back.
    `k`: latents a row that topk and batchtopk keep, 0 for the others. `d_out`: of a transcoder, the dimensions of the rows
    that it makes; None: an SAE, which makes those that it reads. `skip`: a transcoder has a linear path beside its latents.
    `row_norm`: an SAE reads rows less their own mean over their own deviation, and gives both back.
    Raises UsageError when fields contradict.
    """

    d_model: int
    width: int
    levels: tuple[int, ...]
    activation: Activation = "relu"
    k: int = 0
    layernorm: LayerNorm = "none"
    layernorm_rescale: bool = True
    layernorm_eps: float = 1e-8
    d_out: int | None = None
    skip: bool = False
    row_norm: bool = False

    def __post_init__(self) -> None:
        sizes = (0, *self.levels)
        if not self.levels or self.levels[-1] != self.width or any(a >= b for a, b in zip(sizes, sizes[1:])):
            raise UsageError(f"levels {self.levels} must increase strictly from above 0 to the width {self.width}")
        if self.activation in ("topk", "batchtopk") and self.k < 1:
            raise UsageError(f"{self.activation} needs k of at least 1, got {self.k}")
        if self.activation == "topk" and self.k > self.width:
            raise UsageError(f"topk cannot keep k = {self.k} of {self.width} latents")
        if self.layernorm == "post" and self.activation != "relu":
            raise UsageError(f"LayerNorm after the activation goes with relu only, not with {self.activation}")
        if self.skip and self.d_out is None:
            raise UsageError("a skip connection is a transcoder's: an SAE with one would explain everything by it")
        if self.row_norm and (self.is_transcoder or self.d_model < 2):
            raise UsageError("row_norm is of an SAE of at least 2 dimensions: a row of one has no deviation")

    @property
    def is_transcoder(self) -> bool:
        """Whether it makes rows of another hook point than those it reads."""
        return self.d_out is not None

    @property
    def needs_rows(self) -> bool:
        """Whether it decodes latents only beside the rows that they were made of."""
        return self.skip or self.row_norm

    @property
    def d_made(self) -> int:
        """Dimensions of the rows that it makes."""
        return self.d_model if self.d_out is None else self.d_out

    @property
    def n_levels(self) -> int:
        """How many nested dictionaries there are; 1 is a flat SAE."""
        return len(self.levels)

    @property
    def n_shared(self) -> int:
        """Latents of the innermost level; 0 for a flat SAE, whose latents are all specialised."""
        return self.levels[0] if self.n_levels > 1 else 0

    @property
    def blocks(self) -> tuple[slice, ...]:
        """Each level's own latents: those it adds to the level before."""
        return tuple(slice(a, b) for a, b in zip((0, *self.levels), self.levels))

    @property
    def has_threshold(self) -> bool:
        """Whether inference compares latents with a stored threshold."""
        return self.activation in ("jumprelu", "batchtopk")

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor of such an SAE."""
        d, width, made = self.d_model, self.width, self.d_made
        shapes: dict[str, tuple[int, ...]] = {
            "W_enc": (d, width),
            "b_enc": (width,),
            "W_dec": (width, made),
            "b_dec": (made,),
        }
        shapes |= {"target_center": (made,), "target_scale": ()} if self.is_transcoder else {}
        shapes |= {"W_skip": (d, made)} if self.skip else {}
        shapes |= {"threshold": (width,)} if self.has_threshold else {}
        shapes |= {"ln_gain": (width,), "ln_bias": (width,)} if self.layernorm != "none" else {}
        return shapes | {"center": (d,), "scale": ()}

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data; `from_fields` reads it back. An SAE does not mention what only transcoders have, nor
        `row_norm` where it is off."""
        data = dataclasses.asdict(self) | {"levels": list(self.levels)}
        if not self.row_norm:
            del data["row_norm"]
        if not self.is_transcoder:
            del data["d_out"], data["skip"]
        return data

    @staticmethod
    def from_fields(fields: Fields) -> SAEConfig:
        """What `to_dict` gave, out of a file. Raises DamagedError for a field of the wrong type or one that this version does
        not know, UsageError when fields contradict."""
        fields.only(*(field.name for field in dataclasses.fields(SAEConfig)))
        return SAEConfig(
            d_model=fields.whole("d_model", least=1),
            width=fields.whole("width", least=1),
            levels=tuple(fields.list_of_wholes("levels")),
            activation=cast(Activation, fields.one_of("activation", get_args(Activation))),
            k=fields.whole("k", most=2**31 - 1),
            layernorm=cast(LayerNorm, fields.one_of("layernorm", get_args(LayerNorm))),
            layernorm_rescale=fields.flag("layernorm_rescale"),
            layernorm_eps=fields.number("layernorm_eps", least=0),
            d_out=fields.whole("d_out", least=1) if "d_out" in fields.data else None,
            skip=fields.flag("skip") if "skip" in fields.data else False,
            row_norm=fields.flag("row_norm") if "row_norm" in fields.data else False,
        )


ROW_EPS = 1e-5
"""What is added to a row's own deviation before it divides; all libraries that know `row_norm` have this one."""

ALIGNMENT, ALIGNED_FROM = 8, 1024
"""A level ends at a multiple of 8 latents in dictionaries of at least 1024: at another, every product over the block behind
it begins at an address that matrix kernels do not like (measured: 4 % of a step at width 16384 for m₁ = 3277)."""


def level_size(share: float, width: int) -> int:
    """Latents of a level that is to have this share of the width: to the nearest one, or to the nearest aligned number."""
    step = ALIGNMENT if width >= ALIGNED_FROM else 1
    return min(width, step * round(share * width / step))


def levels_for_alpha(alpha: float, width: int) -> tuple[int, ...]:
    """The paper's two levels, m₁ = αF (`level_size`) and F; α = 0 is the flat baseline with one.

    Raises UsageError for α outside [0, 1), or one so small or large that a level would be empty.
    """
    if not 0 <= alpha < 1:
        raise UsageError(f"alpha {alpha} is outside [0, 1)")
    n_shared = level_size(alpha, width)
    if alpha > 0 and not 0 < n_shared < width:
        raise UsageError(f"alpha {alpha} of width {width} leaves a level empty")
    return (n_shared, width) if n_shared else (width,)


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
