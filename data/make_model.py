"""Make tiny-gemma2: train its tokenizer and its weights on the corpus, and measure both against a trigram model.

    python data/make_model.py --out DIR

Nothing of the eval file is seen before the last step. One document in 40 of the training file is kept from the
weights (and from the trigram) and chooses the step whose weights are kept.
"""

from __future__ import annotations

import json
import math
import platform
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
import transformers
from documents import read_documents, sha256
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from trigram import Ints, KneserNeyTrigram

HERE = Path(__file__).parent
PAD, EOS, BOS = 0, 1, 2  # Gemma's ids
CONTEXT = 128  # tokens a row, BOS included
POST_NORM = -0.8  # first weight of the norms after a sublayer; they scale by 1 + weight


@dataclass(frozen=True)
class Recipe:
    """Everything the result depends on, apart from the corpus and the library versions."""

    steps: int
    rows_per_step: int
    matrix_lr: float
    other_lr: float
    warmup: int
    weight_decay: float
    dev_every: int
    vocab: int
    layers: int
    d_model: int
    max_documents: int | None
    seed: int
    threads: int


@dataclass(frozen=True)
class Corpus:
    """Token ids of each document, without BOS."""

    train: list[Ints]
    dev: list[Ints]
    eval: list[Ints]
    eval_bytes: int


@click.command()
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder to make; must not exist.")
@click.option("--corpus", type=click.Path(path_type=Path, exists=True), default=HERE / "corpus", show_default=True)
@click.option("--steps", default=2500, show_default=True, help="Optimiser steps.")
@click.option("--rows-per-step", default=16, show_default=True, help="Rows of 128 tokens a step.")
@click.option("--matrix-lr", default=1e-2, show_default=True, help="Peak learning rate of the layers' matrices (Muon).")
@click.option("--other-lr", default=6e-3, show_default=True, help="Peak learning rate of embedding and norms (AdamW).")
@click.option("--warmup", default=100, show_default=True, help="Steps of linear warm-up before the cosine to zero.")
@click.option("--weight-decay", default=0.1, show_default=True)
@click.option("--dev-every", default=500, show_default=True, help="Steps between two looks at the dev documents.")
@click.option("--vocab", default=4096, show_default=True)
@click.option("--layers", default=6, show_default=True)
@click.option("--d-model", default=192, show_default=True, help="Multiple of 96: heads of 32, three a KV head.")
@click.option("--max-documents", type=int, default=None, help="Use only so many documents of each file (for tests).")
@click.option("--seed", default=0, show_default=True)
@click.option("--threads", default=2, show_default=True, help="Torch threads; part of what fixes the result.")
def main(out: Path, corpus: Path, **options: Any) -> None:
    """Make a small Gemma 2 in OUT and record how well it predicts the held-out text."""
    if out.exists():
        raise click.ClickException(f"{out} exists; name a new folder or remove it")
    recipe, started = Recipe(**options), time.time()
    torch.set_num_threads(recipe.threads)
    torch.manual_seed(recipe.seed)

    partial = out.with_name(out.name + ".partial")
    tokenizer = make_tokenizer(read_texts(corpus / "train.jsonl.zst", recipe.max_documents), recipe.vocab)
    tokens = tokenize(tokenizer, corpus, recipe.max_documents)
    model = make_model(recipe)
    log = train(model, tokens, recipe)
    model.bfloat16().save_pretrained(partial)
    tokenizer.save_pretrained(partial)

    provenance: dict[str, Any] = {"made_by": "data/make_model.py", "recipe": asdict(recipe), "versions": versions()}
    provenance |= {"corpus_sha256": {name: sha256(corpus / f"{name}.jsonl.zst") for name in ("train", "eval")}}
    provenance |= {"eval": measure(partial, tokens, recipe.vocab), "log": log, "wall_seconds": time.time() - started}
    (partial / "provenance.json").write_text(json.dumps(provenance, indent=2) + "\n")
    partial.rename(out)
    click.echo(json.dumps(provenance["eval"], indent=2))


def read_texts(path: Path, max_documents: int | None) -> list[str]:
    """Return the texts of a corpus file; with `max_documents`, that many at equal distances through the file."""
    texts = [document["text"] for document in read_documents(path)]
    if max_documents is None or max_documents >= len(texts):
        return texts
    return [texts[i * len(texts) // max_documents] for i in range(max_documents)]


def make_tokenizer(texts: list[str], vocab: int) -> PreTrainedTokenizerBase:
    """Train a byte-level BPE on `texts` that, like Gemma's, prepends <bos> and pads on the left."""
    special = ["<pad>", "<eos>", "<bos>"]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(vocab_size=vocab, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    bpe.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos>:1 $B:1", special_tokens=[("<bos>", BOS)]
    )
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=bpe,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        padding_side="left",
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


def tokenize(tokenizer: PreTrainedTokenizerBase, corpus: Path, max_documents: int | None) -> Corpus:
    """Tokenize both files; every 40th training document (at least one) becomes a dev document."""
    train_texts = read_texts(corpus / "train.jsonl.zst", max_documents)
    eval_texts = read_texts(corpus / "eval.jsonl.zst", max_documents)

    def ids(texts: list[str]) -> list[Ints]:
        batch = tokenizer(texts, add_special_tokens=False, verbose=False)
        return [np.array(row, dtype=np.int64) for row in batch["input_ids"]]

    documents = ids(train_texts)
    dev = documents[::40]
    train = [document for i, document in enumerate(documents) if i % 40]
    return Corpus(train, dev, ids(eval_texts), sum(len(text.encode("utf-8")) for text in eval_texts))


def make_model(recipe: Recipe) -> Gemma2ForCausalLM:
    """Return a randomly initialised float32 Gemma 2: alternating sliding and full attention, both soft caps."""
    config = Gemma2Config(
        vocab_size=recipe.vocab,
        hidden_size=recipe.d_model,
        intermediate_size=4 * recipe.d_model,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.d_model // 32,
        num_key_value_heads=recipe.d_model // 96,
        head_dim=32,
        query_pre_attn_scalar=32,
        sliding_window=64,
        max_position_embeddings=512,
        attn_logit_softcapping=50.0,
        final_logit_softcapping=30.0,
        tie_word_embeddings=True,
        pad_token_id=PAD,
        eos_token_id=EOS,
        bos_token_id=BOS,
    )
    model = Gemma2ForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith(("post_attention_layernorm.weight", "post_feedforward_layernorm.weight")):
            torch.nn.init.constant_(parameter, POST_NORM)
    return model


def pack(documents: list[Ints]) -> list[Ints]:
    """Join documents with BOS between them and cut into rows that start with BOS; the last may be short."""
    stream = np.concatenate([piece for document in documents for piece in ([BOS], document)])[1:]
    return [np.concatenate([[BOS], stream[i : i + CONTEXT - 1]]) for i in range(0, len(stream), CONTEXT - 1)]


def epoch_rows(documents: list[Ints], seed: int, epoch: int) -> Tensor:
    """Return the epoch's full rows, [row, 128]: documents are shuffled, packed, and the rows shuffled."""
    rng = np.random.default_rng([seed, epoch])
    rows = pack([documents[i] for i in rng.permutation(len(documents))])
    full = np.stack([row for row in rows if len(row) == CONTEXT])
    return torch.from_numpy(full[rng.permutation(len(full))])


def lr_scale(step: int, recipe: Recipe) -> float:
    """Return the fraction of the peak rate at a step: linear warm-up, then half a cosine to zero at the last step."""
    if step < recipe.warmup:
        return (step + 1) / recipe.warmup
    progress = (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup)
    return 0.5 * (1 + math.cos(math.pi * progress))


def make_optimisers(model: Gemma2ForCausalLM, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Return Muon for the layers' matrices and AdamW for the embedding and the norm scales."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    return [
        torch.optim.Muon(
            matrices, lr=recipe.matrix_lr, weight_decay=recipe.weight_decay, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(others, lr=recipe.other_lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]


def train(model: Gemma2ForCausalLM, tokens: Corpus, recipe: Recipe) -> list[dict[str, float]]:
    """Train in place and leave the weights of the step that predicted the dev documents best; return the log."""
    optimisers = make_optimisers(model, recipe)
    schedules = [torch.optim.lr_scheduler.LambdaLR(o, lambda step: lr_scale(step, recipe)) for o in optimisers]
    log: list[dict[str, float]] = []
    best, rows, epoch, started = math.inf, torch.empty(0, CONTEXT, dtype=torch.int64), 0, time.time()
    for step in range(recipe.steps):
        while len(rows) < recipe.rows_per_step:
            rows, epoch = torch.cat([rows, epoch_rows(tokens.train, recipe.seed, epoch)]), epoch + 1
        batch, rows = rows[: recipe.rows_per_step], rows[recipe.rows_per_step :]
        loss = train_step(model, optimisers, batch)
        for schedule in schedules:
            schedule.step()
        if (step + 1) % recipe.dev_every == 0 or step + 1 == recipe.steps:
            dev = nats_per_token(model, tokens.dev)
            log.append({"step": step + 1, "train_nats": loss, "dev_nats": dev, "seconds": time.time() - started})
            click.echo(json.dumps(log[-1]))
            if dev < best:
                best, kept = dev, {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(kept)
    return log


def train_step(model: Gemma2ForCausalLM, optimisers: list[torch.optim.Optimizer], batch: Tensor) -> float:
    """Take one step on `batch` [row, 128], float32 masters under bfloat16 autocast; return nats per token."""
    model.train()
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=batch, use_cache=False).logits  # [row, 128, vocab]
    loss = cross_entropy(logits[:, :-1].float().flatten(0, 1), batch[:, 1:].flatten())
    model.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimiser in optimisers:
        optimiser.step()
    return loss.item()


@torch.no_grad()
def nats_per_token(model: PreTrainedModel, documents: list[Ints]) -> float:
    """Return mean nats over every token of the documents but BOS, packed in rows; summed in float64."""
    model.eval()  # type: ignore[no-untyped-call]
    rows = pack(documents)
    full = torch.from_numpy(np.stack([row for row in rows if len(row) == CONTEXT]))
    batches = [*torch.split(full, 32), *(torch.from_numpy(row)[None] for row in rows if 1 < len(row) < CONTEXT)]
    total, count = 0.0, 0
    for batch in batches:
        logits = model(input_ids=batch, use_cache=False).logits[:, :-1].float().flatten(0, 1)
        target = batch[:, 1:].flatten()
        nats = cross_entropy(logits, target, reduction="none")[target != BOS]
        total, count = total + nats.double().sum().item(), count + len(nats)
    return total / count


def measure(folder: Path, tokens: Corpus, vocab: int) -> dict[str, float]:
    """Measure the saved weights and the trigram model on the same eval tokens (all but BOS).

    The weights see at most the 127 tokens before in the row; the trigram always sees the two before in the document.
    `lm` computes in float32 from the saved bfloat16 weights, `lm_bf16` in bfloat16.
    """
    trigram = KneserNeyTrigram(tokens.train, vocab, BOS)
    n_tokens = sum(map(len, tokens.eval))
    nats = {"trigram": -sum(trigram.log_prob(document).sum() for document in tokens.eval) / n_tokens}
    for name, dtype in (("lm", torch.float32), ("lm_bf16", torch.bfloat16)):
        saved: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        nats[name] = nats_per_token(saved, tokens.eval)
    bits_per_nat = n_tokens / tokens.eval_bytes / math.log(2)
    sizes = {"eval_tokens": n_tokens, "eval_bytes": tokens.eval_bytes, "train_tokens": sum(map(len, tokens.train))}
    figures = {f"{name}_nats_per_token": value for name, value in nats.items()}
    return sizes | figures | {f"{name}_bits_per_byte": value * bits_per_nat for name, value in nats.items()}


def versions() -> dict[str, str]:
    """Return the versions that the exact weights depend on."""
    return {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__}


if __name__ == "__main__":
    main()
