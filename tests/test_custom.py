"""Custom Diffusion: cross-attention, one new word and prior images, from files to exact attribution."""

import json
import shutil
from dataclasses import replace

import diffusers
import pytest
import torch
from safetensors.torch import load_file
from transformers import CLIPTextModel, CLIPTokenizer

from agreement import close
from errors import refuses
from families import save_whole
from recipes import changed, recipe_of
from test_cli import refused, succeeds
from test_encode import pictures
from whence import task_from_pretrained
from whence.data.images import image_folder
from whence.diffusion.draws import stratified
from whence.diffusion.outputs import loss
from whence.evaluation import designs
from whence.evaluation.ledger import Ledger
from whence.features.gradients import per_image_backward, per_image_vmap, select
from whence.methods.metagradient import Metagradient
from whence.models import CUSTOM_FILE, CustomDiffusion, Prior, encode_images, open_model, with_token
from whence.storage.scores import load_scores
from whence.training.loop import stacked_steps, steps
from whence.training.optimizer import start
from whence.training.order import draw, slots, with_prior_images
from whence.training.recipe import NewCustomDiffusion
from whence.training.runs import train_study
from whence.training.study import Study
from whence.training.unroll import Queries, Run, final_weights, finite_difference
from whence.types import Engine

STEPS = recipe_of(steps=4, batch_size=2, learning_rate=1e-2, eps_root=1e-8, max_grad_norm=0.0, ema=0.5, seed=5, prior=3)
OPTIONS = ("--initializer_token", "c", "--max_train_steps", 4, "--train_batch_size", 2,
           "--checkpointing_steps", 2, "--lr_warmup_steps", 0, "--learning_rate", 0.01)  # fmt: skip
EXACT = Engine(dtype=torch.float64)
ROW = "text_encoder.embeddings.token_embedding.modifier_token"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("custom")
    save_whole("sd", root / "sd")
    pictures(root / "train", ["a <new1> cat", "<new1> cat", "a red <new1> cat", "the <new1>", "<new1> in a hat"])
    pictures(root / "prior", ["a cat", "red cat", "cat"], seed=2)
    pictures(root / "queries", ["a <new1> cat", "birds"], seed=1)
    return root


def study_in(world, root, **changes):
    """The study, and the images it is trained on."""
    model = with_token(open_model(world / "sd"), "<new1>")
    seen, prior = (encode_images(model, image_folder(world / name, 8), root) for name in ("train", "prior"))
    model = NewCustomDiffusion(world / "sd", "<new1>", "c", 0.7)
    return Study(replace(changed(STEPS, **changes), model=model), Prior.of(prior)), seen


def test_only_cross_attention_and_the_new_word_are_trained(world, tmp_path):
    study, seen = study_in(world, tmp_path)
    network = study.network_at(5)
    trained = [name for name, p in network.named_parameters() if p.requires_grad]
    assert trained == select(network, "custom-diffusion")
    assert ROW in trained
    assert all(name == ROW or ".attn2.to_k." in name or ".attn2.to_v." in name for name in trained)
    base = CLIPTextModel.from_pretrained(world / "sd" / "text_encoder")
    before = base.get_input_embeddings().weight.detach()
    letter = CLIPTokenizer.from_pretrained(world / "sd" / "tokenizer")("c", add_special_tokens=False).input_ids
    assert torch.equal(network.word.modifier_token, before[letter[0]])
    train_study(study, seen, tmp_path / "custom", 2)
    after = open_model(world / "sd", CustomDiffusion(tmp_path / "custom")).final.load()
    assert select(after, "trained") == select(after, "custom-diffusion")
    assert torch.equal(after.word.table.weight, before)
    moved = {n for n, p in after.named_parameters() if not torch.equal(p, dict(network.named_parameters())[n])}
    assert moved == set(trained)


def test_the_loss_of_a_step_is_that_of_the_paper(world, tmp_path):
    """mean over instance images + weight * mean over prior images, in plain diffusers and transformers."""
    study, seen = study_in(world, tmp_path)
    images, weights = with_prior_images(study, seen)
    _, value = next(steps(study.network_at(5), study.forward(), images, STEPS, weights, engine=EXACT))
    unet = open_model(world / "sd").final.load().double()
    encoder = CLIPTextModel.from_pretrained(world / "sd" / "text_encoder").double().eval()
    tokenizer = CLIPTokenizer.from_pretrained(world / "sd" / "tokenizer")
    word = tokenizer("c", add_special_tokens=False).input_ids[0]
    assert tokenizer.add_tokens("<new1>") == 1
    encoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    table = encoder.get_input_embeddings().weight
    with torch.no_grad():
        table[-1] = table[word]
    chosen = slots(STEPS, torch.tensor(images.batch(range(len(images))).keys.tolist()), 0)
    assert (chosen.rows < 5).tolist() == [True, True, False, False]
    batch = images.batch(chosen.rows.tolist())
    at = draw([STEPS.seed], batch.keys, chosen.epochs, batch.x0.shape[1:], 1000, torch.float64)
    captions = [*image_folder(world / "train", 8).meta["text"], *image_folder(world / "prior", 8).meta["text"]]
    written = [captions[row] for row in chosen.rows.tolist()]
    ids = tokenizer(written, padding="max_length", max_length=12, return_tensors="pt").input_ids
    noised = diffusers.DDPMScheduler().add_noise(batch.x0.double(), at.noise, at.t)
    out = unet(noised, at.t, encoder_hidden_states=encoder(ids).last_hidden_state).sample
    each = (out - at.noise).square().flatten(1).mean(1).detach()
    assert value == pytest.approx(float(each[:2].mean() + 0.7 * each[2:].mean()), rel=1e-6)


def test_subsets_keep_the_weight_of_the_prior(world, tmp_path):
    """Half of the images at weight 1 train as those alone would, slot by slot; two at once as each by itself."""
    study, seen = study_in(world, tmp_path)
    masks = torch.tensor([[1.0, 0, 1, 0, 1], [1, 1, 1, 1, 0]])
    pairs = [with_prior_images(study, seen, mask) for mask in masks]
    assert [float(weights[-1]) for _, weights in pairs] == pytest.approx([0.7 * 0.6, 0.7 * 0.8])
    alone = []
    for images, weights in pairs:
        *_, (state, _) = steps(study.network_at(5), study.forward(), images, STEPS, weights, engine=EXACT)
        alone.append(state.weights)
    first = [start(study.network_at(5)).weights] * 2
    both = torch.stack([weights for _, weights in pairs])
    *_, (state, _) = stacked_steps(study.network_at(5), study.forward(), pairs[0][0], [STEPS] * 2, both, first, EXACT)
    for name, value in state.weights.items():
        torch.testing.assert_close(value, torch.stack([w[name] for w in alone]), rtol=1e-9, atol=1e-12)


def test_it_goes_on_to_the_same_bytes_and_diffusers_reads_it(world, tmp_path):
    study, seen = study_in(world, tmp_path)
    train_study(study, seen, tmp_path / "whole", 2)
    (tmp_path / "cut").mkdir()
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "cut" / "checkpoint-2")
    train_study(study, seen, tmp_path / "cut", 2)
    for name in (CUSTOM_FILE, "<new1>.safetensors", "prior.safetensors"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    ours = open_model(world / "sd", CustomDiffusion(tmp_path / "cut"))
    assert [point.step for point in ours.checkpoints] == [2, 4]
    folder = world / "sd"
    pipeline = diffusers.StableDiffusionPipeline(
        vae=diffusers.AutoencoderKL.from_pretrained(folder / "vae"),
        text_encoder=CLIPTextModel.from_pretrained(folder / "text_encoder"),
        tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        unet=open_model(folder).final.load().eval(), scheduler=diffusers.DDPMScheduler(),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipeline.unet.load_attn_procs(tmp_path / "cut", weight_name=CUSTOM_FILE, _pipeline=pipeline)
    pipeline.load_textual_inversion(tmp_path / "cut", weight_name="<new1>.safetensors")
    x, t = torch.randn(2, 4, 4, 4), torch.tensor([100, 500])
    text, _ = pipeline.encode_prompt(["a <new1> cat", "birds"], "cpu", 1, False)
    theirs = pipeline.unet(x, t, encoder_hidden_states=text).sample
    queries = encode_images(ours, image_folder(world / "queries", 8), tmp_path / "run").batch([0, 1])
    found = ours.forward.predict(ours.final.load().eval(), x, t, queries.cond)
    close(found, theirs)
    base = open_model(folder).final.load()(x, t, encoder_hidden_states=text).sample
    assert not torch.allclose(found, base, atol=1e-4)


def test_metagradients_through_it(world, tmp_path):
    """Against a difference of two trainings; from files; prior images have no column. Both backends of features agree."""
    study, seen = study_in(world, tmp_path)
    train_study(study, seen, tmp_path / "custom", 4)
    sides = (world / "train", world / "queries")
    task = task_from_pretrained(
        world / "sd", *sides, tmp_path / "run", adapter=CustomDiffusion(tmp_path / "custom"), engine=EXACT
    )
    assert isinstance(task.study.recipe.model, NewCustomDiffusion)
    run = Run.of(task.study, task.train, engine=EXACT)
    ways = torch.eye(8)[[0, 3]] - torch.tensor([0.2] * 5 + [0.0] * 3)  # what is left weighs as much as all did
    difference = finite_difference(run, Queries(task.queries, loss, stratified(4)), ways)
    network = task.trajectory[-1].load().double()
    network.load_state_dict(final_weights(run), strict=False)
    exact = replace(task.trajectory[-1], load=lambda: network, digest="exact")
    found = Metagradient(draws=stratified(4))(replace(task, trajectory=(exact,))).values
    assert found.shape == (2, 5)
    torch.testing.assert_close(-found[:, [0, 3]], difference, rtol=1e-4, atol=1e-9)
    batch = task.train.batch([0, 1]).to("cpu", torch.float64)
    names = select(network, "custom-diffusion")
    rows = [f(network, task.forward, loss, stratified(4), batch, names) for f in (per_image_vmap, per_image_backward)]
    for name in names:
        torch.testing.assert_close(rows[0][name], rows[1][name], rtol=1e-8, atol=1e-12)
    assert float(rows[0][ROW].abs().max()) > 0


def test_a_ledger_retrains_it(world, tmp_path):
    """Each unit is the training of its subset with all prior images; the plan alone does not know the base."""
    study, seen = study_in(world, tmp_path)
    subsets = designs.fixed(5, 2, 0.6, [5], "test", seed=0)
    ledger = Ledger.plan(tmp_path / "ledger", study, seen, subsets, 2)
    ledger.run()
    masks = torch.from_numpy(ledger.masks).float()
    images, weights = with_prior_images(study, seen, masks[0])
    *_, (state, _) = steps(study.network_at(5), study.forward(), images, STEPS, weights)
    found = dict(ledger.load(ledger.units[0]).named_parameters())
    for name, value in state.ema.items():
        close(found[name], value, 1e-3)
    ledger.measure("loss", seen, loss, stratified(4))
    assert ledger.table("loss").values.shape == (2, 5, 4)
    with refuses("a NewCustomDiffusion on a pipeline; open it with its study"):
        Ledger(tmp_path / "ledger", seen)
    other = replace(study.recipe.model, prior_loss_weight=0.5)
    with refuses("another study (recipe.model.prior_loss_weight: found 0.5, expected 0.7"):
        Ledger(tmp_path / "ledger", seen, replace(study, recipe=replace(study.recipe, model=other)))


def test_from_the_command_line(world, tmp_path):
    custom, out, prompts = tmp_path / "custom", tmp_path / "run", tmp_path / "prompts.txt"
    prompts.write_text("a <new1> cat\na cat\n")
    base = ("--pretrained_model_name_or_path", world / "sd", "--train_data_dir", world / "train")
    succeeds("train", "custom", *base, "--output_dir", custom, *OPTIONS, "--prior_data_dir", world / "prior")
    assert load_file(custom / "<new1>.safetensors")["<new1>"].shape == (8,)
    command = ("attribute", world / "sd", "--custom_diffusion", custom, "--train_data_dir", world / "train")
    command = (*command, "--output_dir", out, "--generate", 2, "--prompts", prompts, "--num_inference_steps", 3)
    command = (*command, "--parameters", "custom-diffusion", "--draws", 4, "--dim", 16)
    succeeds(*command, "--method", "d_trak", "--method", "metagradient")
    rows = [json.loads(line) for line in (out / "generated" / "metadata.jsonl").read_text().splitlines()]
    assert [row["text"] for row in rows] == ["a <new1> cat", "a cat"]
    assert load_scores(out / "scores" / "metagradient").values.shape == (2, 5)
    preview = (
        "preview",
        world / "sd",
        "--custom_diffusion",
        custom,
        "--train_data_dir",
        world / "train",
        "--output_dir",
        tmp_path / "preview",
    )
    preview = (*preview, "--without", "id=0.png", "--generate", 2, "--num_inference_steps", 3)
    facts = json.loads(succeeds(*preview, "--prompts", prompts, "--retrain").out.splitlines()[0])
    assert min(facts["change"], facts["true_change"]) > 0
    ledger, train = tmp_path / "ledger", ("--train_data_dir", world / "train")
    plan = ("ledger", "plan", ledger, "--model", world / "sd", *train, "--test", 4, "--tune", 0)
    succeeds(*plan, "--custom_diffusion", custom)
    succeeds("ledger", "run", ledger, *train)
    succeeds("ledger", "measure", ledger, *train, "--query_data_dir", out / "generated", "--draws", 4)
    assert "metagradient" in succeeds("lds", out, "--ledger", ledger, *train, warns="subsets say little").out
    refused(
        *plan[:2],
        tmp_path / "l",
        *plan[3:],
        "--custom_diffusion",
        out,
        says="holds no pytorch_custom_diffusion_weights",
    )


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--modifier_token", "a"), "modifier token 'a' is a token of .* already"),
        (("--modifier_token", "<new2>"), "its caption lacks the modifier token '<new2>'"),
        (("--modifier_token", "a/b"), "accepted: a word like <new1>"),
        (("--initializer_token", "ktn"), r"initializer token 'ktn' is 3 tokens here \(k, t, n</w>\)"),
        (("--prior_data_dir", "nowhere"), "nowhere"),
    ],
)
def test_bad_input_is_one_line(options, says, world, tmp_path):
    base = ("--pretrained_model_name_or_path", world / "sd", "--train_data_dir", world / "train")
    refused("train", "custom", *base, "--output_dir", tmp_path / "x", *OPTIONS, *options, says=says)


@pytest.mark.parametrize("name", ["sdxl", "ddpm"])
def test_other_networks_are_one_line(name, world, tmp_path):
    save_whole(name, tmp_path / name)
    base = ("--pretrained_model_name_or_path", tmp_path / name, "--train_data_dir", world / "train")
    refused(
        "train",
        "custom",
        *base,
        "--output_dir",
        tmp_path / "x",
        *OPTIONS,
        says="one CLIP text encoder .*this is a UNet2D",
    )


@pytest.mark.parametrize("part", ["text_encoder", "tokenizer"])
def test_missing_parts_are_one_line(part, world, tmp_path):
    shutil.copytree(world / "sd", tmp_path / "sd")
    shutil.rmtree(tmp_path / "sd" / part)
    base = ("--pretrained_model_name_or_path", tmp_path / "sd", "--train_data_dir", world / "train")
    refused("train", "custom", *base, "--output_dir", tmp_path / "x", *OPTIONS, says=f"{part}/ is missing")


def test_a_folder_that_holds_none_is_one_line(world, tmp_path):
    (tmp_path / "pytorch_custom_diffusion_weights.bin").write_bytes(b"x")
    with refuses("a pickle, which whence never opens"):
        open_model(world / "sd", CustomDiffusion(tmp_path))
