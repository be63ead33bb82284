"""Output functions: what is measured of a prediction, one number per image and draw.

value: (prediction [b, ...], target [b, ...]) -> [b]. D is the number of elements of one prediction.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from whence.diffusion.likelihood import WHERE
from whence.diffusion.likelihood import log_likelihood as likelihood
from whence.diffusion.noise import counters, seed_for
from whence.types import Batch, Call, Draw, Forward, WhenceError, describe, digest


@dataclass(frozen=True)
class Output:
    """A measurement.

    Args:
        name: in recipes and options.
        value: (prediction [b, ...], target [b, ...]) -> [b].
        better: "lower" for losses, "higher" for margins, None where neither is meant (norms of the prediction).
        models: the kind of model it fits: "denoiser", "classifier" or "any".
        weight: a factor per draw from (forward, t [b]) -> [b]; None for 1.
        target: the only prediction type it means anything for; None for any.
        whole: (forward, network, batch [b], draw [b]) -> [b], for what takes more than one prediction; `value` then says
            that there is none.
        element: (prediction, target) -> one number per element, [b, ...], whose mean over a row is `value`, so that a part
            of the picture can be asked about (`region`). None where `value` is no such mean.
    """

    name: str
    value: Callable[[Tensor, Tensor], Tensor]
    better: str | None
    models: str = "denoiser"
    weight: Callable[[Forward, Tensor], Tensor] | None = None
    target: str | None = None
    whole: Callable[[Forward, Call, Batch, Draw], Tensor] | None = None
    element: Callable[[Tensor, Tensor], Tensor] | None = None

    def describe(self) -> object:
        """Ours by their names; one of a user's by all that it is, so that an edited one is another."""
        if OUTPUTS.get(self.name) == self or isinstance(self.value, _Probe | Region):
            return self.name
        parts = {"value": self.value, "weight": self.weight}
        parts |= {name: part for name in ("whole", "element") if (part := vars(self)[name]) is not None}
        return {"is": "Output", "name": self.name, "better": self.better, "models": self.models} | describe(parts)

    @classmethod
    def named(cls, name: str) -> Output:
        """The inverse of `describe`: an output by its name."""
        if probe := re.fullmatch(r"probe (\d+) of seed (\d+)", name):
            return _probe(int(probe[1]), int(probe[2]))
        if " in region " in name:
            raise WhenceError(f"the mask of {name!r} is not in its name", accepted="region(output, mask)")
        if name not in OUTPUTS:
            raise WhenceError(f"unknown output {name!r}", accepted=", ".join(OUTPUTS))
        return OUTPUTS[name]

    def measure(self, forward: Forward, call: Call, batch: Batch, draw: Draw) -> Tensor:
        """The weighted measurement of each row of a batch with one draw per row: [b].

        Args:
            forward: image and draw -> prediction and target.
            call: the network.
            batch: the images [b].
            draw: timestep [b] and noise [b, ...] of each row.
        """
        if self.whole is not None:
            return self.whole(forward, call, batch, draw)
        prediction, target = forward(call, batch, draw)
        return self.of(prediction, target, draw.t, forward)

    def of(self, prediction: Tensor, target: Tensor, t: Tensor, forward: Forward) -> Tensor:
        """The weighted measurement of each row: [b].

        Args:
            prediction: of each row [b, ...].
            target: of each row [b, ...].
            t: timesteps [b].
            forward: knows the weights.
        """
        values = self.value(prediction, target)
        if values.shape != prediction.shape[:1]:
            raise WhenceError(
                f"it returns shape {list(values.shape)} for {len(prediction)} rows",
                f"output {self.name!r}",
                f"[{len(prediction)}], one number per row: reduction='none', then the mean over all but the first axis",
            )
        return values if self.weight is None else values * self.weight(forward, t).to(values)


def _square(prediction: Tensor, target: Tensor) -> Tensor:
    return (prediction - target).square()


def _squared_error(prediction: Tensor, target: Tensor) -> Tensor:
    return _square(prediction, target).flatten(1).mean(1)


def elbo_weight(alphas_cumprod: Tensor, t: Tensor) -> Tensor:
    """w_t = beta_t / (2 alpha_t (1 - alphabar_t)): the variational bound with sigma_t^2 = beta_t (Ho et al. 2020)."""
    current = alphas_cumprod[t]
    before = torch.where(t > 0, alphas_cumprod[(t - 1).clamp(min=0)], torch.ones_like(current))
    alpha = current / before
    return (1 - alpha) / (2 * alpha * (1 - current))


def _elbo_weight(forward: Forward, t: Tensor) -> Tensor:
    if forward.alphas_cumprod is None:
        raise WhenceError("output 'elbo' needs a noise schedule (alphas_cumprod); this model has none")
    return elbo_weight(forward.alphas_cumprod.to(t.device), t)


def _training_weight(forward: Forward, t: Tensor) -> Tensor:
    return forward.weight(t)


loss = Output("loss", _squared_error, "lower", element=_square)
"""(1/D) ||prediction - target||^2, the simple training loss."""
weighted = Output("weighted", _squared_error, "lower", weight=_training_weight, element=_square)
"""w_t (1/D) ||prediction - target||^2 with the weights that the forward says its training used."""
rmse = Output("rmse", lambda p, y: _squared_error(p, y).sqrt(), "lower")
"""sqrt((1/D) ||prediction - target||^2), the size of the error: the residual of DAS."""
elbo = Output("elbo", _squared_error, "lower", weight=_elbo_weight, target="epsilon", element=_square)
"""w_t (1/D) ||prediction - target||^2 with the weights of the variational bound."""
squared_norm = Output("squared_norm", lambda p, _: p.square().flatten(1).mean(1), None, element=lambda p, _: p.square())
"""(1/D) ||prediction||^2: D-TRAK's output function (Zheng et al. 2024)."""
mean = Output("mean", lambda p, _: p.flatten(1).mean(1), None, element=lambda p, _: p)
"""(1/D) sum of the prediction: the scalar DAS (Lin et al. 2025); its trace over probes is Charpiat's kernel."""


def _no_prediction(prediction: Tensor, target: Tensor) -> Tensor:
    raise WhenceError("it is no function of one prediction, which this method needs", WHERE, "loss")


log_likelihood = Output("log_likelihood", _no_prediction, "higher", whole=likelihood)
"""(1/D) log p(image) in nats per element, by the probability-flow ODE (see `likelihood`): a hundred calls of the network and
as many derivatives of it, or those times the elements where there are few. One draw is enough for these."""
l1 = Output("l1", lambda p, _: p.flatten(1).abs().sum(1), None, element=lambda p, _: p.abs() * p.flatten(1).shape[1])
l2 = Output("l2", lambda p, _: torch.linalg.vector_norm(p.flatten(1), dim=1), None)
linf = Output("linf", lambda p, _: p.flatten(1).abs().amax(1), None)
"""Norms of the prediction."""

cross_entropy = Output(
    "cross_entropy", lambda p, y: F.cross_entropy(p, y, reduction="none"), "lower", models="classifier"
)
"""-log p_y."""


def _margin(logits: Tensor, label: Tensor) -> Tensor:
    # Not one_hot: it looks at the values, which vmap cannot.
    own = torch.arange(logits.shape[-1], device=label.device) == label[..., None]
    correct = (logits * own).sum(-1)
    return correct - logits.masked_fill(own, -torch.inf).logsumexp(-1)


margin = Output("margin", _margin, "higher", models="classifier")
"""log p_y - log(1 - p_y) = z_y - logsumexp of the other logits (TRAK's output function)."""


def _doubt(logits: Tensor, label: Tensor) -> Tensor:
    # In logarithms: 1 - p itself is 0 in float32 as soon as the network is sure.
    own = torch.arange(logits.shape[-1], device=label.device) == label[..., None]
    return (logits.masked_fill(own, -torch.inf).logsumexp(-1) - logits.logsumexp(-1)).exp()


doubt = Output("doubt", _doubt, "lower", models="classifier")
"""1 - p_y: the weight Q of a training image in TRAK."""
DENOISER = (loss, elbo, weighted, rmse, squared_norm, mean, log_likelihood, l1, l2, linf)
OUTPUTS = {o.name: o for o in (*DENOISER, cross_entropy, margin, doubt)}


@dataclass(frozen=True)
class Region:
    """sum(mask * e(prediction, target)) / sum(mask), e an output per element: its mean over a part of the picture.

    Args:
        element: e.
        digest: of the mask.
        mask: how much each place counts, from 0 to 1, for all channels alike: the last axes of a prediction.
    """

    element: Callable[[Tensor, Tensor], Tensor]
    digest: str
    mask: Tensor = field(repr=False, compare=False)

    def __call__(self, prediction: Tensor, target: Tensor) -> Tensor:
        values, shape = self.element(prediction, target), self.mask.shape
        if values.ndim <= len(shape) or values.shape[values.ndim - len(shape) :] != shape:
            raise WhenceError(
                f"a mask of {list(shape)} for predictions of {list(prediction.shape[1:])}",
                "region",
                "a mask of the last axes of one prediction: [height, width]",
            )
        counted = self.mask.to(values).expand_as(values).flatten(1)
        return (values.flatten(1) * counted).sum(1) / counted.sum(1)


def region(output: Output, mask: Tensor) -> Output:
    """An output measured under a mask, which stands in recipes with its digest: sum(mask * e) / sum(mask), where the output
    is the mean of e over the elements of a prediction. For the query alone: training measured whole pictures.

    Args:
        output: loss, weighted, elbo, squared_norm, mean or l1, or one of your own that has an `element`.
        mask: from 0 to 1, at the resolution of the network: [height, width].
    """
    if output.models == "classifier":
        raise WhenceError(f"output {output.name!r} of a classifier has no region", "region", "a denoiser")
    if output.element is None:
        names = ", ".join(one.name for one in DENOISER if one.element is not None)
        raise WhenceError(f"output {output.name!r} is no sum over the elements of a prediction", "region", names)
    mask = mask.detach().cpu().double().contiguous()
    if mask.ndim == 0 or not bool(((mask >= 0) & (mask <= 1)).all()):
        raise WhenceError(
            f"numbers of shape {list(mask.shape)}, not all from 0 to 1", "mask", "[height, width], 0 to 1"
        )
    if not bool(mask.any()):
        raise WhenceError("it is black everywhere: nothing is asked about", "mask", "white where the question is")
    known = digest(mask)
    value = Region(output.element, known, mask)
    return replace(output, name=f"{output.name} in region {known}", value=value, element=None)


@dataclass(frozen=True)
class _Probe:
    """<prediction, v> / sqrt(D) with v of random signs, the same for every image."""

    number: int
    seed: int

    def __call__(self, prediction: Tensor, target: Tensor) -> Tensor:
        flat = prediction.flatten(1)
        size = flat.shape[1]
        words = counters(torch.tensor(seed_for(self.seed, f"probe {self.number}")), size)
        v = torch.where(words < 0, -1.0, 1.0).to(flat)
        return flat @ v / size**0.5


def probes(count: int, seed: int = 0) -> tuple[Output, ...]:
    """Random directions of the prediction. The mean over probes of <J' v, J'' v> estimates trace(J' J''^T) / D without
    bias, J being the Jacobian of the prediction: the network-output kernel of Charpiat et al. 2019 for images."""
    if count < 1:
        raise WhenceError(f"probes: count is {count}; at least 1 is needed")
    return tuple(_probe(i, seed) for i in range(count))


def _probe(number: int, seed: int) -> Output:
    return Output(f"probe {number} of seed {seed}", _Probe(number, seed), None, models="any")
