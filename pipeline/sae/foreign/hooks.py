"""What other libraries call the points of a model: TransformerLens, transformers, dictionary_learning."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.base.errors import CheckpointError

About = dict[str, Any]
"""What a config says of where its SAE sits: hook, layer, model; what it does not say is not there."""

MODULES = {
    "mlp": "mlp_out",
    "post_feedforward_layernorm": "mlp_out",
    "self_attn": "attn_out",
    "attn": "attn_out",
    "attention": "attn_out",
    "post_attention_layernorm": "attn_out",
}
"""Modules of a layer whose output may be what is added to the stream, and what that is called. In some models it is (Llama's
`mlp`), in some a norm comes between (Gemma-2's `mlp`), in some the norm comes before: which is seen in the model, not here."""

OWN_OUTPUTS = {"mlp_out": "mlp", "attn_out": "self_attn|attn|attention"}
"""What dictionary_learning calls so: the output of the model's own module, under one of these names, whatever comes behind it."""

OTHER_POINTS = {
    r"blocks\.\d+\.hook_mlp_in": "the MLP's own copy of resid_mid, before its norm",
    r"blocks\.\d+\.ln[12](_post)?\.hook_\w+": "inside a norm, before its gain",
    r"blocks\.\d+\.attn\.hook_\w+": "inside attention, before its output matrix",
    r"blocks\.\d+\.(hook_\w+_input|hook_attn_in)": "attention's own copies of the stream, one a head",
    r"blocks\.\d+\.mlp\.hook_(pre|post|mid|pre_linear)": "inside the MLP",
    r"(hook_embed|hook_pos_embed)": "a part of the embedding; the stream before the first layer is blocks.0.hook_resid_pre",
}
"""Points of TransformerLens that are none of ours, and what they are."""


def hook_point(folder: Path, name: str) -> About:
    """Layer and hook of a name of TransformerLens, transformers or dictionary_learning; where it is the output of a module, the
    `module` (or those it may be, with | between) and the name itself as `called`. Raises CheckpointError for others.

    The stream before layer n is that after layer n − 1. TransformerLens's attn_out and mlp_out are what is added to the stream,
    behind Gemma-2's second norms, as ours are; its bridge's `mlp.hook_in` is what the MLP's module reads.
    """
    patterns = (
        r"blocks\.(?P<layer>\d+)\.hook_(?P<hook>resid_post|resid_pre|resid_mid|mlp_out|attn_out)",
        r"blocks\.(?P<layer>\d+)\.mlp\.hook_(?P<hook>in)",
        r"(?P<hook>resid_post|resid_pre|resid_mid|mlp_in|mlp_out|attn_out|attention_out)_layer_(?P<layer>\d+)",
        r"(?:(?:model|transformer|gpt_neox|language_model)\.)*(?:layers|h)\.(?P<layer>\d+)"
        rf"(?:\.(?P<module>{'|'.join(MODULES)}))?(?:\.output)?",
    )
    match = next((m for pattern in patterns if (m := re.fullmatch(pattern, name))), None)
    if match is None:
        what = next((what for pattern, what in OTHER_POINTS.items() if re.fullmatch(pattern, name)), "not known here")
        raise CheckpointError(f"{folder}: made for {name!r}, a hook that is {what}; it cannot be placed")
    found = {key: value for key, value in match.groupdict().items() if value is not None}
    layer, module = int(found["layer"]), found.get("module")
    if module is not None:
        return {"hook": MODULES[module], "layer": layer, "module": module, "called": name}
    hook = found.get("hook", "resid_post")
    hook = {"in": "mlp_in", "attention_out": "attn_out"}.get(hook, hook)
    if hook in OWN_OUTPUTS and not name.startswith("blocks."):
        return {"hook": hook, "layer": layer, "module": OWN_OUTPUTS[hook], "called": name}
    if hook == "resid_pre":
        return {"hook": "resid_post", "layer": layer - 1} if layer else {"hook": "embed"}
    return {"hook": hook, "layer": layer}


def is_module(made_for: Mapping[str, Any], found: str) -> bool:
    """Whether an SAE is of the output of the module called `found`, or does not say of which."""
    return made_for.get("module") is None or found in str(made_for["module"]).split("|")


def layer_in(name: str) -> int | None:
    """The layer that the name of a hook or module says, in its library's own count."""
    found = re.search(r"(?:blocks|layers|layer|h)[._](\d+)", name)
    return int(found[1]) if found else None
