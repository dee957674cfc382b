"""What a nested SAE is, without its weights: shape, levels, activation. No torch here, so that options that are made of it are
read at once."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

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
