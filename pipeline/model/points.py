"""Hook points of a model, by one name each.

    resid_post   the residual stream after the layer                    resid_pre   before it: after the layer before
    attn_out     what attention (or what mixes positions) adds to it    mlp_out     what the MLP adds to it
    resid_mid    the stream between the two                             mlp_in      what the MLP reads, behind its norm
    embed        the stream before the first layer

`resid_pre` of layer L is `resid_post` of layer L − 1, and of layer 0 it is `embed`: one point has one name in a store.
"""

from __future__ import annotations

from typing import Any, NamedTuple

HOOKS = ("resid_post", "resid_pre", "resid_mid", "attn_out", "mlp_in", "mlp_out", "embed")


class Point(NamedTuple):
    """Where in a model rows are read and spliced: a layer and one of HOOKS, as `canonical` names it."""

    layer: int
    hook: str = "resid_post"

    @property
    def is_inside(self) -> bool:
        """Whether it is inside a layer, so that what follows depends on more than the rows there."""
        return self.hook not in ("resid_post", "embed")

    @property
    def recorded(self) -> dict[str, Any]:
        """What a store's config says of it: stores of the stream after a layer name no hook."""
        return {"layer": self.layer} | ({} if self.hook == "resid_post" else {"hook": self.hook})

    def __str__(self) -> str:
        return f"layer {self.layer}" if self.hook == "resid_post" else f"{self.hook} of layer {self.layer}"


def as_point(at: int | Point) -> Point:
    """A layer's number is the stream after it."""
    return at if isinstance(at, Point) else Point(at)


def site_name(layer: int, hook: str) -> str:
    """What files and folders of a point are called, as it was asked for: layer_3, layer_3.mlp_out."""
    return f"layer_{layer}" if hook == "resid_post" else f"layer_{layer}.{hook}"


def canonical(layer: int, hook: str) -> Point:
    """The point's one name."""
    if hook == "embed" or (hook == "resid_pre" and layer == 0):
        return Point(0, "embed")
    return Point(layer - 1) if hook == "resid_pre" else Point(layer, hook)
