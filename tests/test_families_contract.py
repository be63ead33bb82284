"""Every method on every family of models: tiny random pipelines on disk, opened, drawn from and trained as people do it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from agreement import close
from errors import refuses
from families import FAMILIES, save_whole
from recipes import pixel_study, recipe_of
from students import student_of
from test_encode import pictures
from whence import Task, task_from_pretrained
from whence.curvature.layers import Layer
from whence.data.images import image_folder, subset
from whence.diffusion import outputs
from whence.diffusion.draws import uniform
from whence.features.parts import Value
from whence.features.rows import rows
from whence.methods import METHODS, build, settings_of
from whence.methods.last_layer import Moments
from whence.models import NETWORKS, Lora, encode_images, open_model
from whence.models.parts import Parts
from whence.storage.files import write_json
from whence.task import Sampling, generated
from whence.training.recipe import NewLora
from whence.training.runs import train_study
from whence.training.study import Study
from whence.types import Checkpoint, Engine, Method, Scores
from worlds import encoder, loss_of_moments

LORA = "sd with a LoRA"
LORA_OF = {LORA: "sd"}
LAST_LAYERS = ("conv_out", "proj_out", "proj_out_2")
NAMES = ("ddpm", "sd", "sdxl", "dit", "pixart", "sd3", "flux", LORA)
CAPTIONS, PROMPTS = ["a red cat", "a dog", "a red cat"], ["a cat", "birds"]
TWIN = len(CAPTIONS)  # a second file with the picture and the caption of image 1
RECIPE = recipe_of(steps=2, batch_size=2, learning_rate=1e-2, eps_root=1e-8, max_grad_norm=0.0, seed=5)
TOLERANCE = 1e-4  # of the largest score: float32

# What tiny networks, and few seconds, need in place of a method's own settings.
SMALL: dict[str, Any] = {
    "draws": uniform(1), "dim": 8, "damping": 0.1, "count": 1, "segments": 1, "residual": 2, "top": 2, "masks": 2,
    "noises": 1, "by": "image",
}  # fmt: skip
LAST = r"^(conv_out|proj_out(_2)?)\.bias"
SMALL_OF_METHOD: dict[str, dict[str, Any]] = {
    "exact_influence": {"parameters": LAST},
    "influence_cg": {"parameters": LAST},
    "influence_lissa": {"parameters": LAST, "depth": 3},
    "ek_fac_refined": {"steps": 1},
    "further_training": {"steps": 2, "resample_draws": 2, "learning_rate": 1e-3},
    "guda": {"steps": 1},
    "block_trak": {"dim": 64},  # a column or more for every group
    "weighted_d_trak": {"dim": 64},
}
ENCODERS = {"clip_cosine": "clip", "dino_cosine": "dinov2", "abc_cosine": "abc"}


def trains(name: str) -> bool:
    return "training" in METHODS[name].needs


# What these do with a network they do through gradients and products that other methods take of every family: each on three.
SOLVERS = ("influence_cg", "influence_lissa", "exact_influence", "ek_fac_refined", "source", "das", "das_function")
SOLVERS = (
    *SOLVERS,
    "weighted_d_trak",
    "tracin_projected",
    "gas_layerwise",
    "further_training",
    "abu",
    "abu_ek_fac",
    "guda",
)


def tried(family: str, name: str) -> bool:
    if name not in SOLVERS:
        return True
    return (NAMES.index(family) + SOLVERS.index(name)) % len(NAMES) in (0, 3, 6)


CASES = [
    pytest.param(family, name, id=f"{family}-{name}")
    for family in NAMES
    for name in METHODS
    if name != "mucs"  # these networks have learned nothing that could be forgotten; `abu` measures as it does
    if family != "sd" or not trains(name)  # see the LoRA on it
    if tried(family, name)
    if name != "averaged_metagradient" or family in ("ddpm", LORA)  # metagradients of other trainings, on each above
]
# Each on one.
SOME = [("ddpm" if trains(name) else NAMES[at % len(NAMES)], name) for at, name in enumerate(METHODS) if name != "mucs"]
# Whose pictures meet in batches is a matter of the family and of what is measured, not of what becomes of the rows.
IN_BATCHES = [
    (family, name)
    for at, family in enumerate(NAMES)
    for name in ("trak", ("ek_fac", "journey_trak", "representation_cosine", "last_layer_ridge", "output_dot")[at % 5])
]
every_method = pytest.mark.parametrize(("family", "name"), CASES)
every_family = pytest.mark.parametrize("family", NAMES)


# ------------------------------------------------------------------------------------------------- families from files


@dataclass(frozen=True)
class World:
    """task: a pipeline and pictures that it drew; tuned: with what was trained here, the pipeline or a LoRA on it."""

    folder: Path
    task: Task
    tuned: Task
    first: dict[str, Scores] = field(default_factory=dict)

    def task_for(self, name: str) -> Task:
        return self.tuned if trains(name) else self.task

    def score(self, name: str) -> Scores:
        if name not in self.first:
            task = self.task_for(name)
            self.first[name] = method_of(name, task)(task)
        return self.first[name]


def make(family: str, root: Path) -> World:
    train = pictures(root / "train", CAPTIONS)
    lines = (train / "metadata.jsonl").read_text().splitlines()
    (train / f"{TWIN}.png").write_bytes((train / "1.png").read_bytes())
    (train / "metadata.jsonl").write_text("\n".join([*lines, lines[1].replace("1.png", f"{TWIN}.png")]))
    if family == "ddpm":
        network = {"_class_name": "UNet2DModel", **FAMILIES[family].config}
        train_study(pixel_study(network, RECIPE), image_folder(train, 4), root / "model", 2)
        task = drawn(family, root, root / "run", None)
        return World(root, task, task)
    model, base = save_whole(family, root / "model"), FAMILIES[family]
    base.network(1).save_pretrained(model / "checkpoint-1" / base.part)  # of a training that we know nothing else of
    write_json(model / "checkpoint-1" / "whence.json", {"rate": 0.1})
    seen = encode_images(open_model(model), image_folder(train, 8), root / "seen")
    train_study(Study(replace(RECIPE, model=NewLora(model, 2))), seen, root / "lora", 2)
    return World(
        root, drawn(family, root, root / "run", None), drawn(family, root, root / "tuned", Lora(root / "lora"))
    )


def drawn(family: str, root: Path, run: Path, adapter: Lora | None) -> Task:
    side, told = (4, None) if family == "ddpm" else (8, None if family == "dit" else PROMPTS)
    queries = generated(open_model(root / "model", adapter), run, Sampling(2, 3, 2, told, 2.0), Engine(), side)
    task = task_from_pretrained(root / "model", root / "train", queries, run, resolution=side, adapter=adapter)
    return replace(task, trajectory=tuple(map(read_once, task.trajectory)))


def read_once(point: Checkpoint) -> Checkpoint:
    """Opened once for all methods: one that changed the network would be seen in the scores of the next."""
    return replace(point, load=functools.cache(point.load))


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Callable[[str], World]:
    @functools.cache
    def find(family: str) -> World:
        if family == LORA:
            found = find("sd")
            return replace(found, task=found.tuned, first={})
        return make(family, tmp_path_factory.mktemp(family))

    return find


def method_of(name: str, task: Task) -> Method:
    wanted = {**SMALL, **SMALL_OF_METHOD.get(name, {})}
    if name in ENCODERS:
        wanted["encoder"] = encoder(ENCODERS[name])
    if name == "distilled":
        wanted["student"] = student_of(task, task.root / "student")
    if isinstance(task.study, Study) and isinstance(task.study.recipe.model, NewLora) and "parameters" not in wanted:
        wanted["parameters"] = "lora"
    accepted = settings_of(name)
    return build(name, task.forward, {key: value for key, value in wanted.items() if key in accepted})


def assert_same(found: Tensor, expected: Tensor) -> None:
    scale = float(expected.abs().max())
    torch.testing.assert_close(found / scale, expected / scale, rtol=0, atol=TOLERANCE)


# ------------------------------------------------------------------------------------------------- every method on each


@every_method
def test_scores_are_finite_and_a_twin_has_those_of_its_twin(world, family, name):
    """`Scores` refuses NaN and Inf. Methods that train meet the twins at other steps."""
    values = world(family).score(name).values
    assert values.shape == (2, len(CAPTIONS) + 1)
    assert float((values - values.mean(1, keepdim=True)).abs().max()) > 1e-4 * float(values.abs().max()) > 0
    if not trains(name):
        assert_same(values[:, TWIN], values[:, 1])


@pytest.mark.parametrize(("family", "name"), SOME)
def test_running_again_gives_the_same_bits(world, family, name):
    """From stored features."""
    task = world(family).task_for(name)
    assert torch.equal(method_of(name, task)(task).values, world(family).score(name).values)


@pytest.mark.parametrize(("family", "name"), IN_BATCHES)
def test_order_and_batches_change_nothing(world, family, name, tmp_path):
    """Everything computed anew. Without the twin: one that rounding makes a near twin adds to the rank of a Gram matrix,
    and so moves the unit of its damping."""
    task, order = world(family).task, [2, 0, 1]
    some = [
        replace(task, train=subset(task.train, rows), root=tmp_path / str(rows[0]), engine=Engine(batch_size=size))
        for rows, size in (([0, 1, 2], 16), (order, 2))
    ]
    first, second = (method_of(name, each)(each).values for each in some)
    assert_same(second, first[:, order])


def test_an_unknown_training_is_told_in_one_line(world):
    """By all methods that train again, before they look at the model; where the training is known, they run (above)."""
    task = replace(world("ddpm").task, study=None)
    for name in filter(trains, METHODS):
        with refuses(f"{name}", accepted="whence train") as error:
            method_of(name, task)(task)
        assert "\n" not in str(error.value)


def test_every_network_is_tried():
    assert {FAMILIES[family].kind for family in NAMES if family != LORA} | {"MLPDenoiser"} == NETWORKS.keys()


# ------------------------------------------------------------------------------------ what is easily wrong in a family


@every_family
def test_the_journey_ends_at_the_picture(world, family):
    """With its prompt, guidance and number: what the network sees clean at the last step is what was drawn, to 8 bits."""
    task = world(family).task
    assert task.sampled is not None
    timesteps = task.sampled.timesteps
    assert sorted(timesteps, reverse=True) == list(timesteps)
    last = task.sampled.predicted(timesteps[-1]).batch([0, 1])
    x0 = last.x0 if family == "ddpm" else Parts(world(family).folder / "model", Engine()).pictures(last.x0, 2)
    seen = getattr(task.queries, "pictures", task.queries).batch([0, 1]).x0
    assert float((seen - x0).abs().max()) < 1.01 / 255
    assert float((seen[0] - seen[1]).abs().max()) > 0.1
    own = task.queries.batch([0, 1]).cond
    assert own.keys() == last.cond.keys()
    assert all(torch.equal(own[name], last.cond[name]) for name in own)


@every_family
def test_pixels_are_those_of_the_pictures(world, family):
    """Where the network sees latents too, and in subsets."""
    task, side = world(family).task, 4 if family == "ddpm" else 8
    train = image_folder(world(family).folder / "train", side).batch(range(TWIN + 1)).x0.flatten(1)
    queries = image_folder(task.root / "generated", side).batch([0, 1]).x0.flatten(1)
    expected = F.cosine_similarity(queries[:, None], train[None], dim=2).double()
    close(world(family).score("pixel_cosine").values, expected)


@every_family
def test_moments_of_the_last_layer_give_the_loss_of_the_model(world, family):
    """f(theta) at the weights that the last layer has: with patches in their places and without a learned variance."""
    task = replace(world(family).task, engine=Engine(dtype=torch.float64))
    point, draws = task.trajectory[-1], uniform(2)
    net = point.load()
    found = [layer for name, layer in net.named_modules() if isinstance(layer, Layer) and name in LAST_LAYERS]
    theta = torch.cat([found[-1].weight.flatten(1).T, found[-1].bias[None]]).double().detach()
    if FAMILIES[LORA_OF.get(family, family)].learned_sigma:  # patches of 2 x 2 x (4 + 4)
        theta = theta.unflatten(1, (-1, 8))[:, :, :4].flatten(1)
    moments = rows(Moments(draws), task, point, task.train, "x").all().double()
    expected = rows(Value(outputs.loss, draws), task, point, task.train, "x").all()[:, 0].double()
    torch.testing.assert_close(loss_of_moments(theta, moments), expected, rtol=1e-9, atol=0)
