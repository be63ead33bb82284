"""LoRA training from files to exact attribution, and pictures drawn for prompts."""

import json
from dataclasses import replace

import diffusers
import pytest
import torch
from safetensors.torch import load_file

from agreement import close
from errors import refuses
from families import save_whole
from recipes import recipe_of
from test_cli import refused, succeeds
from test_encode import CAPTIONS, pictures
from whence import task_from_pretrained
from whence.data.images import image_folder
from whence.diffusion.draws import stratified
from whence.evaluation.ledger import Ledger
from whence.features.gradients import select
from whence.methods.metagradient import Metagradient
from whence.models import LORA_FILE, Lora, encode_images, open_model
from whence.models.encode import prompt_conditions
from whence.models.parts import Parts
from whence.models.sampling import Guidance, denoise
from whence.storage.scores import load_scores
from whence.training.loop import steps
from whence.training.recipe import NewLora, Recipe
from whence.training.runs import train_study
from whence.training.study import Study
from whence.types import Engine, from_plain

STEPS = recipe_of(steps=4, batch_size=3, learning_rate=1e-2, eps_root=1e-8, max_grad_norm=0.0, ema=0.5, seed=5)
OPTIONS = ("--rank", 2, "--max_train_steps", 4, "--train_batch_size", 3, "--checkpointing_steps", 2)
OPTIONS = (*OPTIONS, "--lr_warmup_steps", 0)
NAMES = ("sd", "sdxl", "sd3", "flux", "pixart", "dit", "ddpm with labels")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("tuning")
    for name in NAMES:
        save_whole(name, root / name)
    pictures(root / "train", CAPTIONS)
    pictures(root / "queries", ["a cat", "birds"], seed=1)
    return root


def lora_study(base, **settings):
    return Study(replace(STEPS, model=NewLora(base, **settings)))


def images_of(world, name, root):
    model = open_model(world / name)
    return encode_images(model, image_folder(world / "train", 4 if "ddpm" in name else 8), root)


@pytest.mark.parametrize("name", NAMES)
def test_a_lora_on_every_family_learns_and_nothing_else_does(name, world, tmp_path):
    """It starts as the base, moves A and B alone, and goes on where it was cut off to the same bytes."""
    study, seen = lora_study(world / name, rank=2), images_of(world, name, tmp_path)
    network, base = study.network_at(5), open_model(world / name).final.load()
    batch = seen.batch([0, 1])
    for net in (network.eval(), base.eval()):
        net.double()
    doubled = batch.to("cpu", torch.float64)
    forward, t = study.forward(), torch.tensor([3, 700])
    outs = [forward.predict(net, doubled.x0, t, doubled.cond) for net in (network, base)]
    close(*outs, 1e-9)
    assert all(".lora_" in n for n, p in network.named_parameters() if p.requires_grad)
    train_study(study, seen, tmp_path / "whole", 2)
    whole = load_file(tmp_path / "whole" / LORA_FILE)
    assert whole
    assert any(float(w.abs().max()) > 0 for n, w in whole.items() if "lora_B" in n)
    (tmp_path / "cut").mkdir()
    (tmp_path / "whole" / "checkpoint-2").rename(tmp_path / "cut" / "checkpoint-2")
    train_study(study, seen, tmp_path / "cut", 2)
    assert (tmp_path / "cut" / LORA_FILE).read_bytes() == (tmp_path / "whole" / LORA_FILE).read_bytes()
    tuned = open_model(world / name, Lora(tmp_path / "cut"))
    assert [point.step for point in tuned.checkpoints] == [2, 4]
    for point in (*tuned.checkpoints, tuned.final):
        chosen = select(point.load(), "trained")
        assert chosen == select(point.load(), "lora"), "what is opened asks for gradients where it was trained"
    out = tuned.forward.predict(tuned.final.load().eval().double(), doubled.x0, t, doubled.cond)
    assert not torch.allclose(out, outs[1])


def test_diffusers_loads_our_lora(world, tmp_path):
    study = lora_study(world / "sd", rank=2, alpha=3.0)
    train_study(study, images_of(world, "sd", tmp_path), tmp_path / "lora", 4)
    network = open_model(world / "sd").final.load()
    state, alphas, metadata = diffusers.StableDiffusionPipeline.lora_state_dict(
        tmp_path / "lora", return_lora_metadata=True
    )
    diffusers.StableDiffusionPipeline.load_lora_into_unet(state, alphas, network, metadata=metadata)
    ours = open_model(world / "sd", Lora(tmp_path / "lora")).final.load()
    x, t, text = torch.randn(1, 4, 4, 4), torch.tensor([100]), torch.randn(1, 5, 8)
    given = {"encoder_hidden_states": text, "return_dict": False}
    close(network(x, t, **given)[0], ours(x, t, **given)[0])


def test_metagradients_of_a_lora(world, tmp_path):
    """The derivative of the fine-tuning itself, from files; against a difference of two trainings."""
    lora = tmp_path / "lora"
    succeeds("train", "lora", "--train_data_dir", world / "train", "--output_dir", lora, *OPTIONS,
             "--pretrained_model_name_or_path", world / "sd", "--lr_warmup_steps", 0, "--learning_rate", 0.01)  # fmt: skip
    sides, root = (world / "train", world / "queries"), tmp_path / "run"
    task = task_from_pretrained(world / "sd", *sides, root, resolution=8, adapter=Lora(lora))
    assert isinstance(task.study.recipe.model, NewLora)
    method = Metagradient(draws=stratified(4))
    scores = method(task)
    from whence.training.unroll import Queries, Run, finite_difference

    exact = Engine(dtype=torch.float64)
    run = Run.of(task.study, task.train, engine=exact)
    ways = torch.eye(6)[:2] - 1 / 6  # what is left weighs as much as all did
    difference = finite_difference(run, Queries(task.queries, method.output, method.draws), ways)
    found = method(replace(task, engine=exact, root=tmp_path / "exact", trajectory=(_final(run, task),))).values
    torch.testing.assert_close(-found[:, :2], difference, rtol=1e-4, atol=1e-9)
    torch.testing.assert_close(found, scores.values, rtol=0.05, atol=1e-3 * float(found.abs().max()))
    other = task_from_pretrained(
        world / "sd", world / "queries", world / "queries", tmp_path / "b", resolution=8, adapter=Lora(lora)
    )
    with refuses("not known how this one was trained"):
        method(other)


def _final(run, task):
    from whence.training.unroll import final_weights

    network = task.trajectory[-1].load().double()
    network.load_state_dict(final_weights(run), strict=False)
    return replace(task.trajectory[-1], load=lambda: network, digest="exact")


def test_from_the_command_line_to_pictures_and_scores(world, tmp_path):
    lora, out, prompts = tmp_path / "lora", tmp_path / "run", tmp_path / "prompts.txt"
    prompts.write_text("a red cat\n\ntwo birds\n")
    base = ("--pretrained_model_name_or_path", world / "sd", "--train_data_dir", world / "train")
    succeeds("train", "lora", *base, "--output_dir", lora, *OPTIONS)
    command = ("attribute", world / "sd", "--lora", lora, "--train_data_dir", world / "train", "--output_dir", out)
    command = (*command, "--generate", 3, "--prompts", prompts, "--num_inference_steps", 2, "--parameters", "lora")
    succeeds(*command, "--resolution", 8, "--draws", 2, "--dim", 8, "--method", "d_trak", "--method", "metagradient")
    rows = [json.loads(line) for line in (out / "generated" / "metadata.jsonl").read_text().splitlines()]
    assert [row["text"] for row in rows] == ["a red cat", "two birds", "a red cat"]
    assert json.loads((out / "generated.json").read_text())["guidance"] == 7.5
    assert load_scores(out / "scores" / "metagradient").values.shape == (3, 6)
    assert "a red cat" in (out / "report.html").read_text()
    preview = (
        "preview",
        world / "sd",
        "--lora",
        lora,
        "--train_data_dir",
        world / "train",
        "--output_dir",
        tmp_path / "preview",
        "--resolution",
        8,
    )
    preview = (*preview, "--without", "id=0.png", "--generate", 2, "--num_inference_steps", 2)
    facts = json.loads(succeeds(*preview, "--prompts", prompts, "--retrain").out.splitlines()[0])
    assert min(facts["change"], facts["true_change"]) > 0
    refused(*preview, says="this model reads text: give --prompts FILE")
    refused(*command, "--resolution", 8, "--guidance_scale", 2, says="other pictures")
    refused("train", "lora", *base[2:], "--output_dir", tmp_path / "x", says="Missing option '--pretrained_model")
    refused(
        "train",
        "lora",
        *base,
        "--output_dir",
        tmp_path / "x",
        *OPTIONS,
        "--lora_targets",
        "nothing",
        says="match no Linear layer",
    )
    refused("train", "lora", *base, "--output_dir", tmp_path / "x", "--rank", 99, says="LoRA rank 99; accepted: 1 to")
    (tmp_path / "empty.txt").write_text("\n")
    plain = (
        "attribute",
        world / "sd",
        "--train_data_dir",
        world / "train",
        "--output_dir",
        tmp_path / "y",
        "--generate",
        1,
    )
    refused(*plain, "--prompts", tmp_path / "empty.txt", says="is empty; accepted: a text file with a prompt per line")
    refused(*plain, "--prompts", tmp_path / "none.txt", says="no such file")


def test_drawing_is_that_of_the_pipeline(world):
    """Stable Diffusion's own pipeline, from the same noise: DDIM and guidance."""
    from transformers import CLIPTextModel, CLIPTokenizer

    folder, engine = world / "sd", Engine()
    model, parts = open_model(folder), Parts(folder, engine)
    config = {k: v for k, v in model.scheduler.items() if k != "_class_name"} | {
        "steps_offset": 1
    }  # as the pipeline wants
    model = replace(model, scheduler=config)
    pipeline = diffusers.StableDiffusionPipeline(
        vae=diffusers.AutoencoderKL.from_pretrained(folder / "vae"),
        text_encoder=CLIPTextModel.from_pretrained(folder / "text_encoder"),
        tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        unet=model.final.load().eval(),
        scheduler=diffusers.DDIMScheduler.from_config(config),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    options = {"num_inference_steps": 4, "guidance_scale": 5.0, "latents": noise.clone(), "output_type": "latent"}
    theirs = pipeline("a red cat", height=8, width=8, **options).images
    cond, without = (prompt_conditions(model, parts, [text], 8) for text in ("a red cat", ""))
    guidance = Guidance(5.0, {name: value[0] for name, value in without.items()})
    ours = denoise(model.final.load().eval(), guidance.on(model), noise, 4, cond, engine, quiet=True)
    close(ours, theirs)


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_flow_models_are_walked_as_by_their_scheduler(name, world):
    model, parts = open_model(world / name), Parts(world / name, Engine())
    cond = prompt_conditions(model, parts, ["a dog"], 8)
    noise, net = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(1)), model.final.load().eval()
    config = {k: v for k, v in model.scheduler.items() if k != "_class_name"}
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(config)
    # Flux's pipeline tells its scheduler the noise levels.
    scheduler.set_timesteps(**({"sigmas": [1.0, 0.75, 0.5, 0.25]} if name == "flux" else {"num_inference_steps": 4}))
    x = noise
    with torch.no_grad():
        for t in scheduler.timesteps:
            x = scheduler.step(model.forward.predict(net, x, t[None], cond), t, x).prev_sample
    close(denoise(net, model, noise, 4, cond, Engine(), quiet=True), x)


def test_label_dropout_is_refused_where_it_is_not_switched_off(world):
    from whence.training.loop import steps

    seen = images_of(world, "dit", world / "seen")
    network = open_model(world / "dit").final.load()
    with refuses("LabelEmbedding drops labels at random; set its dropout_prob to 0"):
        next(iter(steps(network, open_model(world / "dit").forward, seen, STEPS)))


def test_a_ledger_retrains_a_lora(world, tmp_path):
    """From the command line to an LDS; a unit is the LoRA that training on its subset gives, alone or in company."""
    lora, out, ledger = tmp_path / "lora", tmp_path / "run", tmp_path / "ledger"
    train, resolution = ("--train_data_dir", world / "train"), ("--resolution", 8)
    base = ("--pretrained_model_name_or_path", world / "sd")
    succeeds(
        "train", "lora", *train, *base, "--output_dir", lora, *OPTIONS, "--learning_rate", 0.01, "--lr_warmup_steps", 0
    )
    plan = ("ledger", "plan", ledger, "--model", world / "sd", *train, "--test", 3, "--tune", 0, "--stack", 2)
    succeeds(*plan, "--lora", lora)
    succeeds("ledger", "run", ledger, *train)
    queries = world / "queries"
    succeeds("ledger", "measure", ledger, *train, "--query_data_dir", queries, "--draws", 4)
    attribute = ("attribute", world / "sd", "--lora", lora, *train, "--query_data_dir", queries, "--output_dir", out)
    succeeds(*attribute, *resolution, "--method", "d_trak", "--draws", 2, "--dim", 8, "--parameters", "lora")
    table = succeeds("lds", out, "--ledger", ledger, *train, warns="subsets say little").out
    assert "d_trak" in table
    assert "ceiling" in table
    study, seen = Study(_noted(ledger).on(world / "sd")), images_of(world, "sd", tmp_path)
    made = Ledger(ledger, seen, study)
    unit = next(unit for unit in made.units if unit.role == "test")
    mask = torch.from_numpy(made.masks[unit.subset]).float()
    *_, (state, _) = steps(study.network_at(unit.seed), study.forward(), seen, study.at(unit.seed), mask)
    network = made.load(unit)
    for name, p in network.named_parameters():
        if p.requires_grad:
            close(p, state.ema[name], 1e-3)
    other = (*plan[:2], tmp_path / "l", *plan[3:], "--lora")
    refused(*other, lora / "checkpoint-4", says="was not made by `whence train lora`")
    refused(*other, tmp_path, says="holds no LoRA weights")
    with refuses("planned for another study"):
        Ledger(ledger, seen, Study(replace(study.recipe, model=NewLora(world / "sd", 1))))
    with refuses("open it with its study"):
        Ledger(ledger, seen)


def _noted(ledger):
    return from_plain(json.loads((ledger / "plan.json").read_text())["study"]["recipe"], Recipe)
