"""Fixtures that several test files share. Shapes and types of our own functions are checked while tests run."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import jaxtyping
import pytest

import support.typechecks  # noqa: F401 (the hook looks it up as an attribute)

jaxtyping.install_import_hook(["pipeline", "harvest", "train", "evaluate"], "support.typechecks.check")

from pipeline.base import network  # noqa: E402 (the hook must be there first)
from support.stores import make_store  # noqa: E402

hypothesis.settings.register_profile("ours", deadline=None)  # the machine may be busy
hypothesis.settings.load_profile("ours")


@pytest.fixture(scope="session", autouse=True)
def hears_interrupts() -> None:
    """A shell starts what it puts into the background deaf to SIGINT, and so would be every process that a test starts."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def no_fsync() -> Iterator[None]:
    """No test cuts the power, and a hundred small stores would wait minutes for the disk."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(scope="session", autouse=True)
def hub_answers() -> Iterator[None]:
    """Tests that stand in for the Hub find one there, whether this machine has a network or not."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(network, "answers", lambda host, port: True)
        yield


@pytest.fixture(scope="session")
def tiny_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete store without a language model: d_model 64, context 16, 2432 training rows, 512 evaluation rows.

    Read-only by agreement: copy it (shutil.copytree) to damage it.
    """
    path = tmp_path_factory.mktemp("store") / "tiny.zarr"
    make_store(path)
    return path


@pytest.fixture(scope="session")
def lm_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`lm_folder("gemma2")`: the folder of a tiny random model of that architecture with its tokenizer. Read-only."""
    made: dict[str, Path] = {}

    def folder(kind: str) -> Path:
        from support import tiny_models  # here, so that tests without a language model do not load transformers

        if kind not in made:
            made[kind] = tiny_models.make_model(tmp_path_factory.mktemp("lm") / kind, kind)
        return made[kind]

    return folder


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """One thread for torch: on tiny matrices others only wait, and on a busy machine for long."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
