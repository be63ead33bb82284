"""Noise schedules of every scheduler that pipelines are published with."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from agreement import close
from errors import refuses
from families import FAMILIES, save_whole
from whence.doctor import Inputs, examine
from whence.models import SCHEDULERS, open_model
from whence.models.pipeline import DDPM, DIFFUSION, FLOW

NAMED = ("DEISMultistepScheduler", "KDPM2DiscreteScheduler", "LCMScheduler", "TCDScheduler", "SASolverScheduler")
LATENT = {"beta_start": 0.00085, "beta_end": 0.012}


def folder_with(root: Path, name: str, **config: Any) -> Path:
    folder = FAMILIES["sd"].save(root)
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps({"_class_name": name, **config}))
    return folder


@pytest.mark.parametrize("kind", DIFFUSION)
@pytest.mark.parametrize("beta_schedule", ["linear", "scaled_linear", None])
def test_the_schedule_is_that_of_the_class(kind, beta_schedule, tmp_path):
    """Told, and where its configuration leaves it to the defaults of the class."""
    told = {} if beta_schedule is None else {**LATENT, "beta_schedule": beta_schedule}
    model = open_model(folder_with(tmp_path, kind, **told))
    theirs = getattr(diffusers, kind)(**told)
    torch.testing.assert_close(model.forward.alphas_cumprod.float(), theirs.alphas_cumprod, rtol=1e-5, atol=0)


def test_no_scheduler_is_forgotten():
    """Every class of diffusers whose noise schedule is told in the words of DDPM is read, but those with more to it."""
    more = {
        "AudioDPMDDIM", "CogVideoXDDIMScheduler", "CogVideoXDPMScheduler",  # a further shift
        "RePaintScheduler",  # no prediction type
    }  # fmt: skip
    words = {"beta_start", "beta_end", "beta_schedule", "num_train_timesteps"}
    found = {
        name
        for name in dir(diffusers)
        if name.endswith("Scheduler")
        and not name.startswith("Flax")
        and words <= {*inspect.signature(getattr(diffusers, name).__init__).parameters}
    }
    assert {*NAMED} <= {*SCHEDULERS}
    assert found - more <= {*SCHEDULERS}
    assert {*DDPM} >= words


def test_without_torchsde(tmp_path):
    """The one that diffusers cannot build here has the same words, and its own defaults."""
    model = open_model(folder_with(tmp_path, "DPMSolverSDEScheduler"))
    bar = (1 - torch.linspace(0.00085, 0.012, 1000, dtype=torch.float64)).cumprod(0)
    torch.testing.assert_close(model.forward.alphas_cumprod, bar, rtol=1e-4, atol=0)


@pytest.mark.parametrize("kind", FLOW)
def test_flow_matching(kind, tmp_path):
    folder = FAMILIES["sd3"].save(tmp_path, kind=kind, shift=3.0)
    base = torch.linspace(0.001, 1, 1000, dtype=torch.float64)
    torch.testing.assert_close(open_model(folder).forward.sigmas, 3 * base / (1 + 2 * base), rtol=1e-5, atol=0)


@pytest.mark.parametrize("beta_schedule", ["sigmoid", "laplace", "squaredcos_cap_v2"])
def test_beta_schedules(beta_schedule, tmp_path):
    model = open_model(folder_with(tmp_path, "DDPMScheduler", beta_schedule=beta_schedule))
    theirs = diffusers.DDPMScheduler(beta_schedule=beta_schedule).alphas_cumprod
    close(model.forward.alphas_cumprod.float(), theirs)


@pytest.mark.parametrize("beta_schedule", ["exp", "sqrt", "warm", 7])
def test_a_schedule_that_is_not_known_is_one_line(beta_schedule, tmp_path):
    found = examine(
        Inputs(folder_with(tmp_path, "DDPMScheduler", beta_schedule=beta_schedule), None, None, tmp_path / "run")
    )
    told = "beta_schedule is 7" if beta_schedule == 7 else "the noise schedule is not known"
    assert any(told in str(finding) for finding in found), [*map(str, found)]


def test_a_flow_that_diffusers_cannot_build_is_refused(tmp_path):
    """Its errors are those of several kinds; ours is one line for attribution, and a finding of the doctor."""
    folder = save_whole("sd3", tmp_path / "model")
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"time_shift_type": "odd"}))
    with refuses("diffusers cannot build it", where="scheduler_config.json", accepted="that diffusers takes"):
        open_model(folder)
    found = examine(Inputs(folder, None, None, tmp_path / "run", 8))
    assert any(finding.level == "error" and "cannot build it" in finding.what for finding in found)
