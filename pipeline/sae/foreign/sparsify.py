"""EleutherAI's sparsify: cfg.json, sae.safetensors."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.base.errors import CheckpointError
from pipeline.base.fields import Fields
from pipeline.sae.foreign.assembly import Tensors, assemble, assemble_transcoder
from pipeline.sae.foreign.checks import only, refuse_unknown, refuse_unless, require_size
from pipeline.sae.foreign.hooks import About, hook_point
from pipeline.sae.nested import NestedSAE

SPARSIFY_NEUTRAL = {"activation": ("topk",)}

SPARSIFY_FIELDS = "k d_in num_latents expansion_factor normalize_decoder multi_topk skip_connection transcode"


def from_sparsify(folder: Path, data: Mapping[str, Any], tensors: Tensors) -> tuple[NestedSAE, About]:
    """topk of relu((x − b_dec) W_enc + b_enc); the hook point is the folder's name. A transcoder, which subtracts no b_dec, goes
    from the input of the module of that name to its output, with W_skip x, [d_out, d_in], where it has a skip connection."""
    refuse_unknown(folder, "cfg.json", data, SPARSIFY_FIELDS, SPARSIFY_NEUTRAL)
    fields = Fields(folder / "cfg.json", data)
    transcodes, skips = (name in data and fields.flag(name) for name in ("transcode", "skip_connection"))
    refuse_unless(folder, "skip_connection (of an SAE)", skips, (False, True) if transcodes else (False,))
    only(folder, tensors, "encoder.weight encoder.bias W_dec b_dec" + " W_skip" * skips)
    tensors = tensors | {"W_enc": tensors["encoder.weight"].T, "b_enc": tensors["encoder.bias"]}
    width = fields.whole("num_latents", 0) or fields.whole("expansion_factor", 0) * len(tensors["W_enc"])
    require_size(folder, tensors, fields.some_whole("d_in"), width or None)
    k, name = fields.whole("k", least=1), folder.resolve().name
    placed = hook_point(folder, name) if re.search(r"(^|\.)(layers|blocks|h)\.\d|embed|wte", name) else {}
    if not transcodes:
        return assemble("topk", k, [len(tensors["W_dec"])], tensors), placed
    if placed and placed["hook"] != "mlp_out":
        raise CheckpointError(
            f"{folder}: a transcoder of {name!r}, whose input is no point known here; it cannot be placed"
        )
    sae = assemble_transcoder("topk", k, tensors | ({"W_skip": tensors["W_skip"].T} if skips else {}))
    return sae, {"hook": "mlp_in", "layer": placed["layer"], "target": placed} if placed else {}
