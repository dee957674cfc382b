"""python -m evaluate.explain: prompts out, answers in, scores."""

from __future__ import annotations

if __name__ == "__main__":
    from pipeline.base import startup  # before what takes time to import

    startup.begin()

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from pipeline.base.cli import COUNT, NAMED_SOURCE, OUT_FILE, SOURCE, main
from pipeline.base.digests import write_sealed, write_vouched
from pipeline.base.errors import UsageError
from pipeline.base.progress import say

FORMAT, VERSION = "nested-sae-explanations", 1


@click.command(context_settings={"show_default": True})
@click.argument("checkpoint", type=SOURCE)
@click.option("--store", required=True, type=SOURCE, help="Store of its model; the eval split is read.")
@click.option(
    "--model", type=NAMED_SOURCE, help="Folder or Hub id, for its tokenizer.  [default: the one the store names]"
)
@click.option("--latents", default="", help="Which, like 3,17,40.  [default: --sample of them]")
@click.option("--sample", default=50, type=COUNT, help="How many to draw by --seed, where --latents names none.")
@click.option("--prompts", type=OUT_FILE, help="Write prompts: the explainer's, or, with its --answers, the judge's.")
@click.option(
    "--answers",
    multiple=True,
    type=SOURCE,
    help="What a model answered, to the explainer's prompts and to the judge's; repeat it.",
)
@click.option("--out", type=OUT_FILE, help="Write labels and scores (JSON), the rule-based baseline's beside them.")
@click.option("--pages", type=SOURCE, help="Folder of its latent pages (….latents) to show labels on.")
@click.option("--rows", default=131_072, type=COUNT, help="Rows of the eval split to look for examples in.")
@click.option("--seed", default=0, help="Draws latents, examples and their order; the same in every call.")
@click.option("--device", default="auto", help="auto, cpu, cuda, cuda:N.")
@click.option("--allow-other-store", is_flag=True, help="Use a store other than the one trained on.")
def cli(
    checkpoint: Path,
    store: Path,
    model: str | None,
    latents: str,
    sample: int,
    prompts: Path | None,
    answers: tuple[Path, ...],
    out: Path | None,
    pages: Path | None,
    rows: int,
    seed: int,
    device: str,
    allow_other_store: bool,
) -> None:
    """Explain latents in words: write prompts for any chat model, read its answers back, score them. No model is asked by us.

    Examples are windows of the store's held-out text, by quantile of activation, those that score never those that explain.
    A judge is asked by detection (in which windows does it fire) and by fuzzing (are the marks on the right tokens). Scores
    are balanced accuracies with 95 % intervals, beside those of a rule: "fires on its strongest tokens".

    \b
    python -m pipeline explain SAE --store acts.zarr --prompts explain.jsonl
    python -m pipeline explain SAE --store acts.zarr --answers explained.jsonl --prompts judge.jsonl
    python -m pipeline explain SAE --store acts.zarr --answers explained.jsonl --answers judged.jsonl --out labels.json
    """
    if not (prompts or out or pages):
        raise UsageError("nothing to do: give --prompts, --out or --pages")
    from evaluate.explain.answers import read_answers

    said: dict[str, str] = {}
    for path in answers:
        found = read_answers(path)
        if again := sorted(said.keys() & found.keys()):
            raise UsageError(f"--answers {path}: answers {again[0]!r} again; keep one answer a prompt")
        said |= found
    asked = ask(checkpoint, store, model, chosen_latents(latents), sample, rows, seed, device, allow_other_store)
    if said and not asked.ids & said.keys():
        raise UsageError(
            "--answers: none is an answer to a prompt of this checkpoint, store, choice of latents and --seed"
        )
    report(asked, said, prompts, out, pages)


def chosen_latents(text: str) -> tuple[int, ...]:
    """Numbers with commas between; () for none. Raises UsageError."""
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not all(word.isdecimal() for word in words):
        raise UsageError(f"--latents {text!r}: give numbers with commas between, like 3,17,40")
    return tuple(dict.fromkeys(map(int, words)))


@dataclass(frozen=True)
class Asked:
    """Everything of some latents that can be asked: examples, questions, the tokenizer's text, and where they come from."""

    checkpoint: Path
    sha256: str
    store: str
    seed: int
    width: int
    levels: Sequence[int]
    examples: Sequence[Any]
    questions: Mapping[int, Sequence[Any]]
    text: Any

    @property
    def ids(self) -> set[str]:
        """Of every prompt."""
        from evaluate.explain.prompts import explain_id

        return {explain_id(self.sha256, e.latent) for e in self.examples} | {
            q.id for one in self.questions.values() for q in one
        }


def ask(
    checkpoint: Path,
    store: Path,
    model: str | None,
    latents: Sequence[int],
    sample: int,
    rows: int,
    seed: int,
    device: str,
    allow_other_store: bool,
) -> Asked:
    """Find examples of the latents and make the questions. Raises UsageError, CheckpointError, StoreError, DamagedError."""
    from evaluate.checkpoints.find import open_checkpoint, require_fit
    from evaluate.checkpoints.place import info_of, placed
    from evaluate.explain.examples import find_examples
    from evaluate.explain.prompts import questions
    from pipeline.base.runtime import numpy_rng, resolve_device
    from pipeline.base.token_text import TokenText
    from pipeline.model.split_lm import load_tokenizer
    from pipeline.sae.hub import find_checkpoint
    from pipeline.store.reader import Store

    opened, found = Store.open(store), open_checkpoint(find_checkpoint(checkpoint))
    if not opened.layout.has_tokens:
        raise UsageError(f"{store}: its rows are of no text, so there is nothing to explain them by")
    found = placed(found, opened, lambda: info_of(opened, model))
    require_fit(found, opened, allow_other_store=allow_other_store)
    width = found.sae.width
    if wrong := [latent for latent in latents if latent >= width]:
        raise UsageError(f"--latents {wrong[0]}: {checkpoint} has latents 0 to {width - 1}")
    if not latents:
        latents = sorted(map(int, numpy_rng("explained latents", seed).permutation(width)[:sample]))
    recorded = opened.config.get("revision") if model is None else None
    tokenizer = load_tokenizer(
        model or opened.config["model"], None if recorded == "local" else recorded, trust_remote_code=False
    )
    sae = found.load().float().to(resolve_device(device)).eval().requires_grad_(False)
    examples = list(find_examples(sae, opened, latents, rows, seed))
    asked = {e.latent: list(questions(found.sha256, e, seed)) for e in examples if not e.skipped}
    return Asked(
        checkpoint, found.sha256, opened.id, seed, width, found.sae.levels, examples, asked, TokenText(tokenizer)
    )


def report(asked: Asked, said: Mapping[str, str], prompts: Path | None, out: Path | None, pages: Path | None) -> None:
    """Write what was asked for, and say how it went."""
    from evaluate.explain.answers import label_of, score
    from evaluate.explain.prompts import explain_id, explain_prompt, judge_prompt, token_judge, token_label

    used = [e for e in asked.examples if not e.skipped]
    labels = {e.latent: label_of(said.get(explain_id(asked.sha256, e.latent), "")) for e in used}
    labels = {latent: label for latent, label in labels.items() if label}
    lines, entries = [], []
    for e in used:
        questions = asked.questions[e.latent]
        rule, top = token_label(e, asked.text)
        by_rule = {q.id: json.dumps(token_judge(q, top)) for q in questions}
        label = labels.get(e.latent)
        if said and label:
            lines += [judge_prompt(q, label, asked.text) for q in questions]
        elif not said:
            lines.append(explain_prompt(asked.sha256, e, asked.text))
        level = next(i for i, size in enumerate(asked.levels) if e.latent < size)
        baseline = {"label": rule} | score(questions, by_rule)
        entries.append(
            {"latent": e.latent, "level": level, "label": label, **score(questions, said), "baseline": baseline}
        )
    skipped = {str(e.latent): e.skipped for e in asked.examples if e.skipped}
    say(f"{len(used)} latents with examples, {len(skipped)} without; {len(labels)} labels")
    if prompts is not None:
        write_vouched(prompts, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode())
        say(f"{prompts}: {len(lines)} prompts")
    if out is not None:
        head = {"format": FORMAT, "version": VERSION, "store": asked.store, "seed": asked.seed}
        about = {"checkpoint": {"path": str(asked.checkpoint), "sha256": asked.sha256}, "skipped": skipped}
        write_sealed(out, head | about | {"latents": entries, "summary": summary(entries)})
        say(f"{out}: {json.dumps(summary(entries))}")
    if pages is not None:
        from evaluate.latents.files import read_summary, write_labels

        if read_summary(pages)["n_latents"] != asked.width:
            raise UsageError(f"--pages {pages}: are of another SAE, not of {asked.width} latents")
        write_labels(pages, labels)
        say(f"{pages}: {len(labels)} labels; write the report again to see them")


def summary(entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Mean balanced accuracy over latents with a 95 % t-interval, of the answers and of the rule, by kind of question."""
    from evaluate.explain.prompts import KINDS
    from evaluate.statistics import estimate

    found: dict[str, Any] = {}
    for who, scores in (("answers", entries), ("rule", [entry["baseline"] for entry in entries])):
        for kind in KINDS:
            values = [s[kind]["balanced_accuracy"] for s in scores if s[kind]["balanced_accuracy"] is not None]
            e = estimate(values)
            found[f"{who}_{kind}"] = None if e is None else {"mean": e.mean, "half": e.half, "n": e.n}
    return found


if __name__ == "__main__":
    main(cli, "evaluate.explain")
