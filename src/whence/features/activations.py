"""Representations: what the layers of the model itself make of an image, as an encoder."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from whence.diffusion.draws import Draws, Steps
from whence.features.gradients import one, repeat
from whence.types import Batch, Draw, Forward, WhenceError

Hidden = nn.Linear | nn.Conv2d
STEPS = Draws(Steps((50, 200, 500)), shared=True)
Activations = list[tuple[str, Tensor]]  # (module, its activation) in the order of the calls


@dataclass(frozen=True)
class Layers:
    """Activations of modules of the model at the draws: mean over space or tokens, concatenated over modules and draws.

        a(x) = [ mean_p h_l(x_t)[p]  for each draw (t, noise) and module l ]        [b, S * sum_l channels_l]

    A module that is called more than once counts with the mean of its calls. The channels are the last axis of what Linear
    and LayerNorm give and of [b, tokens, k], and the second axis of anything else.

    Args:
        names: a module's name, or a regular expression that matches the full names of several. "" stands for the output of
            `mid_block` where the network has one (UNets of diffusers), and otherwise for the last hidden layer: what the
            Linear or Conv2d that is called last reads (penultimate activations of a classifier).
        draws: the (timestep, noise) pairs at which activations are read.
    """

    names: str = ""
    draws: Draws = STEPS

    def __call__(self, module: nn.Module, forward: Forward, batch: Batch) -> Tensor:
        names = _chosen(module, self.names)
        found = []
        for i in range(len(batch)):  # the draws of one image at a time: its row cannot depend on its neighbours
            image = one(batch, i)
            draw = self.draws(image.keys, image.x0.shape[1:], forward.timesteps, image.x0.dtype)
            draw = Draw(draw.t[0].to(image.x0.device), draw.noise[0].to(image.x0))
            with _watching(module, names) as seen:
                forward(module, repeat(image, self.draws.count), draw)
            found.append(_features(module, names, seen, self.draws.count).flatten())
        return torch.stack(found)


def _chosen(module: nn.Module, names: str) -> list[str]:
    """The modules to watch; none: the last hidden layer."""
    modules = [name for name, _ in module.named_modules() if name]
    if not names:
        return ["mid_block"] if "mid_block" in dict(module.named_children()) else []
    try:
        chosen = [name for name in modules if re.fullmatch(names, name)]
    except re.error as error:
        raise WhenceError(f"layers {names!r} is not a regular expression: {error}") from None
    if not chosen:
        raise WhenceError(f"layers {names!r} match no whole module name; there are {', '.join(modules) or 'none'}")
    return chosen


@contextmanager
def _watching(module: nn.Module, names: list[str]) -> Iterator[Activations]:
    """Outputs of the named modules, or inputs of all Linear and Conv2d layers, as they are called."""
    seen: Activations = []

    def output(name: str) -> Any:
        return lambda layer, args, kwargs, result: seen.append((name, _tensor(name, result)))

    def inputs(name: str) -> Any:
        return lambda layer, args, kwargs: seen.append((name, args[0] if args else kwargs["input"]))

    modules = dict(module.named_modules())
    hidden = {} if names else {name: layer for name, layer in modules.items() if isinstance(layer, Hidden)}
    handles = [modules[name].register_forward_hook(output(name), with_kwargs=True) for name in names]
    handles += [layer.register_forward_pre_hook(inputs(name), with_kwargs=True) for name, layer in hidden.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _tensor(name: str, result: Any) -> Tensor:
    """The first tensor of what a module returns (diffusers and transformers wrap it in tuples and named fields)."""
    if isinstance(result, Mapping):
        result = tuple(result.values())
    if isinstance(result, (tuple, list)) and result:
        result = result[0]
    if not isinstance(result, Tensor):
        raise WhenceError(f"layers: {name} returns a {type(result).__name__}, not a tensor; choose another module")
    return result


def _features(module: nn.Module, names: list[str], seen: Activations, count: int) -> Tensor:
    """[S, sum of channels]"""
    if not seen:
        what = ", ".join(names) or "no Linear or Conv2d layer"
        raise WhenceError(f"layers: {what} is never called by this model; choose other modules")
    modules = dict(module.named_modules())
    if not names:
        name, last = seen[-1]
        return _pooled(name, last, count, isinstance(modules[name], nn.Linear))
    columns = []
    for name in names:
        calls = [value for other, value in seen if other == name]
        if not calls:
            raise WhenceError(f"layers: {name} is never called by this model; choose other modules")
        trailing = isinstance(modules[name], (nn.Linear, nn.LayerNorm))
        columns.append(torch.stack([_pooled(name, value, count, trailing) for value in calls]).mean(0))
    return torch.cat(columns, dim=1)


def _pooled(name: str, value: Tensor, count: int, trailing: bool) -> Tensor:
    """Mean over all axes but the batch and the channels: [S, channels]."""
    if value.ndim < 2 or len(value) != count:
        raise WhenceError(
            f"layers: {name} gives {list(value.shape)} for {count} images; the first axis must be the images, choose another"
        )
    if value.ndim == 2:
        return value
    return value.flatten(1, -2).mean(1) if trailing or value.ndim == 3 else value.flatten(2).mean(2)
