"""First letters from prompts: the published prompt, the word's last token, a model that knows them and ones that do not."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from evaluate.probing import first_letter
from evaluate.probing.first_letter import Words, draw_words, make_prompts, prompt_rows, read_words, vocabulary
from evaluate.probing.texts import TextModel, text_model
from evaluate.run import EvaluateConfig, run
from pipeline.base.errors import DamagedError, UsageError
from pipeline.base.results import read_result
from pipeline.model.points import Point
from pipeline.model.split_lm import SplitLM
from support import letter_models, lm_stores, tiny_models


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that knows first letters, its store, and two SAEs: a latent a letter; and one that absorbs half of a."""
    folder = tmp_path_factory.mktemp("letters")
    model = letter_models.make_letter_model(folder / "model")
    store = lm_stores.make_lm_store(folder, eval_sequences=4, model=model)
    lm_stores.save_member(folder / "runs", store, letter_models.letter_sae(store), seed=0)
    lm_stores.save_member(folder / "runs", store, letter_models.letter_sae(store, n_absorbed=8), seed=1)
    return folder


@pytest.fixture(scope="module")
def results(place: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Results of both members, scored once."""
    return scored(place, tmp_path_factory.mktemp("scored"))


def scored(place: Path, out: Path, **changes: Any) -> list[dict[str, Any]]:
    """Results of both members."""
    config = EvaluateConfig(store=place / "acts.zarr", out=out, **({"scores": ("first_letter",)} | changes))
    outcome = run(config, [place / "runs"])
    assert not outcome.failed
    return [read_result(Path(entry["path"])) for entry in outcome.results]


def some_words(n: int = 50) -> Words:
    """Words, the first thirty to train on."""
    return Words(tuple(letter_models.words()[:n]), np.arange(n) < 30)


def test_prompt_is_the_published_one() -> None:
    """Eleven lines, ten of them answered with their word's capital; the last asks about the word itself."""
    words = some_words()
    for word, prompt in zip(words.text, make_prompts(words, 0)):
        lines = prompt.split("\n")
        assert lines[0] == ""
        assert len(lines) == 12
        assert lines[-1] == f"{word} has the first letter:"
        for line in lines[1:-1]:
            found = re.fullmatch(r" (\w)\w+ has the first letter: ([A-Z])", line)
            assert found
            assert found[1].upper() == found[2]


def test_examples_are_of_own_part() -> None:
    """Ten different words of its own part, never the word; few words give fewer examples, another seed others."""
    words = some_words(40)
    prompts = make_prompts(words, 0)
    for i, prompt in enumerate(prompts):
        examples = [line.split(" has")[0] for line in prompt.split("\n")[1:-1]]
        of_part = {word for word, train in zip(words.text, words.train) if train == words.train[i]}
        assert len(set(examples)) == (10 if words.train[i] else 9)
        assert set(examples) <= of_part - {words.text[i]}
    assert make_prompts(words, 0) == prompts
    assert make_prompts(words, 1) != prompts


def test_words_are_tokens_of_letters() -> None:
    """Of a vocabulary with digits, template words and special tokens: what is letters behind one space or none."""
    found = vocabulary(letter_models.build_tokenizer())
    assert found == sorted([*letter_models.words(), " has", " the", " first", "word"])


def test_words_are_split_by_seed() -> None:
    """Four fifths to train on, each word once, in an order of the seed."""
    found = [f"w{letter}" for letter in letter_models.LETTERS]
    words = draw_words(found, 0)
    assert sorted(words.text) == sorted(found)
    assert int(words.train.sum()) == 21
    assert draw_words(found, 1).text != words.text


@pytest.mark.parametrize(
    ("text", "said"), [("apple\npe4r\n", "line 2: 'pe4r'"), ("two words\n", "line 1"), ("\n", "no word in it")]
)
def test_odd_words_are_named_by_line(tmp_path: Path, text: str, said: str) -> None:
    """What is not one word of letters is refused in one line that names it; so is an empty file, or none."""
    path = tmp_path / "words.txt"
    path.write_text(text)
    with pytest.raises(UsageError, match=said):
        read_words(path)
    with pytest.raises(UsageError, match="cannot be read"):
        read_words(tmp_path / "none.txt")
    path.write_text(" pear\nfig\n\n pear\n")
    assert read_words(path) == [" pear", "fig"]


@pytest.mark.parametrize("point", [Point(1), Point(1, "mlp_out")])
@pytest.mark.parametrize("bos", [2, None])
def test_rows_are_of_last_token(tmp_path: Path, point: Point, bos: int | None) -> None:
    """Words of several tokens too, in any batches, at other hook points too: as Hugging Face has them, a prompt at a time."""
    folder = tiny_models.make_model(tmp_path / "model", "gemma2", max_position_embeddings=512)
    tokenizer = tiny_models.build_tokenizer(adds_bos=False)
    words = Words((" times", " stream", " zebra", " best", "line", " qua"), np.arange(6) < 4)
    lm = SplitLM.load(str(folder), dtype="float32", part="prefix", layers=[point])
    model = text_model(lm, tokenizer, point, bos)
    both = [prompt_rows(words, 0, model, size) for size in (1, 4)]
    assert all(not isinstance(one, int) and one[0] is one[1] for one in both)
    rows = [one[0] for one in both if not isinstance(one, int)]
    prompts, ends = [], []
    for word, prompt in zip(words.text, make_prompts(words, 0)):
        before = prompt[: -len(" has the first letter:")]
        assert before.endswith(word)
        prompts.append([*([] if bos is None else [bos]), *tokenizer(prompt)["input_ids"]])
        ends.append(len(tokenizer(before)["input_ids"]) - 1 + (bos is not None))
    whole = tiny_models.whole_model(folder, torch.float32)
    seen: list[torch.Tensor] = []
    block = whole.model.layers[1]
    target = block if point.hook == "resid_post" else block.post_feedforward_layernorm
    target.register_forward_hook(lambda _, __, output: seen.append(output[0] if isinstance(output, tuple) else output))
    with torch.inference_mode():
        for ids in prompts:
            whole(torch.tensor([ids]))
    wanted = torch.stack([states.reshape(-1, states.shape[-1])[at] for states, at in zip(seen, ends)])
    for found in rows:
        assert isinstance(found, torch.Tensor)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_a_planted_letter_is_found(results: list[dict[str, Any]]) -> None:
    """A latent a letter: nothing absorbed, one latent each, in every level the letters that it holds."""
    clean = results[0]
    found = clean["first_letter"]
    assert len(found["probes"]) == 26
    assert min(found["probes"].values()) > 0.9
    assert found["n_words"] == 26 * letter_models.A_LETTER + 4
    shared, whole = (level["scores"] for level in clean["levels"])
    assert whole["first_letter_f1"] > 0.95
    assert whole["first_letter_recall"] > 0.95
    assert whole["first_letter_n_latents"] == 1
    assert whole["first_letter_full"] == 0
    assert whole["first_letter_fraction"] < 0.02
    assert shared["first_letter_recall"] < 0.6
    letters = found["levels"][-1]["letters"]
    assert letters["n_labels"] == 26
    assert letters["recall"]["low"] <= letters["recall"]["value"] <= letters["recall"]["high"]


def test_an_absorbed_letter_is_told(results: list[dict[str, Any]]) -> None:
    """Where latents of single words carry what the latent of a leaves out, a is absorbed, and no other letter."""
    labels = {label["label"]: label for label in results[1]["first_letter"]["levels"][-1]["labels"]}
    words = draw_words(vocabulary(letter_models.build_tokenizer()), 0)
    absorbed = [word for word in letter_models.words() if word[1] == "a"][:8]
    test = [word for word, train in zip(words.text, words.train) if not train and word[1] == "a"]
    assert labels["a"]["n"] == len(test)
    assert labels["a"]["full"] == pytest.approx(sum(word in absorbed for word in test) / len(test))
    assert labels["a"]["fraction"] == pytest.approx(labels["a"]["full"], abs=0.05)
    assert 0 < labels["a"]["full"] < 1
    assert max(label["full"] for name, label in labels.items() if name != "a") == 0


def test_probes_are_kept(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second job in the same folder trains none and finds the same numbers; other words are other probes; damage is seen."""
    first = scored(place, tmp_path / "a", scores=("absorption", "first_letter"))
    assert first[0].keys() >= {"absorption", "first_letter"}
    kept = list((tmp_path / "a" / "probes").glob("letters-*.safetensors"))
    assert len(kept) == 1
    monkeypatch.setattr(first_letter, "train_probes", None)
    for path in (tmp_path / "a").glob("*.json"):
        path.unlink()
    again = scored(place, tmp_path / "a")
    assert [r["first_letter"] for r in again] == [r["first_letter"] for r in first]
    with pytest.raises(TypeError):
        scored(place, tmp_path / "b", seed=1)
    kept[0].write_bytes(kept[0].read_bytes()[:-1] + b"\x7f")
    config = EvaluateConfig(store=place / "acts.zarr", out=tmp_path / "a", scores=("first_letter",), levels="last")
    with pytest.raises(DamagedError, match="letters-"):
        run(config, [place / "runs"])


def test_model_without_letters_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One sentence says why; scores are null; the family is done, so that the next run skips it."""
    model = letter_models.make_letter_model(tmp_path / "model", knows=False)
    store = lm_stores.make_lm_store(tmp_path, eval_sequences=4, model=model)
    lm_stores.save_member(tmp_path / "runs", store, letter_models.letter_sae(store), seed=0)
    result = scored(tmp_path, tmp_path / "out")[0]
    why = result["first_letter"]["why"]
    assert re.fullmatch(
        r"First letters were not scored: \d+ of them have a probe with an F1 of at least 0\.6 on unseen words, and it takes 20\.",
        why,
    )
    assert why in capsys.readouterr().err
    assert "levels" not in result["first_letter"]
    assert result["levels"][-1]["scores"]["first_letter_full"] is None
    config = EvaluateConfig(store=store.path, out=tmp_path / "out", scores=("first_letter",))
    assert [entry["skipped"] for entry in run(config, [tmp_path / "runs"]).results] == [True]


def test_too_few_positions_are_said(place: Path) -> None:
    """Prompts longer than the model's positions give no number but a sentence with both lengths."""
    model = TextModel(
        lambda texts: [[7] * len(text.split()) for text in texts], lambda tokens: tokens, 2, (), {}, context_limit=9
    )
    found = first_letter.first_letters(some_words(), 0, model, torch.zeros(8), 4, torch.device("cpu"))
    assert found.probes is None
    assert re.search(r"prompts are up to \d+ tokens long and the model has 9 positions", found.about["why"])


def test_joined_words_are_refused() -> None:
    """A tokenizer without a border behind the word is refused in one line that names the word."""
    model = TextModel(lambda texts: [[len(text)] for text in texts], lambda tokens: tokens, None, (), {})
    with pytest.raises(UsageError, match="joins ' azaa' with what follows it"):
        prompt_rows(some_words(), 0, model, 4)


@pytest.mark.parametrize("changed", ["word", "question"])
def test_words_changed_in_place_are_refused(changed: str) -> None:
    """A tokenizer that gives a word's end another token where something follows, all else as it was; or what follows, in a
    prompt of several lines alone."""

    def tokenize(texts: Sequence[str]) -> list[list[int]]:
        ids = [[ord(c) for c in text] for text in texts]
        for text, row in zip(texts, ids):
            if changed == "word" and text.endswith(first_letter.QUESTION):
                row[-len(first_letter.QUESTION) - 1] += 1000
            if changed == "question" and text.count("\n") > 1:
                row[-1] += 1000
        return ids

    model = TextModel(tokenize, lambda tokens: tokens, None, (), {})
    with pytest.raises(UsageError, match="joins ' azaa' with what follows it"):
        prompt_rows(some_words(), 0, model, 4)


def test_words_can_be_given(place: Path, tmp_path: Path) -> None:
    """Words of a file instead of the vocabulary's: too few for letters here, which is said; their hash is in the results."""
    path = tmp_path / "words.txt"
    path.write_text("\n".join(letter_models.words()[:60]))
    result = scored(place, tmp_path / "out", words=path)[0]
    assert result["first_letter"]["n_words"] == 60
    assert "0 of them have a probe" in result["first_letter"]["why"]
    assert re.fullmatch(r"[123] words to train on and [012] to test on", result["first_letter"]["left_out"]["a"])
    assert "words.txt sha256" in result["evaluation"]["families"]["first_letter"]["words"]
    with pytest.raises(UsageError, match="--words names words for --scores first_letter"):
        EvaluateConfig(store=place / "acts.zarr", out=tmp_path / "o", scores=("ev",), words=path)


def test_dry_run_announces_words(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Words, tokens a prompt and layers, before anything is computed."""
    config = EvaluateConfig(store=place / "acts.zarr", out=tmp_path / "out", scores=("first_letter",))
    run(config, [place / "runs"], dry_run=True)
    said = capsys.readouterr().err
    assert re.search(
        r"first letters: 1,174 words in prompts of about \d+ tokens; about .+ once for the layers up to 1", said
    )
    assert not (tmp_path / "out").exists()
