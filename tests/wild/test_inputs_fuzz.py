"""Configurations of a pipeline and arrays in memory, changed at random: refused in one line that says what and where, by the
doctor as well, or taken as diffusers and numpy take them. 60 cases; WHENCE_FUZZ=1000 for more."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as some
from torch import nn

from agreement import close
from test_doctor import pipeline
from whence import Denoiser, attribute, tensor_images, uniform
from whence.data.memory import span
from whence.doctor import Inputs, examine
from whence.models import open_model
from whence.types import WhenceError

CASES = int(os.environ.get("WHENCE_FUZZ", "30"))
fuzz = settings(
    max_examples=CASES, deadline=None, derandomize=CASES == 30, suppress_health_check=[HealthCheck.too_slow]
)

# -------------------------------------------------------------------------------------------------------- configurations

FILES = ("model_index.json", "unet/config.json", "scheduler/scheduler_config.json")
SCHEDULERS = ("DDIMScheduler", "EulerDiscreteScheduler", "FlowMatchEulerDiscreteScheduler", "PNDMScheduler")
NAMES = some.sampled_from(
    [*SCHEDULERS, "UNet2DConditionModel", "DDIMPipeline", "NoSuchClass", "linear", "v_prediction"]
)
ODD = NAMES | some.sampled_from(
    [None, True, False, 0, 1, 2, 3, 8, -1, 2.5, float("nan"), float("inf"), 10**40, "2", "", [], {}, [4], [4, 8], ["a"],
     [[1]], {"a": 1}, [0.1] * 100, ["DownBlock2D", "AttnDownBlock2D"], "squaredcos_cap_v2", "sample", [None, None]]
)  # fmt: skip
TEXTS = some.sampled_from(["", "{", "[]", "null", "3", '{"a": 1, "a": 2}', "\ufeff{}", "é"])
EDITS = some.tuples(some.integers(0, 40), some.just("drop") | ODD) | some.tuples(some.just("unheard_of"), ODD)


@cache
def whole() -> Path:
    return pipeline(Path(tempfile.mkdtemp()) / "model")


def edited(folder: Path, name: str, edits: list[tuple[int | str, Any]] | str) -> list[str]:
    """Change one configuration; the entries that were added."""
    path = folder / name
    if isinstance(edits, str):
        path.write_text(edits)
        return []
    found = json.loads(path.read_text())
    for at, value in edits:
        key = sorted(found)[at % len(found)] if isinstance(at, int) else at
        found[key] = value
        if value == "drop":
            del found[key]
    path.write_text(json.dumps(found))
    return [at for at, _ in edits if isinstance(at, str)]


def same_as_diffusers(folder: Path, model: Any) -> None:
    scheduler = json.loads((folder / FILES[2]).read_text())
    theirs = diffusers.UNet2DModel.from_pretrained(folder / "unet").eval()
    x, t = torch.randn(2, model.in_channels, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([3, 60])
    with torch.no_grad():
        close(model.final.load().eval()(x, t).sample, theirs(x, t).sample)
    kind = getattr(diffusers, scheduler["_class_name"]).from_pretrained(folder / "scheduler")
    if model.forward.alphas_cumprod is not None:
        close(model.forward.alphas_cumprod.float(), kind.alphas_cumprod)
        assert model.forward.prediction_type == kind.config.prediction_type


@fuzz
@given(some.sampled_from(FILES), some.lists(EDITS, min_size=1, max_size=2) | TEXTS)
@example(FILES[1], [("unheard_of", 1)])
@example(FILES[2], [("unheard_of", 1)])
@example(FILES[2], [])
def test_configurations(name: str, edits: Any) -> None:
    with tempfile.TemporaryDirectory() as home, warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        folder = Path(shutil.copytree(whole(), Path(home) / "model"))
        added = edited(folder, name, edits)
        findings = examine(Inputs(folder, None, None, Path(home) / "run"))
        assert all(len(str(finding).splitlines()) == 1 for finding in findings)
        broken = [str(finding) for finding in findings if finding.level == "error"]
        try:
            model = open_model(folder)
            _ = model.channels, model.resolution
            model.final.load()
        except WhenceError as error:
            line = str(error)
            assert len(line.splitlines()) == 1, line
            assert str(folder) in line, line
            assert broken, f"the doctor has not found: {line}"
            return
        assert not broken, broken
        everything = "\n".join([*(str(one.message) for one in told), *map(str, findings)])
        assert name == FILES[0] or all(one in everything for one in added), everything
        same_as_diffusers(folder, model)


# ---------------------------------------------------------------------------------------------------------------- arrays

KINDS = ("float32", "float64", "float16", "uint8", "int64", "uint16", "bool", "complex64", "object", "<U3")
SHAPES = some.lists(some.sampled_from([0, 1, 2, 3, 4, 8]), max_size=5)
FILLS = some.sampled_from(["noise", "bytes", "unit", "zero", "NaN", "Inf"])
RANGES = some.sampled_from(
    [None, (-1, 1), (0, 1), (0, 255), (1, 0), (0, 0), (0,), "ab", (float("nan"), 1), (0, float("inf")), 3, (0, 65535)]
)
MAKERS = {
    "array": lambda x: x,
    "tensor": torch.as_tensor,
    "bfloat16": lambda x: torch.as_tensor(x).bfloat16(),
    "float8": lambda x: torch.as_tensor(x).float().to(torch.float8_e4m3fn),
    "gradient": lambda x: torch.as_tensor(x).requires_grad_(),
    "list": list,
    "tuple of tensors": lambda x: tuple(torch.as_tensor(one) for one in x),
    "turned": lambda x: x[::-1],
    "sparse": lambda x: torch.as_tensor(x).to_sparse(),
    "meta": lambda x: torch.as_tensor(x).to("meta"),
    "generator": lambda x: (one for one in x),
    "nested": lambda x: x.tolist(),
}


def filled(shape: list[int], kind: str, fill: str) -> np.ndarray:
    g = np.random.default_rng(0)
    x = {
        "noise": lambda: g.normal(size=shape),
        "bytes": lambda: g.integers(0, 256, shape),
        "unit": lambda: g.random(shape),
        "zero": lambda: np.zeros(shape),
        "NaN": lambda: np.full(shape, np.nan),
        "Inf": lambda: np.full(shape, np.inf),
    }[fill]()
    with np.errstate(all="ignore"):
        return np.asarray(x).astype(kind)


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 3, 1)

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return self.layer(x) + t[:, None, None, None] / 100


FORWARD = Denoiser(torch.linspace(0.99, 0.01, 100))


@fuzz
@given(SHAPES | some.just([3, 3, 4, 4]), some.sampled_from(KINDS), FILLS, some.sampled_from(sorted(MAKERS)), RANGES)
@example([3, 3, 4, 4], "float32", "noise", "array", None)
@example([3, 3, 4, 4], "uint8", "bytes", "tensor", (0, 255))
@example([], "float32", "noise", "tensor", None)
def test_arrays(shape: list[int], kind: str, fill: str, maker: str, value_range: Any) -> None:
    plain = filled(shape, kind, fill)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            given_ = MAKERS[maker](plain)
        except (TypeError, RuntimeError, ValueError, NotImplementedError, IndexError):
            return  # torch knows no such tensor
        for images in (lambda: tensor_images(given_, value_range=value_range), lambda: given_):
            try:
                found = tensor_images(given_, value_range=value_range)
                taken(plain[::-1] if maker == "turned" else plain, found, value_range, maker)
                with tempfile.TemporaryDirectory() as home:
                    asked = (images(), torch.randn(1, 3, 4, 4), "gradient_dot", home)
                    scores = attribute((Small(), FORWARD), *asked, draws=uniform(1), dim=None)
                assert scores.values.shape == (1, len(plain))
                assert torch.isfinite(scores.values).all()
            except WhenceError as error:
                line = str(error)
                assert len(line.splitlines()) == 1, line


def taken(plain: np.ndarray, found: Any, value_range: Any, maker: str) -> None:
    """The numbers are those that were given, or from -1 to 1."""
    x = found.x0
    if value_range in (None, (-1, 1)):
        assert maker in ("bfloat16", "float8") or np.array_equal(x.numpy(), plain, equal_nan=True)
    elif x.numel():
        low, high = value_range
        expected = (plain.astype(float) - low) / (high - low) * 2 - 1
        assert np.allclose(x.double().numpy(), expected, atol=0.1 if maker in ("bfloat16", "float8") else 1e-3)
        assert span(x)[1] <= 1.01
