"""An SAE spliced into a live model: any Hugging Face causal LM, any layer, in plain forward passes and in `generate`.

    with attach(model, sae, layer=19) as live:                                  # x → x̂
        logits = model(**inputs).logits
        live.latents                                                            # z of this forward
    with attach(model, sae, layer=19, keep_error=True, edit=steer(7, 4.0)):     # x → x + (x̂(edited z) − x̂(z))
        model.generate(**inputs)

What is spliced is what evaluation splices: rows that are not special. Special are the ids that the model's config names
(BOS, EOS, PAD; or `special_ids`), each text's first position, and padding; they stay as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from pipeline.base.errors import ModelError, UsageError
from pipeline.live.edits import Edit
from pipeline.model.specials import config_special_ids
from pipeline.model.splicing import splice
from pipeline.model.split_lm import find_layers
from pipeline.sae.nested import NestedSAE


def attach(
    model: Any,
    sae: NestedSAE,
    layer: int,
    *,
    level: int = -1,
    keep_error: bool = False,
    edit: Edit | Sequence[Edit] | None = None,
    special_ids: Sequence[int] | None = None,
    gradients: bool = False,
) -> Attached:
    """A context in which the residual stream after `layer` goes through the SAE; several may be open at once.

    level: which nested dictionary decodes (−1: the whole); latents and edits are restricted to it. keep_error: add only
    what the edits change, x + (x̂(edit(z)) − x̂(z)); without an edit the model computes bit for bit what it does untouched.
    edit: one function of z [row, latent], or several applied in order. gradients: `live.z` keeps its gradient after a
    backward pass (attribution); with keep_error the error x − x̂ is then a constant, so that all of the gradient is z's.

    The SAE computes in its own dtype (float32 as loaded), outside any autocast. Raises ModelError for a model whose layers
    cannot be found, UsageError for a layer, level or width that does not fit, or for gradients under no_grad.
    """
    text = model.config.get_text_config()
    n_layers, d_model = int(text.num_hidden_layers), int(text.hidden_size)
    if not 0 <= layer < n_layers:
        raise UsageError(f"layer {layer} is out of range; the model has layers 0 to {n_layers - 1}")
    if sae.config.is_transcoder:
        raise UsageError("the SAE is a transcoder, which makes rows of another point than it reads; attach takes none")
    if sae.config.d_model != d_model:
        raise UsageError(f"the SAE is of a residual stream of {sae.config.d_model}, the model's has {d_model}")
    if not -sae.config.n_levels <= level < sae.config.n_levels:
        raise UsageError(f"level {level} is out of range; the SAE has levels 0 to {sae.config.n_levels - 1}")
    edits = () if edit is None else (edit,) if callable(edit) else tuple(edit)
    ids = config_special_ids(model) if special_ids is None else tuple(special_ids)
    return Attached(model, find_layers(model, n_layers)[layer], sae, level, keep_error, edits, ids, gradients)


class Attached:
    """An SAE in a model between `__enter__` and `__exit__`. After a forward pass it holds what that pass met."""

    def __init__(
        self,
        model: nn.Module,
        block: nn.Module,
        sae: NestedSAE,
        level: int,
        keep_error: bool,
        edits: Sequence[Edit],
        special_ids: Sequence[int],
        gradients: bool,
    ) -> None:
        self.model, self.block, self.sae = model, block, sae
        self.n_latents = sae.config.levels[level]
        self.keep_error, self.edits, self.special_ids, self.gradients = keep_error, tuple(edits), special_ids, gradients
        self.handles: list[Any] = []
        self.positions: Bool[Tensor, "seq pos"] | None = None
        self.kept: Bool[Tensor, "seq pos"] | None = None
        self.z: Float[Tensor, "row latent"] | None = None

    def __enter__(self) -> Attached:
        if self.handles:
            raise UsageError("this SAE is attached already; make another with attach(…)")
        self.handles = [
            self.model.register_forward_pre_hook(self._see_inputs, with_kwargs=True),
            self.block.register_forward_hook(self._replace),
        ]
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
        self.positions = may

    def _replace(self, _block: nn.Module, _args: Any, output: Any) -> Any:
        """After the layer: the residual stream with its kept rows replaced."""
        residual: Tensor = output if isinstance(output, Tensor) else output[0]
        assert self.positions is not None, "the model's own forward runs first"
        self.kept = self.positions.to(residual.device)
        if self.gradients and not torch.is_grad_enabled():
            raise UsageError("gradients=True, but gradients are off here; leave torch.no_grad or inference_mode")
        with torch.autocast(residual.device.type, enabled=False):
            changed = self._changed(residual, self.kept)
        if changed is residual:
            return None
        return changed if isinstance(output, Tensor) else (changed, *output[1:])

    def _changed(self, residual: Tensor, kept: Tensor) -> Tensor:
        """The residual stream after encoding, editing and decoding its kept rows."""
        x = residual[kept].float()
        z = self.z = self._encode(x)
        edited = z
        for edit in self.edits:
            edited = edit(edited)
        if not self.keep_error:
            return splice(residual, kept, self._decode(edited))
        if self.gradients:
            return splice(residual, kept, x.detach() + (self._linear(edited) - self._linear(z).detach()))
        return residual if edited is z else splice(residual, kept, x + self._linear(edited - z))

    def _encode(self, x: Tensor) -> Tensor:
        """Latents of raw rows, restricted to the level; where asked they keep the gradient that reaches them."""
        z: Tensor = self.sae.encode(x)[:, : self.n_latents]
        if self.gradients:
            z = z if z.requires_grad else z.requires_grad_()
            z.retain_grad()
        return z

    def _decode(self, z: Tensor) -> Tensor:
        """x̂ of one level, raw, float32."""
        return self.sae.denormalize(z @ self.sae.W_dec[: self.n_latents] + self.sae.b_dec)

    def _linear(self, z: Tensor) -> Tensor:
        """What latents add to the raw residual, without b_dec and centre."""
        return (z @ self.sae.W_dec[: self.n_latents]).float() / self.sae.scale


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
