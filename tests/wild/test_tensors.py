"""Pictures, models and outputs in memory, of whatever type: they are seen, or refused in one line."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
import torch.utils.checkpoint
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from transformers.modeling_outputs import ImageClassifierOutput

from agreement import close
from errors import refuses
from whence import Classifier, attribute, d_trak, task_from_module, trak
from whence.data.images import tensor_images
from whence.diffusion.draws import uniform
from whence.diffusion.forward import Denoiser, FlowMatching, linear_schedule
from whence.diffusion.outputs import OUTPUTS, Output
from whence.features.gradients import measure
from whence.types import Batch, Draw, Engine

T = 1000
FORWARDS = {
    "epsilon": Denoiser(linear_schedule(T)),
    "v_prediction": Denoiser(linear_schedule(T), "v_prediction"),
    "sample": Denoiser(linear_schedule(T), "sample"),
    "float32 schedule": Denoiser(linear_schedule(T).float()),
    "flow": FlowMatching(torch.linspace(1e-3, 1, T, dtype=torch.float64)),
    "preconditioned": FlowMatching(torch.linspace(1e-3, 1, T, dtype=torch.float64), preconditioned=True),
}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(16, 16)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.layer(x.flatten(1)).reshape(x.shape)


def scores(x0: Tensor, forward: object, root, dtype: torch.dtype = torch.float32) -> Tensor:
    train, queries = tensor_images(x0[:6], value_range=(-1, 1)), tensor_images(x0[6:], value_range=(-1, 1))
    task = task_from_module(Net(), forward, train, queries, root, Engine(dtype=dtype))
    return d_trak(draws=uniform(5), dim=None, damping=0.1)(task).values


INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool)


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
@pytest.mark.parametrize("name", FORWARDS)
def test_integer_pictures_are_seen(name, dtype, tmp_path):
    """Black and white: as they are, whatever the type. The noise is keyed by content, so it is given the same."""
    x0 = (torch.rand(8, 1, 4, 4, generator=torch.Generator().manual_seed(1)) < 0.5).to(dtype)
    batch = Batch(x0, torch.arange(8))
    at = Draw(torch.tensor([0, 1, 10, 100, 300, 500, 900, 999]), torch.randn(8, 1, 4, 4))
    seen = FORWARDS[name](lambda x, t: x, batch, at)
    expected = FORWARDS[name](lambda x, t: x, Batch(x0.float(), batch.keys), at)
    for found, truth in zip(seen, expected, strict=True):
        assert torch.equal(found, truth)
    assert torch.isfinite(scores(x0, FORWARDS[name], tmp_path)).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", FORWARDS)
def test_schedules_are_exact_in_every_precision(name, dtype):
    """The noise scale of each timestep, to the precision of the pictures: not that of 1 - abar in it."""
    forward, noise = FORWARDS[name], torch.ones(T, 1, dtype=dtype)
    at = Draw(torch.arange(T), noise)
    levels = []
    for kind in (dtype, torch.float64):
        given: list[Tensor] = []

        def look(x: Tensor, t: Tensor, given: list[Tensor] = given) -> Tensor:
            given.append(x)
            return x

        forward(look, Batch(torch.zeros(T, 1, dtype=kind), torch.arange(T)), Draw(at.t, noise.to(kind)))
        levels.append(given[0].double())
    assert float(levels[0].min()) > 0
    assert float(((levels[0] - levels[1]) / levels[1]).abs().max()) <= 2 * torch.finfo(dtype).eps


def test_doubt_is_above_zero_as_long_as_a_number_can_be():
    """1 - p of the class at margins up to 80: against float64."""
    margins = torch.linspace(-20, 80, 101)
    logits = torch.stack([margins, torch.zeros(101)], dim=1)
    label = torch.zeros(101, dtype=torch.int64)
    found = OUTPUTS["doubt"].value(logits, label)
    truth = 1 / (1 + margins.double().exp())
    assert (found > 0).all()
    assert float(((found.double() - truth) / truth).abs().max()) < 1e-4
    three = torch.cat([logits, logits[:, 1:]], dim=1)
    close(OUTPUTS["doubt"].value(three, label).double(), 2 / (2 + margins.double().exp()))


class Sure(nn.Module):
    """A classifier whose margins are about 60."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2, bias=False)
        self.layer.weight = nn.Parameter(torch.eye(2) * 30)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def test_trak_of_a_classifier_that_is_sure_is_not_zero(tmp_path):
    labels = torch.arange(8) % 2
    x0 = nn.functional.one_hot(labels).float() * 2 - 1 + 0.1 * torch.randn(8, 2)
    task = task_from_module(
        Sure(), Classifier(), tensor_images(x0, labels=labels), tensor_images(x0, labels=labels), tmp_path
    )
    assert (trak(dim=None, output=OUTPUTS["margin"])(task).values != 0).all()


SHAPES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "a number": lambda p, y: (p - y).square().mean(),
    "elements": lambda p, y: (p - y).square(),
    "a column": lambda p, y: (p - y).square().flatten(1).mean(1, keepdim=True),
    "channels": lambda p, y: (p - y).square().mean((2, 3)),
}


@pytest.mark.parametrize("name", SHAPES)
def test_an_output_of_another_shape_is_refused(name, tmp_path):
    mine, x0 = Output("mine", SHAPES[name], "lower"), torch.randn(3, 1, 4, 4)
    batch, at = Batch(x0, torch.arange(3)), Draw(torch.tensor([1, 2, 3]), torch.randn_like(x0))
    with refuses(what="returns shape", where="output 'mine'", accepted="one number per row"):
        measure(Net(), {}, FORWARDS["epsilon"], mine, batch, at)
    images = tensor_images(x0)
    with refuses(where="output 'mine'"):
        attribute((Net(), FORWARDS["epsilon"]), images, images, "d_trak", tmp_path, output=mine, dim=None)


# --------------------------------------------------------------------------------------------------------------- labels


class Classes(nn.Module):
    def __init__(self, classes: int = 3):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


X = torch.randn(6, 4, generator=torch.Generator().manual_seed(2))
LABELS = {
    "fractions": ([0.7, 1.9, -0.4, 0, 1, 2], "is no whole number", "class indices"),
    "nan": ([0.0, 1, 2, 0, 1, float("nan")], "is no whole number", "class indices"),
    "one-hot": (torch.eye(3)[[0, 1, 2, 0, 1, 2]], "one-hot", "argmax"),
    "a column": ([[0], [1], [2], [0], [1], [2]], "shape [6, 1]", "class indices"),
    "ignored": ([0, 1, 2, -100, 1, 2], "-100 is below 0", "leave images without a class out"),
    "complex": ([1j, 0, 0, 0, 0, 0], "is no whole number", "class indices"),
    "a number": (torch.tensor(3), "shape []", "class indices"),
}


@pytest.mark.parametrize("name", LABELS)
def test_labels_that_are_no_classes_are_refused(name):
    labels, what, accepted = LABELS[name]
    with refuses(what=what, where="labels", accepted=accepted):
        tensor_images(X, labels=labels)


@pytest.mark.parametrize(
    "labels", [[0.0, 1.0, 2.0], torch.tensor([0, 1, 2], dtype=torch.uint8), [True, False, True]], ids=str
)
def test_whole_numbers_are_classes_whatever_their_type(labels):
    assert tensor_images(X[:3], labels=labels).labels.tolist() == [int(label) for label in labels]


@pytest.mark.parametrize("side", ["train", "queries"])
def test_labels_beyond_the_classes_are_refused_with_the_image(side, tmp_path):
    right, wrong = tensor_images(X, labels=[0, 1, 2, 0, 1, 2]), tensor_images(X, labels=[0, 1, 2, 0, 3, 2])
    sides = {"train": right, "queries": right} | {side: wrong}
    for method in ("trak", "gradient_dot", "last_layer_ridge"):
        more = {} if method == "last_layer_ridge" else {"dim": None}
        with refuses(what="image '4' has label 3, but the network has 3 classes", accepted="0 to 2"):
            attribute((Classes(), Classifier()), **sides, method=method, root=tmp_path / method, **more)


@pytest.mark.parametrize("classes", [1], ids=["one logit"])
def test_one_logit_is_refused_by_name(classes, tmp_path):
    images = tensor_images(X, labels=[0, 0, 0, 0, 0, 0])
    with refuses(what="returns [1, 1] for one image", accepted="of one logit z make [0, z]"):
        attribute((Classes(classes), Classifier()), images, images, "trak", tmp_path)


# -------------------------------------------------------------------------------------------------------------- networks


class Returning(Classes):
    """What networks of libraries return."""

    def __init__(self, how: Callable[[Tensor], object]):
        super().__init__()
        self.how = how

    def forward(self, x: Tensor) -> object:
        return self.how(self.layer(x))


RETURNS: dict[str, Callable[[Tensor], object]] = {
    "a tuple": lambda y: (y, y + 1),
    "a list": lambda y: [y],
    "a dict": lambda y: {"loss": y.sum(), "logits": y},
    "a dict of one": lambda y: {"anything": y},
    "transformers": lambda y: ImageClassifierOutput(logits=y),
    "diffusers": lambda y: UNet2DOutput(sample=y),
}


@pytest.mark.parametrize("name", RETURNS)
def test_what_networks_return_is_understood(name, tmp_path):
    images = tensor_images(X, labels=[0, 1, 2, 0, 1, 2])
    found, expected = (
        attribute((net, Classifier()), images, images, "gradient_dot", tmp_path / str(i), dim=None).values
        for i, net in enumerate((Returning(RETURNS[name]), Classes()))
    )
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    "how", [lambda y: None, lambda y: {"a": y, "b": y}, lambda y: ("x", y)], ids=["none", "two", "text"]
)
def test_what_is_not_understood_is_refused(how, tmp_path):
    images = tensor_images(X, labels=[0, 1, 2, 0, 1, 2])
    with refuses(what="the network returns a", accepted="whence.Custom"):
        attribute((Returning(how), Classifier()), images, images, "gradient_dot", tmp_path, dim=None)


class Looking(Classes):
    """Control flow that looks at a value."""

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * (2.0 if x.sum().item() > 1e9 else 1.0)


class Checkpointed(Classes):
    reentrant = False

    def forward(self, x: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(self.layer, x, use_reentrant=self.reentrant)


class Reentrant(Checkpointed):
    reentrant = True


@pytest.mark.filterwarnings("ignore:None of the inputs")
def test_gradients_that_are_lost_are_told(tmp_path):
    images = tensor_images(X, labels=[0, 1, 2, 0, 1, 2])
    with pytest.warns(UserWarning, match="the same score, 0, for 6 of 6 pictures"):
        attribute((Reentrant(), Classifier()), images, images, "gradient_dot", tmp_path, dim=None)
    with refuses(what="all training features ... are zero"):
        attribute((Reentrant(), Classifier()), images, images, "trak", tmp_path, dim=None)


@pytest.mark.parametrize("kind", [Looking, Checkpointed])
def test_what_cannot_be_vectorised_is_taken_one_by_one(kind, tmp_path):
    images = tensor_images(X, labels=[0, 1, 2, 0, 1, 2])
    found, expected = (
        attribute((net(), Classifier()), images, images, "gradient_dot", tmp_path / net.__name__, dim=None).values
        for net in (kind, Classes)
    )
    close(found, expected)


class Dropping(Classes):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(self.layer(x), 0.5, training=True)


def test_dropout_that_is_always_on_is_refused(tmp_path):
    images = tensor_images(X, labels=[0, 1, 2, 0, 1, 2])
    with refuses(what="two passes of this Dropping over one image differ", accepted="without dropout"):
        attribute((Dropping(), Classifier()), images, images, "gradient_dot", tmp_path, dim=None)


def test_lazy_and_parameterless_networks_are_refused(tmp_path):
    images = tensor_images(X, labels=[0, 1, 2, 0, 1, 2])
    with refuses(what="has no shape yet", accepted="call it on a picture first"):
        attribute((nn.Sequential(nn.LazyLinear(3)), Classifier()), images, images, "trak", tmp_path / "a")
    with refuses(what="has no parameters", accepted="a network with weights"):
        attribute((nn.Flatten(), Classifier()), images, images, "trak", tmp_path / "b")


# ------------------------------------------------------------------------------------------------------------- pictures

PICTURES = torch.rand(4, 1, 4, 4, generator=torch.Generator().manual_seed(3)) * 2 - 1


def dots(train: object, queries: object, root) -> Tensor:
    return attribute((Net(), FORWARDS["epsilon"]), train, queries, "pixel_dot", root).values  # type: ignore[arg-type]


SAME = {
    "tensor": PICTURES,
    "array": PICTURES.numpy(),
    "list of tensors": list(PICTURES),
    "list of arrays": [one.numpy() for one in PICTURES],
    "not contiguous": PICTURES.permute(0, 1, 3, 2).numpy().transpose(0, 1, 3, 2),
}


@pytest.mark.parametrize("name", SAME)
def test_pictures_in_memory_are_taken_in_any_form(name, tmp_path):
    expected = dots(PICTURES, PICTURES[:1], tmp_path / "plain")
    assert torch.equal(dots(SAME[name], SAME[name][:1], tmp_path / "other"), expected)


NO_PICTURES: dict[str, tuple[object, str, str]] = {
    "none": (PICTURES[:0], "there is no picture", "[n, C, H, W]"),
    "an empty list": ([], "they make no array", "[n, C, H, W]"),
    "one without an axis": (PICTURES[0], "is one picture", "x[None]"),
    "channels last": (torch.zeros(4, 8, 8, 3), "channels last", "permute"),
    "bytes": (
        torch.arange(64, dtype=torch.uint8).reshape(4, 1, 4, 4),
        "torch.uint8 from 0 to 63",
        "value_range=(0, 255)",
    ),
    "unequal": ([torch.zeros(1, 4, 4), torch.zeros(1, 5, 5)], "they make no array", "[n, C, H, W]"),
    "a data set": (TensorDataset(PICTURES), "a TensorDataset has no stable names", "torch.stack"),
    "a loader": (DataLoader(TensorDataset(PICTURES)), "a DataLoader has no stable names", "torch.stack"),
    "a dict": ({"x": PICTURES}, "a dict holds no pictures", "[n, C, H, W]"),
    "complex": (PICTURES.to(torch.complex64), "complex numbers", "[n, C, H, W]"),
    "nothing": (None, "a NoneType holds no pictures", "[n, C, H, W]"),
}


@pytest.mark.parametrize("side", ["train", "queries"])
@pytest.mark.parametrize("name", NO_PICTURES)
def test_what_is_no_pictures_is_refused(name, side, tmp_path):
    given, what, accepted = NO_PICTURES[name]
    sides = {"train": PICTURES, "queries": PICTURES} | {side: given}
    with refuses(what=what, where=side, accepted=accepted):
        dots(sides["train"], sides["queries"], tmp_path)


def test_settings_may_be_plain_values(tmp_path):
    """A number of draws changes the count of the method's own rule; an output may be named."""
    model = (Net(), FORWARDS["epsilon"])
    plain = attribute(model, PICTURES, PICTURES, "d_trak", tmp_path, dim=None, draws=7, output="loss").values
    own = d_trak(draws=d_trak().train.draws.with_count(7), dim=None, output=OUTPUTS["loss"])
    assert d_trak(draws=7, dim=None, output="loss") == own
    task = task_from_module(*model, PICTURES, PICTURES, tmp_path / "b")
    assert torch.equal(own(task).values, plain)
    with refuses(what="unknown output 'lss'", accepted="loss"):
        d_trak(output="lss")


def test_scores_that_say_nothing_are_told(tmp_path):
    """A black picture has the dot product 0 with everything."""
    black = torch.cat([torch.zeros(1, 1, 4, 4), PICTURES[:1]])
    with pytest.warns(UserWarning, match=r"the same score, 0, for 1 of 2 pictures, such as '0'"):
        scores = dots(PICTURES, black, tmp_path)
    assert not scores[0].any()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dots(PICTURES, PICTURES, tmp_path / "told apart")
