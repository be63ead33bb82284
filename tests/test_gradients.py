"""Both gradient backends equal a naive loop: one image, one draw, one plain backward pass at a time."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from agreement import close
from errors import refuses
from whence.diffusion import draws, outputs
from whence.diffusion.draws import Draws, Grid, OneDraw, Repeated
from whence.diffusion.forward import Classifier, Denoiser, linear_schedule
from whence.diffusion.outputs import Output
from whence.features import gradients
from whence.features.gradients import check, per_image, per_image_backward, per_image_vmap, select
from whence.features.parts import Gradient
from whence.types import Batch, Blocks, Draw, Engine, Forward
from worlds import ConvClassifier, labelled, predict, tensors, unet

BACKENDS = [per_image_vmap, per_image_backward]
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


class MLP(nn.Module):
    """A denoiser of vectors with a conditioning input, a parameter it does not use and a layer it uses twice."""

    def __init__(self, dim: int = 5):
        super().__init__()
        self.inner = nn.Linear(dim, dim)
        self.outer = nn.Linear(dim, dim)
        self.unused = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor, t: Tensor, shift: Tensor) -> Tensor:
        hidden = torch.tanh(self.inner(x) + t[:, None] / 10 + shift)
        return self.outer(torch.tanh(self.inner(hidden)))


def world(name: str, dtype: torch.dtype) -> tuple[nn.Module, Forward, Batch, tuple[Output, ...]]:
    g = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    if name == "classifier":
        batch = labelled(4, "image").batch(range(4)).to("cpu", dtype)
        return ConvClassifier().to(dtype), Classifier(), batch, (outputs.cross_entropy, outputs.margin)
    if name == "mlp":
        batch = tensors(torch.randn(4, 5, generator=g), "image").batch(range(4))
        batch = replace(batch, cond={"shift": torch.randn(4, 5, generator=g)}).to("cpu", dtype)
        return MLP().to(dtype), Denoiser(linear_schedule(20)), batch, (outputs.loss, outputs.elbo, outputs.squared_norm)
    net = unet().to(dtype).eval()
    batch = tensors(torch.randn(3, 1, 4, 4, generator=g), "image").batch(range(3)).to("cpu", dtype)
    if name == "unet channels_last":
        net = net.to(memory_format=torch.channels_last)
        batch = replace(batch, x0=batch.x0.to(memory_format=torch.channels_last))
        assert any(not p.is_contiguous() for p in net.parameters()), "some weights must really lie channels last"
    return net, Denoiser(linear_schedule(), predict=predict), batch, (outputs.loss,)


WORLDS = ["mlp", "classifier", "unet", "unet channels_last"]


def naive(net: nn.Module, forward: Forward, output: Output, d: Draws, batch: Batch, names: list[str]) -> Blocks:
    """g_i = mean_s u_s grad f(x_i; s), with no function of whence.gradients."""
    parameters = dict(net.named_parameters())
    rows: list[list[Tensor]] = []
    for i in range(len(batch)):
        image = Batch(batch.x0[[i]], batch.keys[[i]], {k: v[[i]] for k, v in batch.cond.items()})
        draw = d(image.keys, image.x0.shape[1:], forward.timesteps, image.x0.dtype)
        total = [torch.zeros(parameters[name].numel(), dtype=image.x0.dtype) for name in names]
        for s in range(d.count):
            net.zero_grad()
            prediction, target = forward(net, image, Draw(draw.t[:, s], draw.noise[:, s]))
            value = output.value(prediction, target)
            if output.weight is not None:
                value = value * output.weight(forward, draw.t[:, s]).to(value)
            value.sum().backward()
            grads = [parameters[name].grad for name in names]
            flat = [torch.zeros(t.shape) if g is None else g.reshape(-1) for g, t in zip(grads, total, strict=True)]
            norm = torch.cat(flat).norm() if d.unit else 1.0
            total = [t + f / norm / d.count for t, f in zip(total, flat, strict=True)]
        rows.append(total)
    net.zero_grad()
    return {name: torch.stack([row[j] for row in rows]) for j, name in enumerate(names)}


def assert_same_rows(found: Blocks, expected: Blocks, tolerance: float) -> None:
    assert list(found) == list(expected)
    a, b = (torch.cat(list(blocks.values()), 1).double() for blocks in (found, expected))
    error = (a - b).norm(dim=1) / b.norm(dim=1)
    assert float(error.max()) < tolerance, f"relative error of the rows: {error.tolist()}"


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", WORLDS)
@pytest.mark.parametrize("d", [draws.uniform(3), draws.stratified(4, unit=True)], ids=["plain", "unit"])
def test_both_backends_equal_the_naive_loop(name, dtype, d):
    net, forward, batch, measured = world(name, dtype)
    names = select(net, "all")
    for output in measured:
        expected = naive(net, forward, output, d, batch, names)
        for backend in BACKENDS:
            assert_same_rows(backend(net, forward, output, d, batch, names), expected, TOLERANCE[dtype])


def test_rows_of_images_differ():
    """The comparison above would be empty if all rows were alike or tiny."""
    net, forward, batch, _ = world("unet", torch.float64)
    blocks = per_image_backward(net, forward, outputs.loss, draws.uniform(3), batch, select(net, "all"))
    rows = torch.cat(list(blocks.values()), 1)
    assert float(rows.norm(dim=1).min()) > 1e-2
    assert float(torch.corrcoef(rows).tril(-1).max()) < 0.99


@pytest.mark.parametrize("count", [1, 2, 5, 8, 11])
def test_draws_in_several_passes(monkeypatch, count):
    monkeypatch.setattr(gradients, "DRAWS_AT_ONCE", 4)
    net, forward, batch, _ = world("mlp", torch.float64)
    names, d = select(net, "all"), draws.random(count)
    expected = naive(net, forward, outputs.loss, d, batch, names)
    assert_same_rows(per_image_backward(net, forward, outputs.loss, d, batch, names), expected, 1e-12)


@pytest.mark.parametrize("d", [draws.uniform(1), draws.uniform(5), draws.uniform(5, unit=True)], ids=["1", "5", "unit"])
@pytest.mark.parametrize("at_once", [1, 3, 4, 100])
def test_pieces_of_a_batch(d, at_once):
    net, forward, batch, _ = world("mlp", torch.float64)
    names = select(net, "all")
    pieces = list(per_image(net, forward, outputs.loss, d, batch, names, at_once))
    assert [i for rows, _ in pieces for i in range(rows.start, rows.stop)] == list(range(4))
    found = {name: torch.cat([blocks[name] for _, blocks in pieces]) for name in names}
    assert_same_rows(found, naive(net, forward, outputs.loss, d, batch, names), 1e-12)


@pytest.mark.parametrize("name", ["mlp", "classifier"])
def test_small_networks_see_several_batches_in_one_pass(monkeypatch, name):
    """As many as `VALUES_AT_ONCE` allows, with their conditions and labels; rows are those of batches apart."""
    net, forward, batch, measures = world(name, torch.float64)
    part = Gradient(measures[0], draws.once() if name == "classifier" else draws.uniform(2))
    engine = Engine(dtype=torch.float64)
    singles = [gradients.one(batch, i) for i in range(len(batch))]
    seen, true = [], gradients.per_image_vmap
    monkeypatch.setattr(gradients, "per_image_vmap", lambda *a: seen.append(len(a[4])) or true(*a))
    size = sum(p.numel() for p in net.parameters()) * batch.x0[0].numel()
    found = {}
    for at_once, expected in {0: [1, 1, 1, 1], 2: [2, 2], 3: [3, 1], 9: [4]}.items():
        monkeypatch.setattr(gradients, "VALUES_AT_ONCE", at_once * size)
        found[at_once] = part.compute(net, forward, iter(singles), len(batch), engine)
        assert seen == expected
        seen.clear()
        torch.testing.assert_close(found[at_once], found[0], rtol=1e-10, atol=1e-14)
    monkeypatch.setattr(gradients, "VALUES_AT_ONCE", 9 * size)
    tight = replace(engine, budget=2 * 3 * part.bytes_per_image(net, torch.float64))
    assert torch.allclose(part.compute(net, forward, iter(singles), len(batch), tight), found[0], rtol=1e-10)
    assert seen == [2, 2], "the budget holds all the same"
    assert gradients.fill(net, batch.x0[0]) == 9
    assert gradients.fill(net, batch.x0[0], 2 * size) < 5, "the noise of so many draws is held, too"


@pytest.mark.parametrize("backend", BACKENDS)
def test_groups_of_unit_draws(backend):
    """The mean over groups of (mean over the group) / its norm: Diff-ReTrac's noises of one timestep."""
    net, forward, batch, _ = world("mlp", torch.float64)
    names, d = select(net, "all"), Draws(Repeated(Grid(3), 4), unit=True, group=4)
    expected: Blocks = {name: torch.zeros(1) for name in names}
    for s in range(3):
        apart = [naive(net, forward, outputs.loss, OneDraw(d, 4 * s + j), batch, names) for j in range(4)]
        mean = {name: sum(blocks[name] for blocks in apart) / 4 for name in names}
        norm = torch.cat(list(mean.values()), 1).norm(dim=1, keepdim=True)
        expected = {name: expected[name] + mean[name] / norm / 3 for name in names}
    assert_same_rows(backend(net, forward, outputs.loss, d, batch, names), expected, 1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_unit_draws_have_norm_one_and_zero_stays_zero(backend):
    net, forward, batch, _ = world("mlp", torch.float64)
    blocks = backend(net, forward, outputs.loss, draws.uniform(1, unit=True), batch, select(net, "all"))
    close(torch.cat(list(blocks.values()), 1).norm(dim=1), torch.ones(4), 1e-12)
    zero = backend(net, forward, outputs.loss, draws.uniform(2, unit=True), batch, ["unused"])
    assert torch.equal(zero["unused"], torch.zeros(4, 2, dtype=torch.float64))


@pytest.mark.parametrize("backend", BACKENDS)
def test_chosen_parameters_have_the_same_rows_as_among_all(backend):
    net, forward, batch, _ = world("mlp", torch.float64)
    every = backend(net, forward, outputs.loss, draws.uniform(3), batch, select(net, "all"))
    some = backend(net, forward, outputs.loss, draws.uniform(3), batch, select(net, "outer"))
    assert list(some) == ["outer.weight", "outer.bias"]
    assert not any(block.requires_grad for block in some.values()), "rows must not keep a graph alive"
    assert_same_rows(some, {name: every[name] for name in some}, 1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_model_is_left_as_it_was(backend):
    """Frozen parameters can be attributed too, and stay frozen; no gradient is left behind."""
    net, forward, batch, _ = world("mlp", torch.float64)
    names = select(net, "all")
    expected = naive(net, forward, outputs.loss, draws.uniform(3), batch, names)
    net.zero_grad(set_to_none=True)
    net.inner.requires_grad_(False)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    assert_same_rows(backend(net, forward, outputs.loss, draws.uniform(3), batch, names), expected, 1e-12)
    for name, p in net.named_parameters():
        assert p.grad is None
        assert p.requires_grad == (not name.startswith("inner"))
        assert torch.equal(p.detach(), before[name])


@pytest.mark.parametrize("backend", BACKENDS)
def test_tied_weights_are_one_parameter(backend):
    net, forward, batch, _ = world("mlp", torch.float64)
    net.outer.weight = net.inner.weight
    names = select(net, "all")
    assert names == ["unused", "inner.weight", "inner.bias", "outer.bias"]
    expected = naive(net, forward, outputs.loss, draws.uniform(3), batch, names)
    assert_same_rows(backend(net, forward, outputs.loss, draws.uniform(3), batch, names), expected, 1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_do_not_depend_on_their_neighbours(backend):
    net, forward, batch, _ = world("unet", torch.float64)
    names, d = select(net, "all"), draws.uniform(2)
    together = backend(net, forward, outputs.loss, d, batch, names)
    for i in (2, 0):
        alone = backend(net, forward, outputs.loss, d, Batch(batch.x0[[i]], batch.keys[[i]]), names)
        assert_same_rows(alone, {name: block[[i]] for name, block in together.items()}, 1e-12)


# ---------------------------------------------------------------------------------------------------------- selection


def test_named_groups():
    net = unet()
    every = [name for name, _ in net.named_parameters()]
    assert select(net, "all") == every
    attention = select(net, "attention")
    assert 0 < len(attention) < len(every)
    assert all("attentions" in name for name in attention)
    assert {name.split(".")[0] for name in select(net, "up-blocks")} == {"up_blocks"}
    assert select(net, r"^conv_out\.") == ["conv_out.weight", "conv_out.bias"]


def test_named_groups_match_the_names_of_diffusers_and_peft():
    cross = "down_blocks.0.attentions.0.transformer_blocks.0.attn2"
    names = {
        f"{cross}.to_k.weight": {"all", "attention", "cross-attention", "cross-attention-kv"},
        f"{cross}.to_q.weight": {"all", "attention", "cross-attention"},
        f"{cross.replace('attn2', 'attn1')}.to_v.weight": {"all", "attention"},
        f"{cross}.to_v.lora_A.default.weight": {"all", "attention", "cross-attention", "cross-attention-kv", "lora"},
        f"{cross}.processor.to_q_lora.down.weight": {"all", "attention", "cross-attention", "lora"},
        "up_blocks.1.resnets.0.conv1.weight": {"all", "up-blocks"},
        "conv_in.bias": {"all"},
    }
    module = nn.Module()
    for name in names:
        *path, leaf = name.split(".")
        owner = module
        for part in path:
            if not hasattr(owner, part):
                owner.add_module(part, nn.Module())
            owner = getattr(owner, part)
        owner.register_parameter(leaf, nn.Parameter(torch.zeros(1)))
    for group in gradients.PARAMETERS:
        chosen = set()
        if any(group in groups for groups in names.values()):
            chosen = set(select(module, group))
        assert chosen == {name for name, groups in names.items() if group in groups}, group


def test_selection_errors():
    with refuses("'cross-atention' match none of...presets: trained, all"):
        select(unet(), "cross-atention")
    with refuses("not a regular expression"):
        select(unet(), "conv(")


def test_unfit_outputs_are_refused_before_any_work():
    net, forward, batch, _ = world("classifier", torch.float32)
    with refuses("for a denoiser; this model is a classifier"):
        next(per_image(net, forward, outputs.loss, draws.once(), batch, select(net, "all"), 4))
    with refuses("weighs the error of a predicted noise"):
        check(outputs.elbo, Denoiser(linear_schedule(), "v_prediction"))


def test_channels_last_group_norms_below_what_is_attributed():
    """The layers before the chosen ones ask for no gradient, and hand on images in channels-last order: torch's backward
    pass of a group norm then reads memory that is not there, which ended the process."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(4, 8), nn.Conv2d(8, 3, 1))
    net = net.to(memory_format=torch.channels_last).double()
    forward = Denoiser(torch.linspace(0.9, 0.1, 10, dtype=torch.float64), predict=lambda call, x, t, cond: call(x))
    x0 = torch.randn(2, 3, 4, 4, dtype=torch.float64).to(memory_format=torch.channels_last)
    batch = Batch(x0, torch.arange(2))
    names = ["1.weight", "1.bias", "2.weight"]
    alone = Batch(x0[:1], batch.keys[:1])
    given = (net, forward, outputs.loss, draws.uniform(4), alone)
    ((_, found),) = per_image(*given, names, 1)
    ((_, whole),) = per_image(*given, [name for name, _ in net.named_parameters()], 1)
    for name in names:
        close(found[name], whole[name], 1e-10)
    assert not net[1]._forward_pre_hooks
