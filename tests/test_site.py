"""The site: every page has a place in it, every link leads somewhere, and what stands beside the code says the same."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

import whence

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(path.name for path in DOCS.glob("*.md"))
CONFIG = yaml.safe_load((ROOT / "mkdocs.yml").read_text())


def places(entry: object) -> list[str]:
    """The pages that a part of the navigation names."""
    if isinstance(entry, str):
        return [entry]
    parts = entry.values() if isinstance(entry, dict) else entry
    return [page for part in parts for page in places(part)]


def without_code(text: str) -> str:
    return re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL)


def test_every_page_has_one_place():
    assert sorted(places(CONFIG["nav"])) == PAGES


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    """To files of the project, and to headings of pages."""
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code((DOCS / page).read_text())):
        if target.startswith(("https://", "http://")):
            continue
        path, _, heading = target.partition("#")
        file = DOCS / path if path else DOCS / page
        if page == "changelog.md":  # it lies in the root, and is linked from here
            file = ROOT / path
        assert file.exists(), f"{page}: {target}"
        if heading and file.suffix == ".md":
            anchors = {anchor(line) for line in re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE)}
            assert heading in anchors, f"{page}: {target}"


def anchor(heading: str) -> str:
    return re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", heading.lower())).strip("-")


def test_the_reference_has_what_is_exported():
    named = re.findall(r"^::: whence\.(\w+)$", (DOCS / "reference.md").read_text(), re.MULTILINE)
    assert len(set(named)) == len(named)
    assert set(named) <= set(whence.__all__)
    ours = {name for name in whence.__all__ if name not in whence.METHODS and not name.startswith("_")}
    left = ours - set(named)  # words of every room, and methods that are classes: docs/methods.md has them
    assert left <= {"METHODS", "AveragedMetagradient", "Batch", "Checkpoint", "Draw", "Draws", "Engine", "Function",
                    "FurtherTraining", "Metagradient", "Task", "WhenceError", "attributability", "from_plain", "knn_shapley",
                    "methods", "ridge", "similarity"}  # fmt: skip


def test_nothing_of_anybody_else_is_asked_for():
    assert CONFIG["theme"]["font"] is False
    assert not {"extra_javascript", "extra_css"} & set(CONFIG)


def test_versions_are_one():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cited["version"] == whence.__version__
    assert cited["license"] in (ROOT / "pyproject.toml").read_text()
    versions = re.findall(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert versions[0] in ("Unreleased", whence.__version__)
    assert whence.__version__ in versions
    assert (DOCS / "changelog.md").read_text() == (ROOT / "CHANGELOG.md").read_text()


def test_contributing_names_what_there_is():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    named = re.findall(r"`((?:src|benchmarks|docs|tests)/[^`]*)`", text)
    assert named
    assert all((ROOT / name).exists() for name in named)
    targets = re.findall(r"^make (\w+)", text, re.MULTILINE)
    assert all(re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE) for target in targets)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("mkdocs") is None or find_spec("mkdocstrings") is None, reason="no extra [docs] here")
def test_the_site_is_built_without_a_network(tmp_path):
    """Strictly: a warning ends it. The pages name no address that a browser would load from."""
    settings = os.environ | {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}
    words = [sys.executable, "-m", "mkdocs", "build", "-q", "-d", str(tmp_path / "site")]
    done = subprocess.run(words, cwd=ROOT, env=settings, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    for page in (tmp_path / "site").glob("*.html"):
        loaded = re.findall(
            r'<(?:script|img|iframe)[^>]*\ssrc="([^"]*)"|<link[^>]*rel="stylesheet"[^>]*href="([^"]*)"',
            page.read_text(),
        )
        assert not [link for pair in loaded for link in pair if link.startswith(("http", "//"))], page.name
