"""Encoders of transformers: their preprocessing against transformers' own, their rows, and what is refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from agreement import close
from errors import refuses
from test_cli import refused, succeeds, world  # noqa: F401
from whence import clip_cosine, dino_cosine
from whence.features.parts import Encoded
from whence.features.pretrained import CLIP, DINO, Preprocessing, Pretrained
from whence.features.rows import rows
from whence.types import Task
from worlds import PREPROCESSOR, encoder, save_encoder, unet_task

KINDS = (*CLIP, *DINO)


def pictures(channels: int, height: int, width: int, count: int = 3) -> Tensor:
    g = torch.Generator().manual_seed(height)
    return torch.rand(count, channels, height, width, generator=g) * 2 - 1


def theirs(x0: Tensor, **settings: object) -> Tensor:
    """transformers' Pillow image processor on the pictures as bytes."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    shown = ((x0 + 1) * 127.5).round().to(torch.uint8).expand(-1, 3, -1, -1)
    processor = CLIPImageProcessorPil(**(PREPROCESSOR | settings))
    return processor(list(shown), input_data_format="channels_first", return_tensors="pt")["pixel_values"].float()


@pytest.mark.parametrize(("channels", "height", "width"), [(1, 4, 4), (3, 40, 17), (3, 9, 31)])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"size": {"height": 11, "width": 9}, "resample": 2},
        {"do_center_crop": False, "size": {"height": 8, "width": 8}},
    ],
    ids=["shortest edge", "both sides", "no crop"],
)
def test_preprocessing_is_that_of_transformers(tmp_path, channels, height, width, settings):
    """The same bytes after resizing and cropping, so the same numbers, for pictures small, tall and wide, grey or RGB."""
    x0 = pictures(channels, height, width)
    folder = save_encoder(tmp_path, "vit", **settings)
    close(Preprocessing.read(folder)(x0), theirs(x0, **settings))


def test_preprocessing_of_old_files(tmp_path):
    """A bare number is the shorter edge for CLIP and both sides for a ViT; the factor was always 1/255."""
    old = {"size": 12, "crop_size": 8}
    for kind, size in (("clip", {"shortest_edge": 12}), ("vit", {"height": 12, "width": 12})):
        folder = save_encoder(tmp_path / kind, kind, **old, do_rescale=None)
        stated = {k: v for k, v in (PREPROCESSOR | old).items() if "rescale" not in k}
        (folder / "preprocessor_config.json").write_text(json.dumps(stated))
        x0 = pictures(3, 20, 30)
        close(Preprocessing.read(folder)(x0), theirs(x0, size=size))


@pytest.fixture
def task(tmp_path) -> Task:
    return unet_task(tmp_path / "run", n=5)


@pytest.mark.parametrize("kind", KINDS)
def test_embeddings_and_scores(task, kind):
    """The embedding that the model of transformers gives, and the cosine of such rows."""
    import transformers

    part = Encoded(Pretrained(encoder(kind)))
    found = rows(part, task, task.trajectory[-1], task.train, "x").all()
    pixels = theirs(task.train.x0)
    with torch.no_grad():
        if kind in CLIP:
            whole = transformers.CLIPModel if kind == "clip" else transformers.CLIPVisionModelWithProjection
            net = whole.from_pretrained(encoder(kind)).eval()
            vision = net.vision_model(pixel_values=pixels).pooler_output
            expected = net.visual_projection(vision)
        else:
            net = transformers.AutoModel.from_pretrained(encoder(kind)).eval()
            expected = net(pixel_values=pixels).last_hidden_state[:, 0]
    close(found, expected)
    if kind in ("clip", "dinov2"):
        method = (clip_cosine if kind == "clip" else dino_cosine)(encoder(kind))
        scores = method(replace(task, queries=task.train))
        unit = (expected / expected.norm(dim=1, keepdim=True)).double()
        close(scores.values, unit @ unit.T)
        assert [scores.top(i, 1)[0][0] for i in range(5)] == list(task.train.ids), "each image finds itself"


def test_rows_do_not_depend_on_the_batch_to_the_last_bit(task, tmp_path):
    part = Encoded(Pretrained(encoder("clip")))
    other = replace(task, root=tmp_path / "other", engine=replace(task.engine, batch_size=2))
    first, second = (rows(part, t, t.trajectory[-1], t.train, "x").all() for t in (task, other))
    assert torch.equal(first, second)


def test_scores_do_not_depend_on_the_model(task):
    method = clip_cosine(encoder("clip"))
    first, second = (method(replace(task, trajectory=(point,))).values for point in task.trajectory)
    assert torch.equal(first, second)


def test_features_are_kept_under_the_bytes_of_the_encoder(task, tmp_path):
    """Other weights or another preprocessing in the same folder are another encoder; the folder's place does not matter."""
    first = Path(shutil.copytree(encoder("vit"), tmp_path / "a" / "vit"))
    names = {Pretrained(str(first)).describe()}
    moved = Path(shutil.copytree(first, tmp_path / "b" / "vit"))
    assert Pretrained(str(moved)).describe() in names
    before = dino_cosine(first)(task).values
    save_encoder(first, "vit", seed=1)
    names.add(Pretrained(str(first)).describe())
    assert not torch.allclose(dino_cosine(first)(task).values, before, atol=1e-4)
    save_encoder(first, "vit", seed=1, image_mean=[0.5, 0.5, 0.5])
    names.add(Pretrained(str(first)).describe())
    assert len(names) == 3


# -------------------------------------------------------------------------------------------------------- what is refused


def broken(tmp_path: Path, change: str) -> Path:
    folder = Path(shutil.copytree(encoder("vit"), tmp_path / "encoder"))
    if change == "pickle":
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    elif change == "no weights":
        (folder / "model.safetensors").unlink()
    elif change == "no preprocessing":
        (folder / "preprocessor_config.json").unlink()
    elif change == "not json":
        (folder / "config.json").write_text("{")
    elif change == "damaged":
        (folder / "model.safetensors").write_bytes(b"x" * 50)
    elif change == "no mean":
        (folder / "preprocessor_config.json").write_text('{"size": 8, "resample": 2, "image_std": [1, 1, 1]}')
    elif change == "lacks":
        from safetensors.torch import load_file, save_file

        weights = load_file(folder / "model.safetensors")
        weights.pop("layernorm.weight")
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    elif change == "size":
        (folder / "preprocessor_config.json").write_text(
            '{"size": 16, "resample": 2, "image_mean": [0, 0, 0], "image_std": [1, 1, 1]}'
        )
    return folder


@pytest.mark.parametrize(
    ("change", "what", "accepted"),
    [
        ("pickle", "holds only pytorch_model.bin, a pickle, which whence never opens; expected *.safetensors", ""),
        ("no weights", "holds no weights; expected *.safetensors", ""),
        ("no preprocessing", "has no preprocessor_config.json", "the folder of a vit, dinov2"),
        ("not json", "config.json cannot be read as JSON", ""),
        ("damaged", "cannot be loaded: ", ""),
        ("no mean", "does not state 'image_mean', which its pictures depend on", ""),
        ("lacks", "its weights lack layernorm.weight, which a ViTModel has", ""),
        ("size", "fails on 16x16 pictures: ", ""),
    ],
)
def test_folders_that_are_no_encoder(task, tmp_path, change, what, accepted):
    with refuses(what, accepted=accepted) as error:
        dino_cosine(broken(tmp_path, change))(task)
    assert "\n" not in str(error.value)


def test_encoders_that_are_not_given_not_there_or_of_another_kind(task, tmp_path):
    with refuses("needs an encoder and none is given", accepted="(--set encoder=FOLDER)"):
        clip_cosine()(task)
    with refuses("encoder 'encoders/a/b' is no folder", accepted="the folder of a clip, clip_vis"):
        clip_cosine("encoders/a/b")
    with refuses("is a 'vit' model", accepted="the folder of a clip, clip_vision_model model"):
        clip_cosine(encoder("vit"))
    with refuses("reads grey or RGB pictures ... these are [1, 2, 4, 4]"):
        Pretrained(encoder("vit"))(
            torch.nn.Identity(), task.forward, replace(task.train.batch([0]), x0=torch.zeros(1, 2, 4, 4))
        )


def test_names_of_the_hub(monkeypatch, task):
    """owner/name is fetched as JSON and safetensors alone; what the hub says is told in one line."""
    import huggingface_hub

    asked: list[object] = []

    def fetch(name: str, allow_patterns: list[str]) -> str:
        asked.append((name, tuple(allow_patterns)))
        if name != "someone/clip":
            raise OSError("no such repository\nmore about it")
        return encoder("clip")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    assert torch.equal(clip_cosine("someone/clip")(task).values, clip_cosine(encoder("clip"))(task).values)
    assert asked == [("someone/clip", ("*.json", "*.safetensors"))], "asked once, not with every batch"
    with refuses("the hub does not give it (no such repository)", accepted="the folder of a clip"):
        clip_cosine("someone/else")


def test_command_line(world, tmp_path):  # noqa: F811
    """--set encoder=FOLDER, several methods side by side, and a folder that is not one."""
    run = tmp_path / "run"
    asked = world.compare(run, "--method", "clip_cosine", "--set", f"encoder={encoder('clip')}")
    done = succeeds(*asked)
    assert 'clip_cosine: {"features": "Encoded(Pretrained(clip, ' in done.out
    assert (run / "report.html").is_file()
    refused(
        *world.compare(tmp_path / "no", "--method", "clip_cosine"),
        says="clip_cosine needs a folder, and none is given; accepted: --set encoder=FOLDER",
    )
    says = "encoder '/nowhere' is no folder; accepted: the folder of a vit"
    refused(*world.compare(tmp_path / "no", "--method", "dino_cosine", "--set", "encoder=/nowhere"), says=says)


def test_other_settings_on_the_command_line(world, tmp_path):  # noqa: F811
    """Lists and yes-or-no settings of nda, and a layer by its name."""
    few = ("--set", "patches=[0.25,0.5]", "--set", "anywhere=false", "--set", "layers=mid_block")
    succeeds(*world.compare(tmp_path / "run", "--method", "nda", "--method", "representation_l2", *few))
    says = "accepted: true or false, like anywhere=true"
    refused(*world.compare(tmp_path / "no", "--method", "nda", "--set", "anywhere=2"), says=says)
