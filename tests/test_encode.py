"""Latents and text embeddings, and every family from files to scores."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest import mock

import diffusers
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor
from transformers import AutoTokenizer, CLIPTextModel, CLIPTextModelWithProjection, T5EncoderModel

from agreement import close
from errors import refuses
from families import FAMILIES, save_clip, save_vae, save_whole
from test_cli import refused, succeeds
from test_lora import peft_lora
from whence import Request, attribute, d_trak, task_from_pretrained, uniform
from whence.data import images
from whence.data.images import image_folder, subset, tensor_images
from whence.models import Lora, encode_images, open_model
from whence.models.parts import Parts
from whence.storage.arrays import Store
from whence.types import Engine

CAPTIONS = ["a red cat", "a dog", "a red cat", "two birds", "", "a dog"]
TOKENS = 7
SETTINGS: dict[str, Any] = {"draws": uniform(4), "dim": 16, "damping": 0.1}


def pictures(folder: Path, captions: list[str], seed: int = 0, column: str = "text") -> Path:
    """An imagefolder of 8x8 noise with captions and labels."""
    folder.mkdir()
    rng = np.random.default_rng(seed)
    with (folder / "metadata.jsonl").open("w") as file:
        for i, caption in enumerate(captions):
            Image.fromarray(rng.integers(0, 255, (8, 8, 3), np.uint8)).save(folder / f"{i}.png")
            file.write(json.dumps({"file_name": f"{i}.png", column: caption, "label": i % 5}) + "\n")
    return folder


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A pipeline folder of every family, and two folders of pictures."""
    root = tmp_path_factory.mktemp("families")
    for name in FAMILIES:
        save_whole(name, root / name)
    pictures(root / "train", CAPTIONS)
    pictures(root / "queries", ["a cat", "birds"], seed=1)
    return root


def encoded(world: Path, name: str, root: Path, **options: Any) -> Any:
    images = image_folder(world / "train", 8)
    return encode_images(open_model(world / name), images, root, tokens=TOKENS, **options)


@pytest.mark.parametrize("name", ["sd", "flux"])
def test_latents_are_those_of_the_vae(name, world, tmp_path):
    """(z - shift) * scale, at the mode unless a sample is asked for."""
    x0 = image_folder(world / "train", 8).batch(range(6)).x0
    vae = AutoencoderKL.from_pretrained(world / name, subfolder="vae")
    with torch.no_grad():
        posterior = vae.encode(x0).latent_dist
    shift = 0.3 if name == "flux" else 0.0
    found = encoded(world, name, tmp_path).batch(range(6)).x0
    close(found, (posterior.mode() - shift) * 0.7)
    drawn = [encoded(world, name, tmp_path, sample=s).batch(range(6)).x0 for s in (0, 1)]
    eps = (drawn[0] / 0.7 + shift - posterior.mode()) / posterior.std
    assert not torch.allclose(drawn[0], drawn[1])
    assert 0.7 < float(eps.std()) < 1.3
    assert abs(float(eps.mean())) < 0.25


def by_pipeline(name: str, folder: Path, captions: list[str]) -> dict[str, Tensor]:
    """The embeddings as diffusers' own pipeline of the family makes them."""
    part = lambda kind, at="": kind.from_pretrained(folder, subfolder=f"text_encoder{at}").eval()  # noqa: E731
    tokenizer = lambda at="": AutoTokenizer.from_pretrained(folder / f"tokenizer{at}")  # noqa: E731
    made: Any = dict.fromkeys(("vae", "unet", "transformer", "scheduler"))
    same = {"prompt": captions, "device": "cpu", "num_images_per_prompt": 1}
    if name == "sd":
        ids = tokenizer()(captions, padding="max_length", max_length=12, return_tensors="pt").input_ids
        return {"encoder_hidden_states": part(CLIPTextModel)(ids)[0]}
    if name == "sdxl":
        made = {**made, "tokenizer": tokenizer(), "tokenizer_2": tokenizer("_2")}
        made |= {"text_encoder": part(CLIPTextModel), "text_encoder_2": part(CLIPTextModelWithProjection, "_2")}
        made.pop("transformer")
        pipe = diffusers.StableDiffusionXLPipeline(**{**made, "unet": FAMILIES["sdxl"].network()})
        states, _, pooled, _ = pipe.encode_prompt(**same, do_classifier_free_guidance=False)
        return {"encoder_hidden_states": states, "text_embeds": pooled}
    made.pop("unet")
    made |= {"tokenizer": tokenizer(), "transformer": FAMILIES[name].network()}
    if name == "sd3":
        made |= {f"text_encoder{at}": part(CLIPTextModelWithProjection, at) for at in ("", "_2")}
        made |= {"text_encoder_3": part(T5EncoderModel, "_3")}
        made |= {f"tokenizer{at}": tokenizer(at) for at in ("_2", "_3")}
        pipe = diffusers.StableDiffusion3Pipeline(**made)
        states, _, pooled, _ = pipe.encode_prompt(
            captions, captions, captions, "cpu", do_classifier_free_guidance=False, max_sequence_length=TOKENS
        )
        return {"encoder_hidden_states": states, "pooled_projections": pooled}
    if name == "flux":
        made |= {"text_encoder": part(CLIPTextModel), "text_encoder_2": part(T5EncoderModel, "_2")}
        pipe = diffusers.FluxPipeline(**made, tokenizer_2=tokenizer("_2"))
        states, pooled, _ = pipe.encode_prompt(captions, captions, "cpu", max_sequence_length=TOKENS)
        return {"encoder_hidden_states": states, "pooled_projections": pooled}
    pipe = diffusers.PixArtAlphaPipeline(**made, text_encoder=part(T5EncoderModel))
    states, mask, _, _ = pipe.encode_prompt(
        captions, do_classifier_free_guidance=False, device="cpu", max_sequence_length=TOKENS
    )
    return {"encoder_hidden_states": states, "attention_mask": mask}


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3", "flux", "pixart"])
def test_text_is_that_of_the_pipeline(name, world, tmp_path):
    with torch.no_grad():
        expected = by_pipeline(name, world / name, CAPTIONS)
    found = encoded(world, name, tmp_path).batch(range(6)).cond
    assert expected.keys() <= found.keys()
    for key, value in expected.items():
        close(found[key], value)
    assert not torch.allclose(found["encoder_hidden_states"][0], found["encoder_hidden_states"][1])
    if name == "sdxl":
        assert found["time_ids"].tolist() == [[8, 8, 0, 0, 8, 8]] * 6


def test_rows_do_not_depend_on_company_and_are_computed_once(world, tmp_path):
    first = encoded(world, "sd", tmp_path)
    whole, alone = first.batch([0, 3, 4]), first.batch([3])
    assert torch.equal(whole.x0[1:2], alone.x0)
    assert torch.equal(whole.cond["encoder_hidden_states"][1:2], alone.cond["encoder_hidden_states"])
    assert whole.keys.tolist() == image_folder(world / "train", 8).batch([0, 3, 4]).keys.tolist()
    assert sorted(len(array) for array in Store(tmp_path).arrays()) == [4, 6], "4 distinct captions, 6 pictures"
    part = subset(first, [4, 0]).batch([0])
    assert torch.equal(part.x0, whole.x0[2:])
    with mock.patch.object(Parts, "load", side_effect=AssertionError("loaded again")):
        again = encoded(world, "sd", tmp_path)
        assert torch.equal(again.batch([3]).x0, alone.x0)
    assert again.describe() == first.describe()
    other = encoded(world, "sd", tmp_path, sample=0)
    assert other.describe() != first.describe()


def test_captions_are_part_of_what_the_images_are(world, tmp_path):
    images = image_folder(world / "train", 8)
    images.meta["other"] = [*CAPTIONS[1:], CAPTIONS[0]]
    made = [encode_images(open_model(world / "sd"), images, tmp_path, caption_column=c) for c in ("text", "other")]
    assert made[0].describe() != made[1].describe()
    text = [each.batch([0, 1]).cond["encoder_hidden_states"] for each in made]
    assert torch.equal(text[1][0], text[0][1])


def test_pixel_models_are_left_alone(world, tmp_path):
    images = image_folder(world / "train", 8)
    assert encode_images(open_model(world / "ddpm"), images, tmp_path) is images


# ------------------------------------------------------------------------------------------------- from files to scores


@pytest.mark.parametrize("name", FAMILIES)
def test_from_files_to_scores(name, world, tmp_path):
    """Every family, with a LoRA on top: finite scores that tell the queries apart, the same when run again."""
    peft_lora(name, tmp_path / "lora")
    size = {"resolution": 4 if name.startswith("ddpm") else 8}
    sides = (world / "train", world / "queries")
    with mock.patch("whence.models.encode.CAPTIONS_PER_SHARD", 3):
        task = task_from_pretrained(world / name, *sides, tmp_path / "run", adapter=Lora(tmp_path / "lora"), **size)
    scores = d_trak(**SETTINGS, parameters="lora")(task)
    assert torch.isfinite(scores.values).all()
    assert not torch.allclose(scores.values[0], scores.values[1])
    again = task_from_pretrained(world / name, *sides, tmp_path / "run", adapter=Lora(tmp_path / "lora"), **size)
    assert torch.equal(d_trak(**SETTINGS, parameters="lora")(again).values, scores.values)


def test_an_ensemble_of_loras(world, tmp_path):
    """Further LoRAs on the same base, each a checkpoint of its own."""
    for i in range(2):
        peft_lora("sd", tmp_path / f"lora-{i}", lora_alpha=3 + i)
    sides = (world / "train", world / "queries")
    options = {"adapter": Lora(tmp_path / "lora-0"), "ensemble": [tmp_path / "lora-1"]}
    task = Request(world / "sd", *sides, tmp_path / "run", **options).task()
    assert [point.name for point in (*task.ensemble, *task.trajectory)] == ["lora-1", "lora-0"]
    both = d_trak(**SETTINGS, parameters="lora", ensemble=True)(task)
    assert len(both.recipe["checkpoints"]) == 2


def test_attribute_in_one_call(world, tmp_path):
    scores = attribute(
        world / "sd", world / "train", world / "queries", "d_trak", tmp_path / "run", **SETTINGS,
        parameters="cross-attention-kv",
    )  # fmt: skip
    assert scores.values.shape == (2, 6)
    assert "cross-attention-kv" in json.dumps(scores.recipe)


def test_command_line(world, tmp_path):
    """`whence attribute` on an SD folder, with a LoRA and another caption column; and its report again."""
    lora, out = tmp_path / "lora", tmp_path / "run"
    peft_lora("sd", lora)
    train = pictures(tmp_path / "train", CAPTIONS, column="caption")
    queries = pictures(tmp_path / "queries", ["a cat"], seed=1, column="caption")
    command = ("attribute", world / "sd", "--train_data_dir", train, "--query_data_dir", queries, "--lora", lora)
    command = (*command, "--caption_column", "caption", "--output_dir", out, "--draws", 4, "--dim", 16)
    done = succeeds(*command, "--parameters", "lora")
    assert "report:" in done.out
    assert (out / "report.html").is_file()
    succeeds("report", out)
    refused(*command[:-4], "--generate", 2, "--draws", 4, says="--query_data_dir and --generate exclude each other")
    plain = ("attribute", world / "sd", "--train_data_dir", train, "--output_dir", tmp_path / "other")
    refused(*plain, "--generate", 2, says="reads text: give --prompts FILE.* --query_data_dir")
    refused(*plain, "--query_data_dir", queries, says="no column 'text' .*caption.*--caption_column")
    refused(*plain, "--query_data_dir", queries, "--lora", train, says="no LoRA weights; accepted")


@pytest.mark.parametrize(
    ("break_it", "says"),
    [
        (lambda f: _remove(f / "tokenizer"), "tokenizer/ is missing"),
        (lambda f: _remove(f / "text_encoder"), "text_encoder/ is missing"),
        (lambda f: _remove(f / "vae"), "vae/ is missing, but the network takes latents"),
        (lambda f: (f / "text_encoder" / "model.safetensors").unlink(), "no weights that are opened"),
        (lambda f: (f / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b"x"), "truncated or damaged"),
    ],
)  # fmt: skip
def test_missing_parts_are_one_line(break_it, says, world, tmp_path):
    folder = save_whole("sd", tmp_path / "sd")
    break_it(folder)
    with refuses(says) as error:
        encode_images(open_model(folder), image_folder(world / "train", 8), tmp_path / "run")
    assert "\n" not in str(error.value)


def _remove(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()


@pytest.mark.parametrize(
    ("x0", "meta", "says"),
    [
        (torch.zeros(2, 3, 8, 8), {}, "no column 'text' (columns: none)"),
        (torch.zeros(2, 3, 8, 8), {"text": ["a", 7]}, "have no caption in 'text': 1 has 7"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), {"text": ["a", "b"]}, "floats in [-1, 1]; this is torch.uint8"),
        (torch.full((2, 3, 8, 8), 255.0), {"text": ["a", "b"]}, "this is torch.float32 from 255 to 255"),
        (torch.zeros(2, 3, 9, 9), {"text": ["a", "b"]}, "9x9 do not fit this VAE"),
    ],
)
def test_bad_images_are_one_line(x0, meta, says, world, tmp_path):
    with refuses(says):
        encode_images(open_model(world / "sd"), tensor_images(x0, meta=meta), tmp_path)


def test_a_class_conditional_latent_model_asks_for_labels(world, tmp_path):
    with refuses("class-conditional, but the images have no labels", accepted="class folders"):
        encode_images(open_model(world / "dit"), tensor_images(torch.zeros(2, 3, 8, 8)), tmp_path)


def test_images_that_are_ready_are_taken_as_they_are(world, tmp_path):
    """Latents and embeddings of one's own, by Images with cond; no VAE and no tokenizer is asked for."""

    class Ready(images.TensorImages):
        def batch(self, rows: Any) -> Any:
            found = super().batch(rows)
            return type(found)(found.x0, found.keys, {"encoder_hidden_states": torch.ones(len(found), 5, 8)})

    x0 = torch.randn(5, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    given = [Ready(**vars(tensor_images(part, ids=ids))) for part, ids in ((x0[:3], "abc"), (x0[3:], "de"))]
    folder = FAMILIES["sd"].save(tmp_path / "bare")
    task = task_from_pretrained(folder, *given, tmp_path / "run", resolution=4)
    assert d_trak(**SETTINGS)(task).values.shape == (2, 3)


def test_a_network_for_other_latents_is_told(world, tmp_path):
    """Inpainting models see a mask and a masked picture too."""
    folder = save_whole("sd", tmp_path / "sd")
    path = folder / "unet" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "in_channels": 9}))
    with refuses("VAE makes 4 channels, the network takes 9 ...inpainting"):
        encode_images(open_model(folder), image_folder(world / "train", 8), tmp_path / "run")


def test_older_text_encoders_are_read(tmp_path):
    """Weights that transformers 4 named text_model.*, as the published Stable Diffusion folders have them."""
    from safetensors.torch import load_file, save_file

    save_clip(tmp_path)
    save_vae(tmp_path)
    path = tmp_path / "text_encoder" / "model.safetensors"
    parts = Parts(tmp_path, Engine())
    expected = parts.clip("", ["a cat"], projected=False).last_hidden_state
    old = {f"text_model.{name.removeprefix('text_model.')}": value for name, value in load_file(path).items()}
    save_file(old, path, metadata={"format": "pt"})
    found = Parts(tmp_path, parts.engine).clip("", ["a cat"], projected=False).last_hidden_state
    assert torch.equal(found, expected)
