"""Tiny random language models of every architecture we test, and a tokenizer, built in code: no network, no download."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]

VOCAB = 512
LAYERS = 4
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
SAMPLE = "The residual stream of a small model, line by line: it was the best of times.\n"


def config(kind: str, **changes: Any) -> Any:
    """A tiny config of one architecture; `changes` are in the common names (hidden_size, num_hidden_layers, …)."""
    sizes = SIZES | changes
    if kind == "gemma2":
        return transformers.Gemma2Config(**sizes, sliding_window=8, query_pre_attn_scalar=16)
    if kind == "gemma3":
        return transformers.Gemma3TextConfig(
            **sizes, sliding_window=8, query_pre_attn_scalar=16, layer_types=gemma3_types(sizes)
        )
    if kind == "llama":
        return transformers.LlamaConfig(**sizes, tie_word_embeddings=False)
    if kind == "gpt2":
        return transformers.GPT2Config(
            vocab_size=VOCAB,
            n_embd=sizes["hidden_size"],
            n_inner=sizes["intermediate_size"],
            n_layer=sizes["num_hidden_layers"],
            n_head=4,
            n_positions=sizes["max_position_embeddings"],
            bos_token_id=2,
            eos_token_id=1,
        )
    if kind == "gpt_neox":
        return transformers.GPTNeoXConfig(
            **{k: v for k, v in sizes.items() if k not in ("num_key_value_heads", "head_dim")}
        )
    if kind == "qwen2":
        return transformers.Qwen2Config(**sizes, use_sliding_window=True, sliding_window=8, max_window_layers=2)
    if kind == "qwen3":
        return transformers.Qwen3Config(**sizes)
    if kind == "mixtral":
        return transformers.MixtralConfig(
            **sizes, num_local_experts=4, num_experts_per_tok=2, tie_word_embeddings=False
        )
    raise ValueError(kind)


KINDS = ("gemma2", "gemma3", "llama", "gpt2", "gpt_neox", "qwen2", "qwen3")


def gemma3_types(sizes: dict[str, Any]) -> list[str]:
    """Uneven layer types, so that a wrong index would show."""
    types = ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]
    return [types[i % 4] for i in range(sizes["num_hidden_layers"])]


def build_tokenizer(*, adds_bos: bool = True) -> Any:
    """A byte-level BPE tokenizer of VOCAB tokens: <pad> 0, <eos> 1, <bos> 2, <unk> 3."""
    core = Tokenizer(models.BPE(unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<pad>", "<eos>", "<bos>", "<unk>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator([SAMPLE * 3], trainer)
    if adds_bos:
        core.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", unk_token="<unk>"
    )


def make_model(
    folder: Path, kind: str = "gemma2", *, dtype: torch.dtype = torch.float32, adds_bos: bool = True, **changes: Any
) -> Path:
    """Write a tiny random model of one architecture and its tokenizer to a folder; the same bytes every time.

    Weights are larger than at initialisation, so that every layer matters.
    """
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config(kind, **changes), dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(folder)
    build_tokenizer(adds_bos=adds_bos).save_pretrained(folder)
    return folder


def whole_model(folder: Path, dtype: torch.dtype) -> Any:
    """The untouched Hugging Face model, as a user would load it."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager")
    return model.eval()


def tokens(n_sequences: int, context: int, seed: int = 0, vocab: int = VOCAB) -> torch.Tensor:
    """Random token ids [seq, pos], BOS first."""
    ids = torch.randint(4, vocab, (n_sequences, context), generator=torch.Generator().manual_seed(seed))
    ids[:, 0] = 2
    return ids


def make_corpus(path: Path, n_documents: int = 120, seed: int = 0) -> Path:
    """JSON lines of random words, one document a line; document n starts with its own number."""
    rng = np.random.default_rng(seed)
    words = SAMPLE.split()
    with open(path, "w") as file:
        for n in range(n_documents):
            text = f"{seed}-{n}: " + " ".join(rng.choice(words, int(rng.integers(5, 60))))
            file.write(json.dumps({"text": text, "meta": {"n": n}}) + "\n")
    return path
