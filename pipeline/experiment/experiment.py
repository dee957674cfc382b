"""An experiment file: one TOML names harvest, training grids and evaluation; running it does what is missing.

    out/
      stores/         acts.zarr, or layer_L.zarr, layer_L.HOOK.zarr for each of several (or wherever `store` says)
      checkpoints/    layer_L/<member>/…, layer_L.HOOK-to-TARGET/<member>/… of transcoders
      results/        layer_L/<member>-step_N-<key>.json, results.csv
      logs/           a file a stage
      report.html, report_files/

A grid trains on every store that is harvested, or on those of the hook that its `store` names; with `target`, another hook,
transcoders from the one to the other.

Further parts ([[part]], each with a name and tables of its own) are other rows in the same report: PART.zarr, PART/….

Each stage knows what is done and skips it, so running again does nothing, and a changed line does what that line asks.
Only members that the file asks for are evaluated and reported, whatever else the folders hold.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pipeline.base.cli import read_toml
from pipeline.base.digests import write_sealed
from pipeline.base.errors import UsageError
from pipeline.base.progress import Took, format_seconds, say
from pipeline.experiment import stages
from pipeline.model.points import HOOKS, site_name

SHIPPED = Path(__file__).parent
OPTION = re.compile("[A-Za-z][A-Za-z0-9-]*")
"""The name of an option, without its dashes."""
OURS = {
    "harvest": ("dry-run", "json", "repair", "prepare-only", "part", "finish-only"),
    "train": ("dry-run", "json", "planned", "elsewhere", "out"),
    "evaluate": ("dry-run", "json", "store", "target", "out"),
    "report": ("out",),
}
"""Options by which an experiment runs its stages itself."""
PART_TABLES = {"name", "harvest", "train", "evaluate"}
TABLES = PART_TABLES | {"report", "part"}


@dataclass(frozen=True)
class Site:
    """What some grids train on: the store of one site, for transcoders also that of what they make, both by the names that
    harvest gives them. `name`: its folder among others."""

    name: str
    store: str
    target: str | None
    grids: tuple[dict[str, Any], ...]

    @property
    def spliced(self) -> str:
        """The site whose rows are rebuilt."""
        return self.target or self.store


@dataclass(frozen=True)
class Experiment:
    """A parsed experiment file: each table holds options of a stage's command by name, lists repeat an option.

    `train` holds one table or several (`[[train]]`), each a grid; `parts` are other rows in the same report. Paths that begin
    with ./ or ../ are taken from the file's own folder. Raises UsageError for an unknown table or a missing one.
    """

    name: str
    harvest: dict[str, Any]
    train: list[dict[str, Any]]
    evaluate: dict[str, Any] = field(default_factory=dict)
    report: dict[str, Any] = field(default_factory=dict)
    parts: tuple[Experiment, ...] = ()

    @staticmethod
    def read(path: Path, *, trust_remote_code: bool = False) -> Experiment:
        """Read an experiment file: a path, or the name of a shipped one (demo, paper, ablations).

        trust_remote_code: whether the command line allows code that comes with a model; a file alone cannot.
        """
        shipped = SHIPPED / f"{path.name.removesuffix('.toml')}.toml"
        if not path.is_file() and path.parent == Path() and shipped.exists():
            path = shipped
        data = read_toml(path)
        parts = data.get("part", [])
        if not isinstance(parts, list) or not all(isinstance(part, dict) for part in parts):
            raise UsageError(f"{path}: part is no list of tables: begin each part with [[part]]")
        read = [parse(path, part, PART_TABLES, "part: ", trust_remote_code) for part in parts]
        names = [part.name for part in read]
        for name in names:
            if not re.fullmatch("[a-z][a-z0-9-]*", name) or names.count(name) > 1:
                raise UsageError(
                    f"{path}: part: name is {name[:60]!a}; give each part its own, of small letters, digits and dashes"
                )
        return replace(parse(path, data, TABLES, "", trust_remote_code), parts=tuple(read))

    @property
    def sites(self) -> list[str]:
        """What is harvested, one store each, by the names that harvest gives them: layer_19, layer_19.mlp_out."""
        return [site_name(layer, hook) for layer in self.layers for hook in self.hooks]

    @property
    def layers(self) -> list[int]:
        """What is harvested, by layer."""
        return as_list(self.harvest.get("layer", 0 if "truth" in self.harvest else 19))  # known features have no layer

    @property
    def hooks(self) -> list[str]:
        """What is harvested of each layer."""
        return as_list(self.harvest.get("hook", "resid_post"))

    @property
    def trained(self) -> list[Site]:
        """What is trained on what: sites in harvest's order with the grids that train SAEs on them, then pairs of sites with
        those that train transcoders between them."""
        pairs: dict[tuple[str, str | None], list[dict[str, Any]]] = {(hook, None): [] for hook in self.hooks}
        for grid in self.train:
            for store in as_list(grid.get("store", self.hooks)):
                pairs.setdefault((store, grid.get("target")), []).append(grid)
        return [
            Site(
                site_name(layer, store) + (f"-to-{target}" if target else ""),
                site_name(layer, store),
                site_name(layer, target) if target else None,
                tuple(grids),
            )
            for transcoders in (False, True)
            for layer in self.layers
            for (store, target), grids in pairs.items()
            if grids and (target is not None) == transcoders
        ]


def parse(path: Path, data: Mapping[str, Any], known: Set[str], where: str, trust_remote_code: bool) -> Experiment:
    """The tables of a file, or of one of its parts (named by `where` in errors). Raises UsageError."""
    if unknown := sorted(data.keys() - known):
        raise UsageError(f"{path}: {where}unknown table {unknown[0][:60]!a}; known are {', '.join(sorted(known))}")
    if "harvest" not in data or "train" not in data:
        raise UsageError(f"{path}: {where}needs a [harvest] and a [train] table")
    name = data.get("name", "" if where else path.stem)
    if not isinstance(name, str):
        raise UsageError(f"{path}: {where}name is {type(name).__name__}, expected text")
    grids = as_list(data["train"])
    if not grids:
        raise UsageError(f"{path}: {where}train is an empty list, expected at least one grid")
    here = path.resolve().parent
    harvest, evaluate, report = (table(path, one, data.get(one, {})) for one in ("harvest", "evaluate", "report"))
    trains = [table(path, "train", grid) for grid in grids]
    for grid in trains:
        require_hooks(f"{path}: {where}train", grid, as_list(harvest.get("hook", "resid_post")))
    asks = [one.get("trust-remote-code", False) is not False for one in (harvest, evaluate)]
    if any(asks) and not trust_remote_code:
        raise UsageError(f"{path}: asks for trust-remote-code, a model's own code; allow it on the command line too")
    return Experiment(
        name,
        anchored(harvest, here),
        [anchored(grid, here) for grid in trains],
        anchored(evaluate, here),
        anchored(report, here),
    )


def table(path: Path, name: str, found: Any) -> dict[str, Any]:
    """A table of options, with dashes in their names. Raises UsageError when it is something else, or holds tables."""
    if not isinstance(found, dict):
        raise UsageError(f"{path}: {name} is {type(found).__name__}, expected a table of options: [{name}]")
    options = {}
    for key, value in found.items():
        option = key.replace("_", "-")
        if not OPTION.fullmatch(option) or option == "help":
            raise UsageError(f"{path}: {name}: {key[:60]!a} is no name of an option")
        if option in options:
            raise UsageError(
                f"{path}: {name}.{option} is given twice, with a dash and with an underscore; leave one out"
            )
        if option in OURS[name]:
            raise UsageError(f"{path}: {name}.{option} is what an experiment decides itself; leave it out")
        for one in as_list(value):
            require_value(f"{path}: {name}.{key[:60]}", one)
        options[option] = value
    if name == "harvest" and (unknown := [hook for hook in as_list(options.get("hook", [])) if hook not in HOOKS]):
        raise UsageError(f"{path}: {name}.hook is {str(unknown[0])[:60]!a}, known are {', '.join(HOOKS)}")
    if name == "harvest" and type(options.get("store", "")) is not str:
        raise UsageError(f"{path}: {name}.store is {str(options['store'])[:60]!a}, expected a path")
    if "layer" in options:
        layers = as_list(options["layer"])
        if not layers or not all(type(layer) is int and abs(layer) < 10_000 for layer in layers):
            raise UsageError(f"{path}: {name}.layer is {str(options['layer'])[:60]!a}, expected whole numbers")
    return options


def require_hooks(where: str, grid: Mapping[str, Any], harvested: Sequence[Any]) -> None:
    """Raise UsageError unless a grid's `store` and `target` are hooks that are harvested, and a target is beside another one."""
    asked = [(name, hook) for name in ("store", "target") if name in grid for hook in as_list(grid[name])]
    for name, hook in asked:
        if hook not in harvested:
            raise UsageError(
                f"{where}.{name} is {str(hook)[:60]!a}: name a hook that [harvest] has, {', '.join(map(str, harvested))}"
            )
    if "target" in grid and (
        type(grid["target"]) is not str or grid["target"] in as_list(grid.get("store", harvested))
    ):
        raise UsageError(
            f'{where}.target is {str(grid["target"])[:60]!a}: say which other hook its transcoders read, such as store = "mlp_in"'
        )


def as_list(value: Any) -> list[Any]:
    """A list as it is, anything else as a list of one."""
    return list(value) if isinstance(value, list) else [value]


def require_value(where: str, value: Any) -> None:
    """Raise UsageError unless a value can be one of an option, and nothing else: it becomes a word of a command."""
    if isinstance(value, dict):
        raise UsageError(f"{where} is a table, expected the value of an option")
    if not isinstance(value, str | int | float) or (isinstance(value, float) and not math.isfinite(value)):
        raise UsageError(f"{where} is {str(value)[:60]!a}, expected text, a number, true or false, or a list of them")
    if isinstance(value, str) and value.startswith("-"):
        raise UsageError(
            f"{where} begins with a dash, {value[:60]!a}: it would be an option; write numbers without quotes"
        )
    if isinstance(value, str) and not value.isprintable():
        raise UsageError(f"{where} holds a character that no option may, {value[:60]!a}")


def anchored(settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The settings with every ./ or ../ path made absolute from the experiment file's folder."""

    def anchor(value: Any) -> Any:
        if isinstance(value, list):
            return [anchor(one) for one in value]
        return str((folder / value).resolve()) if isinstance(value, str) and value.startswith(("./", "../")) else value

    return {name: anchor(value) for name, value in settings.items()}


@dataclass(frozen=True)
class Places:
    """Where an experiment's files lie under its output folder, or those of one of its parts (empty: its own)."""

    out: Path
    store: Path
    several: bool
    part: str = ""

    @staticmethod
    def of(experiment: Experiment, out: Path, part: str = "") -> Places:
        """Stores go to `harvest.store` when the file names it, so that experiments can share one."""
        several = len(experiment.sites) > 1
        out = out.absolute()
        default = out / "stores" / part if several else out / "stores" / f"{part or 'acts'}.zarr"
        if "://" in str(experiment.harvest.get("store", "")):
            raise UsageError(
                f"{experiment.name}: harvest.store {experiment.harvest['store']} is a URL, an experiment keeps its stores on a "
                "local disk; give a path, or harvest to the URL and `python -m pipeline stage` it first"
            )
        return Places(out, Path(experiment.harvest.get("store", default)).absolute(), several, part)

    def store_of(self, site: str) -> Path:
        return self.store / f"{site}.zarr" if self.several else self.store

    def stores_of(self, site: Site) -> dict[str, Path]:
        """The options that name what a site's members read, and make."""
        target = {} if site.target is None else {"target": self.store_of(site.target)}
        return {"store": self.store_of(site.store), **target}

    def folder(self, site: str) -> str:
        """The name that a site has among others: layer_3, layer_3.mlp_in-to-mlp_out, or the part's."""
        return "-".join(([self.part] if self.part else []) + ([site] if self.several or not self.part else []))

    def checkpoints(self, site: str) -> Path:
        return self.out / "checkpoints" / self.folder(site)

    def results(self, site: str) -> Path:
        return self.out / "results" / self.folder(site)

    @property
    def report(self) -> Path:
        return self.out / "report.html"

    def log(self, stage: str) -> Path:
        return self.out / "logs" / f"{stage}.log"

    @property
    def harvest_plan(self) -> Path:
        """What the harvest's dry run said."""
        return self.log("dry-run").with_name(f"{self.part}-harvest-plan.json" if self.part else "harvest-plan.json")


def harvest_words(experiment: Experiment, places: Places) -> list[str]:
    """Options of the one harvest command."""
    return stages.options({**experiment.harvest, "store": places.store})


def train_words(grid: dict[str, Any], places: Places, site: Site) -> list[str]:
    """Options of one training grid on one site."""
    own = {name: value for name, value in grid.items() if name not in ("store", "target")}
    return stages.options({**own, **places.stores_of(site), "out": places.checkpoints(site.name)}, negatable=True)


def evaluate_words(experiment: Experiment, places: Places, site: Site, members: list[str]) -> list[str]:
    """Options of one evaluation job: the members that the file asks for, by folder."""
    model = {"model": experiment.harvest["model"]} if "model" in experiment.harvest else {}
    settings = {**model, **experiment.evaluate}
    places_of_site = {**places.stores_of(site), "out": places.results(site.name)}
    return [*members, *stages.options({**settings, **places_of_site})]


def with_parts(experiment: Experiment, out: Path) -> list[tuple[Experiment, Places]]:
    """The experiment and its parts, each with its places."""
    named = [("", experiment), *((part.name, part) for part in experiment.parts)]
    return [(one, Places.of(one, out, name)) for name, one in named]


def run(experiment: Experiment, out: Path) -> Path:
    """Do what is missing of an experiment and return the report's path. Raises PipelineError when a stage fails."""
    every, results, took = with_parts(experiment, out), list[str](), Took()
    with took("checking options"):
        check(experiment, every)
    for one, places in every:
        with took("harvest"):
            stages.run_stage("harvest", harvest_words(one, places), places.log("harvest"))
        for site in one.trained:
            with took("train"):
                members = train_site(places, site)
            with took("evaluate"):
                words = evaluate_words(one, places, site, members)
                done = stages.ask_stage("evaluate", words, places.log("evaluate"))
            results += [result["path"] for result in done["results"]]
    places = every[0][1]
    settings = {"out": places.report, "title": experiment.name, **experiment.report}
    with took("report"):
        stages.run_stage("evaluate.report", [*results, *stages.options(settings)], places.log("report"))
    say(took.said)
    return places.report


def check(experiment: Experiment, every: Sequence[tuple[Experiment, Places]], *, here: bool = True) -> None:
    """Have every stage read every option before the first one starts, on this machine if `here`. Raises UsageError naming the
    stage."""
    commands: list[tuple[str, list[str]]] = []
    for one, places in every:
        commands.append(("harvest", harvest_words(one, places)))
        commands += [("train", train_words(grid, places, site)) for site in one.trained for grid in site.grids]
        commands += [("evaluate", evaluate_words(one, places, site, [str(places.out)])) for site in one.trained]
    places = every[0][1]
    words = [str(places.out), *stages.options({"out": places.report, **experiment.report})]
    stages.check([*commands, ("evaluate.report", words)], here=here)


def train_site(places: Places, site: Site) -> list[str]:
    """Train every grid of one site; the member folders asked for, in order, each once."""
    members: dict[str, None] = {}
    for grid in site.grids:
        done = stages.ask_stage("train", train_words(grid, places, site), places.log("train"))
        members |= {member["folder"]: None for member in done["members"]}
    return list(members)


def dry_run(experiment: Experiment, out: Path) -> None:
    """Print the plan: each stage's command, what of it is done, and what the rest needs of disk, memory and time."""
    every = with_parts(experiment, out)
    check(experiment, every)
    say(f"{experiment.name}: everything goes to {out}")
    for one, places in every:
        dry_run_part(one, places)
    say(f"4. the report: {every[0][1].report}")


def dry_run_part(experiment: Experiment, places: Places) -> None:
    """The plan of an experiment, or of a part of one, up to its scores."""
    say(f"1. {stages.show('harvest', harvest_words(experiment, places))}")
    planned = ask_harvest(experiment, places)
    for site in experiment.trained:
        n_members = 0
        for grid in site.grids:
            say(f"2. {stages.show('train', train_words(grid, places, site))}")
            n_members += len(ask_train(grid, places, site)["members"])
        say(f"3. {stages.show('evaluate', evaluate_words(experiment, places, site, ['MEMBERS']))}")
        say(evaluate_cost(experiment, planned, site.spliced, n_members))


Ask = Callable[[str, Sequence[str], Path], Any]
"""How a stage is asked for what it prints as JSON: `stages.ask_stage`."""


def ask_harvest(experiment: Experiment, places: Places, ask: Ask = stages.ask_stage) -> Any:
    """What `harvest --dry-run` says, kept beside the log for `ask_train`. Raises PipelineError when it cannot be planned."""
    planned = ask("harvest", [*harvest_words(experiment, places), "--dry-run"], places.log("dry-run"))
    write_sealed(places.harvest_plan, planned)
    return planned


def ask_train(
    grid: dict[str, Any], places: Places, site: Site, ask: Ask = stages.ask_stage, *, elsewhere: bool = False
) -> Any:
    """What `train --dry-run` says of a grid, for stores that are not there yet by the harvest's plan; `elsewhere`: for another
    machine than this. Raises PipelineError."""
    there = all(map(is_complete, places.stores_of(site).values()))
    planned = [] if there else ["--planned", str(places.harvest_plan)]
    more = [*planned, *(["--elsewhere"] if elsewhere else [])]
    return ask("train", [*train_words(grid, places, site), "--dry-run", *more], places.log("dry-run"))


def is_complete(store: Path) -> bool:
    """Whether a store is there and finished, by its own word. Raises DamagedError where that cannot be read."""
    from pipeline.store.backend import LocalFiles  # with torch, which a plan alone does without
    from pipeline.store.root import ROOT_KEY, read_root

    return (store / ROOT_KEY).exists() and read_root(LocalFiles(store))["state"] == "complete"


def evaluate_passes(n_members: int) -> int:
    """Passes of the layers after the cut that scoring members takes at most."""
    return 2 * n_members + 2


def evaluate_cost(experiment: Experiment, planned: Mapping[str, Any], site: str, n_members: int) -> str:
    """A line on what scoring takes: a pass of the layers after the cut a member and level, clean and mean ablation."""
    store = planned["stores"][experiment.sites.index(site)]
    rows = store["n_sequences"]["eval"] * store["config"]["context"]
    if "truth" in experiment.harvest:
        return f"   {n_members} members on {rows:,} rows of known features; no language model runs"
    passes = evaluate_passes(n_members)
    seconds = passes * rows * planned["cost"]["suffix_seconds"]
    return (
        f"   {n_members} members, at most {passes} passes of what follows {site} over {rows:,} rows: about "
        f"{format_seconds(seconds)} for KL, more for scores of texts; memory: four fifths of what is free at most"
    )
