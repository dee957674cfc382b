"""What a forward pass will take: its memory, by what a loaded model holds and by its sizes; its time, by running a batch through
a few layers made from the config, of which no weight is read.

Those layers are random memory set to zero: the time of a product does not depend on its numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import transformers

from pipeline.base.errors import ModelError, kind_and_line
from pipeline.base.runtime import DTYPES, measured_seconds
from pipeline.model.anatomy import forward
from pipeline.model.files import hub_errors
from pipeline.model.split_lm import ModelInfo, SplitLM, find_layers, quiet, truncated

N_LAYERS = 2
"""Layers that are measured: two, since some models alternate two kinds."""

HEAD_ROWS, HEAD_VOCAB = 512, 16384
"""Rows, and words of a vocabulary that may be larger, by which the unembedding is measured."""


@dataclass(frozen=True)
class ForwardCost:
    """Operations and seconds a token takes: in one layer, and in the unembedding with all logits."""

    n_layers: int
    layer_flop: float
    head_flop: float
    layer_seconds: float
    head_seconds: float

    def prefix(self, layer: int) -> tuple[float, float]:
        """(FLOP, seconds) a token takes up to the residual after `layer`."""
        return (layer + 1) * self.layer_flop, (layer + 1) * self.layer_seconds

    def suffix(self, layer: int) -> tuple[float, float]:
        """(FLOP, seconds) a token takes from there to its logits."""
        n = self.n_layers - layer - 1
        return n * self.layer_flop + self.head_flop, n * self.layer_seconds + self.head_seconds


def measure_forward(
    info: ModelInfo,
    dtype: str,
    device: torch.device,
    batch_size: int,
    context: int,
    attention: str,
    *,
    trust_remote_code: bool = False,
) -> ForwardCost:
    """Run one batch of [batch_size, context] tokens through the first layers of such a model, now, on this device."""
    n_measured = min(N_LAYERS, info.n_layers)
    model = small_model(info, n_measured, attention, trust_remote_code=trust_remote_code).to(DTYPES[dtype])
    n_weights = sum(p.numel() for p in find_layers(model, n_measured).parameters()) / n_measured
    model = model.to_empty(device=device).eval()
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.data.zero_()
    tokens = torch.zeros(batch_size, context, dtype=torch.long, device=device)
    try:
        with torch.inference_mode():
            seconds = measured_seconds(lambda: forward(model, tokens), device)
    except Exception as error:  # whatever an architecture's own code raises
        raise ModelError(
            f"{info.name}: its time cannot be measured, {n_measured} of its layers fail ({kind_and_line(error)})"
        ) from error
    head_flop = 2.0 * info.vocab * info.d_model
    each = seconds / n_measured / (batch_size * context)
    head = measure_head(info, DTYPES[dtype], device, min(batch_size * context, HEAD_ROWS))
    return ForwardCost(info.n_layers, 2.0 * n_weights, head_flop, each, head)


def measure_head(info: ModelInfo, dtype: torch.dtype, device: torch.device, n_rows: int) -> float:
    """Seconds a token takes in the unembedding and in what is asked of its logits, which where products are fast takes longer:
    soft cap, float32 log-softmax, a product with probabilities, the largest."""
    width = min(info.vocab, HEAD_VOCAB)
    cap = getattr(info.text, "final_logit_softcapping", None)
    hidden, weight = (torch.zeros(n, info.d_model, dtype=dtype, device=device) for n in (n_rows, width))
    p = torch.zeros(n_rows, width, device=device)

    def head() -> None:
        logits = hidden @ weight.T
        if cap:
            logits = torch.tanh(logits / cap) * cap
        log_q = torch.log_softmax(logits, -1, dtype=torch.float32)
        torch.linalg.vecdot(p, log_q)
        log_q.amax(1)

    with torch.inference_mode():
        return measured_seconds(head, device) / n_rows * info.vocab / width


def small_model(info: ModelInfo, n_layers: int, attention: str, *, trust_remote_code: bool) -> Any:
    """A model of this config on the meta device, with so many layers and hardly any vocabulary."""
    config = truncated(info.config, n_layers)
    text = config.get_text_config()
    text.vocab_size = 8
    text.pad_token_id = None
    auto: Any = transformers.AutoModelForCausalLM
    with hub_errors(info.name), quiet(), torch.device("meta"):
        return auto.from_config(config, attn_implementation=attention, trust_remote_code=trust_remote_code)


def model_sizes(lm: SplitLM, context: int) -> tuple[int, int, int]:
    """Bytes of a model part's weights, of its activations a position (one layer at a time), and of a row's logits."""
    held = [t for t in (*lm.model.parameters(), *lm.model.buffers()) if not t.is_meta]
    weights = sum({t.data_ptr(): t.nbytes for t in held}.values())
    text, item = lm.config.get_text_config(), lm.dtype.itemsize
    hidden = getattr(text, "intermediate_size", None) or 4 * lm.d_model
    attention = (
        (getattr(text, "num_attention_heads", None) or 0) * context * (2 * item + 8)
    )  # eager: scores, float32 softmax, copies
    return weights, item * (10 * lm.d_model + 4 * hidden) + attention, lm.vocab * (item + 8)
