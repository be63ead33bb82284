"""What somebody who means harm puts into names, captions, models and archives: shown as text, refused by name, never run."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import pickle
import re
import signal
import socket
import struct
import subprocess
import sys
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

import whence as whence_package
from errors import refuses
from pages import unscripted
from test_cli import noise, refused, whence
from test_packed import write_tar
from whence import cli
from whence.curvature import factors
from whence.data.images import image_folder, tensor_images
from whence.data.inspect import look_at
from whence.data.masks import read_mask
from whence.data.saving import save_png
from whence.evaluation.ledger_files import masks_in
from whence.evaluation.receipts import Asked, write_credit
from whence.models import new_network, new_scheduler, open_model, save_pipeline
from whence.models.lora_files import read_lora
from whence.report.html import LONGEST
from whence.report.page import Known, render
from whence.storage.arrays import read_checked
from whence.storage.columns import as_csv
from whence.storage.files import file_digest, read_json, read_object
from whence.storage.scores import save_scores
from whence.training.recipe_file import read_recipe
from whence.types import Scores, WhenceError

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


ODD = "a\x1b[2J\nwhence: all is well\u202eb"
SPELT = r"a\x1b[2J\nwhence: all is well\u202eb"


def test_the_terminal_is_told_letters_that_are_seen(tmp_path):
    """In refusals and in what is printed, whole and in one line: nobody finds a file by half of its name."""
    done = whence("report", tmp_path / ODD)
    assert (done.code, len(done.err.splitlines())) == (2, 1)
    assert done.err.startswith(f"whence: {tmp_path}/{SPELT}: holds no finished scores")
    save_scores(tmp_path / "scores" / "m", Scores(torch.ones(1, 1), ["q"], ["t"], {}))
    (tmp_path / ODD).write_text("x")
    (tmp_path / "half \udcff").write_text("x")
    found = whence("verify", tmp_path)
    assert found.code == 0, found
    assert SPELT in found.out
    assert r"half \udcff" in found.out
    assert all(line.isprintable() for line in found.out.splitlines())


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_pipe_takes_any_name(encoding, tmp_path):
    """Whatever letters it knows."""
    (tmp_path / "scores").mkdir()
    save_scores(tmp_path / "scores" / "m", Scores(torch.ones(1, 1), ["q"], ["t"], {}))
    (tmp_path / "\u4f60\xe9 \udcff").write_text("x")
    call = [sys.executable, "-m", "whence.cli.main", "verify", str(tmp_path)]
    done = subprocess.run(call, capture_output=True, env=os.environ | {"PYTHONIOENCODING": encoding}, check=False)
    assert done.returncode == 0, done.stderr
    assert rb"\udcff" in done.stdout
    assert ("\xe9".encode(encoding) if encoding != "ascii" else rb"\xe9") in done.stdout


CELLS = ["[bold]a[/bold]", "[/]", "[red]", ":smile:", "\x1b[2J\u202e\nb", "plain"]


def test_tables_on_the_terminal_show_texts_as_they_are(tmp_path):
    """No markup, no emoji; what is not seen is spelt out."""
    train = [f"{i}.png" for i in range(len(CELLS))]
    values = torch.arange(1.0, 1 + len(CELLS))[None]
    save_scores(tmp_path / "scores" / "m", Scores(values, ["q"], train, {}, train_meta={"creator": CELLS}))
    done = whence("credit", tmp_path)
    assert done.code == 0, done.err
    for name in CELLS:
        assert (name if name.isprintable() else r"\x1b[2J\u202e\nb") in done.out
    assert all(line.isprintable() for line in done.out.splitlines())


def test_every_verb_prints_by_one_door():
    """What prints past it would print whatever a name holds."""
    for path in sorted((Path(cli.__file__).parent).glob("*.py")):
        text = path.read_text()
        if path.name != "terminal.py":
            assert "rich.console" not in text, path
            assert not re.search(r"\bprint\(", text.replace(".print(", "")), path
        if path.name not in ("terminal.py", "main.py"):  # which prints its version and its help
            assert "typer.echo" not in text, path


# ------------------------------------------------------------------------------------------------------- spreadsheets

FORMULAS = {
    "=cmd|' /C calc'!A0": "'=cmd|' /C calc'!A0",
    "@SUM(1)": "'@SUM(1)",
    "+1+1": "'+1+1",
    "-1+1": "'-1+1",
    "\t=1": "'\t=1",
    "\uff1d1": "'\uff1d1",
    "a\u202egnp.exe\x1b[2J": r"a\u202egnp.exe\x1b[2J",
    "\ud800": r"\ud800",
    "-5": "-5",
    "+1e3": "+1e3",
    "a=b": "a=b",
    'two\nlines, "quoted"': 'two\nlines, "quoted"',
    "\u0646\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645": "\u0646\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645",
}


def test_a_spreadsheet_computes_nothing(tmp_path):
    """CSV is for people: texts are shown, none is a formula. Parquet keeps them to the letter."""
    told = list(FORMULAS)
    rows = list(csv.reader(io.StringIO(as_csv({"=1": told, "n": [-1.5] * len(told)}).decode(), newline="")))
    assert rows[0] == ["'=1", "n"]
    assert rows[1:] == [[shown, "-1.5"] for shown in FORMULAS.values()]
    scores = Scores(torch.ones(1, len(told)), ["q"], told, {}, train_meta={"creator": told})
    scores.to_csv(tmp_path / "a.csv")
    cells = [cell for row in csv.reader((tmp_path / "a.csv").open(newline="")) for cell in row]
    assert set(FORMULAS.values()) <= {*cells}
    scores.to_parquet(tmp_path / "a.parquet")
    whole = pq.read_table(tmp_path / "a.parquet").to_pydict()["creator"]
    assert sorted(whole) == sorted(name if name != "\ud800" else r"\ud800" for name in told)


def test_every_csv_is_written_by_one_room():
    rooms = [path for path in Path(whence_package.__file__).parent.rglob("*.py") if "csv.writer" in path.read_text()]
    assert [path.name for path in rooms] == ["columns.py"]


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


READERS = {
    "JSON of ours": lambda path: read_json(path),
    "JSON of others": lambda path: read_object(path),
    "digest": lambda path: file_digest(path),
    "tensors": lambda path: read_checked(path),
    "sums": lambda path: factors.read(path),
    "masks of subsets": lambda path: masks_in(path, "", 3),
    "recipe": lambda path: read_recipe(path),
    "mask": lambda path: read_mask(path),
    "LoRA": lambda path: read_lora(path),
}


@pytest.fixture
def soon():
    """Whoever waits for a pipe is stopped, and fails."""

    def late(number: int, frame: object) -> None:
        raise AssertionError("it waits for ever")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def odd_file(path: Path, kind: str) -> Path:
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        with contextlib.chdir(path.parent), socket.socket(socket.AF_UNIX) as opened:  # its path may not be long
            opened.bind(path.name)
    return path


KINDS_OF_FILES = ("pipe", "device", "socket")


@pytest.mark.parametrize("kind", KINDS_OF_FILES)
@pytest.mark.parametrize("reader", READERS)
def test_nobody_waits_for_what_never_ends(kind, reader, tmp_path, soon):
    path = odd_file(tmp_path / "pytorch_lora_weights.safetensors", kind)
    with pytest.raises(WhenceError) as caught:
        READERS[reader](path)
    assert str(path) in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("kind", KINDS_OF_FILES)
@pytest.mark.parametrize("name", ["0.png", "metadata.jsonl", "a.tar", "a.parquet", "a.arrow", "more.png"])
def test_no_folder_of_images_holds_one_up(kind, name, tmp_path, soon):
    """In the place of a picture, of a table or an archive, and beside the pictures."""
    save_png(tmp_path / "data", noise(3, 0), ["0", "1", "2"])
    (tmp_path / "data" / "metadata.jsonl").unlink(missing_ok=True)
    path = odd_file(tmp_path / "data" / name, kind)

    def read() -> None:
        images = image_folder(path if path.suffix in (".tar", ".parquet", ".arrow") else path.parent, 8, 1)
        images.batch(range(len(images)))

    with pytest.raises(WhenceError) as caught:
        read()
    assert name in str(caught.value)


@pytest.mark.parametrize("kind", KINDS_OF_FILES)
@pytest.mark.parametrize("name", ["model_index.json", "unet/config.json", "scheduler/scheduler_config.json", "weights"])
def test_no_model_holds_one_up(kind, name, pipeline, tmp_path, soon):
    model = copy_of(pipeline, tmp_path)
    odd_file(next((model / "unet").glob("*.safetensors")) if name == "weights" else model / name, kind)
    if name != "model_index.json":  # which need not be there
        with pytest.raises(WhenceError) as caught:
            open_model(model).final.load()
        assert str(model) in str(caught.value)
    assert whence("doctor", model).code in (0, 2)


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
