"""The viewer in Chromium: 25 things that people do, at three widths; no error, no request elsewhere, no faint letters."""

from __future__ import annotations

import csv
import io
import shlex
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from pages import BROWSER, NO_BROWSER
from viewed import TOKEN, of_ends, pictures, plain_run, scores_of, written
from whence.storage.scores import load_scores, save_scores

driver = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
if BROWSER is None:
    pytest.skip(NO_BROWSER, allow_module_level=True)

from whence.view.app import viewer_app  # noqa: E402
from whence.view.run import open_run  # noqa: E402
from whence.view.serving import address, bound  # noqa: E402

pytestmark = pytest.mark.slow
WIDTHS = [360, 1000, 2000]
HOSTILE = '"><script>document.title="stolen"</script><img src=x onerror=steal()>'


@pytest.fixture(scope="module")
def where(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Runs, served by a thread of this process: an ordinary one, a hostile one, one whose images moved, and one of which the
    first and last scores were kept."""
    import uvicorn

    folder = tmp_path_factory.mktemp("browser")
    first = plain_run(folder / "plain", 120, 30)
    rows = [
        {"file_name": f"{i}.png", "creator": [HOSTILE, "=1+1"][i % 2], "text": HOSTILE * (1 + 300 * (i == 0))}
        for i in range(6)
    ]
    train, queries = pictures(folder / "t", rows), pictures(folder / "q", [{"file_name": "q.png", "text": HOSTILE}])
    second = written(folder / "hostile", {"made": scores_of(train, queries)}, train, queries)
    third = plain_run(folder / "moved", 12, 3)
    (folder / "moved" / "train").rename(folder / "moved" / "elsewhere")
    fourth = plain_run(folder / "ends", 20, 3)
    for name in ("alpha", "beta"):
        save_scores(fourth / "scores" / name, of_ends(load_scores(fourth / "scores" / name), 3))
    with bound("127.0.0.1", 0, print) as found:
        runs = [open_run(root) for root in (first, second, third, fourth)]
        config = uvicorn.Config(viewer_app(runs, TOKEN), log_level="error", lifespan="off", ws="none")
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [found]}, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        yield address(found, "127.0.0.1", TOKEN)
        server.should_exit = True
        thread.join(10)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with driver.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox", "--disable-gpu"])
        yield opened
        opened.close()


@dataclass
class Visit:
    """A page, and what it complained of or asked for elsewhere."""

    page: Any
    where: str
    troubles: list[str] = field(default_factory=list)

    def go(self, place: str) -> None:
        self.page.goto(f"{self.where}#/{place}")
        self.settled()

    def settled(self) -> None:
        self.page.wait_for_function("() => !document.querySelector('[aria-busy=true]') && document.querySelector('h1')")

    def heading(self, text: str) -> None:
        self.page.wait_for_function("(text) => document.querySelector('h1')?.textContent.includes(text)", arg=text)
        self.settled()


def visited(browser: Any, where: str, width: int, **more: Any) -> tuple[Any, Visit]:
    context = browser.new_context(viewport={"width": width, "height": 900}, accept_downloads=True, **more)
    context.set_default_timeout(8000)
    visit = Visit(context.new_page(), where)
    origin = where.split("/")[2]
    visit.page.on("console", lambda line: line.type in ("error", "warning") and visit.troubles.append(line.text))
    visit.page.on("pageerror", lambda error: visit.troubles.append(str(error)))
    visit.page.on(
        "request",
        lambda one: one.url.startswith("blob:") or one.url.split("/")[2] == origin or visit.troubles.append(one.url),
    )
    return context, visit


@pytest.fixture(params=WIDTHS)
def visit(browser: Any, where: str, request: pytest.FixtureRequest) -> Iterator[Visit]:
    context, made = visited(browser, where, request.param)
    yield made
    assert made.troubles == []
    context.close()


def saved(page: Any, button: str) -> bytes:
    with page.expect_download() as waiting:
        page.get_by_role("button", name=button, exact=True).click()
    return Path(waiting.value.path()).read_bytes()


def wide(page: Any) -> int:
    return int(page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth"))


def test_what_people_do(visit: Visit) -> None:
    page = visit.page
    # 1 the wall
    visit.go("0/pictures")
    assert page.title().startswith("Pictures")
    assert page.locator(".counted").inner_text() == "30 pictures"
    assert wide(page) <= 0
    # 2 the first picture is there
    page.wait_for_function("() => document.querySelector('.tile img')?.naturalWidth > 0")
    # 3 "/" and a word: search
    page.keyboard.press("/")
    page.keyboard.type("query 2")
    page.wait_for_function("() => document.querySelector('.counted').textContent === '12 of 30 pictures'")
    assert "words=query+2" in page.url
    # 4 Esc clears it
    page.keyboard.press("Escape")
    page.wait_for_function("() => document.querySelector('.counted').textContent === '30 pictures'")
    # 5 sort
    page.get_by_label("Sort").select_option("name")
    visit.settled()
    # 6 arrow keys move over the wall, Enter opens
    page.locator(".grid a[tabindex='0']").focus()
    page.keyboard.press("ArrowRight")
    page.wait_for_function("() => document.activeElement.dataset.place === '1'")
    page.keyboard.press("End")
    page.wait_for_function("() => document.activeElement.dataset.place === '29'")
    page.keyboard.press("Home")
    page.wait_for_function("() => document.activeElement.dataset.place === '0'")
    page.keyboard.press("Enter")
    visit.heading("q0.png")
    assert wide(page) <= 0
    # 7 what the methods say
    assert [one.inner_text() for one in page.locator(".method h2").all()] == ["alpha", "beta", "some"]
    assert page.locator(".method").first.locator(".whisker").count() > 0
    # 8 the next picture by key, and back by button
    page.locator("h1").focus()
    page.keyboard.press("ArrowRight")
    visit.heading("q1.png")
    page.get_by_role("button", name="the picture before").click()
    visit.heading("q0.png")
    # 9 agreement
    page.wait_for_selector(".agree td b")
    assert wide(page) <= 0
    assert "of 10" in page.locator(".agree").inner_text()
    # 10 more images
    page.get_by_label("Images", exact=True).select_option("24")
    page.wait_for_function("() => document.querySelector('.method ol').children.length === 24")
    # 11 an image that is pointed at is lit in every list
    row = page.locator(".method li").first.get_attribute("data-row")
    page.locator(".method li a").first.focus()
    assert page.locator(f'.lit[data-row="{row}"]').count() >= 1
    assert page.locator("#glance b").count() == 3
    # 12 select it with a key
    page.keyboard.press("x")
    assert page.locator('[data-tab="selection"] .count').inner_text() == "1"
    # 13 the other way round
    page.locator(".method li a").first.click()
    page.wait_for_function("() => location.hash.includes('/image/')")
    visit.settled()
    page.wait_for_selector(".method .entries li")
    assert "rank" in page.locator(".method").first.inner_text()
    # 14 show more
    more = page.get_by_role("button", name="Show more").first
    if more.is_visible():
        more.click()
        page.wait_for_function("() => document.querySelector('.method ol').children.length > 12")
    # 15 his creator
    page.locator(".facts a").first.click()
    page.wait_for_function("() => location.hash.includes('/group/')")
    visit.settled()
    assert "A sum, not a Shapley value" in page.locator("main").inner_text()
    assert "No sums: only 3 images have a score" in page.locator("main").inner_text()
    # 16 select all of hers
    page.get_by_role("button", name="Select all 30").click()
    page.wait_for_function("() => Number(document.querySelector('[data-tab=selection] .count').textContent) >= 30")
    # 17 groups
    page.keyboard.press("g")
    visit.heading("Groups")
    page.get_by_role("button", name="creator").click()
    assert page.locator("th[scope=row]").first.inner_text() == "anna"
    # 18 training images, filtered
    page.keyboard.press("i")
    visit.heading("Training images")
    page.get_by_label("creator").select_option("1")
    page.wait_for_function("() => document.querySelector('.counted').textContent === '30 of 120 images'")
    # 19 select one on the wall
    page.locator(".tile").first.locator("button.pick").click(force=True)
    # 20 compare, brushed by keys
    page.keyboard.press("Escape")
    page.keyboard.press("c")
    visit.heading("Compare")
    canvas = page.locator("canvas").first
    page.wait_for_function("() => document.querySelector('canvas').getAttribute('aria-label').includes('alpha')")
    canvas.focus()
    for _ in range(6):
        page.keyboard.press("Shift+ArrowRight")
        page.keyboard.press("ArrowLeft")
        page.keyboard.press("ArrowDown")
    page.wait_for_function("() => /brushed/.test(document.querySelector('.card .counted').textContent)")
    # 21 brushed by the mouse, and taken into the selection
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    page.mouse.move(box["x"] + 70, box["y"] + 15)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] - 15, box["y"] + box["height"] - 45, steps=4)
    page.mouse.up()
    page.wait_for_function("() => /^1\\d\\d images brushed/.test(document.querySelector('.card .counted').textContent)")
    page.wait_for_selector(".brushed li")
    # 22 colours by creator
    page.get_by_label("Colour by").select_option("0")
    page.wait_for_selector(".legend li")
    assert wide(page) <= 0
    # 23 the selection as a table, a list, a command
    page.keyboard.press("s")
    visit.heading("Selection")
    table = list(csv.reader(io.StringIO(saved(page, "Table (CSV)").decode())))
    assert table[0] == ["image", "creator", "license", "size", "text"]
    assert len(table) >= 32
    names = saved(page, "List of files").decode().splitlines()
    assert names == [line[0] for line in table[1:]]
    words = shlex.split(page.locator("#command").input_value())
    assert [word for word in words if word.startswith("id=")] == [f"id={name}" for name in names]
    assert wide(page) <= 0
    # 24 the table with the scores of the picture that was looked at last
    page.get_by_label("Scores for").select_option(index=1)
    assert "score alpha" in saved(page, "Table (CSV)").decode().splitlines()[0]
    # 25 colours, help, and Esc
    page.locator("h1").click()
    page.keyboard.press("t")
    page.keyboard.press("t")
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    page.keyboard.press("?")
    assert page.get_by_role("dialog").is_visible()
    page.keyboard.press("Escape")
    assert not page.get_by_role("dialog").is_visible()


def test_a_deep_link_opens_what_it_names(browser: Any, where: str) -> None:
    context, visit = visited(browser, where, 1000)
    visit.go("0/images?words=ben&c1=1&sort=name")
    found = visit.page.locator(".counted").inner_text()
    assert found.endswith("of 120 images")
    visit.page.reload()
    visit.settled()
    assert visit.page.locator(".counted").inner_text() == found
    visit.go("0/picture/7?k=24")
    assert visit.page.locator("h1").inner_text() == "q15.png"
    assert visit.troubles == []
    context.close()


def test_hostile_texts_stay_texts(browser: Any, where: str) -> None:
    context, visit = visited(browser, where, 1000)
    page = visit.page
    for place in ("1/pictures", "1/picture/0", "1/images", "1/image/0", "1/groups", "1/group/0/0", "1/compare/0?by=0"):
        visit.go(place)
        page.wait_for_timeout(50)
        assert "stolen" not in page.title() or "<script>" in page.title()
        assert page.locator("main script, main img[onerror], main img[src=x]").count() == 0
        assert wide(page) <= 0, place
    assert HOSTILE in page.evaluate(
        "(async () => (await (await fetch('api/1/exact?rows=2')).json())[0].columns.text)()"
    )
    visit.go("1/images")
    page.get_by_role("button", name="Select all").click()
    page.wait_for_function("() => document.querySelector('[data-tab=selection] .count').textContent === '6'")
    visit.go("1/selection")
    table = list(csv.reader(io.StringIO(saved(page, "Table (CSV)").decode())))
    assert {line[1] for line in table[1:]} == {HOSTILE, "'=1+1"}, "a formula is no formula in a spreadsheet"
    assert visit.troubles == []
    context.close()


def test_images_that_moved_have_a_field_to_say_where(browser: Any, where: str) -> None:
    context, visit = visited(browser, where, 1000)
    visit.go("2/pictures")
    assert "there is no folder" in visit.page.locator(".notice").inner_text()
    visit.page.get_by_label("Where are the images now?").fill("/new/place of mine")
    assert visit.page.locator(".command").inner_text().endswith("--images '/new/place of mine'")
    visit.go("2/images")
    assert visit.page.locator(".tile .missing").count() > 0
    visit.go("2/image/0")
    assert "the pictures are not there" in visit.page.locator(".portrait").inner_text()
    assert visit.troubles == []
    context.close()


PLACES = [
    "0/pictures",
    "0/picture/0",
    "0/images",
    "0/image/0",
    "0/groups",
    "0/group/0/0",
    "0/compare/0?by=0",
    "0/selection",
    "2/pictures",
]

CONTRAST = (Path(__file__).parent / "view_contrast.js").read_text()
REACHED = (Path(__file__).parent / "view_reached.js").read_text()


def test_what_is_asked_does_not_wait_for_pictures_of_a_page_that_was_left(browser: Any, where: str) -> None:
    """A browser asks for a few things at once: pictures of a wall that have not come are given up for what comes next."""
    context, visit = visited(browser, where, 1000)
    page = visit.page
    for asked in ("**/thumb/**", "**/api/0/query/**"):  # neither is answered
        page.route(asked, lambda route: None)
    page.goto(f"{where}#/0/pictures")
    page.locator(".tile img").first.wait_for(state="attached")
    with page.expect_event("requestfailed", lambda one: "/thumb/" in one.url):
        page.evaluate("location.hash = '#/0/picture/1'")
    page.unroute_all(behavior="ignoreErrors")
    context.close()


@pytest.mark.parametrize("width", WIDTHS[:2])
def test_first_and_last_scores_alone(browser: Any, where: str, width: int) -> None:
    """What is there is shown, and what is not says why, on every page."""
    context, visit = visited(browser, where, width)
    page, why = visit.page, "of each picture the first and the last 3 of 20 scores were kept"
    visit.go("3/picture/0")
    alpha = page.locator("section.method").first
    assert alpha.locator("ol").nth(0).locator("li").count() == 3
    assert [int(text) for text in alpha.locator("ol").nth(1).locator(".rank").all_inner_texts()] == [20, 19, 18]
    assert why in alpha.locator(".note").inner_text().lower()
    page.wait_for_function("() => document.querySelector('table.agree')?.textContent.includes('not known')")
    assert wide(page) <= 0
    visit.go("3/compare/0")
    assert all(f"{name} is not here: {why}" in page.locator("main").inner_text() for name in ("alpha", "beta"))
    assert wide(page) <= 0
    visit.go("3/group/0/0")
    assert "a sum needs all scores" in page.locator("section.method").first.inner_text()
    visit.go("3/picture/0")
    page.locator("section.method").first.locator("a.entry").first.click()
    visit.heading("part/")
    assert "Listed where its rank is known" in page.locator("section.method").first.inner_text()
    visit.go("3/images")
    assert "alpha" not in page.get_by_label("Sort").inner_text()
    assert visit.troubles == []
    context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_letters_are_seen_and_controls_reached(browser: Any, where: str, scheme: str) -> None:
    """Contrast of 4.5 at least of every text; every control has a name and is reached by Tab or, on a wall, by arrows."""
    context, visit = visited(browser, where, 1000, color_scheme=scheme)
    for place in PLACES:
        visit.go(place)
        visit.page.wait_for_timeout(80)
        assert visit.page.evaluate(CONTRAST) == [], place
        assert visit.page.evaluate(REACHED) == [], place
        assert visit.page.locator("h1").count() == 1
        assert visit.page.locator("main, header, nav, footer").count() >= 4
    visit.page.keyboard.press("?")
    assert visit.page.evaluate(CONTRAST) == []
    assert visit.troubles == []
    context.close()


def test_tab_goes_through_everything_once(browser: Any, where: str) -> None:
    """From the skip link to the last control in the order of the page, without a trap; the focus is always seen."""
    context, visit = visited(browser, where, 1000)
    visit.go("0/picture/0")
    page, order = visit.page, []
    page.wait_for_selector(".agree td b")
    for _ in range(400):
        page.keyboard.press("Tab")
        told = page.evaluate(
            "() => { const at = document.activeElement; const all = [...document.querySelectorAll('*')];"
            "return at === document.body ? null : [all.indexOf(at), getComputedStyle(at).outlineStyle, at.id] }"
        )
        if told is None:
            break
        order.append(told)
    assert order[0][2] == "skip", order[:3]
    places = [place for place, _, _ in order]
    assert places == sorted(set(places))
    assert all(outline != "none" for _, outline, _ in order)
    count = page.evaluate("document.querySelectorAll('main a[href], main button:not(:disabled), main select').length")
    assert len(order) >= count
    assert visit.troubles == []
    context.close()
