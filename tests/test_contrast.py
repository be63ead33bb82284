"""Narrower questions: a region, a window of timesteps, and why this picture rather than that one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from agreement import close
from errors import refuses
from families import save_whole
from test_cli import TRAINING, World, noise, refused, succeeds, whence
from test_encode import pictures
from whence.curvature.exact import GaussNewton
from whence.data.masks import Mask, read_mask
from whence.data.saving import save_png
from whence.diffusion import outputs
from whence.diffusion.direction import direction, predicted_clean
from whence.diffusion.draws import (
    Draws,
    Grid,
    LogitNormal,
    OneDraw,
    Quantiles,
    Repeated,
    Steps,
    cumulative,
    fixed,
    stratified,
    uniform,
)
from whence.diffusion.draws import random as random_steps
from whence.diffusion.forward import Classifier, Denoiser, FlowMatching, linear_schedule
from whence.diffusion.outputs import Output, region
from whence.diffusion.window import Window, within
from whence.evaluation.contrast import check_contrastable, contrasted, drawn_apart
from whence.methods import METHODS, settings_of
from whence.methods.curvature import ek_fac
from whence.methods.influence import exact_influence
from whence.methods.inner_product import FeatureMethod, InnerProduct
from whence.methods.question import Question, linear_in_query
from whence.methods.tracin import gradient_dot
from whence.storage.scores import load_scores, save_scores
from whence.types import Batch, Draw, Method, Scores, Task, describe, from_plain
from worlds import DRAWS, linear_world, tensors

G = torch.Generator().manual_seed(0)
P, Y = torch.randn(2, 5, 2, 4, 4, generator=G, dtype=torch.float64)
LEFT = torch.zeros(4, 4, dtype=torch.float64)
LEFT[:, :1] = 1.0
LEFT[0, 1] = 0.25
ADDITIVE = [output for output in outputs.DENOISER if output.element is not None]


# --------------------------------------------------------------------------------------------------------- the region


def test_what_adds_up_over_elements_has_regions():
    assert {output.name for output in ADDITIVE} == {"loss", "elbo", "weighted", "squared_norm", "mean", "l1"}


@pytest.mark.parametrize("output", ADDITIVE, ids=lambda output: output.name)
def test_a_region_is_the_mean_under_the_mask(output):
    """All of the picture is the plain output, and a region and its complement make it up by their shares."""
    plain, share = output.value(P, Y), float(LEFT.mean())
    np.testing.assert_allclose(region(output, torch.ones(4, 4)).value(P, Y), plain, rtol=1e-12)
    inside, outside = (region(output, mask) for mask in (LEFT, 1 - LEFT))
    both = share * inside.value(P, Y) + (1 - share) * outside.value(P, Y)
    np.testing.assert_allclose(both, plain, rtol=1e-12)
    assert (inside.better, inside.weight, inside.target) == (output.better, output.weight, output.target)


def test_a_region_of_the_loss_in_plain_numbers():
    expected = (LEFT * (P - Y) ** 2).sum((1, 2, 3)) / (2 * LEFT.sum())
    np.testing.assert_allclose(region(outputs.loss, LEFT).value(P, Y), expected, rtol=1e-12)


def test_a_region_is_a_value_known_by_its_mask():
    a, b, other = region(outputs.loss, LEFT), region(outputs.loss, LEFT.clone().float()), region(outputs.loss, 1 - LEFT)
    assert a == b
    assert hash(a) == hash(b)
    assert a != other
    assert describe(a) == a.name
    assert describe(a) != describe(other)
    assert describe(a) != describe(region(outputs.mean, LEFT))
    assert len(repr(a)) < 1000, "the mask itself is no part of what is printed"
    with refuses("'loss in region", accepted="region(output, mask)"):
        Output.named(a.name)


@pytest.mark.parametrize("output", [o for o in outputs.OUTPUTS.values() if o not in ADDITIVE], ids=lambda o: o.name)
def test_outputs_without_regions_are_refused(output):
    with refuses(f"'{output.name}'", "region", "denoiser" if output.models == "classifier" else "loss, elbo, weighted"):
        region(output, LEFT)


def test_masks_that_say_nothing_are_refused():
    with refuses("black everywhere", "mask"):
        region(outputs.loss, torch.zeros(4, 4))
    for bad in (LEFT - 0.1, LEFT + 0.1, LEFT * torch.nan):
        with refuses("not all from 0 to 1", "mask"):
            region(outputs.loss, bad)
    for shape in ((4, 5), (2, 4), (1, 4), (5, 2, 4, 4)):
        with refuses(f"a mask of {list(shape)} for predictions of [2, 4, 4]", "region"):
            region(outputs.loss, torch.ones(shape)).value(P, Y)


# ------------------------------------------------------------------------------------------------------ files of masks


def drawn(folder: Path, pixels: object, mode: str | None = None) -> Path:
    Image.fromarray(np.asarray(pixels, np.uint8), mode).save(folder / "mask.png")
    return folder / "mask.png"


def test_a_mask_is_averaged_over_areas(tmp_path):
    """Finer or coarser than the network, whole steps or not, it keeps its share; of the network's own size, every value."""
    pixels = np.zeros((6, 6), np.uint8)
    pixels[:3, :4] = 255
    mask = read_mask(drawn(tmp_path, pixels))
    np.testing.assert_array_equal(mask.at((3, 6, 6)), pixels / 255)
    np.testing.assert_allclose(mask.at((1, 2, 2)), [[1, 1 / 3], [0, 0]], atol=1e-15)
    expected = [[1, 1, 2 / 3, 0], [1, 1, 2 / 3, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    np.testing.assert_allclose(mask.at((1, 4, 4)), expected, atol=1e-15)
    for side in (1, 4, 5, 7, 12):
        assert float(mask.at((1, side, side)).mean()) == pytest.approx(1 / 3, rel=1e-12)
    assert mask.share == pytest.approx(1 / 3)


def test_masks_that_are_none_are_refused(tmp_path):
    with refuses("no such file", "none.png", "white"):
        read_mask(tmp_path / "none.png")
    with refuses("black everywhere", "mask.png", ""):
        read_mask(drawn(tmp_path, np.zeros((4, 4))))
    colour = np.full((4, 4, 3), 255)
    colour[0, 0, 1] = 0
    with refuses("colours", "mask.png", "grey"):
        read_mask(drawn(tmp_path, colour))
    with refuses("transparent", "mask.png", "grey"):
        read_mask(drawn(tmp_path, np.full((4, 4, 4), 255)))
    (tmp_path / "text.png").write_text("no picture")
    with refuses("not a readable image"):
        read_mask(tmp_path / "text.png")
    wide = read_mask(drawn(tmp_path, np.full((4, 6), 255)))
    with refuses("6x4, but the network sees pictures of 8x8", "mask.png", "same aspect"):
        wide.at((3, 8, 8))


# ------------------------------------------------------------------------------------------ regions, as methods ask them


@pytest.fixture(scope="module")
def task(tmp_path_factory) -> Task:
    return linear_world(n=40, m=3, dim=6).task(tmp_path_factory.mktemp("linear"))


GRADIENTS = (
    "gradient_dot",
    "gradient_cosine",
    "tracin",
    "tracin_projected",
    "tracin_last_layer",
    "gas",
    "gas_layerwise",
)
GRADIENTS += (
    "relatif_theta",
    "relatif_loss",
    "renormalized_influence",
    "ek_fac",
    "trak",
    "d_trak",
    "block_trak",
    "das",
)
GRADIENTS += ("further_training",)
HALF = torch.tensor([1.0, 1.0, 0.25, 0.0, 0.0, 0.0])


def method(name: str) -> Method:
    wanted = {"draws": DRAWS, "dim": None, "damping": 0.1, "tolerance": 1e-12}
    if name == "further_training":
        wanted |= {"steps": 3, "masks": 2, "learning_rate": 1e-3}
    if name == "influence_lissa":
        wanted["depth"] = 20
    return METHODS[name].make(**{key: value for key, value in wanted.items() if key in settings_of(name)})


def under(asked: Method, mask: Tensor) -> Method:
    return asked.narrowed(lambda output: region(output, mask), lambda draws: draws)


@pytest.mark.parametrize("name", GRADIENTS)
def test_scores_of_regions_add_up_where_scores_are_linear(name, task):
    """All of the picture: the plain scores. A mask and its complement: the plain ones, each by its share, for all methods
    that say that they are linear in what is measured, and for no others."""
    plain, share = method(name)(task).values, float(HALF.mean())
    close(under(method(name), torch.ones(6))(task).values, plain, 1e-10)
    inside, outside = (under(method(name), mask)(task).values for mask in (HALF, 1 - HALF))
    largest = float(plain.abs().max())
    apart = float((share * inside + (1 - share) * outside - plain).abs().max()) / largest
    assert apart < 1e-10 or apart > 1e-3
    assert linear_in_query(method(name)) == (apart < 1e-10)
    assert float((inside - plain).abs().max()) > 1e-3 * largest


def test_the_training_side_stays_as_it_is(task):
    asked = under(method("d_trak"), HALF)
    assert isinstance(asked, InnerProduct)
    assert asked.train == method("d_trak").train
    assert describe(asked)["query"]["output"].startswith("squared_norm in region ")
    scores = asked(task)
    assert scores.recipe["method"] == describe(asked)


def test_a_region_finds_the_image_that_made_it(tmp_path):
    """The query is one training image on the left and another on the right: each half finds its own."""
    world = linear_world(n=40, m=1, dim=6)
    x0 = world.train.x0.clone()
    x0[:, 3:] *= 0.2
    x0[7] = torch.tensor([4.0, -4, 4, 0, 0, 0])
    x0[23] = torch.tensor([0.0, 0, 0, -4, 4, 4])
    query = x0[7] + x0[23]
    train = tensors(x0, "train")
    found = replace(world.task(tmp_path), train=train, queries=tensors(query[None], "query"))
    asked = gradient_dot(draws=DRAWS, dim=None)
    left = torch.tensor([1.0, 1, 1, 0, 0, 0])
    assert under(asked, left)(found).top(0, 1)[0][0] == train.ids[7]
    assert under(asked, 1 - left)(found).top(0, 1)[0][0] == train.ids[23]


# --------------------------------------------------------------------------------------------------- a window of steps

KEYS = torch.arange(500)
RULES = [uniform(8), stratified(8), random_steps(8), cumulative(8), Draws(Repeated(Grid(4), 2))]


@pytest.mark.parametrize("draws", RULES, ids=lambda draws: type(draws.timesteps).__name__)
def test_a_window_keeps_the_count_and_nothing_outside(draws):
    inside = within(draws, 20, 60)(KEYS, (2,), 100)
    assert inside.t.shape == (500, draws.count)
    assert int(inside.t.min()) >= 20
    assert int(inside.t.max()) < 60
    plain = draws(KEYS, (2,), 100)
    assert torch.equal(inside.noise, plain.noise), "the noises of the method's own draws"
    assert torch.equal(within(draws, 0, 100)(KEYS, (2,), 100).t, plain.t), "all of the schedule"


def test_strata_lie_in_the_window():
    t = within(stratified(8, shared=False), 20, 60)(KEYS, (2,), 100).t
    assert ((t - 20) // 5 == torch.arange(8)).all()
    assert len(t[:, 0].unique()) == 5


def test_a_window_is_recorded():
    draws = within(stratified(8, seed=3), 20, 60)
    assert from_plain(describe(draws)) == draws
    assert describe(draws)["timesteps"]["low"] == 20
    assert draws.with_count(4).timesteps == Window(stratified(4).timesteps, 20, 60)


def test_windows_that_hold_nothing_are_refused():
    for low, high in ((5, 5), (6, 5), (-1, 5)):
        with refuses("holds no timestep", "timesteps", "LOW < HIGH"):
            within(uniform(4), low, high)
    with refuses("20-101 of a schedule of 100", "timesteps", "HIGH <= 100"):
        within(uniform(4), 20, 101)(KEYS, (2,), 100)
    with refuses("hold no 8 different ones", "timesteps", "fewer draws"):
        within(cumulative(8), 20, 27)


NOT_RESTRICTED = [fixed(30, 4), Draws(Steps((1, 2))), Draws(Quantiles(4, LogitNormal())), OneDraw(uniform(4), 0)]
NOT_RESTRICTED += [Draws(Repeated(Steps((1, 2)), 2))]


@pytest.mark.parametrize("draws", NOT_RESTRICTED, ids=lambda draws: str(describe(draws))[:60])
def test_rules_that_name_their_steps_are_refused(draws):
    with refuses("cannot be restricted to a window", "timesteps"):
        within(draws, 0, 50)


def test_scores_of_windows_add_up(task):
    """A grid of one draw at each step: the windows of the first two steps and of the other four make up the whole."""
    asked = gradient_dot(draws=Draws(Grid(6), seed=5), dim=None)
    plain = asked(task).values
    parts = []
    for low, high in ((0, 2), (2, 6)):
        count = high - low
        own = replace(asked, query=replace(asked.train, draws=Draws(Steps(tuple(range(low, high))), seed=5)))
        parts.append(own(task).values * count / 6)
        window = asked.narrowed(lambda output: output, lambda draws, low=low, high=high: within(draws, low, high))
        assert isinstance(window, InnerProduct)
        assert window.train == asked.train
        t = window.query.draws(KEYS[:1], (6,), 6).t[0]
        assert {*t.tolist()} == {*range(low, high)}
        assert float((window(task).values - plain).abs().max()) > 1e-3 * float(plain.abs().max())
    # Noise of draw s: the first window's steps see noises 0 and 1 as in the plain grid, the second's others.
    first = asked.narrowed(lambda output: output, lambda draws: within(draws.with_count(2), 0, 2))
    close(first(task).values, parts[0] * 3, 1e-12)


# ------------------------------------------------------------------------------------------------------- the question


METRIC = ("metagradient", "averaged_metagradient", "further_training", "retrac", "diffusion_tracin")
WHITE = Mask("white", torch.full((2, 2), 255, dtype=torch.uint8))
OWN_WAY = {"nda", "last_layer_ridge", "source", "journey_trak", "weighted_d_trak", "das_function"}
OWN_WAY |= {"diffusion_tracin", "retrac", "montrage_style"}
PICTURES = {name for name in METHODS if METHODS[name].pictures_alone or name.startswith("representation_")}
NO_REGION = {"output_dot", "output_cosine"}  # their outputs are random directions of the prediction


WITH_A_FOLDER = ("clip_cosine", "dino_cosine", "abc_cosine", "distilled")


@pytest.mark.parametrize("name", [name for name in METHODS if name not in WITH_A_FOLDER])
@pytest.mark.parametrize("question", [Question(WHITE), Question(timesteps=(0, 3))], ids=["region", "window"])
def test_every_method_answers_or_refuses(name, question, task):
    asked = method(name) if name not in METRIC else METHODS[name].make()
    if name in OWN_WAY | PICTURES or (name in NO_REGION and question.mask is not None):
        with refuses("no sum over" if name in NO_REGION else name, accepted="loss" if name in NO_REGION else "d_trak"):
            question.asked(name, asked, task.forward, (1, 4, 4))
        return
    found = question.asked(name, asked, task.forward, (1, 4, 4))
    assert found != asked
    query = found.query if isinstance(found, InnerProduct) else found
    assert ("region" in str(describe(query))) == (question.mask is not None)
    assert ("Window" in str(describe(query))) == (question.timesteps is not None)
    if isinstance(found, InnerProduct):
        assert found.train == asked.train


def test_questions_that_do_not_apply_are_refused(task):
    asked = ek_fac(draws=uniform(4))
    with refuses("classifier", "mask", "denoiser"):
        Question(WHITE).asked("ek_fac", asked, Classifier(), (1, 4, 4))
    with refuses("0-7 of a schedule of 6", "timesteps"):
        Question(timesteps=(0, 7)).asked("ek_fac", asked, task.forward, (1, 4, 4))
    with refuses("2x2, but the network sees pictures of 5x4", "mask", "aspect"):
        Question(WHITE).asked("ek_fac", asked, task.forward, (1, 4, 5))
    with refuses("all timesteps together", "timesteps"):
        whole = ek_fac(outputs.log_likelihood, draws=uniform(4))
        Question(timesteps=(0, 3)).asked("ek_fac", whole, task.forward, (1, 4, 4))


# ------------------------------------------------------------------------------------------- a direction of an encoder


FORWARDS = [Denoiser(linear_schedule(10).double(), kind) for kind in ("epsilon", "v_prediction", "sample")]
FORWARDS += [FlowMatching(torch.linspace(0.1, 1, 10).double()), FlowMatching(torch.linspace(0.1, 1, 10).double(), True)]


@pytest.mark.parametrize("forward", FORWARDS, ids=lambda f: f"{type(f).__name__}-{f.prediction_type}")
def test_the_predicted_clean_picture(forward):
    """What x_t = a x0 + s eps gives for x0 where the network's output stands for eps, v, x0 or eps - x0."""
    x0, noise, made = torch.randn(3, 10, 1, 2, 2, generator=G, dtype=torch.float64)
    t = torch.arange(10)
    seen = []

    def network(x_t: Tensor, t: Tensor) -> Tensor:
        seen.append(x_t)
        return made

    found = predicted_clean(forward, network, Batch(x0, t), Draw(t, noise))
    (x_t,) = seen
    if isinstance(forward, FlowMatching):
        expected = x_t - forward.sigmas[:, None, None, None] * made  # preconditioned outputs are taken off likewise
    else:
        a, s = (v[:, None, None, None] for v in (forward.alphas_cumprod.sqrt(), (1 - forward.alphas_cumprod).sqrt()))
        kind = forward.prediction_type
        expected = {"epsilon": (x_t - s * made) / a, "v_prediction": a * x_t - s * made, "sample": made}[kind]
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)


def curved(x0: Tensor) -> Tensor:
    """An encoder of vectors."""
    return torch.stack([x0.sum(1), (x0[:, :3] ** 2).sum(1), torch.tanh(x0[:, 0])], 1)


def test_a_direction_predicts_removal(tmp_path):
    """Correlation above 0.98 with what retraining without each image takes from <E(x0_hat), u>: sign and scale."""
    world = linear_world(n=60, m=4, dim=6, seed=3)
    task = world.task(tmp_path)
    towards = direction(curved, "1", world.train.x0[0], world.train.x0[1])
    asked = replace(exact_influence(draws=DRAWS), precondition=GaussNewton(world.damping, absolute=True))
    scores = asked.narrowed(lambda output: towards, lambda draws: draws)(task)
    assert describe(scores.recipe)["method"]["query"]["output"]["whole"] == towards.name

    def measured(weight: Tensor) -> np.ndarray:
        """f of each query at these weights, u found apart."""
        x0, count = world.queries.x0, DRAWS.count
        draw = DRAWS(world.queries.batch(range(len(x0))).keys, (6,), 6, torch.float64)
        bar = world.forward.alphas_cumprod[draw.t][..., None]
        x_t = bar.sqrt() * x0[:, None] + (1 - bar).sqrt() * draw.noise
        made = torch.einsum("mcab,mcb->mca", weight[draw.t], x_t)
        clean = (x_t - (1 - bar).sqrt() * made) / bar.sqrt()
        u = curved(world.train.x0[:1])[0] - curved(world.train.x0[1:2])[0]
        return (curved(clean.flatten(0, 1)) @ (u / u.norm())).view(len(x0), count).mean(1).numpy()

    fall = measured(world.fit()) - np.stack([measured(world.fit(mask)) for mask in ~np.eye(60, dtype=bool)])
    assert np.corrcoef(scores.values.flatten(), fall.T.flatten())[0, 1] > 0.98
    slope = np.vdot(scores.values, fall.T) / np.vdot(fall, fall)
    assert 0.7 < slope < 1.1


def test_directions_that_are_none_are_refused(task):
    x0 = task.train.batch([0, 1]).x0
    with refuses("the same to the encoder", "direction"):
        direction(curved, "1", x0[0], x0[0])
    with refuses("digest is empty", "direction"):
        direction(curved, "", x0[0], x0[1])
    with refuses("which clean picture", "direction", "Denoiser"):
        predicted_clean(Classifier(), lambda x: x, Batch(x0, torch.zeros(2)), Draw(torch.zeros(2).long(), x0))
    assert direction(curved, "1", x0[0], x0[1]) != direction(curved, "1", x0[1], x0[0])
    assert direction(curved, "1", x0[0], x0[1]) != direction(curved, "2", x0[0], x0[1])


# --------------------------------------------------------------------------------------------- this rather than that


def three(rows: Tensor) -> Tensor:
    """Of two queries and of the difference of what is measured of them."""
    return torch.stack([rows[0], rows[1], rows[0] - rows[1]])


# Without those held against regions, and those that forget, which have no rows of queries; weighted_d_trak has nothing to
# weigh in a network of one group of parameters.
ELSEWHERE = {*GRADIENTS, "nda", "weighted_d_trak", "abu", "abu_ek_fac", "mucs", "guda", "montrage_style"}
WITHOUT = {"encoder", "student", "training", "journey", "checkpoints"}
FEATURES = [name for name in METHODS if name not in ELSEWHERE and not WITHOUT & {*METHODS[name].needs}]


@pytest.mark.parametrize("name", FEATURES)
def test_methods_say_rightly_whether_they_are_linear(name, task, monkeypatch):
    """Held against their scores of a query whose row is the difference of two others'."""
    asked = method(name)
    own = FeatureMethod.queries
    monkeypatch.setattr(FeatureMethod, "queries", lambda *given: three(own(*given)))
    values = asked(task).values
    apart = float((values[0] - values[1] - values[2]).abs().max() / values.abs().max())
    assert apart < 1e-6 or apart > 1e-3  # iterations stop somewhere
    assert linear_in_query(asked) == (apart < 1e-6)


def test_unit_draws_are_not_linear():
    assert linear_in_query(METHODS["das"].make(unit=False))
    assert not linear_in_query(METHODS["das"].make(unit=True))
    assert not linear_in_query(METHODS["retrac"].make())
    assert linear_in_query(METHODS["diffusion_tracin"].make())
    assert not linear_in_query(METHODS["das"].make(unit=False, square=True))
    assert not linear_in_query(METHODS["weighted_d_trak"].make())
    assert not linear_in_query(lambda task: task), "who says nothing"


@pytest.mark.parametrize(
    "name", ["metagradient", "averaged_metagradient", "further_training", "source", "journey_trak"]
)
def test_derivatives_are_linear(name):
    assert linear_in_query(METHODS[name].make())


VALUES = torch.tensor([[5.0, 1.0, -2.0], [2.0, 4.0, -1.0]], dtype=torch.float64)
STDERR = torch.tensor([[3.0, 0.0, 6.0], [4.0, 0.0, 8.0]], dtype=torch.float64)


def scores_of(**changes: object) -> Scores:
    return replace(Scores(VALUES, ["a", "b"], ["x", "y", "z"], {"whence": "test"}), **changes)


def test_the_difference_of_two_rows():
    found = contrasted(scores_of(), "a", "b")
    assert found.query_ids == ["a rather than b"]
    assert found.values.tolist() == [[3.0, -3.0, -1.0]]
    assert found.stderr is None
    assert contrasted(scores_of(), "b", "a").values.tolist() == [[-3.0, 3.0, 1.0]]
    assert found.recipe == {"whence": "test", "contrast": {"this": "a", "not_that": "b"}}


def test_errors_of_the_difference():
    stated = scores_of(stderr=STDERR, stderr_of="draws")
    apart, together = (contrasted(stated, "a", "b", independent) for independent in (True, False))
    assert apart.stderr.tolist() == [[5.0, 0.0, 10.0]]
    assert together.stderr.tolist() == [[7.0, 0.0, 14.0]]
    assert apart.recipe["contrast"]["stderr"] != together.recipe["contrast"]["stderr"]
    assert apart.stderr_of == "draws"


def test_which_errors_are_independent():
    stated = scores_of(stderr=STDERR, stderr_of="draws", recipe={"method": describe(gradient_dot(draws=DRAWS))})
    assert drawn_apart(stated, same_picture=False)
    assert not drawn_apart(stated, same_picture=True)
    assert not drawn_apart(replace(stated, stderr_of="subsets"), same_picture=False)
    shared = describe(gradient_dot(draws=replace(DRAWS, shared=True)))
    assert not drawn_apart(replace(stated, recipe={"method": shared}), same_picture=False)


def test_contrasts_of_nothing_are_refused():
    with refuses("no picture 'c'", "--not_that", "a, b"):
        contrasted(scores_of(), "a", "c")
    with refuses("no picture 'c'", "--this", "a, b"):
        contrasted(scores_of(), "c", "a")
    with refuses("both are 'a'", "--not_that"):
        contrasted(scores_of(), "a", "a")
    with refuses("already", "trak"):
        check_contrastable("trak", contrasted(scores_of(), "a", "b"), True)
    with refuses("not linear", "das", "d_trak"):
        check_contrastable("das", scores_of(), False)
    with refuses("not linear", "das"):
        check_contrastable("das", scores_of(signed=False), True)


# --------------------------------------------------------------------------------------------------- from end to end


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    world = World(tmp_path_factory.mktemp("contrast"))
    save_png(world.images, noise(8, 0), [f"{i}" for i in range(8)])
    save_png(world.queries, noise(2, 1), ["a", "b"])
    succeeds("train", "new", "--train_data_dir", world.images, "--output_dir", world.model, *TRAINING)
    return world


@pytest.fixture(scope="module")
def masked(world) -> Path:
    """A run about the left half and the first 300 timesteps; the mask is gone afterwards."""
    pixels = np.zeros((32, 32))
    pixels[:, :16] = 255
    mask, run = drawn(world.root, pixels), world.root / "masked"
    words = ("--mask", mask, "--timesteps", "0-300", "--method", "d_trak", "--method", "gradient_cosine")
    succeeds(*world.attribute(run, *words))
    mask.unlink()
    return run


def test_a_narrow_question_is_on_the_page_and_replays(masked):
    page = (masked / "report.html").read_text()
    assert "a region of the pictures, 50 % of them" in page
    assert "timesteps 0 to 299" in page
    recipe = load_scores(masked / "scores" / "d_trak").recipe
    assert "region" in recipe["method"]["query"]["output"]
    assert recipe["method"]["query"]["draws"]["timesteps"]["high"] == 300
    assert recipe["method"]["train"]["output"] == "squared_norm"
    assert "identical to the last bit" in succeeds("replay", masked / "scores" / "d_trak").out
    asked = ("remove-first", masked, "--k", 2, "--method", "d_trak")
    succeeds(*asked)
    refused(*asked, "--how", "adaptive", says="answer a narrower question")
    succeeds("report", masked)
    assert "a region of the pictures, 50 % of them" in (masked / "report.html").read_text()


def test_a_plain_question_has_no_such_line(world, masked):
    plain = world.root / "plain"
    succeeds(*world.attribute(plain, "--method", "d_trak"))
    assert "Question" not in (plain / "report.html").read_text()
    stored = load_scores(plain / "scores" / "d_trak")
    assert stored.recipe["method"]["query"] is None
    other = load_scores(masked / "scores" / "d_trak").values
    assert float((other - stored.values).abs().max()) > 1e-3 * float(stored.values.abs().max())


def test_why_this_and_not_that(masked):
    done = succeeds("contrast", masked, "--this", "a.png", "--not_that", "b.png")
    assert "left out: gradient_cosine" in done.out
    folder = masked / "contrast" / "a.png--b.png"
    found, of_run = (load_scores(root / "scores" / "d_trak") for root in (folder, masked))
    assert torch.equal(found.values[0], of_run.values[0] - of_run.values[1])
    page = (folder / "report.html").read_text()
    assert "why a.png rather than b.png" in page
    assert "a region of the pictures" in page
    assert "identical to the last bit" in succeeds("replay", folder / "scores" / "d_trak").out
    # A score that somebody changed is found.
    save_scores(folder / "scores" / "d_trak", replace(found, values=found.values + found.values.abs().max()))
    assert "not identical" in whence("replay", folder / "scores" / "d_trak").out


def test_bad_questions_are_refused_in_one_line(world, masked, tmp_path):
    about = world.attribute(tmp_path / "run")
    wide = drawn(tmp_path, np.full((4, 6), 255))
    refused(*about, "--mask", wide, says="6x4, but the network sees pictures of 8x8")
    refused(*about, "--timesteps", "5", says="accepted: LOW-HIGH")
    refused(*about, "--timesteps", "5-5", says="5-5 of a schedule of 1,000")
    refused(*about, "--timesteps", "0-1001", says="0-1001 of a schedule of 1,000")
    refused(*world.compare(tmp_path / "run"), "--timesteps", "0-100", says="pixel_dot compares pictures by an encoder")
    refused(*about, "--timesteps", "0-9", "--candidates", 2, says="exclude each other")
    assert not (tmp_path / "run" / "scores").exists()
    asked = ("contrast", masked, "--this", "a.png", "--not_that")
    refused(*asked, "c.png", says="no picture 'c.png' was explained; accepted: a.png, b.png")
    refused(*asked, "b.png", "--method", "gradient_cosine", says="not linear in the query")
    refused(*asked, "b.png", "--method", "trak", says="no scores of trak")
    refused(*asked, "b.png", "--query_data_dir", world.images, says="give|accepted")


def test_two_prompts_for_one_picture(tmp_path):
    """A latent model, a mask of its latents, and the same pixels under two captions: what differs is the text alone, so that
    the same caption makes no difference at all."""
    save_whole("sd", tmp_path / "sd")
    pictures(tmp_path / "train", ["a cat", "two birds", "a red cat"])
    x0 = noise(1, 5).expand(3, 3, 8, 8)
    texts = [{"text": text} for text in ("a cat", "two birds", "a cat")]
    save_png(tmp_path / "queries", x0, ["cat", "birds", "again"], texts)
    mask = drawn(tmp_path, np.repeat([[255, 0]], 2, 0).repeat(8, 0).repeat(8, 1))
    run = tmp_path / "run"
    sides = ("--train_data_dir", tmp_path / "train", "--query_data_dir", tmp_path / "queries", "--output_dir", run)
    few = ("--resolution", 8, "--draws", 2, "--dim", 8, "--parameters", "cross-attention-kv", "--mask", mask)
    succeeds("attribute", tmp_path / "sd", *sides, *few, "--method", "d_trak")
    assert "region" in load_scores(run / "scores" / "d_trak").recipe["method"]["query"]["output"]
    succeeds("contrast", run, "--this", "cat.png", "--not_that", "birds.png")
    folder = run / "contrast" / "cat.png--birds.png"
    values = load_scores(folder / "scores" / "d_trak").values
    assert float(values.abs().max()) > 0
    assert "a cat | two birds" in (folder / "report.html").read_text()
    succeeds("contrast", run, "--this", "cat.png", "--not_that", "again.png")
    same = load_scores(run / "contrast" / "cat.png--again.png" / "scores" / "d_trak").values
    assert float(same.abs().max()) <= 1e-5 * float(values.abs().max()), "float32, in batches of another company"
