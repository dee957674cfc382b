"""Every causal LM that the installed transformers can build, as a tiny random one: is it cut exactly, or refused?

    python tests/support/sweep_models.py [--only llama,mixtral] > table.md

One line an architecture. equal: prefix then suffix and head give the whole model's logits bit for bit, in float32, at the
first, a middle and the last layer, each part loaded from files by itself. refused: harvest's trial says so in one line.
crashed: anything else. not built: no config of its kind was found that transformers makes a model of.
"""

from __future__ import annotations

import contextlib
import re
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2]))

import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from pipeline.base.errors import ModelError
from pipeline.model.anatomy import forward, one_line
from pipeline.model.split_lm import SplitLM
from pipeline.model.trial import trial_tokens, try_model

LAYERS, VOCAB = 4, 300

SIZES = (
    (r"num_hidden_layers|n_layers?|num_layers|decoder_layers|encoder_layers", LAYERS),
    (r"hidden_size|d_model|n_embd|embedding_dim|dim|emb_dim|word_embed_proj_dim|cross_attention_hidden_size", 64),
    (r"vocab_size|text_vocab_size|vocab_size_per_layer_input", VOCAB),
    (
        r".*intermediate_size|.*ffn_dim|n_inner|d_inner|d_ff|feed_forward_size|dim_ff|ffn_hidden_size|mlp_hidden_size",
        96,
    ),
    (
        r"num_attention_heads|n_heads?|num_heads|decoder_attention_heads|encoder_attention_heads|linear_num_(key|value)_heads",
        4,
    ),
    (r"num_key_value_heads|kv_n_heads|num_kv_heads", 2),
    (r"head_dim|attention_head_dim|v_head_dim|qk_nope_head_dim|linear_(key|value)_head_dim|d_kv|kv_channels", 16),
    (r"qk_rope_head_dim|rope_head_dim", 16),
    (r"rotary_dim", 8),
    (r"q_lora_rank|kv_lora_rank|lora_rank|o_lora_rank", 16),
    (r"num_experts|n_routed_experts|num_local_experts|moe_num_experts", 4),
    (r"num_experts_per_tok|top_k_experts|moe_k|moe_topk", 2),
    (r"n_group|topk_group|n_groups", 1),
    (r"max_position_embeddings|n_positions|n_ctx|max_seq_len", 64),
    (r"mamba_n_heads|mamba_num_heads", 8),
    (r"mamba_d_head|mamba_head_dim", 16),
    (r"mamba_expand|expand", 2),
    (r"mamba_d_ssm", 128),
    (r"state_size|mamba_d_state|ssm_state_size", 8),
)
"""Names of sizes in configs, and what they are shrunk to."""

SPECIAL: dict[str, dict[str, Any]] = {
    "xmod": {"default_language": "en_XX"},
    "reformer": {"axial_pos_embds": False},
    "mamba2": {"num_heads": 8},
    "xlnet": {"d_head": 16},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gemma4_text": {"num_kv_shared_layers": 0},
    "granitemoehybrid": {"layer_types": ["mamba", "attention", "mamba", "attention"]},
    "deepseek_v2": {"num_experts_per_tok": 2, "n_routed_experts": 4},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "nemotron": {"num_key_value_heads": 2},
}
"""What some kinds need beside that."""


def shrink(config: Any, kind: str) -> Any:
    """Make a config tiny: its text part and whatever configs stand beside it; lists with one entry a layer are cut."""
    for part in parts(config):
        many = next(
            (
                v
                for name in ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
                if isinstance(v := getattr(part, name, None), int)
            ),
            0,
        )
        for name, value in list(vars(part).items()):
            for pattern, size in SIZES:
                if isinstance(value, int) and not isinstance(value, bool) and re.fullmatch(pattern, name):
                    setattr(part, name, size)
                    break
            else:
                if isinstance(value, list | tuple) and many and len(value) == many:
                    setattr(part, name, type(value)(spread(value)))
        if "head_dim" in vars(part) and part.head_dim is None:
            part.head_dim = 16
        if isinstance(of_layers := vars(part).get("per_layer_config"), dict):
            part.per_layer_config = {n: value for n, value in of_layers.items() if int(n) < LAYERS}
        if "kv_lora_rank" in vars(part):
            part.num_key_value_heads = part.num_attention_heads
        for name, value in list(vars(part).items()):
            if name.endswith("token_id") and isinstance(value, int) and value >= VOCAB:
                setattr(part, name, 3)
        if hasattr(part, "is_decoder"):
            part.is_decoder = True
        if hasattr(part, "pad_token_id") and part.pad_token_id is None:
            part.pad_token_id = 0
    for name, value in SPECIAL.get(kind, {}).items():
        setattr(config.get_text_config(), name, value)
    return config


def spread(values: Any) -> list[Any]:
    """LAYERS of these values, of as many kinds as there are."""
    kinds = list(dict.fromkeys(map(str, values)))
    firsts = [next(v for v in values if str(v) == kind) for kind in kinds][:LAYERS]
    return (list(values[: LAYERS - len(firsts)]) + firsts)[:LAYERS]


def parts(config: Any) -> list[Any]:
    """A config and the configs inside it."""
    inner = [value for value in vars(config).values() if isinstance(value, transformers.PreTrainedConfig)]
    return [config, *(part for value in inner for part in parts(value))]


def build(kind: str, folder: Path) -> None:
    """Write a tiny random model of a kind to a folder."""
    config = shrink(transformers.CONFIG_MAPPING[kind](), kind)
    config = type(config)(
        **{k: v for k, v in config.to_dict().items() if k not in ("transformers_version", "model_type")}
    )
    torch.manual_seed(0)
    auto: Any = transformers.AutoModelForCausalLM
    model = auto.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.add_(torch.randn_like(parameter) * 0.05)
    if sum(p.numel() for p in model.parameters()) > 60_000_000:
        raise ValueError("too large still")
    with torch.no_grad():
        forward(model.eval(), torch.arange(4, 36).reshape(2, 16))
    model.save_pretrained(folder)


def verdict(folder: Path) -> tuple[str, str]:
    """(equal, refused or crashed; what was said) of a folder with a model."""
    try:
        lm = SplitLM.load(str(folder), dtype="float32", part="whole", layers=[0])
        layers = [0, lm.n_layers // 2, lm.n_layers - 1]
        for layer in layers:
            try_model(lm.info, [layer], "float32", torch.device("cpu"), "eager")
    except ModelError as error:
        return ("refused" if "\n" not in str(error) else "crashed"), str(error).replace(str(folder), "MODEL")
    except Exception as error:
        return "crashed", one_line(error)
    try:
        tokens = trial_tokens(lm)
        with torch.no_grad():
            whole = forward(lm.model, tokens).logits
        for layer in layers:
            residual = SplitLM.load(str(folder), dtype="float32", part="prefix", layers=[layer]).prefix(tokens)[layer]
            suffix = SplitLM.load(str(folder), dtype="float32", part="suffix", layers=[layer])
            if not torch.equal(suffix.unembed(suffix.suffix(residual, tokens)), whole):
                return "crashed", f"parts loaded by themselves differ after layer {layer}"
    except Exception as error:
        return "crashed", f"parts: {one_line(error)}"
    return (
        "equal",
        "logits by the head" if lm._anatomy is not None and lm._anatomy.head is not None else "no head found",
    )


def sweep(kinds: list[str]) -> list[tuple[str, str, str]]:
    """(kind, verdict, what was said) of each."""
    found = []
    for kind in kinds:
        with tempfile.TemporaryDirectory() as place, warnings.catch_warnings(), contextlib.redirect_stderr(None):
            warnings.simplefilter("ignore")
            try:
                build(kind, Path(place))
            except Exception as error:
                found.append((kind, "not built", one_line(error)))
            else:
                found.append((kind, *verdict(Path(place))))
        print("| " + " | ".join(found[-1]) + " |", flush=True)
    return found


if __name__ == "__main__":
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    chosen = sys.argv[2].split(",") if len(sys.argv) > 2 else list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    rows = sweep(chosen)
    print({name: sum(row[1] == name for row in rows) for name in ("equal", "refused", "crashed", "not built")})
