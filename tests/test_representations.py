"""Activations of the model itself, encoders that are functions, and Hanawa's checks of both."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from agreement import close
from errors import refuses
from whence import Function, pixel_cosine, representation_cosine, representation_dot, representation_l2
from whence import similarity as similar
from whence.diffusion.draws import Draws, Steps, once
from whence.diffusion.forward import Classifier, Denoiser, linear_schedule
from whence.features.activations import Layers
from whence.methods import normalize
from whence.models.mlp import MLPDenoiser
from whence.types import Draw, Task
from worlds import classifier_task, labelled, linear_world, unet_task

STEPS = Draws(Steps((50, 200, 500)))


@pytest.fixture
def task(tmp_path) -> Task:
    return unet_task(tmp_path)


def encode(task: Task, layers: str, draws: Draws = STEPS) -> Tensor:
    batch = task.train.batch(range(len(task.train)))
    with torch.no_grad():
        return Layers(layers, draws)(task.trajectory[-1].load().eval(), task.forward, batch)


def test_layers_of_a_unet_step_by_step(task):
    """mean over pixels of the mid block, written out for one image and one step after the other; and a module that works
    on tokens, and one on vectors."""
    net, batch = task.trajectory[-1].load().eval(), task.train.batch(range(len(task.train)))
    kept: dict[str, Tensor] = {}
    names = ("mid_block", "mid_block.attentions.0.to_q", "time_embedding")
    for name in names:
        net.get_submodule(name).register_forward_hook(lambda _, args, out, name=name: kept.update({name: out.detach()}))
    found = {name: encode(task, name) for name in ("", *names, "mid_block|time_embedding")}
    signal = task.forward.alphas_cumprod
    for i in range(len(task.train)):
        noise = STEPS(batch.keys[i : i + 1], batch.x0.shape[1:], 1000).noise[0]
        rows: dict[str, list[Tensor]] = {name: [] for name in names}
        for s, t in enumerate((50, 200, 500)):
            x_t = signal[t].sqrt() * batch.x0[i : i + 1] + (1 - signal[t]).sqrt() * noise[s]
            with torch.no_grad():
                net(x_t.float(), torch.tensor([t]))
            rows["mid_block"].append(kept["mid_block"].mean((2, 3))[0])
            rows[names[1]].append(kept[names[1]].mean(1)[0])
            rows["time_embedding"].append(kept["time_embedding"][0])
        for name in names:
            close(found[name][i], torch.cat(rows[name]))
    assert torch.equal(found[""], found["mid_block"])
    both = torch.cat([found["time_embedding"].unflatten(1, (3, -1)), found["mid_block"].unflatten(1, (3, -1))], 2)
    assert torch.equal(found["mid_block|time_embedding"], both.flatten(1)), "the modules in the order of the network"


def test_the_default_of_other_networks_is_the_last_hidden_layer(tmp_path):
    """What the layer called last reads, whatever the order in which the layers were registered."""
    net = MLPDenoiser(sample_size=4, width=16, layers=1).eval()
    kept: list[Tensor] = []
    net.norm.register_forward_hook(lambda _, args, out: kept.append(out.detach()))
    forward = Denoiser(linear_schedule(), predict=lambda call, x, t, cond: call(x, t)[0])
    batch = labelled(3, "x").batch(range(3))
    found = Layers("", STEPS)(net, forward, batch)
    close(found, torch.stack([k.flatten() for k in kept]))

    class Backwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head, self.body = nn.Linear(5, 3), nn.Conv2d(1, 5, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.body(x).tanh().flatten(1))

    other = Backwards()
    found = Layers("", once())(other, Classifier(), batch)
    close(found, other.body(batch.x0).tanh().flatten(1))


def test_a_module_called_twice_counts_with_the_mean(tmp_path):
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(self.layer(x.flatten(1)).relu())

    net, batch = Twice(), labelled(3, "x").batch(range(3))
    first = net.layer(batch.x0.flatten(1))
    expected = (first + net.layer(first.relu())) / 2
    close(Layers("layer", once())(net, Classifier(), batch), expected)


def test_layers_that_are_not_there(task, tmp_path):
    with refuses("layers 'middle' match no whole module name; there are conv_in, time_proj"):
        representation_dot("middle")(task)
    with refuses("layers '(' is not a regular expression"):
        representation_dot("(")(task)
    with refuses("layers: down_blocks is never called by this model"):
        representation_dot("down_blocks")(task)
    with refuses("timestep 500 asked, but the schedule has steps 0 to 5"):
        representation_dot()(linear_world(n=4, m=2, dim=4).task(tmp_path))

    class Merging(nn.Module):
        """Puts the images of a batch into one row."""

        def forward(self, x: Tensor) -> Tensor:
            return x

    net = nn.Sequential(nn.Flatten(0), Merging(), nn.Unflatten(0, (-1, 16)))
    with refuses("layers: 1 gives [16] for 1 images; the first axis must be the images"):
        Layers("1", once())(net, Classifier(), labelled(1, "x").batch([0]))


# ------------------------------------------------------------------------------------------------------ Hanawa's checks


MEASURES = [representation_dot, representation_cosine, representation_l2]


@pytest.mark.parametrize("method", MEASURES)
def test_identical_class(tmp_path, method):
    """Hanawa et al. 2021: the strongest training image of a query is of the class that the model sees in it. The network
    was trained; by chance a third would agree."""
    task = classifier_task(tmp_path, m=40)
    scores = method(draws=once())(task)
    net, batch = task.trajectory[-1].load().double(), task.queries.batch(range(40))
    seen = net(batch.x0.double()).argmax(1)
    best = task.train.labels[scores.values.argmax(1)]
    assert float((best == seen).double().mean()) > 0.85


@pytest.mark.parametrize("method", MEASURES[1:])
@pytest.mark.parametrize("world", [unet_task, classifier_task])
def test_an_image_finds_itself(tmp_path, method, world):
    """A training image as query ranks itself first, by cosine and by distance: its noise is keyed by its content."""
    task = world(tmp_path)
    settings = {"draws": once()} if world is classifier_task else {}
    scores = method(**settings)(replace(task, queries=task.train))
    assert scores.values.argmax(1).tolist() == list(range(len(task.train)))


def test_cosine_of_a_dead_layer_is_zero(tmp_path):
    """Hanawa's rule: 0 where a norm is 0, not NaN."""
    task = classifier_task(tmp_path)

    scores = similar(Function(lambda x: x.flatten(1) * 0, "1", "dead"))(task)
    assert torch.equal(scores.values, torch.zeros_like(scores.values))


# ----------------------------------------------------------------------------------------------------- users' functions


def brightness(x: Tensor) -> Tensor:
    return torch.stack([x.mean((1, 2, 3)), x.std((1, 2, 3))], 1)


def test_functions_as_encoders(task):
    q, x = (brightness(images.x0).double() for images in (task.queries, task.train))
    found = {metric: similar(brightness, metric, "v1")(task).values for metric in (normalize.none, normalize.distance)}
    close(found[normalize.none], q @ x.T)
    close(found[normalize.distance], -(q[:, None] - x).norm(dim=2))
    whole = similar(lambda x: x.flatten(1), digest="1", name="pixels")(task)
    close(whole.values, pixel_cosine()(task).values)
    assert similar(brightness, digest="v1")(task).recipe["method"]["train"]["encoder"] == {
        "is": "Function",
        "name": "test_representations.brightness",
        "digest": "v1",
    }


def test_functions_without_a_name_or_a_digest(task):
    with refuses("has no name to keep its features under; give Function(..., name=)"):
        similar(lambda x: x.flatten(1), digest="1")
    with refuses("brightness: digest is empty; give a text that changes whenever its results do"):
        similar(brightness)
    with refuses("encoder whole returns [1, 1, 4, 4] for 1 pictures; it must be [1, k]"):
        similar(lambda x: x, digest="1", name="whole")(task)


def test_another_digest_is_another_feature(task):
    """Stored rows are not read again for a function that has changed."""
    factor = 1.0

    def scaled(x: Tensor) -> Tensor:
        return factor * x.flatten(1)

    first = similar(scaled, normalize.none, "1")(task).values
    factor = 2.0
    assert torch.equal(similar(scaled, normalize.none, "1")(task).values, first)
    close(similar(scaled, normalize.none, "2")(task).values, 4 * first)


def test_steps_are_those_given():
    draw = STEPS(torch.tensor([3, 8]), (2,), 1000)
    assert isinstance(draw, Draw)
    assert draw.t.tolist() == [[50, 200, 500]] * 2
    assert draw.noise.shape == (2, 3, 2)
