"""The report: rows and groups, what the table and the sentences claim, escaping, and that it needs nothing but files."""

from __future__ import annotations

import csv
import re
import subprocess
import sys
import unittest.mock
import urllib.parse
from html.parser import HTMLParser
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from evaluate.report.__main__ import cli
from evaluate.report.pages import environment
from evaluate.report.runs import read_results
from evaluate.report.write import write_report
from pipeline.base.errors import DamagedError, UsageError
from pipeline.base.files import read_json, write_json
from support.results_files import write_latent_pages, write_results

ROOT = Path(__file__).parents[1]
HOSTILE = "</script><script>alert('x')</script><img src=x onerror=alert(1)>\u202eright to left\u2028\x00&amp;\"'"


class Page(HTMLParser):
    """Elements and texts of a page, as a browser would find them."""

    def __init__(self, markup: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.unbalanced: list[str] = []
        self.text: list[str] = []
        self.feed(markup)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "input", "br", "link", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.unbalanced.append(tag)

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def report(folder: Path, out: Path | None = None) -> str:
    """A report's markup, without figures: drawing them is most of the work."""
    with unittest.mock.patch("evaluate.report.write.make_figures", return_value=[]):
        return write_report([folder], out or folder / "report.html").read_text()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report with all its figures."""
    folder = tmp_path_factory.mktemp("whole")
    write_results(folder, alphas=(0.0, 0.2), steps=(200, 400))
    return write_report([folder], folder / "report.html")


def test_report_loads_no_torch(tmp_path: Path) -> None:
    """The report loads neither torch nor transformers."""
    write_results(tmp_path, alphas=(0.0,), seeds=(0,), steps=(400,))
    script = (
        "import sys, pathlib; from evaluate.report.write import write_report;"
        f"write_report([pathlib.Path({str(tmp_path)!r})], pathlib.Path({str(tmp_path / 'r.html')!r}));"
        "print([m for m in ('torch', 'transformers', 'datasets', 'zarr') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_page_is_balanced_and_fetches_nothing(whole: Path) -> None:
    """The page is balanced and fetches nothing."""
    page = Page(whole.read_text())
    assert not page.unbalanced
    assert not page.open
    for tag, attributes in page.tags:
        assert tag not in ("link", "iframe", "object", "embed", "base", "img")
        for name in ("src", "href", "xlink:href", "action", "data"):
            assert not re.match(r"(?i)(https?:)?//|javascript:|data:", attributes.get(name) or "")
        assert not any(name.startswith("on") for name in attributes)
    policy = next(a["content"] for t, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert policy.startswith("default-src 'none'")
    assert "'unsafe-inline'" not in policy.split("script-src")[1]


def test_numbers_keep_their_signs(whole: Path) -> None:
    """Numbers do not part from their signs at the end of a line."""
    prose = re.findall(r"<(?:p class=\"lead\"|figcaption)>(.*?)</(?:p|figcaption)>", whole.read_text(), re.DOTALL)
    assert len(prose) == 6
    assert not any(re.search(" [=±] ", sentence) for sentence in prose)


def test_ids_are_unique_and_links_resolve(whole: Path) -> None:
    """Ids are unique and links within the page and beside it have their targets."""
    page = Page(whole.read_text())
    ids = [a["id"] for _, a in page.tags if a.get("id")]
    assert len(ids) == len(set(ids))
    for _, attributes in page.tags:
        target = attributes.get("href")
        if target and target.startswith("#"):
            assert target[1:] in ids
        elif target:
            assert (whole.parent / target).is_file()


def test_figures_save_as_svg_and_csv(whole: Path) -> None:
    """Every figure is saved as SVG and its numbers as CSV."""
    folder = whole.parent / "report_files"
    for name in ("table1", "table2", "loss", "across-n", "levels", "pareto", "density"):
        rows = list(csv.DictReader((folder / f"{name}.csv").read_text().splitlines()))
        assert rows, name
    assert len(list(folder.glob("*.svg"))) == 5 + 2 + 3 + 2 + 2


def test_equal_results_give_equal_bytes(whole: Path, tmp_path: Path) -> None:
    """The same results give the same bytes."""
    again = write_report([whole.parent], tmp_path / "report.html")
    assert again.read_bytes() == whole.read_bytes()


def test_unusable_results_are_each_said(tmp_path: Path) -> None:
    """No results, a missing path and a wrong version are each said."""
    with pytest.raises(UsageError, match="no results"):
        read_results([tmp_path])
    with pytest.raises(UsageError, match="no such results"):
        read_results([tmp_path / "nowhere"])
    path = write_results(tmp_path, alphas=(0.0,), seeds=(0,), steps=(400,))[0]
    write_json(path, read_json(path) | {"version": 2})
    with pytest.raises(DamagedError, match="version 1"):
        read_results([tmp_path])
    write_json(path, {"format": "nested-sae-results", "version": 1, "key": "x"})
    with pytest.raises(DamagedError, match="without checkpoint, store, levels"):
        read_results([tmp_path])


def test_out_must_be_an_html_file(tmp_path: Path) -> None:
    """The command refuses an out that is not an HTML file."""
    write_results(tmp_path, alphas=(0.0,), seeds=(0,), steps=(400,))
    done = CliRunner().invoke(cli, [str(tmp_path), "--out", str(tmp_path / "report")])
    assert isinstance(done.exception, UsageError)
    done = CliRunner().invoke(cli, [str(tmp_path), "--out", str(tmp_path / "report.html"), "--title", "A & B"])
    assert done.exit_code == 0, done.output
    assert "<bdi>A &amp; B</bdi>" in (tmp_path / "report.html").read_text()


def test_latent_pages_are_carried_and_linked(tmp_path: Path) -> None:
    """Latent pages beside results are carried along and linked."""
    path = write_results(tmp_path, alphas=(0.0,), seeds=(0,), steps=(400,))[0]
    write_latent_pages(path, ["one", "two"])
    page = Page(report(tmp_path))
    link = next(a["href"] for _, a in page.tags if "/latents/" in (a.get("href") or ""))
    assert link == f"report_files/latents/{path.stem}.html"
    assert (tmp_path / link).is_file()
    assert not list((tmp_path / "report_files").rglob("*.js"))


def test_pages_without_index_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Latent pages whose index is gone are left out of a report that says so."""
    path = write_results(tmp_path, alphas=(0.0,), seeds=(0,), steps=(400,))[0]
    folder = write_latent_pages(path, ["one", "two"])
    (folder / "index.js").unlink()
    assert "/latents/" not in report(tmp_path)
    assert f"{folder}: latent pages without their index are left out" in capsys.readouterr().err


def test_latent_pages_named_by_difference(tmp_path: Path) -> None:
    """Pages of two recipes of one sharing and seed have titles that a person tells apart, with the member behind."""
    for recipe in ("paper", "batchtopk"):
        path = write_results(tmp_path, alphas=(0.2,), seeds=(0,), steps=(400,), recipe=recipe)[0]
        write_latent_pages(path, ["one", "two"])
    markup = report(tmp_path)
    for recipe in ("paper", "batchtopk"):
        name = f"α\u00a0=\u00a00.2, {recipe}, seed 0, step 400"
        link = re.search(rf'<a href="([^"]+)"><bdi>{name}</bdi></a> \(<bdi>alpha0\.2-seed0-', markup)
        assert link is not None
        assert f"<h1><bdi>{name.replace(chr(0xA0), ' ')}</bdi></h1>" in (tmp_path / link[1]).read_text()


def test_links_are_percent_encoded(tmp_path: Path) -> None:
    """A link to a file whose name a URL cannot hold leads to that file."""
    path = write_results(tmp_path, alphas=(0.0,), seeds=(0,), steps=(400,))[0]
    odd = path.rename(tmp_path / f"a #1 ?x%20-{path.name}")
    write_latent_pages(odd, ["one"])
    markup = report(tmp_path, tmp_path / "my report#2?.html")
    links = [a["href"] or "" for _, a in Page(markup).tags if (a.get("href") or "#")[0] != "#"]
    assert len(links) > 1
    for link in links:
        assert not re.search(r"[ #?]", link)
        assert (tmp_path / urllib.parse.unquote(link)).is_file()


def test_names_in_results_are_text(tmp_path: Path) -> None:
    """Names in results are shown as text wherever they come from."""
    for path in write_results(tmp_path, alphas=(0.0, 0.2), steps=(400,), recipe=HOSTILE):
        data = read_json(path)
        data["store"]["model"] = data["git"] = HOSTILE
        data["store"]["corpus"] = {"id": HOSTILE}
        data["checkpoint"]["provenance"]["member"] = HOSTILE + str(data["checkpoint"]["provenance"]["train"]["seed"])
        data["definitions"]["ev"]["definition"] = HOSTILE
        data["versions"] = {HOSTILE: HOSTILE}
        data["levels"][0]["scores"][HOSTILE] = 1.0
        write_json(path, data)
    page = Page(report(tmp_path))
    assert not page.unbalanced
    assert [tag for tag, _ in page.tags].count("script") == 1
    assert "img" not in {tag for tag, _ in page.tags}
    assert any(HOSTILE[:30] in part for part in page.text)


@given(st.text())
def test_any_text_stays_text(value: str) -> None:
    """Any text stays text in an element and an attribute."""
    page = Page(environment().from_string('<p title="{{ value }}">{{ value | isolate }}</p>').render(value=value))
    assert [tag for tag, _ in page.tags] == ["p", "bdi"]
    assert (
        page.tags[0][1]["title"] == value.replace("\r\n", "\n").replace("\r", "\n") or "\r" in value or "\x00" in value
    )
