"""The job: texts through a real (tiny) language model, probes, every score of an SAE; what is stable and what is refused."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from evaluate.probing.job import Probing, ProbingConfig, ProbingScores, prepare, read_texts
from evaluate.probing.probes import ProbeConfig
from evaluate.probing.series import merge, series
from evaluate.probing.texts import (
    CHUNK_ELEMENTS,
    TextModel,
    make_bank,
    pool_all,
    pooling_bytes,
    segment_means,
    text_model,
    whole_texts,
)
from pipeline.base.errors import CorpusError, UsageError
from pipeline.model.specials import resolve_bos
from pipeline.model.split_lm import SplitLM, load_tokenizer
from pipeline.sae.nested import NestedSAE
from support import tiny_models
from support.probing_cases import random_sae

WORDS = {"austen": "residual stream", "other": "small model", "female": "best times", "male": "worst line"}
FAST = ProbeConfig(epochs=3, lr=0.02)


@pytest.fixture(scope="module")
def texts_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts whose words give both attributes away, of different lengths."""
    folder = tmp_path_factory.mktemp("scr")
    for split, n in (("train", 40), ("test", 24)):
        rng, lines = np.random.default_rng(n), []
        for author, gender, times in (
            ("austen", "female", 2),
            ("austen", "male", 1),
            ("other", "female", 1),
            ("other", "male", 2),
        ):
            for i in range(times * n + 1):
                text = " ".join([WORDS[author], WORDS[gender]] * int(rng.integers(1, 3)) + [f"line {i}"])
                lines.append(json.dumps({"text": text, "author": author, "gender": gender}))
        (folder / f"{split}.jsonl").write_text("\n".join(lines))
    return folder


def tiny_text_model(folder: Path) -> TextModel:
    lm = SplitLM.load(str(folder), dtype="float32", part="prefix", layers=[1])
    tokenizer = load_tokenizer(str(folder))
    return text_model(lm, tokenizer, 1, resolve_bos(tokenizer, "auto"))


@pytest.fixture(scope="module")
def model(lm_folder: Callable[[str], Path]) -> TextModel:
    return tiny_text_model(lm_folder("gemma2"))


def config(folder: Path, **changes: object) -> ProbingConfig:
    fields = {
        "n_values": (2, 5, 20),
        "seeds": (42, 43),
        "train_size": 60,
        "test_size": 40,
        "context": 24,
        "probe": FAST,
    }
    return ProbingConfig((str(folder),), **(fields | changes))  # type: ignore[arg-type]


def prepared(config: ProbingConfig, model: TextModel, probes_folder: Path | None = None) -> Probing:
    return prepare(config, read_texts(config), model, probes_folder)


def test_job_scores_every_level(texts_folder: Path, model: TextModel) -> None:
    """A job gives every score at every level with intervals."""
    job = prepared(config(texts_folder), model)
    scores = job.score(random_sae(d=64))
    assert set(scores.series) == {
        "scr",
        "scr_dir1",
        "scr_dir2",
        "tpp",
        "tpp_intended",
        "tpp_unintended",
        "k_sparse_probe",
    }
    assert [(r["level"], r["n"]) for r in scores.series["tpp"]] == [(0, 2), (0, 5), (1, 2), (1, 5), (1, 20)]
    for row in scores.series["k_sparse_probe"]:
        assert row["low"] is not None
        assert row["low"] <= row["value"] <= row["high"]
    assert len(job.sample) == 4
    for found in job.sample.values():
        assert found["rows"] == {"train": 60, "test": 40}
    (scr,) = (found for found in job.sample.values() if found["scores"] == ["scr"])
    assert set(scr["accuracy_clean"]) == {"second", "first", "both"}
    json.dumps([scores.series, scores.tasks, job.sample], allow_nan=False)
    assert job.n_bytes == sum(g.bank.rows.nbytes + g.bank.mean.nbytes for g in job.groups)


def test_repeated_jobs_agree(texts_folder: Path, lm_folder: Callable[[str], Path], tmp_path: Path) -> None:
    """Two jobs from nothing give the same numbers and kept probes too."""
    sae, found = random_sae(d=64), []
    for _ in range(2):
        job = prepared(config(texts_folder, scores=("scr", "tpp")), tiny_text_model(lm_folder("gemma2")), tmp_path)
        found.append(job.score(sae))
    assert found[0] == found[1]
    assert len(list(tmp_path.glob("probes-*.safetensors"))) == 2


def test_only_asked_scores_are_computed(texts_folder: Path, model: TextModel) -> None:
    """Only asked scores and levels are computed."""
    job = prepared(config(texts_folder, scores=("tpp",), seeds=(7,)), model)
    assert len(job.sample) == 1
    scores = job.score(random_sae(d=64), levels=[1])
    assert {r["level"] for r in scores.series["tpp"]} == {1}
    assert all(r["low"] is None for r in scores.series["tpp"])  # one seed has no interval
    whole = job.score(random_sae(d=64))
    assert scores.series["tpp"] == [r for r in whole.series["tpp"] if r["level"] == 1]
    assert isinstance(scores, ProbingScores)


def test_residuals_are_of_single_texts(model: TextModel) -> None:
    """Residuals are those of each text alone at its real positions."""
    texts = [
        "residual stream",
        "a small model, line by line: it was",
        "times",
        "best of times of times of times of times",
    ]
    bank = make_bank(texts, model, 8, 3, "x")
    start = 0
    for i, text in enumerate(texts):
        ids = [model.bos, *model.tokenize([text])[0]][:8]
        n = int(bank.n_real[i])
        assert n == len(ids) - 1  # all but BOS
        assert n + int(bank.n_masked[i]) == 8
        alone = model.residual(torch.tensor([ids]))[0, 1:]
        torch.testing.assert_close(bank.rows[start : start + n], alone, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(bank.mean[i], alone.mean(0), rtol=1e-4, atol=1e-4)
        start += n
    assert start == len(bank.rows)


def plain_model(special: tuple[int, ...] = ()) -> TextModel:
    """One token a character; the residual is the token in every one of 3 dimensions."""

    def tokenize(texts: Sequence[str]) -> list[list[int]]:
        return [[ord(c) for c in text] for text in texts]

    def residual(tokens: Tensor) -> Tensor:
        return tokens[..., None].expand(-1, -1, 3).to(torch.bfloat16)

    return TextModel(tokenize, residual, None, special, {})


def test_specials_are_masked_dtype_kept() -> None:
    """The first position and special tokens are masked and the dtype is kept."""
    bank = make_bank(["abcb", "xaab"], plain_model(special=(ord("b"),)), 10, 2, "x")
    assert bank.rows[:, 0].tolist() == [99, 97, 97]
    assert bank.n_real.tolist() == [1, 2]
    assert bank.n_masked.tolist() == [9, 8]
    assert bank.rows.dtype == torch.bfloat16
    assert bank.mean.dtype == torch.float32


def test_text_of_specials_is_refused() -> None:
    """A text of special tokens alone is refused."""
    with pytest.raises(CorpusError, match="no token beside special ones"):
        make_bank(["abc", "a"], plain_model(), 10, 2, "x")


@pytest.mark.parametrize("limit", [1, 7, 64, 10_000])
def test_chunk_changes_no_pooled_latent(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pooled latents do not depend on the chunk."""
    bank = make_bank(["abcb", "xaab", "abcdefgh", "zz"], plain_model(), 10, 2, "x")
    sae = random_sae(d=3)
    whole = pool_all([sae], bank)[0]
    monkeypatch.setitem(__import__("evaluate.probing.texts", fromlist=["x"]).CHUNK_ELEMENTS, "cpu", limit)
    torch.testing.assert_close(pool_all([sae], bank)[0].mean, whole.mean, rtol=1e-5, atol=1e-5)
    one_by_one = sae.encode(bank.rows).split(bank.n_real.tolist())
    torch.testing.assert_close(whole.mean, torch.stack([part.mean(0) for part in one_by_one]), rtol=1e-5, atol=1e-5)


def test_texts_are_read_once_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of texts outside, SAEs of any width inside: what each makes of them is what it makes alone."""
    bank = make_bank(["abcb", "xaab", "abcdefgh", "zz"], plain_model(), 10, 2, "x")
    saes = [random_sae(d=3), random_sae(d=3)]
    saes[1].W_enc.data.mul_(-1)
    monkeypatch.setitem(CHUNK_ELEMENTS, "cpu", 7)
    order: list[int] = []
    encode = type(saes[0]).encode

    def noted(self: NestedSAE, x: Tensor) -> Tensor:
        order.append(saes.index(self))
        return encode(self, x)

    monkeypatch.setattr(type(saes[0]), "encode", noted)
    together = pool_all(saes, bank)
    assert order[:6] == [0, 1, 0, 1, 0, 1]
    for sae, found in zip(saes, together):
        alone = pool_all([sae], bank)[0]
        for name, tensor in vars(alone).items():
            torch.testing.assert_close(vars(found)[name], tensor, msg=name)


def test_texts_beyond_the_host_are_refused() -> None:
    """Residuals larger than the host's free memory are refused after one batch, and others are not."""
    texts, model, n_batches = ["abcb", "xaab", "abcdefgh", "zz"], plain_model(), [0]
    n_bytes = make_bank(texts, model, 10, 2, "x").n_bytes
    make_bank(texts, model, 10, 2, "x", n_bytes)

    def residual(tokens: Tensor) -> Tensor:
        n_batches[0] += 1
        return model.residual(tokens)

    with pytest.raises(UsageError, match=r"residuals of 4 texts \(x\) take"):
        make_bank(texts, dataclasses.replace(model, residual=residual), 10, 2, "x", n_bytes - 1)
    assert n_batches == [1]


def test_pooled_bytes_are_as_planned() -> None:
    """What stays of each SAE takes the bytes that the plan counts; a chunk is of whole texts, one at least."""
    bank = make_bank(["abcb", "xaab", "abcdefgh", "zz"], plain_model(), 10, 2, "x")
    sae = random_sae(d=3)
    width = sae.config.width
    once, each = pooling_bytes(4, 9, 3, width, "cpu")
    assert each == sum(tensor.nbytes for tensor in vars(pool_all([sae], bank)[0]).values())
    assert once == CHUNK_ELEMENTS["cpu"] // width * (6 * 3 + 12 * width)
    assert pooling_bytes(4, 10**7, 3, width, "cpu")[0] == 10**7 * (6 * 3 + 12 * width)


def test_segment_means_are_one_launch() -> None:
    """What an accelerator does in one launch for all texts is what a CPU does text by text."""
    lengths = torch.tensor([3, 1, 40, 7])
    values = torch.randn(51, 6, generator=torch.Generator().manual_seed(0))
    found = torch.empty(4, 6)
    segment_means(values, lengths, out=found)
    torch.testing.assert_close(found, torch.segment_reduce(values, "mean", lengths=lengths, unsafe=True))
    torch.testing.assert_close(found[2], values[4:44].mean(0))


def test_chunks_are_whole_texts() -> None:
    """Chunks are whole texts and never none."""
    assert whole_texts([3, 4, 5], 7) == (2, 7)
    assert whole_texts([3, 4, 5], 2) == (1, 3)
    assert whole_texts([3, 4, 5], 100) == (3, 12)


def test_missing_values_leave_the_mean() -> None:
    """Missing values are left out of the mean over tasks and seeds."""
    one = {("scr", 0, 2): [0.1, None, None]}
    two = {("scr", 0, 2): [0.3, 0.4, None], ("scr", 0, 5): [1.0, 1.0, 1.0]}
    merged = merge([one, two])
    assert merged == {("scr", 0, 2): [0.2, 0.4, None], ("scr", 0, 5): [1.0, 1.0, 1.0]}
    first, second = series(merged)["scr"]
    assert first["value"] == pytest.approx(0.3)
    assert first["high"] == pytest.approx(0.3 + 12.7062047 * 0.1)  # t(0.975, 1 degree of freedom) · 0.2 / √2 / √2
    assert (second["low"], second["high"]) == (1.0, 1.0)
    assert series({("scr", 0, 2): [None, None]})["scr"] == [
        {"n": 2, "level": 0, "value": None, "low": None, "high": None}
    ]


@pytest.mark.parametrize(
    "changes",
    [{"scores": ("srr",)}, {"seeds": ()}, {"seeds": (1, 1)}, {"n_values": (0,)}, {"context": 1}, {"scores": ()}],
    ids=str,
)
def test_impossible_config_is_refused(changes: dict[str, object]) -> None:
    """A config that cannot be is refused."""
    with pytest.raises(UsageError):
        config(Path("x"), **changes)


def test_texts_forge_no_special_tokens(lm_folder: Callable[[str], Path]) -> None:
    """What looks like a special token in a text is text, unless the store was made with --parse-special."""
    lm = SplitLM.load(str(lm_folder("gemma2")), part="prefix", layers=[1])
    tokenizer = tiny_models.build_tokenizer()
    plain, parsed = (text_model(lm, tokenizer, 1, 2, parse_special=parse) for parse in (False, True))
    assert not {1, 2} & set(plain.tokenize(["a<bos>b<eos>"])[0])
    assert {1, 2} <= set(parsed.tokenize(["a<bos>b<eos>"])[0])
