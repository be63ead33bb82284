"""From an image and a draw to (prediction, target): the training measure of a model, written once.

DDPM family      x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) eps
                 target  epsilon: eps      v_prediction: sqrt(abar_t) eps - sqrt(1 - abar_t) x0      sample: x0
flow matching    x_t = (1 - sigma_t) x0 + sigma_t eps
                 target  eps - x0

Timestep 0 is the least noisy one in all of them. What the training did besides is declared and recorded, not guessed: the
weight w_t of its loss, which only the output `weighted` applies, and the density of its timesteps, which of all draws only
`density` follow. `dataclasses.replace(task.forward, weighting=MinSNR(5.0))` declares it for a model that was opened.

Trainings that are started here follow what is declared: timesteps from the density, and the weight where their output is
`weighted`.

Any other model is a `Custom`: two functions of one's own, for the prediction and its target.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from whence.diffusion.draws import Density, Even
from whence.types import Batch, Call, Draw, WhenceError, describe, digest

Predict = Callable[[Call, Tensor, Tensor, Mapping[str, Tensor]], Tensor]
"""(call, x_t [b, ...], t [b], cond) -> the network's output for each row."""
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


Measured = TypeVar("Measured", contravariant=True)


class Weighting(Protocol[Measured]):
    """The factor w_t of a training's loss: (forward, t [b]) -> [b]."""

    def __call__(self, forward: Measured, t: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class MinSNR:
    """w_t = min(SNR, gamma) / SNR for epsilon, / (SNR + 1) for v_prediction, / 1 for sample; SNR = abar_t / (1 - abar_t)
    (Hang et al. 2023; --snr_gamma of diffusers).

    Differs from released code: at SNR = 0, the last step of a zero-terminal-SNR schedule, epsilon has its limit w = 1
    where diffusers has 0/0.
    """

    gamma: float = 5.0

    def __call__(self, forward: Denoiser, t: Tensor) -> Tensor:
        bar = forward.alphas_cumprod.to(t.device)[t]
        snr = bar / (1 - bar)
        if forward.prediction_type == "epsilon":
            return (self.gamma / snr).clamp(max=1.0)
        capped = snr.clamp(max=self.gamma)
        return capped / (snr + 1) if forward.prediction_type == "v_prediction" else capped


@dataclass(frozen=True)
class SigmaSqrt:
    """w_t = 1 / sigma_t^2 (--weighting_scheme sigma_sqrt; Esser et al. 2024)."""

    def __call__(self, forward: FlowMatching, t: Tensor) -> Tensor:
        return forward.sigmas.to(t.device)[t] ** -2.0


@dataclass(frozen=True)
class CosMap:
    """w_t = 2 / (pi (1 - 2 sigma_t + 2 sigma_t^2)) (--weighting_scheme cosmap; Esser et al. 2024)."""

    def __call__(self, forward: FlowMatching, t: Tensor) -> Tensor:
        sigma = forward.sigmas.to(t.device)[t]
        return 2 / (torch.pi * (1 - 2 * sigma + 2 * sigma**2))


def _weight(forward: Measured, weighting: Weighting[Measured] | None, t: Tensor) -> Tensor:
    return torch.ones(len(t), dtype=torch.float64, device=t.device) if weighting is None else weighting(forward, t)


def _rows(values: Tensor, t: Tensor, x0: Tensor) -> Tensor:
    """values[t] in float64, shaped to multiply x0: in a half precision 1 - abar would be 0 at the first timesteps, and in
    that of integer images everything."""
    return values.double().to(t.device)[t].reshape(-1, *[1] * (x0.ndim - 1))


def _floating(batch: Batch, draw: Draw) -> Tensor:
    """The clean images as numbers that noise can be added to: integers become what the noise is."""
    return batch.x0 if batch.x0.is_floating_point() else batch.x0.to(draw.noise)


def _checked(prediction: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    if prediction.shape != target.shape:
        raise WhenceError(
            f"the network returns {list(prediction.shape)} for images {list(target.shape)}; their shapes must be equal"
        )
    return prediction, target


def plain(call: Call, x_t: Tensor, t: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
    """A network called as net(x_t, t, **cond).

    Args:
        call: the network.
        x_t: noisy images [b, ...].
        t: timesteps [b].
        cond: conditions by name, [b, ...] each.
    """
    return result_of(call(x_t, t, **cond))


def result_of(found: object) -> Tensor:
    """The prediction in what a network returns: a tensor, an output of diffusers or transformers, a tuple or a dict."""
    if isinstance(found, Tensor):
        return found
    if isinstance(found, Mapping):
        named = [found[name] for name in ("sample", "logits", "prediction") if name in found]
        values = named[:1] or list(found.values())
    elif isinstance(found, list | tuple):
        values = list(found)[:1]
    elif is_dataclass(found):
        values = [vars(found)[field.name] for field in fields(found)][:1]
    else:
        values = []
    if len(values) == 1 and isinstance(values[0], Tensor):
        return values[0]
    raise WhenceError(
        f"the network returns a {type(found).__name__}",
        "module",
        "a tensor, a tuple that begins with one, a dict with `sample` or `logits`; or whence.Custom, which picks it out",
    )


@dataclass(frozen=True, eq=False)
class Denoiser:
    """A model of the DDPM family with a discrete schedule.

    Args:
        alphas_cumprod: abar [T].
        prediction_type: "epsilon", "v_prediction" or "sample", as diffusers names it.
        predict: how to call the network.
        weighting: of the training's loss, `MinSNR`; None for 1.
        density: of the training's timesteps; `Even` where nothing else is declared.
    """

    alphas_cumprod: Tensor
    prediction_type: str = "epsilon"
    predict: Predict = plain
    weighting: Weighting[Denoiser] | None = None
    density: Density = Even()
    models = "denoiser"

    def __post_init__(self) -> None:
        if self.prediction_type not in PREDICTION_TYPES:
            raise WhenceError(f"prediction_type {self.prediction_type!r} is not one of {', '.join(PREDICTION_TYPES)}")
        _refuse_no_schedule(self.alphas_cumprod)

    @property
    def timesteps(self) -> int:
        return len(self.alphas_cumprod)

    def describe(self) -> dict[str, object]:
        return {
            "is": "Denoiser",
            "prediction_type": self.prediction_type,
            "schedule": digest(self.alphas_cumprod.double()),
            "predict": describe(self.predict),
            **_declared(self.weighting, self.density),
        }

    def weight(self, t: Tensor) -> Tensor:
        """w_t of each row, 1 where no weighting is declared: [b] float64."""
        return _weight(self, self.weighting, t)

    def __call__(self, call: Call, batch: Batch, draw: Draw) -> tuple[Tensor, Tensor]:
        x0, noise = _floating(batch, draw), draw.noise
        signal = _rows(self.alphas_cumprod, draw.t, x0)
        a, s = signal.sqrt().to(x0), (1 - signal).sqrt().to(x0)
        x_t = a * x0 + s * noise
        target = {"epsilon": noise, "v_prediction": a * noise - s * x0, "sample": x0}[self.prediction_type]
        prediction = self.predict(call, x_t, draw.t, batch.cond)
        if prediction.shape[1] == 2 * x0.shape[1]:
            # Networks that also learn the variance (DiT, improved DDPM) put it in as many further channels.
            prediction = prediction[:, : x0.shape[1]]
        return _checked(prediction, target)


def _refuse_no_schedule(bar: object) -> None:
    """Refuse what is no alphas_cumprod: betas would be taken for a schedule that is nearly all noise, and a reversed one for
    its mirror image."""
    accepted = "a tensor [T] from 0 to 1 that falls from the least noisy step: torch.cumprod(1 - betas, 0)"
    if not isinstance(bar, Tensor) or bar.ndim != 1 or not len(bar):
        told = f"a {type(bar).__name__}" + (f" of shape {list(bar.shape)}" if isinstance(bar, Tensor) else "")
        raise WhenceError(told, "alphas_cumprod", accepted)
    values = bar.double()
    if not bool(((values >= 0) & (values <= 1)).all()):
        raise WhenceError(
            f"numbers from {float(values.min()):g} to {float(values.max()):g}", "alphas_cumprod", accepted
        )
    if bool((values.diff() > 0).any()) or (len(values) > 1 and values[0] == values[-1]):
        told = f"it does not fall (from {float(values[0]):g} to {float(values[-1]):g})"
        raise WhenceError(f"{told}; betas, or the other way round?", "alphas_cumprod", accepted)


@dataclass(frozen=True, eq=False)
class FlowMatching:
    """A model of the flow-matching family (SD3, Flux): x_t = (1 - sigma) x0 + sigma eps, target eps - x0.

    Differs from released code: diffusers counts timesteps from the noisiest; here 0 is the least noisy, as everywhere.

    Args:
        sigmas: the noise levels of the scheduler [T], rising, in (0, 1].
        preconditioned: the prediction is x_t - sigma * output and the target x0 (--precondition_outputs).
        predict: how to call the network; it is given sigma * T as the time, the `timesteps` of the scheduler.
        weighting: of the training's loss, `SigmaSqrt` or `CosMap`; None for 1.
        density: of the training's timesteps, `LogitNormal`, `Mode` or `Even`.
    """

    sigmas: Tensor
    preconditioned: bool = False
    predict: Predict = plain
    weighting: Weighting[FlowMatching] | None = None
    density: Density = Even()
    alphas_cumprod = None
    models = "denoiser"

    def __post_init__(self) -> None:
        s = self.sigmas
        if s.ndim != 1 or not len(s) or float(s.min()) <= 0 or float(s.max()) > 1 or bool((s.diff() <= 0).any()):
            raise WhenceError("flow matching: sigmas must be numbers in (0, 1] that rise from the least noisy step")

    @property
    def timesteps(self) -> int:
        return len(self.sigmas)

    @property
    def prediction_type(self) -> str:
        return "sample" if self.preconditioned else "velocity"

    def describe(self) -> dict[str, object]:
        return {
            "is": "FlowMatching",
            "preconditioned": self.preconditioned,
            "schedule": digest(self.sigmas.double()),
            "predict": describe(self.predict),
            **_declared(self.weighting, self.density),
        }

    def weight(self, t: Tensor) -> Tensor:
        """w_t of each row, 1 where no weighting is declared: [b] float64."""
        return _weight(self, self.weighting, t)

    def __call__(self, call: Call, batch: Batch, draw: Draw) -> tuple[Tensor, Tensor]:
        x0, noise = _floating(batch, draw), draw.noise
        sigma = _rows(self.sigmas, draw.t, x0)
        x_t = (1 - sigma).to(x0) * x0 + sigma.to(x0) * noise
        time = (sigma.flatten() * self.timesteps).to(torch.promote_types(x0.dtype, torch.float32))
        output = self.predict(call, x_t, time, batch.cond)
        if self.preconditioned:
            return _checked(x_t - sigma.to(x0) * output, x0)
        return _checked(output, noise - x0)


@dataclass(frozen=True, eq=False)
class Custom:
    """Any other denoiser, by two functions.

    Both return one row per row of batch.x0, whose draw is t [b] in 0 ... timesteps - 1 (0 the least noisy) and noise shaped
    like x0. Recipes and stored features know the functions by their names: when you change what one of them does, rename it.

    Args:
        predict: (call, batch, draw) -> what the network makes of the noised images, where `call` is the network (or a
            stand-in for it: call nothing else).
        target: (batch, draw) -> what it should make of them.
        timesteps: T.
        alphas_cumprod: abar [T] where the model has such a schedule; None where not.
        weighting: of the training's loss; None for 1.
        density: of the training's timesteps.
        prediction_type: a name for what is predicted.
    """

    predict: Callable[[Call, Batch, Draw], Tensor]
    target: Callable[[Batch, Draw], Tensor]
    timesteps: int
    alphas_cumprod: Tensor | None = None
    weighting: Weighting[Custom] | None = None
    density: Density = Even()
    prediction_type: str = "custom"
    models = "denoiser"

    def weight(self, t: Tensor) -> Tensor:
        """w_t of each row, 1 where no weighting is declared: [b] float64."""
        return _weight(self, self.weighting, t)

    def __call__(self, call: Call, batch: Batch, draw: Draw) -> tuple[Tensor, Tensor]:
        return _checked(self.predict(call, batch, draw), self.target(batch, draw))


Measurable = TypeVar("Measurable", bound=Denoiser | FlowMatching | Custom)


Weight = MinSNR | SigmaSqrt | CosMap


def declared(forward: Measurable, weighting: Weight | None, density: Density) -> Measurable:
    """A forward that knows what its training did besides the plain loss at even timesteps.

    Args:
        forward: of the model.
        weighting: `MinSNR` for the DDPM family, `SigmaSqrt` or `CosMap` for flow matching, None for 1.
        density: of the timesteps.
    """
    family = Denoiser if isinstance(weighting, MinSNR) else FlowMatching
    if weighting is not None and not isinstance(forward, family):
        kind, weight = type(forward).__name__, type(weighting).__name__
        raise WhenceError(f"weighting {weight} is not for {kind}; accepted: MinSNR (Denoiser), others (FlowMatching)")
    if weighting is None and density == Even():
        return forward
    return replace(forward, weighting=weighting, density=density)  # type: ignore[arg-type]  # it fits


def _declared(weighting: object, density: Density) -> dict[str, object]:
    """Weighting and density where they are declared; empty for the plain loss at even timesteps."""
    found: dict[str, object] = {} if weighting is None else {"weighting": describe(weighting)}
    return found if density == Even() else {**found, "density": describe(density)}


@dataclass(frozen=True)
class Classifier:
    """Any network called as net(images) -> logits; the target is cond["class_labels"]. Draws are ignored."""

    timesteps: int = 1
    alphas_cumprod = None
    models = "classifier"
    prediction_type = "logits"
    density = Even()

    def weight(self, t: Tensor) -> Tensor:
        raise WhenceError(f"output 'weighted': {type(self).__name__} declares no training weight; accepted: loss")

    def __call__(self, call: Call, batch: Batch, draw: Draw) -> tuple[Tensor, Tensor]:
        if "class_labels" not in batch.cond:
            raise WhenceError(
                "a classifier needs labels of training images and of pictures to explain: class folders, a `label` column "
                "in metadata.jsonl, or whence.tensor_images(x, labels=...) in memory"
            )
        return result_of(call(batch.x0)), batch.cond["class_labels"]


def linear_schedule(steps: int = 1000, start: float = 1e-4, end: float = 0.02) -> Tensor:
    """alphas_cumprod of the linear beta schedule of DDPM: [steps] float64.

    Args:
        steps: T.
        start: beta of the least noisy step.
        end: beta of the noisiest step.
    """
    return (1 - torch.linspace(start, end, steps, dtype=torch.float64)).cumprod(0)
