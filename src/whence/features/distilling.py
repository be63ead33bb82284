"""Fitting a student (see `students`) to a teacher's scores s, by their order or by their sizes.

    order    pi[q, i] = rank of i among the K candidates of q, highest score first, / K;      an outsider: (K - 1) / K
             min over g, a, b of the mean of BCE(sigmoid(a r[q, i] + b), pi[q, i])
    sizes    min over g of the mean over q of 1 - corr_i(r[q, i], s[q, i])        (a = -1, b = 0)

The order is what Wang et al. 2025 (2511.10721) fit: AdamW at 1e-3, decay 0.01, three hidden layers of 768, dropout 0.1, one
pair in ten an outsider. Differs from them: a step takes some queries and some images and all pairs between, so that each is
embedded once; outsiders count by weight; the rate falls to 0 along a cosine.

An order says nothing of how far the first stand out, and sums of scores, which the LDS and credit take, depend on that: over
random subsets the sums of two rows correlate as the rows do. So sizes are fitted by their correlation, row by row: how large
the scores of a query are in all, which differs by orders, does not enter there either.

Everything random is a function of (seed, content of the image, step): queries and images are taken in the order of their
digests, so that names, order and files do not enter.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from whence.diffusion.noise import counters, seed_for, stream, uniforms
from whence.features.students import embed
from whence.storage.files import progress
from whence.types import WhenceError

Fitted = dict[str, Tensor]
FITS = ("order", "sizes")


@dataclass(frozen=True)
class Distillation:
    """How a student is fitted.

    Args:
        fit: "order" or "sizes", of the teacher's scores.
        hidden: layers between the features and the embedding; 0 for a linear map.
        width: of each layer, and of the embedding.
        dropout: share of the hidden values that a step leaves out.
        steps: of AdamW.
        learning_rate: at the beginning.
        weight_decay: of AdamW, for matrices.
        queries: in one step.
        images: in one step.
        candidates: training images that a query is fitted on, where there are more: half of them those that the teacher
            ranks first, half the nearest by the encoders.
        outsiders: share of the weight of a step that images besides the candidates have.
        seed: of weights, steps and dropout.
    """

    fit: str = "order"
    hidden: int = 3
    width: int = 768
    dropout: float = 0.1
    steps: int = 1000
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    queries: int = 64
    images: int = 256
    candidates: int = 10_000
    outsiders: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.fit not in FITS:
            raise WhenceError(f"fit is {self.fit!r}", "distill", " or ".join(FITS))
        least = {"hidden": 0, "width": 1, "steps": 1, "queries": 1, "images": 2, "candidates": 2}
        for name, low in least.items():
            if vars(self)[name] < low:
                raise WhenceError(f"{name} is {vars(self)[name]}", "distill", f"{low} or more")
        for name in ("dropout", "outsiders"):
            if not 0 <= vars(self)[name] < 1:
                raise WhenceError(f"{name} is {vars(self)[name]:g}", "distill", "from 0 to below 1")
        if not 0 < self.learning_rate < math.inf or not 0 <= self.weight_decay < math.inf:
            told = f"learning_rate {self.learning_rate:g}, weight_decay {self.weight_decay:g}"
            raise WhenceError(told, "distill", "a rate above 0, a decay of 0 or more")


class Side(NamedTuple):
    """Rows of the encoders [b, k] and the noise keys [b] of their images."""

    phi: Tensor
    keys: Tensor


def ranks(scores: Tensor) -> Tensor:
    """The rank of each column in its row, 0 for the highest; ties share the mean of theirs: [m, n] -> [m, n] float64."""
    order = scores.sort(dim=1, descending=True)
    found = torch.empty_like(scores, dtype=torch.float64)
    for row, (values, columns) in enumerate(zip(order.values, order.indices, strict=True)):
        _, counts = torch.unique_consecutive(values, return_counts=True)
        ends = counts.cumsum(0).double()
        found[row, columns] = ((2 * ends - counts - 1) / 2).repeat_interleave(counts)
    return found


def candidates_of(scores: Tensor, near: Tensor, count: int) -> Tensor:
    """Which training images each query is fitted on: bool [m, n], all where there are no more than `count`.

    Args:
        scores: of the teacher [m, n].
        near: likeness by the encoders [m, n].
        count: half of these are what the teacher ranks first, the others the nearest of the rest.
    """
    if scores.shape[1] <= count:
        return torch.ones_like(scores, dtype=torch.bool)
    chosen = torch.zeros_like(scores, dtype=torch.bool)
    first = scores.topk(count - count // 2, dim=1).indices
    chosen.scatter_(1, first, True)
    return chosen.scatter_(1, near.masked_fill(chosen, -torch.inf).topk(count // 2, dim=1).indices, True)


def labels(scores: Tensor, chosen: Tensor) -> Tensor:
    """pi [m, n]; the arguments as of `candidates_of`, and what that returned."""
    counts = chosen.sum(1, keepdim=True)
    # Only candidates are ranked: what is none comes last.
    among = ranks(scores.double().masked_fill(~chosen, -torch.inf)) / counts
    return torch.where(chosen, among, (counts - 1) / counts).float()


def fit(queries: Side, images: Side, scores: Tensor, near: Tensor, how: Distillation) -> Fitted:
    """The weights of a student (see `students.embed`), and a and b.

    Args:
        queries: m of them, in the order of their digests.
        images: n training images, likewise.
        scores: of the teacher [m, n].
        near: likeness by the encoders [m, n].
        how: settings.
    """
    chosen = candidates_of(scores, near, how.candidates)
    wanted = labels(scores, chosen) if how.fit == "order" else _standard(scores.double()).float()
    weights = _begin(images.phi, how)
    fixed = ("mean", "std") if how.fit == "order" else ("mean", "std", "a", "b")
    trained = {name: value.requires_grad_() for name, value in weights.items() if name not in fixed}
    decayed = [value for name, value in trained.items() if name.startswith("weight.")]
    others = [value for name, value in trained.items() if not name.startswith("weight.")]
    groups = [{"params": decayed, "weight_decay": how.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=how.learning_rate)
    for step in progress(range(how.steps), "student"):
        for group in optimizer.param_groups:
            group["lr"] = how.learning_rate * (1 + math.cos(math.pi * step / how.steps)) / 2
        q = _some(len(queries.keys), how.queries, how.seed, step, "queries")
        i = _images(chosen[q].any(0), how, step)
        loss = _loss(weights, (queries, q), (images, i), wanted[q][:, i], chosen[q][:, i], how, step)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
    if not all(torch.isfinite(value).all() for value in weights.values()):
        raise WhenceError(
            f"the fit diverged within {how.steps:,} steps at a rate of {how.learning_rate:g}",
            "distill",
            "a smaller rate",
        )
    return {name: value.detach() for name, value in weights.items()}


def _begin(phi: Tensor, how: Distillation) -> Fitted:
    """The weights before the first step: uniform in +-1/sqrt(inputs), from counters."""
    mean, std = phi.double().mean(0), phi.double().std(0)
    # A column that does not vary says nothing, and is not blown up by its rounding.
    std = torch.where(std > 1e-6 * std.max().clamp(min=1e-30), std, 1.0)
    weights = {
        "mean": mean.float(),
        "std": std.float(),
        "a": torch.tensor(-5.0 if how.fit == "order" else -1.0),
        "b": torch.zeros(()),
    }
    width = phi.shape[1]
    for layer in range(how.hidden + 1):
        rows = stream(seed_for(how.seed, f"student layer {layer}"), 0, torch.arange(how.width))
        weights[f"weight.{layer}"] = ((2 * uniforms(rows, width) - 1) / math.sqrt(width)).float()
        weights[f"bias.{layer}"] = torch.zeros(how.width)
        width = how.width
    return weights


def _loss(
    weights: Fitted,
    queries: tuple[Side, Tensor],
    images: tuple[Side, Tensor],
    wanted: Tensor,
    chosen: Tensor,
    how: Distillation,
    step: int,
) -> Tensor:
    """The loss of the pairs between some queries and some images, each side given with its rows of this step."""
    sides = (queries, images)
    phi, keys = (torch.cat([side[at][rows] for side, rows in sides]) for at in (0, 1))
    g = embed(weights, phi, _dropout(keys, how, step))
    count = len(queries[1])
    r = g[:count] @ g[count:].T
    if how.fit == "sizes":
        return 1 - (_standard(r) * _standard(wanted)).mean()
    logits = weights["a"] * r + weights["b"]
    each = functional.binary_cross_entropy_with_logits(logits, wanted, reduction="none")
    shares = [(chosen, 1 - how.outsiders), (~chosen, how.outsiders)] if not chosen.all() else [(chosen, 1.0)]
    return torch.stack([share * each[pairs].mean() for pairs, share in shares if pairs.any()]).sum()


def _standard(values: Tensor) -> Tensor:
    """Each row with mean 0 and standard deviation 1; 0 where it does not vary."""
    centred = values - values.mean(1, keepdim=True)
    # Clamped before the root, whose slope at 0 is infinite.
    return centred / centred.square().mean(1, keepdim=True).clamp(min=1e-24).sqrt()


def _dropout(keys: Tensor, how: Distillation, step: int) -> list[Tensor]:
    """Factors of the hidden layers, each a function of the image and the step: [b, width]."""
    if how.dropout == 0:
        return []
    found = []
    for layer in range(how.hidden):
        rows = stream(seed_for(how.seed, f"dropout {layer}"), step, keys)
        found.append((uniforms(rows, how.width) >= how.dropout).float() / (1 - how.dropout))
    return found


def _images(near: Tensor, how: Distillation, step: int) -> Tensor:
    """The images of a step: most of them candidates of one of its queries, the rest of the others."""
    inside, outside = near.nonzero()[:, 0], (~near).nonzero()[:, 0]
    extra = min(len(outside), round(how.outsiders * how.images))
    return torch.cat(
        [
            inside[_some(len(inside), how.images - extra, how.seed, step, "images")],
            outside[_some(len(outside), extra, how.seed, step, "outsiders")],
        ]
    )


def _some(n: int, count: int, seed: int, step: int, what: str) -> Tensor:
    """`count` of n rows, or all; others in every step."""
    if n <= count:
        return torch.arange(n)
    row = stream(seed_for(seed, f"student {what}"), step, torch.zeros((), dtype=torch.int64))
    return counters(row, n).argsort()[:count]
