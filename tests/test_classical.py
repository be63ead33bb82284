"""TracIn of the last layer, GAS layer by layer, and what images do for themselves."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from agreement import close
from errors import refuses
from whence import self_influence
from whence.diffusion import outputs
from whence.diffusion.draws import once, uniform
from whence.diffusion.forward import Classifier
from whence.features.gradients import LAST, select
from whence.features.parts import Value
from whence.features.projections import SJLT, Layerwise
from whence.features.rows import rows
from whence.methods import METHODS, build, settings_of
from whence.methods.influence import exact_influence, influence
from whence.methods.inner_product import InnerProduct
from whence.methods.last_layer import Moments, last_layer_ridge
from whence.methods.tracin import gas, gas_layerwise, gradient_dot, tracin, tracin_last_layer
from whence.types import Engine, Images, Task
from worlds import ConvClassifier, checkpoint, classifier_task, labelled, loss_of_moments, tensors, unet_task

LABELS = {"output": outputs.cross_entropy, "draws": once()}


@pytest.fixture(scope="module")
def task(tmp_path_factory) -> Task:
    return classifier_task(tmp_path_factory.mktemp("classical"))


def factors(net: nn.Module, images: Images) -> tuple[Tensor, Tensor]:
    """What the head reads, and the gradient of the loss by the logits: softmax - one-hot."""
    batch, kept = images.batch(range(len(images))), []
    net.head.register_forward_pre_hook(lambda _, args: kept.append(args[0].detach()))
    p = net(batch.x0.double()).softmax(1).detach()
    return kept[0], p - F.one_hot(batch.cond["class_labels"], p.shape[1])


def test_tracin_of_the_last_layer_is_a_product_of_two_products(task):
    """(x_q . x_i + 1)(delta_q . delta_i), with the bias; without the +1 it is another matrix."""
    expected = without = torch.zeros(())
    for point in task.trajectory:
        (xq, dq), (xi, di) = (factors(point.load().double(), images) for images in (task.queries, task.train))
        expected = expected + point.rate * (xq @ xi.T + 1) * (dq @ di.T)
        without = without + point.rate * (xq @ xi.T) * (dq @ di.T)
    found = tracin_last_layer(**LABELS)(task).values
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    assert float((found - without).norm() / found.norm()) > 0.05
    assert torch.equal(found, tracin(dim=None, parameters=r"^head\.", **LABELS)(task).values)


def test_the_last_layer_of_a_denoiser_is_its_output_convolution(tmp_path):
    task = unet_task(tmp_path)
    assert select(task.trajectory[0].load(), LAST) == ["conv_out.weight", "conv_out.bias"]
    found = tracin_last_layer(draws=uniform(4))(task)
    expected = tracin(draws=uniform(4), dim=None, parameters="conv_out")(task)
    assert torch.equal(found.values, expected.values)
    assert select(nn.Linear(2, 2), LAST) == ["weight", "bias"]
    with refuses("'last-layer': LayerNorm has no Linear or Conv2d layer"):
        select(nn.LayerNorm(3), LAST)


def test_gas_of_one_layer_is_gas(task):
    settings = {"dim": None, "parameters": LAST, **LABELS}
    torch.testing.assert_close(
        gas_layerwise(**settings)(task).values, gas(**settings)(task).values, rtol=1e-9, atol=1e-12
    )
    whole = {**settings, "parameters": "all"}
    assert not torch.allclose(gas_layerwise(**whole)(task).values, gas(**whole)(task).values, rtol=0.1)


def test_layers_count_alike_whatever_their_size():
    """Scaling one layer's gradient changes nothing; its weight and bias keep their proportion; dead layers count nothing."""
    g = torch.Generator().manual_seed(0)
    blocks = {name: torch.randn(4, 6, generator=g).double() for name in ("a.weight", "a.bias", "b.weight", "c.weight")}
    blocks["c.weight"][:] = 0
    whole = Layerwise()(blocks)
    close((whole @ whole.T).diagonal(), torch.full((4,), 2.0), 1e-12)
    scaled = {name: block * (100 if name.startswith("a.") else 1) for name, block in blocks.items()}
    close(Layerwise()(scaled), whole, 1e-12)
    close(whole[:, :6] / whole[:, 6:12], blocks["a.weight"] / blocks["a.bias"], 1e-12)
    assert Layerwise(SJLT(5)).width({"a.weight": (6,), "b.weight": (2, 3)}) == 5


# ---------------------------------------------------------------------------------------------- ridge of the last layer


def test_moments_of_a_convolution_give_the_loss_of_the_model(tmp_path):
    """f(theta) at the weights that the output convolution has, from moments alone, is the model's own loss."""
    task = unet_task(tmp_path, dtype=torch.float64)
    net, point = task.trajectory[-1].load(), task.trajectory[-1]
    theta = torch.cat([net.conv_out.weight.flatten(1).T, net.conv_out.bias[None]]).double().detach()
    moments = rows(Moments(uniform(4)), task, point, task.train, "x").all().double()
    expected = rows(Value(outputs.loss, uniform(4)), task, point, task.train, "x").all()[:, 0].double()
    torch.testing.assert_close(loss_of_moments(theta, moments), expected, rtol=1e-9, atol=0)


def test_models_that_do_not_end_with_a_layer_are_refused(task):
    bounded = nn.Sequential(nn.Flatten(), nn.Linear(16, 3), nn.Tanh())
    odd = replace(task, trajectory=(checkpoint(lambda: bounded, "bounded"),))
    with refuses("does not end with a Linear or Conv2d that gives its prediction"):
        last_layer_ridge(draws=once())(odd)


# ------------------------------------------------------------------------------------------------------- self-influence


IN_STEPS = ("ek_fac_refined", "influence_cg", "influence_lissa")  # which refuse it, see test_contract.py
SELF = [name for name, e in METHODS.items() if e.classifier is not None and not {"encoder", "student"} & {*e.needs}]
SELF = [name for name in SELF if name not in IN_STEPS]


@pytest.mark.parametrize("name", SELF)
def test_self_influence_is_the_diagonal_of_all_scores(task, name):
    """For every method of inner-product form."""
    wanted = {"dim": 24, "damping": 0.05, "count": 2}
    method = build(name, task.forward, {k: v for k, v in wanted.items() if k in settings_of(name)})
    if not isinstance(method, InnerProduct):
        return
    values = method(replace(task, queries=task.train)).values
    close(values.diagonal_scatter(self_influence(method, task)), values, 1e-6)


def test_methods_with_another_query_have_no_self_influence(task):
    method = influence(**LABELS)
    other = replace(method, query=replace(method.train, output=outputs.margin))
    with refuses("influence measures queries in another way than training images"):
        self_influence(other, task)


@pytest.mark.parametrize(
    "method",
    [gradient_dot(dim=None, **LABELS), influence(dim=None, **LABELS), exact_influence(**LABELS)],
    ids=lambda m: m.name,
)
def test_mislabelled_images_stand_out(tmp_path: Path, method):
    """AUROC of self-influence for finding 20 wrong labels among 120; by chance 0.5 +- 0.05."""
    images = labelled(120, "train", seed=3)
    wrong = torch.randperm(120, generator=torch.Generator().manual_seed(0))[:20]
    labels = images.labels.clone()
    labels[wrong] = (labels[wrong] + 1) % 3
    images = tensors(images.x0, "train", labels)
    torch.manual_seed(0)
    net, batch = ConvClassifier(), images.batch(range(120))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.2)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(net(batch.x0), labels).backward()
        optimizer.step()
    point = checkpoint(lambda: copy.deepcopy(net), "mislabelled")
    task = Task(Classifier(), (point,), images, labelled(2, "query", seed=1), tmp_path, Engine(dtype=torch.float64))
    is_wrong = torch.zeros(120)
    is_wrong[wrong] = 1
    area = roc_auc_score(is_wrong, self_influence(method, task))
    print(f"{method.name}: AUROC {area:.3f}")
    assert area > 0.85
