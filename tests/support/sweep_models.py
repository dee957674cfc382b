"""Every causal LM that the installed transformers can build, as a tiny random one: is it cut exactly, or refused?

    python tests/support/sweep_models.py [--only llama,mixtral] > table.md

One line an architecture. equal: prefix then suffix and head give the whole model's logits bit for bit, in float32, at the
first, a middle and the last layer, each part loaded from files by itself. refused: harvest's trial says so in one line.
crashed: anything else. Of kinds that transformers itself can make no model of here, a folder with the config alone is
refused.
"""

from __future__ import annotations

import contextlib
import json
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

from pipeline.base.errors import ModelError, kind_and_line
from pipeline.model.anatomy import forward
from pipeline.model.split_lm import SplitLM
from pipeline.model.trial import trial_tokens, try_model

LAYERS, VOCAB = 4, 300

SIZES = (
    (r"num_hidden_layers|n_layers?|num_layers|num_blocks|decoder_layers|encoder_layers", LAYERS),
    (r"hidden_size|d_model|n_embd|embedding_dim|dim|emb_dim|word_embed_proj_dim|cross_attention_hidden_size", 64),
    (r"vocab_size|text_vocab_size|decoder_vocab_size|vocab_size_per_layer_input", VOCAB),
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

BASE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "head_dim": 16,
}
MIXTURE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
GEMMA4 = BASE | {
    "head_dim": 16,
    "global_head_dim": 32,
    "sliding_window": 8,
    "layer_types": ["sliding_attention"] * 3 + ["full_attention"],
}
LINEAR = ["linear_attention"] * 3 + ["full_attention"]
HYBRID = ["mamba", "hybrid", "mamba", "hybrid"]
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
DOTS3 = (
    BASE
    | LATENT
    | {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_experts_intermediate_size": 32,
        "index_topk": 8,
        "index_head_dim": 32,
        "index_n_heads": 2,
    }
)
QWEN4 = (
    BASE
    | MIXTURE
    | {
        "head_dim": 16,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "shared_expert_intermediate_size": 32,
        "hc_lowrank": 16,
        "ngram_vocab_size_base": 200,
        "split_ngram_parts": 2,
        "layer_types": LINEAR,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 8,
        "indexer_compress_ratio": 4,
    }
)
PICTURE = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2}
BYTES = {name: value for name, value in BASE.items() if "token" not in name} | {"num_hidden_layers": 1}

EXPLICIT: dict[str, dict[str, Any]] = {
    "bailing_hybrid": BASE | LATENT | MIXTURE | {"n_group": 2, "topk_group": 1},
    "blt": {
        "vocab_size": VOCAB,
        "max_position_embeddings": 64,
        "encoder_hash_byte_group_vocab": 100,
        "patcher_config": BYTES,
        "encoder_config": BYTES | {"hidden_size_global": 64},
        "decoder_config": BYTES | {"hidden_size_global": 64},
        "global_config": BYTES | {"num_hidden_layers": LAYERS},
    },
    "cohere_compass_text": BASE
    | {
        "head_dim": 16,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "rope_parameters": {"sliding_attention": ROPE, "full_attention": ROPE},
    },
    "dbrx": {
        "d_model": 64,
        "n_heads": 4,
        "n_layers": LAYERS,
        "max_seq_len": 64,
        "vocab_size": VOCAB,
        "pad_token_id": 0,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 64},
    },
    "dots3_note": {
        "text_config": DOTS3,
        "vision_config": PICTURE
        | {
            "adapter_in_dim": 32,
            "adapter_out_dim": 64,
            "moe_intermediate_size": 16,
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
        },
        "audio_config": PICTURE
        | {"adapter_out_dim": 64, "num_hidden_layers": 1, "downsample_hidden_size": 16, "adapter_input_size": 32},
    },
    "dots3_note_text": DOTS3,
    "gemma4": {
        "text_config": GEMMA4 | {"hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": VOCAB},
        "vision_config": None,
        "audio_config": None,
    },
    "gemma4_text": GEMMA4 | {"hidden_size_per_layer_input": 0},
    "gemma4_unified": {"text_config": GEMMA4, "vision_config": None, "audio_config": None},
    "gemma4_unified_text": GEMMA4,
    "kimi_linear": BASE
    | LATENT
    | {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "linear_head_dim": 16,
        "linear_num_heads": 4,
        "layer_types": LINEAR,
    },
    "lfm2_moe": BASE | MIXTURE | {"num_dense_layers": 1, "layer_types": ["conv", "full_attention"] * 2},
    "longcat_flash": {k: v for k, v in (BASE | LATENT).items() if k not in ("num_hidden_layers", "intermediate_size")}
    | {
        "num_layers": LAYERS,
        "ffn_hidden_size": 96,
        "expert_ffn_hidden_size": 32,
        "n_routed_experts": 4,
        "zero_expert_num": 2,
        "moe_topk": 2,
    },
    "qwen4_exp": {
        "text_config": QWEN4,
        "vision_config": {
            "depth": 1,
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_heads": 2,
            "out_hidden_size": 64,
        },
    },
    "qwen4_exp_text": QWEN4,
    "zamba": BASE
    | {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "mamba_d_state": 8,
        "mamba_dt_rank": 8,
        "n_mamba_heads": 2,
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
        "layers_block_type": HYBRID,
    },
    "zamba2": BASE
    | {
        "num_key_value_heads": 4,
        "mamba_d_state": 8,
        "mamba_headdim": 16,
        "n_mamba_heads": 8,
        "adapter_rank": 8,
        "chunk_size": 16,
        "layers_block_type": HYBRID,
    },
    "zaya": BASE | {"head_dim": 16, "num_experts": 4, "moe_intermediate_size": 32, "router_hidden_size": 16},
}
"""Kinds whose numbers hang together in ways that shrinking each alone breaks: their tiny configs in full."""

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


def tiny_config(kind: str) -> Any:
    """The config of a tiny model of a kind."""
    make = transformers.CONFIG_MAPPING[kind]
    if kind in EXPLICIT:
        return make(**EXPLICIT[kind])
    config = shrink(make(), kind)
    return type(config)(
        **{k: v for k, v in config.to_dict().items() if k not in ("transformers_version", "model_type")}
    )


def build(kind: str, folder: Path) -> None:
    """Write a tiny random model of a kind to a folder."""
    config = tiny_config(kind)
    torch.manual_seed(0)
    auto: Any = transformers.AutoModelForCausalLM
    model = auto.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.add_(torch.randn_like(parameter) * 0.05)
    if sum(p.numel() for p in model.parameters()) > 80_000_000:
        raise ValueError("too large still")
    if kind not in EXPLICIT:  # those may be refused for what they need beside tokens
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
        return "crashed", kind_and_line(error)
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
        return "crashed", f"parts: {kind_and_line(error)}"
    return (
        "equal",
        "logits by the head" if lm._anatomy is not None and lm._anatomy.head is not None else "no head found",
    )


def unmade(kind: str, folder: Path, why: str) -> tuple[str, str]:
    """The verdict on a kind of which no model could be made here: its config alone must be refused, by whatever says so."""
    (folder / "config.json").write_text(json.dumps({"model_type": kind}))
    try:
        SplitLM.load(str(folder), dtype="float32", part="prefix", layers=[0])
    except ModelError as error:
        said = str(error).replace(str(folder), "MODEL")
        return "refused" if "\n" not in said else "crashed", f"{said} [no model of it could be made: {why}]"
    except Exception as error:
        return "crashed", f"{kind_and_line(error)} [no model of it could be made: {why}]"
    return "crashed", "it was loaded without weights"


def sweep(kinds: list[str]) -> list[tuple[str, str, str]]:
    """(kind, verdict, what was said) of each."""
    found = []
    for kind in kinds:
        with tempfile.TemporaryDirectory() as place, warnings.catch_warnings(), contextlib.redirect_stderr(None):
            warnings.simplefilter("ignore")
            try:
                build(kind, Path(place))
                found.append((kind, *verdict(Path(place))))
            except Exception as error:
                found.append((kind, *unmade(kind, Path(place), kind_and_line(error))))
        print("| " + " | ".join(found[-1]) + " |", flush=True)
    return found


if __name__ == "__main__":
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    chosen = sys.argv[2].split(",") if len(sys.argv) > 2 else list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    rows = sweep(chosen)
    print({name: sum(row[1] == name for row in rows) for name in ("equal", "refused", "crashed")})
