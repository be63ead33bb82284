"""Standard errors of scores: how far a run that draws anew what was drawn by chance would be from this one.

Draws (timesteps and noise). A score is a function of two means over draws, psi of the query and Phi of the training images.
Each is moved by a part c of Delta, the difference of its two halves that has the variance of the mean (`diffusion.halves`):

    s_ab = s(psi + a c Delta_psi, Phi + b c Delta_Phi)          a, b = +-
    R = (s_++ + s_+- - s_-+ - s_--) / 4c        C = (s_++ + s_-+ - s_+- - s_--) / 4c
    I = (s_++ - s_+- - s_-+ + s_--) / 4c^2      Var s  ~  R^2 + C^2 - I^2

Without bias where s is linear in each side: R^2 and C^2 are those of one side beside the noisy mean of the other, so that
both hold the error of the product, I^2, which counts once. (The scores of the two halves themselves, ((s_A - s_B) / 2)^2,
would hold it twice; and with few draws, where most of a row is error, the rows of a half are so much longer that what is
divided by their norms, or by a curvature made of them, is something else.) c is small, so that norms and curvature stay as
they are.

Draws that all images share move both sides at once, and much of it moves all scores of a query alike, which changes no order
among them. What is stated is the error of a score beside the mean of its query's:

    J = (s_++ - s_--) / 2c        Var (s - mean s)  ~  (J - mean J)^2

With few draws that is too much (benchmarks/errors.py): it holds the error of the product twice, which no pair of halves can
tell from what shared draws add on average; and the halves of a grid of timesteps differ by their timesteps, which another
seed does not change.

Projection. A score is a function of k columns that are alike: with each of them weighted w_j = 1 + x_j it moves by
sum_j x_j ds/dw_j, and with random signs x_j the square of that is, on average, the infinitesimal jackknife's variance
sum_j (ds/dw_j)^2 of another projection (two halves of the columns, of which one counts a little more). Where the columns are
hardly more than what they tell apart, a column that is another one is not one that counts a little less, and

    Var s  ~  (J^2 - J_R^2 - J_C^2 + J_I^2) / (1 - h),   J = sum_j x_j ds/dw_j,   h = tr(Phi H^-1 Phi^T) / k

h, the share of a column that the others foresee, enters as leverages do in MacKinnon & White's HC2, and holds up to 1/2;
beyond, no error of a projection is stated. J_R, J_C and J_I are R, C and I of J in place of s: what noise of the draws does
to J is in the errors of the draws already, which were measured with one projection. Where draws are shared, the square of
the J of J stands for J_R^2 + J_C^2 - J_I^2.

Masks and seeds: s_e^2 / G of G groups of trainings, with G - 1 degrees of freedom. Each group measures its queries at draws
of its own, so that what the draws move is between the groups, too.

Each of these squares has one degree of freedom, or few: they are pooled over the images of a query, see `pooled`. No query
looks at another one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from whence.curvature.blocks import BlockGram
from whence.curvature.datainf import DataInf
from whence.curvature.exact import GaussNewton, Hessian
from whence.curvature.gram import Gram
from whence.curvature.kfac import EKFAC
from whence.curvature.lissa import LiSSA
from whence.curvature.pcg import ConjugateGradients
from whence.curvature.solve import NoPreconditioner
from whence.diffusion.halves import can_be_halved
from whence.features.activations import Layers
from whence.features.parts import Averaged, Encoded, Gradient, Part
from whence.features.projections import SJLT, Gaussian, Grouped, Identity, Layerwise, Rademacher
from whence.types import Forward, Images, Scores, Task

STEP = 0.2
"""c: with 1, errors of cosines and of TRAK's scores came out at 0.6 of what they are, on digits with 10 draws; with 0.2 they
are within some percent (benchmarks/errors.py)."""
WEIGHED = 0.01
"""x of the columns of a projection: small, so that what is measured is a derivative."""
FORESEEN = 0.5
"""The largest h at which the error of a projection is stated (benchmarks/errors.py)."""
FEWEST = 30
"""Images from which on the error of a query's scores may grow with the score."""
FLOOR = 0.25
"""The smallest variance of a score as a share of the mean of its query's."""

NOTHING = "nothing: no part of it is drawn by chance"
DRAWS = "draws"
PROJECTION = "the random projection"
PROJECTED = "draws and the random projection"
FEW_COLUMNS = "its random projection has too few columns to say what another one would change"
NARROW = f"draws; {FEW_COLUMNS}"
SHARED = "draws that all images share"
SHARED_PROJECTED = f"{SHARED}, and the random projection"
SHARED_NARROW = f"{SHARED}; {FEW_COLUMNS}"
OF_HALVES = (DRAWS, PROJECTED, SHARED, SHARED_PROJECTED)
"""What halves of the draws measure."""
MEASURED = (*OF_HALVES, PROJECTION)
"""What `FeatureMethod` measures."""
OF_QUERIES = "draws of the queries"
MASKS = "masks and seeds"
REDRAWN = "masks, seeds and draws"


@dataclass(frozen=True)
class Stated:
    """What a method says of the errors of its scores.

    Args:
        of: what would be drawn anew in a run that differs by as much, such as `DRAWS`; "" where it states none.
        because: why it states none.
    """

    of: str = ""
    because: str = ""


@runtime_checkable
class States(Protocol):
    """A method that says whether it states standard errors. One that does not say so is taken to state none."""

    def stated(self, task: Task) -> Stated: ...


def unmeasured(scores: Scores, method: States, task: Task) -> Scores:
    """Scores without measured errors: where some are asked for, 0 if nothing is drawn, and else why there are none.

    Args:
        scores: of the method.
        method: what computed them.
        task: the question.
    """
    if not task.errors:
        return scores
    stated = method.stated(task)
    exact = torch.zeros_like(scores.values) if stated.of == NOTHING else None
    return replace(scores, stderr=exact, stderr_of=stated.of or f"not measured: {stated.because}")


# ------------------------------------------------------------------------------------------------------------- by draws


def same(queries: Images, images: Images) -> Tensor:
    """1 where a query is the training image, which then sees the same noise: their errors are one. Else 0: [m, n]."""
    place = {digest: number for number, digest in enumerate(dict.fromkeys([*queries.digests, *images.digests]))}
    q, i = (torch.tensor([place[digest] for digest in some.digests]) for some in (queries, images))
    return (q[:, None] == i).double()


def crossed(values: Tensor, step: float = STEP) -> Tensor:
    """R^2, C^2 and I^2 of scores s_++, s_-+, s_+-, s_-- (first the sign of the query): [4, m, n] -> [3, m, n]."""
    pp, mp, pm, mm = values
    queries, images, both = pp + pm - mp - mm, pp + mp - pm - mm, pp - pm - mp + mm
    return torch.stack([queries / (4 * step), images / (4 * step), both / (4 * step**2)]).square()


def moved_at_once(values: Tensor, step: float = STEP) -> Tensor:
    """J of scores s_++, s_-+, s_+-, s_-- of sides that share their draws: [4, m, n] -> [m, n]."""
    return (values[0] - values[3]) / (2 * step)


def of_shared_draws(moved: Tensor, values: Tensor, signed: bool = True, at: Tensor | None = None) -> Tensor:
    """The variances, beside the mean of a query's, of scores [m, n] that draws which all images share move by J [m, n].

    Args:
        moved: J.
        values: the scores.
        signed: whether they stay as they are. Squares of them do not move alike where they do; those have their own errors.
        at: as of `pooled`.
    """
    if not signed or values.shape[1] == 1:
        return pooled(moved.square(), values, at=at)
    mean = values.mean(1, keepdim=True)
    beside = moved - moved.mean(1, keepdim=True)
    return pooled(beside.square(), values - mean, at=None if at is None else at - mean)


def of_draws(squares: Tensor, values: Tensor, at: Tensor | None = None) -> Tensor:
    """The variances of scores [m, n] from R^2, C^2, I^2 [3, m, n].

    The mean of a query's is not below those of R^2 and C^2, each of which is a part of it, both at once.

    Args:
        squares: as `crossed` gives them.
        values: the scores [m, n].
        at: as of `pooled`.
    """
    queries, images, both = squares
    return pooled(queries + images - both, values, torch.minimum(queries.mean(1), images.mean(1)), at)


def of_square(values: Tensor, variances: Tensor, at: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """The variances of squared scores: 4 beta^2 v + 2 v^2 for a score of mean beta and variance v.

    s^2 - v stands for beta^2, or 0 where that is below 0; then they are scaled so that the mean of a query is that of the
    4 (s^2 - v) v + 2 v^2, which are right on average.

    Args:
        values: the scores before they are squared [m, n].
        variances: theirs [m, n].
        at: scores [m, k] and their variances, if others are asked for than those that the scale is from.
    """

    def of(s: Tensor, v: Tensor, least: float = 0.0) -> Tensor:
        return 4 * (s.square() - v).clamp(min=least) * v + 2 * v.square()

    mean = of(values, variances).mean(1, keepdim=True)
    right = of(values, variances, -torch.inf).mean(1, keepdim=True)
    return of(*(at or (values, variances))) * torch.where(mean > 0, right / mean, 1.0).clamp(min=FLOOR)


# -------------------------------------------------------------------------------------------------------------- pooling


def pooled(squares: Tensor, values: Tensor, least: Tensor | None = None, at: Tensor | None = None) -> Tensor:
    """Variances of scores from squares that scatter around them with one degree of freedom or few: [m, n] or [m, k].

        v[q, i] = a_q + b_q s[q, i]^2,   a, b >= 0        fitted to the squares of query q over all of its images

    by least squares, in three rounds with weights 1/v^2 of the round before (quasi-likelihood: the spread of a square grows
    with its mean), then scaled so that its mean is that of the squares. Large scores have larger errors; images are alike
    otherwise. With fewer than `FEWEST` images v is the mean of the query's squares.

    Args:
        squares: [m, n]; some may be below 0, as differences of squares are.
        values: the scores s [m, n].
        least: the smallest mean of each query [m]; 0 where None.
        at: scores [m, k] whose variances are asked for in place of those of `values`, by the same a and b.
    """
    squares, x = squares.double(), values.double().square()
    asked = x if at is None else at.double().square()
    mean = squares.mean(1, keepdim=True).clamp(min=0)
    if least is not None:
        mean = torch.maximum(mean, least.double()[:, None])
    if x.shape[1] < FEWEST:
        return mean.expand_as(asked).clone()
    weight = torch.ones_like(x)
    for _ in range(3):
        a, b = _line(squares, x, weight)
        found = torch.maximum(a + b * x, FLOOR * mean)
        weight = torch.where(mean > 0, found, 1.0) ** -2
    # Weights trust small squares most; the mean over the images is that of all squares alike.
    scale = mean / found.mean(1, keepdim=True)
    return torch.where(mean > 0, torch.maximum(a + b * asked, FLOOR * mean) * scale, 0.0)


def _line(y: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """a and b of the line a + b x of each row, neither below 0, with the smallest sum of weighted squares from y."""
    share = weight / weight.sum(1, keepdim=True)
    mean_x, mean_y = (share * x).sum(1, keepdim=True), (share * y).sum(1, keepdim=True)
    spread = (share * (x - mean_x).square()).sum(1, keepdim=True)
    slope = (share * (x - mean_x) * (y - mean_y)).sum(1, keepdim=True)
    b = torch.where(spread > 0, slope / spread, 0.0).clamp(min=0)
    through_zero = (share * x * y).sum(1, keepdim=True) / (share * x.square()).sum(1, keepdim=True).clamp(min=1e-300)
    b = torch.where(mean_y - b * mean_x < 0, through_zero.clamp(min=0), b)
    return (mean_y - b * mean_x).clamp(min=0), b


# -------------------------------------------------------------------------------------- what inner products of rows state


EXACT = (NoPreconditioner, Gram, BlockGram, GaussNewton, Hessian, DataInf)  # in which nothing is drawn


def by_halves(train: Part, query: Part, precondition: object, forward: Forward) -> Stated:
    """What a method states that compares rows of two parts, by halves of their draws.

    Args:
        train: features of the training images.
        query: features of the queries.
        precondition: what stands between them.
        forward: how the network is measured; a classifier looks at no draw.
    """
    if isinstance(precondition, (LiSSA, ConjugateGradients)) or (
        isinstance(precondition, EKFAC) and precondition.refine
    ):
        return Stated(
            because="its systems are solved in steps, and each half of the draws would take a solve of its own"
        )
    drawn, projected = (
        [part for part in (train, query) if _draws(part, forward)],
        of_columns(train, query, precondition),
    )
    if not drawn:
        besides = "" if projected else _besides(train, precondition)
        if besides:
            return Stated(because=f"no draw enters it, and the error of {besides} is not measured")
        return Stated(PROJECTION if projected else NOTHING)
    for part in drawn:
        if isinstance(part, Encoded):
            return Stated(because="its draws stand side by side in a row, each with a timestep of its own")
        if not isinstance(part, Averaged):
            return Stated(because="its queries are squared draw by draw, and are no mean of two halves")
        if not part.averaged:
            return Stated(because="its rows are divided by the norms of layers, and are no mean of two halves")
        if not can_be_halved(part.draws):
            return Stated(because="it has one draw of each image: there are no two halves")
    if at_once(train, query, forward):
        return Stated(SHARED_PROJECTED if projected else SHARED)
    return Stated(PROJECTED if projected else DRAWS)


def at_once(train: Part, query: Part, forward: Forward) -> bool:
    """Whether what the draws do to the rows of both sides is one thing: all images share them.

    Args:
        train: features of the training images.
        query: features of the queries.
        forward: how the network is measured.
    """
    return all(
        _draws(part, forward) and getattr(getattr(part, "draws", None), "shared", False) for part in (train, query)
    )


def of_columns(train: Part, query: Part, precondition: object) -> bool:
    """Whether rows are random projections whose columns are alike, and are compared column by column or by their own Gram
    matrix, so that they say how far another projection would move a score."""
    parts = (train, query)
    return isinstance(precondition, (NoPreconditioner, Gram)) and all(
        isinstance(part, Gradient) and isinstance(part.projection, (SJLT, Rademacher, Gaussian)) for part in parts
    )


def column_factors(part: Part, width: int) -> Tensor:
    """sqrt(1 + x_j), x_j = +-WEIGHED in turn: [width]. The columns of several outputs stand side by side.

    Args:
        part: a random projection, see `of_columns`.
        width: of its rows.
    """
    assert isinstance(part, Gradient)
    x = 1.0 - 2.0 * (torch.arange(width // len(part.outputs), dtype=torch.float64) % 2)
    return (1 + WEIGHED * x).sqrt().repeat(len(part.outputs))


def of_projection(slopes: Tensor, values: Tensor, shared: bool = False, at: Tensor | None = None) -> Tensor:
    """The variances of scores [m, n] over projections, in which the noise of the draws does not count a second time.

    Args:
        slopes: J = sum_j x_j ds/dw_j of s, s_++, s_-+, s_+-, s_-- [5, m, n]; of s alone where nothing else is drawn.
        values: the scores [m, n].
        shared: whether both sides have the same draws.
        at: as of `pooled`.
    """
    queries, images, both = crossed(slopes[1:])
    noise = moved_at_once(slopes[1:]).square() if shared else queries + images - both
    return pooled(slopes[0].square() - noise, values, at=at)


@dataclass
class Moved:
    """Scores as they are and as they move with what is drawn by chance.

    Args:
        scores: [2, 5, m, n]: by columns as they are and as they are weighed, s, s_++, s_-+, s_+-, s_--.
        foreseen: h, the largest of the checkpoints.
    """

    scores: Tensor
    foreseen: float = 0.0

    @property
    def values(self) -> Tensor:
        return self.scores[0, 0]


def variances_of(
    found: Moved, stated: str, signed: bool, alike: Tensor, at: Tensor | None = None
) -> tuple[Tensor | None, str]:
    """The variances of scores, and what they are of; None where they are not known, and why.

    Args:
        found: how they move, or how the scores of some images do that stand for all.
        stated: of `MEASURED`.
        signed: whether they stay as they are; else they are squared after this.
        alike: of the images that are asked about, as `same` says [m, k].
        at: their scores [m, k]; None where they are those that were moved.
    """
    shared, projected = stated in (SHARED, SHARED_PROJECTED), stated not in (DRAWS, SHARED)
    narrow = projected and found.foreseen > FORESEEN
    if narrow and stated == PROJECTION:
        return None, f"not measured: {FEW_COLUMNS}"

    def of(at: Tensor | None, alike: Tensor | float) -> Tensor:
        variances = torch.zeros_like(found.values if at is None else at)
        moved = found.scores[0, 1:]
        if stated != PROJECTION and shared:
            variances = of_shared_draws(moved_at_once(moved), found.values, signed, at)
        elif stated != PROJECTION:
            variances = of_draws(crossed(moved), found.values, at) * (1 + alike)
        if projected and not narrow:
            slopes = (found.scores[1] - found.scores[0]) / WEIGHED
            variances = variances + of_projection(slopes, found.values, shared, at) / (1 - found.foreseen)
        return variances

    variances = of(at, alike)
    if not signed:
        own, asked = (variances, None) if at is None else (of(None, 0.0), (at, variances))
        variances = of_square(found.values, own, asked)
    if narrow:
        return variances, SHARED_NARROW if shared else NARROW
    return variances, stated


def _draws(part: Part, forward: Forward) -> bool:
    """Whether the rows of a part depend on draws."""
    if forward.models == "classifier":
        return False
    return not isinstance(part, Encoded) or isinstance(part.encoder, Layers)


def _random(projection: object) -> bool:
    """Whether any entry of it is drawn by chance."""
    if isinstance(projection, Layerwise):
        return _random(projection.inner)
    return not (isinstance(projection, Identity) or (isinstance(projection, Grouped) and projection.k is None))


def _besides(part: Part, precondition: object) -> str:
    """What is drawn besides timesteps and noise; "" for nothing."""
    if isinstance(part, Gradient) and _random(part.projection):
        return "its random projection"
    if isinstance(part, Gradient) and isinstance(part.output, tuple):
        return "its random probes"
    return "" if isinstance(precondition, EXACT) else "its curvature, which is sampled,"
