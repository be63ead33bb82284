"""docs/extending.md does what it says: every block of a section is executed, in order, in an empty folder."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

from whence.data.sources import SOURCES
from whence.methods import METHODS
from whence.models.networks import NETWORKS

PAGE = (Path(__file__).parent.parent / "docs" / "extending.md").read_text()
SECTIONS = {part.split("\n", 1)[0]: re.findall(r"(?s)```python\n(.*?)```", part) for part in PAGE.split("\n## ")[1:]}


@pytest.mark.parametrize("section", SECTIONS)
def test_the_section_runs(section: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tables, page = (SOURCES, METHODS, NETWORKS), ModuleType("extended")
    known = [dict(table) for table in tables]
    monkeypatch.setitem(sys.modules, "extended", page)  # where dataclasses look their names up
    try:
        for block in SECTIONS[section]:
            exec(compile(block, f"docs/extending.md: {section}", "exec"), page.__dict__)
    finally:
        for table, entries in zip(tables, known, strict=True):
            table.clear()
            table.update(entries)
