"""Text-to-image models trained anew or further, from files to pictures, scores and gradients through the training."""

import json
import shutil
from dataclasses import replace

import diffusers
import pytest
import torch
from safetensors.torch import load_file

from errors import refuses
from families import FAMILIES, save_clip, save_whole
from recipes import changed, recipe_of
from test_cli import refused, succeeds
from test_encode import CAPTIONS, pictures
from whence import task_from_pretrained
from whence.data.images import image_folder, subset
from whence.diffusion.draws import stratified
from whence.diffusion.outputs import loss
from whence.features.gradients import measure
from whence.methods.metagradient import Metagradient
from whence.models import encode_images, open_model
from whence.models.encode import prompt_conditions
from whence.models.parts import Parts
from whence.storage.scores import load_scores
from whence.training.loop import steps
from whence.training.order import AsTrained, draw, slots
from whence.training.recipe import Text
from whence.training.runs import train_study
from whence.training.study import Study
from whence.training.unroll import Queries, Run, Trainer, final_weights, finite_difference
from whence.types import Engine

STEPS = recipe_of(steps=4, batch_size=3, learning_rate=1e-2, eps_root=1e-8, max_grad_norm=0.0, ema=0.5, seed=5)
OPTIONS = (
    "--proportion_empty_prompts",
    0.3,
    "--max_train_steps",
    4,
    "--train_batch_size",
    3,
    "--checkpointing_steps",
    2,
    "--lr_warmup_steps",
    0,
)
OTHERS = ("vae", "text_encoder", "tokenizer")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A whole pipeline; the same without weights of its network; one without VAE whose network sees pixels."""
    root = tmp_path_factory.mktemp("text")
    save_whole("sd", root / "sd")
    shutil.copytree(root / "sd", root / "parts")
    (root / "parts" / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    pixels = FAMILIES["sd"].config | {"in_channels": 3, "out_channels": 3, "sample_size": 8}
    replace(FAMILIES["sd"], config=pixels).save(root / "pixels")
    save_clip(root / "pixels")
    pictures(root / "train", CAPTIONS)
    pictures(root / "queries", ["a cat", "birds"], seed=1)
    return root


@pytest.mark.parametrize(("base", "kind"), [("parts", "text"), ("sd", "full"), ("pixels", "text")])
def test_from_the_command_line_to_pictures_and_scores(base, kind, world, tmp_path):
    """The result is a whole pipeline, which goes on where it was cut off and needs its base no more."""
    model, out, prompts = tmp_path / "model", tmp_path / "run", tmp_path / "prompts.txt"
    prompts.write_text("a red cat\ntwo birds\n")
    shutil.copytree(world / base, tmp_path / "base")
    command = ("train", kind, "--pretrained_model_name_or_path", tmp_path / "base", "--train_data_dir", world / "train")
    succeeds(*command, "--output_dir", model, *OPTIONS)
    cut = tmp_path / "cut"
    cut.mkdir()
    shutil.copytree(model / "checkpoint-2", cut / "checkpoint-2")
    succeeds(*command, "--output_dir", cut, *OPTIONS)
    shutil.rmtree(tmp_path / "base")
    weights = "unet/diffusion_pytorch_model.safetensors"
    assert (cut / weights).read_bytes() == (model / weights).read_bytes()
    pipeline = diffusers.DiffusionPipeline.from_pretrained(model) if base != "pixels" else None
    assert pipeline is None or isinstance(pipeline, diffusers.StableDiffusionPipeline)
    command = ("attribute", model, "--train_data_dir", world / "train", "--output_dir", out, "--draws", 2, "--dim", 8)
    command = (*command, "--generate", 3, "--prompts", prompts, "--num_inference_steps", 2)
    succeeds(*command, "--method", "d_trak", "--method", "metagradient", "--parameters", "cross-attention-kv")
    rows = [json.loads(line) for line in (out / "generated" / "metadata.jsonl").read_text().splitlines()]
    assert [row["text"] for row in rows] == ["a red cat", "two birds", "a red cat"]
    assert load_scores(out / "scores" / "metagradient").values.shape == (3, 6)
    preview = ("preview", model, "--train_data_dir", world / "train", "--output_dir", tmp_path / "preview")
    preview = (*preview, "--without", "id=0.png", "--generate", 2, "--num_inference_steps", 2)
    facts = json.loads(succeeds(*preview, "--prompts", prompts, "--retrain").out.splitlines()[0])
    assert min(facts["change"], facts["true_change"]) > 0
    start = load_file(world / "sd" / weights)
    assert (model / "initial").exists() == (kind == "full")
    if kind == "full":
        assert all(torch.equal(w, start[n]) for n, w in load_file(model / "initial" / weights[5:]).items())


def test_its_steps_and_their_derivative(world, tmp_path):
    """The first loss is that of diffusers' train_text_to_image, by hand; metagradients against two trainings."""
    base = open_model(world / "parts", trained=False)
    seen = encode_images(base, image_folder(world / "train", 8), tmp_path)
    study = Study(replace(STEPS, model=Text(world / "parts", 4)))
    run = Run.of(study, seen, engine=Engine(dtype=torch.float64))
    network, chosen = run.module.double(), slots(STEPS, torch.tensor([b for b in seen.batch(range(6)).keys]), 0)
    batch = seen.batch(chosen.rows.tolist()).to("cpu", torch.float64)
    at = draw([STEPS.seed], batch.keys, chosen.epochs, batch.x0.shape[1:], 1000, torch.float64)
    noised = diffusers.DDPMScheduler().add_noise(batch.x0, at.noise, at.t)
    out = network(noised, at.t, encoder_hidden_states=batch.cond["encoder_hidden_states"]).sample
    byhand = (out - at.noise).square().flatten(1).mean(1)
    ours = measure(network, {}, study.forward(), loss, batch, at)
    torch.testing.assert_close(ours, byhand, rtol=1e-6, atol=1e-9)
    queries = Queries(seen, loss, stratified(4))
    difference = finite_difference(run, queries, torch.eye(6)[:2] - 1 / 6)  # what is left weighs as much as all did
    model = tmp_path / "model"
    train_study(study, seen, model, 4)
    task = task_from_pretrained(model, world / "train", world / "train", tmp_path / "run", engine=run.engine)
    assert isinstance(task.study.recipe.model, Text)
    network = task.trajectory[-1].load().double()
    network.load_state_dict(final_weights(run), strict=False)
    exact = replace(task.trajectory[-1], load=lambda: network, digest="exact")
    found = Metagradient(draws=stratified(4))(replace(task, trajectory=(exact,))).values
    torch.testing.assert_close(-found[:, :2], difference, rtol=1e-4, atol=1e-8)


def test_what_cannot_be_trained_is_one_line(world, tmp_path):
    base, images = "--pretrained_model_name_or_path", ("--train_data_dir", world / "train")
    options = (*images, "--output_dir", tmp_path / "x", *OPTIONS)
    refused("train", "text", *options, says="Missing option '--pretrained_model_name_or_path'")
    refused("train", "new", *options, base, world / "sd", says="No such option: --p")
    refused("train", "full", *options, base, world / "parts", says="no weights that are opened")
    save_whole("ddpm", tmp_path / "ddpm")
    refused("train", "text", *options, base, tmp_path / "ddpm", says="reads no text")
    for part, says in (("text_encoder", "text_encoder/ is missing"), ("tokenizer", "tokenizer/ is missing")):
        shutil.copytree(world / "parts", tmp_path / part)
        shutil.rmtree(tmp_path / part / part)
        refused("train", "text", *options, base, tmp_path / part, says=says)
    with refuses("has not been trained"):
        open_model(world / "parts", trained=False).final.load()


def test_captions_are_left_out_by_chance_of_image_and_epoch(world, tmp_path):
    """About the share asked for; the same in steps, replay and stack; nothing else of an image changes."""
    base = open_model(world / "parts", trained=False)
    seen = encode_images(base, image_folder(world / "train", 8), tmp_path)
    training = changed(STEPS, empty_caption=0.4, batch_size=6)
    empty = prompt_conditions(base, Parts(world / "parts", Engine()), [""], 8)["encoder_hidden_states"][0]
    left_out = []
    for epoch in range(40):
        batch, silent = seen.batch(range(6)), AsTrained(seen, training, epoch).batch(range(6))
        text, told = (b.cond["encoder_hidden_states"] for b in (batch, silent))
        gone = torch.tensor([torch.equal(row, empty) for row in told])
        torch.testing.assert_close(told[~gone], text[~gone], rtol=0, atol=0)
        assert torch.equal(silent.x0, batch.x0)
        alone = AsTrained(subset(seen, [4, 1]), training, epoch).batch([1]).cond["encoder_hidden_states"]
        assert torch.equal(alone[0], told[1])
        left_out.append(gone[[0, 1, 2, 3, 5]])  # picture 4 has an empty caption
    share = float(torch.stack(left_out).double().mean())
    assert 0.3 < share < 0.5
    study = Study(replace(training, model=Text(world / "parts", 4)))
    feed = Trainer(Run.of(study, seen)).feed(1)
    expected = AsTrained(seen, training, 1).batch(feed.rows.tolist()).cond["encoder_hidden_states"]
    assert torch.equal(feed.batch.cond["encoder_hidden_states"], expected)
    *_, (state, _) = steps(study.network_at(5), study.forward(), seen, training, engine=Engine(dtype=torch.float64))
    run = Run.of(study, seen, engine=Engine(dtype=torch.float64))
    for name, value in final_weights(run).items():
        assert torch.equal(state.ema[name], value)
    with refuses("no caption that could be left out"):
        next(steps(torch.nn.Linear(1, 1), study.forward(), image_folder(world / "train", 8), training))
