"""What somebody who means harm puts into names, captions, models and archives: shown as text, refused by name, never run."""

from __future__ import annotations

import io
import json
import pickle
import struct
import tarfile
import unicodedata
import zlib
from html.parser import HTMLParser
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from errors import refuses
from pages import unscripted
from test_cli import noise, refused, whence
from test_packed import write_tar
from whence.data.images import image_folder, tensor_images
from whence.data.inspect import look_at
from whence.data.saving import save_png
from whence.evaluation.receipts import Asked, write_credit
from whence.models import new_network, new_scheduler, open_model, save_pipeline
from whence.report.html import LONGEST
from whence.report.page import Known, render
from whence.storage.scores import save_scores
from whence.types import Scores

SCRIPT = "<script>steal()</script>"
STRINGS = {
    "script": f"{SCRIPT}.png",
    "attribute": 'x" onload="steal()" y=\'" onerror=steal() .png',
    "closing": '--></title></style></textarea><img src=x onerror="steal()">',
    "template": "{{ 7 * 7 }}{% raw %}${7*7}",
    "direction": "invoice\u202egnp.exe\u2066\u2069\u200f.png",
    "terminal": "a\x1b[2J\x1b]0;title\x07\r\nb.png",
    "entity": "&lt;b&gt;&#x3c;script&#x3e;",
    "url": "javascript:steal()",
    "long": "x" * 100_000,
    "half": "\ud800 half a letter",
}
IMAGES, QUERIES = 6, 2


class Tags(HTMLParser):
    """The tags and attributes of a page, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str]] = []
        self.text: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def harmless(page: bytes) -> str:
    """A page without foreign scripts, handlers, foreign addresses, direction overrides and control characters; its text."""
    page = unscripted(page.decode())
    found = Tags(page)
    assert not found.tags & {"script", "iframe", "object", "embed", "base", "form", "textarea"}
    assert not [name for name, _ in found.attributes if name.startswith("on")]
    links = [value for name, value in found.attributes if name in ("src", "href", "action", "formaction")]
    assert all(link.startswith(("#", "data:image/")) or link == "data:," for link in links), links
    odd = {letter for letter in page if unicodedata.category(letter) in ("Cc", "Cf", "Cs", "Co")} - {
        "\n",
        "\u2060",
    }
    assert not odd, "direction overrides, control characters"
    return "".join(found.text)


@pytest.mark.parametrize("kind", STRINGS)
def test_strings_are_shown_as_text(kind, tmp_path):
    """As names of pictures and images, creators, captions, titles, facts, methods, what errors are of, and in warnings."""
    hostile = STRINGS[kind]
    names, asked = [f"{i}{hostile}" for i in range(IMAGES)], [f"q{j}{hostile}" for j in range(QUERIES)]
    meta = {"creator": [hostile, "b"] * (IMAGES // 2), "text": [hostile] * IMAGES, hostile: ["a", "b"] * (IMAGES // 2)}
    train = tensor_images(noise(IMAGES, 0), names, meta)
    queries = tensor_images(noise(QUERIES, 1), asked, {"text": [hostile] * QUERIES})
    values = torch.randn(QUERIES, IMAGES, generator=torch.Generator().manual_seed(0))
    recipe = {"is": hostile, "queries": "q", "train": "t", "checkpoints": [hostile]}
    scores = Scores(values, asked, names, recipe, train_meta=meta, stderr=values.abs() / 9, stderr_of=hostile)
    page = render({hostile: scores}, train, queries, hostile, {hostile: hostile}, Known({asked[0]: hostile}))
    text = harmless(page["report.html"])
    assert len(page["report.html"]) < 2e6
    if kind in ("script", "attribute", "closing", "template", "entity", "url"):
        assert hostile in text, "whole, as it is"
    Image.open(io.BytesIO(page["gallery.png"])).load()
    save_scores(tmp_path / "scores" / "m", scores)
    write_credit(tmp_path, Asked("creator"))
    harmless((tmp_path / "credit" / "creator" / "credit.html").read_bytes())


def test_a_long_value_is_cut_and_says_so():
    train, queries = tensor_images(noise(3, 0)), tensor_images(noise(1, 1))
    scores = Scores(torch.randn(1, 3), queries.ids, train.ids, {})
    page = render({"m": scores}, train, queries, "y" * 100_000, {})["report.html"].decode()
    assert f"({100_000 - LONGEST:,} letters more)" in page


def test_the_terminal_is_told_no_control_characters():
    done = whence("report", "no\x1b[2J\u202esuch")
    assert done.code == 2
    assert done.err.rstrip("\n").isprintable()
    assert r"no\x1b[2J\u202esuch" in done.err


# ------------------------------------------------------------------------------------------------------------- paths


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory) -> Path:
    """A small model."""
    folder = tmp_path_factory.mktemp("hostile") / "model"
    config = {"_class_name": "MLPDenoiser", "sample_size": 8, "in_channels": 1, "width": 8, "layers": 1}
    network = new_network(config, 0)
    save_pipeline(folder, network, dict(network.state_dict()), new_scheduler(100, "linear", "epsilon"))
    return folder


def copy_of(pipeline: Path, tmp_path: Path) -> Path:
    import shutil

    return Path(shutil.copytree(pipeline, tmp_path / "model"))


def edit(path: Path, **entries: object) -> None:
    path.write_text(json.dumps({**(json.loads(path.read_text()) if path.is_file() else {}), **entries}))


@pytest.mark.parametrize("name", ["../../secret.safetensors", "/etc/secret.safetensors", "..", "a/../../b.safetensors"])
def test_an_index_of_shards_names_files_beside_it(name, pipeline, tmp_path):
    model = copy_of(pipeline, tmp_path)
    weights = next((model / "unet").glob("*.safetensors"))
    weights.rename(tmp_path / "secret.safetensors")
    edit(model / "unet" / f"{weights.name}.index.json", weight_map={"layer.weight": name})
    with refuses(f"names {name!r}", f"{weights.name}.index.json", "beside it"):
        open_model(model)


@pytest.mark.parametrize("name", ["../elsewhere", "/etc", "..", "a/../.."])
def test_model_index_names_folders_beside_it(name, pipeline, tmp_path):
    model = copy_of(pipeline, tmp_path)
    (tmp_path / "elsewhere").mkdir()
    edit(tmp_path / "elsewhere" / "config.json", _class_name="AutoencoderKL", in_channels=1)
    edit(model / "model_index.json", **{name: ["diffusers", "AutoencoderKL"]})
    with refuses(f"names the part {name!r}", "model_index.json", "beside it"):
        open_model(model)


@pytest.mark.parametrize("name", ["../secret.png", "/secret.png", "a/../../secret.png", "..\\secret.png"])
def test_metadata_names_files_in_its_folder(name, tmp_path):
    save_png(tmp_path / "data", noise(2, 0), ["0", "1"])
    save_png(tmp_path / "more", noise(1, 0), ["secret"])
    (tmp_path / "more" / "secret.png").rename(tmp_path / "secret.png")
    (tmp_path / "data" / "metadata.jsonl").write_text(json.dumps({"file_name": name}) + "\n")
    with refuses("leads out of the folder", "metadata.jsonl"):
        image_folder(tmp_path / "data", 8, 1)


def test_a_table_of_paths_reads_no_file(tmp_path):
    secret = tmp_path / "secret.png"
    Image.new("L", (8, 8)).save(secret)
    cells = [{"bytes": None, "path": str(secret)}]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    pq.write_table(pa.table({"image": pa.array(cells, kind)}), tmp_path / "a.parquet")
    with refuses("only the path"):
        image_folder(tmp_path / "a.parquet", 8, 1).batch([0])


def picture() -> bytes:
    content = io.BytesIO()
    Image.new("L", (8, 8)).save(content, "PNG")
    return content.getvalue()


@pytest.mark.parametrize("name", ["../../evil.png", "/tmp/evil.png", "a/../../evil.png"])
def test_members_of_an_archive_are_read_where_they_lie(name, tmp_path):
    """Nothing is unpacked: a name is a name."""
    folder = tmp_path / "in"
    folder.mkdir()
    write_tar(folder / "a.tar", {"good.png": picture(), name: picture()})
    before = {path for path in tmp_path.rglob("*")}
    try:
        images = image_folder(folder / "a.tar", 8, 1)
        assert images.batch(range(len(images))).x0.shape[1:] == (1, 8, 8)
    finally:
        assert {path for path in tmp_path.rglob("*")} == before


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_in_an_archive_are_no_pictures(kind, tmp_path):
    (tmp_path / "secret.png").write_bytes(picture())
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        good = tarfile.TarInfo("good.png")
        good.size = len(picture())
        tar.addfile(good, io.BytesIO(picture()))
        link = tarfile.TarInfo("evil.png")
        link.type, link.linkname = kind, str(tmp_path / "secret.png")
        tar.addfile(link)
    found = look_at(tmp_path / "a.tar")
    assert image_folder(tmp_path / "a.tar", 8, 1).ids == ["good.png"] or "evil.png" in str(found.findings(8))


# --------------------------------------------------------------------------------------------------------------- code


class Touch:
    """A pickle that makes a file when it is loaded, which shows that it was."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


def test_no_pickle_is_loaded(pipeline, tmp_path):
    """Under every name that somebody else would load, beside the weights and in place of them."""
    touched = tmp_path / "touched"
    content = pickle.dumps(Touch(touched))
    pickle.loads(content)
    assert touched.exists(), "it would"
    touched.unlink()
    model = copy_of(pipeline, tmp_path)
    names = (
        "diffusion_pytorch_model.bin",
        "pytorch_model.bin",
        "model.pt",
        "model.ckpt",
        "training_args.bin",
        "x.pkl",
        "x.npy",
    )
    for folder in (model, model / "unet", model / "scheduler"):
        for name in names:
            (folder / name).write_bytes(content)
    opened = open_model(model)
    opened.final.load()
    weights = next((model / "unet").glob("*.safetensors"))
    weights.write_bytes(content)
    with refuses("truncated or damaged", weights.name):
        open_model(model).final.load()
    weights.unlink()
    with refuses("only pickles, which whence never opens"):
        open_model(model)
    assert not touched.exists()


def test_no_code_of_a_model_is_run(pipeline, tmp_path):
    """Custom pipelines, remote code and modules beside the configuration."""
    touched = tmp_path / "touched"
    code = f"from pathlib import Path\nPath({str(touched)!r}).touch()\nclass Evil: pass\n"
    model = copy_of(pipeline, tmp_path)
    for folder in (model, model / "unet", model / "scheduler"):
        for name in ("pipeline.py", "modeling.py", "evil.py", "__init__.py", "conftest.py"):
            (folder / name).write_text(code)
    remote = {"AutoModel": "modeling.Evil", "AutoConfig": "evil.Evil", "UNet2DModel": "modeling.Evil"}
    for path in ("unet/config.json", "scheduler/scheduler_config.json", "model_index.json"):
        edit(model / path, auto_map=remote, custom_pipeline="pipeline", trust_remote_code=True)
    done = whence("doctor", model)
    assert done.code in (0, 2)
    with pytest.warns(UserWarning, match="auto_map"):
        open_model(model).final.load()
    edit(model / "model_index.json", _class_name=["pipeline", "Evil"])
    with refuses("the part _class_name (Evil) of this pipeline is not known"):
        open_model(model)
    edit(model / "model_index.json", _class_name="DDPMPipeline")
    edit(model / "unet" / "config.json", _class_name="modeling.Evil")
    with refuses("network class 'modeling.Evil' is not supported"):
        open_model(model)
    assert not touched.exists()


# -------------------------------------------------------------------------------------------------------------- bombs


def png_of(side: int) -> bytes:
    """A PNG that says it is side x side, and is a few hundred bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("side", [20_000, 2**31 - 1])
def test_a_picture_that_would_fill_the_memory_is_refused(side, tmp_path):
    (tmp_path / "bomb.png").write_bytes(png_of(side))
    with refuses("bomb.png"):
        image_folder(tmp_path, 8, 1).batch([0])


def test_a_text_in_an_archive_that_would_fill_the_memory_is_refused(tmp_path):
    """A sparse member may say that it has any number of bytes."""
    path = write_tar(tmp_path / "a.tar", {"0.png": picture(), "0.txt": b"x" * 512})
    content = bytearray(path.read_bytes())
    at = content.index(b"0.txt")
    content[at + 156 : at + 157] = b"S"  # GNU sparse: one piece of 512 bytes in 2**36
    content[at + 386 : at + 410] = b"%011o\0%011o\0" % (0, 512)
    content[at + 483 : at + 495] = b"%011o\0" % 2**32
    content[at + 148 : at + 156] = b" " * 8
    content[at + 148 : at + 156] = b"%06o\0 " % sum(content[at : at + 512])
    path.write_bytes(bytes(content))
    with refuses("0.txt is stored as a sparse file"):
        image_folder(path, 8, 1)


def test_a_table_that_would_fill_the_memory_is_refused(tmp_path, monkeypatch):
    """Zeros take no room in a file; here they are few, and so is what counts as large."""
    monkeypatch.setattr("whence.data.parquet.LARGE", 2**20)
    block = pa.array([bytes(2**20)] * 16, pa.binary())
    pq.write_table(pa.table({"image": block}), tmp_path / "a.parquet", compression="zstd", use_dictionary=False)
    assert (tmp_path / "a.parquet").stat().st_size < 2**20
    with refuses("that become", "a.parquet"):
        image_folder(tmp_path / "a.parquet", 8, 1)


def test_json_that_would_fill_the_memory_is_refused(pipeline, tmp_path):
    model = copy_of(pipeline, tmp_path)
    path = model / "unet" / "config.json"
    with path.open("r+b") as file:
        file.truncate(2**33)  # of zeros, which take no room on the disk
    with refuses("bytes are too many for a JSON file", "config.json"):
        open_model(model)
    path.write_bytes(b"[" * 10**6)
    with refuses("config.json: cannot be read as JSON (nested more than 100 deep)"):
        open_model(model)
    refused("report", tmp_path, says="holds no finished scores")
