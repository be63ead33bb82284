"""The recipe of a training: all that it depends on besides its images.

    Recipe(model, optimizer, schedule, objective, data, batch_size, max_grad_norm, ema, seed)

Settings and nothing else: `study.Study` binds them to what is trained, `loop` trains, `recipe_file` reads and writes TOML.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from whence.diffusion.draws import Density, Even
from whence.diffusion.forward import Denoiser, FlowMatching, Weight, declared
from whence.diffusion.noise import check_seed
from whence.diffusion.outputs import Output, loss, weighted
from whence.training.optimizer import SGD, AdamW, State
from whence.types import Weights, WhenceError

# ------------------------------------------------------------------------------------------------------ what is trained


@dataclass(frozen=True)
class NoiseSchedule:
    """A noise schedule as diffusers names it.

    Args:
        steps: timesteps.
        beta_schedule: linear, squaredcos_cap_v2 ...
        prediction_type: epsilon, v_prediction or sample.
    """

    steps: int = 1000
    beta_schedule: str = "linear"
    prediction_type: str = "epsilon"


@dataclass(frozen=True)
class New:
    """A network of pixels, with new weights.

    Args:
        network: the content of its config.json.
        noise: its noise schedule.
    """

    network: Mapping[str, Any]
    noise: NoiseSchedule = NoiseSchedule()


@dataclass(frozen=True)
class Text:
    """The network of a pipeline that reads text, with new weights; the rest of the pipeline stays.

    Args:
        base: the pipeline folder.
        sample_size: side of what a UNet sees; that of its config.json by default.
    """

    base: Path | None = None
    sample_size: int | None = None


@dataclass(frozen=True)
class Full:
    """All weights of a pipeline's network, trained on from those it has.

    Args:
        base: the pipeline folder.
    """

    base: Path | None = None


@dataclass(frozen=True)
class NewLora:
    """A LoRA on the network of a pipeline.

    Args:
        base: the pipeline folder.
        rank: of B A.
        alpha: the LoRA counts by alpha / rank; the rank by default.
        targets: a regular expression for the ends of the names of Linear layers; those of attention by default.
    """

    base: Path | None = None
    rank: int = 4
    alpha: float | None = None
    targets: str | None = None

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise WhenceError(f"rank is {self.rank}", "NewLora", "at least 1")
        if self.alpha is not None and not self.alpha > 0:
            raise WhenceError(f"alpha is {self.alpha:g}", "NewLora", "above 0")


@dataclass(frozen=True)
class NewCustomDiffusion:
    """Cross-attention and one new token of a pipeline (Custom Diffusion).

    Args:
        base: the pipeline folder.
        modifier_token: the new token, which all captions hold.
        initializer_token: the token whose embedding it begins with.
        prior_loss_weight: of the prior images, beside 1 for the others.
    """

    base: Path | None = None
    modifier_token: str = "<new1>"
    initializer_token: str = "ktn"
    prior_loss_weight: float = 1.0

    def __post_init__(self) -> None:
        if not self.modifier_token.strip() or set("/\\") & {*self.modifier_token}:
            raise WhenceError(
                f"modifier token {self.modifier_token!r}: its file is named after it; accepted: a word like <new1>"
            )


OnBase = Text | Full | NewLora | NewCustomDiffusion
Trained = New | OnBase

# ------------------------------------------------------------------------------------------------------ how it is trained


@dataclass(frozen=True)
class Schedule:
    """How long, and how the learning rate goes: linearly up over the warm-up, then down as half a cosine, or constant.

    Args:
        steps: of the optimizer.
        warmup_steps: in which the rate rises.
        kind: "cosine" or "constant".
    """

    steps: int = 5000
    warmup_steps: int = 200
    kind: str = "cosine"

    def __post_init__(self) -> None:
        if self.kind not in ("cosine", "constant"):
            raise WhenceError(f"kind is {self.kind!r}", "schedule", "cosine, constant")
        if self.steps < 1:
            raise WhenceError(f"steps is {self.steps}", "schedule", "at least 1")
        if self.warmup_steps < 0:
            raise WhenceError(f"warmup_steps is {self.warmup_steps}", "schedule", "0 or more")

    def rate(self, height: float, step: int) -> float:
        """The learning rate in step number `step` (from 0); `height` is the rate right after the warm-up."""
        if step < self.warmup_steps:
            return height * (step + 1) / self.warmup_steps
        if self.kind == "constant":
            return height
        return (
            height * 0.5 * (1 + math.cos(math.pi * (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)))
        )


@dataclass(frozen=True)
class Objective:
    """The loss of one image, and at which timesteps it is taken.

    Args:
        output: the loss; by default the squared error, with the weight w_t where there is a weighting.
        weighting: w_t of each timestep: `MinSNR` for the DDPM family, `SigmaSqrt` or `CosMap` for flow matching, None for 1.
        density: of the timesteps.
    """

    output: Output | None = None
    weighting: Weight | None = None
    density: Density = Even()

    @property
    def loss(self) -> Output:
        """The loss of one image."""
        return self.output or (loss if self.weighting is None else weighted)

    def on(self, forward: Denoiser | FlowMatching) -> Denoiser | FlowMatching:
        """A forward that knows weight and density."""
        return declared(forward, self.weighting, self.density)


@dataclass(frozen=True)
class Augmentation:
    """What training makes of its images.

    Args:
        flip: mirror them at random.
        empty_caption: the chance that an image has an empty caption in an epoch, so that the model can be drawn from with
            classifier-free guidance.
        prior: how many of them, the last ones, are prior images (see `order.with_prior_images`).
    """

    flip: bool = False
    empty_caption: float = 0.0
    prior: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.empty_caption <= 1:
            raise WhenceError(f"empty_caption is {self.empty_caption:g}", "data", "a chance, 0 to 1")


@dataclass(frozen=True)
class Recipe:
    """The recipe of a training.

    Args:
        model: what is trained; None where the caller brings the network.
        optimizer: `AdamW` or `SGD`.
        schedule: steps, and how the learning rate goes.
        objective: the loss.
        data: what is made of the images.
        batch_size: images per step.
        max_grad_norm: the largest norm of the gradient, 0 for no limit.
        ema: decay of the average of the weights, which is sampled from; 0 for none. It starts as (1 + step) / (10 + step),
            as in diffusers.
        seed: of everything.
    """

    model: Trained | None = None
    optimizer: AdamW | SGD = AdamW()
    schedule: Schedule = Schedule()
    objective: Objective = field(default_factory=Objective)
    data: Augmentation = Augmentation()
    batch_size: int = 64
    max_grad_norm: float = 1.0
    ema: float = 0.999
    seed: int = 0

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise WhenceError(f"batch_size is {self.batch_size}", "recipe", "at least 1")
        if not self.max_grad_norm >= 0:
            raise WhenceError(f"max_grad_norm is {self.max_grad_norm:g}", "recipe", "above 0, or 0 for no limit")
        if not 0 <= self.ema <= 1:
            raise WhenceError(f"ema is {self.ema:g}", "recipe", "0 (no average) to 1")
        check_seed(self.seed)

    @property
    def steps(self) -> int:
        """Steps of the optimizer."""
        return self.schedule.steps

    @property
    def loss(self) -> Output:
        """The loss of one image."""
        return self.objective.loss

    @property
    def base(self) -> Path | None:
        """The pipeline that the model lies on, if any."""
        return None if self.model is None or isinstance(self.model, New) else self.model.base

    def on(self, base: Path | None) -> Recipe:
        """The same with the pipeline somewhere else."""
        if self.model is None or isinstance(self.model, New):
            return self
        model: Trained = replace(self.model, base=base)
        return replace(self, model=model)

    def rate_at(self, step: int) -> float:
        """The learning rate of step number `step` (from 0)."""
        return self.schedule.rate(self.optimizer.learning_rate, step)

    def averaged(self, step: int) -> float | None:
        """The share that the average of the weights keeps in step number `step` (from 1); None for no average."""
        return min(self.ema, step / (9 + step)) if self.ema else None


def update(recipe: Recipe, state: State, grads: Weights) -> State:
    """One step of clipping, the optimizer and averaging: a pure, differentiable function of (state, grads).

    Args:
        recipe: of the training.
        state: before the step.
        grads: the gradient at it, by parameter.
    """
    if recipe.max_grad_norm:
        norm = torch.stack([g.square().sum() for g in grads.values()]).sum().sqrt()
        factor = (recipe.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
        grads = {name: g * factor for name, g in grads.items()}
    weights, m, v = recipe.optimizer.update(state, grads, recipe.rate_at(state.step))
    step = state.step + 1
    keep = recipe.averaged(step)
    if keep is None:
        return State(weights, m, v, weights, step)
    ema = {name: torch.lerp(state.ema[name], weights[name], 1 - keep) for name in weights}
    return State(weights, m, v, ema, step)
