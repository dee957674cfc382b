"""From what a record holds to token ids: chats, roles, ids, giant texts, and one text for two splits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from harvest.corpus import Document, Source, good, open_corpus
from harvest.long_text import GIANT, TextFile, cut
from harvest.texts import Piece, Reader
from harvest.tokens import Packing, Pieces, pack, tokenized
from pipeline.base.errors import CorpusError, ModelError
from support import tiny_models

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<turn>{{ m.role }}\n{{ m.content }}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}<turn>assistant\n{% endif %}"
)
CHAT = [
    {"role": "user", "content": "How are you?"},
    {"role": "assistant", "content": "Well."},
    {"role": "user", "content": "Good."},
    {"role": "assistant", "content": "Yes<bos>."},
]


def reader(template: str | None = TEMPLATE, **options: Any) -> Reader:
    """A reader of the test tokenizer with a chat template."""
    tokenizer = tiny_models.build_tokenizer()
    tokenizer.chat_template = template
    return Reader(tokenizer, tiny_models.VOCAB, **options)


def pieces(content: Any, one: Reader) -> list[Piece]:
    """The pieces of one document."""
    return list(tokenized(iter([Document("a.jsonl:3", content)]), one))


def text(piece: Piece, one: Reader, mask: Any = None) -> str:
    """A piece's tokens, or those of a mask, as text."""
    return str(one.tokenizer.decode(piece.ids if mask is None else piece.ids[mask]))


def test_chats_are_rendered() -> None:
    """A chat is what the template writes, without its BOS; markers are text unless they are to be parsed."""
    for parse in (False, True):
        one = reader(parse_special=parse)
        (piece,) = pieces(CHAT, one)
        assert text(piece, one).startswith("<turn>user\nHow are you?<eos>\n<turn>assistant")
        assert (1 in piece.ids) is parse
        assert piece.kept is None


def test_roles_keep_their_turns() -> None:
    """Only tokens of the roles asked for are kept: of an answer those behind its header."""
    for roles, expected in (
        (("assistant",), "Well.<eos>\nYes<bos>.<eos>\n"),
        (("user",), "<turn>user\nHow are you?<eos>\n<turn>user\nGood.<eos>\n"),
    ):
        one = reader(roles=roles)
        (piece,) = pieces(CHAT, one)
        assert text(piece, one, piece.kept) == expected


@pytest.mark.parametrize("content", ["plain text", [5, 6]])
def test_roles_need_messages(content: Any) -> None:
    """A text or ids where roles are asked for are refused, by their place."""
    with pytest.raises(CorpusError, match=r"a\.jsonl:3: --roles assistant needs messages"):
        pieces(content, reader(roles=("assistant",)))


def test_chats_need_a_template() -> None:
    """A tokenizer without a chat template is named as what is missing."""
    with pytest.raises(ModelError, match="no chat template"):
        pieces(CHAT, reader(template=None))


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{{ raise_exception('roles must alternate') }}", "refuses it .*alternate"),
        ("{{ messages | length }}{{ messages[0].content }}", "does not write turn after turn"),
    ],
)
def test_odd_templates_are_refused(template: str, says: str) -> None:
    """A template that refuses a chat, or whose turns do not follow each other, ends in one line."""
    with pytest.raises(CorpusError, match=says):
        pieces(CHAT, reader(template, roles=("user",)))


def test_ids_are_taken_as_they_are() -> None:
    """Token ids pass through, without a BOS at their start; those of another vocabulary are refused."""
    one = reader()
    assert pieces([2, 9, 8, 1], one)[0].ids.tolist() == [9, 8, 1]
    assert pieces([9, 2, 8], one)[0].ids.tolist() == [9, 2, 8]
    for bad in (tiny_models.VOCAB, -1):
        with pytest.raises(CorpusError, match=f"token id {bad} is not one of the model's"):
            pieces([5, bad], one)


@given(st.text(alphabet="ab \n", max_size=200), st.integers(2, 30))
def test_cuts_lose_nothing(whole: str, limit: int) -> None:
    """Parts join to the text, none is longer than the limit, and each says where it starts."""
    parts = list(cut(whole, limit))
    assert "".join(part for _, part in parts) == whole
    assert all(len(part) <= limit for _, part in parts)
    assert [start for start, _ in parts] == np.cumsum([0, *(len(part) for _, part in parts[:-1])]).tolist()


def test_giant_texts_are_one_document() -> None:
    """A text of several parts is packed without separators inside, as if tokenised at once."""
    one = reader()
    long = "some words " * (GIANT // 8)
    found = pieces(long, one)
    assert [piece.starts for piece in found] == [True, False]
    whole = one.tokenizer(long, add_special_tokens=False)["input_ids"]
    assert np.concatenate([piece.ids for piece in found]).tolist() == whole


def test_one_text_serves_two_splits() -> None:
    """Evaluation takes the beginning of a single document, training goes on one context further."""
    stream = Pieces(iter([Piece(np.arange(10, 50, dtype=np.int32))]))
    packing, rows = Packing(5, 2, 2), np.empty((2, 5), np.int32)
    left_out = np.zeros((2, 5), np.bool_)
    pack(stream, packing, rows, left_out, "evaluation")
    assert rows.tolist() == [[2, 10, 11, 12, 13], [2, 14, 15, 16, 17]]
    stream.skip_tokens(5)
    pack(stream, packing, rows, left_out, "training")
    assert rows.tolist() == [[2, 23, 24, 25, 26], [2, 27, 28, 29, 30]]


def test_masks_follow_their_tokens() -> None:
    """What is not to be kept is marked in the rows where its tokens went; separators and BOS are not."""
    kept = np.array([True, False, False, True])
    stream = Pieces(iter([Piece(np.arange(10, 14, dtype=np.int32), True, kept), Piece(np.array([20, 21], np.int32))]))
    rows, left_out = np.empty((2, 4), np.int32), np.zeros((2, 4), np.bool_)
    pack(stream, Packing(4, 2, 2), rows, left_out, "training")
    assert rows.tolist() == [[2, 10, 11, 12], [2, 13, 2, 20]]
    assert left_out.tolist() == [[False, False, True, True], [False, False, False, False]]


def write(path: Path, records: list[Any]) -> Path:
    """JSON lines of anything."""
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))
    return path


def contents(path: Path, **options: Any) -> list[Any]:
    """What every document holds, sorted as text."""
    source = Source(str(path), **options)
    return sorted((document.content for document in good(open_corpus(source).documents(), source.skip_bad)), key=str)


def test_nested_fields_are_found(tmp_path: Path) -> None:
    """a.b is a path; a column of that very name comes first."""
    path = write(tmp_path / "a.jsonl", [{"a": {"b": "deep"}}, {"a.b": "flat", "a": {"b": "deep"}}])
    assert contents(path, text_field="a.b") == ["deep", "flat"]
    with pytest.raises(CorpusError, match=r"no field 'a\.c'; fields found: 'a"):
        contents(path, text_field="a.c")


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".jsonl.gz", ".parquet"])
def test_bad_records_are_counted(tmp_path: Path, suffix: str, capsys: pytest.CaptureFixture[str]) -> None:
    """As many bad records as allowed are passed over and named; one more is refused."""
    rows: list[Any] = [{"text": f"t{n}"} for n in range(5)] + [{"text": None}, {"text": None}]
    path = tmp_path / f"a{suffix}"
    if suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        import gzip

        data = "".join(json.dumps(row) + "\n" for row in rows).encode()
        path.write_bytes(gzip.compress(data) if suffix.endswith(".gz") else data)
    assert contents(path, skip_bad=2) == [f"t{n}" for n in range(5)]
    assert "skipped bad record 2 of at most 2" in capsys.readouterr().err
    with pytest.raises(CorpusError, match=r"field 'text' is null.*1 bad records were allowed"):
        contents(path, skip_bad=1)
    with pytest.raises(CorpusError, match=r"field 'text' is null.*--skip-bad"):
        contents(path)


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_text_files_are_cut_alike(tmp_path: Path, suffix: str) -> None:
    """A file of text, read as it is needed, is cut where the same text in memory is, wherever its bytes are parted."""
    import gzip

    text = "ü" * 30 + " word\nnext €uro 😀 " * 200 + "x" * 100
    data = b"\xef\xbb\xbf" + text.encode()
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(gzip.compress(data) if suffix else data)
    for limit in (5, 7, 64, 1000, 10_000):
        assert list(TextFile(path).parts(limit)) == list(cut(text, limit))


def test_text_files_must_be_text(tmp_path: Path) -> None:
    """Bytes that are no UTF-8, or end inside a character, are refused."""
    for data in (b"a\xffb", "é".encode()[:1]):
        (tmp_path / "a.txt").write_bytes(data)
        with pytest.raises(CorpusError, match=r"a\.txt: not UTF-8 text"):
            list(TextFile(tmp_path / "a.txt").parts())


def test_tokenizers_own_words_are_one_line() -> None:
    """A tokenizer whose files lack the token that it takes for unknown text is a model's error, which names the text."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    lacking = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="<unk>")))
    with pytest.raises(ModelError, match=r"^the tokenizer refuses a\.jsonl:3 \(.*; look at its tokenizer\.json"):
        pieces("b", Reader(lacking, 1))
