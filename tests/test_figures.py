"""Figures: what they hold, that they can stand together on a page, and that a missing score leaves out a figure only."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from matplotlib.axes import Axes

from evaluate.report import svg
from evaluate.report.drawing import band_of, dodged, held
from evaluate.report.figures import Figure, Missing, across_n, by_level, curve_of, loss
from evaluate.report.figures_across import (
    ablation,
    density,
    front,
    front_lines,
    fronts,
    fronts_of,
    make_figures,
    median,
)
from evaluate.report.reading import make_run
from evaluate.report.runs import Results, read_results
from pipeline.base.files import read_json, write_json
from support.results_files import write_results


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    folder = tmp_path_factory.mktemp("results")
    write_results(folder, alphas=(0.0, 0.2), steps=(200, 400))
    return read_results([folder])


@pytest.fixture(scope="module")
def drawn(results: Results) -> dict[str, list[str]]:
    """Every figure's panels as they stand in the page."""
    figures = [f for f in make_figures(results) if isinstance(f, Figure)]
    return {figure.id: [svg.inline(panel) for panel in figure.panels] for figure in figures}


def figure(made: Figure | Missing) -> Figure:
    assert isinstance(made, Figure), made
    return made


def test_panels_are_plain_wellformed_xml(drawn: dict[str, list[str]]) -> None:
    """Every panel is well-formed XML without scripts, styles or dates."""
    for panels in drawn.values():
        for panel in panels:
            root = ElementTree.fromstring(panel)
            names = {element.tag.rpartition("}")[2] for element in root.iter()}
            assert not names & {"script", "style", "metadata", "image", "foreignObject"}
            assert not re.search(r"20\d\d-\d\d-\d\d", panel)


def test_panel_ids_differ_and_resolve(drawn: dict[str, list[str]]) -> None:
    """Ids of all panels differ and every reference has its target."""
    whole = "".join(panel for panels in drawn.values() for panel in panels)
    ids = re.findall(r'\bid="([^"]*)"', whole)
    assert len(ids) == len(set(ids)) > 100
    assert set(re.findall(r'href="#([^"]*)"|url\(#([^)]*)\)', whole))
    references = {a or b for a, b in re.findall(r'href="#([^"]*)"|url\(#([^)]*)\)', whole)}
    assert references <= set(ids)


def test_text_stays_text(drawn: dict[str, list[str]]) -> None:
    """Text stays text and colours follow the page."""
    panel = drawn["loss"][0]
    assert "<text" in panel
    assert "total loss" in panel
    assert "var(--s1)" in panel
    assert "currentColor" in panel
    assert "#0102" not in "".join(p for panels in drawn.values() for p in panels)


def test_equal_results_draw_equal_bytes(results: Results) -> None:
    """The same results draw the same bytes."""
    one, other = (figure(loss(results)).panels[0] for _ in range(2))
    assert svg.standalone(one, 2) == svg.standalone(other, 2)
    assert svg.inline(one) == svg.inline(other)


def test_saved_panel_stands_alone(results: Results) -> None:
    """A saved panel stands alone with a legend and real colours."""
    saved = svg.standalone(figure(loss(results)).panels[0], 2).decode()
    ElementTree.fromstring(saved)
    assert "α = 0.2" in saved
    assert "var(--" not in saved
    assert "#0102" not in saved


def test_sharing_colours_differ_in_lightness() -> None:
    """Colours of ways of sharing differ in lightness in order."""
    for colours in svg.palette(5):
        parts = [[int(c[i : i + 2], 16) / 255 for i in (1, 3, 5)] for c in colours[1:]]
        light = [0.2126 * r + 0.7152 * g + 0.0722 * b for r, g, b in parts]
        assert light == sorted(light)
        assert min(b - a for a, b in zip(light, light[1:])) > 0.04


def test_loss_has_a_panel_each_term(results: Results) -> None:
    """Loss has a panel a term and says that totals are not comparable."""
    made = figure(loss(results))
    assert [panel.id for panel in made.panels] == [
        "loss-0-loss", "loss-0-recon_innermost", "loss-0-recon_whole", "loss-0-l1_shared", "loss-0-l1_specialised"
    ]  # fmt: skip
    assert "not comparable" in made.caption
    rows = [row for row in made.numbers if row["term"] == "recon_innermost"]
    assert {row["row"] for row in rows} == {"α = 0.2"}
    assert all(row["low"] < row["mean"] < row["high"] and row["seeds"] == 3 for row in rows)


def test_caption_ratio_is_of_last_means(results: Results) -> None:
    """The ratio of nested to flat loss in the caption is that of the last means."""
    last = {
        row.sharing: sum(list(run.curve["loss"].values())[-1] for run in row.runs) / len(row.runs)
        for row in results.main.rows
    }
    assert f"{last[(0.2,)] / last[()]:.2f} at α = 0.2" in figure(loss(results)).caption


def test_curve_leaves_out_gaps(results: Results) -> None:
    """A curve with gaps leaves them out."""
    data = read_json(results.runs[0].path) | {
        "curve": {"step": [1, 2, 3], "loss": [3.0, None, 1.0], "recon": [[2.0], None, [1.0]]}
    }
    run = make_run(Path("x.json"), data)
    assert curve_of(run, "loss") == {1: 3.0, 3: 1.0}
    assert curve_of(run, "recon_whole") == {1: 2.0, 3: 1.0}


def test_bands_take_shared_or_all_x() -> None:
    """Bands take every x or only those that all seeds have."""
    points = [{1: 1.0, 2: 2.0}, {2: 4.0, 3: 9.0}]
    assert [(x, e.mean, e.n) for x, e in band_of(points)] == [(1, 1, 1), (2, 3, 2), (3, 9, 1)]
    assert [x for x, _ in band_of(points, common=True)] == [2]
    assert band_of([]) == band_of([], common=True) == []


def test_scores_across_n_are_seed_means(results: Results) -> None:
    """Scores across n are means over seeds at each n."""
    made = figure(across_n(results))
    row = next(row for row in results.main.rows if row.sharing)
    expected = sum(run.at("scr")[20] for run in row.runs) / 3
    found = [r for r in made.numbers if (r["row"], r["score"], r["n"]) == ("α = 0.2", "scr", 20)]
    assert math.isclose(found[0]["mean"], expected)
    assert "n = 20" in made.caption


def test_levels_show_shared_and_whole(results: Results) -> None:
    """Levels give the shared dictionary alone and the whole."""
    made = figure(by_level(results))
    assert {r["latents"] for r in made.numbers if r["row"] == "α = 0.2"} == {205, 1024}
    assert {r["latents"] for r in made.numbers if r["row"] == "α = 0"} == {1024}
    assert "205 of 1,024 latents" in made.caption


def test_every_checkpoint_is_a_named_point(results: Results, drawn: dict[str, list[str]]) -> None:
    """Every checkpoint is a point that says which it is."""
    made = figure(fronts(results))
    assert len(made.numbers) == 2 * len(results.runs) == 24
    for panel, markup in zip(made.panels, drawn["pareto"]):
        titles = re.findall(r"<title>([^<]*)</title>", markup)
        assert len(titles) == len(results.runs)
        assert all(any(run.name in title for title in titles) for run in results.runs)
        assert len(panel.tips) == len(results.runs)


def test_hostile_tooltip_is_text(results: Results) -> None:
    """A tooltip from a hostile name is text."""
    panel = figure(fronts(results)).panels[0]
    hostile = svg.Panel(
        panel.id, panel.title, "", "", panel.draw, dict.fromkeys(panel.tips, "</title><script>alert(1)</script>")
    )
    assert "<script" not in svg.inline(hostile)


def test_front_holds_unbeaten_points(results: Results) -> None:
    """The front holds what nothing as sparse beats."""
    run = results.runs[0]
    points = [(run, 10.0, 0.5), (run, 20.0, 0.4), (run, 20.0, 0.45), (run, 30.0, 0.6), (run, 40.0, 0.1)]
    assert [(x, y) for _, x, y in front(False, points)] == [(10, 0.5), (20, 0.4), (40, 0.1)]
    assert [(x, y) for _, x, y in front(True, points)] == [(10, 0.5), (30, 0.6)]


def test_density_histograms_add_seeds(results: Results) -> None:
    """Density histograms add seeds and have their median."""
    made = figure(density(results))
    shared = [r["latents"] for r in made.numbers if (r["row"], r["block"]) == ("α = 0.2", "shared")]
    assert sum(shared) == 3 * 205
    assert median([0.0, 1.0, 2.0], [1.0, 3.0]) == pytest.approx(4 / 3)


def test_ablations_vary_one_numeric_setting(tmp_path: Path) -> None:
    """Ablations are drawn for numeric settings that differ and hold the others."""
    write_results(tmp_path, alphas=(0.0, 0.2), steps=(400,))
    for change in ({"width": 2048}, {"lr": 3e-3}, {"layer": 4}):
        write_results(tmp_path, alphas=(0.0,), steps=(400,), **change)  # type: ignore[arg-type]
    made = figure(ablation(read_results([tmp_path])))
    assert {r["setting"]: None for r in made.numbers}.keys() == {"layer", "width", "lr"}
    widths = {r["value"] for r in made.numbers if (r["setting"], r["row"]) == ("width", "α = 0")}
    assert widths == {1024, 2048}
    assert "no test is made" in made.caption


@pytest.mark.parametrize(
    ("drop", "missing"),
    [
        (["curve"], {"Training loss over steps"}),
        (["series"], {"Scores across the number of latents n"}),
        (["features"], {"How often latents fire"}),
        (["l0"], {"Quality against sparsity"}),
        (["kl_nats", "ev"], {"Quality against sparsity"}),
        (["curve", "series", "features", "kl_nats", "ev", "l0"], {
            "Training loss over steps", "Scores across the number of latents n", "How often latents fire",
            "Quality against sparsity", "Each level alone",
        }),
    ],
)  # fmt: skip
def test_missing_figure_gives_its_reason(tmp_path: Path, drop: list[str], missing: set[str]) -> None:
    """What is missing leaves out its figure with a reason."""
    write_results(tmp_path, alphas=(0.0, 0.2), seeds=(0, 1), steps=(400,), drop=drop)
    made = make_figures(read_results([tmp_path]))
    left_out = [f for f in made if isinstance(f, Missing)]
    assert {f.title for f in left_out} == missing | {"Ablations", "What nesting buys and costs"}
    assert all(f.reason for f in left_out)


def test_fronts_never_mix_places(tmp_path: Path) -> None:
    """Each model, layer and store has its own panels, and no line joins two of them."""
    for layer in (3, 4):
        for k, l0 in ((20, 20.0), (40, 40.0)):
            write_results(tmp_path, alphas=(0.0, 0.2), steps=(400,), layer=layer, l0=l0, k=k)
    results = read_results([tmp_path])
    for layer, made in ((3, figure(fronts(results))), (4, figure(fronts(results, elsewhere=True)))):
        assert [panel.title for panel in made.panels] == [
            f"{name} against L0 (layer {layer})" for name in ("KL", "Explained variance")
        ]
        assert {row["place"] for row in made.numbers} == {f"layer {layer}"}
    for _, runs in results.places:
        assert len({run.store.layer for run in runs}) == 1
        lines = front_lines(results, runs, "ev")
        assert sorted((sharing, len(line)) for sharing, _, line in lines) == [((), 2), ((0.2,), 2)]


def test_legends_name_what_is_drawn(tmp_path: Path) -> None:
    """A legend has no block that is not there, and no note on larger points where all are last checkpoints."""
    write_results(tmp_path, alphas=(0.0,), steps=(400,))
    flat = read_results([tmp_path])
    assert [label for _, label in figure(density(flat)).legend] == ["specialised"]
    caption = figure(fronts(flat)).caption
    assert caption.startswith("A point is a checkpoint; bars are means of last checkpoints with 95 % intervals; dashed")


def test_fronts_are_drawn_as_steps(tmp_path: Path) -> None:
    """At one sparsity the front of flat dictionaries and that of nested ones are steps; lines over several take their place."""
    write_results(tmp_path, alphas=(0.0, 0.2), steps=(400,), l0=20.0, k=20)
    results = read_results([tmp_path])
    flat, nested = ([run for run in results.runs if bool(run.sharing) == kind] for kind in (False, True))
    points = [(run, float(i), 0.5 - i / 10) for i, run in enumerate([*flat, *nested], 1)]
    lines = front_lines(results, results.runs, "kl_nats")
    assert [[run for run, _, _ in best] for best in fronts_of(points, lines, False)] == [flat, nested]
    drawn = svg.inline(figure(fronts(results)).panels[0])
    assert sorted(re.findall(r"stroke-dasharray: [^\"]*stroke: ([^;]*);", drawn)) == ["currentColor", "var(--quiet)"]
    write_results(tmp_path, alphas=(0.0, 0.2), steps=(400,), l0=40.0, k=40)
    results = read_results([tmp_path])
    assert fronts_of(points, front_lines(results, results.runs, "kl_nats"), False) == []
    assert "stroke-dasharray" not in svg.inline(figure(fronts(results)).panels[0])


def test_bars_stand_side_by_side() -> None:
    """Bars of several lines at one x are moved apart, on a logarithmic axis in proportion, and never past a neighbour."""
    xs = [2.0, 5.0, 10.0, 20.0]
    at = [dodged(10.0, place, xs, True) for place in (-2.0, 0.0, 2.0)]
    assert at[1] == 10.0
    assert 5.0 < at[0] < 10.0 < at[2] < 20.0
    assert dodged(3.0, 1.0, [3.0], True) == 3.0


def test_density_axes_are_fitted(results: Results) -> None:
    """A histogram's axis spans the bins that hold latents, and one to spare."""
    edges = [-6.0, -5.0, -4.0, -3.0, -2.0, -1.0, 0.0]
    assert held({"shared": (edges, [0, 0, 0, 3, 1, 0])}) == (-4.0, 0.0)


def test_long_titles_take_lines() -> None:
    """A panel's title that names many settings is broken into lines within the panel, which grows by them."""
    settings = ", ".join(f"setting{i} value{i}" for i in range(12))
    panels = [svg.Panel("p", title, "x", "y", lambda axes: None) for title in ("KL", f"KL ({settings})")]
    short, long = (ElementTree.fromstring(panel.drawn) for panel in panels)
    heights = [float(drawn.attrib["height"].removesuffix("pt")) for drawn in (short, long)]
    texts = [
        text for text in long.iter("{http://www.w3.org/2000/svg}text") if re.search("setting|value", text.text or "")
    ]
    assert " ".join(str(text.text) for text in texts) == f"KL ({settings})"
    assert len(texts) >= 4
    assert max(len(str(text.text)) for text in texts) <= svg.TITLE_WIDTH
    assert heights[1] - heights[0] == pytest.approx(72 * svg.LINE_HEIGHT * (len(texts) - 1))


def ablations(folder: Path) -> Results:
    """Known features with most dictionaries, and a model's at ten widths: what `pipeline run ablations` makes, in small."""
    for path in write_results(folder / "forest", alphas=(0.0, 0.1, 0.2, 0.3, 0.5), seeds=(0, 1), steps=(400,), lr=3e-3):
        data = read_json(path)
        data["store"] |= {"model": "truth:0123456789", "id": "forest"}
        write_json(path, data)
    for i in range(10):
        write_results(folder / f"{i}", alphas=(0.0, 0.2), seeds=(0, 1), steps=(400,), width=256 + 64 * i)
    return read_results([folder])


def test_known_features_are_not_main(tmp_path: Path) -> None:
    """However many, they stand behind groups of a model's rows, whose ablations are drawn."""
    results = ablations(tmp_path)
    assert len(results.groups) == 11
    assert [group.runs[0].is_known for group in results.groups] == [False] * 10 + [True]
    assert len(results.groups[-1].runs) == 10
    found = figure(ablation(results))
    assert [panel.id.removeprefix("ablation-width-") for panel in found.panels] == ["kl_nats", "ev", "l0"]
    assert "Drawn for the first of 11 groups" in figure(loss(results)).caption


def test_many_groups_have_one_legend(tmp_path: Path) -> None:
    """A name stands once in a legend, however many groups have it; a mark is not said to be one group's alone."""
    found = figure(fronts(ablations(tmp_path)))
    saved = found.panels[0].drawn
    assert re.findall(r">(α = [\d.]+)</text>", saved[saved.index('id="legend_1"') :]) == ["α = 0", "α = 0.2"]
    assert "Marks are those of groups in the order of Table 1, and begin again after 8." in found.caption


def test_long_legends_leave_the_axes() -> None:
    """A legend of forty names, which the page hides, takes no height from the axes."""

    def draw(axes: Axes) -> None:
        for i in range(40):
            axes.plot([0, 1], [0, i], label=f"row {i}")

    saved = svg.Panel("p", "title", "x", "y", draw).drawn
    axes = re.findall(r"[ML] [\d.]+ ([\d.]+)", saved[saved.index('id="patch_2"') :].partition("/>")[0])
    assert max(map(float, axes)) - min(map(float, axes)) > 100
