"""What people do with a page, in Chromium: it sorts, enlarges, prints and is read by keyboard, at every width, light and
dark, with scripts and without."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pages import BROWSER, NO_BROWSER
from test_hostile import STRINGS
from whence.data.images import tensor_images
from whence.report.page import Known, render
from whence.report.removed import shown_of
from whence.types import Scores

sync_api = pytest.importorskip("playwright.sync_api")
pytestmark = pytest.mark.skipif(BROWSER is None, reason=NO_BROWSER)
N, M, METHODS = 80, 3, 5
WIDTHS = (360, 1300, 2000)


def made(hostile: str = "", methods: int = METHODS) -> bytes:
    """A page of five methods, sixty creators, copies, errors and what happened without the images."""
    names = [f"{hostile}{i:03}.png" for i in range(N)]
    train = tensor_images(
        torch.rand(N, 1, 8, 8) * 2 - 1, names, {"creator": [f"{hostile}creator {i % 60}" for i in range(N)]}
    )
    queries = tensor_images(torch.rand(M, 1, 8, 8) * 2 - 1, [f"{hostile}q{j}.png" for j in range(M)])
    results = {}
    for k in range(methods):
        values = torch.randn(M, N, generator=torch.Generator().manual_seed(k)).double()
        values[:, 7 + k] += 9
        errors = {"stderr": torch.full((M, N), 0.1).double(), "stderr_of": "draws"} if k else {}
        made = Scores(values, queries.ids, names, {"whence": "1.2.3", "train": "t"}, train_meta=train.meta, **errors)
        results[f"a_method_of_some_length_{k}{hostile[:40]}"] = made
    png = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
    note: Any = {
        "count": 4,
        "said": f"{hostile}one was right",
        "basis": "made up",
        "arms": [{"name": f"{hostile}one", "mean": 0.2, "low": 0.1, "high": 0.3}],
        "differences": [{"more": "one", "less": "random", "mean": 0.2, "low": 0.1, "high": 0.3}],
        "pictures": {name: [{"arm": "", "png": png}] for name in queries.ids},
    }
    known = Known({queries.ids[1]: f"looks like a copy of {hostile}007.png"}, removed=shown_of(note))
    found = render(results, train, queries, f"{hostile}A page", {"Date": "2031-02-03"}, known)
    return found["report.html"]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as play:
        opened = play.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_bytes(made())
    return path


class Visit:
    """A page that is open, and everything that it did wrong."""

    def __init__(self, browser: Any, path: Path, width: int = 1300, **how: Any) -> None:
        self.page = browser.new_page(viewport={"width": width, "height": 900}, **how)
        self.wrong: list[str] = []
        self.page.on("console", lambda message: self.wrong.append(message.text))
        self.page.on("pageerror", lambda error: self.wrong.append(str(error)))
        self.page.on("dialog", lambda dialog: self.wrong.append(dialog.message))
        self.page.on("request", lambda asked: self.wrong.append(asked.url) if not self.own(asked.url, path) else None)
        self.page.goto(path.as_uri())

    @staticmethod
    def own(url: str, path: Path) -> bool:
        return url.startswith("data:") or url == path.as_uri()

    def __enter__(self) -> Any:
        return self.page

    def __exit__(self, *error: object) -> None:
        self.page.close()
        assert self.wrong == []


@pytest.mark.parametrize("width", WIDTHS)
def test_nothing_is_cut_at_any_width(browser: Any, path: Path, width: int) -> None:
    with Visit(browser, path, width) as page:
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        cut = page.evaluate(
            "[...document.querySelectorAll('.scroll')].filter(e => e.scrollWidth > e.clientWidth + 1)"
            ".map(e => getComputedStyle(e).backgroundImage)"
        )
        assert all("gradient" in each for each in cut), "what is cut casts a shadow"
        if width == WIDTHS[0]:
            assert cut == [], "on a phone rows become blocks"
        # No letter may lie outside of its card.
        outside = page.evaluate(
            "[...document.querySelectorAll('.card p, .card dd, .said p')].filter(e => e.scrollWidth > e.clientWidth + 1"
            " && getComputedStyle(e).overflowX === 'visible').map(e => e.textContent)"
        )
        assert outside == []


def test_the_answer_and_the_truth_are_on_the_first_screen(browser: Any, path: Path) -> None:
    with Visit(browser, path) as page:
        for chosen in (".headline", ".happened"):
            assert page.locator(chosen).first.bounding_box()["y"] < 500
        assert "1 looks like a copy" in page.locator(".headline").first.inner_text()


def test_the_right_half_of_a_wide_screen_is_used(browser: Any, path: Path) -> None:
    with Visit(browser, path, 2000) as page:
        right = page.evaluate(
            "['.first', '.cards', '.query'].map(s => Math.max(...[...document.querySelector(s).children]"
            ".map(e => e.getBoundingClientRect().right)))"
        )
        assert min(right) > 1800


def test_tables_are_sorted_by_mouse_and_keyboard(browser: Any, path: Path) -> None:
    with Visit(browser, path) as page:
        table = page.locator("section[aria-labelledby=overview] table.sortable").last
        assert table.locator("tbody tr").count() == 60, "no creator is left out"
        column = table.locator("thead th").nth(2)
        column.locator("button").click()
        assert column.get_attribute("aria-sort") == "descending"

        def values(place: int) -> list[float]:
            return [
                float(v)
                for v in table.locator(f"tbody td:nth-child({place})").evaluate_all("c => c.map(e => e.dataset.value)")
            ]

        assert values(3) == sorted(values(3), reverse=True)
        column.locator("button").press("Enter")
        assert column.get_attribute("aria-sort") == "ascending"
        assert values(3) == sorted(values(3))
        table.locator("thead th").first.locator("button").press("Space")
        names = table.locator("tbody th").all_inner_texts()
        assert names == sorted(names, key=str.lower)
        assert column.get_attribute("aria-sort") is None


def test_pictures_open_large_beside_their_query(browser: Any, path: Path) -> None:
    with Visit(browser, path) as page:
        tile = page.locator(".query .tile img").nth(1)
        tile.focus()
        page.keyboard.press("Enter")
        box = page.locator("dialog.lightbox")
        assert box.evaluate("e => e.open")
        assert box.locator("img").count() == 2
        assert box.locator("img").last.get_attribute("src") == tile.get_attribute("src")
        told = box.locator("p").inner_text()
        assert "2 of 8" in told
        page.keyboard.press("ArrowRight")
        assert box.locator("img").last.get_attribute("src") == page.locator(".query .tile img").nth(2).get_attribute(
            "src"
        )
        page.keyboard.press("Escape")
        assert not box.evaluate("e => e.open")
        assert tile.evaluate("e => e === document.activeElement"), "back where one was"
        page.locator(".portrait img").first.click()
        assert box.locator("figure:visible").count() == 1


def test_every_control_is_reached_by_keyboard_and_named(browser: Any, path: Path) -> None:
    with Visit(browser, path) as page:
        nameless = page.evaluate(
            "[...document.querySelectorAll('a, button, summary, img, [tabindex]')].filter(e => "
            "!(e.getAttribute('aria-label') || e.getAttribute('aria-labelledby') || e.alt || e.textContent.trim() ||"
            " e.querySelector('img[alt]'))).map(e => e.outerHTML.slice(0, 80))"
        )
        assert nameless == []
        controls = page.evaluate("document.querySelectorAll('button, summary, a[href], img[role=button]').length")
        lost = page.evaluate(
            "[...document.querySelectorAll('button, summary, a[href], img[role=button]')].filter(e => e.tabIndex < 0).length"
        )
        assert controls > 100
        assert lost == 0
        levels = page.evaluate("[...document.querySelectorAll('h1,h2,h3,h4')].map(e => Number(e.tagName[1]))")
        assert levels[0] == 1
        assert levels.count(1) == 1
        assert all(b - a <= 1 for a, b in itertools.pairwise(levels)), "no level is skipped"
        twice = page.evaluate(
            "(i => i.filter((e, n) => i.indexOf(e) < n))([...document.querySelectorAll('[id]')].map(e => e.id))"
        )
        assert twice == []
        dead = page.evaluate(
            "[...document.querySelectorAll('a[href^=\"#\"]')].filter(e => !document.getElementById(e.hash.slice(1))).length"
        )
        assert dead == 0


CONTRAST = """() => {
  const probe = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
  const rgba = (color) => { probe.clearRect(0, 0, 1, 1); probe.fillStyle = color; probe.fillRect(0, 0, 1, 1);
    return [...probe.getImageData(0, 0, 1, 1).data]; };
  const light = (c) => { const [r, g, b] = c.map((v) => { v /= 255;
    return v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4; });
    return .2126 * r + .7152 * g + .0722 * b; };
  const ground = (e) => { for (; e; e = e.parentElement) { const c = rgba(getComputedStyle(e).backgroundColor);
    if (c[3] === 255) return c.slice(0, 3); } return [255, 255, 255]; };
  const low = {};
  for (const e of document.querySelectorAll('body *')) {
    if (![...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim()) || e.closest('script, style')) continue;
    const style = getComputedStyle(e), color = rgba(e.closest('svg') ? style.fill : style.color).slice(0, 3);
    const [a, b] = [light(color), light(ground(e))].sort((x, y) => y - x), ratio = (a + .05) / (b + .05);
    if (ratio < 4.5) low[e.tagName + '.' + (e.className.baseVal ?? e.className)] = ratio;
  }
  return low;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_letter_has_contrast(browser: Any, path: Path, scheme: str) -> None:
    with Visit(browser, path, color_scheme=scheme) as page:
        assert page.evaluate(CONTRAST) == {}


def test_without_scripts_nothing_is_missing(browser: Any, path: Path) -> None:
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(path.as_uri())
    assert page.locator(".query").count() == M
    assert page.locator("table tbody tr:visible").count() > 60
    assert page.locator("button, dialog").count() == 0
    context.close()


def test_it_prints_in_pages_with_recipe_version_and_date(browser: Any, path: Path, tmp_path: Path) -> None:
    with Visit(browser, path) as page:
        page.emulate_media(media="print")
        assert (
            page.locator("button:visible").evaluate_all(
                "b => b.filter(e => getComputedStyle(e).display !== 'contents').length"
            )
            == 0
        )
        cut = page.evaluate(
            "[...document.querySelectorAll('.scroll, .tall')]"
            ".filter(e => getComputedStyle(e).overflowY !== 'visible').length"
        )
        assert cut == 0, "tables are printed whole"
        cite = page.locator("#cite + .card").inner_text()
        assert "1.2.3" in cite
        assert "2031-02-03" in cite
        pdf = page.pdf(prefer_css_page_size=True)
        pages = max(int(count) for count in re.findall(rb"/Type /Pages\s*/Count (\d+)", pdf))
        assert 3 < pages < 5 + 3 * M, pages


@pytest.mark.parametrize("kind", [kind for kind, text in STRINGS.items() if len(text) < 3000])
def test_hostile_strings_do_nothing(browser: Any, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "report.html"
    path.write_bytes(made(STRINGS[kind], 1))
    with Visit(browser, path, 360) as page:
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        assert page.locator("script").count() == 1
        page.locator(".query .tile img").first.click()
        assert page.locator("dialog.lightbox").evaluate("e => e.open")
        direction = page.evaluate(
            "[...document.querySelectorAll('bdi')].every(e => getComputedStyle(e).unicodeBidi === 'isolate')"
        )
        assert direction


def test_a_script_of_anybody_else_is_stopped(browser: Any, path: Path, tmp_path: Path) -> None:
    """The policy holds even where a page was tampered with."""
    other = tmp_path / "report.html"
    other.write_bytes(path.read_bytes().replace(b"</body>", b"<script>document.title = 'owned'</script></body>"))
    page = browser.new_page()
    page.goto(other.as_uri())
    assert page.title() == "A page"
    page.close()
