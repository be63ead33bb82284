"""The small model that stands behind a method's scores, from which images can be taken one after the other.

A method with a Gram matrix scores as ridge regression on its features does, to first order in the images that are removed:

    beta = A^-1 Phi^T y,   A = Phi^T Phi + lambda I,   r = y - Phi beta        score[q, i] = psi_q^T A^-1 phi_i r_i
    fall of psi_q^T beta without S = psi_q^T A^-1 Phi_S^T (I - H_SS)^-1 r_S = psi_q^T (A - Phi_S^T Phi_S)^-1 Phi_S^T r_S

It is taken at its word: the residuals r are the method's weights (1 where it has none), and what follows from taking images
away is exact for this regression. How it stands to the network differs from method to method:

    influence, trak on a loss    phi_i = grad g_i, r_i = 1. A Newton step from the trained weights to the optimum without S,
                                 the curvature being the empirical Fisher matrix of the images that are left. At weights
                                 moved by delta, image i has the loss (1 + phi_i^T delta)^2 / 2, whose gradient is phi_i
                                 times 1 + phi_i^T delta: this is what r_i becomes when others are taken away
    trak on margins              phi_i = grad of the margin, r_i = 1 - p_i. Least squares in the linearised margin; the
                                 curvature p_i (1 - p_i) of the loss is left out, as TRAK leaves it out
    d_trak, das                  the same formula on gradients that are not those of a loss, for das with its residual as
                                 r_i: it continues their scores, which have no model of the training behind them either
    last_layer_ridge             no surrogate: what the method itself does, the last layer fitted again to the targets of
                                 all outputs and positions, now without S

An ensemble is a regression for each of its models, whose predictions are averaged. How the features themselves would change
without the images is left out in all of them.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from whence.curvature.gram import Dual, Gram, Primal
from whence.curvature.solve import Damped, Problem
from whence.features.halves import halves_of
from whence.features.parts import Part
from whence.features.rows import absent, rows
from whence.methods import normalize
from whence.methods.columns import fitted
from whence.methods.inner_product import FeatureMethod, InnerProduct
from whence.methods.last_layer import LastLayerRidge, LayerWithout
from whence.methods.needs import check_scored
from whence.methods.sets import Influential, Kernel, Together, adaptive, check_count, greedy
from whence.storage.tables import Array
from whence.types import Images, Method, Task, WhenceError, check_signed

HOWS = ("greedy", "leverage", "adaptive")
WITH_FEATURES = "influence, trak, d_trak and das as they come, last_layer_ridge for adaptive; or --how greedy"

Surrogate = Kernel | Together | LayerWithout


def known(name: str, method: Method, how: str) -> InnerProduct | LastLayerRidge:
    """The method, if the model behind its scores is known; else it is refused.

    Args:
        name: of the method.
        method: it itself.
        how: "leverage" or "adaptive".
    """
    if isinstance(method, LastLayerRidge):
        if how == "leverage":
            exact = f"the scores of {name} are exact removals already, with no leverage left to correct for"
            raise WhenceError(exact, f"--how {how}", "--how greedy or --how adaptive")
        return method
    if not isinstance(method, InnerProduct) or not isinstance(method.precondition, Gram):
        raise WhenceError(f"{name} has no features with a Gram matrix", f"--how {how}", WITH_FEATURES)
    if method.normalize not in (normalize.none, normalize.leverage) or method.square:
        scaled = f"{name} scales or squares its scores, so that they are no longer those of a regression"
        raise WhenceError(scaled, f"--how {how}", WITH_FEATURES)
    return method


def surrogates(method: InnerProduct | LastLayerRidge, task: Task) -> Sequence[Surrogate]:
    """The model behind the scores of each query, with all images in it.

    Args:
        method: as `known` lets it pass.
        task: the question; features that are not stored are computed.
    """
    check_scored(method.name, method, task)
    method = fitted(method, task)
    method.check((method.damping,))
    return _layers(method, task) if isinstance(method, LastLayerRidge) else _kernels(method, task)


def _layers(method: LastLayerRidge, task: Task) -> list[LayerWithout]:
    (checkpoint, _), (part, _) = method.checkpoints(task)[0], method.sides()
    train, query = method.read(task, checkpoint, method.name)
    return method.removable(Problem(task, checkpoint, part), train, query)


def _kernels(method: InnerProduct, task: Task) -> list[Kernel | Together]:
    """A kernel per checkpoint and query: c = eta sign psi^T A^-1 Phi^T, r = the mean weight of the checkpoints."""
    part, _ = method.sides()
    chosen, name = method.checkpoints(task), method.name
    found: list[list[Kernel]] = []
    residual = np.zeros(len(task.train))
    for checkpoint, eta in chosen:
        train, query = method.read(task, checkpoint, name)
        (system,) = method.precondition.solve(Problem(task, checkpoint, part), train, query, [method.damping])
        assert isinstance(system, Damped | Primal | Dual)
        if method.weight is not None:
            weight = rows(method.weight, task, checkpoint, task.train, f"{name}: weights").all().double()[:, 0]
            residual += weight.numpy() / len(chosen)
        found.append(_of_queries(system, eta * method.sign()))
    if method.weight is None:
        residual[:] = 1.0
    every = [tuple(replace(one, residual=residual) for one in models) for models in zip(*found, strict=True)]
    return [models[0] if len(models) == 1 else Together(models) for models in every]


def _of_queries(system: Damped | Primal | Dual, factor: float) -> list[Kernel]:
    """The kernels of one checkpoint, their residuals still 1: all queries share the columns of H."""
    leverage = system.train_self().numpy()

    @functools.cache
    def column(image: int) -> Array:
        found: Array = system.column(image).numpy()
        return found

    scores = (factor * system.kernel()).numpy()
    return [Kernel(row, leverage, np.ones(len(row)), column) for row in scores]


def own_scores(method: InnerProduct | LastLayerRidge, model: Surrogate) -> Array:
    """The scores of the method, as the model behind them has them: [n].

    Args:
        method: it itself.
        model: the one of a query.
    """
    if isinstance(model, LayerWithout):
        return model.rises()
    exact = isinstance(method, InnerProduct) and method.normalize is normalize.leverage
    return model.rises() if exact else model.first_order()


def missing(method: InnerProduct | LastLayerRidge, task: Task) -> list[str]:
    """What is not stored of the features of a method, in words."""
    train, query = fitted(method, task).sides()
    sides: list[tuple[Part, Images, str]] = [
        (train, task.train, "training images"),
        (query, task.queries, "pictures"),
    ]
    if method.weight is not None:
        sides.append((method.weight, task.train, "weights of the training images"))
    counts: dict[str, int] = {}
    for side, images, what in sides:
        for part in halves_of(side) if method.halved(task) and side is not method.weight else (side,):
            gone = sum(absent(part, task, checkpoint, images) for checkpoint, _ in method.checkpoints(task))
            counts[what] = max(gone, counts.get(what, 0))
    return [f"{count:,} {what}" for what, count in counts.items() if count]


def chosen_set(model: Surrogate, k: int, how: str) -> Influential:
    """The most influential set of one query.

    Args:
        model: behind its scores.
        k: images at most.
        how: "leverage" or "adaptive".
    """
    return adaptive(model, k) if how == "adaptive" else greedy(model.rises(), k)


def most_influential(method: Method, task: Task, k: int, how: str = "adaptive") -> list[Influential]:
    """The training images that, taken away together, raise the loss of a query most, one set per query; see `sets`.

    Args:
        method: with a sign; for anything but greedy one whose model is known (see `known`).
        task: the question.
        k: images at most.
        how: "greedy", "leverage" or "adaptive".
    """
    if how not in HOWS:
        raise WhenceError(f"there is no {how!r}", "how", ", ".join(HOWS))
    check_count(k, len(task.train))
    if how == "greedy":
        scores = method(task)
        check_signed("greedy", scores)
        return [greedy(row, k) for row in scores.values]
    regression = known(method.name if isinstance(method, FeatureMethod) else type(method).__name__, method, how)
    return [chosen_set(model, k, how) for model in surrogates(regression, task)]
