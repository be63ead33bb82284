"""Files that people write are read alike whatever their editor adds: a byte order mark, the line ends of Windows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from errors import refuses
from test_packed import write_tar
from whence.cli.attribute import Attribute
from whence.cli.options import declarations, read_config
from whence.data.classes import lines_of
from whence.data.images import image_folder
from whence.task import prompts_in
from whence.training.recipe_file import read_recipe


def columns(path: Path) -> object:
    """The metadata of a folder with one picture and this file."""
    Image.new("L", (2, 2)).save(path.parent / "a.png")
    return image_folder(path.parent).meta


def member(path: Path) -> object:
    """The metadata of a shard with one picture and this file beside it."""
    picture = path.parent / "a.png"
    Image.new("L", (2, 2)).save(picture)
    write_tar(path.parent / "a.tar", {"a.png": picture.read_bytes(), path.name: path.read_bytes()})
    return image_folder(path.parent / "a.tar").meta


READERS: dict[str, tuple[str, str, Callable[[Path], object]]] = {
    "recipe": ("recipe.toml", "# für später\nseed = 3\n", read_recipe),
    "options": ("config.toml", 'seed = 3\nmodel = "Grüße"\n', lambda path: read_config(path, declarations(Attribute))),
    "prompts": ("prompts.txt", "ein Pferd\nGrün\n", prompts_in),
    "classes": ("classes.txt", "Hund\nKäfer\n", lines_of),
    "jsonl": ("metadata.jsonl", '{"file_name": "a.png", "text": "Käfer"}\n', columns),
    "csv": ("metadata.csv", "file_name,text\na.png,Käfer\n", columns),
    "caption in a shard": ("a.txt", "Käfer", member),
    "columns in a shard": ("a.json", '{"text": "Käfer"}\n', member),
}


@pytest.mark.parametrize("kind", READERS)
def test_marks_of_editors_change_nothing(kind, tmp_path):
    name, text, read = READERS[kind]
    found = []
    for number, content in enumerate((text.encode(), b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())):
        path = tmp_path / str(number) / name
        path.parent.mkdir()
        path.write_bytes(content)
        found.append(read(path))
    assert found[0] == found[1]
    assert "Käfer" not in text or "Käfer" in str(found[1])


@pytest.mark.parametrize("kind", READERS)
def test_other_encodings_are_refused_by_the_name_of_the_file(kind, tmp_path):
    name, text, read = READERS[kind]
    (tmp_path / name).write_bytes(text.encode("latin-1"))
    with refuses(where=str(tmp_path)) as caught:
        read(tmp_path / name)
    assert name in str(caught.value)
