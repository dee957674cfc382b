"""Many processes that know nothing of each other make a store in parts: the bytes are those of one, and what is lost is named."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import harvest.run
from harvest import blocks, corpus
from harvest.__main__ import command
from harvest.config import HarvestConfig
from harvest.corpus import LocalCorpus, StreamedCorpus
from harvest.run import run
from harvest.steps import Note, Share, Steps, read_notes
from pipeline.base.errors import CorpusError, DamagedError, MismatchError, StoreError, UsageError
from pipeline.store.backend import LocalFiles
from pipeline.store.objects import open_files
from pipeline.store.reader import Store
from support import tiny_models
from support.harvests import Slow, harvest_config, store_bytes
from support.train_crasher import die_at_write

pytestmark = pytest.mark.usefixtures("one_thread")

PREPARE, FINISH = Steps(make=False, finish=False), Steps(prepare=False, make=False)


def part(i: int, n: int) -> Steps:
    """Part i of n of the shards."""
    return Steps(prepare=False, finish=False, part=Share(i, n))


def tokenise(i: int, n: int) -> Steps:
    """Part i of n of the documents."""
    return dataclasses.replace(PREPARE, part=Share(i, n))


Configs = Callable[[str], HarvestConfig]


@pytest.fixture(scope="module")
def configs(lm_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Configs:
    """The config of a harvest under a name; `expected` is done already, by one process."""
    folder = tmp_path_factory.mktemp("parts")
    corpus = tiny_models.make_corpus(folder / "corpus.jsonl")

    def config(name: str) -> HarvestConfig:
        return harvest_config(lm_folder("gemma2"), corpus, folder / f"{name}.zarr", batch_size=2)

    run(config("expected"), quiet=True)
    return config


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of seven documents."""
    monkeypatch.setattr(LocalCorpus, "block_documents", 7)


def files_of(config: HarvestConfig) -> dict[str, str]:
    """Every file of its store and the hash of its bytes."""
    return store_bytes(Path(config.store))


@pytest.mark.parametrize("n", [1, 3, 20])
def test_parts_give_equal_bytes(configs: Configs, n: int) -> None:
    """Tokenised in parts, prepared, made in parts in any order and finished, a store has the bytes of one process.

    Nothing else is left; there may be more parts than shards."""
    config = configs(f"parts-{n}")
    for i in reversed(range(min(n, 4))):
        run(config, quiet=True, steps=tokenise(i, min(n, 4)))
    left = [path.name for path in Path(config.store).parent.glob("parts-*.tokens-*/*")]
    assert len(left) > 3
    run(config, quiet=True, steps=PREPARE)
    assert not list(Path(config.store).parent.glob("parts-*.tokens-*"))
    for i in reversed(range(n)):
        run(config, quiet=True, steps=part(i, n))
    run(config, quiet=True, steps=FINISH)
    assert files_of(config) == files_of(configs("expected"))
    assert not (Path(config.store) / "parts").exists()


def test_lost_parts_are_named(configs: Configs) -> None:
    """A store that lacks parts is not finished: each is named, with where it ran and whether it ended."""
    config = configs("lost")
    run(config, quiet=True, steps=PREPARE)
    with pytest.raises(StoreError, match=r"9 of 9 shards are not made \(number 0 first\); run the parts"):
        run(config, quiet=True, steps=FINISH)
    run(config, quiet=True, steps=part(0, 4))
    files = open_files(config.store)
    Note(Share(2, 4), 1, (), "node-7").write(files)
    said = r"6 of 9 shards are not made, those of --part 1/4 \(not begun\), 2/4 \(on node-7, not ended\), 3/4 \(not begun\); run"
    with pytest.raises(StoreError, match=said):
        run(config, quiet=True, steps=FINISH)
    files.delete("parts/2-4.json")
    for i in (1, 2, 3):
        run(config, quiet=True, steps=part(i, 4))
    run(config, quiet=True, steps=FINISH)
    assert files_of(config) == files_of(configs("expected"))


def test_one_goes_on_with_parts(configs: Configs) -> None:
    """The plain command makes what parts have left, and finishes."""
    config = configs("mixed")
    run(config, quiet=True, steps=PREPARE)
    run(config, quiet=True, steps=part(1, 3))
    run(config, quiet=True)
    assert files_of(config) == files_of(configs("expected"))


def test_parts_hash_their_own_tokens(configs: Configs, monkeypatch: pytest.MonkeyPatch) -> None:
    """A part reads the tokens of its own shards, once each, and not those of the others; the end reads all of them once."""
    config = configs("own").replace(tokens=4096)
    monkeypatch.setattr("pipeline.store.layout.GROUP_SHARDS", 1)
    run(config, quiet=True, steps=PREPARE)
    read, plain = list[str](), LocalFiles.read

    def noted(self: LocalFiles, key: str, most: int) -> bytes:
        read.append(key)
        return plain(self, key, most)

    monkeypatch.setattr(LocalFiles, "read", noted)
    run(config, quiet=True, steps=part(1, 6))
    assert [key for key in read if key.startswith("train/tokens/c/")] == [f"train/tokens/c/{k}/0" for k in (1, 7, 13)]
    run(config, quiet=True, steps=part(0, 1))
    read.clear()
    run(config, quiet=True, steps=FINISH)
    assert sorted(key for key in read if key.startswith("train/tokens/c/")) == sorted(
        f"train/tokens/c/{k}/0" for k in range(16)
    )


def test_parts_need_a_prepared_store(configs: Configs) -> None:
    """A part does not begin a store, nor finish one that is not there."""
    for steps in (part(0, 2), FINISH):
        with pytest.raises(StoreError, match="is not prepared for 100 training sequences; run --prepare-only first"):
            run(configs("none"), quiet=True, steps=steps)
    assert not Path(configs("none").store).exists()


def test_parts_check_what_they_make(configs: Configs, lm_folder: Callable[[str], Path]) -> None:
    """A part of another model, another option or another length is refused by name."""
    config = configs("checked")
    run(config, quiet=True, steps=PREPARE)
    for changes, said in (
        ({"model": str(lm_folder("gemma3"))}, "weights_sha256"),
        ({"attention": "sdpa"}, "attention: there 'eager', asked 'sdpa'"),
        ({"text_field": "other"}, "corpus.text_field"),
    ):
        with pytest.raises(MismatchError, match=said):
            run(config.replace(**changes), quiet=True, steps=part(0, 2))
    with pytest.raises(StoreError, match="is not prepared for 150 training sequences"):
        run(config.replace(tokens=2400), quiet=True, steps=part(0, 2))


def test_unlike_parts_are_refused(configs: Configs, monkeypatch: pytest.MonkeyPatch) -> None:
    """A part under another torch than made rows is refused, as is the end of parts that began together; --mixed records both."""
    config = configs("unlike")
    run(config, quiet=True, steps=PREPARE)
    run(config, quiet=True, steps=part(0, 3))
    other = {"torch": "9.9", "transformers": "1", "device": "cpu"}
    with monkeypatch.context() as patch:
        patch.setattr(harvest.run, "maker", lambda *_: other)
        with pytest.raises(MismatchError, match=r"its rows were made by others.*torch"):
            run(config, quiet=True, steps=part(1, 3))
        run(config.replace(mixed=True), quiet=True, steps=part(1, 3))
    run(config, quiet=True, steps=part(2, 3))
    with pytest.raises(MismatchError, match=r"its parts were made by others.*torch.*--mixed"):
        run(config, quiet=True, steps=FINISH)
    run(config.replace(mixed=True), quiet=True, steps=FINISH)
    assert other in Store.open(config.store).made_by
    assert len(Store.open(config.store).made_by) == 2


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b'{"share": [1], "makers": []}', b'{"share": [0, 1], "makers": 3}'])
def test_damaged_notes_are_named(tmp_path: Path, data: bytes) -> None:
    """A note that is none is damage, in one line."""
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "0-2.json").write_bytes(data)
    with pytest.raises(DamagedError, match=r"0-2\.json"):
        read_notes(open_files(tmp_path))


def test_corpus_may_be_gone(configs: Configs, tmp_path: Path) -> None:
    """Once a store has its tokens, the same command goes on, and opens it, without the corpus; more tokens need it."""
    config = configs("gone").replace(corpus=str(tmp_path / "c.jsonl"))
    shutil.copy(configs("x").corpus, config.corpus)
    run(config, quiet=True, steps=PREPARE)
    kept = Path(config.corpus).read_bytes()
    Path(config.corpus).unlink()
    run(config, quiet=True, steps=part(0, 2))
    run(config, quiet=True)
    run(config, quiet=True)
    with pytest.raises(CorpusError, match="no such file"):
        run(config.replace(tokens=2400), quiet=True)
    with pytest.raises(MismatchError, match="seed"):
        run(config.replace(seed=1), quiet=True)
    Path(config.corpus).write_bytes(kept + b'{"text": "more"}\n')
    with pytest.raises(MismatchError, match=r"corpus\.sha256"):
        run(config, quiet=True)
    Path(config.corpus).write_bytes(kept)
    run(config.replace(tokens=2400), quiet=True)


def test_stores_of_an_older_order(configs: Configs, tmp_path: Path) -> None:
    """A store whose compressed corpus was read in the order of before is opened and gone on with as it is; to be extended, it is
    refused by name."""
    import gzip

    from pipeline.store.root import read_root

    config = configs("older").replace(corpus=str(tmp_path / "c.jsonl.gz"))
    Path(config.corpus).write_bytes(gzip.compress(Path(configs("x").corpus).read_bytes()))
    monkey = pytest.MonkeyPatch()
    monkey.setattr("harvest.corpus.WINDOWED", "documents permuted by seed {seed}")
    run(config, quiet=True, steps=PREPARE)
    monkey.undo()
    files = open_files(config.store)
    assert read_root(files)["config"]["corpus"]["order"] == "documents permuted by seed 0"
    run(config, quiet=True)
    run(config, quiet=True)
    with pytest.raises(
        MismatchError, match=r"corpus\.order: there 'documents permuted by seed 0', asked 'files by seed 0"
    ):
        run(config.replace(tokens=2400), quiet=True)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--part", "2/2"], "expected I/N"),
        (["--part", "-1/2"], "expected I/N"),
        (["--part", "x"], "expected I/N"),
        (["--prepare-only", "--finish-only"], "give one of them"),
        (["--finish-only", "--part", "0/2"], "leave --part out"),
        (["--part", "0/2", "--repair"], "--repair reads and mends a whole store"),
        (["--part", "0/2", "--truth", "tree"], "--truth runs whole"),
    ],
)
def test_senseless_steps_are_refused(options: list[str], said: str) -> None:
    """Steps that contradict each other are refused."""
    with pytest.raises(UsageError, match=said):
        command.main([*options, "--store", "x.zarr"], standalone_mode=False)


def in_process(config: HarvestConfig, steps: Steps, slow: Slow | None = None) -> None:
    """Some steps in a process of its own, without fsync."""
    import torch

    os.fsync = lambda descriptor: None
    torch.set_num_threads(1)
    LocalCorpus.block_documents = 7
    if slow is not None:
        slow.begin(config)
    run(config, quiet=True, steps=steps)


def n_files(config: HarvestConfig) -> int:
    """Files of a store and of its blocks, half-written ones included."""
    beside = Path(config.store)
    return sum(
        len(files)
        for place in (beside, *beside.parent.glob(f"{beside.name}.tokens-*"))
        for _, _, files in os.walk(place)
    )


@pytest.mark.slow
@pytest.mark.parametrize("n_workers", [2, 4])
def test_slow_and_killed_workers(configs: Configs, n_workers: int) -> None:
    """Two and four processes take eight parts as they come; one is killed in the middle and its part taken again, one makes a
    shard while each other makes three: the bytes are those of one process, and the slow one holds nobody up."""
    config = configs(f"workers-{n_workers}")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["support.harvests", "harvest.run"])
    run(config, quiet=True, steps=PREPARE)
    waiting, running, killed = list(range(8)), dict[Any, int](), False
    slow_one, slow_parts = None, list[int]()
    while waiting or running:
        while waiting and len(running) < n_workers:
            i = waiting.pop(0)
            is_slow = slow_one is None and bool(running)
            slow = Slow(str(i), 7, 3 * (n_workers - 1) * is_slow)
            process = context.Process(target=in_process, args=(config, part(i, 8), slow))
            process.start()
            running[process] = i
            if is_slow:
                slow_one = process
                slow_parts.append(i)
        if not killed and (Path(config.store) / "parts" / "0-8.json").exists():
            victim = next(process for process, i in running.items() if i == 0)
            victim.kill()
            killed = True
        for process in [process for process in running if process.exitcode is not None]:
            i = running.pop(process)
            slow_one = None if process is slow_one else slow_one
            assert process.exitcode == 0 or (i == 0 and killed)
            waiting += [i] if process.exitcode else []
        time.sleep(0.005)
    run(config, quiet=True, steps=FINISH)
    assert killed
    assert len(slow_parts) <= 3
    assert files_of(config) == files_of(configs("expected"))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_kills_at_every_step(configs: Configs, seed: int) -> None:
    """Every step killed at random moments, over every file that it writes, and run again: the same bytes, nothing left over."""
    config, draw = configs(f"killed-{seed}"), random.Random(seed)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["support.harvests", "harvest.run"])
    for steps in (tokenise(0, 2), tokenise(1, 2), PREPARE, part(0, 2), part(1, 2), FINISH):
        for _ in range(4):
            wanted, deadline = n_files(config) + draw.randrange(1, 8), time.monotonic() + 20
            process = context.Process(target=in_process, args=(config, steps))
            process.start()
            while n_files(config) < wanted and process.exitcode is None and time.monotonic() < deadline:
                time.sleep(0.0005)
            process.kill()
            process.join()
        run(config, quiet=True, steps=steps)
    assert files_of(config) == files_of(configs("expected"))
    assert [path.name for path in Path(config.store).parent.glob(f"killed-{seed}*")] == [f"killed-{seed}.zarr"]


def test_killed_parts_go_on(configs: Configs, monkeypatch: pytest.MonkeyPatch) -> None:
    """The only part that ran, stopped after a shard, goes on; under another torch it is refused, and mixed it names both."""
    config, make = configs("stopped"), harvest.run.harvest_shards
    run(config, quiet=True, steps=PREPARE)
    with monkeypatch.context() as patch:
        patch.setattr(
            harvest.run,
            "harvest_shards",
            lambda lm, writers, shards, *rest: [make(lm, writers, itertools.islice(shards, 1), *rest), 1 / 0],
        )
        with pytest.raises(ZeroDivisionError):
            run(config, quiet=True, steps=part(0, 2))
    other = {"torch": "9.9", "transformers": "1", "device": "cpu"}
    with monkeypatch.context() as patch:
        patch.setattr(harvest.run, "maker", lambda *_: other)
        with pytest.raises(MismatchError, match=r"its rows were made by others.*torch"):
            run(config, quiet=True, steps=part(0, 2))
        run(config.replace(mixed=True), quiet=True, steps=part(0, 2))
    assert len(read_notes(open_files(config.store))[0].makers) == 2
    run(config, quiet=True, steps=part(1, 2))


def test_notes_say_who_and_where(configs: Configs) -> None:
    """While parts are made the store says which began, where, by whom, and which ended."""
    config = configs("noted")
    run(config, quiet=True, steps=PREPARE)
    run(config, quiet=True, steps=part(1, 5))
    [note] = read_notes(open_files(config.store))
    assert (note.share, note.world, note.ended) == (Share(1, 5), 1, True)
    assert note.makers[0]["device"] == "cpu"
    data = json.loads((Path(config.store) / "parts" / "1-5.json").read_text())
    assert data["host"]


Reads = list[tuple[int, int]]
"""File and number of every document that was read of a data set of the Hub."""


@pytest.fixture
def hub(configs: Configs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Reads:
    """A data set of the Hub in five files of very different length, played by `datasets` itself; what is read of it."""
    import datasets

    lines = Path(configs("x").corpus).read_text().splitlines(keepends=True)
    files, at = [tmp_path / f"{n}.jsonl" for n in range(5)], 0
    for path, n in zip(files, (20, 1, 7, 50, len(lines))):
        path.write_text("".join(lines[at : at + n]))
        at += n
    read, plain = Reads(), corpus.document_of

    def noted(where: str, record: Any, field: str) -> Any:
        said = re.fullmatch(r"some/set, file (\d+), document (\d+)", where)
        assert said is not None
        read.append((int(said[1]), int(said[2])))
        return plain(where, record, field)

    def load(*_args: Any) -> Any:
        return datasets.load_dataset("json", data_files=list(map(str, files)), split="train", streaming=True)

    monkeypatch.setattr(corpus, "dataset_commit", lambda name: "abc123")
    monkeypatch.setattr(corpus, "load_stream", load)
    monkeypatch.setattr(corpus, "document_of", noted)
    monkeypatch.setattr(StreamedCorpus, "block_documents", 3)
    return read


def hub_config(configs: Configs, name: str) -> HarvestConfig:
    """A harvest of that data set."""
    return configs(name).replace(corpus="some/set")


def hub_bytes(configs: Configs) -> dict[str, str]:
    """Files of its store, made by one process."""
    run(config := hub_config(configs, "hub"), quiet=True)
    return files_of(config)


@pytest.mark.parametrize("n", [1, 2, 5, 12])
def test_hub_parts_give_equal_bytes(configs: Configs, hub: Reads, n: int) -> None:
    """A data set of the Hub tokenised in parts is that of one process, byte for byte, and of as many parts as files none reads
    another's file."""
    expected = hub_bytes(configs)
    config, files = hub_config(configs, f"hub-{n}"), dict[int, set[int]]()
    for i in reversed(range(n)):
        hub.clear()
        run(config, quiet=True, steps=tokenise(i, n))
        assert len(set(hub)) == len(hub)
        files[i] = {file for file, _ in hub}
    assert {file for part in files.values() for file in part} == set(range(5))
    assert n > 5 or (all(files.values()) and sum(map(len, files.values())) == 5)
    hub.clear()
    run(config, quiet=True)
    assert files_of(config) == expected


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize("again", [False, True])
def test_lost_hub_part_is_named(configs: Configs, capsys: pytest.CaptureFixture[str], again: bool) -> None:
    """A part of a data set of the Hub that was stopped keeps its blocks when it is run again; one that was lost is named, and
    what it lacks is tokenised by who packs."""
    expected, config = hub_bytes(configs), hub_config(configs, f"hub-lost-{again}")
    made, share = list[int](), blocks.Blocks.share

    def stopped(self: blocks.Blocks, i: int, n: int, n_tokens: int) -> Iterator[int]:
        for tokens in share(self, i, n, n_tokens):
            made.append(tokens)
            if len(made) == 3:
                raise KeyboardInterrupt
            yield tokens

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks.Blocks, "share", stopped)
        with pytest.raises(KeyboardInterrupt):
            run(config, quiet=True, steps=tokenise(0, 3))
    run(config, quiet=True, steps=tokenise(1, 3))
    (folder,) = Path(config.store).parent.glob(f"hub-lost-{again}.zarr.tokens-*")
    kept = {path: path.stat().st_ino for path in folder.iterdir() if path.is_file()}
    if again:
        for i in (0, 2):
            run(config, quiet=True, steps=tokenise(i, 3))
        assert kept.items() < {path: path.stat().st_ino for path in folder.iterdir() if path.is_file()}.items()
    run(config, steps=PREPARE)
    said = r"tokenising --part 0/3 \(on \S+, not ended\), 2/3 \(not begun\) did not come to its end"
    assert bool(re.search(said, capsys.readouterr().err)) is not again
    run(config, quiet=True)
    assert files_of(config) == expected


@pytest.mark.slow
@pytest.mark.usefixtures("hub")
def test_hub_parts_killed_at_every_write(configs: Configs) -> None:
    """Each part of a data set of the Hub killed at each write of blocks and notes in turn: the same bytes, nothing left over."""
    expected, config = hub_bytes(configs), hub_config(configs, "hub-killed")
    n_killed = 0
    for steps in (tokenise(0, 3), tokenise(1, 3), tokenise(2, 3), PREPARE):
        for n in itertools.count(1):
            if (child := os.fork()) == 0:
                die_at_write(n)
                with contextlib.suppress(BaseException):
                    run(config, quiet=True, steps=steps)
                    os._exit(0)
                os._exit(1)
            ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            assert ended in (0, -signal.SIGKILL)
            if ended == 0:
                break
            n_killed += 1
    run(config, quiet=True)
    assert n_killed > 20
    assert files_of(config) == expected
    assert [path.name for path in Path(config.store).parent.glob("hub-killed*")] == ["hub-killed.zarr"]


def test_hub_stores_of_an_older_order(configs: Configs, hub: Reads) -> None:
    """A store of a data set of the Hub read in the order of before is opened and gone on with as it is; to be extended, it is
    refused by name."""
    config = hub_config(configs, "hub-older")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus, "STREAMED", corpus.SHUFFLED)
        run(config, quiet=True, steps=PREPARE)
    hub.clear()
    run(config, quiet=True)
    run(config, quiet=True)
    assert hub == []
    with pytest.raises(MismatchError, match=r"max_buffer|corpus\.order"):
        run(config.replace(max_buffer=7), quiet=True)
    with pytest.raises(
        MismatchError, match=r"corpus\.order: there 'streamed, shuffled within 10000 documents by seed 0', asked"
    ):
        run(config.replace(tokens=2400), quiet=True)
