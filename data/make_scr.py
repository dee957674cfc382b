"""Make the sample for spurious-correlation removal: short passages with an author and a pronoun gender.

    python data/make_scr.py --out DIR

Everything comes from the training corpus and the result depends on nothing else: no model, no random number.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
from documents import read_documents, write_documents

HERE = Path(__file__).parent
WORDS = 36  # words a passage, about 50 tokens
AUTHOR = {"r-cran-janeaustenr": "austen", "bible-kjv-text": "other", "stdlib-moby-dick": "other"}
PRONOUNS = {
    "female": {"she", "her", "hers", "herself"},
    "male": {"he", "him", "his", "himself"},
}
TEST_EVERY = 4  # every fourth document of a source gives its passages to the test part
CELLS = {  # (author, gender) -> rows as a multiple of n: the two cells of the spurious correlation are twice as large
    ("austen", "female"): 2,
    ("austen", "male"): 1,
    ("other", "female"): 1,
    ("other", "male"): 2,
}
N = {"train": 370, "test": 140}


@click.command()
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder of the two files; made if absent.")
@click.option("--corpus", type=click.Path(path_type=Path, exists=True), default=HERE / "corpus", show_default=True)
def main(out: Path, corpus: Path) -> None:
    """Write OUT/train.jsonl.zst and OUT/test.jsonl.zst."""
    passages = collect(read_documents(corpus / "train.jsonl.zst"))
    out.mkdir(parents=True, exist_ok=True)
    for part, n in N.items():
        write_documents(out / f"{part}.jsonl.zst", choose(passages[part], n))
    click.echo(f"{out}: " + ", ".join(f"{part} n={n}" for part, n in N.items()))


def collect(documents: list[dict[str, Any]]) -> dict[str, list[dict[str, str]]]:
    """Return the distinct passages of the corpus by part; the passages of one document are all in the same part."""
    passages: dict[str, list[dict[str, str]]] = {"train": [], "test": []}
    seen: dict[str, int] = defaultdict(int)
    texts: set[str] = set()
    for index, document in enumerate(documents):
        source = document["meta"]["source"]
        if source not in AUTHOR:
            continue
        part = "test" if seen[source] % TEST_EVERY == 0 else "train"
        seen[source] += 1
        for text, gender in find_passages(document["text"]):
            if text in texts:
                continue
            texts.add(text)
            row = {"text": text, "author": AUTHOR[source], "gender": gender}
            passages[part].append(row | {"source": source, "document": str(index)})
    return passages


def find_passages(text: str) -> Iterator[tuple[str, str]]:
    """Yield (passage, gender): runs of WORDS words, disjoint, that start after punctuation.

    A passage has at least one pronoun of its gender and none of the other. Verse numbers at the start of a line are
    dropped and every white space becomes one blank.
    """
    words = re.sub(r"(?m)^\d+ ", "", text).split()
    bare = [re.sub(r"[^a-z]", " ", word.lower()).split() for word in words]
    genders = [{name for name, forms in PRONOUNS.items() if forms & set(parts)} for parts in bare]
    at = 0
    while at + WORDS <= len(words):
        present = set[str]().union(*genders[at : at + WORDS])
        starts = at == 0 or not words[at - 1][-1].isalnum()
        if starts and len(present) == 1:
            yield " ".join(words[at : at + WORDS]), present.pop()
            at += WORDS
        else:
            at += 1


def choose(passages: list[dict[str, str]], n: int) -> list[dict[str, str]]:
    """Return n or 2n passages of each cell, at equal distances through the corpus, in the order of the corpus.

    Raises ClickException if a cell has too few.
    """
    chosen = []
    for (author, gender), multiple in CELLS.items():
        cell = [i for i, row in enumerate(passages) if (row["author"], row["gender"]) == (author, gender)]
        wanted = n * multiple
        if len(cell) < wanted:
            raise click.ClickException(f"{len(cell)} passages are {author} and {gender}; {wanted} are needed")
        chosen += [cell[k * len(cell) // wanted] for k in range(wanted)]
    return [passages[i] for i in sorted(chosen)]


if __name__ == "__main__":
    main()
