"""A tiny language model that knows the first letters of its words, one that does not, and SAEs on the first."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from pipeline.sae.config import SAEConfig
from pipeline.sae.nested import NestedSAE
from pipeline.store.reader import Store
from support import tiny_models

LETTERS = "abcdefghijklmnopqrstuvwxyz"
A_LETTER = 45
"""Words that begin with each."""
SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>"]
OTHERS = ["\n", "▁has", "▁the", "▁first", "▁letter:", "word", "▁12", "▁x7"]
STRENGTH = 6.0


def words() -> list[str]:
    """` azab`, ` bzac` …: many for each letter, not in the order of letters."""
    return [f" {first}z{LETTERS[i % 26] * (1 + i // 26)}{first}" for i in range(A_LETTER) for first in LETTERS]


def build_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Whole words, a space before each; what is not among them is <unk>."""
    tokens = [*SPECIAL, *OTHERS, *(word.replace(" ", "▁") for word in words())]
    core = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    core.decoder = decoders.Metaspace(prepend_scheme="never")
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", unk_token="<unk>"
    )


def directions(d_model: int = 128) -> torch.Tensor:
    """A unit direction a letter, at right angles."""
    draw = torch.randn(d_model, 26, generator=torch.Generator().manual_seed(0))
    return torch.linalg.qr(draw).Q.T


def make_letter_model(folder: Path, *, knows: bool = True) -> Path:
    """A tiny Llama whose word embeddings hold the direction of their first letter, if it knows them."""
    torch.manual_seed(0)
    config = tiny_models.config(
        "llama", hidden_size=128, vocab_size=1200, num_hidden_layers=3, max_position_embeddings=128
    )
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        rows = model.get_input_embeddings().weight
        rows.copy_(0.3 * torch.randn(rows.shape))
        if knows:
            first = len(SPECIAL) + len(OTHERS)
            letter = torch.tensor([LETTERS.index(word[1]) for word in words()])
            rows[first : first + len(letter)] += STRENGTH * directions(rows.shape[1])[letter]
    model.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


def letter_sae(store: Store, n_absorbed: int = 0) -> NestedSAE:
    """A latent a letter, the first thirteen shared; and a latent for each of so many words with a, which the latent of a
    leaves alone. Rows are those of `make_letter_model`, whose layers change little."""
    tokenizer = build_tokenizer()
    model = transformers.AutoModelForCausalLM.from_pretrained(store.config["model"], dtype=torch.float32)
    rows = model.get_input_embeddings().weight.detach()
    letters = directions(store.d_model)
    width = 26 + n_absorbed
    sae = NestedSAE(SAEConfig(d_model=store.d_model, width=width, levels=(13, width) if not n_absorbed else (width,)))
    sae.center, sae.scale = store.mean.clone(), torch.tensor(1.0)
    decoder = torch.zeros(width, store.d_model)
    decoder[:26] = letters
    encoder, bias = decoder.T.clone(), torch.full((width,), -0.6 * STRENGTH)
    of_a = [word for word in words() if word[1] == "a"]
    for i, word in enumerate(of_a[:n_absorbed]):
        row = rows[tokenizer.convert_tokens_to_ids(word.replace(" ", "▁"))]
        own = torch.nn.functional.normalize(row - (row @ letters[0]) * letters[0], dim=0)
        decoder[26 + i] = torch.nn.functional.normalize(row, dim=0)
        encoder[:, 26 + i] = 2.5 * (letters[0] + own)
        bias[26 + i] = -2.5 * (STRENGTH + 1.2)
        encoder[:, 0] -= 1.2 * own
    sae.W_dec.data, sae.W_enc.data, sae.b_enc.data = decoder, encoder, bias
    return sae.requires_grad_(False)


def hidden_rows(folder: Path, prompts: list[list[int]], positions: list[int], layer: int) -> np.ndarray:
    """Hugging Face's hidden states after a layer, one prompt at a time, at one position each."""
    model = tiny_models.whole_model(folder, torch.float32)
    found = []
    with torch.inference_mode():
        for ids, at in zip(prompts, positions):
            states = model(torch.tensor([ids]), output_hidden_states=True).hidden_states
            found.append(states[layer + 1][0, at].numpy())
    return np.stack(found)
