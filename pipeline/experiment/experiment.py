"""An experiment file: one TOML names harvest, training grids and evaluation; running it does what is missing.

    out/
      stores/         acts.zarr, or layer_L.zarr for each of several layers (or wherever `store` says)
      checkpoints/    layer_L/<member>/…
      results/        layer_L/<member>-step_N-<key>.json, results.csv
      logs/           a file a stage
      report.html, report_files/

Each stage knows what is done and skips it, so running again does nothing, and a changed line does what that line asks.
Only members that the file asks for are evaluated and reported, whatever else the folders hold.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.base.cli import read_toml
from pipeline.base.errors import UsageError
from pipeline.base.files import read_json, write_json
from pipeline.base.progress import format_seconds, say
from pipeline.experiment import stages

SHIPPED = Path(__file__).parent
TABLES = {"name", "harvest", "train", "evaluate", "report"}


@dataclass(frozen=True)
class Experiment:
    """A parsed experiment file: each table holds options of a stage's command by name, lists repeat an option.

    `train` holds one table or several (`[[train]]`), each a grid. Paths that begin with ./ or ../ are taken from the
    file's own folder. Raises UsageError for an unknown table or a missing one.
    """

    name: str
    harvest: dict[str, Any]
    train: list[dict[str, Any]]
    evaluate: dict[str, Any] = field(default_factory=dict)
    report: dict[str, Any] = field(default_factory=dict)

    @staticmethod
    def read(path: Path, *, trust_remote_code: bool = False) -> Experiment:
        """Read an experiment file: a path, or the name of a shipped one (demo, paper, ablations).

        trust_remote_code: whether the command line allows code that comes with a model; a file alone cannot.
        """
        shipped = SHIPPED / f"{path.name.removesuffix('.toml')}.toml"
        if not path.exists() and path.parent == Path() and shipped.exists():
            path = shipped
        data = read_toml(path)
        if unknown := sorted(data.keys() - TABLES):
            raise UsageError(f"{path}: unknown tables {unknown}; known are {sorted(TABLES)}")
        if "harvest" not in data or "train" not in data:
            raise UsageError(f"{path}: needs a [harvest] and a [train] table")
        name = data.get("name", path.stem)
        if not isinstance(name, str):
            raise UsageError(f"{path}: name is {type(name).__name__}, expected text")
        grids = data["train"] if isinstance(data["train"], list) else [data["train"]]
        here = path.resolve().parent
        harvest, evaluate, report = (table(path, one, data.get(one, {})) for one in ("harvest", "evaluate", "report"))
        trains = [table(path, "train", grid) for grid in grids]
        if any(one.get("trust-remote-code") for one in (harvest, evaluate)) and not trust_remote_code:
            raise UsageError(
                f"{path}: asks for trust-remote-code, a model's own code; allow it on the command line too"
            )
        return Experiment(
            name,
            anchored(harvest, here),
            [anchored(grid, here) for grid in trains],
            anchored(evaluate, here),
            anchored(report, here),
        )

    @property
    def layers(self) -> list[int]:
        """The layers harvested; one store each."""
        layer = self.harvest.get("layer", 0 if "truth" in self.harvest else 19)  # rows of known features have no layer
        return list(layer) if isinstance(layer, list) else [layer]


def table(path: Path, name: str, found: Any) -> dict[str, Any]:
    """A table of options, with dashes in their names. Raises UsageError when it is something else, or holds tables."""
    if not isinstance(found, dict):
        raise UsageError(f"{path}: {name} is {type(found).__name__}, expected a table of options: [{name}]")
    if nested := [key for key, value in found.items() if isinstance(value, dict)]:
        raise UsageError(f"{path}: {name}.{nested[0]} is a table, expected the value of an option")
    return {key.replace("_", "-"): value for key, value in found.items()}


def anchored(settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The settings with every ./ or ../ path made absolute from the experiment file's folder."""

    def anchor(value: Any) -> Any:
        if isinstance(value, list):
            return [anchor(one) for one in value]
        return str((folder / value).resolve()) if isinstance(value, str) and value.startswith(("./", "../")) else value

    return {name: anchor(value) for name, value in settings.items()}


@dataclass(frozen=True)
class Places:
    """Where an experiment's parts lie under its output folder."""

    out: Path
    store: Path
    several: bool

    @staticmethod
    def of(experiment: Experiment, out: Path) -> Places:
        """Stores go to `harvest.store` when the file names it, so that experiments can share one."""
        several = len(experiment.layers) > 1
        out = out.absolute()
        default = out / "stores" if several else out / "stores" / "acts.zarr"
        if "://" in str(experiment.harvest.get("store", "")):
            raise UsageError(
                f"{experiment.name}: harvest.store {experiment.harvest['store']} is a URL, training reads a local disk; give "
                "a path, or harvest to the URL and `python -m pipeline stage` it first"
            )
        return Places(out, Path(experiment.harvest.get("store", default)).absolute(), several)

    def store_of(self, layer: int) -> Path:
        return self.store / f"layer_{layer}.zarr" if self.several else self.store

    def checkpoints(self, layer: int) -> Path:
        return self.out / "checkpoints" / f"layer_{layer}"

    def results(self, layer: int) -> Path:
        return self.out / "results" / f"layer_{layer}"

    @property
    def report(self) -> Path:
        return self.out / "report.html"

    def log(self, stage: str) -> Path:
        return self.out / "logs" / f"{stage}.log"


def harvest_words(experiment: Experiment, places: Places) -> list[str]:
    """Options of the one harvest command."""
    return stages.options({**experiment.harvest, "store": places.store})


def train_words(grid: dict[str, Any], places: Places, layer: int) -> list[str]:
    """Options of one training grid on one layer."""
    settings = {**grid, "store": places.store_of(layer), "out": places.checkpoints(layer)}
    return stages.options(settings, negatable=True)


def evaluate_words(experiment: Experiment, places: Places, layer: int, members: list[str]) -> list[str]:
    """Options of one evaluation job: the members that the file asks for, by folder."""
    model = {"model": experiment.harvest["model"]} if "model" in experiment.harvest else {}
    settings = {**model, **experiment.evaluate}
    places_of_layer = {"store": places.store_of(layer), "out": places.results(layer)}
    return [*members, *stages.options({**settings, **places_of_layer})]


def run(experiment: Experiment, out: Path) -> Path:
    """Do what is missing of an experiment and return the report's path. Raises PipelineError when a stage fails."""
    places = Places.of(experiment, out)
    check(experiment, places)
    stages.run_stage("harvest", harvest_words(experiment, places), places.log("harvest"))
    results: list[str] = []
    for layer in experiment.layers:
        members = train_layer(experiment, places, layer)
        words = evaluate_words(experiment, places, layer, members)
        done = stages.ask_stage("evaluate", words, places.log("evaluate"))
        results += [result["path"] for result in done["results"]]
    settings = {"out": places.report, "title": experiment.name, **experiment.report}
    stages.run_stage("evaluate.report", [*results, *stages.options(settings)], places.log("report"))
    return places.report


def check(experiment: Experiment, places: Places) -> None:
    """Have every stage's own parser read every option before the first stage starts. Raises UsageError naming the stage."""
    layer = experiment.layers[0]
    stages.check("harvest", harvest_words(experiment, places))
    for grid in experiment.train:
        stages.check("train", train_words(grid, places, layer))
    stages.check("evaluate", evaluate_words(experiment, places, layer, [str(places.out)]))
    stages.check("evaluate.report", [str(places.out), *stages.options({"out": places.report, **experiment.report})])


def train_layer(experiment: Experiment, places: Places, layer: int) -> list[str]:
    """Train every grid on one layer; the member folders asked for, in order, each once."""
    members: dict[str, None] = {}
    for grid in experiment.train:
        done = stages.ask_stage("train", train_words(grid, places, layer), places.log("train"))
        members |= {member["folder"]: None for member in done["members"]}
    return list(members)


def dry_run(experiment: Experiment, out: Path) -> None:
    """Print the plan: each stage's command, what of it is done, and what the rest needs of disk, memory and time."""
    places = Places.of(experiment, out)
    log = places.log("dry-run")
    check(experiment, places)
    say(f"{experiment.name}: everything goes to {out}")
    words = harvest_words(experiment, places)
    say(f"1. {stages.show('harvest', words)}")
    planned = stages.ask_stage("harvest", [*words, "--dry-run"], log)
    plan_file = log.with_name("harvest-plan.json")
    write_json(plan_file, planned)
    for layer in experiment.layers:
        n_members = 0
        for grid in experiment.train:
            words = train_words(grid, places, layer)
            say(f"2. {stages.show('train', words)}")
            there = is_complete(places.store_of(layer))
            done = stages.ask_stage(
                "train", [*words, "--dry-run", *([] if there else ["--planned", str(plan_file)])], log
            )
            n_members += len(done["members"])
        say(f"3. {stages.show('evaluate', evaluate_words(experiment, places, layer, ['MEMBERS']))}")
        say(evaluate_cost(experiment, planned, layer, n_members))
    say(f"4. the report: {places.report}")


def is_complete(store: Path) -> bool:
    """Whether a store is there and finished, by its own word."""
    root = store / "zarr.json"
    return root.exists() and read_json(root)["attributes"]["state"] == "complete"


def evaluate_cost(experiment: Experiment, planned: Mapping[str, Any], layer: int, n_members: int) -> str:
    """A line on what scoring takes: a pass of the layers after the cut a member and level, clean and mean ablation."""
    store = next(one for one in planned["stores"] if one["layer"] == layer)
    rows = store["n_sequences"]["eval"] * store["config"]["context"]
    passes = 2 * n_members + 2
    seconds = passes * rows * planned["cost"]["suffix_seconds"]
    return (
        f"   {n_members} members, at most {passes} passes of the layers after {layer} over {rows:,} rows: about "
        f"{format_seconds(seconds)} for KL, more for scores of texts; memory: four fifths of what is free at most"
    )
