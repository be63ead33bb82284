"""The Diffusion Attribution Score, scalar and in the space of functions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from whence.curvature.gram import Gram
from whence.curvature.solve import Dampings, Preconditioner, Problem, Solution, check_damping
from whence.diffusion.draws import Draws, uniform
from whence.diffusion.outputs import Output, loss, mean, rmse
from whence.features.parts import Gradient, Pullbacks, Value, part, unit_average
from whence.features.rows import rows
from whence.methods import aggregate, normalize
from whence.methods.inner_product import FeatureMethod, InnerProduct
from whence.methods.registry import Trial, method
from whence.storage.arrays import Rows
from whence.types import Task, WhenceError, image_by_image


@method("Lin et al.", 2025, "a gradient and 10 predictions per image", classifier=None)
def das(
    output: Output = mean,
    draws: Draws = uniform(10),
    dim: int | None = 4096,
    damping: float = 0.1,
    parameters: str = "trained",
    unit: bool = True,
    residual: int = 10,
    leverage: bool = False,
    square: bool = False,
    ensemble: bool = False,
) -> InnerProduct:
    """psi_q^T (Phi^T Phi + lambda I)^-1 phi_i r_i [/ (1 - h_i)] [squared], the scalar form of the Diffusion Attribution
    Score (Lin et al. 2025). Published: dim 32768, residual 1000.

        phi_i = P mean_t u_t / ||u_t||, u_t = grad of the mean of the prediction
        r_i = mean_t e_it / ||e_i||,    e_it = sqrt((1/D) ||prediction - target||^2)    on a grid of `residual` steps
        h_i = phi_i^T (Phi^T Phi + lambda I)^-1 phi_i

    Differs from released code, which cannot run: the residual scales training images, h is the leverage of training images,
    noise is keyed by image, the system is solved in float64.

    Args:
        output: what is measured on each image and differentiated (`outputs`).
        draws: the (timestep, noise) pairs that gradients are averaged over.
        dim: columns of the random projection (`projections.SJLT`); exact gradients with None, or no more parameters.
        damping: lambda in units of the mean non-zero eigenvalue of Phi^T Phi.
        parameters: "trained" (those that ask for gradients), another group of `gradients.PARAMETERS`, or a regular
            expression.
        unit: divide each u_t by its norm; False takes them as they are.
        residual: steps that r_i is measured at; 0 for r_i = 1. On three banks 0 to 100 steps give the same LDS.
        leverage: divide by 1 - h_i.
        square: how much an image matters, without its sign.
        ensemble: mean over the models of `Task.ensemble` and the final one, instead of the final one alone.
    """
    if residual < 0:
        raise WhenceError(f"das: residual is {residual} steps; accepted: 1 and more, or 0 for no residual weight")
    return InnerProduct(
        part(output, replace(draws, unit=unit), dim, parameters),
        precondition=Gram(damping),
        normalize=normalize.leverage if leverage else normalize.none,
        weight=Value(rmse, uniform(residual, draws.seed, shared=draws.shared), unit_average) if residual else None,
        square=square,
        aggregate=aggregate.mean if ensemble else aggregate.last,
    )


@dataclass(frozen=True)
class DasFunction(FeatureMethod):
    """tau[q, i] = mean_{s, v} (u_qsv^T H^-1 g_i / (1 - h_i))^2,  u_qsv = J_qs^T v / sqrt(D): by how much, in the mean square
    over draws and pixels, removing image i changes the prediction at query q.

    Removing image i moves the parameters by -H^-1 A_i^T (I - K_i)^-1 rho_i, with rho_i its residuals over all draws and
    pixels, A_i their Jacobian, K_i = A_i H^-1 A_i^T and g_i = A_i^T rho_i (exact where the model is linear). The leverage
    block K_i is replaced by one number, the least-squares fit of K_i rho_i by h_i rho_i:

        h_i = rho_i^T K_i rho_i / rho_i^T rho_i = g_i^T H^-1 g_i / (2 loss_i)           H a Gauss-Newton matrix
        h_i = g_i^T H^-1 g_i                                                            H the Gram matrix of the g_i

    Exact where rho_i is an eigenvector of K_i: one draw and one output, or one draw and a last layer of the same curvature
    in all outputs (then h_i = tr K_i / D too). In between, tr K_i / D would need probes of every training image.

    Args:
        train: loss gradients g_i.
        query: the u_qsv.
        precondition: H.
        leverage: divide by 1 - h_i.
        name: in recipes and on the screen.
    """

    train: Gradient
    query: Pullbacks
    precondition: Preconditioner
    leverage: bool = True
    name: str = ""

    def sides(self) -> tuple[Gradient, Pullbacks]:
        return self.train, self.query

    def combine(self, problem: Problem, train: Rows, query: Tensor, dampings: Dampings) -> Iterator[Tensor]:
        losses = self._losses(problem.task)
        for system in self.precondition.solve(problem, train, query.reshape(-1, train.width), dampings):
            yield self._values(system, len(query), losses)

    def of_system(self, system: Solution, count: int) -> Tensor | None:
        # Where H is a Gauss-Newton matrix, leverages need the losses of the images besides.
        needs_losses = self.leverage and not isinstance(self.precondition, Gram)
        return None if needs_losses else self._values(system, count, None)

    def _values(self, system: Solution, count: int, losses: Tensor | None) -> Tensor:
        kernel = system.kernel()
        values = kernel.reshape(count, -1, kernel.shape[1]).square().mean(1)
        return values / (1 - self._leverage(system, losses)).square() if self.leverage else values

    def signed(self) -> bool:
        return False

    @property
    def image_by_image(self) -> bool:
        return image_by_image(self.precondition)

    def check(self, dampings: Dampings) -> None:
        for damping in dampings:
            check_damping(float("nan") if damping is None else damping)

    def _losses(self, task: Task) -> Tensor | None:
        """loss_i [n], where H is a Gauss-Newton matrix."""
        if not self.leverage or isinstance(self.precondition, Gram):
            return None
        value = Value(self.train.outputs[0], self.train.draws)
        return rows(value, task, task.trajectory[-1], task.to_score, f"{self.name}: losses").all().double()[:, 0]

    def _leverage(self, system: Solution, losses: Tensor | None) -> Tensor:
        h = system.train_self()
        if losses is not None:
            h = torch.where(losses > 0, h / (2 * losses), 0.0)
        return normalize.below_one(h)


@method(
    "Lin et al.", 2025, "a gradient per image, one per probe of a query", classifier=None, trial=Trial(own_draws=True)
)
def das_function(
    draws: Draws = uniform(10),
    dim: int | None = 4096,
    damping: float = 0.1,
    parameters: str = "trained",
    count: int = 1,
    leverage: bool = True,
) -> DasFunction:
    """The change of the prediction at a query without a training image, in the mean square: DAS in the space of functions
    (Lin et al. 2025, eq. 16); see `DasFunction`. Says how much, not which way.

    H is the Gram matrix of projected loss gradients, as in TRAK; for sum_i J_i^T J_i itself, on small networks:
    `replace(das_function(dim=None), precondition=GaussNewton(damping))`. Differs from released code: there is none.

    Args:
        draws: the (timestep, noise) pairs that gradients are averaged over.
        dim: columns of the random projection (`projections.SJLT`); exact gradients with None, or no more parameters.
        damping: lambda in units of the mean non-zero eigenvalue of Phi^T Phi.
        parameters: "trained" (those that ask for gradients), another group of `gradients.PARAMETERS`, or a regular
            expression.
        count: probes per draw of a query.
        leverage: divide by 1 - h_i.
    """
    features = part(loss, draws, dim, parameters)
    return DasFunction(features, Pullbacks(count, draws, features.projection, parameters), Gram(damping), leverage)
