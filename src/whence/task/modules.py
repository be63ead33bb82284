"""Networks that are in memory: what they are, and a copy of them to work with, so that the user's own stays as it is."""

from __future__ import annotations

import copy
from functools import partial

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from whence.plain import known_by
from whence.types import Checkpoint, WhenceError, digest

WRAPPERS = {"DataParallel": "module", "DistributedDataParallel": "module", "OptimizedModule": "_orig_mod"}


def bare(module: nn.Module) -> nn.Module:
    """The network in what spreads it over devices or compiles it: its parameters then have their own names."""
    while (inner := WRAPPERS.get(type(module).__name__)) is not None:
        module = module.get_submodule(inner)
    return module


def checkpoint_of(module: nn.Module) -> Checkpoint:
    """The weights of a network as they are now.

    Each load is a copy: mode, number format and hooks of the user's network are never changed. A network that was changed in
    the meantime is refused, because what is stored for it is of its former weights.
    """
    module = bare(module)
    lazy = [name for name, p in module.named_parameters() if is_lazy(p)]
    if lazy:
        raise WhenceError(
            f"parameter {lazy[0]} of this {type(module).__name__} has no shape yet",
            "module",
            "call it on a picture first",
        )
    packed = [name for name, value in module.state_dict().items() if not isinstance(value, Tensor)]
    packed += [name for name, p in module.named_parameters() if not (p.is_floating_point() or p.is_complex())]
    if packed:
        told = f"{packed[0]} of this {type(module).__name__} holds no floating point numbers: it is quantised"
        raise WhenceError(told, "module", "the network as it was before")
    known = known_by(module)
    trained = [name for name, p in module.named_parameters() if p.requires_grad]  # what is attributed by default
    return Checkpoint(partial(_copied, module, known), digest([known, trained], 64))


def _copied(module: nn.Module, known: str) -> nn.Module:
    if known_by(module) != known:
        raise WhenceError(
            f"this {type(module).__name__} was changed after the task was made",
            "module",
            "a task that is made when training is done",
        )
    try:
        return copy.deepcopy(module)
    except (RuntimeError, TypeError) as problem:
        raise WhenceError(
            f"this {type(module).__name__} cannot be copied ({problem})", "module", "one that can"
        ) from None
