"""Attribution from the data alone: how much each training image weighs in the optimal denoiser of the training set."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from whence.diffusion.draws import Draws, Steps
from whence.diffusion.forward import FlowMatching
from whence.methods.errors import Stated, unmeasured
from whence.methods.inner_product import recorded
from whence.methods.needs import check_scored
from whence.methods.registry import PATCHES, method
from whence.storage.files import progress
from whence.types import Forward, Images, Scores, Task, WhenceError


@dataclass(frozen=True)
class Piece:
    """Some of the places at which a query has patches of one size.

    Args:
        side: of the patches, in pixels.
        count: of all places.
        places: those that are meant.
    """

    side: int
    count: int
    places: slice

    def __hash__(self) -> int:
        return hash((self.side, self.places.start))


@dataclass(frozen=True)
class PatchKernel:
    """Posterior weights of patches in the optimal denoiser, no model (NDA: arXiv 2510.14269).

        w(i, p' | p, t) ~ exp( -||x_t[p] - a x_i[p']||^2 / (2 s^2) ),   a = sqrt(abar_t), s^2 = 1 - abar_t,
                          normalised over all training images i and places p'
        score[q, i] = mean over draws t, patch sizes and places p of the query  sum_p' w(i, p' | p, t)            [m, n]

    so that each query's scores sum to 1. x is what the model denoises: latents, for a model of latents. Images without
    height and width are one patch each.

    Training images are read twice for as many queries as fit in the engine's budget, in blocks that fit in it too. float64
    throughout, because at small t the exponents are differences of large numbers. Comparing all places with all takes
    S n (H W)^2 side^2 C multiplications per query and size: a GPU for more than a few thousand small images.
    Differs from released code: whole patches only, instead of padded images with a marked border; several sizes and steps
    averaged, instead of one each or of a downscaled second size; all places of an image count, not its best 100.

    Args:
        name: in recipes and on the screen.
        draws: the noisy versions x_t of the query, whose noise is keyed by its content.
        patches: sides of the square patches, as parts of the shorter side of the image (7/32 and 14/32 are 7 and 14 pixels
            of a CIFAR image).
        anywhere: patches of training images at all places, as in the paper; False compares p' = p only, which costs next
            to nothing.
    """

    name: str = "nda"
    draws: Draws = Draws(Steps((100, 300, 500)))
    patches: tuple[float, ...] = (7 / 32, 14 / 32)
    anywhere: bool = True

    def __post_init__(self) -> None:
        if not self.patches or not all(0 < part <= 1 for part in self.patches):
            raise WhenceError(f"patches {self.patches}", accepted="parts of the image's side, above 0 and at most 1")

    def __call__(self, task: Task) -> Scores:
        check_scored(self.name, self, task)
        signal = _signal(task.forward)
        if signal is None:
            raise WhenceError(f"{self.name} needs a noise schedule (alphas_cumprod); this model has none")
        shape = _pictures(task.queries.batch([0]).x0).shape[1:]
        sides = sorted({max(1, round(part * min(shape[1:]))) for part in self.patches})
        budget, pieces = task.engine.budget // 8, []
        for side in sides:
            count = (shape[1] - side + 1) * (shape[2] - side + 1)
            few = max(1, min(count, budget // (4 * count))) if self.anywhere else count
            pieces += [Piece(side, count, slice(s, min(s + few, count))) for s in range(0, count, few)]
        largest = max((p.places.stop - p.places.start) * (p.count if self.anywhere else 1) for p in pieces)
        block = max(1, budget // (4 * largest + 4 * shape.numel()))
        together = max(
            1, budget // (self.draws.count * (sum(p.places.stop - p.places.start for p in pieces) + shape.numel()))
        )
        groups = [range(s, min(s + together, len(task.queries))) for s in range(0, len(task.queries), together)]
        values = [
            self._scores(task, signal, group, pieces, block) for group in progress(groups, f"{self.name}: queries")
        ]
        return unmeasured(recorded(self, task, torch.cat(values)), self, task)

    def stated(self, task: Task) -> Stated:
        return Stated(because="each of its steps is drawn once, and no half of them stands for the others")

    def _scores(self, task: Task, signal: Tensor, group: range, pieces: list[Piece], block: int) -> Tensor:
        """Scores of some queries: [len(group), n]. First the normalisers, then the weights."""
        batch = task.queries.batch(list(group))
        draw = self.draws(batch.keys, batch.x0.shape[1:], len(signal), torch.float64)
        alpha = signal.double().cpu()[draw.t]  # [m, S]
        a, s = (v.reshape(*v.shape, *[1] * (batch.x0.ndim - 1)) for v in (alpha.sqrt(), (1 - alpha).sqrt()))
        x_t = a * batch.x0.double()[:, None] + s * draw.noise
        noisy = [_pictures(one).to(task.engine.device) for one in x_t]  # of each query [S, C, H, W]
        cases = [(q, r, piece) for q in range(len(group)) for r in range(self.draws.count) for piece in pieces]
        total: dict[tuple[int, int, Piece], Tensor] = {}
        for _, images in _blocks(task.train, block, task.engine.device):
            for q, r, piece in cases:
                new = _exponents(noisy[q][r], images, float(alpha[q, r]), piece, self.anywhere).logsumexp((0, 2))
                old = total.get((q, r, piece))
                total[q, r, piece] = new if old is None else torch.logaddexp(old, new)
        values = torch.zeros(len(group), len(task.train), dtype=torch.float64)
        sizes = len({piece.side for piece in pieces})
        for rows, images in _blocks(task.train, block, task.engine.device):
            for q, r, piece in cases:
                exponents = _exponents(noisy[q][r], images, float(alpha[q, r]), piece, self.anywhere)
                weights = (exponents - total[q, r, piece][:, None]).exp().sum((1, 2))
                values[q, rows] += weights.cpu() / (piece.count * self.draws.count * sizes)
        return values


@method("arXiv 2510.14269", 2025, PATCHES, classifier=None)
def nda(
    draws: Draws = Draws(Steps((100, 300, 500))),
    patches: tuple[float, ...] = (7 / 32, 14 / 32),
    anywhere: bool = True,
) -> PatchKernel:
    """Weight of each training image in the optimal patch denoiser of the training set, at the noised query; see
    `PatchKernel`.

    Args:
        draws: the noisy versions of the query.
        patches: sides of the square patches, as parts of the shorter side of the image.
        anywhere: patches of training images at all places, as in the paper; False compares the same place only, which
            costs next to nothing.
    """
    return PatchKernel(draws=draws, patches=patches, anywhere=anywhere)


def _signal(forward: Forward) -> Tensor | None:
    """abar [T]; for flow matching (1 - sigma)^2 / ((1 - sigma)^2 + sigma^2), that of x_t scaled to a^2 + s^2 = 1, which
    leaves the weights as they are."""
    if not isinstance(forward, FlowMatching):
        return forward.alphas_cumprod
    clean, noise = (1 - forward.sigmas).square(), forward.sigmas.square()
    return clean / (clean + noise)


def _pictures(x0: Tensor) -> Tensor:
    """[b, C, H, W]; what is no picture is one place with many channels."""
    return x0 if x0.ndim == 4 else x0.flatten(1)[:, :, None, None]


def _blocks(images: Images, size: int, device: str) -> Iterator[tuple[slice, Tensor]]:
    for start in range(0, len(images), size):
        rows = range(start, min(start + size, len(images)))
        yield slice(rows.start, rows.stop), _pictures(images.batch(list(rows)).x0.double()).to(device)


def _exponents(x_t: Tensor, images: Tensor, alpha: float, piece: Piece, anywhere: bool) -> Tensor:
    """-||x_t[p] - a x_i[p']||^2 / (2 s^2): [b, places p of the query, places p' of the image], or [b, p, 1] for p' = p."""
    scaled, side = alpha**0.5 * images, piece.side
    if not anywhere:
        square = _sums((x_t - scaled).square(), side).flatten(1)[:, piece.places, None]
    else:
        kernels = F.unfold(x_t[None], side)[0].T[piece.places].unflatten(1, (-1, side, side))  # [p, C, side, side]
        cross = F.conv2d(scaled, kernels).flatten(2)
        own, theirs = kernels.square().sum((1, 2, 3))[:, None], _sums(scaled.square(), side).flatten(2)
        square = own + theirs - 2 * cross
    return -square / (2 * (1 - alpha))


def _sums(values: Tensor, side: int) -> Tensor:
    """Sums over channels and patches: [b, 1, places]."""
    return F.avg_pool2d(values.sum(1, keepdim=True), side, stride=1) * side**2
