"""The two options that every benchmark has: where it runs, and in which dtype."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

sys.path.insert(0, str(Path(__file__).parents[2]))

import click

from pipeline.base.runtime import DTYPES, resolve_device, resolve_dtype

Command = TypeVar("Command", bound=Callable[..., Any])


def placed(of: str) -> Callable[[Command], Command]:
    """`--device` and `--dtype`, both `auto` unless given: the command is handed a torch.device and `bf16` or `float32`.
    `of`: what has that dtype."""

    def device(context: click.Context, option: click.Parameter, name: str) -> Any:
        return resolve_device(name)

    def dtype(context: click.Context, option: click.Parameter, name: str) -> str:
        return resolve_dtype(name, context.params["device"])

    def add(command: Command) -> Command:
        command = click.option(
            "--dtype",
            type=click.Choice(("auto", *DTYPES)),
            default="auto",
            callback=dtype,
            show_default=True,
            help=f"of {of}; auto: bf16 where the hardware multiplies it, else float32",
        )(command)
        where = "cpu, cuda, cuda:1 or auto"
        option = click.option("--device", is_eager=True, default="auto", callback=device, show_default=True, help=where)
        return option(command)

    return add
