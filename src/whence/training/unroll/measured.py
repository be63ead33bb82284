"""What is measured of the trained model, and its slope there: where reverse mode begins and forward mode ends."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from whence.diffusion.draws import Draws
from whence.diffusion.outputs import Output
from whence.features.gradients import check, measure, one, per_image, repeat
from whence.training.unroll.run import Trainer, twin
from whence.types import Draw, Forward, Images, Weights, WhenceError


@dataclass(frozen=True, eq=False)
class Queries:
    """Measurements of the trained model: the mean over draws of an output on each of m images.

    Args:
        images: m of them.
        output: what is measured.
        draws: of each image.
    """

    images: Images
    output: Output
    draws: Draws


Outputs = Queries | Callable[[Weights], Tensor]
"""What is measured of the final weights: queries, or any differentiable function weights -> [M]."""


@dataclass(frozen=True, eq=False)
class Mixed:
    """Sums of outputs: weights @ f [R].

    Args:
        outputs: f [M].
        weights: [R, M].
    """

    outputs: Outputs
    weights: Tensor


def _loaded(trainer: Trainer, weights: Weights) -> nn.Module:
    module = twin(trainer.module)
    module.load_state_dict(weights, strict=False)
    return module


def _check_queries(queries: Queries, forward: Forward) -> None:
    check(queries.output, forward)
    if queries.draws.unit:
        raise WhenceError("unroll: unit draws are no measurement, they only rescale gradients; give draws without unit")


def values(trainer: Trainer, outputs: Outputs, weights: Weights) -> Tensor:
    """f of every query at some weights: [M] float64.

    Args:
        trainer: knows the network and how it is measured.
        outputs: f.
        weights: of the network.
    """
    if not isinstance(outputs, Queries):
        with torch.no_grad():
            return outputs(weights).double().cpu()
    _check_queries(outputs, trainer.run.forward)
    engine, module, found = trainer.run.engine, _loaded(trainer, weights), []
    with torch.no_grad():
        for row in range(len(outputs.images)):
            image = outputs.images.batch([row]).to(engine.device, engine.dtype)
            at = outputs.draws(image.keys, image.x0.shape[1:], trainer.run.forward.timesteps, engine.dtype)
            at = Draw(at.t[0].to(image.x0.device), at.noise[0].to(image.x0))
            batch = repeat(one(image, 0), outputs.draws.count)
            found.append(measure(module, {}, trainer.run.forward, outputs.output, batch, at).double().mean())
    return torch.stack(found).cpu()


def slopes_at_the_end(trainer: Trainer, outputs: Outputs | Mixed, weights: Weights, rows: range) -> Tensor:
    """df_q / d(final averaged weights) of some queries: [M, D].

    Args:
        trainer: knows the network and how it is measured.
        outputs: f.
        weights: the final averaged ones.
        rows: the queries.
    """
    engine = trainer.run.engine
    if isinstance(outputs, Mixed):
        total = torch.zeros(
            len(rows), sum(w.numel() for w in weights.values()), device=engine.device, dtype=engine.dtype
        )
        for q in range(outputs.weights.shape[1]):
            slope = slopes_at_the_end(trainer, outputs.outputs, weights, range(q, q + 1))
            total.addr_(outputs.weights[rows.start : rows.stop, q].to(total), slope[0])
        return total
    if isinstance(outputs, Queries):
        _check_queries(outputs, trainer.run.forward)
        module, names = _loaded(trainer, weights), list(weights)
        batch = outputs.images.batch(rows).to(engine.device, engine.dtype)
        pieces = per_image(module, trainer.run.forward, outputs.output, outputs.draws, batch, names, engine.batch_size)
        return torch.cat([torch.cat([blocks[name] for name in names], dim=1) for _, blocks in pieces])
    leaves = {name: w.detach().clone().requires_grad_() for name, w in weights.items()}
    found = outputs(leaves)
    parameters = list(leaves.values())
    grads = [torch.autograd.grad(found[q], parameters, retain_graph=True, materialize_grads=True) for q in rows]
    return torch.stack([torch.cat([g.flatten() for g in of]) for of in grads])


def count_of(outputs: Outputs, weights: Weights) -> int:
    if isinstance(outputs, Queries):
        if not len(outputs.images):
            raise WhenceError("unroll: there is no query")
        return len(outputs.images)
    with torch.no_grad():
        found = outputs(weights)
    if found.ndim != 1 or not len(found):
        raise WhenceError(f"unroll: outputs must be a function weights -> [M]; it returns shape {tuple(found.shape)}")
    return len(found)
