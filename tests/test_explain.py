"""Explanations as data: prompts hold what they should and not the answers; answers are scored as hand values say."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from evaluate.explain.__main__ import cli
from evaluate.explain.answers import balanced_accuracy, label_of, read_answers, score, verdicts_of, wilson
from evaluate.explain.examples import QUANTILES, Chosen, Examples, Window, choose, window
from evaluate.explain.prompts import (
    PER_PROMPT,
    explain_id,
    explain_prompt,
    judge_prompt,
    questions,
    token_judge,
    token_label,
)
from evaluate.latents.files import read_labels, write_labels
from pipeline.base.digests import beside_problem, is_sealed
from pipeline.base.errors import DamagedError, PipelineError, UsageError
from pipeline.base.runtime import numpy_rng
from support import lm_stores

SHA = "0123456789abcdef"


def text(token: int) -> str:
    return f" t{token}"


def made(n_sequences: int = 60, context: int = 40, every: int = 2) -> Examples:
    """A latent that fires on token 7 alone, in every other sequence, the later the stronger."""
    rng = numpy_rng("test explain")
    tokens = rng.integers(10, 90, (n_sequences, context)).astype(np.int32)
    acts = np.zeros((n_sequences, context), np.float32)
    for s in range(0, n_sequences, every):
        at = int(rng.integers(context))
        tokens[s, at], acts[s, at] = 7, 1 + s
    return examples_of(3, tokens, acts, numpy_rng("draw"))


def examples_of(
    latent: int, tokens: npt.NDArray[np.int32], acts: npt.NDArray[np.float32], rng: np.random.Generator
) -> Examples:
    """The examples of a latent whose activations [sequence, position] are all at hand."""
    chosen: Chosen = choose(acts.max(1), np.packbits(acts > 0, axis=1), acts.shape[1], rng)

    def cut(places: Sequence[tuple[int, int]]) -> tuple[Window, ...]:
        return tuple(window(tokens[s], acts[s], middle) for s, middle in places)

    explain, score = ([(s, int(acts[s].argmax())) for s in part] for part in (chosen.explain, chosen.score))
    return Examples(latent, cut(explain), cut(score), cut(chosen.silent), chosen.skipped)


def test_examples_come_from_every_quantile() -> None:
    """Two of each fifth explain, two others score; silent windows are as many, and silent."""
    found = made()
    assert len(found.explain) == len(found.score) == len(found.silent) == 2 * QUANTILES
    assert not set(found.explain) & set(found.score)
    assert all(len(w.fired) == 1 and w.tokens[w.fired[0]] == 7 for w in (*found.explain, *found.score))
    assert all(not w.fired for w in found.silent)
    peaks = [max(w.acts) for w in found.explain]
    fifths = [sum(low < p <= low + 12 for p in peaks) for low in (48, 36, 24, 12, 0)]
    assert fifths == [2, 2, 2, 2, 2]


def test_rare_and_dense_latents_are_skipped() -> None:
    """With the reason, not with half an example."""
    assert made(n_sequences=16).skipped == "fires in 8 sequences, 10 are needed"
    everywhere = examples_of(0, np.ones((30, 8), np.int32), np.ones((30, 8), np.float32), numpy_rng("x"))
    assert everywhere.skipped == "fires in every window"


def test_the_explainer_sees_marks_and_strengths() -> None:
    """The strongest is 10; the firing token is marked, no other."""
    prompt = explain_prompt(SHA, made(), text)
    shown = prompt["messages"][1]["content"].splitlines()
    assert prompt["custom_id"] == explain_id(SHA, 3) == "0123456789ab-3-explain"
    assert [line.count("<<") for line in shown] == [1] * 10
    assert all("<< t7>>(" in line for line in shown)
    assert any("(10)" in line for line in shown)


def test_detection_asks_of_unmarked_windows() -> None:
    """Half of them fire; the prompt says neither which nor marks any."""
    asked = [q for q in questions(SHA, made(), 0) if q.kind == "detection"]
    right = [one for q in asked for one in q.right]
    assert (len(right), sum(right)) == (20, 10)
    assert all(len(q.windows) == PER_PROMPT for q in asked)
    for q in asked:
        prompt = judge_prompt(q, "a label", text)["messages"]
        assert "<<" not in prompt[1]["content"]
        assert str(list(q.right)) not in prompt[1]["content"]
        assert prompt[1]["content"].startswith("The unit is active on: a label\n1. ")


def test_fuzzing_marks_rightly_and_wrongly() -> None:
    """Half of the windows have the firing token marked, half as many others."""
    asked = [q for q in questions(SHA, made(), 0) if q.kind == "fuzzing"]
    items = [item for q in asked for item in zip(q.windows, q.marked, q.right, strict=True)]
    assert sum(right for _, _, right in items) == 5
    for one, marked, right in items:
        assert (marked == one.fired) is bool(right)
        assert len(marked) == 1


def test_questions_are_the_same_again() -> None:
    """Answers of another day fit; another seed asks in another order."""
    assert list(questions(SHA, made(), 0)) == list(questions(SHA, made(), 0))
    assert list(questions(SHA, made(), 0)) != list(questions(SHA, made(), 1))


def test_rule_finds_one_token_latent() -> None:
    """The baseline: right in every window, by both kinds of question."""
    found = made()
    label, top = token_label(found, text)
    assert label == "the tokens ' t7'"
    asked = list(questions(SHA, found, 0))
    scores = score(asked, {q.id: json.dumps(token_judge(q, top)) for q in asked})
    assert {kind: one["balanced_accuracy"] for kind, one in scores.items()} == {"detection": 1.0, "fuzzing": 1.0}
    blind = score(asked, {q.id: json.dumps(token_judge(q, (8,))) for q in asked})
    assert blind["detection"]["balanced_accuracy"] == 0.5


def test_balanced_accuracy_by_hand() -> None:
    """3 of 4 yes and 1 of 2 no rightly: 0.625, though 4 of 6 are right; the interval is Newcombe's of Wilson's."""
    found = balanced_accuracy([1, 1, 1, 1, 0, 0], [1, 1, 1, 0, 0, 1])
    assert found is not None
    assert found["balanced_accuracy"] == 0.625
    (a, b), (c, d) = wilson(3, 4), wilson(1, 2)
    assert found["low"] == pytest.approx(0.625 - ((0.75 - a) ** 2 + (0.5 - c) ** 2) ** 0.5 / 2)
    assert found["high"] == pytest.approx(0.625 + ((b - 0.75) ** 2 + (d - 0.5) ** 2) ** 0.5 / 2)
    assert balanced_accuracy([1, 1], [1, 0]) is None


def test_wilson_is_scipy_s() -> None:
    """Of shares at both ends too."""
    from scipy.stats import binomtest

    for hits, n in ((0, 5), (3, 5), (5, 5), (17, 40)):
        expected = binomtest(hits, n).proportion_ci(method="wilson")
        assert wilson(hits, n) == pytest.approx((expected.low, expected.high))


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("[1, 0, 1]", [1, 0, 1]),
        ("I think [0,0,0], no: [1,0,1].", [1, 0, 1]),
        ("[1, 0]", None),
        ("[1, 2, 0]", None),
        ("yes, no, yes", None),
        ("", None),
    ],
)
def test_verdicts_are_read_or_counted_unreadable(answer: str, expected: list[int] | None) -> None:
    """Never guessed."""
    assert verdicts_of(answer, 3) == expected


def test_unanswered_and_unreadable_prompts_are_counted() -> None:
    """And what is left is scored."""
    asked = [q for q in questions(SHA, made(), 0) if q.kind == "detection"]
    answers = {q.id: json.dumps(list(q.right)) for q in asked[:-1]} | {asked[0].id: "who knows"}
    found = score(asked, answers)["detection"]
    assert (found["n"], found["unanswered"], found["unreadable"], found["balanced_accuracy"]) == (10, 1, 1, 1.0)


@pytest.mark.parametrize(
    ("answer", "label"),
    [("spaces", "spaces"), ("Let me see.\n\nExplanation: names of rivers\n", "names of rivers"), (" \n", "")],
)
def test_labels_are_the_last_line(answer: str, label: str) -> None:
    """Whatever a model thinks aloud before."""
    assert label_of(answer) == label


def test_answers_of_common_forms_read(tmp_path: Path) -> None:
    """Plain, a conversation, and a batch service's; what ends a line to Python alone stands in a text."""
    lines: list[dict[str, Any]] = [
        {"custom_id": "a", "content": "1\u2028\x85"},
        {"custom_id": "b", "messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "2"}]},
        {"custom_id": "c", "response": {"body": {"choices": [{"message": {"content": "3"}}]}}},
    ]
    text = "\r\n".join(json.dumps(line, ensure_ascii=False) for line in lines)
    (tmp_path / "a.jsonl").write_text(text + "\n\n", newline="")
    assert read_answers(tmp_path / "a.jsonl") == {"a": "1\u2028\x85", "b": "2", "c": "3"}


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "line 1 is not JSON"),
        ("[" * 5000, "line 1 is not JSON"),
        ('{"content": "x"}', "custom_id"),
        ('{"custom_id": "a", "content": 3}', "content"),
        ('{"custom_id": "a", "messages": [{"role": "user", "content": "x"}]}', "assistant"),
        ('{"custom_id": "a", "response": {"body": {"choices": []}}}', "choices"),
        ('{"custom_id": "a", "content": ""}\n{"custom_id": "a", "content": ""}', "line 2.* again"),
    ],
)
def test_bad_answers_are_one_line(tmp_path: Path, line: str, said: str) -> None:
    """Naming the line."""
    (tmp_path / "a.jsonl").write_text(line + "\n")
    with pytest.raises(DamagedError, match=said):
        read_answers(tmp_path / "a.jsonl")


def test_labels_become_visible_text(tmp_path: Path) -> None:
    """What reorders or hides text is spelled out; another file is refused."""
    write_labels(tmp_path, {3: "riv\u202eers", 5: "x" * 999})
    assert read_labels(tmp_path) == {3: "riv⟨U+202E⟩ers", 5: "x" * 300}
    (tmp_path / "labels.json").write_text('{"format": "other", "labels": {}}')
    with pytest.raises(DamagedError, match="format"):
        read_labels(tmp_path)
    (tmp_path / "labels.json").write_text('{"format": "nested-sae-latent-labels", "labels": {"x": "y"}}')
    with pytest.raises(DamagedError, match="labels"):
        read_labels(tmp_path)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with model, acts.zarr and a member in runs."""
    folder = tmp_path_factory.mktemp("explain")
    store = lm_stores.make_lm_store(folder, eval_sequences=70)
    lm_stores.save_member(folder / "runs", store, lm_stores.make_sae(store))
    return folder


def command(place: Path, *words: str) -> None:
    member = next((place / "runs").iterdir())
    cli.main([str(member), "--store", str(place / "acts.zarr"), *words], standalone_mode=False)


def test_a_whole_round_is_scored(place: Path, tmp_path: Path) -> None:
    """Prompts, an explainer's answers, a judge's prompts, a perfect judge's answers, scores; labels on the pages."""
    some = ("--latents", "0,1,2,3,4,5,6,7")
    command(place, *some, "--prompts", str(tmp_path / "explain.jsonl"))
    asked = [json.loads(line) for line in (tmp_path / "explain.jsonl").read_text().splitlines()]
    assert asked
    answers = [{"custom_id": one["custom_id"], "content": f"label of {one['custom_id']}"} for one in asked]
    (tmp_path / "explained.jsonl").write_text("".join(json.dumps(one) + "\n" for one in answers))
    command(place, *some, "--answers", str(tmp_path / "explained.jsonl"), "--prompts", str(tmp_path / "judge.jsonl"))
    judged = [json.loads(line) for line in (tmp_path / "judge.jsonl").read_text().splitlines()]
    assert all("The unit is active on: label of" in one["messages"][1]["content"] for one in judged)
    verdicts = []
    for one in judged:
        n = one["messages"][1]["content"].count("\n")
        verdicts.append({"custom_id": one["custom_id"], "content": json.dumps([1] * n)})
    (tmp_path / "judged.jsonl").write_text("".join(json.dumps(one) + "\n" for one in verdicts))
    both = ("--answers", str(tmp_path / "explained.jsonl"), "--answers", str(tmp_path / "judged.jsonl"))
    command(place, *some, *both, "--out", str(tmp_path / "labels.json"))
    found = json.loads((tmp_path / "labels.json").read_text())
    assert len(found["latents"]) + len(found["skipped"]) == 8
    assert found["latents"][0]["label"].startswith("label of ")
    assert all(one["detection"]["balanced_accuracy"] == 0.5 for one in found["latents"])
    assert found["summary"]["rule_detection"]["n"] == len(found["latents"])
    assert is_sealed(tmp_path / "labels.json", found)
    assert [beside_problem(tmp_path / name) for name in ("explain.jsonl", "judge.jsonl")] == ["", ""]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "nothing to do"),
        (("--latents", "x", "--prompts", "p.jsonl"), "--latents 'x'"),
        (("--latents", "99999", "--prompts", "p.jsonl"), "has latents 0 to"),
        (("--answers", "none.jsonl", "--prompts", "p.jsonl"), "cannot be read"),
    ],
)
def test_bad_commands_are_one_line(place: Path, words: tuple[str, ...], said: str) -> None:
    """Before anything is written."""
    with pytest.raises(UsageError, match=said):
        command(place, *words)


def test_answers_to_other_prompts_are_refused(place: Path, tmp_path: Path) -> None:
    """Of another checkpoint, choice or seed."""
    (tmp_path / "a.jsonl").write_text('{"custom_id": "ffff-0-explain", "content": "x"}\n')
    with pytest.raises(UsageError, match="none is an answer to a prompt of this"):
        command(place, "--latents", "0,1", "--answers", str(tmp_path / "a.jsonl"), "--out", str(tmp_path / "o.json"))


def test_a_store_without_text_is_refused(place: Path, tmp_path: Path) -> None:
    """There is nothing to explain its rows by."""
    import torch

    import pipeline

    store = pipeline.write_store(torch.randn(2000, 8), tmp_path / "rows.zarr", quiet=True)
    with pytest.raises(PipelineError, match="its rows are of no text"):
        member = next((place / "runs").iterdir())
        cli.main([str(member), "--store", str(store.path), "--prompts", str(tmp_path / "p")], standalone_mode=False)
