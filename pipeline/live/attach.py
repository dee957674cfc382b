"""An SAE spliced into a live model: any Hugging Face causal LM, any layer and hook point, in plain passes and in `generate`.

    with attach(model, sae) as live:                                            # x → x̂, where the SAE was trained
        logits = model(**inputs).logits
        live.latents                                                            # z of this forward
    with attach(model, sae, layer=19, keep_error=True, edit=steer(7, 4.0)):     # x → x + (x̂(edited z) − x̂(z))
        model.generate(**inputs)

What is spliced is what evaluation splices: rows that are not special. Special are the ids that the model's config names (BOS,
EOS, PAD), those that the SAE's checkpoint records of its store, and those of a `tokenizer` where one is given (or `special_ids`
alone), each text's first position, and padding; they stay as they are. An SAE made elsewhere records none: give the tokenizer,
where its texts begin with more than the BOS ([gMASK]<sop>). Points are harvest's: an SAE of mlp_out acts on what the MLP adds
to the stream.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from pipeline.base.errors import ModelError, UsageError
from pipeline.live.edits import Edit
from pipeline.model import specials
from pipeline.model.files import architecture_sha256, loaded_from, require_architecture, weights_sha256
from pipeline.model.places import Place, find_place, first_of, module_name, stream_of, with_stream
from pipeline.model.points import HOOKS, Point, canonical
from pipeline.model.splicing import splice
from pipeline.model.split_lm import find_layers
from pipeline.sae.foreign.gemma_scope import BEFORE_GAIN, behind_gain
from pipeline.sae.foreign.hooks import is_module
from pipeline.sae.nested import NestedSAE


def attach(
    model: Any,
    sae: NestedSAE,
    layer: int | None = None,
    *,
    hook: str | None = None,
    level: int = -1,
    keep_error: bool = False,
    edit: Edit | Sequence[Edit] | None = None,
    special_ids: Sequence[int] | None = None,
    tokenizer: Any = None,
    gradients: bool = False,
) -> Attached:
    """A context in which the rows at a hook point go through the SAE; several may be open at once.

    layer, hook: where; by default where the SAE's checkpoint says that its rows came from, the stream after the layer
    where it names no hook. level: which nested dictionary decodes (−1: the whole); latents and edits are restricted to it.
    keep_error: add only what the edits change, x + (x̂(edit(z)) − x̂(z)); without an edit the model computes bit for bit what
    it does untouched. edit: one function of z [row, latent], or several applied in order. gradients: `live.z` keeps its
    gradient after a backward pass (attribution); with keep_error the error x − x̂ is then a constant, so that all of the
    gradient is z's.

    A transcoder reads where its checkpoint says (or layer and hook do), and what it makes of the rows there replaces those at
    the point that its checkpoint names as its target: what the MLP adds becomes what the transcoder makes of the MLP's input.
    Gemma Scope's, which read that before the gain of the norm, are placed behind it (`behind_gain`).

    The SAE computes in its own dtype (float32 as loaded), outside any autocast. Points inside a layer are looked for with
    three tokens, here. Raises ModelError for a model whose layers or point cannot be found, UsageError for a layer, hook,
    level or width that does not fit or is not known, a transcoder without a target, or for gradients under no_grad; ModelError
    as `require_config`, where it is known which files the model was loaded from.
    """
    if (folder := loaded_from(model)) is not None:
        require_config(folder, sae)
    text = model.config.get_text_config()
    n_layers, d_model = int(text.num_hidden_layers), int(text.hidden_size)
    point = point_of(sae, layer, hook)
    if point.hook == "mlp_in" and sae.made_for.get("hook") == BEFORE_GAIN:
        sae = behind_gain(sae, norm_weight(model, point.layer, n_layers))
    made = target_of(sae, point) if sae.config.is_transcoder else point
    for one in (point, made):
        if not 0 <= one.layer < n_layers:
            raise UsageError(f"layer {one.layer} is out of range; the model has layers 0 to {n_layers - 1}")
    if (wrong := {sae.config.d_model, sae.config.d_made} - {d_model}) != set():
        raise UsageError(f"the SAE is of a residual stream of {min(wrong)}, the model's has {d_model}")
    if not -sae.config.n_levels <= level < sae.config.n_levels:
        raise UsageError(f"level {level} is out of range; the SAE has levels 0 to {sae.config.n_levels - 1}")
    edits = () if edit is None else (edit,) if callable(edit) else tuple(edit)
    recorded = sae.made_for.get("special_ids") or ()
    declared = () if tokenizer is None else specials.special_ids(tokenizer)
    ids = (*specials.config_special_ids(model), *recorded, *declared) if special_ids is None else tuple(special_ids)
    place = place_of(model, made, n_layers, d_model)
    reads = place_of(model, point, n_layers, d_model) if sae.config.is_transcoder else None
    if hook is None:
        block = find_layers(model, n_layers)[made.layer]
        require_module(sae, made, block, place)
    return Attached(model, place, sae, level, keep_error, edits, ids, gradients, reads)


def require_config(folder: Path, sae: NestedSAE) -> None:
    """Raise ModelError for the weights that made an SAE's rows beside another config.json; other weights are another model, which
    may be meant. An SAE that records no hash of that file, as one made elsewhere, fits any."""
    recorded, weights = (sae.made_for.get(name) for name in ("architecture_sha256", "weights_sha256"))
    if recorded not in (None, architecture_sha256(folder)) and weights == weights_sha256(folder):
        require_architecture(folder, recorded, "the SAE's store")


def norm_weight(model: Any, layer: int, n_layers: int) -> Tensor:
    """Weight of the norm before the MLP, of a Gemma-2. Raises UsageError for a layer it lacks, ModelError for other models."""
    if not 0 <= layer < n_layers:
        raise UsageError(f"the transcoder is for layer {layer}, the model has 0 to {n_layers - 1}; give a layer")
    norm: Any = getattr(find_layers(model, n_layers)[layer], "pre_feedforward_layernorm", None)
    if not type(norm).__name__.startswith("Gemma"):
        raise ModelError(
            f"the transcoder reads {BEFORE_GAIN} of a Gemma-2; {type(model).__name__} has no such norm before its MLP"
        )
    weight: Tensor = norm.weight
    return weight


def target_of(sae: NestedSAE, reads: Point) -> Point:
    """Where what a transcoder makes belongs. Raises UsageError where its checkpoint does not say, or it is no later point."""
    target = sae.made_for.get("target") or {}
    if target.get("layer") is None:
        raise UsageError("the transcoder does not say which point it makes the rows of; it cannot be attached")
    made = canonical(int(target["layer"]), target.get("hook") or "resid_post")
    if (made.layer, ORDER.index(made.hook)) <= (reads.layer, ORDER.index(reads.hook)):
        raise UsageError(
            f"the transcoder makes rows at {made}, before it has read those at {reads}; it cannot be attached"
        )
    return made


ORDER = ("embed", "attn_out", "resid_mid", "mlp_in", "mlp_out", "resid_post")
"""The points of a layer as a forward pass comes to them; where its parts run beside each other, mlp_in may come first."""


def point_of(sae: NestedSAE, layer: int | None, hook: str | None) -> Point:
    """Where an SAE acts: as asked, else where its checkpoint says its rows came from, mlp_in for those before its norm's gain.

    Raises UsageError where neither says a layer, for an unknown hook, and for rows of a place that nobody named.
    """
    recorded = sae.made_for
    layer = recorded.get("layer") if layer is None else layer
    if layer is None and (hook or recorded.get("hook")) != "embed":
        raise UsageError("the SAE does not say which layer it is for; give a layer")
    if hook is None and "hook" in recorded and recorded["hook"] is None:
        raise UsageError("the SAE is of rows of a place that nobody named; give a hook")
    made_of = recorded.get("hook", "resid_post")
    hook = hook or ("mlp_in" if made_of == BEFORE_GAIN else made_of)
    if hook not in HOOKS:
        raise UsageError(f"hook {hook}: known are {', '.join(HOOKS)}")
    return canonical(layer or 0, hook)


def require_module(sae: NestedSAE, point: Point, block: nn.Module, place: Place) -> None:
    """Raise UsageError for an SAE made elsewhere of the output of a module that is not the one at the point in this model."""
    made_for = (sae.made_for.get("target") or {}) if sae.config.is_transcoder else sae.made_for
    found = module_name(block, place) if "module" in made_for else ""
    if not is_module(made_for, found):
        raise UsageError(
            f"the SAE is of the output of {made_for['module']!r}; in this model {point} is that of {found!r}, another point; "
            "give hook= if it is meant"
        )


def place_of(model: Any, point: Point, n_layers: int, d_model: int) -> Place:
    """The module at a point and which side of it. Raises ModelError where the layer has none that could be found."""
    block = find_layers(model, n_layers)[point.layer]
    if not point.is_inside:
        return Place(block, is_output=point.hook == "resid_post")
    device = model.get_input_embeddings().weight.device
    return find_place(model, type(model).__name__, block, point, device, d_model)


class Attached:
    """An SAE in a model between `__enter__` and `__exit__`. After a forward pass it holds what that pass met."""

    def __init__(
        self,
        model: nn.Module,
        place: Place,
        sae: NestedSAE,
        level: int,
        keep_error: bool,
        edits: Sequence[Edit],
        special_ids: Sequence[int],
        gradients: bool,
        reads: Place | None = None,
    ) -> None:
        self.model, self.place, self.sae, self.reads = model, place, sae, reads
        self.n_latents = sae.config.levels[level]
        self.keep_error, self.edits, self.special_ids, self.gradients = keep_error, tuple(edits), special_ids, gradients
        self.handles: list[Any] = []
        self.positions: Bool[Tensor, "seq pos"] | None = None
        self.kept: Bool[Tensor, "seq pos"] | None = None
        self.z: Float[Tensor, "row latent"] | None = None
        self.read: Float[Tensor, "row d_model"] | None = None

    def __enter__(self) -> Attached:
        if self.handles:
            raise UsageError("this SAE is attached already; make another with attach(…)")
        module = self.place.module
        self.handles = [
            self.model.register_forward_pre_hook(self._see_inputs, with_kwargs=True),
            module.register_forward_hook(self._replace_output)
            if self.place.is_output
            else module.register_forward_pre_hook(self._replace_input, with_kwargs=True),
        ]
        if self.reads is not None:
            module = self.reads.module
            self.handles.append(
                module.register_forward_hook(self._see_output)
                if self.reads.is_output
                else module.register_forward_pre_hook(self._see_input, with_kwargs=True)
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles = []

    @property
    def latents(self) -> Float[Tensor, "seq pos latent"]:
        """z of the last forward pass, as encoded (before edits); zero at special positions. Raises UsageError before one."""
        z, kept = self._last()
        whole = z.new_zeros((*kept.shape, self.n_latents))
        whole[kept] = z
        return whole

    @property
    def sparse_latents(self) -> Tensor:
        """The same as a sparse COO tensor [seq, pos, latent], made without the dense one."""
        z, kept = self._last()
        rows, latents = z.nonzero(as_tuple=True)
        seq, pos = kept.nonzero(as_tuple=True)
        where = torch.stack([seq[rows], pos[rows], latents])
        return torch.sparse_coo_tensor(
            where, z[rows, latents], (*kept.shape, self.n_latents), is_coalesced=True, check_invariants=False
        )

    def _last(self) -> tuple[Tensor, Tensor]:
        """Latents and mask of the last forward pass."""
        if self.z is None or self.kept is None:
            raise UsageError("no forward pass has run through the attached SAE yet")
        return self.z, self.kept

    def _see_inputs(self, _model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before a forward pass: which positions may be spliced."""
        tokens = kwargs.get("input_ids", args[0] if args else None)
        given = tokens if tokens is not None else kwargs.get("inputs_embeds")
        if given is None:
            raise ModelError(
                "the model was called without input_ids and inputs_embeds; an attached SAE needs one of them"
            )
        shape, device = given.shape[:2], given.device
        may = torch.ones(shape, dtype=torch.bool, device=device)
        if tokens is not None and self.special_ids:
            may &= ~torch.isin(tokens, torch.tensor(self.special_ids, device=device))
        attended = kwargs.get("attention_mask")
        attended = attended if isinstance(attended, Tensor) and attended.ndim == 2 else None
        may &= ~first_positions(shape, attended, past_length(kwargs.get("past_key_values")), device)
        if attended is not None:
            may &= attended[:, -shape[1] :].bool()
        self.positions, self.read = may, None

    def _see_output(self, _module: nn.Module, _args: Any, output: Any) -> None:
        """After the module whose output a transcoder reads."""
        self._keep(stream_of(first_of(output), {}, self._shape, type(self.model).__name__))

    def _see_input(self, _module: nn.Module, args: Any, kwargs: Any) -> None:
        """Before the module whose input a transcoder reads."""
        self._keep(stream_of(args, kwargs, self._shape, type(self.model).__name__))

    def _keep(self, there: Tensor) -> None:
        """Keep a copy of the rows that a transcoder is to encode."""
        assert self.positions is not None, "the model's own forward runs first"
        self.read = there.reshape(self._shape)[self.positions.to(there.device)].float()

    def _replace_output(self, _module: nn.Module, _args: Any, output: Any) -> Any:
        """After the module: the rows it returns, with the kept ones replaced."""
        there = stream_of(first_of(output), {}, self._shape, type(self.model).__name__)
        changed = self._spliced(there)
        if changed is there:
            return None
        return changed if isinstance(output, Tensor) else (changed, *output[1:])

    def _replace_input(self, _module: nn.Module, args: Any, kwargs: Any) -> Any:
        """Before the module: the rows it is given, with the kept ones replaced; in place where others hold them too."""
        there = stream_of(args, kwargs, self._shape, type(self.model).__name__)
        changed = self._spliced(there)
        if changed is there:
            return None
        if self.place.in_place:
            there.copy_(changed)
            return None
        return with_stream(args, kwargs, self._shape, changed)

    @property
    def _shape(self) -> tuple[int, ...]:
        """Of the rows at the point, in this forward pass."""
        assert self.positions is not None, "the model's own forward runs first"
        return (*self.positions.shape, self.sae.config.d_model)

    def _spliced(self, there: Tensor) -> Tensor:
        """The rows with the kept ones replaced, in the shape that they have there; the same tensor where nothing changes."""
        assert self.positions is not None
        self.kept = self.positions.to(there.device)
        if self.gradients and not torch.is_grad_enabled():
            raise UsageError("gradients=True, but gradients are off here; leave torch.no_grad or inference_mode")
        rows = there.reshape(self._shape)
        with torch.autocast(there.device.type, enabled=False):
            changed = self._changed(rows, self.kept)
        return there if changed is rows else changed.reshape(there.shape)

    def _changed(self, residual: Tensor, kept: Tensor) -> Tensor:
        """The residual stream after encoding, editing and decoding its kept rows, or those that a transcoder read."""
        x = residual[kept].float()
        given = self._given(x)
        z = self.z = self._encode(given)
        edited = z
        for edit in self.edits:
            edited = edit(edited)
        if not self.keep_error:
            return splice(residual, kept, self._decode(edited, given))
        if self.gradients:
            added = self._linear(edited, given.detach()) - self._linear(z, given).detach()
            return splice(residual, kept, x.detach() + added)
        return residual if edited is z else splice(residual, kept, x + self._linear(edited - z, given))

    def _given(self, x: Tensor) -> Tensor:
        """The rows to encode. Raises ModelError where a transcoder has read none before it is to make some."""
        if self.reads is None:
            return x
        if self.read is None:
            raise ModelError(
                "the model came to the point that the transcoder makes rows of before the one that it reads"
            )
        return self.read.to(x.device)

    def _encode(self, x: Tensor) -> Tensor:
        """Latents of raw rows, restricted to the level; where asked they keep the gradient that reaches them."""
        z: Tensor = self.sae.encode(x)[:, : self.n_latents]
        if self.gradients:
            z = z if z.requires_grad else z.requires_grad_()
            z.retain_grad()
        return z

    def _decode(self, z: Tensor, x: Tensor) -> Tensor:
        """x̂ of one level, raw, float32; x: the raw rows that were encoded."""
        return self.sae.denormalize(z @ self.sae.W_dec[: self.n_latents] + self.sae.base(x), x)

    def _linear(self, z: Tensor, x: Tensor) -> Tensor:
        """What latents add to the raw residual, without b_dec and centre; x: the raw rows that were encoded."""
        added = (z @ self.sae.W_dec[: self.n_latents]).float()
        return self.sae.weighed(added, x) / self.sae.made_scale


def past_length(cache: Any) -> int:
    """Positions that a KV cache already holds."""
    if cache is None:
        return 0
    return int(cache.get_seq_length()) if hasattr(cache, "get_seq_length") else int(cache[0][0].shape[-2])


def first_positions(
    shape: tuple[int, ...], attended: Tensor | None, n_past: int, device: torch.device
) -> Bool[Tensor, "seq pos"]:
    """Where texts begin: their first attended position, wherever left padding put it; nowhere behind a cache.

    attended: [seq, pos], not 0 where a token counts; None: everywhere.
    """
    first = torch.zeros(shape, dtype=torch.bool, device=device)
    if n_past:
        return first
    if attended is None:
        first[:, 0] = True
        return first
    return first.scatter(1, attended.bool().int().argmax(1, keepdim=True), True)
