"""OpenAI: autoencoder.pt."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.base.fields import Fields
from pipeline.sae.foreign.assembly import Tensors, assemble
from pipeline.sae.foreign.checks import only, refuse_unknown, refuse_unless, require_size
from pipeline.sae.foreign.hooks import About
from pipeline.sae.nested import NestedSAE

OPENAI_SETTINGS = "activation activation_state_dict"

OPENAI_STATISTICS = "stats_last_nonzero latents_activation_frequency latents_mean_square"

OPENAI_LOCATIONS = {
    "mlp_post_act": "mlp.hook_post",
    "resid_delta_attn": "attn_out",
    "resid_post_attn": "resid_mid",
    "resid_delta_mlp": "mlp_out",
    "resid_post_mlp": "resid_post",
}
"""OpenAI's names of a layer's points, and ours; the first is none of ours, so its SAEs are scored nowhere."""


def from_openai(folder: Path, data: Mapping[str, Any], tensors: Tensors) -> tuple[NestedSAE, About]:
    """relu or topk of (x − b_dec) W_enc + b_enc; those with TopK normalise each row by itself. Where the folder is below one of
    OpenAI's names (`resid_post_mlp_v5_32k/autoencoders/8`), that is a location in GPT-2 and its layer."""
    refuse_unknown(folder, "autoencoder.pt", data, OPENAI_SETTINGS)
    kind, settings = (
        data.get("activation", "ReLU"),
        Fields(folder / "autoencoder.pt", data).inner("activation_state_dict"),
    )
    refuse_unless(folder, "activation", kind, ("ReLU", "TopK"))
    selects = kind == "TopK"
    refuse_unknown(folder, "autoencoder.pt's activation_state_dict", settings.data, "k postact_fn" * selects)
    refuse_unless(folder, "postact_fn", settings.data.get("postact_fn", "ReLU"), ("ReLU",))
    only(folder, tensors, "pre_bias latent_bias encoder.weight decoder.weight", OPENAI_STATISTICS)
    names = {"b_dec": "pre_bias", "b_enc": "latent_bias"}
    turned = {"W_enc": tensors["encoder.weight"].T, "W_dec": tensors["decoder.weight"].T}
    turned |= {name: tensors[theirs] for name, theirs in names.items()}
    require_size(folder, turned, None, None)
    k = settings.whole("k", least=1) if selects else 0
    sae = assemble("topk" if selects else "relu", k, [turned["W_enc"].shape[1]], turned, row_norm=selects)
    place = re.search(rf"/({'|'.join(OPENAI_LOCATIONS)})(?:_v\w+)?/autoencoders/(\d+)$", str(folder.resolve()))
    if place is None:
        return sae, {}
    return sae, {"model": "gpt2", "hook": OPENAI_LOCATIONS[place[1]], "layer": int(place[2])}
