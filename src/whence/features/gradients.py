"""Per-image gradients: g_i = mean over draws s of u_s * d f(x_i; draw s) / d theta, one row per image and parameter.

Two backends, tested equal. `per_image_vmap` is the reference: torch.func.vmap over images. `per_image_backward` lets the
draws of one image fill the batch of one ordinary backward pass, whose `.grad` is the image's mean gradient: no
per-sample machinery, the cost of a training step, and a row that cannot depend on its neighbours even in the last bit.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from whence.diffusion.draws import DrawRule
from whence.diffusion.halves import Half
from whence.diffusion.outputs import OUTPUTS, Output
from whence.types import Batch, Blocks, Draw, Forward, Weights, WhenceError

PARAMETERS = {
    "all": r".*",
    "attention": r"attn|attention|to_[qkv]\b|to_out",
    "cross-attention": r"attn2",
    "cross-attention-kv": r"attn2.*to_[kv]\b",
    "lora": r"lora_[AB]|lora[._](up|down)",
    "custom-diffusion": r"to_[kv]_custom_diffusion|attn2\.to_[kv]\.weight|modifier_token",
    "text-kv": r"add_[kv]_proj",
    "up-blocks": r"up_blocks",
    "last": r"^(conv_out|proj_out(_\d)?|out)\.",
}
"""Named groups of parameters; any other text is a regular expression searched in the parameter names."""
LAST = "last-layer"  # a further group: weight and bias of the Linear or Conv2d that is registered last
TRAINED = "trained"  # a further group: what asks for gradients, all of a plain model, the adapter of one with a LoRA
DRAWS_AT_ONCE = 32  # draws of one image in one backward pass; bounds the activations kept
VALUES_AT_ONCE = 2**26  # activations kept in one pass of a small network: at most parameters x inputs of each row


def select(module: nn.Module, parameters: str) -> list[str]:
    """Names of the parameters to attribute, in the module's order."""
    if parameters == LAST:
        return _last_layer(module)
    if parameters == TRAINED:
        return _trained(module)
    try:
        pattern = re.compile(PARAMETERS.get(parameters, parameters))
    except re.error as error:
        raise WhenceError(f"parameters {parameters!r} is not a regular expression: {error}") from None
    names = [name for name, _ in module.named_parameters()]
    chosen = [name for name in names if pattern.search(name)]
    if not chosen:
        presets = ", ".join([TRAINED, *PARAMETERS, LAST])
        lora = "; a LoRA is given with --lora (adapter= in Python)" if parameters == "lora" else ""
        raise WhenceError(
            f"parameters {parameters!r} match none of {len(names)} (like {names[0]}); presets: {presets}{lora}"
        )
    return chosen


def _trained(module: nn.Module) -> list[str]:
    every = list(module.named_parameters())
    names = [name for name, p in every if p.requires_grad]
    if not every:
        raise WhenceError(f"this {type(module).__name__} has no parameters", "module", "a network with weights")
    if not names:
        raise WhenceError(
            f"parameters {TRAINED!r}: all parameters of this {type(module).__name__} are frozen (requires_grad is False); "
            'accepted: requires_grad_() on those that were trained, or parameters="all"'
        )
    return names


def _last_layer(module: nn.Module) -> list[str]:
    names = [name for name, layer in module.named_modules() if isinstance(layer, (nn.Linear, nn.Conv2d))]
    if not names:
        raise WhenceError(f"parameters {LAST!r}: {type(module).__name__} has no Linear or Conv2d layer")
    prefix = f"{names[-1]}." if names[-1] else ""
    parameters = [name for name, _ in module.named_parameters()]
    return [name for name in parameters if name.startswith(prefix) and "." not in name.removeprefix(prefix)]


def check(output: Output, forward: Forward) -> None:
    """Refuse a measurement that does not fit the kind of model."""
    if "any" not in (forward.models, output.models) and forward.models != output.models:
        fits = ", ".join(name for name, one in OUTPUTS.items() if one.models in (forward.models, "any"))
        raise WhenceError(
            f"output {output.name!r} is for a {output.models}; this model is a {forward.models}", "", fits
        )
    if output.target not in (None, forward.prediction_type):
        raise WhenceError(
            f"output {output.name!r} weighs the error of a predicted noise; this model predicts {forward.prediction_type}"
        )


def measure(module: nn.Module, weights: Weights, forward: Forward, output: Output, batch: Batch, draw: Draw) -> Tensor:
    """f of each row of a batch with one draw per row: [b].

    Args:
        module: the network.
        weights: those it is measured at; the module's own for what is not in them.
        forward: image and draw -> prediction and target.
        output: f.
        batch: the images [b].
        draw: timestep [b] and noise [b, ...] of each row.
    """

    def call(*args: object, **kwargs: object) -> object:
        return functional_call(module, weights, args, kwargs)

    return output.measure(forward, call if weights else module, batch, draw)


def repeat(batch: Batch, times: int) -> Batch:
    """The same single image, once per draw."""
    cond = {name: value.expand(times, *value.shape[1:]) for name, value in batch.cond.items()}
    return Batch(batch.x0.expand(times, *batch.x0.shape[1:]), batch.keys.expand(times), cond)


def fill(module: nn.Module, image: Tensor, draws: int = 1) -> int:
    """Rows of one pass over a small network, where it costs the same for one row as for hundreds; 0 for a large one.

    Args:
        module: the network.
        image: one row.
        draws: of each row that are made at once.
    """
    size = sum(p.numel() for p in module.parameters())
    return VALUES_AT_ONCE // (max(size, draws, 1) * max(image.numel(), 1))


def joined(batches: Iterable[Batch], draws: DrawRule, module: nn.Module) -> Iterator[Batch]:
    """Batches, several as one as long as they fit in a pass of the network (see `fill`).

    Args:
        batches: of images.
        draws: that gradients are averaged over.
        module: the network.
    """
    held: list[Batch] = []
    for batch in batches:
        if held and sum(map(len, held)) + len(batch) > fill(module, batch.x0[0], draws.count):
            yield _as_one(held)
            held = []
        held.append(batch)
    if held:
        yield _as_one(held)


def _as_one(batches: list[Batch]) -> Batch:
    if len(batches) == 1:
        return batches[0]
    cond = {name: torch.cat([batch.cond[name] for batch in batches]) for name in batches[0].cond}
    return Batch(torch.cat([batch.x0 for batch in batches]), torch.cat([batch.keys for batch in batches]), cond)


def one(batch: Batch, i: int) -> Batch:
    return Batch(batch.x0[i : i + 1], batch.keys[i : i + 1], {k: v[i : i + 1] for k, v in batch.cond.items()})


def draws_of(image: Batch, draws: DrawRule, forward: Forward, at_once: int = DRAWS_AT_ONCE) -> Iterator[Draw]:
    """The draws of one image, some at a time: a thousand of them are no batch.

    Args:
        image: a batch of one.
        draws: that are meant.
        forward: whose timesteps they are.
        at_once: as many, at most.
    """
    drawn = draws(image.keys, image.x0.shape[1:], forward.timesteps, image.x0.dtype)
    t, noise = drawn.t[0].to(image.x0.device), drawn.noise[0].to(image.x0)
    for start in range(0, len(t), at_once):
        yield Draw(t[start : start + at_once], noise[start : start + at_once])


def _weights(module: nn.Module, names: list[str]) -> Weights:
    parameters = dict(module.named_parameters())
    return {name: parameters[name].detach() for name in names}


def _unit(blocks: Blocks) -> Blocks:
    """Each row divided by its norm over all blocks; a zero gradient stays zero."""
    norm = torch.stack([block.square().sum(1) for block in blocks.values()]).sum(0).sqrt()
    factor = torch.where(norm > 0, 1 / norm, 0.0)
    return {name: block * factor[:, None] for name, block in blocks.items()}


def per_image_vmap(
    module: nn.Module, forward: Forward, output: Output, draws: DrawRule, batch: Batch, names: list[str]
) -> Blocks:
    """The reference: gradients of all images of the batch at once. Memory grows with b (and with S for unit draws).

    Args:
        module: the network.
        forward: image and draw -> prediction and target.
        output: f.
        draws: those that gradients are averaged over, S of them.
        batch: the images [b].
        names: of the parameters.
    """
    weights = _weights(module, names)
    draw = draws(batch.keys, batch.x0.shape[1:], forward.timesteps, batch.x0.dtype)
    count = draws.count

    def value(w: Weights, x0: Tensor, cond: dict[str, Tensor], t: Tensor, noise: Tensor) -> Tensor:
        rows = len(t)
        same = {k: v.expand(rows, *v.shape) for k, v in cond.items()}
        b = Batch(x0.expand(rows, *x0.shape), torch.zeros(rows, dtype=torch.int64), same)
        return measure(module, w, forward, output, b, Draw(t, noise)).mean()

    cond, t, noise = dict(batch.cond), draw.t.to(batch.x0.device), draw.noise.to(batch.x0)
    # The fused attention kernels have no vmap rule; the rows must not carry a graph of the weights not chosen.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        if not draws.unit:
            rows = vmap(grad(value), in_dims=(None, 0, 0, 0, 0))(weights, batch.x0, cond, t, noise)
            return {name: rows[name].flatten(1) for name in names}
        total: Blocks = {}
        groups = count // draws.group
        for s in range(0, count, draws.group):
            here = slice(s, s + draws.group)
            rows = vmap(grad(value), in_dims=(None, 0, 0, 0, 0))(weights, batch.x0, cond, t[:, here], noise[:, here])
            unit = _unit({name: rows[name].flatten(1) for name in names})
            total = {name: total[name] + unit[name] / groups if total else unit[name] / groups for name in names}
        return total


def per_image_backward(
    module: nn.Module, forward: Forward, output: Output, draws: DrawRule, batch: Batch, names: list[str]
) -> Blocks:
    """One image at a time, its draws as the batch of one backward pass. Unit draws, or groups of them, need a pass each.

    The arguments are those of `per_image_vmap`.
    """
    count, step = draws.count, draws.group if draws.unit else DRAWS_AT_ONCE
    with differentiating(module, names) as weights:
        rows: Blocks = {name: w.new_zeros(len(batch), w.numel()) for name, w in weights.items()}
        for i in range(len(batch)):
            image = one(batch, i)
            for part in draws_of(image, draws, forward, step):
                value = measure(module, {}, forward, output, repeat(image, len(part.t)), part).sum() / count
                if not value.requires_grad:  # none of these parameters is used
                    continue
                grads = torch.autograd.grad(value, list(weights.values()), allow_unused=True)
                blocks = {name: g.reshape(1, -1) for name, g in zip(names, grads, strict=True) if g is not None}
                for name, block in (_unit(blocks) if draws.unit else blocks).items():
                    rows[name][i] += block[0] * (step / count) if draws.unit else block[0]
    return rows


def per_image_together(
    module: nn.Module, forward: Forward, output: Output, draws: DrawRule, batch: Batch, names: list[str]
) -> Blocks:
    """`per_image_vmap` where the network allows it, one image after the other where not: `.item()`, activation checkpointing
    and control flow that looks at values cannot be vectorised. The arguments are those of `per_image_vmap`."""
    try:
        return per_image_vmap(module, forward, output, draws, batch, names)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        return per_image_backward(module, forward, output, draws, batch, names)


@contextmanager
def differentiating(module: nn.Module, names: list[str]) -> Iterator[Weights]:
    """Only the named parameters ask for gradients in here: frozen ones cost neither time nor memory."""
    parameters, chosen = dict(module.named_parameters()), set(names)
    before = {name: p.requires_grad for name, p in parameters.items()}
    hooks = [m.register_forward_pre_hook(_contiguous) for m in module.modules() if isinstance(m, nn.GroupNorm)]
    try:
        for name, p in parameters.items():
            p.requires_grad_(name in chosen)
        yield {name: parameters[name] for name in names}
    finally:
        for hook in hooks:
            hook.remove()
        for name, p in parameters.items():
            p.requires_grad_(before[name])


def _contiguous(norm: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    # torch 2.13 crashes (SIGSEGV) in the backward pass of a channels-last group norm whose input asks for no gradient.
    if not any(p.requires_grad for p in norm.parameters()):
        return inputs  # it has no backward pass
    return tuple(x if x.requires_grad else x.contiguous() for x in inputs)


def per_image(
    module: nn.Module,
    forward: Forward,
    output: Output,
    draws: DrawRule,
    batch: Batch,
    names: list[str],
    at_once: int,
) -> Iterator[tuple[slice, Blocks]]:
    """Gradient rows of a batch in pieces, by the backend that suits the number of draws.

    A few draws, or unit ones, cannot fill a batch by themselves: such rows are vectorised over images.

    Args:
        module: the network.
        forward: image and draw -> prediction and target.
        output: f.
        draws: those that gradients are averaged over.
        batch: the images [b].
        names: of the parameters.
        at_once: images vectorised over.
    """
    check(output, forward)
    whole = draws.draws if isinstance(draws, Half) else draws  # a half is measured as the whole is
    filled = (whole.group if whole.unit else whole.count) >= 4
    step = 1 if filled else at_once
    backend = per_image_backward if filled else per_image_together
    for start in range(0, len(batch), step):
        rows = slice(start, min(start + step, len(batch)))
        piece = Batch(batch.x0[rows], batch.keys[rows], {k: v[rows] for k, v in batch.cond.items()})
        yield rows, backend(module, forward, output, draws, piece, names)
