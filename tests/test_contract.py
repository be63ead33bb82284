"""One contract for every method: CT1-CT9 of the handbook, on a linear denoiser, a UNet of diffusers and a classifier."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from agreement import close
from errors import refuses
from whence import __version__
from whence.curvature.solve import NoPreconditioner, Problem, Solution
from whence.data.images import subset
from whence.diffusion import outputs
from whence.diffusion.draws import fixed, uniform
from whence.diffusion.forward import Classifier, Denoiser, linear_schedule
from whence.features.parts import Value
from whence.features.rows import rows
from whence.methods import METHODS, build, settings_of
from whence.methods.inner_product import InnerProduct
from whence.methods.normalize import distance
from whence.methods.unlearning import Unlearning
from whence.types import Checkpoint, Engine, Images, Method, Scores, Task, WhenceError, digest
from worlds import DRAWS, classifier_task, encoder, linear_world, trained_task, unet_task, with_copy

WORLDS = {
    "linear": lambda root: linear_world(n=14, m=3, dim=4).task(root),
    "unet": lambda root: unet_task(root, n=4),
    "classifier": classifier_task,
    "trained": trained_task,
}
# Relative to the largest score; float32 in the UNet.
TOLERANCE = {"linear": 1e-9, "unet": 1e-4, "classifier": 1e-9, "trained": 1e-9}

# What the small worlds need in place of a method's own settings.
COMMON: dict[str, Any] = {
    "dim": 24, "damping": 0.05, "count": 2, "segments": 1, "tolerance": 1e-12, "by": "image"
}  # fmt: skip
SMALL: dict[str, dict[str, Any]] = {
    "linear": {"draws": uniform(6), "top": 3, **COMMON},
    "unet": {"draws": uniform(4), "residual": 4, "top": 2, **COMMON},
    "classifier": COMMON,
    "trained": {**COMMON, "draws": uniform(4), "masks": 4},
}
SMALL_OF_METHOD = {
    ("unet", "exact_influence"): {"parameters": "conv_out"},
    ("unet", "ek_fac_refined"): {"steps": 3},  # more only find what float32 rounds away
    ("unet", "influence_cg"): {"parameters": "conv_out", "tolerance": 1e-6},
    ("unet", "influence_lissa"): {"parameters": "conv_out", "depth": 5},
    ("linear", "influence_lissa"): {"depth": 20},
    ("linear", "further_training"): {"steps": 4, "masks": 2, "learning_rate": 1e-3},
    ("unet", "further_training"): {"steps": 2, "masks": 2, "learning_rate": 1e-3, "resample_draws": 2},
    ("linear", "guda"): {"steps": 3, "learning_rate": 1e-3},
    ("unet", "guda"): {"steps": 2},
    ("linear", "mucs"): {
        "learning_rate": 0.05,
        "runs": 1,
        "weight": 30.0,
        "draws": fixed(5, 4),
    },  # where queries are known
    ("classifier", "exact_influence"): {"parameters": "conv"},
    ("classifier", "influence_cg"): {"parameters": "conv"},
    ("classifier", "influence_lissa"): {"parameters": "conv", "depth": 20},
}
IN_STEPS = {"ek_fac_refined", "influence_cg", "influence_lissa"}  # a solve for each query, none for training images
NO_WEIGHTS = ("nda", "averaged_metagradient", "montrage_style")  # which the model's own weights do not enter
# Whose encoders look at these and load no network.
PICTURES = ("pixel_dot", "pixel_cosine", "clip_cosine", "dino_cosine", "abc_cosine")
ENCODERS = {"clip_cosine": "clip", "dino_cosine": "dinov2", "abc_cosine": "abc"}


def runs_in(world: str, name: str) -> bool:
    """Methods that train again run in the world that knows its training, and no others there; the vectors of the linear
    world are no pictures for an encoder."""
    entry = METHODS[name]
    if (world, name) == ("unet", "mucs"):  # this network was never trained, and has nothing to forget
        return False
    if "student" in entry.needs:  # of one set of training images alone: its own laws are in test_distill.py
        return False
    if (world == "trained") != ("training" in entry.needs) or (world == "linear" and "encoder" in entry.needs):
        return False
    return world != "classifier" or entry.classifier is not None


CASES = [pytest.param(w, name, id=f"{w}-{name}") for w in WORLDS for name in METHODS if runs_in(w, name)]


def anywhere(cases: list[Any]) -> list[Any]:
    """Each method in the first of its worlds: for what is alike in all, as what is refused before anything is worked out."""
    first: dict[str, Any] = {}
    for case in cases:
        first.setdefault(case.values[1], case)
    return list(first.values())


# That a method computes the same whatever the company is looked at on the UNet for each. What holds of rows once they are
# there is looked at in the other worlds for each, and on the UNet for one method of each kind of row and of scale.
OF_EACH_KIND = {
    "pixel_dot", "clip_cosine", "representation_l2", "nda", "last_layer_ridge", "gradient_cosine", "tracin",
    "output_cosine", "gas_layerwise", "trak", "relatif_loss", "k_fac", "block_trak", "journey_trak",
}  # fmt: skip
LIGHT = [case for case in CASES if case.values[0] != "unet" or case.values[1] in OF_EACH_KIND]
every_method = pytest.mark.parametrize(("world", "name"), CASES)
every_method_once_its_rows_are_there = pytest.mark.parametrize(("world", "name"), LIGHT)
each_method = pytest.mark.parametrize(("world", "name"), anywhere(CASES))
every_method_that_does_not_train = pytest.mark.parametrize(
    ("world", "name"), [case for case in LIGHT if case.values[0] != "trained" and case.values[1] != "further_training"]
)


def method_of(world: str, name: str, task: Task, **settings: Any) -> Method:
    wanted = {**SMALL[world], **SMALL_OF_METHOD.get((world, name), {}), **settings}
    if name in ENCODERS:
        wanted["encoder"] = encoder(ENCODERS[name])
    accepted = settings_of(name)
    # An empty default would be a setting this file does not know: it then fails here and wants a line in SMALL.
    return build(name, task.forward, {key: value for key, value in wanted.items() if key in accepted})


@dataclass(frozen=True)
class Bench:
    """One folder per (world, variant), shared by all methods, so that features are computed once."""

    root: Path
    tasks: Mapping[str, Task]
    first: dict[tuple[str, str], Scores] = field(default_factory=dict)
    second: dict[tuple[str, str], Scores] = field(default_factory=dict)

    def task(self, world: str) -> Task:
        return self.tasks[world]

    def score(self, world: str, name: str, variant: str = "", **changes: Any) -> Scores:
        """Scores of a task with some fields changed; `variant` names the folder, so that nothing is read from another."""
        if not variant and not changes and (world, name) in self.first:
            return self.first[world, name]
        task = replace(self.task(world), root=self.root / f"{world}{variant}", **changes)
        scores = method_of(world, name, task)(task)
        return scores if variant or changes else self.first.setdefault((world, name), scores)

    def alone(self, world: str, name: str) -> Scores:
        """Of the second query without the others."""
        if (world, name) not in self.second:
            query = subset(self.task(world).queries, [1])
            self.second[world, name] = self.score(world, name, queries=query)
        return self.second[world, name]


@pytest.fixture(scope="module")
def bench(tmp_path_factory) -> Bench:
    root = tmp_path_factory.mktemp("contract")
    return Bench(root, {world: make(root / world) for world, make in WORLDS.items()})


def assert_same(found: Tensor, expected: Tensor, world: str) -> None:
    scale = float(expected.abs().max())
    assert scale > 0, "all scores are zero"
    torch.testing.assert_close(found / scale, expected / scale, rtol=0, atol=TOLERANCE[world])


# ----------------------------------------------------------------------------------------------------------- CT1-CT7


@every_method
def test_shape_names_and_finite_scores(bench, world, name):
    """CT1. And the scores are not all alike, which would make the other laws empty."""
    task, scores = bench.task(world), bench.score(world, name)
    assert scores.values.shape == (len(task.queries), len(task.train))
    assert torch.isfinite(scores.values).all()
    assert list(scores.query_ids) == list(task.queries.ids)
    assert list(scores.train_ids) == list(task.train.ids)
    assert (scores.values.std(1) > 1e-6 * scores.values.abs().max()).all()
    assert not torch.allclose(scores.values[0], scores.values[1], rtol=1e-3)


# Beside batches of 16 in one shard, as of all others.
ALONE, BY_7 = "one image at a time, shards of one", "batches of 7"
ENGINES: dict[str, Mapping[str, int]] = {ALONE: {"batch_size": 1, "budget": 1}, BY_7: {"batch_size": 7}}


def engine_of(world: str, name: str, task: Task, label: str) -> Engine:
    settings = dict(ENGINES[label])
    if world == "trained" or name == "further_training":  # a budget too small for two states is refused there
        settings["budget"] = max(2**24 if world == "unet" else 2**19, settings.get("budget", 2**20))
    return replace(task.engine, **settings)


@every_method
def test_permuting_the_training_images_permutes_the_columns(bench, world, name):
    """CT2. The UNet is slow: its images are permuted and taken one at a time at once, which is CT4 for it."""
    task = bench.task(world)
    order = torch.randperm(len(task.train), generator=torch.Generator().manual_seed(0)).tolist()
    changes: dict[str, Any] = {"engine": engine_of(world, name, task, ALONE)} if world == "unet" else {}
    scores = bench.score(world, name, "-permuted", train=subset(task.train, order), **changes)
    assert list(scores.train_ids) == [task.train.ids[i] for i in order]
    assert_same(scores.values, bench.score(world, name).values[:, order], world)


@every_method
def test_a_query_does_not_depend_on_the_others(bench, world, name):
    """CT3."""
    assert_same(bench.alone(world, name).values, bench.score(world, name).values[1:2], world)


def where(world: str, name: str) -> tuple[str, ...]:
    """The engines that a method is tried with there: with both in all, shared out where it runs in two worlds."""
    if world == "unet":  # see the test above
        return ()
    if not (runs_in("linear", name) and runs_in("classifier", name)):
        return tuple(ENGINES)
    return (ALONE,) if world == "linear" else (BY_7,)


@pytest.mark.parametrize(
    ("world", "name", "label"), [(*case.values, label) for case in CASES for label in where(*case.values)]
)
def test_batch_size_and_budget_do_not_matter(bench, world, name, label):
    """CT4."""
    task = bench.task(world)
    scores = bench.score(world, name, f"-{label}", engine=engine_of(world, name, task, label))
    assert_same(scores.values, bench.score(world, name).values, world)


@each_method
def test_running_again_gives_the_same_bits(bench, world, name):
    """CT4. From stored features, which are read alike in all worlds; for networks of diffusers see
    test_families_contract.py, and that an interrupted run stores the same ones is told in test_store.py."""
    task = bench.task(world)
    assert torch.equal(method_of(world, name, task)(task).values, bench.score(world, name).values)


@every_method_that_does_not_train
def test_identical_copies_get_identical_scores(bench, world, name):
    """CT5. Noise is keyed by content, so that a copy under another name sees the same draws."""
    task = bench.task(world)
    values = bench.score(world, name, "-copy", train=with_copy(task.train, 3)).values
    assert_same(values[:, -1], values[:, 3], world)


@every_method_that_does_not_train
def test_self_influence_is_the_diagonal(bench, world, name):
    """CT6. The diagonal of train x train equals what the row scales are made of, a computation of its own."""
    task = bench.task(world)
    values = bench.score(world, name, queries=task.train).values
    method = method_of(world, name, task)
    if isinstance(method, InnerProduct) and method.normalize is distance:
        assert (values <= 0).all()
        assert (values.diagonal().abs() < 1e-5 * values.abs().max()).all(), "an image is at no distance from itself"
        return
    # In `journey` an image meets another view of itself; what a linear network forgets of one image alone is chance.
    if "journey" not in METHODS[name].needs and (world, name) != ("linear", "guda"):
        assert (values.diagonal() > 0).all(), "every image does something for itself"
    if isinstance(method, InnerProduct) and method.query is None:
        if name in IN_STEPS:
            with refuses("refined in steps have no self-influence of training images", accepted="refine=0"):
                self_influence(method, task)
            return
        assert_same(values.diagonal(), self_influence(method, task), world)


def self_influence(method: InnerProduct, task: Task) -> Tensor:
    """sum_c eta_c (normalised phi_i^T H_c^-1 phi_i), times the mean weight."""
    total, weight = torch.zeros(2, len(task.train), dtype=torch.float64)
    chosen = method.aggregate(task)
    for point, eta in chosen:
        phi = rows(method.train, task, point, task.train, "x")
        (system,) = method.precondition.solve(Problem(task, point, method.train), phi, phi.all().double(), [None])
        total += eta * method.normalize(Diagonal(system)).diagonal()
        if method.weight is not None:
            weight += rows(method.weight, task, point, task.train, "x").all()[:, 0] / len(chosen)
    return total if method.weight is None else total * weight


@dataclass(frozen=True)
class Diagonal:
    """A system of train x train whose kernel has on its diagonal what `train_self` says."""

    system: Solution

    def kernel(self) -> Tensor:
        return self.system.train_self().diag()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.system, name)


@every_method_once_its_rows_are_there
def test_a_grid_of_dampings_equals_one_at_a_time(bench, world, name):
    """CT7."""
    task, grid = bench.task(world), [0.001, 0.05, 3.0]
    method = method_of(world, name, task)
    if not hasattr(method, "grid"):  # a step per query is taken at one damping
        assert "damping" not in settings_of(name) or isinstance(method, Unlearning)
        return
    if method.damping is None:
        with refuses("no damping"):
            method.grid(task, grid)
        return
    together = method.grid(task, grid)
    for damping, scores in zip(grid, together, strict=True):
        alone = method_of(world, name, task, damping=damping)(task)
        assert_same(scores.values, alone.values, world)
        assert scores.recipe == alone.recipe
    assert_different(together[0].values, together[2].values)
    with refuses("above 0"):
        method.grid(task, [0.1, 0.0])


def assert_different(a: Tensor, b: Tensor) -> None:
    assert float((a / a.norm() - b / b.norm()).norm()) > 1e-3


# ------------------------------------------------------------------------------------------------------ CT8, the sign


@pytest.fixture(scope="module")
def removal(tmp_path_factory) -> tuple[Task, Tensor]:
    """A linear world, and what removing each image and retraining does to each query's loss."""
    world = linear_world(n=60, m=12, dim=6, seed=3)
    return world.task(tmp_path_factory.mktemp("removal")), torch.from_numpy(world.leave_one_out())


# guda is about groups, and what it leaves of one image among sixty is chance; for its sign see test_groups.py.
@pytest.mark.parametrize("name", [name for name in METHODS if runs_in("linear", name) and name != "guda"])
def test_sign(removal, name):
    """CT8 (methods that train again: see test_unroll.py). Removing a query's strongest proponent and retraining raises its
    loss, by far more than removing its strongest opponent does. That LDS turns with the sign: see test_linear_world.py."""
    task, rise = removal
    # Methods with the empirical Fisher are at their best here with a large damping.
    small = ("exact_influence", "last_layer_ridge")
    wanted = {"draws": DRAWS, "dim": None, "damping": 0.01 if name in small else 10.0, "segments": 1, "noises": 8}
    if name == "further_training":
        wanted["steps"] = 40
    if name == "mucs":  # a linear network forgets a picture that weighs much, where it knew it
        wanted |= {"learning_rate": 0.03, "weight": 30.0, "runs": 1, "draws": fixed(4, 16, shared=False), "share": 0.7}
    scores = build(name, task.forward, {key: wanted[key] for key in wanted if key in settings_of(name)})(task)
    rise = rise if scores.signed else rise.abs()  # by how much, not which way
    best, worst = (rise.gather(1, i[:, None])[:, 0] for i in (scores.values.argmax(1), scores.values.argmin(1)))
    assert float((best > 0).double().mean()) > 0.9
    assert float(best.mean()) > 3 * abs(float(worst.mean()))


def test_sign_of_mixed_measurements(bench):
    """A loss on one side and a margin on the other: grad margin = -grad cross-entropy / (1 - p), and the scores keep the
    meaning of the loss, with the factor 1 / (1 - p) where the margin is."""
    task = bench.task("classifier")
    both = method_of("classifier", "influence", task, dim=None)
    assert isinstance(both, InnerProduct)
    reference = both(task).values
    mixed = replace(both, query=replace(both.train, output=outputs.margin))(task).values
    torch.testing.assert_close(mixed, reference / doubt(task, task.queries)[:, None], rtol=1e-8, atol=1e-12)
    plain = replace(both, precondition=NoPreconditioner())
    margins = replace(plain, train=replace(both.train, output=outputs.margin))(task).values
    expected = plain(task).values / doubt(task, task.queries)[:, None] / doubt(task, task.train)
    torch.testing.assert_close(margins, expected, rtol=1e-8, atol=1e-12)


def test_measurements_without_a_common_sign_are_refused(bench):
    task = bench.task("linear")
    method = method_of("linear", "gradient_dot", task)
    assert isinstance(method, InnerProduct)
    with refuses("'squared_norm' and 'loss' have no common sign"):
        replace(method, query=replace(method.train, output=outputs.squared_norm))(task)


def doubt(task: Task, images: Images) -> Tensor:
    """1 - p of each image's own class at the last checkpoint."""
    batch = images.batch(range(len(images)))
    p = task.trajectory[-1].load().double()(batch.x0.double()).softmax(1)
    return (1 - p[torch.arange(len(p)), batch.cond["class_labels"]]).detach()


# ---------------------------------------------------------------------------------------------------- CT9, the errors


def takes(*settings: str) -> list[Any]:
    return [case for case in CASES if all(s in settings_of(case.values[1]) for s in settings)]


@pytest.mark.parametrize(("world", "name"), anywhere(takes("parameters")))
def test_unknown_parameters_are_refused(bench, world, name):
    task = bench.task(world)
    with refuses("'cross-atention' match none of ... presets: trained, all"):
        method_of(world, name, task, parameters="cross-atention")(task)


@pytest.mark.parametrize(("world", "name"), anywhere(takes("dim")))
def test_too_wide_a_projection_is_none(bench, world, name):
    """Where there are no more parameters than columns, the gradients themselves are compared."""
    task = bench.task(world)
    wide, exact = (method_of(world, name, task, dim=dim)(task) for dim in (10**6, None))
    close(wide.values, exact.values, 1e-9)
    assert "SJLT" not in json.dumps(wide.recipe["method"])


@pytest.mark.parametrize(("world", "name"), anywhere(takes("damping")))
@pytest.mark.parametrize("damping", [0.0, -1.0, float("nan")])
def test_unusable_damping_is_refused(bench, world, name, damping):
    with refuses("above 0 and finite"):
        method_of(world, name, bench.task(world), damping=damping)


@pytest.mark.parametrize(("world", "name"), anywhere(takes("draws")))
def test_steps_beyond_the_schedule_are_refused(bench, world, name):
    task = bench.task(world)
    with refuses("timestep 5000 asked, but the schedule has steps 0 to"):
        method_of(world, name, task, draws=fixed(5000, 4))(task)


OUTPUTS = [c for c in takes("output") if c.values[0] == "classifier" or c in anywhere(takes("output"))]


@pytest.mark.parametrize(("world", "name"), OUTPUTS)
def test_outputs_of_the_other_kind_of_model_are_refused(bench, world, name):
    task = bench.task(world)
    other = outputs.loss if world == "classifier" else outputs.cross_entropy
    with refuses("this model is a"):
        method_of(world, name, task, output=other)(task)


def test_unknown_settings_are_refused():
    for name in METHODS:
        with refuses(f"{name} has no setting 'dampening'; it takes"):
            build(name, Denoiser(linear_schedule(10)), {"dampening": 1.0})


def test_methods_for_denoisers_refuse_classifiers():
    for name in (name for name, entry in METHODS.items() if entry.classifier is None):
        with refuses(f"{name} is for denoisers"):
            build(name, Classifier(), {})


@pytest.mark.parametrize("name", [name for name, entry in METHODS.items() if "checkpoints" in entry.needs])
@pytest.mark.parametrize("missing", ["rate", "step"])
def test_methods_over_checkpoints_refuse_unknown_rates(bench, name, missing):
    """A rate that is not known is not 1; final weights alone are no training run."""
    world = "unet" if METHODS[name].classifier is None else "classifier"
    points = tuple(replace(point, **{missing: None}) for point in bench.task(world).trajectory)
    with refuses("learning rate" if missing == "rate" else "checkpoint-N folders"):
        bench.score(world, name, trajectory=points)


@pytest.mark.parametrize("name", [name for name, entry in METHODS.items() if {"training", "journey"} & {*entry.needs}])
def test_methods_refuse_a_task_that_lacks_what_they_need(bench, name):
    with refuses(f"{name} ", accepted="whence"):
        bench.score("linear", name, study=None, sampled=None)


WEIGHTED = [case for case in CASES if case.values[1] not in (*NO_WEIGHTS, *PICTURES)]


@pytest.mark.parametrize(("world", "name"), anywhere(WEIGHTED))
def test_diverged_weights_are_refused(bench, world, name):
    task = bench.task(world)

    def diverged() -> torch.nn.Module:
        net = task.trajectory[-1].load()
        next(net.parameters()).data.view(-1)[0] = float("nan")
        return net

    bad = Checkpoint(diverged, "diverged", "checkpoint-9", 9, 0.1)
    with refuses("checkpoint-9: weight ... holds NaN or Inf"):
        bench.score(world, name, trajectory=(bad,))


@pytest.mark.parametrize(("world", "name"), takes("parameters"))
def test_no_gradient_anywhere(bench, world, name):
    """CT9. Weights that the output does not depend on: refused where a system is solved, zero where rows are compared."""
    task = bench.task(world)
    points = tuple(replace(p, load=WithIdle(p.load), digest=digest([p.digest, "idle"])) for p in task.trajectory)
    task = replace(task, trajectory=points)
    settings = {"parameters": "idle", "dim": None}
    method = method_of(world, name, task, **settings)
    if isinstance(method, Unlearning) and name != "abu_ek_fac":
        with pytest.raises(WhenceError, match=r"no slope to go up|is not forgotten after 20 steps"):
            method_of(world, name, task, **settings, steps=20)(task)
        return
    if "layers" in METHODS[name].needs or getattr(method, "damping", None) is not None:
        with pytest.raises(WhenceError, match=r"are zero|none of the chosen parameters .* belongs to a Linear"):
            method(task)
    else:
        assert torch.equal(method(task).values, torch.zeros(len(task.queries), len(task.train), dtype=torch.float64))


@dataclass(frozen=True)
class WithIdle:
    """A network with a parameter it does not use."""

    load: Any

    def __call__(self) -> torch.nn.Module:
        net = self.load()
        net.register_parameter("idle", torch.nn.Parameter(torch.ones(3)))
        return net


# ------------------------------------------------------------------------------------------------------------- recipe


@every_method
def test_recipe_replays_the_scores(bench, world, name):
    """It survives JSON, and says method, settings, checkpoints, data, number format and version."""
    task, scores = bench.task(world), bench.score(world, name)
    recipe = json.loads(json.dumps(scores.recipe, allow_nan=False))
    assert recipe == scores.recipe
    assert recipe["whence"] == __version__
    assert recipe["method"]["name"] == name
    assert set(recipe["checkpoints"]) <= {point.digest for point in task.trajectory}
    several = 2 if "checkpoints" in METHODS[name].needs and world != "linear" else 1
    assert len(recipe["checkpoints"]) == len(recipe["eta"]) == (0 if name in NO_WEIGHTS else several)
    assert recipe["dtype"] == str(task.engine.dtype)
    other = bench.alone(world, name).recipe
    assert other["train"] == recipe["train"]
    assert other["queries"] != recipe["queries"]
    method = recipe["method"]
    if "damping" in settings_of(name):
        assert method.get("precondition", method.get("forget", {}).get("curvature", method))["damping"] == 0.05
    found = method.get("train", method)
    found = found.get("encoder", found)
    if "draws" in settings_of(name) and world != "classifier" and "draws" in found and name != "mucs":
        assert found["draws"]["timesteps"] == {"is": "Grid", "count": SMALL[world]["draws"].count}
        assert found["draws"]["seed"] == 0
    if "metagradient" in name:
        assert recipe["study"]["recipe"]["schedule"]["steps"] == 6
    assert scores.scale in {"removal", "upweight", "rank"}


@every_method
def test_settings_print_hash_and_compare(world, name, bench):
    """Frozen settings: two that were made alike are one."""
    task = bench.task(world)
    a, b = method_of(world, name, task), method_of(world, name, task)
    assert a == b
    assert hash(a) == hash(b)
    assert repr(a) == repr(b)
    assert name in repr(a)


def test_trak_weighs_classifier_images_by_their_doubt(bench):
    """The only weight a method has: Q_i = 1 - p_i, and none for denoisers."""
    method = method_of("classifier", "trak", bench.task("classifier"))
    assert isinstance(method.weight, Value)
    assert method.weight.output.name == "doubt"
    task = bench.task("classifier")
    plain = replace(method, weight=None)(task).values
    close(method(task).values, plain * doubt(task, task.train), 1e-9)
    assert method_of("linear", "trak", bench.task("linear")).weight is None
