"""Options of `python -m train` made from the fields of TrainConfig, and the grid that repeated options span.

Every field has an option, and every option may be repeated: the grid is the product of all that were. A file given with
--config holds the same names; a list there is a repeated option, and an option on the command line wins.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_type_hints

import click

from pipeline.base.cli import COUNT, NAMED_SOURCE, read_toml
from pipeline.base.errors import UsageError
from train.config import DEFAULT, RECIPES, TrainConfig

FIELDS = {one.name: one for one in dataclasses.fields(TrainConfig)}


class Levels(click.ParamType[tuple[float, ...]]):
    """Cumulative shares: 0.25,0.5,1."""

    name = "shares"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, ...]:
        if isinstance(value, tuple | list):
            return tuple(float(share) for share in value)
        try:
            return tuple(float(share) for share in str(value).split(","))
        except ValueError:
            self.fail(f"{value!r} is not a list of shares; write 0.25,0.5,1", param, ctx)


class NumberOr(click.ParamType[float | str | None]):
    """A number, the word none, or one of the words given."""

    name = "number"

    def __init__(self, *words: str) -> None:
        self.words = words

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float | str | None:
        word = str(value).lower()
        if word == "none" or word in self.words:
            return None if word == "none" else word
        try:
            return float(value)
        except ValueError:
            self.fail(f"{value!r} is not a number, {', '.join(self.words)}{' ' * bool(self.words)}or none", param, ctx)


def option_type(name: str) -> click.ParamType[Any]:
    """How the option of a field reads its text."""
    hint = get_type_hints(TrainConfig)[name]
    choices = get_args(hint)
    if name == "recipe":
        return click.Choice(list(RECIPES))
    if name == "levels":
        return Levels()
    if name == "init_from":
        return NAMED_SOURCE
    if NoneType in choices:
        return NumberOr(*(word for choice in choices for word in get_args(choice)))
    if choices:
        return click.Choice(choices)
    return {int: COUNT, float: click.FLOAT, bool: click.BOOL, str: click.STRING}[hint]


def defaults_text(name: str) -> str:
    """The default of a field: one value, or each recipe's own where they differ."""
    values = {recipe: getattr(make(), name) for recipe, make in RECIPES.items()}
    written = {recipe: write(value) for recipe, value in values.items()}
    if len(set(written.values())) == 1:
        return next(iter(written.values()))
    return ", ".join(f"{recipe} {value}" for recipe, value in written.items())


def write(value: Any) -> str:
    """A value as a person types it."""
    if isinstance(value, tuple):
        return ",".join(map(str, value)) or "none"
    return (
        {None: "none", True: "yes", False: "no", "": "none"}.get(value, str(value))
        if not is_number(value)
        else f"{value:g}"
    )


def is_number(value: Any) -> bool:
    """Whether it is a number and not a truth value."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def field_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a click command one option for every field of TrainConfig, and --lambda for both lambdas."""
    for field in reversed(FIELDS.values()):
        flag = "--" + field.name.replace("_", "-")
        is_flag = get_type_hints(TrainConfig)[field.name] is bool
        text = f"{field.metadata['text']}  [{DEFAULT if field.name == 'recipe' else defaults_text(field.name)}]"
        if is_flag:
            decorate = click.option(f"{flag}/--no-{flag[2:]}", field.name, multiple=True, default=(), help=text)
        else:
            decorate = click.option(flag, field.name, type=option_type(field.name), multiple=True, help=text)
        command = decorate(command)
        if field.name == "steps":
            epochs = "instead of --steps: times that every row is used, as 1 or 2.5"
            command = click.option("--epochs", type=click.FLOAT, multiple=True, help=epochs)(command)
            tokens = "instead of --steps: rows to train on, over all steps, as 10M"
            command = click.option("--tokens", type=COUNT, multiple=True, help=tokens)(command)
        if field.name == "lambda_shared":
            both = "weight of the penalty on all latents: --lambda-shared and --lambda-specialised at once"
            command = click.option("--lambda", "lambda_", type=click.FLOAT, multiple=True, help=both)(command)
    return command


def make_grid(
    given: Mapping[str, Sequence[Any]], kept_rows: Callable[[float | None], int] | None = None
) -> tuple[TrainConfig, ...]:
    """The product of all options that were given, each a sequence of values; duplicates are removed, order is kept.

    `given` maps names of fields, and `lambda_`, `tokens` and `epochs`, to values; those not given, or given no value, are the
    recipe's own. `kept_rows`: rows of an epoch for a member's max_norm; None: of a store that is not there yet.
    Raises UsageError when values contradict each other.
    """
    order = [*FIELDS, "lambda_", "tokens", "epochs"]
    axes = {name: list(given[name]) for name in sorted(given, key=order.index) if given[name]}
    if "lambda_" in axes and axes.keys() & {"lambda_shared", "lambda_specialised"}:
        raise UsageError("--lambda sets both --lambda-shared and --lambda-specialised; give it or them")
    if len(lengths := [name for name in ("steps", "tokens", "epochs") if name in axes]) > 1:
        raise UsageError(f"--{lengths[0]} and --{lengths[1]} both say how long to train; give one of them")
    recipes = axes.pop("recipe", [DEFAULT])
    members: dict[TrainConfig, None] = {}
    for recipe in recipes:
        own = {name: values for name, values in axes.items() if takes(recipe, recipes, name, axes)}
        for values in itertools.product(*own.values()):
            changes = with_steps(recipe, spread_lambda(dict(zip(own, values))), kept_rows)
            members[RECIPES[recipe](**changes)] = None
    return tuple(members)


def takes(recipe: str, recipes: Sequence[str], name: str, axes: Mapping[str, Sequence[Any]]) -> bool:
    """Whether an option goes to the members of a recipe: unless it means nothing there and another recipe takes it."""
    if name in ("tokens", "epochs"):
        return True
    applies = FIELDS["lambda_shared" if name == "lambda_" else name].metadata["only"]
    if applies is None or axes.keys() & {"activation", "penalty"}:
        return True
    return applies(RECIPES[recipe]()) or not any(applies(RECIPES[one]()) for one in recipes)


def with_steps(recipe: str, changes: dict[str, Any], kept_rows: Callable[[float | None], int] | None) -> dict[str, Any]:
    """Changes with `tokens` or `epochs` written out as whole steps: no row more, but one step at least."""
    rows = changes.pop("tokens", None)
    if (epochs := changes.pop("epochs", None)) is not None:
        if kept_rows is None:
            raise UsageError("--epochs needs a store that is there; give --tokens or --steps")
        if not 0 < epochs < math.inf:
            raise UsageError(f"--epochs {epochs}: must be above 0")
        rows = epochs * kept_rows(changes.get("max_norm"))
    if rows is None:
        return changes
    batch_size = changes.get("batch_size", RECIPES[recipe]().batch_size)
    return changes | {"steps": max(1, int(rows // max(batch_size, 1)))}


def spread_lambda(changes: dict[str, Any]) -> dict[str, Any]:
    """Changes with `lambda_` written out as the two fields it stands for."""
    if "lambda_" not in changes:
        return changes
    both = changes.pop("lambda_")
    return changes | {"lambda_shared": both, "lambda_specialised": both}


def read_config_file(ctx: click.Context, param: click.Parameter, path: Path | None) -> Path | None:
    """Callback of --config: its values become the command's defaults. Raises UsageError on a name that is no option."""
    if path is None:
        return None
    options = {p.name: p for p in ctx.command.params if isinstance(p, click.Option) and p.name != param.name}
    defaults = {}
    for name, value in read_toml(path).items():
        key = {"lambda": "lambda_"}.get(name, name.replace("-", "_"))
        if key not in options:
            raise UsageError(f"{path}: {name!r} is not an option of this command; python -m train --help lists them")
        defaults[key] = file_value(path, name, value, options[key].multiple)
    ctx.default_map = defaults
    return path


def file_value(path: Path, name: str, value: Any, multiple: bool) -> Any:
    """A value of a file as click takes it: a list for what can be repeated, one value otherwise."""
    if isinstance(value, list) and not value:
        raise UsageError(
            f"{path}: {name} is an empty list, so the grid is empty; give at least one value or leave it out"
        )
    if not multiple:
        return value
    if name == "levels" and not isinstance(value[0], list):
        return [value]
    return value if isinstance(value, list) else [value]
