"""The embedded data: corpus, tiny-gemma2 and the sample for spurious-correlation removal."""

from __future__ import annotations

import importlib
import json
import math
from collections import Counter, defaultdict
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM, AutoTokenizer

DATA = Path(__file__).resolve().parents[1] / "data"
MODEL = DATA / "tiny-gemma2"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Import a module of data/ the way its scripts see it."""
    monkeypatch.syspath_prepend(str(DATA))
    return importlib.import_module


@pytest.fixture
def documents(script: Any) -> ModuleType:
    module: ModuleType = script("documents")
    return module


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(MODEL, local_files_only=True)


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(MODEL, local_files_only=True, dtype=torch.float32)


@pytest.fixture(scope="module")
def provenance() -> Any:
    return json.loads((MODEL / "provenance.json").read_text())


@pytest.mark.parametrize("part", ["train", "eval"])
def test_corpus_documents_have_text_and_set(documents: ModuleType, part: str) -> None:
    """Every corpus document has text and the name of its set."""
    corpus = documents.read_documents(DATA / "corpus" / f"{part}.jsonl.zst")
    assert corpus
    assert all(document["text"] and document["meta"]["pile_set_name"] for document in corpus)


def test_train_and_eval_share_no_document(documents: ModuleType) -> None:
    """Train and eval share no document."""
    train, held_out = (
        {document["text"] for document in documents.read_documents(DATA / "corpus" / f"{part}.jsonl.zst")}
        for part in ("train", "eval")
    )
    assert not train & held_out


def test_corpus_is_the_models_own(documents: ModuleType, provenance: Any) -> None:
    """The corpus is the one that the model was made from."""
    for part, expected in provenance["corpus_sha256"].items():
        assert documents.sha256(DATA / "corpus" / f"{part}.jsonl.zst") == expected


def test_model_is_a_whole_gemma_2(model: Any) -> None:
    """The model is a Gemma-2 with both kinds of attention and both soft caps."""
    config = model.config
    assert type(model).__name__ == "Gemma2ForCausalLM"
    assert config.layer_types == ["sliding_attention", "full_attention"] * 3
    assert config.sliding_window < 128
    assert (config.attn_logit_softcapping, config.final_logit_softcapping) == (50.0, 30.0)
    assert config.num_key_value_heads < config.num_attention_heads


def test_shipped_weights_are_bfloat16() -> None:
    """The shipped weights are bfloat16."""
    saved = AutoModelForCausalLM.from_pretrained(MODEL, local_files_only=True)
    assert {parameter.dtype for parameter in saved.parameters()} == {torch.bfloat16}


def test_model_beats_the_trigram(
    script: Any, documents: ModuleType, model: Any, tokenizer: Any, provenance: Any
) -> None:
    """The model predicts held-out rows clearly better than the trigram."""
    texts = [document["text"] for document in documents.read_documents(DATA / "corpus" / "eval.jsonl.zst")]
    ids = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    rows = script("make_model").pack([np.array(row) for row in ids])[:-1:20]  # 66 rows over the whole file
    batch = torch.from_numpy(np.stack(rows))
    with torch.no_grad():
        logits = model(input_ids=batch).logits[:, :-1].flatten(0, 1)
    target = batch[:, 1:].flatten()
    keep = target != tokenizer.bos_token_id
    nats = torch.nn.functional.cross_entropy(logits[keep], target[keep]).item()
    assert nats < provenance["eval"]["trigram_nats_per_token"] - 0.1
    assert nats == pytest.approx(provenance["eval"]["lm_nats_per_token"], abs=0.15)


def test_tokenizer_prepends_bos_when_asked(tokenizer: Any) -> None:
    """The tokenizer prepends BOS only with special tokens."""
    assert tokenizer("whale")["input_ids"][0] == tokenizer.bos_token_id == 2
    assert tokenizer.bos_token_id not in tokenizer("whale", add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize(
    "text", ["", " two  blanks\n\n\ttab ", "naïve — “quoted”", "мир 世界 🐳🏳️‍🌈", "a\u0000b\u200d\ufeff"]
)
def test_tokenizer_gives_any_text_back(tokenizer: Any, text: str) -> None:
    """The tokenizer gives any text back."""
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text


def test_padding_is_on_the_left(tokenizer: Any) -> None:
    """Padding is on the left as in Gemma."""
    batch = tokenizer(["whale", "the white whale"], padding=True)
    assert batch["input_ids"][0][0] == tokenizer.pad_token_id
    assert batch["attention_mask"][0][0] == 0


@pytest.mark.parametrize(("part", "n"), [("train", 300), ("test", 100)])
def test_scr_cells_hold_n_rows(documents: ModuleType, part: str, n: int) -> None:
    """SCR has n rows in every cell and twice that in the correlated ones."""
    rows = documents.read_documents(DATA / "scr" / f"{part}.jsonl.zst")
    cells = Counter((row["author"], row["gender"]) for row in rows)
    assert len(cells) == 4
    assert min(cells.values()) >= n
    assert min(cells["austen", "female"], cells["other", "male"]) >= 2 * n


def test_scr_parts_share_no_text(documents: ModuleType) -> None:
    """SCR parts share neither a text nor a document."""
    train, test = (documents.read_documents(DATA / "scr" / f"{part}.jsonl.zst") for part in ("train", "test"))
    for column in ("text", "document"):
        assert not {row[column] for row in train} & {row[column] for row in test}


def test_scr_passages_hold_one_gender(script: Any) -> None:
    """An SCR passage holds pronouns of one gender only."""
    filler = "word " * 40 + "end. "
    text = "She sat. " + filler + "He rose; " + filler + "Him--her " + filler
    genders = [gender for _, gender in script("make_scr").find_passages(text)]
    assert genders == ["female", "male"]


def test_make_scr_reproduces_the_shipped_rows(script: Any, documents: ModuleType, tmp_path: Path) -> None:
    """make_scr gives the shipped rows again."""
    result = CliRunner().invoke(script("make_scr").main, ["--out", str(tmp_path)], catch_exceptions=False)
    assert result.exit_code == 0
    for name in ("train.jsonl.zst", "test.jsonl.zst"):
        assert documents.read_documents(tmp_path / name) == documents.read_documents(DATA / "scr" / name)


TINY = ["--steps=2", "--max-documents=3", "--vocab=300", "--layers=2", "--d-model=96", "--rows-per-step=2"]


def test_make_model_is_reproducible(script: Any, tmp_path: Path) -> None:
    """make_model writes a loadable folder and the same one again."""
    threads = torch.get_num_threads()
    for name in ("a", "b"):
        out = ["--out", str(tmp_path / name)]
        assert (
            CliRunner()
            .invoke(script("make_model").main, [*TINY, "--threads=1", *out], catch_exceptions=False)
            .exit_code
            == 0
        )
    torch.set_num_threads(threads)
    for name in ("model.safetensors", "tokenizer.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "a").config.num_hidden_layers == 2
    assert AutoTokenizer.from_pretrained(tmp_path / "a")("x")["input_ids"][0] == 2


def test_make_model_refuses_existing_folder(script: Any, tmp_path: Path) -> None:
    """make_model refuses a folder that exists."""
    result = CliRunner().invoke(script("make_model").main, ["--out", str(tmp_path)])
    assert result.exit_code == 1
    assert f"{tmp_path} exists" in result.output


def test_trigram_is_a_distribution(script: Any) -> None:
    """The trigram is a distribution after any context."""
    text = np.random.default_rng(0).zipf(1.5, 3000) % 47 + 3
    trigram = script("trigram").KneserNeyTrigram([text[:1500], text[1500:]], vocab=50, bos=2)
    for before, previous in [(2, 2), (2, int(text[0])), (int(text[7]), int(text[8])), (49, 49), (0, 1)]:
        assert trigram.distribution(before, previous).sum() == pytest.approx(1.0, abs=1e-12)


def test_trigram_equals_a_slow_reference(script: Any) -> None:
    """The trigram equals a slow reference."""
    rng, vocab, bos = np.random.default_rng(1), 12, 2
    texts = [rng.zipf(1.6, 400) % 9 + 3 for _ in range(3)]
    trigram = script("trigram").KneserNeyTrigram(texts, vocab, bos)
    unseen = rng.integers(3, vocab, 30)
    expected = [math.log(_slow_kneser_ney(texts, vocab, bos, gram)) for gram in _grams(unseen, bos)]
    np.testing.assert_allclose(trigram.log_prob(unseen), expected, rtol=1e-12)


def _grams(text: Any, bos: int) -> list[tuple[int, ...]]:
    padded = [bos, bos, *map(int, text)]
    return [tuple(padded[i : i + 3]) for i in range(len(text))]


def _slow_kneser_ney(texts: list[Any], vocab: int, bos: int, gram: tuple[int, ...]) -> float:
    counts: Counter[tuple[int, ...]] = Counter(g for text in texts for g in _grams(text, bos))
    orders = [counts]
    for _ in range(2):
        orders.append(Counter(longer[1:] for longer in orders[-1]))
    prob = 1.0 / vocab
    for n, order in enumerate(reversed(orders), start=1):
        *context, token = gram[3 - n :]
        after = {g[-1]: count for g, count in order.items() if list(g[:-1]) == context}
        if after:
            discount = _slow_discounts(order)
            total = sum(after.values())
            reserved = sum(discount[min(count, 3)] for count in after.values())
            own = after.get(token, 0)
            prob = (own - discount[min(own, 3)]) / total + reserved / total * prob
    return prob


def _slow_discounts(order: Counter[tuple[int, ...]]) -> list[float]:
    n: dict[int, int] = defaultdict(int)
    for count in order.values():
        n[count] += 1
    if not all(n[k] for k in (1, 2, 3, 4)):
        return [0.0, 0.5, 1.0, 1.5]
    y = n[1] / (n[1] + 2 * n[2])
    raw = [0.0] + [k - (k + 1) * y * n[k + 1] / n[k] for k in (1, 2, 3)]
    return [min(max(discount, 0.0), float(k)) for k, discount in enumerate(raw)]
