"""docs/map.html says what the code says, and works in a browser where there is one."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType

import pytest

from pages import BROWSER, NO_BROWSER
from whence.evaluation.readers import VALUES
from whence.methods import METHODS

DOCS = Path(__file__).resolve().parent.parent / "docs"
PAGE = DOCS / "map.html"


@cache
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("map_page", DOCS / "map.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Page(HTMLParser):
    """Names of the nodes, first cells of the table, and every address that the page would ask for."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.nodes: list[str] = []
        self.rows: list[str] = []
        self.addresses: list[str] = []
        self.in_row = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        if "node" in str(found.get("class")).split():
            self.nodes.append(str(found["data-name"]))
            assert found["tabindex"] == "0"
            assert found["aria-label"]
        self.in_row = found.get("scope") == "row"
        self.addresses += [str(found[name]) for name in ("src", "href", "srcset", "action") if name in found]

    def handle_data(self, data: str) -> None:
        if self.in_row:
            self.rows.append(data)
            self.in_row = False


def test_it_is_what_the_script_writes():
    assert PAGE.read_text() == script().page(), "run: python docs/map.py"


def test_every_method_is_on_the_map_and_in_the_table():
    page = Page(PAGE.read_text())
    assert page.nodes == page.rows == [*METHODS, *VALUES]


def test_it_asks_for_nothing():
    text = PAGE.read_text()
    assert Page(text).addresses == []
    assert re.findall(r"(?:url\(|@import|fetch\(|import\()(?!#tip)", text) == []
    assert set(re.findall(r"https?://[\w./]+", text)) <= {"http://www.w3.org/2000/svg"}
    assert "default-src 'none'" in text


def test_lineage_leads_forward_in_time_between_methods_that_are_there():
    year = {name: entry.year for name, entry in METHODS.items()} | {name: value.year for name, value in VALUES.items()}
    for child, parent, why in script().LINEAGE:
        assert why
        assert (year[parent] or 0) <= (year[child] or 0), (child, parent)
    assert len({pair[:2] for pair in script().LINEAGE}) == len(script().LINEAGE)


def test_texts_are_escaped(monkeypatch):
    bad = "</script><img src=x onerror=alert(1)>"
    found = script().nodes()
    found[0]["nodes"][0] |= {"source": bad, "name": bad, "cost": f'"{bad}'}
    monkeypatch.setattr(script(), "nodes", lambda: found)
    monkeypatch.setattr(script(), "LINEAGE", ())
    text = script().page()
    assert bad not in text
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert data is not None
    assert json.loads(data[1])["nodes"][0]["source"] == bad


@pytest.mark.skipif(BROWSER is None, reason=NO_BROWSER)
@pytest.mark.parametrize("width", [360, 1300, 2000])
def test_it_works_in_a_browser(tmp_path, width):
    """Hover, pin, Escape, arrow keys, search, shared parts, both views, zoom, and no label on another."""
    quiet = ("--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-sync")
    options = ("--headless", "--no-sandbox", *quiet, "--disable-component-update", f"--user-data-dir={tmp_path}")
    asked = [str(BROWSER), *options, f"--window-size={width},900", "--dump-dom", f"{PAGE.as_uri()}#selftest"]
    done = subprocess.run(asked, capture_output=True, text=True, timeout=100)
    assert re.findall(r'data-selftest="([^"]*)"', done.stdout) == ["passed"]
