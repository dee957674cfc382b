"""A Hugging Face causal language model cut at a layer: prefix (tokens to residual) and suffix (residual to logits).

Nothing here knows an architecture by name. The decoder layers are the one ModuleList as long as the config says; their
outputs are read by hooks, and the suffix runs the model's own forward with the layers before it skipped, so masks,
rotary embeddings, norms and soft caps are Hugging Face's own code. "Layer L" is the residual stream after layers[L].
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions as WholeOutput

from pipeline.base.errors import ModelError
from pipeline.base.runtime import DTYPES, resolve_device, resolve_dtype
from pipeline.model.files import hub_errors, model_folder, weights_sha256
from pipeline.model.patching import overridden, removed, with_hidden_states

Part = Literal["prefix", "suffix", "whole"]


class _Reached(Exception):
    """Raised out of the forward pass when the last layer asked for has run."""


@dataclass(frozen=True)
class ModelInfo:
    """What a model's files say before any weight is read. `revision` is the Hub commit, `local` for a folder."""

    name: str
    folder: Path
    revision: str
    config: Any

    @staticmethod
    def read(model: str, revision: str | None = None, *, trust_remote_code: bool = False) -> ModelInfo:
        """Find the files of a folder or Hub id and read their config. Raises ModelError."""
        folder, commit = model_folder(model, revision, trust_remote_code=trust_remote_code)
        with hub_errors(model), quiet():
            config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        return ModelInfo(model, folder, commit, config)

    @property
    def text(self) -> Any:
        """The config of the language model proper, where others stand beside it."""
        return self.config.get_text_config()

    @property
    def n_layers(self) -> int:
        """Decoder layers."""
        return int(self.text.num_hidden_layers)

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return int(self.text.hidden_size)

    @property
    def vocab(self) -> int:
        """Token ids are below this."""
        return int(self.text.vocab_size)

    @property
    def context_limit(self) -> int | None:
        """The most positions the model has; None when it does not say."""
        limit = getattr(self.text, "max_position_embeddings", None)
        return None if limit is None else int(limit)

    @cached_property
    def weights_sha256(self) -> str:
        """Hash over the names and contents of the safetensors files; reads them all."""
        return weights_sha256(self.folder)

    def require_layers(self, layers: Sequence[int]) -> None:
        """Raise ModelError naming the range when a layer is outside it."""
        outside = [layer for layer in layers if not 0 <= layer < self.n_layers]
        if outside or not layers:
            raise ModelError(f"{self.name}: layer {outside} is out of range; it has layers 0 to {self.n_layers - 1}")

    def require_context(self, context: int) -> None:
        """Raise ModelError when `context` positions are more than the model has."""
        if self.context_limit is not None and context > self.context_limit:
            raise ModelError(
                f"{self.name}: a context of {context} is longer than the model's {self.context_limit} positions; "
                f"use a context of {self.context_limit} or less"
            )


class SplitLM:
    """One part of a language model, in evaluation mode, without gradients. Made by `load`."""

    def __init__(self, model: Any, info: ModelInfo, part: Part, layers: Sequence[int]) -> None:
        self.model, self.info, self.part = model, info, part
        self.layers, self.layer = tuple(layers), layers[0]
        self.config = info.config
        self.n_layers, self.d_model, self.vocab, self.context_limit = (
            info.n_layers,
            info.d_model,
            info.vocab,
            info.context_limit,
        )
        self._blocks = find_layers(model, max(layers) + 1 if part == "prefix" else info.n_layers)

    @staticmethod
    def load(
        model: str,
        *,
        revision: str | None = None,
        dtype: str = "bf16",
        device: str | torch.device = "cpu",
        part: Part = "whole",
        layers: Sequence[int],
        attention: str = "eager",
        trust_remote_code: bool = False,
    ) -> SplitLM:
        """Load a part of a model from a folder or a Hub id.

        `prefix`: layers after max(layers) are neither loaded nor run. `suffix`: only the layers after layers[0] and the
        head are kept; `whole`: everything, cut after layers[0]. Raises ModelError when the model is missing, gated, of a
        code that needs trust_remote_code, incomplete, or has no such layer.
        """
        info = ModelInfo.read(model, revision, trust_remote_code=trust_remote_code)
        info.require_layers(layers)
        device = resolve_device(str(device))
        auto: Any = transformers.AutoModelForCausalLM
        with hub_errors(model), quiet():
            loaded, report = auto.from_pretrained(
                info.folder,
                config=truncated(info.config, max(layers) + 1) if part == "prefix" else info.config,
                dtype=DTYPES[resolve_dtype(dtype, device)],
                attn_implementation=attention,
                trust_remote_code=trust_remote_code,
                use_safetensors=True,
                output_loading_info=True,
            )
        require_complete(model, report)
        split = SplitLM(loaded.eval().requires_grad_(False), info, part, layers)
        split._drop_unused()
        for tensor in (*loaded.parameters(), *loaded.buffers()):
            if not tensor.is_meta:
                tensor.data = tensor.data.to(device)
        return split

    def _drop_unused(self) -> None:
        """Free what this part never runs: an untied head in a prefix, the layers before the cut in a suffix."""
        head, embedding = self.model.get_output_embeddings(), self.model.get_input_embeddings()
        if self.part == "prefix" and head is not None and head.weight is not embedding.weight:
            head.to("meta")
        if self.part == "suffix":
            for block in self._blocks[: self._first_run]:
                block.to("meta")

    @property
    def _first_run(self) -> int:
        """The first layer that runs in a suffix: the one after the cut, or the last one when the cut is after it."""
        return min(self.layer + 1, self.n_layers - 1)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights and of the residual stream."""
        dtype: torch.dtype = self.model.dtype
        return dtype

    @property
    def device(self) -> torch.device:
        """Where tokens and residuals are expected."""
        return self._blocks[-1 if self.part == "suffix" else 0].parameters().__next__().device

    @property
    def weights_sha256(self) -> str:
        """Hash over the names and contents of the model's safetensors files; reads them all, once."""
        return self.info.weights_sha256

    @property
    def unembedding(self) -> Float[Tensor, "vocab d_model"]:
        """W_U: before it comes the final norm (`readout` folds its gain), after it any soft cap."""
        weight: Tensor = self.model.get_output_embeddings().weight
        return weight

    @torch.no_grad()
    def readout(self) -> Float[Tensor, "vocab d_model"]:
        """W_U with the final norm's gain folded in (and its centring, where it is a LayerNorm), float32: a logit lens.

        The gain is what the norm makes of a stream u of entries ±1, whose mean is 0 and mean square 1: (n(u) − n(−u)) / 2u.
        The row's own norm, which differs by position, and any soft cap are left out.
        """
        last = SplitLM(self.model, self.info, "suffix", [self.n_layers - 1])
        u = 1.0 - 2.0 * (torch.arange(self.d_model, device=self.device) % 2)
        plus, minus, moved = last.suffix(torch.stack([u, -u, u + 1])[None])[0].float()
        folded: Tensor = self.unembedding.float() * ((plus - minus) / 2 * u)
        centres = torch.allclose(plus, moved, rtol=0.02, atol=0.02)
        return folded - folded.mean(1, keepdim=True) if centres else folded

    def compile(self) -> None:
        """torch.compile every layer. Faster on some devices, and no longer bit for bit what the plain model computes."""
        for block in self._blocks:
            block.forward = torch.compile(block.forward)

    @torch.no_grad()
    def prefix(self, tokens: Int[Tensor, "seq pos"]) -> dict[int, Float[Tensor, "seq pos d_model"]]:
        """Residual stream after each of `layers`, bit for bit what the untouched model computes on the same batch.

        Stops after the last of them: no later layer, norm or head runs.
        """
        assert self.part != "suffix", "a suffix has no layers before the cut"
        self.info.require_context(tokens.shape[1])
        captured: dict[int, Tensor] = {}

        def capture(layer: int) -> Callable[[nn.Module, Any, Any], None]:
            def hook(_module: nn.Module, _args: Any, output: Any) -> None:
                captured[layer] = output if isinstance(output, Tensor) else output[0]
                if layer == max(self.layers):
                    raise _Reached

            return hook

        with contextlib.ExitStack() as hooks:
            for layer in self.layers:
                hooks.enter_context(removed(self._blocks[layer].register_forward_hook(capture(layer))))
            with contextlib.suppress(_Reached):
                self._base(input_ids=tokens, use_cache=False)
        return captured

    @torch.no_grad()
    def suffix(
        self, residual: Float[Tensor, "seq pos d_model"], tokens: Int[Tensor, "seq pos"] | None = None
    ) -> Float[Tensor, "seq pos d_model"]:
        """The layers after `layer` and the final norm, from a residual stream after `layer`: what `unembed` takes.

        `tokens` are for models whose later layers look at them again; others do not need them.
        """
        assert self.part != "prefix", "a prefix has no layers after the cut"
        residual = residual.to(self.dtype)
        entry = self._blocks[self._first_run]
        if self.layer + 1 < self.n_layers:
            inject = entry.register_forward_pre_hook(
                lambda _m, args, kwargs: with_hidden_states(args, kwargs, residual), with_kwargs=True
            )
        else:
            inject = entry.register_forward_hook(
                lambda _m, _args, out: residual if isinstance(out, Tensor) else (residual, *out[1:])
            )
        start = {"inputs_embeds": residual} if tokens is None else {"input_ids": tokens}
        with removed(inject), overridden(list(self._blocks)[: self._first_run], lambda *_args, **_kw: residual):
            hidden: Tensor = self._base(**start, use_cache=False)[0]
        return hidden

    @torch.no_grad()
    def unembed(self, hidden: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows vocab"]:
        """Logits of normed hidden states, soft cap and the like included, in the model's dtype. Any leading shape."""
        flat = hidden.reshape(1, -1, self.d_model)
        output = WholeOutput(last_hidden_state=flat)
        anything = torch.zeros((1, flat.shape[1]), dtype=torch.long, device=flat.device)
        with overridden([self._base], lambda *_args, **_kw: output):
            logits: Tensor = self.model(input_ids=anything, use_cache=False).logits
        return logits.reshape(*hidden.shape[:-1], -1)

    @property
    def _base(self) -> nn.Module:
        """The model without its head."""
        base: nn.Module = self.model.base_model
        return base


def find_layers(model: Any, n_layers: int) -> nn.ModuleList:
    """The decoder layers: the only ModuleList of that length under the text decoder. Raises ModelError otherwise."""
    decoder = model.get_decoder()
    found = [m for m in decoder.modules() if isinstance(m, nn.ModuleList) and len(m) == n_layers]
    if not found:
        raise ModelError(f"{type(model).__name__}: no list of {n_layers} decoder layers was found; it cannot be split")
    return found[0]  # modules() is outermost first; a list inside a layer comes after the list of layers


def truncated(config: Any, n_layers: int) -> Any:
    """A copy of a model config with its first `n_layers` layers only; lists with one entry a layer are cut alike."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    whole = text.num_hidden_layers
    for name, value in list(vars(text).items()):
        if isinstance(value, list) and len(value) == whole:
            setattr(text, name, value[:n_layers])
    text.num_hidden_layers = n_layers
    return config


def require_complete(model: str, report: dict[str, Any]) -> None:
    """Raise ModelError when weights are missing from the files or of another shape (they would be random)."""
    bad = sorted(str(key) for kind in ("missing_keys", "mismatched_keys") for key in report.get(kind, ()))
    if bad:
        raise ModelError(f"{model}: {len(bad)} weights are missing or of another shape ({bad[0]} …); get it again")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No progress bars or reports from transformers: unexpected weights are what a truncated model is meant to have."""
    log: Any = transformers.utils.logging
    level, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    try:
        log.set_verbosity_error()
        log.disable_progress_bar()
        yield
    finally:
        log.set_verbosity(level)
        if bars:
            log.enable_progress_bar()


def load_tokenizer(model: str, revision: str | None = None, *, trust_remote_code: bool = False) -> Any:
    """The model's tokenizer. Raises ModelError when it has none."""
    folder, _ = model_folder(model, revision, trust_remote_code=trust_remote_code)
    if not list(folder.glob("*token*")) + list(folder.glob("vocab*")):
        raise ModelError(f"{folder}: there is no tokenizer in it; copy tokenizer.json and tokenizer_config.json there")
    with hub_errors(model), quiet():
        return transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
