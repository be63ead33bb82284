"""Linear and Conv2d layers as Kronecker factors need them: what they multiply (a) and what comes back (s), per draw.

The gradient of one draw is G = sum_m s_m a_m^T  [d_o, d_i], a sum over the M positions at which the layer is applied
(pixels, tokens, repeated calls): a_m [d_i] is the input there, for a convolution the unfolded patch, with 1 appended for the
bias; s_m [d_o] is the gradient of the draw's scalar by the layer's output there. A batch of b draws is kept as a [d_i, b, M]
and s [d_o, b, M], so that sums over draws and positions are one matrix product.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from whence.features.gradients import select
from whence.types import WhenceError

Layer = nn.Linear | nn.Conv2d
WITH_FACTORS = "a Linear layer or a Conv2d without groups, which K-FAC has factors for"
Call = tuple[Tensor, GradientEdge]  # input and output
Calls = dict[str, list[Call]]  # of each layer
Sides = tuple[Tensor, Tensor]  # a [fan-in + 1, b, M] and s [d_o, b, M]


@dataclass(frozen=True)
class Block:
    """Parameters of one layer that share a pair of factors: weight and bias together, or one of them.

    Args:
        layer: name of the layer.
        names: of the parameters.
        weight: columns of the weight in a gradient row; None where it is not part.
        bias: columns of the bias, likewise.
        shape: (d_o, d_i) of G.
    """

    layer: str
    names: tuple[str, ...]
    weight: slice | None
    bias: slice | None
    shape: tuple[int, int]

    @property
    def name(self) -> str:
        return "+".join(self.names)

    def gradient(self, rows: Tensor) -> Tensor:
        """This block of gradient rows [b, d] as matrices G [b, d_o, d_i]; the bias is the last column."""
        parts = [rows[:, columns] for columns in (self.weight, self.bias) if columns is not None]
        return torch.cat([part.reshape(len(rows), self.shape[0], -1) for part in parts], dim=2)

    def scatter(self, gradient: Tensor, rows: Tensor) -> None:
        """Write matrices G [b, d_o, d_i] back into their columns of rows [b, d]."""
        if self.weight is not None:
            weight = gradient if self.bias is None else gradient[:, :, :-1]
            rows[:, self.weight] = weight.flatten(1).to(rows)
        if self.bias is not None:
            rows[:, self.bias] = gradient[:, :, -1].to(rows)

    def inputs(self, a: Tensor) -> Tensor:
        """[fan-in + 1, b, M] -> [d_i, b, M]: what multiplies this block's parameters; the last row is that of the bias."""
        return a[slice(None if self.weight is not None else -1, None if self.bias is not None else -1)]


def has_factors(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.groups == 1)


def layer_parameters(module: nn.Module, parameters: str = "trained") -> str:
    """A regular expression for exactly those of the parameters that belong to Linear and Conv2d layers with factors."""
    owners = dict(module.named_modules())
    names = [name for name in select(module, parameters) if has_factors(owners[name.rpartition(".")[0]])]
    if not names:
        raise WhenceError(f"parameters {parameters!r}: none of them belongs to {WITH_FACTORS}")
    return "^(" + "|".join(name.replace(".", r"\.") for name in names) + ")$"


def blocks_of(module: nn.Module, sizes: Mapping[str, int], joint: bool, skip_others: bool) -> list[Block]:
    """The blocks of the chosen parameters.

    Args:
        module: the network.
        sizes: the chosen parameters, name -> numel, in the order of a gradient row.
        joint: whether weight and bias of a layer are one block.
        skip_others: whether parameters without factors are left out instead of refused.
    """
    owners, columns, start = dict(module.named_modules()), dict[str, dict[str, slice]](), 0
    for name, size in sizes.items():
        path, _, kind = name.rpartition(".")
        if has_factors(owners[path]):
            columns.setdefault(path, {})[kind] = slice(start, start + size)
        elif not skip_others:
            raise _no_factors(name, owners[path])
        start += size
    if not columns:
        raise WhenceError(f"none of the chosen parameters (like {next(iter(sizes))!r}) belongs to {WITH_FACTORS}")
    _refuse_tied(module, columns)
    return [block for path, own in columns.items() for block in _split(path, cast(Layer, owners[path]), own, joint)]


def _no_factors(name: str, owner: nn.Module) -> WhenceError:
    kind = type(owner).__name__ + (f" with {owner.groups} groups" if isinstance(owner, nn.Conv2d) else "")
    return WhenceError(
        f"no Kronecker factors for {name!r} of a {kind}; accepted: `parameters` of Linear and Conv2d layers "
        "(layer_parameters(module) lists them), or skip_others=True to leave the rest out"
    )


def _split(path: str, layer: Layer, own: Mapping[str, slice], joint: bool) -> Iterator[Block]:
    prefix, (rows, fan_in) = f"{path}." if path else "", layer.weight.flatten(1).shape
    weight, bias = own.get("weight"), own.get("bias")
    if joint and weight is not None and bias is not None:
        yield Block(path, (f"{prefix}weight", f"{prefix}bias"), weight, bias, (rows, fan_in + 1))
        return
    if weight is not None:
        yield Block(path, (f"{prefix}weight",), weight, None, (rows, fan_in))
    if bias is not None:
        yield Block(path, (f"{prefix}bias",), None, bias, (rows, 1))


def _refuse_tied(module: nn.Module, columns: Mapping[str, Mapping[str, slice]]) -> None:
    holders = defaultdict(list)
    for path, owner in module.named_modules():  # a module that has two names is listed once
        for kind, parameter in owner.named_parameters(recurse=False):
            holders[id(parameter)].append((path, kind))
    for places in holders.values():
        if len(places) > 1 and any(kind in columns.get(path, {}) for path, kind in places):
            names = " and ".join(f"{path}.{kind}" for path, kind in places)
            raise WhenceError(
                f"{names} are one tied parameter, which has no Kronecker factors; leave it out of `parameters`"
            )


@contextmanager
def recording(layers: Mapping[str, Layer]) -> Iterator[Calls]:
    """Inputs and outputs of the layers' calls in here."""
    calls: Calls = {name: [] for name in layers}

    def record(name: str, _: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], output: Tensor) -> None:
        if not output.requires_grad:
            raise WhenceError(
                f"layer {name!r} runs without gradients (torch.no_grad, or reentrant gradient checkpointing); "
                "switch gradient checkpointing off, or leave it out of `parameters`"
            )
        inputs = args[0] if args else kwargs["input"]
        # The edge, not the tensor: an in-place activation would turn the tensor into its own output.
        calls[name].append((inputs.detach(), get_gradient_edge(output)))

    handles = [layer.register_forward_hook(partial(record, name), with_kwargs=True) for name, layer in layers.items()]
    try:
        yield calls
    finally:
        for handle in handles:  # before any backward pass, whose checkpoints would run the layers again
            handle.remove()


def backward(prediction: Tensor, calls: Calls, cotangent: Tensor, keep: bool) -> dict[str, list[Tensor | None]]:
    """d <prediction, cotangent> / d output of each call, for the layers on which the prediction depends.

    Args:
        prediction: of the pass that was recorded [b, ...].
        calls: of each layer, from `recording`.
        cotangent: shaped like the prediction.
        keep: whether another backward pass follows.
    """
    edges = [edge for each in calls.values() for _, edge in each]
    if not edges or not prediction.requires_grad:
        return {}
    found = iter(torch.autograd.grad(prediction, edges, cotangent, retain_graph=keep, allow_unused=True))
    gradients: dict[str, list[Tensor | None]] = {name: [next(found) for _ in each] for name, each in calls.items()}
    return {name: each for name, each in gradients.items() if each and any(g is not None for g in each)}


def sides(name: str, layer: Layer, calls: Sequence[Call], gradients: Sequence[Tensor | None], rows: int) -> Sides:
    """a [fan-in + 1, rows, M], the last row 1, and s [d_o, rows, M] of a layer, its calls one after the other.

    In float32, or in float64 where the network is.

    Args:
        name: of the layer, for errors.
        layer: the layer.
        calls: what it was called with.
        gradients: by the output of each call; None where the prediction does not depend on it.
        rows: of the batch.
    """
    found = []
    for (x, _), g in zip(calls, gradients, strict=True):
        if g is None:
            continue
        if x.ndim < 2 or len(x) % rows or (isinstance(layer, nn.Conv2d) and x.ndim != 4):
            raise WhenceError(
                f"layer {name!r}: the first axis of its input {list(x.shape)} is not the batch of {rows}; "
                "leave it out of `parameters`"
            )
        wide = torch.promote_types(x.dtype, torch.float32)
        if isinstance(layer, nn.Conv2d):
            pair = _patches(layer, x.to(wide)), g.flatten(2).transpose(0, 1)
        else:
            a = _features_first(x.to(wide))
            pair = torch.cat([a, a.new_ones(1, *a.shape[1:])]), _features_first(g)
        # [features, rows * r, M'] -> [features, rows, r M']
        found.append([v.to(wide).unflatten(1, (rows, -1)).flatten(2) for v in pair])
    a, s = (torch.cat(side, dim=2) if len(side) > 1 else side[0] for side in zip(*found, strict=True))
    return a, s


def _features_first(x: Tensor) -> Tensor:
    """[b, ..., features] -> [features, b, M]."""
    return x.reshape(len(x), -1, x.shape[-1]).permute(2, 0, 1)


def _patches(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """[C kh kw + 1, b, H W], in the order of the flattened kernel; the last row is 1.

    One copy of each pixel to where it belongs: F.unfold, a transpose and a row of ones would write all patches three times.
    """
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    x = F.pad(x, conv._reversed_padding_repeated_twice, mode=mode)
    (b, channels, height, width), (down, right) = x.shape, conv.dilation
    kh, kw = ((size - 1) * step + 1 for size, step in zip(conv.kernel_size, conv.dilation, strict=True))
    number = torch.arange(b * height * width, device=x.device).view(b, height, width)
    windows = number.unfold(1, kh, conv.stride[0]).unfold(2, kw, conv.stride[1])[..., ::down, ::right]
    a = x.new_empty(channels * windows[0, 0, 0].numel() + 1, b, windows[0, :, :, 0, 0].numel())
    where = windows.permute(3, 4, 0, 1, 2).flatten()
    torch.index_select(x.transpose(0, 1).flatten(1), 1, where, out=a[:-1].view(channels, -1))
    a[-1] = 1
    return a


def verify(
    module: nn.Module, layers: Mapping[str, Layer], blocks: Sequence[Block], prediction: Tensor, calls: Calls
) -> None:
    """Once per network: G from a and s must be autograd's own gradient, and the rows of a batch must not mix.

    The probe looks at the first row alone. It finds weights used outside their layer (F.linear(x, layer.weight)), layers
    that do more than a plain Linear or Conv2d, batch statistics, and inputs whose first axis is not the batch.

    Args:
        module: the network.
        layers: its layers with factors, by name.
        blocks: the chosen parameters.
        prediction: of the pass that was recorded [b, ...].
        calls: of each layer, from `recording`.
    """
    if not prediction.requires_grad:
        return
    parameters, rows = dict(module.named_parameters()), len(prediction)
    probe = torch.zeros_like(prediction)
    wave = torch.arange(prediction[0].numel(), device=probe.device, dtype=torch.float64).cos()
    probe[0] = wave.reshape(prediction.shape[1:]).to(probe)
    gradients = backward(prediction, calls, probe, keep=True)
    names = [name for block in blocks for name in block.names]
    weights = [parameters[name] for name in names]
    slopes = torch.autograd.grad(
        prediction, weights, probe, retain_graph=True, materialize_grads=True, allow_unused=True
    )
    true = dict(zip(names, slopes, strict=True))
    for block in blocks:
        expected = torch.cat([true[name].reshape(block.shape[0], -1) for name in block.names], dim=1)
        found, scale = torch.zeros_like(expected), 0.0
        own = block.layer
        if own in gradients:
            a, s = sides(own, layers[own], calls[own], gradients[own], rows)
            a = block.inputs(a)
            found, scale = s[:, 0] @ a[:, 0].mT, float(s[:, 0].norm() * a[:, 0].norm())
            if s[:, 1:].any():
                raise WhenceError(
                    f"layer {own!r} mixes the rows of a batch (batch statistics, or an input whose first axis is not the "
                    "batch), so that there is no gradient per draw; leave it out of `parameters`"
                )
        tolerance = torch.finfo(prediction.dtype).eps ** 0.5 * max(scale, float(expected.norm()))
        if float((expected - found).norm()) > tolerance:
            raise WhenceError(
                f"layer {own!r}: its inputs and output gradients do not give the gradient of {block.name}; are "
                "its weights used outside its own call (F.linear(x, layer.weight)), or changed in it? leave it out"
            )
