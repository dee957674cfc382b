"""Reads one results file into what `scored.py` holds, each value checked when it is taken. Layout: FORMAT.md, "Results"."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from evaluate.report.scored import (
    BLOCKS,
    TRUTH,
    Checkpoint,
    Container,
    Held,
    Histogram,
    Labels,
    Level,
    Node,
    Point,
    Run,
    StoreFacts,
    Structure,
)
from pipeline.base.errors import DamagedError
from pipeline.base.fields import Fields
from pipeline.base.results import member_of, read_result
from pipeline.definitions import SHIPPED_SPECS, Better, Metric

MOST_NODES = 256
"""Features of a tree that a page draws, at most."""


def read_run(path: Path) -> Run:
    """Read one results file. Raises DamagedError, naming the field, when it is not one of ours in every part."""
    return make_run(path, read_result(path))


def make_run(path: Path, data: Mapping[str, Any]) -> Run:
    """Results as typed values. Raises DamagedError naming the first field that is not what it should be."""
    missing = [name for name in ("key", "checkpoint", "store", "levels") if not data.get(name)]
    if missing:
        raise DamagedError(f"{path}: results without {', '.join(missing)}; evaluate this checkpoint again")
    fields = Fields(path, data)
    store, features, truth = (fields.inner(name) for name in ("store", "features", "truth"))
    return Run(
        path,
        checkpoint_of(fields.inner("checkpoint")),
        StoreFacts(
            store.text("id", ""),
            store.text("model", ""),
            store.some_whole("layer"),
            store.data.get("corpus"),
            store.some_text("hook"),
            reads_of(store.inner("source"), store.some_whole("layer")),
            place_name(store, truth),
        ),
        fields.inner("evaluation").data,
        {name: n for name, n in fields.inner("sample").data.items() if isinstance(n, int) and not isinstance(n, bool)},
        fields.numbers("baselines") | fields.inner("baselines").numbers("without_massive"),
        tuple(level_of(level) for level in fields.objects("levels")),
        {name: points_of(fields.inner("series"), name) for name in fields.inner("series").data},
        features.data,
        density_of(features.inner("density")),
        curve_of(fields.inner("curve")),
        {id: definition_of(fields.inner("definitions").inner(id), id) for id in fields.inner("definitions").data},
        fields.texts("versions"),
        fields.text("git", ""),
        trees_of(truth),
        (truth.whole("n_parent_and_child"), truth.whole("n_parent_alone")) if "n_parent_alone" in truth.data else None,
        {
            family: labels_of(fields.inner(family), group)
            for family, group in (("absorption", "all"), ("first_letter", "letters"))
            if fields.data.get(family) and fields.inner(family).data.get("levels")
        },
        no_letters_of(fields.inner("first_letter")),
        structure_of(fields.inner("structure")),
    )


def structure_of(fields: Fields) -> Structure:
    """The meta-dictionary's figure, and what contains specialised latents."""
    hierarchy, meta = fields.inner("hierarchy"), fields.objects("meta")
    controls = [container_of(one, one.some_number("share")) for one in hierarchy.objects("controls")]
    level, shares = hierarchy.inner("level"), [one.share for one in controls if one]
    return Structure(
        meta[-1].some_number("value") if meta else None,
        container_of(level, shares[0] if shares else None),
        tuple(one for one in controls if one),
    )


def container_of(fields: Fields, share: float | None) -> Container | None:
    """One set of latents; None where nothing was asked of it."""
    density, excess = fields.some_number("density"), fields.some_number("excess")
    return None if share is None or not density or density < 0 or excess is None else Container(share, density, excess)


def trees_of(fields: Fields) -> tuple[tuple[Node, ...], ...]:
    """The trees that are shown feature by feature; each feature has its latent in equally many levels."""
    trees = [tree_of(fields, i, tree) for i, tree in enumerate(fields.items("trees"))]
    if len({len(node.levels) for tree in trees for node in tree}) > 1:
        raise fields.wrong("trees", "features with a latent in every level", "more levels of some than of others")
    return tuple(trees)


def tree_of(fields: Fields, number: int, tree: Any) -> tuple[Node, ...]:
    """One tree of at most MOST_NODES features: its root, then every other one once, after its parent."""
    inner = Fields(fields.path, {"nodes": tree}, f"{fields.name}.trees.{number}")
    nodes: dict[int, Node] = {}
    for one in inner.objects("nodes"):
        held = tuple(
            Held(level.whole("latent"), level.number("cosine", least=0), level.some_number("recall"))
            for level in one.objects("levels")
        )
        node = Node(one.whole("feature"), one.whole("parent", least=-1), one.whole("depth"), held)
        above = nodes[node.parent].depth + 1 if node.parent in nodes else 0 if not nodes else -1
        if node.depth != above or not held or node.feature in nodes or len(nodes) >= MOST_NODES:
            raise inner.wrong(
                "nodes", "a root, then features a level under their parents, with their latents", one.data
            )
        nodes[node.feature] = node
    if not nodes:
        raise inner.wrong("nodes", "a list of features", tree)
    return tuple(nodes.values())


def no_letters_of(fields: Fields) -> str:
    """Why first letters that were asked for have no number, in a sentence of ours; nothing where they have one."""
    if not fields.data or fields.data.get("levels"):
        return ""
    why = "the prompts are longer than the model’s positions"
    if "probes" in fields.data:
        why = f"of 26, {len(fields.inner('probes').data)} have a probe that finds them on unseen words, too few"
    return f"First letters were asked for in prompts and not scored: {why}."


def labels_of(fields: Fields, group: str) -> Labels:
    """What absorption in the whole dictionary was measured on, over a group of labels."""
    every = fields.objects("levels")[-1].inner(group)
    return Labels(every.whole("n_labels", 0), len(fields.inner("left_out").data), every.whole("n", 0))


def checkpoint_of(fields: Fields) -> Checkpoint:
    """What was scored."""
    provenance, sae = fields.inner("provenance"), fields.inner("sae")
    path, store = fields.text("path", "None"), provenance.inner("store")
    corpus = store.data.get("corpus")
    return Checkpoint(
        path,
        fields.text("sha256", ""),
        fields.whole("step", 0),
        sae.whole("width", least=1),
        tuple(sae.list_of_wholes("levels")),
        member_of(fields),
        train_of(provenance.inner("train")),
        provenance.some_whole("rows_seen"),
        provenance.some_whole("fired_rows"),
        corpus,
        provenance.texts("versions"),
        provenance.text("git", ""),
        fields.data,
    )


def train_of(fields: Fields) -> Mapping[str, Any]:
    """A training config in which what a report reads is of its type."""
    fields.whole("seed", 0)
    fields.whole("data_seed", 0)
    if fields.data.get("alpha") != "auto":
        fields.some_number("alpha")
    if any(share is None for share in fields.list_of_numbers("levels")):
        fields.list_of_wholes("levels")
    return fields.data


def level_of(fields: Fields) -> Level:
    """One level's scores."""
    return Level(
        fields.whole("level"),
        fields.whole("n_latents", least=1),
        fields.numbers_or_nulls("scores"),
        fields.numbers_or_nulls("scores_without_massive"),
    )


def points_of(fields: Fields, name: str) -> tuple[Point, ...]:
    """A series; undefined values are left out."""
    points = [(p, p.some_number("value")) for p in fields.objects(name)]
    return tuple(Point(p.whole("n"), p.some_whole("level"), value) for p, value in points if value is not None)


def place_name(store: Fields, truth: Fields) -> str:
    """A model's name without the folder or organisation before it; of known features the shipped spec's, and how many."""
    model = store.text("model", "")
    if not model.startswith(TRUTH):
        return model.rstrip("/").rpartition("/")[2] or model
    n, spec = truth.some_whole("n_features"), SHIPPED_SPECS.get(model.removeprefix(TRUTH))
    known = f"{n:,} known features" if n else "known features"
    return f"{spec} ({known})" if spec else known


def reads_of(source: Fields, layer: int | None) -> str:
    """The point that a transcoder reads, with its layer where it makes rows of another."""
    if not source.data:
        return ""
    hook, read = source.text("hook", "resid_post"), source.some_whole("layer")
    return hook if read == layer else f"{hook} of layer {read}"


def density_of(fields: Fields) -> dict[str, Histogram]:
    """Histograms of log10 density by block."""
    edges = [x for x in fields.list_of_numbers("edges") if x is not None]
    blocks = {name: fields.list_of_numbers(name, len(edges) - 1) for name in BLOCKS if fields.data.get(name)}
    return {name: (edges, [float(n or 0) for n in counts]) for name, counts in blocks.items()}


def curve_of(fields: Fields) -> dict[str, dict[int, float]]:
    """Terms of the loss by step, gaps left out: total, reconstruction of the innermost level and of the whole, penalties."""
    steps = fields.list_of_wholes("step")
    terms = {name: fields.list_of_numbers(name, len(steps)) for name in CURVE_TERMS if fields.data.get(name)}
    recon = [Fields(fields.path, {"level": level}, f"curve.recon.{i}") for i, level in enumerate(fields.items("recon"))]
    levels = [point.list_of_numbers("level") for point in recon]
    for name, at in (("recon_innermost", 0), ("recon_whole", -1)):
        if levels:
            terms[name] = [level[at] if level else None for level in levels]
    return {
        name: {step: value for step, value in zip(steps, values) if value is not None} for name, values in terms.items()
    }


CURVE_TERMS = ("loss", "l1_shared", "l1_specialised", "aux")


def definition_of(fields: Fields, id: str) -> Metric:
    """A metric as the results explain it."""
    better = fields.text("better")
    found: dict[str, Better] = {"lower": "lower", "higher": "higher", "neither": "neither"}
    if better not in found:
        raise fields.wrong("better", "lower, higher or neither", better)
    return Metric(id, id, fields.text("unit"), found[better], fields.text("definition"))
