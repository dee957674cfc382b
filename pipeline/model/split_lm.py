"""A Hugging Face causal language model cut at a layer: prefix (tokens to residual) and suffix (residual to logits).

Nothing here knows an architecture by name. Every part runs the whole model's own forward: the prefix is stopped by an
exception at the layer asked for; in the suffix the layers before the cut hand on the residual instead of computing, and
it is stopped where the head begins; the head computes the rows that it is handed. So embeddings, masks, rotary embeddings,
norms and soft caps are Hugging Face's own code. What a layer returns and which module is the head is seen on two tokens
when a model is loaded (`anatomy.py`). "Layer L" is the residual stream after layers[L].
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib.util
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from jaxtyping import Float, Int
from torch import Tensor, nn

from pipeline.base.errors import ModelError, UsageError, kind_and_line
from pipeline.base.files import human_bytes
from pipeline.base.runtime import DTYPES, resolve_device, resolve_dtype
from pipeline.model.anatomy import Anatomy, Reached, forward, logits_of, own_parameters, residual_of
from pipeline.model.files import hub_errors, model_folder, weights_sha256
from pipeline.model.patching import overridden, removed
from pipeline.model.places import find_place, first_of, module_name, stream_of, with_stream
from pipeline.model.points import Point, as_point
from pipeline.model.specials import plain_token

UNAPPLIED = re.compile(
    r"\blora_|\badapter|\.base_layer\.|\b(qweight|qzeros|scales|weight_scale|weight_packed|absmax)\b"
)
"""Names of tensors that change what other weights mean, and are left out by a model that does not know them."""

Part = Literal["prefix", "suffix", "whole"]


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
        """The config of the language model proper, where others stand beside it. Raises ModelError where there are several."""
        try:
            return self.config.get_text_config()
        except ValueError as error:
            raise ModelError(
                f"{self.name}: its config has several language models (a {self.config.model_type} model); it cannot be cut"
            ) from error

    @property
    def n_layers(self) -> int:
        """Decoder layers. Raises ModelError where the config does not say."""
        return self._number("num_hidden_layers")

    @property
    def d_model(self) -> int:
        """Width of the residual stream. Raises ModelError where the config does not say."""
        return self._number("hidden_size")

    @property
    def vocab(self) -> int:
        """Token ids are below this. Raises ModelError where the config does not say."""
        return self._number("vocab_size")

    def _number(self, name: str) -> int:
        value = getattr(self.text, name, None)
        if not isinstance(value, int) or value < 1:
            raise ModelError(
                f"{self.name}: its config has no {name} (a {self.config.model_type} model); it cannot be cut"
            )
        return value

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

    def __init__(self, model: Any, info: ModelInfo, part: Part, layers: Sequence[int | Point]) -> None:
        self.model, self.info, self.part = model, info, part
        self.layers, self.point = tuple(layers), as_point(layers[0])
        self.config = info.config
        self.n_layers, self.d_model, self.vocab, self.context_limit = (
            info.n_layers,
            info.d_model,
            info.vocab,
            info.context_limit,
        )
        self._blocks = find_layers(model, info.n_layers)
        self._anatomy = (
            None if part == "prefix" else Anatomy.of(model, info.name, list(self._blocks), self.device, info.d_model)
        )
        self._places = {
            point: find_place(model, info.name, self._blocks[point.layer], point, self.device, info.d_model)
            for point in map(as_point, layers)
            if point.is_inside
        }
        self._before: tuple[Tensor, Tensor] | None = None

    @staticmethod
    def load(
        model: str,
        *,
        revision: str | None = None,
        dtype: str = "bf16",
        device: str | torch.device = "cpu",
        part: Part = "whole",
        layers: Sequence[int | Point],
        attention: str = "eager",
        device_map: str | None = None,
        trust_remote_code: bool = False,
    ) -> SplitLM:
        """Load a part of a model from a folder or a Hub id. A layer is the stream after it, a Point may be inside one.

        device_map: `auto`, `balanced` or `sequential` spreads the layers over all GPUs, as transformers and accelerate do it.
        Where accelerate is installed, a model for a GPU comes there from its file tensor by tensor, without a copy in host
        memory.

        `prefix`: layers after the last of `layers`, and the head, are neither read nor run. `suffix`: only the layers after
        layers[0] and the head are, for a point inside a layer all of them, and with a device map all are read and those before
        dropped; `whole`: everything, cut at layers[0]. Raises ModelError
        when the model is missing, gated, of a code that needs trust_remote_code, incomplete, or has no such layer or point, and
        UsageError for a device map without accelerate. Without one, a part that is larger than what is free on a GPU is a
        ModelError before any weight is read.
        """
        info = ModelInfo.read(model, revision, trust_remote_code=trust_remote_code)
        info.require_layers([as_point(layer).layer for layer in layers])
        device = resolve_device(str(device))
        auto: Any = transformers.AutoModelForCausalLM
        kind_of_numbers = DTYPES[resolve_dtype(dtype, device)]
        mapped = placement(device, device_map)

        def unused(model: Any) -> list[nn.Module]:
            return unused_modules(model, list(find_layers(model, info.n_layers)), part, layers)

        if device_map is None:
            require_room(info, part, layers, kind_of_numbers, device, trust_remote_code=trust_remote_code)
        with hub_errors(model), quiet(), contextlib.ExitStack() as stack:
            unread = None
            if part == "prefix" or (part == "suffix" and device_map is None):
                unread = Unread(type(without_weights(info, trust_remote_code)), unused)
                stack.enter_context(unread())
            loaded, report = auto.from_pretrained(
                info.folder,
                config=info.config,
                dtype=kind_of_numbers,
                attn_implementation=attention,
                trust_remote_code=trust_remote_code,
                use_safetensors=True,
                output_loading_info=True,
                **({} if mapped is None else {"device_map": mapped}),
            )
        names = {module: name for name, module in loaded.named_modules()}
        require_complete(model, report, tuple(f"{names[module]}." for module in unused(loaded)))
        if unread is not None and part == "suffix":
            unread.stand_in(next(tensor.device for tensor in loaded.parameters() if not tensor.is_meta))
        split = SplitLM(loaded.eval().requires_grad_(False), info, part, layers)
        split._drop_unused()
        for tensor in (*loaded.parameters(), *loaded.buffers()):
            if mapped is None and not tensor.is_meta:
                tensor.data = tensor.data.to(device)
        if mapped is not None and device.type == "cuda":
            torch.cuda.empty_cache()  # of what a suffix dropped
        return split

    def _drop_unused(self) -> None:
        """Free what this part never runs: an untied head in a prefix, the layers before the cut in a suffix."""
        unused = unused_modules(self.model, list(self._blocks), self.part, self.layers)
        for module, name in own_parameters(self.model, unused):
            module._parameters[name] = nn.Parameter(module._parameters[name].to("meta"), requires_grad=False)  # type: ignore[union-attr]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights and of the residual stream."""
        dtype: torch.dtype = self.model.dtype
        return dtype

    @property
    def device(self) -> torch.device:
        """Where tokens and residuals are expected."""
        found: Iterator[torch.device] = (tensor.device for tensor in self.model.parameters() if not tensor.is_meta)
        return next(found)

    @property
    def weights_sha256(self) -> str:
        """Hash over the names and contents of the model's safetensors files; reads them all, once."""
        return self.info.weights_sha256

    @property
    def unembedding(self) -> Float[Tensor, "vocab d_head"] | None:
        """W_U: before it comes the final norm (`readout` folds its gain), after it any soft cap. None without a head. Where a
        device map left it on the host or the disk, a copy."""
        assert self._anatomy is not None, "a prefix has no head"
        head = self._anatomy.head
        if head is None or not head.weight.is_meta:
            return None if head is None else head.weight
        from accelerate.utils import align_module_device

        with align_module_device(head):
            weight: Tensor = head.weight.detach().clone()
            return weight

    @torch.no_grad()
    def readout(self) -> Float[Tensor, "vocab d_model"] | None:
        """W_U with the final norm's gain folded in (and its centring, where it is a LayerNorm), float32: a logit lens.

        The gain is what the norm makes of a stream u of entries ±1, whose mean is 0 and mean square 1: (n(u) − n(−u)) / 2u.
        The row's own norm, which differs by position, and any soft cap are left out. None where what stands before the
        head is not such a norm alone (a projection, another layer), so that no lens is exact, and where the point is no part
        of the stream.
        """
        weight = self.unembedding
        if self.point.hook == "mlp_in" or weight is None or weight.shape[1] != self.d_model:
            return None
        u = 1.0 - 2.0 * (torch.arange(self.d_model, device=self.device) % 2)
        v = 1.0 - 2.0 * (torch.arange(self.d_model, device=self.device) // 2 % 2)
        residual = torch.stack([u, -u, u + 1, v, -v])[None]
        plus, minus, moved, other, opposite = self._from_layer(self.n_layers - 1, residual, None)[0].float()
        gain = (plus - minus) / 2 * u
        if not torch.allclose(gain, (other - opposite) / 2 * v, rtol=0.02, atol=0.02):
            return None
        folded: Tensor = weight.float().to(gain.device) * gain
        centres = torch.allclose(plus, moved, rtol=0.02, atol=0.02)
        return folded - folded.mean(1, keepdim=True) if centres else folded

    def compile(self) -> None:
        """torch.compile every layer. Faster on some devices, and no longer bit for bit what the plain model computes.

        Layers are compiled when they first run, which raises ModelError where that fails.
        """
        for block in self._blocks:
            block.forward = self._compiled(block.forward)

    def _compiled(self, layer: Callable[..., Any]) -> Callable[..., Any]:
        from torch._dynamo.exc import TorchDynamoException  # slow to import

        compiled = torch.compile(layer)

        @functools.wraps(layer)
        def run(*args: Any, **kwargs: Any) -> Any:
            try:
                return compiled(*args, **kwargs)
            except TorchDynamoException as error:
                raise ModelError(
                    f"{self.info.name}: torch.compile cannot compile its layers ({kind_and_line(error)}); leave out --compile"
                ) from error

        return run

    @torch.no_grad()
    def prefix(self, tokens: Int[Tensor, "seq pos"]) -> dict[Any, Float[Tensor, "seq pos d_model"]]:
        """Rows at each of `layers`, by layer or Point, bit for bit what the untouched model computes on the same batch.

        Stops at the last of them: no later layer, norm or head runs.
        """
        assert self.part != "suffix", "a suffix has no layers before the cut"
        self.info.require_context(tokens.shape[1])
        return {at: rows.to(self.device) for at, rows in self._read(self.layers, tokens).items()}

    def _read(self, layers: Sequence[int | Point], tokens: Tensor) -> dict[Any, Tensor]:
        """Rows at these layers or points."""
        shape, captured = (*tokens.shape, self.d_model), {}

        def keep(at: int | Point, rows: Tensor) -> None:
            captured[at] = rows
            if len(captured) == len(layers):
                raise Reached

        def of_output(at: int | Point) -> Callable[[nn.Module, Any, Any], None]:
            copied = as_point(at).is_inside  # since the layer may go on adding to it in place

            def hook(_module: nn.Module, _args: Any, output: Any) -> None:
                if copied:
                    keep(at, stream_of(first_of(output), {}, shape, self.info.name).clone().reshape(shape))
                else:
                    keep(at, residual_of(output, shape, self.info.name))

            return hook

        def of_input(at: int | Point) -> Callable[[nn.Module, Any, Any], None]:
            return lambda _module, args, kwargs: keep(
                at, stream_of(args, kwargs, shape, self.info.name).clone().reshape(shape)
            )

        with contextlib.ExitStack() as hooks:
            for at in layers:
                module, is_output = self._where(as_point(at))
                hooks.enter_context(
                    removed(
                        module.register_forward_hook(of_output(at))
                        if is_output
                        else module.register_forward_pre_hook(of_input(at), with_kwargs=True)
                    )
                )
            with contextlib.suppress(Reached):
                forward(self.model, tokens)
        return captured

    def module_name(self) -> str:
        """What the module is called, in its layer, whose output or input the rows at the point are; "" for the layer itself."""
        return module_name(self._blocks[self.point.layer], self._places[self.point]) if self.point.is_inside else ""

    def _where(self, point: Point) -> tuple[nn.Module, bool]:
        """The module at a point, and whether the rows are what it returns or what it is given."""
        if point.is_inside:
            place = self._places[point]
            return place.module, place.is_output
        return self._blocks[point.layer], point.hook == "resid_post"

    @torch.no_grad()
    def suffix(
        self, residual: Float[Tensor, "seq pos d_model"], tokens: Int[Tensor, "seq pos"] | None = None
    ) -> Float[Tensor, "seq pos d_head"]:
        """What follows the point, and the final norm, from rows there: what `unembed` takes.

        `tokens` are for points inside a layer, which need the stream beside them, and for models whose later layers look
        at them again; others do not need them.
        """
        if self.point.hook == "resid_post":
            return self._from_layer(self.point.layer, residual, tokens)
        assert tokens is not None or not self.point.is_inside, "a point inside a layer needs the tokens"
        stream = self._stream_before(self.point.layer, tokens) if tokens is not None and self.point.is_inside else None
        with self._replaced(residual):
            return self._from_layer(self.point.layer - 1, stream, tokens, residual)

    def _stream_before(self, layer: int, tokens: Tensor) -> Tensor | None:
        """The stream before a layer, of the last tokens asked for at hand; None before the first, where it is made anew."""
        if layer == 0:
            return None
        if self._before is None or not torch.equal(self._before[0], tokens):
            self._before = tokens, self._read([layer - 1], tokens)[layer - 1]
        return self._before[1]

    @contextlib.contextmanager
    def _replaced(self, rows: Tensor) -> Iterator[None]:
        """For a while the model has these rows at the point."""
        module, is_output = self._where(self.point)
        in_place = self.point.is_inside and self._places[self.point].in_place
        shape = tuple(rows.shape)

        def put(_module: nn.Module, args: Any, kwargs: Any) -> Any:
            if in_place:
                there = stream_of(args, kwargs, shape, self.info.name)
                there.copy_(rows.reshape(there.shape))
                return None
            return with_stream(args, kwargs, shape, rows)

        def give(_module: nn.Module, _args: Any, output: Any) -> Any:
            there = stream_of(first_of(output), {}, shape, self.info.name)
            new = rows.to(there).reshape(there.shape)
            return new if isinstance(output, Tensor) else (new, *output[1:])

        with removed(
            module.register_forward_hook(give) if is_output else module.register_forward_pre_hook(put, with_kwargs=True)
        ):
            yield

    @torch.no_grad()
    def _from_layer(
        self, layer: int, residual: Tensor | None, tokens: Tensor | None, like: Tensor | None = None
    ) -> Tensor:
        """The model's forward from a residual stream after `layer` to its head, or to its logits where it has no head.

        Without a stream all layers run. `like`: a tensor whose sequences and positions the tokens have that are not given.
        """
        assert self._anatomy is not None, "a prefix has no layers after the cut"
        if tokens is None:
            rows = residual if residual is not None else like
            assert rows is not None
            tokens = torch.full(rows.shape[:2], plain_token(self.config, self.vocab), device=rows.device)
        head, found = self._anatomy.head, []

        def stop(_module: nn.Module, args: Any) -> None:
            found.append(args[0])
            raise Reached

        with contextlib.ExitStack() as hooks:
            if residual is not None:
                hooks.enter_context(self._handing_on(layer, residual))
            if head is not None:
                hooks.enter_context(removed(head.register_forward_pre_hook(stop)))
                hooks.enter_context(contextlib.suppress(Reached))
            found.append(logits_of(forward(self.model, tokens)))
        hidden: Tensor = found[0]
        return hidden.to(self.device)

    @cached_property
    def softcap(self) -> float | None:
        """The c of a last step c · tanh(logits / c), in the model's dtype, that `unembed` can leave to who reads the logits; None
        where there is none, or where what the model does is not bit for bit this."""
        cap = getattr(self.model.config.get_text_config(), "final_logit_softcapping", None)
        if not cap or self._anatomy is None or self._anatomy.head is None:
            return None
        width = self._anatomy.head.weight.shape[1]
        hidden = torch.linspace(-40, 40, 3 * width, device=self.device).view(3, width).to(self.dtype)
        raw, capped = self.unembed(hidden, capped=False), self.unembed(hidden)
        same = torch.equal(torch.tanh(raw / cap) * cap, capped) and not torch.equal(raw, capped)
        return float(cap) if same else None

    @contextlib.contextmanager
    def _uncapped(self) -> Iterator[None]:
        """For a while the model's logits are those before its soft cap."""
        text = self.model.config.get_text_config()
        cap, text.final_logit_softcapping = text.final_logit_softcapping, None
        try:
            yield
        finally:
            text.final_logit_softcapping = cap

    @torch.no_grad()
    def unembed(self, hidden: Float[Tensor, "*rows d_head"], *, capped: bool = True) -> Float[Tensor, "*rows vocab"]:
        """Logits of what `suffix` gives, soft cap and the like included, in the model's dtype. Any leading shape.

        capped: False leaves out the soft cap that the model's config names.

        The model's own forward on one token computes them: its layers compute nothing, its head gets these rows.
        """
        assert self._anatomy is not None, "a prefix has no head"
        head = self._anatomy.head
        if head is None:
            return hidden
        flat = hidden.reshape(1, -1, hidden.shape[-1])
        one = torch.full((1, 1), plain_token(self.config, self.vocab), device=hidden.device)
        nothing = torch.zeros(1, 1, self.d_model, device=hidden.device)
        with (
            contextlib.nullcontext() if capped else self._uncapped(),
            self._handing_on(self.n_layers - 1, nothing),
            removed(head.register_forward_pre_hook(lambda _m, args: (flat, *args[1:]))),
        ):
            logits = logits_of(forward(self.model, one))
        return logits.reshape(*hidden.shape[:-1], -1)

    def _handing_on(self, layer: int, residual: Tensor) -> contextlib.AbstractContextManager[None]:
        """For a while the layers up to and including `layer` compute nothing and return this residual stream."""
        assert self._anatomy is not None
        blocks = list(self._blocks[: layer + 1])
        return overridden({block: self._anatomy.returning(n, residual) for n, block in enumerate(blocks)})


def placement(device: torch.device, device_map: str | None) -> str | dict[str, torch.device] | None:
    """Where transformers is to put weights as it reads them; None: on the host first. Raises UsageError."""
    has_accelerate = importlib.util.find_spec("accelerate") is not None
    if device_map is not None and not has_accelerate:
        raise UsageError(f"--device-map {device_map}: needs accelerate; pip install accelerate")
    if device_map is not None:
        return device_map
    return {"": device} if has_accelerate and device.type == "cuda" else None


def without_weights(info: ModelInfo, trust_remote_code: bool) -> Any:
    """The model that a config describes, its parameters on the meta device. Raises ModelError."""
    auto: Any = transformers.AutoModelForCausalLM
    with hub_errors(info.name), quiet(), torch.device("meta"):
        return auto.from_config(copy.deepcopy(info.config), trust_remote_code=trust_remote_code)


def unused_modules(
    model: Any, blocks: Sequence[nn.Module], part: Part, layers: Sequence[int | Point]
) -> list[nn.Module]:
    """What a part never runs: layers after the last in a prefix, and its head; layers before the cut in a suffix."""
    points = [as_point(layer) for layer in layers]
    if part == "prefix":
        head = model.get_output_embeddings()
        return [*blocks[max(point.layer for point in points) + 1 :], *([] if head is None else [head])]
    if part == "suffix" and points[0].hook == "resid_post":
        return list(blocks[: points[0].layer + 1])
    return []


def require_room(
    info: ModelInfo,
    part: Part,
    layers: Sequence[int | Point],
    dtype: torch.dtype,
    device: torch.device,
    *,
    trust_remote_code: bool = False,
) -> None:
    """Raise ModelError when the weights of a part do not fit into what is free on a GPU. No weight is read."""
    if device.type != "cuda":
        return
    model = without_weights(info, trust_remote_code)
    unused = unused_modules(model, list(find_layers(model, info.n_layers)), part, layers)
    left_out = {id(p): p for module, name in own_parameters(model, unused) for p in [module._parameters[name]]}
    n_all = sum(parameter.numel() for parameter in model.parameters())
    n_bytes = (n_all - sum(p.numel() for p in left_out.values() if p is not None)) * dtype.itemsize
    free = torch.cuda.mem_get_info(device)[0]
    if n_bytes > free:
        raise ModelError(
            f"{info.name}: the weights of its {part} take {human_bytes(n_bytes)}, {human_bytes(free)} are free on {device}; "
            "--device-map auto spreads them over all GPUs and this machine's memory"
        )


class Unread:
    """Parameters that a part of a model never runs, for a while taken out of models of a class as soon as they are made, whole,
    from their config: what is not there is read from no file.

    Unlike a config with fewer layers, this leaves what a model derives from their number as it is.
    """

    def __init__(self, kind: type, choose: Callable[[Any], list[nn.Module]]) -> None:
        self.kind, self.choose = kind, choose
        self.taken: list[tuple[nn.Module, str, nn.Parameter]] = []  # their shapes; on the meta device

    def take(self, model: Any) -> None:
        """Leave a model without them; what others hold too (tied weights) stays."""
        unused = self.choose(model)
        own = set(own_parameters(model, unused))
        modules = dict(model.named_modules(remove_duplicate=False))
        chosen = {
            f"{path}.{name}" for path, module in modules.items() for name in module._parameters if (module, name) in own
        }
        tied: dict[str, str] = getattr(model, "all_tied_weights_keys", {})
        for source in set(tied.values()):  # some are tied by name alone so far, as in Zamba
            group = {source} | {target for target in tied if tied[target] == source}
            if group <= chosen:
                for target in group & set(tied):
                    del tied[target]
            else:
                chosen -= group
        for path in sorted(chosen):
            parent, _, name = path.rpartition(".")
            parameter = modules[parent]._parameters[name]
            if parameter is not None:  # of a module with two names
                self.taken.append((modules[parent], name, nn.Parameter(parameter.to("meta"), requires_grad=False)))
                modules[parent]._parameters[name] = None
        around = [module for module in modules.values() if set(unused) & set(module.children())]
        for module in (*around, *(inner for outer in unused for inner in outer.modules())):
            vars(module)["_is_hf_initialized"] = True  # nothing is left of it that transformers could initialise

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        """For a while."""
        before: Any = self.kind.__init__  # type: ignore[misc]
        own = "__init__" in vars(self.kind)

        @functools.wraps(before)
        def make(model: Any, *args: Any, **kwargs: Any) -> None:
            before(model, *args, **kwargs)
            self.take(model)

        self.kind.__init__ = make  # type: ignore[misc]
        try:
            yield
        finally:
            if own:
                self.kind.__init__ = before  # type: ignore[misc]
            else:
                del self.kind.__init__  # type: ignore[misc]

    def stand_in(self, device: torch.device) -> None:
        """Zeros instead, all in one memory of the largest: layers that run on them make what is of the right form."""
        sizes: dict[torch.dtype, int] = {}
        for _, _, parameter in self.taken:
            sizes[parameter.dtype] = max(sizes.get(parameter.dtype, 0), parameter.numel())
        zeros = {dtype: torch.zeros(size, dtype=dtype, device=device) for dtype, size in sizes.items()}
        for module, name, parameter in self.taken:
            zero = zeros[parameter.dtype][: parameter.numel()].view(parameter.shape)
            module._parameters[name] = nn.Parameter(zero, requires_grad=False)


def find_layers(model: Any, n_layers: int) -> nn.ModuleList:
    """The decoder layers: the outermost ModuleList of that length in the text decoder, or where what the model calls its decoder
    has none, in the model. Raises ModelError otherwise."""
    places = (model.get_decoder(), model)
    found = [m for place in places for m in place.modules() if isinstance(m, nn.ModuleList) and len(m) == n_layers]
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


def require_complete(model: str, report: dict[str, Any], left_out: tuple[str, ...] = ()) -> None:
    """Raise ModelError when weights are missing from the files or of another shape (they would be random), and when the
    files hold parts of an adapter or of a quantisation that no part of the model takes. `left_out`: what names of tensors
    begin with that are not meant to be taken."""
    bad = sorted(str(key) for kind in ("missing_keys", "mismatched_keys") for key in report.get(kind, ()))
    if bad:
        raise ModelError(f"{model}: {len(bad)} weights are missing or of another shape ({bad[0]} …); get it again")
    left = sorted(key for key in map(str, report.get("unexpected_keys", ())) if not key.startswith(left_out))
    if left := [key for key in left if UNAPPLIED.search(key)]:
        raise ModelError(
            f"{model}: {left[0]}: part of an adapter or quantisation that is not applied here; merge it first"
        )


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
