"""The report and the latent pages in a real browser: they run, fetch nothing, show hostile text as text, and can be driven."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from evaluate.latents.collect import write_latents
from evaluate.latents.files import latents_folder
from evaluate.report.write import write_report
from pipeline.base.files import read_json, write_json
from pipeline.base.runtime import torch_rng
from pipeline.sae.config import SAEConfig
from pipeline.sae.nested import NestedSAE
from support.browser import Browser, browse, needs_chromium
from support.results_files import add_nesting, write_results

pytestmark = needs_chromium
HOSTILE = (
    "</script><script>document.title = 'taken'</script>",
    "<img src=x onerror=\"document.title='taken'\">",
    "\u202eright to left\u2066",
    "\u2028line\u2029separators\x00",
    "x" * 100_000,
    "&lt;b&gt;&amp;",
    "</bdi></p></main><h1>taken</h1>",
    "שלום",
)
WIDTH, CONTEXT = 600, 12


class Hostile:
    """A tokenizer each of whose tokens is an attack on a page; token 0 is the known one."""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return [0]

    def decode(
        self, token_ids: list[int], *, skip_special_tokens: bool = False, clean_up_tokenization_spaces: bool = False
    ) -> str:
        return "".join("a" if i == 0 else HOSTILE[i % len(HOSTILE)] for i in token_ids)


class Rows:
    """The part of a store's split that latent pages read: Gaussian rows, all kept, tokens in turn."""

    chunk_rows = n_rows = shard_rows = 40 * CONTEXT
    shape = SimpleNamespace(layout=SimpleNamespace(context=CONTEXT))

    def kept_of(self, first: int, stop: int) -> np.ndarray:
        return np.ones((stop - first) * CONTEXT, dtype=np.bool_)

    def tokens_of(self, first: int, stop: int) -> np.ndarray:
        return self.shard_tokens(0)[first:stop]

    def shard_tokens(self, _: int) -> np.ndarray:
        return np.arange(1, self.n_rows + 1, dtype=np.int32).reshape(-1, CONTEXT)

    def read(self, start: int, stop: int) -> torch.Tensor:
        return torch.randn(self.n_rows, 8, generator=torch_rng("rows"))[start:stop]


class Held:
    """A store of these rows alone."""

    id, context, eval, train = "s" * 64, CONTEXT, Rows(), Rows()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with browse() as opened:
        yield opened


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report with latent pages whose every token is hostile."""
    folder = tmp_path_factory.mktemp("page")
    paths = write_results(
        folder, alphas=(0.0, 0.2), seeds=(0, 1), steps=(400,), recipe=HOSTILE[0], objective=HOSTILE[1]
    )
    sae = NestedSAE(SAEConfig(8, WIDTH, (120, WIDTH)))
    sae.W_dec.data = torch.nn.functional.normalize(torch.randn(WIDTH, 8, generator=torch_rng("w")), dim=1)
    sae.W_enc.data = sae.W_dec.data.T.clone()
    sae.b_enc.data.fill_(-1.5)
    sae.requires_grad_(False)
    write_latents(sae, Held(), Hostile(), latents_folder(paths[-1]), quiet=True)  # type: ignore[arg-type]
    return write_report([folder], folder / "report.html", title=HOSTILE[0])


@pytest.fixture
def latents(report: Path) -> Path:
    return next((report.parent / "report_files" / "latents").glob("*.html"))


def open_latents(browser: Browser, page: Path, fragment: str = "") -> None:
    browser.problems.clear()
    browser.size(1280)
    browser.open(page, fragment)
    browser.wait(
        "document.querySelectorAll('#list li').length > 0 || document.querySelector('#count').textContent[0] === '0'"
    )


def listed(browser: Browser) -> list[int]:
    """Numbers of the latents in the list."""
    return [
        int(text) for text in browser.evaluate("[...document.querySelectorAll('#list .id')].map(e => e.textContent)")
    ]


@pytest.mark.parametrize("width", [1200, 390])
def test_report_fits_its_window(browser: Browser, report: Path, width: int) -> None:
    """The report fits its window and meets no problem."""
    browser.problems.clear()
    browser.size(width)
    browser.open(report)
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    assert browser.evaluate("document.querySelectorAll('figure svg').length") > 10
    assert browser.evaluate(
        "[...document.querySelectorAll('.panel svg')].every(s => s.getBoundingClientRect().width > 200)"
    )
    assert browser.problems == []


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report of known features and of absorption on real rows, like the demo's."""
    folder = tmp_path_factory.mktemp("opened")
    for i, name in enumerate(("truth_parent_silent", "absorption_fraction")):
        for path in write_results(folder / name, alphas=(0.0, 0.2), steps=(400,), layer=i, drop=["kl_nats"] * (1 - i)):
            seed = read_json(path)["checkpoint"]["provenance"]["train"]["seed"]
            beside = {"truth_parent_missed": 0.1 + seed / 50} if i == 0 else {}
            add_nesting(path, **{name: 0.3 + seed / 100, "absorption_f1": 0.7, "truth_f1": 0.7} | beside)
            if i == 0:
                data = read_json(path)
                write_json(path, data | {"store": data["store"] | {"model": "truth:0aaab54dbb", "hook": None}})
    return write_report([folder], folder / "report.html", title="Flat and nested dictionaries of a small model")


def places(browser: Browser, selectors: list[str]) -> list[tuple[float, float, float]]:
    """Left, top and bottom of the first element that each selector finds, from the top of the page."""
    find = "(e => (({left, top, bottom}) => [left, top + scrollY, bottom + scrollY])(e.getBoundingClientRect()))"
    return [tuple(browser.evaluate(f"{find}(document.querySelector('{one}'))")) for one in selectors]


def test_first_screen_answers_and_shows(browser: Browser, opened: Path) -> None:
    """At 1440 × 900 the lead, the number and the panels of both figures, side by side, lie on the first screen."""
    browser.size(1440, 900)
    browser.open(opened)
    panels = browser.evaluate(
        "[...document.querySelectorAll('.opening .panel')].map(p => p.getBoundingClientRect().bottom)"
    )
    assert len(panels) == 2 + 2 + 3
    assert max(panels) < 900
    lead, number, fronts, nesting, table = places(
        browser, [".lead", ".answer", "#figure-pareto", "#figure-nesting", "#table"]
    )
    assert max(lead[2], number[2]) < fronts[1] == nesting[1]
    assert fronts[0] < nesting[0]
    assert max(fronts[2], nesting[2]) < table[1]


def test_phone_has_one_order(browser: Browser, opened: Path) -> None:
    """On a phone: lead, number, fronts, what nesting buys, the sentences behind, Table 1, curves; nothing wider than it."""
    browser.size(390)
    browser.open(opened)
    order = places(
        browser, [".lead", ".answer", "#figure-pareto", "#figure-nesting", ".behind", "#table", "#figure-loss"]
    )
    assert all(one[2] <= other[1] for one, other in zip(order, order[1:]))
    assert browser.evaluate("document.documentElement.scrollWidth") <= 390


def test_hostile_names_are_text(browser: Browser, report: Path) -> None:
    """Hostile names are text in the report."""
    browser.size(1200)
    browser.open(report)
    assert browser.evaluate("document.querySelector('h1').textContent") == HOSTILE[0]
    assert browser.evaluate("[document.scripts.length, document.images.length]") == [1, 0]
    assert browser.evaluate("document.title") == HOSTILE[0]


def test_pointing_names_the_checkpoint(browser: Browser, report: Path) -> None:
    """Pointing at a checkpoint says which it is."""
    browser.size(1200)
    browser.open(report)
    browser.click("#figure-pareto .tip")
    said = browser.evaluate("document.querySelector('#figure-pareto .pointed').textContent")
    assert "step 400: L0" in said


def test_figures_follow_light_and_dark(browser: Browser, report: Path) -> None:
    """Figures take the colours of light and dark."""
    found = set()
    for dark in (False, True):
        browser.size(1200, dark=dark)
        browser.open(report)
        found.add(browser.evaluate("getComputedStyle(document.querySelector('figure svg text')).fill"))
    assert len(found) == 2


def test_search_lists_matches(browser: Browser, latents: Path) -> None:
    """Typing in the search field lists what matches."""
    open_latents(browser, latents)
    assert browser.evaluate("document.querySelectorAll('#list li').length") == 50
    browser.type("#q", "RIGHT TO")
    browser.wait("document.querySelector('#count').textContent.includes('of 600')")
    labels = browser.evaluate("[...document.querySelectorAll('#list .label')].map(e => e.textContent)")
    assert labels
    assert all("right to" in label for label in labels)
    browser.evaluate("document.querySelector('#q').select()")
    browser.type("#q", "37")
    browser.wait("location.hash.includes('q=37')")
    assert 37 in listed(browser)
    assert browser.problems == []


def test_sort_and_level_order_the_list(browser: Browser, latents: Path) -> None:
    """Sorting and filtering by level order the list."""
    open_latents(browser, latents, "sort=density&desc=1")
    shares = browser.evaluate(
        "[...document.querySelectorAll('#list li a > :last-child')].map(e => parseFloat(e.textContent.split(', ')[1]))"
    )
    assert shares == sorted(shares, reverse=True)
    assert len(set(shares)) > 1
    browser.evaluate(
        "(s => { s.value = '0'; s.dispatchEvent(new Event('change')); })(document.querySelector('#level'))"
    )
    assert browser.evaluate("document.querySelector('#count').textContent").startswith("120 of 600")
    assert max(listed(browser)) < 120
    browser.click("#next")
    assert len(listed(browser)) == 50
    assert browser.evaluate("document.querySelector('#back').disabled") is False


def test_click_opens_latent_and_relative(browser: Browser, latents: Path) -> None:
    """A click opens a latent and its relative opens from there."""
    open_latents(browser, latents)
    for control, value in (("level", "0"), ("sort", "related")):  # shared ones, those with most relatives first
        browser.evaluate(
            f"(s => {{ s.value = '{value}'; s.dispatchEvent(new Event('change')); }})(document.querySelector('#{control}'))"
        )
    browser.click("#reverse")
    shared = listed(browser)[0]
    browser.click("#list li:nth-child(1) a")
    browser.wait(f"document.querySelector('#latent h2')?.textContent === 'Latent {shared}'")
    browser.wait("document.querySelectorAll('#latent .context').length > 0")
    browser.click("#latent tbody a")
    browser.wait(f"document.querySelector('#latent h2').textContent !== 'Latent {shared}'")
    assert int(browser.evaluate("document.querySelector('#latent h2').textContent").split()[1]) >= 120
    assert browser.problems == []


def test_hostile_tokens_are_text(browser: Browser, latents: Path) -> None:
    """Hostile tokens are text in contexts and lists."""
    open_latents(browser, latents, "latent=130")
    browser.wait("document.querySelectorAll('#latent .context').length > 0")
    shown = browser.evaluate("[...document.querySelectorAll('.context bdi')].map(e => e.textContent).join('')")
    for attack in (
        HOSTILE[0],
        HOSTILE[1],
        HOSTILE[5],
        HOSTILE[6],
        HOSTILE[7],
        "⟨U+202E⟩right to left⟨U+2066⟩",
        "⟨U+0000⟩",
    ):
        assert attack in shown
    assert browser.evaluate("[document.images.length, document.querySelectorAll('h1').length]") == [0, 1]
    assert browser.evaluate("document.title").startswith("Latents: α = ")
    assert browser.evaluate("document.documentElement.scrollWidth") <= 1280
    assert browser.problems == []


def test_phone_latent_replaces_the_list(browser: Browser, latents: Path) -> None:
    """On a phone a latent takes the place of the list and leads back."""
    open_latents(browser, latents)
    browser.size(390)
    browser.evaluate("location.hash = 'latent=5'")
    browser.wait("document.querySelectorAll('#latent .context').length > 0")
    hidden = "getComputedStyle(document.querySelector('{}')).display === 'none'"
    assert browser.evaluate(hidden.format("#browse"))
    assert browser.evaluate("document.documentElement.scrollWidth") <= 390
    browser.click("#latent .all")
    browser.wait("!(" + hidden.format("#browse") + ")")


def test_tampered_pages_do_not_execute(browser: Browser, report: Path, latents: Path) -> None:
    """Scripts put into a written page, or files put beside it, do not run: the policy names the page's own script alone."""
    evil = "document.title = 'taken'"
    attacks = (
        f"<script>{evil}</script>",
        '<script src="evil.js"></script>',
        f'<img src=x onerror="{evil}">',
        f'<svg onload="{evil}"></svg>',
        f'<a id="link" href="javascript:{evil}">x</a>',
    )
    for page in (report, latents):
        (page.parent / "evil.js").write_text(evil)
        tampered = page.with_name("tampered.html")
        tampered.write_text(page.read_text().replace("</main>", "".join(attacks) + "</main>"))
        browser.open(tampered)
        browser.evaluate("document.querySelector('#link').click()")
        browser.wait("document.querySelector('script[src]') !== null")
        assert browser.evaluate("document.title") != "taken"
        assert any("Content Security Policy" in problem for problem in browser.problems)
        tampered.unlink()


def test_latent_shows_histogram_rule_and_lots(browser: Browser, latents: Path) -> None:
    """A latent shows bars of its activations, its label as a rule, and contexts drawn by lot behind the strongest."""
    open_latents(browser, latents, "latent=130")
    browser.wait("document.querySelectorAll('#latent .histogram span').length > 0")
    heights = browser.evaluate("[...document.querySelectorAll('.histogram span')].map(bar => bar.offsetHeight)")
    assert 60 < max(heights) < 80
    assert "of its firing" in browser.evaluate("document.querySelector('#latent dl').textContent")
    said = browser.evaluate("[...document.querySelectorAll('#latent .where')].map(line => line.textContent)")
    assert len([line for line in said if "stronger than" in line]) == 6
    assert browser.problems == []


def test_latents_open_on_the_strongest_parent(browser: Browser, report: Path, latents: Path) -> None:
    """Without a latent in the address the page shows the shared latent with the most firing inside it beyond chance."""
    open_latents(browser, latents)
    opened = browser.evaluate("index.opens")
    related = browser.evaluate("index.related")
    assert opened < 120
    assert related[opened] > 0


def test_latents_open_on_a_readable_one(browser: Browser, latents: Path) -> None:
    """Without a latent in the address the page shows one, which the list marks."""
    open_latents(browser, latents)
    browser.wait("document.querySelectorAll('#latent .context').length > 0")
    shown = browser.evaluate("document.querySelector('#latent h2').textContent")
    assert shown == "Latent " + str(browser.evaluate("index.opens"))
