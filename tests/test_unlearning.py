"""Attribution by unlearning: exact where the network is linear, its limit, its bounds, and what cannot be forgotten."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from agreement import close
from errors import refuses
from recipes import pixel_study, recipe_of
from test_membership import NETWORK, digit_images
from whence.curvature.kfac import EKFAC
from whence.curvature.solve import Problem
from whence.data.images import subset, tensor_images
from whence.diffusion.draws import fixed, stratified, uniform
from whence.diffusion.noise import seed_for
from whence.diffusion.outputs import loss, region
from whence.features.gradients import measure, repeat
from whence.features.parts import Gradient
from whence.features.rows import rows
from whence.methods import abu, abu_ek_fac, mucs
from whence.methods.candidates import Candidates
from whence.methods.curvature import FACTORS
from whence.methods.fisher import DiagonalFisher, EKFACFisher, Measured
from whence.methods.forgetting import BoundedAscent, NaturalAscent
from whence.methods.unlearning import Unlearning
from whence.models import open_model
from whence.storage.arrays import Store
from whence.training.optimizer import AdamW
from whence.training.order import noise_keys
from whence.training.runs import train_study
from whence.types import Draw, Task
from worlds import DRAWS, linear_world

KINDS = {"diagonal": DiagonalFisher(0.1), "ek_fac": EKFACFisher(0.1, FACTORS)}


@pytest.fixture(scope="module")
def world():
    return linear_world(n=14, m=3, dim=4)


def forgotten(task: Task, method: Unlearning) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
    """The weights without each query, and with all."""
    asked, trained = method.networks(task)
    forget = method.forget.begin(asked, trained, method.parameters, 0)
    found = [forget(task.queries.ids[q], asked.read(task.queries, [q])) for q in range(len(task.queries))]
    return [{**each.weights} for each in found], {**asked.weights}


# ------------------------------------------------------------------------------------------------------- linear networks


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rise", "steps"), [(0.1, 1), (5.0, 1), (0.5, 3)])
def test_in_the_linear_world_the_rise_is_that_of_a_quadratic(world, tmp_path, kind, rise, steps):
    """g_i d + d' H_i d / 2 for any step d, whose length brings the query's loss to where it was asked to be."""
    task = world.task(tmp_path)
    method = Unlearning("x", NaturalAscent(KINDS[kind], rise, steps), loss, DRAWS)
    scores = method(task)
    after, before = forgotten(task, method)
    gradients = rows(Gradient(loss, DRAWS), task, task.trajectory[-1], task.train, "g").all()
    name = next(iter(before))
    expected = torch.zeros_like(scores.values)
    for q, weights in enumerate(after):
        d = (weights[name] - before[name]).unflatten(1, world.A.shape[1:3]).transpose(0, 1)  # W_t of each timestep
        # H_i = 2 / (S D) I (x) A_i at each timestep, A_i the second moments of what the network sees.
        bend = torch.einsum("toa,itab,tob->i", d, world.A, d) / (DRAWS.count * d.shape[-1])
        expected[q] = gradients @ (weights[name] - before[name]).flatten() + bend
    close(scores.values, expected, 1e-10)
    assert scores.recipe["unlearned"]["rise"] == pytest.approx([rise] * 3, rel=1e-3)
    assert min(scores.recipe["unlearned"]["step"]) > 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_small_step_is_influence_with_that_curvature(world, tmp_path, kind):
    task = world.task(tmp_path)
    scores = Unlearning("x", NaturalAscent(KINDS[kind], 1e-7), loss, DRAWS)(task)
    part = Gradient(loss, DRAWS)
    phi, psi = (rows(part, task, task.trajectory[-1], images, "g").all() for images in (task.train, task.queries))
    if kind == "diagonal":
        drawn = [replace(part, draws=One(number)) for number in range(DRAWS.count)]
        squares = sum(rows(each, task, task.trajectory[-1], task.train, "s").all().square().mean(0) for each in drawn)
        fisher = squares / DRAWS.count
        expected = psi / (fisher + 0.1 * fisher.mean()) @ phi.T
    else:
        problem, factored = Problem(task, task.trajectory[-1], part), EKFAC(0.1, factors=FACTORS)
        (system,) = factored.solve(problem, rows(part, task, task.trajectory[-1], task.train, "g"), psi, [None])
        expected = system.kernel()
    step = torch.tensor(scores.recipe["unlearned"]["step"], dtype=torch.float64)[:, None]
    scale = 1.0 if kind == "diagonal" else len(task.train)  # that system is a sum over images
    close(scores.values, step * scale * expected, 1e-5)


class One:
    """One draw of `DRAWS`, described as such."""

    unit, group, count = False, 1, 1

    def __init__(self, number: int):
        self.number = number

    def __call__(self, keys: Tensor, *given: Any) -> Any:
        drawn = DRAWS(keys, *given)
        return replace(drawn, t=drawn.t[:, [self.number]], noise=drawn.noise[:, [self.number]])

    def describe(self) -> dict[str, int]:
        return {"one of the draws": self.number}


def test_what_has_no_curvature_takes_no_part(world, tmp_path):
    """A parameter whose gradients are rounding is not moved by 1 / rounding."""
    task = world.task(tmp_path)
    network = Measured.of(task, loss, DRAWS, "trained")
    name = next(iter(network.weights))
    with_idle = replace(network, weights={**network.weights, "idle": torch.zeros(3, dtype=torch.float64)})
    width = network.weights[name].numel() + 3
    values = torch.cat([torch.ones(width - 3), torch.full((3,), 1e-14)]).double()

    class Fixed(DiagonalFisher):
        def _squares(self, *_: object) -> Tensor:
            return values

    gradient = {name: torch.ones_like(network.weights[name]), "idle": torch.full((3,), 1e-9)}
    way = Fixed(0.1).inverse(with_idle, "trained")(gradient)
    assert not way["idle"].any()
    close(way[name], torch.full_like(way[name], 1 / 1.1), 1e-12)


# ---------------------------------------------------------------------------------------------------------- what is kept


def test_a_killed_run_goes_on_with_the_queries_that_are_missing(world, tmp_path, monkeypatch):
    task, method = world.task(tmp_path), Unlearning("x", NaturalAscent(DiagonalFisher()), loss, DRAWS)
    whole = method(task)
    again = world.task(tmp_path / "again")
    met: list[str] = []
    begin = NaturalAscent.begin

    def dying(self: NaturalAscent, *given: Any) -> Any:
        forget = begin(self, *given)

        def one(name: str, image: Any) -> Any:
            if len(met) == 2:
                met.append("killed")
                raise KeyboardInterrupt
            met.append(name)
            return forget(name, image)

        return one

    monkeypatch.setattr(NaturalAscent, "begin", dying)
    with pytest.raises(KeyboardInterrupt):
        method(again)
    assert torch.equal(method(again).values, whole.values)
    assert met == ["query-0000", "query-0001", "killed", "query-0002"]
    method(again)
    assert len(met) == 4, "nothing is forgotten twice"
    assert len(Store(again.root).arrays()) == 2


def test_mirror_images_count_where_flips_were_trained(world, tmp_path):
    """The larger rise of the two: for a picture whose mirror image is the query, that of the query itself."""
    g = torch.Generator().manual_seed(0)
    x0 = torch.randn(8, 4, generator=g).double()
    queries = tensor_images(x0[:1].flip(-1), ["mirror"])
    task = replace(world.task(tmp_path), train=tensor_images(x0, [f"{i}" for i in range(8)]), queries=queries)
    method = Unlearning("x", NaturalAscent(DiagonalFisher()), loss, replace(DRAWS, shared=True))
    plain = method(task).values
    study = task.study
    assert study is not None
    flipped = replace(study, recipe=replace(study.recipe, data=replace(study.recipe.data, flip=True)))
    both = method(replace(task, study=flipped)).values
    turned = replace(task, train=tensor_images(x0.flip(-1), [f"{i}" for i in range(8)]), root=tmp_path / "turned")
    after, before = forgotten(task, method)  # of the model that was measured with the images as they are
    network = Measured.of(turned, loss, method.draws, "trained")
    mirrored = network.table(after[0], turned.train, False).mean(1) - network.table(before, turned.train, False).mean(1)
    close(both[0], torch.maximum(plain[0], mirrored), 1e-10)
    assert both[0, 0] > plain[0, 0]


def test_candidates_have_the_scores_that_they_have_among_all(world, tmp_path):
    task, method = world.task(tmp_path), abu(draws=DRAWS)
    whole, some = method(task), Candidates(3, "pixel_cosine")
    cheap = replace(whole, values=whole.values.flip(1))
    named = some.named(replace(task, root=tmp_path / "some"), cheap)
    found = some.score(named, method)
    columns = [list(task.train.ids).index(name) for name in found.train_ids]
    assert 3 <= len(columns) < len(task.train)
    close(found.values, whole.values[:, columns], 1e-12)


# ------------------------------------------------------------------------------------------------------- bounded ascent


@pytest.fixture(scope="module")
def learned(tmp_path_factory) -> Task:
    """A perceptron that learned 60 digits; the queries are four of them, and it knows them."""
    root = tmp_path_factory.mktemp("unlearning")
    study = pixel_study(NETWORK, recipe_of(300, 60, learning_rate=5e-3, seed=1))
    train = digit_images(0, 60)
    train_study(study, train, root / "model", 300)
    model = open_model(root / "model")
    return Task(model.forward, (model.final,), train, subset(train, range(4)), root / "run")


MUCS = {"learning_rate": 1e-3, "runs": 1, "draws": replace(stratified(8), shared=True)}


def test_bounded_ascent_stops_where_it_was_told_and_says_what_it_cost(learned, tmp_path):
    """At 95 % of the loss of a network that predicts 0. This small network cannot forget one digit and keep the others: the
    mean loss of these is in the recipe, and a warning says so."""
    task = replace(learned, root=tmp_path)
    method = mucs(**MUCS)
    with pytest.warns(UserWarning, match="for 4 of 4 pictures more was forgotten than the picture"):
        scores = method(task)
    told = scores.recipe["unlearned"]
    assert all(0.95 <= share < 1.1 for share in told["share"]), "a step beyond, at most"
    weights, before = forgotten(task, method)
    _, trained = method.networks(task)
    kept = [float(trained.table(w, task.train, False).mean()) for w in (before, *weights)]
    assert told["others"] == pytest.approx([each / kept[0] for each in kept[1:]], rel=1e-5)
    assert float(scores.values.abs().max()) < 1, "shares of the sum of both losses"


@pytest.mark.parametrize("known", [True, False])
def test_a_step_goes_up_for_the_query_and_down_for_the_others(learned, tmp_path, monkeypatch, known):
    """grad L_retain - weight grad l_q at the step's own batch and noise; of a query beyond l_null the first alone."""
    met: list[dict[str, Tensor]] = []
    monkeypatch.setattr(
        AdamW, "update", lambda self, state, grads, rate: met.append(grads) or (state.weights, state.m, state.v)
    )
    images = learned.queries if known else tensor_images(9 * torch.ones(1, 1, 8, 8), ["bright"])
    task = replace(learned, queries=subset(images, [0]), root=tmp_path)
    method = mucs(**{**MUCS, "weight": 0.7, "steps": 1, "batch_size": 8, "share": 1.0})
    asked, trained = method.networks(task)
    monkeypatch.setattr("whence.methods.forgetting.null_loss", lambda *_: 1e3 if known else 1e-3)
    image = asked.read(task.queries, [0])
    if not known:  # it is forgotten before the first step, which is then taken all the same
        monkeypatch.setattr(Measured, "loss", lambda *_: -1.0)
    with refuses("is not forgotten after 1 steps", "unlearning"):
        method.forget.begin(asked, trained, "trained", 0)("x", image)
    seed = seed_for(0, "unlearning, run 0, step 0") % 2**31
    order = torch.argsort(noise_keys(task.train), stable=True)
    batch = trained.read(
        task.train, order[torch.randperm(60, generator=torch.Generator().manual_seed(seed))[:8]].tolist()
    )
    drawn = uniform(1, seed, shared=False)(batch.keys, (1, 8, 8), task.forward.timesteps)
    net = {name: w.clone().requires_grad_() for name, w in trained.weights.items()}
    kept = measure(trained.module, net, task.forward, loss, batch, Draw(drawn.t[:, 0], drawn.noise[:, 0])).mean()
    few = replace(MUCS["draws"].with_count(4), seed=seed)
    at = few(image.keys, (1, 8, 8), task.forward.timesteps)
    query = measure(trained.module, net, task.forward, loss, repeat(image, 4), Draw(at.t[0], at.noise[0])).mean()
    up = torch.autograd.grad(query, list(net.values()))
    down = torch.autograd.grad(kept, list(net.values()))
    for name, one, other in zip(net, down, up, strict=True):
        close(met[0][name], one - 0.7 * other if known else one, 1e-5)


def test_runs_are_averaged_and_have_batches_of_their_own(learned, tmp_path):
    task = replace(learned, queries=subset(learned.queries, [0, 1]), root=tmp_path)
    both = mucs(**{**MUCS, "runs": 2})
    found = both(task)
    table = next(array for array in Store(tmp_path).arrays() if array.shape[0] == 4).all()
    close(found.values, table[:, :60].unflatten(0, (2, 2)).mean(1), 1e-12)
    assert not torch.equal(table[0], table[1])
    assert torch.equal(mucs(**MUCS)(replace(task, root=tmp_path / "one")).values, table[[0, 2], :60])


def test_a_query_that_nobody_knows_has_nothing_to_forget(learned, tmp_path):
    noise = tensor_images(3 * torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(0)), ["noise"])
    with pytest.warns(UserWarning, match="does not know 'noise'"):
        found = mucs(**{**MUCS, "share": 0.01})(replace(learned, queries=noise, root=tmp_path))
    assert not found.values.any()
    assert found.recipe["unlearned"]["steps"] == [0]


# -------------------------------------------------------------------------------------------------------------- refusals


def test_a_region_of_the_query_is_forgotten_alone(learned, tmp_path):
    """Its training images are measured as before."""
    mask = torch.zeros(8, 8)
    mask[:, :4] = 1
    whole = abu(draws=MUCS["draws"])
    part = whole.narrowed(lambda output: region(output, mask), lambda draws: draws)
    task = replace(learned, root=tmp_path)
    asked, trained = part.networks(task)
    assert (asked.output.name, trained.output) != (loss.name, asked.output)
    assert not torch.allclose(part(task).values, whole(task).values)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: abu(rise=0.0), "rise=0.0"),
        (lambda: abu(rise=float("nan")), "rise=nan"),
        (lambda: abu(steps=0), "steps=0"),
        (lambda: abu(damping=-1.0), "damping"),
        (lambda: abu_ek_fac(damping=0.0), "damping"),
        (lambda: mucs(runs=0), "runs=0"),
        (lambda: mucs(share=1.5), "share=1.5"),
        (lambda: mucs(learning_rate=0.0), "learning_rate=0.0"),
        (lambda: mucs(batch_size=0), "batch_size=0"),
    ],
)
def test_settings_that_mean_nothing_are_refused(make, says):
    with refuses(says):
        make()


def test_a_loss_that_cannot_be_raised_is_said(world, tmp_path):
    task = world.task(tmp_path)
    flat = replace(task.forward, predict=lambda call, x_t, t, cond: 0 * call(x_t, t) + x_t.tanh())
    with refuses("the loss of 'query-0000' has no slope to go up (0)", "unlearning"):
        abu(draws=DRAWS)(replace(task, forward=flat))
    with refuses("is not forgotten after 3 steps at 1e-06", "unlearning", "more steps"):
        mucs(draws=fixed(5, 4), steps=3, learning_rate=1e-6)(task)


def test_a_step_that_overflows_is_shortened_or_said(world, tmp_path):
    """Where every long step is beyond all numbers the search goes back; where none raises the loss as asked, it says so."""
    task = world.task(tmp_path)

    def wall(call: Any, x_t: Tensor, t: Tensor, cond: Any) -> Tensor:
        y = call(x_t, t)
        return torch.where(y.abs() > 50, torch.inf, y)

    steep = replace(task, forward=replace(task.forward, predict=wall))
    found = abu(draws=DRAWS, rise=0.5)(steep)
    assert found.recipe["unlearned"]["rise"] == pytest.approx([0.5] * 3, rel=1e-3)

    def bounded(call: Any, x_t: Tensor, t: Tensor, cond: Any) -> Tensor:
        return call(x_t, t).tanh()

    low = replace(task, forward=replace(task.forward, predict=bounded), root=tmp_path / "bounded")
    with refuses("cannot be raised from", "unlearning", "a smaller rise"):
        abu(draws=DRAWS, rise=1e6)(low)


def test_defaults_are_those_of_the_papers():
    how = mucs().forget
    assert isinstance(how, BoundedAscent)
    assert (how.weight, how.share, how.runs) == (0.2, 0.95, 2)
