"""Which members step in fused passes. Triton is imported only where it is used."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from pipeline.base.progress import say
from pipeline.base.runtime import has_triton
from train.config import TrainConfig
from train.step.member import Batch, Member, normalise_batch
from train.step.scratch import Scratch


@functools.cache
def say_plain() -> None:
    """Tell once that steps could be faster."""
    say(
        "Triton is not installed, or older than 3.3: steps run as plain PyTorch, which moves more than twice the bytes; "
        "pip install triton, or torch from 2.7 on, which brings it"
    )


def fuses(config: TrainConfig, device: torch.device) -> bool:
    """Whether members of this config (dtype resolved) step in fused passes on the device. Says so where only Triton lacks."""
    if device.type != "cuda" or config.dtype == "float64":
        return False
    if not has_triton():
        say_plain()
        return False
    return True


def member_kind(config: TrainConfig, device: torch.device, *, is_transcoder: bool = False) -> type[Member]:
    """The kind of member that is fastest on the device. Transcoders have no fused step."""
    if is_transcoder or not fuses(config, device):
        return Member
    from train.step.fused.step import FusedMember

    return FusedMember


Normalise = Callable[..., Batch]
"""`normalise_batch`, or what does the same."""


def make_normalise(config: TrainConfig, device: torch.device, scratch: Scratch) -> Normalise:
    """What prepares batches for members of this config."""
    if not fuses(config, device):
        return normalise_batch
    from train.step.fused.batch import FusedBatches

    return FusedBatches(scratch).normalise
