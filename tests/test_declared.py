"""Trainings follow what their forward declares: the density of the timesteps and the weight of the loss."""

import pytest
import torch

from families import save_whole
from test_cli import refused, succeeds
from test_encode import CAPTIONS, pictures
from whence import task_from_pretrained
from whence.diffusion.draws import Even, LogitNormal, Mode
from whence.diffusion.forward import CosMap, MinSNR
from whence.diffusion.noise import seed_for, stream, uniforms
from whence.evaluation.ledger import Ledger
from whence.methods.metagradient import Metagradient
from whence.models import Lora
from whence.training.loop import steps
from whence.training.order import draw, slots
from whence.training.recipe import Objective
from whence.training.unroll import Run, Trainer
from whence.types import Engine, describe

KEYS, EPOCHS = torch.arange(4000), torch.arange(4000) % 7
EXACT = Engine(dtype=torch.float64)
OPTIONS = ("--max_train_steps", 3, "--train_batch_size", 3, "--checkpointing_steps", 3, "--lr_warmup_steps", 0)


def drawn(density):
    return draw([0], KEYS, EPOCHS, torch.Size([1]), 1000, torch.float32, density)


def test_even_timesteps_are_what_they_always_were():
    u = uniforms(stream(seed_for(0, "timestep"), EPOCHS, KEYS), 1)[:, 0]
    assert torch.equal(drawn(Even()).t, (u * 1000).long())


@pytest.mark.parametrize("density", [LogitNormal(), LogitNormal(0.5, 2.0), Mode()])
def test_timesteps_have_the_density(density):
    """Their quantiles are the density at those of u; the noise is that of an even training."""
    found, even = drawn(density), drawn(Even())
    levels = torch.linspace(0.1, 0.9, 5, dtype=torch.float64)
    torch.testing.assert_close(
        torch.quantile(found.t.double(), levels) / 1000, density(levels).sort().values, rtol=0, atol=0.03
    )
    assert torch.equal(found.noise, even.noise)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("declared")
    for name in ("sd", "sd3"):
        save_whole(name, root / name)
    pictures(root / "train", CAPTIONS)
    return root


@pytest.mark.parametrize(
    ("name", "kind", "options", "declared"),
    [
        ("sd3", "lora", ("--weighting_scheme", "logit_normal", "--logit_mean", 0.5), Objective(density=LogitNormal(0.5))),
        ("sd3", "full", ("--weighting_scheme", "cosmap"), Objective(weighting=CosMap())),
        ("sd", "text", ("--snr_gamma", 3, "--weighting_scheme", "mode"), Objective(None, MinSNR(3.0), Mode())),
    ],
)  # fmt: skip
def test_from_the_command_line(name, kind, options, declared, world, tmp_path):
    """Trained, replayed and differentiated with what was declared, which the attribution of the model then knows."""
    base = ("--pretrained_model_name_or_path", world / name, "--train_data_dir", world / "train")
    succeeds("train", kind, *base, "--output_dir", tmp_path / "out", *OPTIONS, *options)
    model, lora = (world / name, Lora(tmp_path / "out")) if kind == "lora" else (tmp_path / "out", None)
    task = task_from_pretrained(model, world / "train", world / "train", tmp_path / "run", adapter=lora)
    forward, study = task.forward, task.study
    assert (forward.weighting, forward.density) == (declared.weighting, declared.density)
    assert Metagradient()(task).values.shape == (6, 6)  # refuses a replay that ends elsewhere
    module = study.network_at(0).double()
    feed = Trainer(Run.of(study, task.train, engine=EXACT)).feed(0)
    keys = task.train.batch(range(6)).keys
    chosen = slots(study.recipe, keys, 0)
    u = uniforms(stream(seed_for(0, "timestep"), chosen.epochs, keys[chosen.rows]), 1)[:, 0]
    assert torch.equal(feed.at.t, (declared.density(u) * 1000).long())
    *_, value = next(steps(module, forward, task.train, study.recipe, engine=EXACT))
    factor = torch.ones(3) if declared.weighting is None else declared.weighting(forward, feed.at.t)
    prediction, target = forward(study.network_at(0).double().train(), feed.batch, feed.at)
    byhand = (factor * (prediction - target).square().flatten(1).mean(1)).mean()
    assert value == pytest.approx(byhand.item(), rel=1e-6)
    if kind == "text":
        from whence.evaluation import designs

        Ledger.plan(tmp_path / "ledger", study, task.train, designs.full(6, [1]), 1)
        again = Ledger(tmp_path / "ledger", task.train).study
        assert describe(again) == describe(study)


def test_a_weight_for_another_family_is_one_line(world, tmp_path):
    base = ("--pretrained_model_name_or_path", world / "sd3", "--train_data_dir", world / "train")
    command = ("train", "lora", *base, "--output_dir", tmp_path, *OPTIONS)
    refused(*command, "--snr_gamma", 5, says="weighting MinSNR is not for FlowMatching")
    refused(*command, "--weighting_scheme", "x", says="accepted: none, logit_normal, mode, sigma_sqrt, cosmap")
    refused(*command, "--snr_gamma", 5, "--weighting_scheme", "cosmap", says="both weigh the loss; give one")
