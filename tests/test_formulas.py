"""Every method against its formula in plain linear algebra, on gradients that are taken here, one image at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import pytest
import torch
from torch import Tensor

from test_precondition import gauss_newton
from whence.diffusion import outputs
from whence.diffusion.draws import once
from whence.diffusion.outputs import Output
from whence.features.parts import Gradient
from whence.methods import METHODS, build, settings_of
from whence.types import Batch, Checkpoint, Draw, Images, Task
from worlds import DRAWS, classifier_task, linear_world

DAMPING, PROBES = 0.05, 2


@dataclass(frozen=True)
class Reference:
    """A task and one checkpoint of it; kind: "linear" or "classifier"."""

    task: Task
    point: Checkpoint

    @property
    def classifier(self) -> bool:
        return self.task.forward.models == "classifier"

    @property
    def loss(self) -> Output:
        return outputs.cross_entropy if self.classifier else outputs.loss

    def rows(self, images: Images, output: Output) -> Tensor:
        """grad of the mean over draws of the output: [b, d]."""
        net = self.point.load().double()
        count = 1 if self.classifier else DRAWS.count
        found = []
        for i in range(len(images)):
            image = images.batch([i])
            draw = DRAWS(image.keys, image.x0.shape[1:], max(self.task.forward.timesteps, 6), torch.float64)
            value = torch.zeros((), dtype=torch.float64)
            for s in range(count):
                batch = Batch(image.x0.double(), image.keys, image.cond)
                prediction, target = self.task.forward(net, batch, Draw(draw.t[:, s], draw.noise[:, s]))
                value = value + output.value(prediction, target)[0] / count
            found.append(torch.cat([g.flatten() for g in torch.autograd.grad(value, list(net.parameters()))]))
        return torch.stack(found)

    def pair(self, output: Output) -> tuple[Tensor, Tensor]:
        return self.rows(self.task.queries, output), self.rows(self.task.train, output)

    @cached_property
    def pixels(self) -> tuple[Tensor, Tensor]:
        q, x = (
            images.batch(range(len(images))).x0.double().flatten(1) for images in (self.task.queries, self.task.train)
        )
        return q, x

    @cached_property
    def hidden(self) -> tuple[Tensor, Tensor]:
        """What the last Linear layer reads, the draws side by side."""
        net = self.point.load().double()
        layer = net.head if self.classifier else net.linear
        kept: list[Tensor] = []
        layer.register_forward_pre_hook(lambda _, args: kept.append(args[0].detach()))
        sides = []
        for images in (self.task.queries, self.task.train):
            self.rows_of(net, images)
            sides.append(torch.cat(kept, dim=1))
            kept.clear()
        return sides[0], sides[1]

    def rows_of(self, net: torch.nn.Module, images: Images) -> None:
        """Call the network on all images, once per draw."""
        batch = images.batch(range(len(images)))
        draw = DRAWS(batch.keys, batch.x0.shape[1:], max(self.task.forward.timesteps, 6), torch.float64)
        for s in range(1 if self.classifier else DRAWS.count):
            of = Batch(batch.x0.double(), batch.keys, batch.cond)
            self.task.forward(net, of, Draw(draw.t[:, s], draw.noise[:, s]))

    @property
    def doubt(self) -> Tensor:
        batch = self.task.train.batch(range(len(self.task.train)))
        p = self.point.load().double()(batch.x0.double()).softmax(1).detach()
        return 1 - p[torch.arange(len(p)), batch.cond["class_labels"]]


def dot(q: Tensor, x: Tensor) -> Tensor:
    return q @ x.T


def cosine(q: Tensor, x: Tensor) -> Tensor:
    return (q / q.norm(dim=1, keepdim=True)) @ (x / x.norm(dim=1, keepdim=True)).T


def damped(matrix: Tensor) -> Tensor:
    """(C + lambda I)^-1 with lambda in units of the mean eigenvalue that is not zero."""
    values = torch.linalg.eigvalsh(matrix)
    unit = values[values > 1e-10 * values[-1]].mean()
    return torch.linalg.inv(matrix + DAMPING * unit * torch.eye(len(matrix), dtype=matrix.dtype))


def fisher(q: Tensor, x: Tensor) -> Tensor:
    return q @ damped(x.T @ x) @ x.T


def output_rows(r: Reference) -> tuple[Tensor, Tensor]:
    """Gradients of the probes side by side, so that inner products are means over probes."""
    pairs = [r.pair(probe) for probe in outputs.probes(PROBES)]
    q, x = (torch.cat([pair[side] for pair in pairs], 1) / PROBES**0.5 for side in (0, 1))
    return q, x


def relatif_theta(q: Tensor, x: Tensor) -> Tensor:
    return fisher(q, x) / (x @ damped(x.T @ x)).norm(dim=1)


def relatif_loss(q: Tensor, x: Tensor) -> Tensor:
    return fisher(q, x) / fisher(x, x).diagonal().sqrt()


def renormalized(q: Tensor, x: Tensor) -> Tensor:
    return fisher(q, x) / x.norm(dim=1)


def exact_influence(r: Reference) -> Tensor:
    """With the matrix of the exact solver, which test_precondition.py compares with autograd."""
    features = Gradient(r.loss, once() if r.classifier else DRAWS)
    q, x = r.pair(r.loss)
    return q @ damped(gauss_newton(r.task, features, r.point)) @ x.T


def layers(r: Reference) -> list[tuple[Tensor, Tensor]]:
    """Gradients of the loss, layer by layer, the last one last."""
    net, (q, x) = r.point.load(), r.pair(r.loss)
    columns = [sum(p.numel() for p in layer.parameters()) for layer in net.children()]
    return list(zip(q.split(columns, 1), x.split(columns, 1), strict=True))


def last_layer_ridge(r: Reference) -> Tensor:
    """One refit per image, on the rows of all others."""
    sides = []
    for images, hidden in zip((r.task.queries, r.task.train), r.hidden, strict=True):
        batch, count = images.batch(range(len(images))), 1 if r.classifier else DRAWS.count
        Z = hidden.unflatten(1, (count, -1))
        if r.classifier:
            Y = torch.nn.functional.one_hot(batch.cond["class_labels"], 3).double()[:, None]
            Z = torch.cat([Z, torch.ones_like(Z[:, :, :1])], 2)
        else:
            Y = DRAWS(batch.keys, batch.x0.shape[1:], 6, torch.float64).noise
        sides.append((Z, Y))
    (zq, yq), (z, y) = sides
    unit = z.square().sum() / z.shape[2] / (z.shape[1] * y.shape[2])

    def errors(keep: list[int]) -> Tensor:
        Z, Y = z[keep].flatten(0, 1), y[keep].flatten(0, 1)
        lam = DAMPING * unit * z.shape[1] * y.shape[2] * torch.eye(Z.shape[1]).double()
        return (yq - zq @ torch.linalg.solve(Z.T @ Z + lam, Z.T @ Y)).square().mean((1, 2))

    everybody = list(range(len(z)))
    return torch.stack([errors([j for j in everybody if j != i]) - errors(everybody) for i in everybody], 1)


def nda(r: Reference) -> Tensor:
    """Mean over draws of the posterior of the training images given the noised query; the images here are one patch."""
    (q, x), task = r.pixels, r.task
    draw = DRAWS(task.queries.batch(range(len(q))).keys, q.shape[1:], 6, torch.float64)
    signal = task.forward.alphas_cumprod[draw.t][..., None]
    x_t = signal.sqrt() * q[:, None] + (1 - signal).sqrt() * draw.noise
    square = (x_t[:, :, None] - signal.sqrt()[:, :, None] * x).square().sum(3)
    return (-square / (2 * (1 - signal))).softmax(2).mean(1)


FORMULAS: dict[str, Callable[[Reference], Tensor]] = {
    "pixel_dot": lambda r: dot(*r.pixels),
    "pixel_cosine": lambda r: cosine(*r.pixels),
    "representation_dot": lambda r: dot(*r.hidden),
    "representation_cosine": lambda r: cosine(*r.hidden),
    "representation_l2": lambda r: -(r.hidden[0][:, None] - r.hidden[1]).norm(dim=2),
    "nda": nda,
    "gradient_dot": lambda r: dot(*r.pair(r.loss)),
    "gradient_cosine": lambda r: cosine(*r.pair(r.loss)),
    "output_dot": lambda r: dot(*output_rows(r)),
    "output_cosine": lambda r: cosine(*output_rows(r)),
    "tracin": lambda r: dot(*r.pair(r.loss)),
    "gas": lambda r: cosine(*r.pair(r.loss)),
    "tracin_last_layer": lambda r: dot(*layers(r)[-1]),
    "gas_layerwise": lambda r: sum((cosine(*pair) for pair in layers(r)), torch.zeros(())),
    "last_layer_ridge": last_layer_ridge,
    "influence": lambda r: fisher(*r.pair(r.loss)),
    "exact_influence": exact_influence,
    "relatif_theta": lambda r: relatif_theta(*r.pair(r.loss)),
    "relatif_loss": lambda r: relatif_loss(*r.pair(r.loss)),
    "renormalized_influence": lambda r: renormalized(*r.pair(r.loss)),
    "trak": lambda r: fisher(*r.pair(outputs.margin)) * r.doubt if r.classifier else fisher(*r.pair(outputs.loss)),
    "d_trak": lambda r: fisher(*r.pair(outputs.squared_norm)),
}
"""The score of one checkpoint. Sums over checkpoints are made below."""

ELSEWHERE = {
    "k_fac": "test_kfac.py",
    "ek_fac": "test_kfac.py",
    "metagradient": "test_unroll.py",
    "averaged_metagradient": "test_unroll.py",
    "further_training": "test_further.py",
    "ek_fac_refined": "test_kfac.py",
    "influence_cg": "test_curvature.py",
    "influence_lissa": "test_curvature.py",
    "datainf": "test_curvature.py",
    "source": "test_curvature.py",
    "clip_cosine": "test_pretrained.py",
    "dino_cosine": "test_pretrained.py",
    "abc_cosine": "test_abc.py",
    "distilled": "test_distill.py",
    "block_trak": "test_blocks.py",
    "weighted_d_trak": "test_blocks.py",
    "journey_trak": "test_journey.py",
    "diffusion_tracin": "test_replay.py",
    "retrac": "test_replay.py",
    "tracin_projected": "test_two_sided.py",
    "das": "test_das.py",
    "das_function": "test_das.py",
    "abu": "test_unlearning.py",
    "abu_ek_fac": "test_unlearning.py",
    "mucs": "test_unlearning.py",
    "guda": "test_groups.py",
    "montrage_style": "test_monitor.py",
}


def test_every_method_has_its_formula():
    assert set(METHODS) - set(ELSEWHERE) == set(FORMULAS), "write the formula of a new method here"


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> dict[str, Task]:
    root = tmp_path_factory.mktemp("formulas")
    return {
        "linear": linear_world(n=14, m=3, dim=4).task(root / "linear"),
        "classifier": classifier_task(root / "classifier"),
    }


def score(task: Task, name: str, **settings: object) -> Tensor:
    wanted = {"dim": None, "damping": DAMPING, "count": PROBES, **settings}
    if task.forward.models == "denoiser":
        wanted["draws"] = DRAWS
    return build(name, task.forward, {k: v for k, v in wanted.items() if k in settings_of(name)})(task).values


def assert_same(found: Tensor, expected: Tensor) -> None:
    scale = float(expected.abs().max())
    torch.testing.assert_close(found / scale, expected / scale, rtol=0, atol=1e-9)


CASES = [
    (world, name)
    for world in ("linear", "classifier")
    for name in FORMULAS
    if world == "linear" or METHODS[name].classifier is not None
]


@pytest.mark.parametrize(("world", "name"), CASES)
def test_scores_are_the_formula(tasks, world, name):
    task = tasks[world]
    several = "checkpoints" in METHODS[name].needs
    weights = {point: point.rate for point in task.trajectory} if several else {task.trajectory[-1]: 1.0}
    assert_same(score(task, name), sum(eta * FORMULAS[name](Reference(task, point)) for point, eta in weights.items()))


def test_ensembles_are_means_over_models(tasks):
    """Kernel and weight apart: the product of averages (TRAK eq. 17)."""
    task = tasks["classifier"]
    first, last = task.trajectory
    members = [Reference(task, point) for point in (first, last)]
    kernels = [fisher(*member.pair(outputs.margin)) for member in members]
    expected = (kernels[0] + kernels[1]) / 2 * (members[0].doubt + members[1].doubt) / 2
    assert_same(score(replace(task, ensemble=(first,)), "trak", ensemble=True), expected)
