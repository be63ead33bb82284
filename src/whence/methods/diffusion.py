"""Methods made for diffusion models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from whence import aggregate, normalize
from whence.data import subset
from whence.draws import Draws, Fixed, Linspace, Repeated, uniform
from whence.features import Gradient, Pullbacks, Value, rows, unit_average
from whence.inner_product import InnerProduct, recorded, with_damping
from whence.methods.gradient import part
from whence.outputs import Output, loss, mean, rmse, squared_norm
from whence.precondition.gram import Gram
from whence.precondition.solve import Plain, Preconditioner, Site, Solution, check_damping
from whence.projections import Projection
from whence.training import Replayed, Seen, Training, density_of, epoch_before
from whence.types import Checkpoint, Scores, Task, WhenceError


def d_trak(
    output: Output = squared_norm,
    draws: Draws = uniform(10),
    dim: int | None = 4096,
    damping: float = 0.1,
    parameters: str = "all",
    ensemble: bool = False,
) -> InnerProduct:
    """TRAK's kernel with an output that is not the loss, the squared norm of the prediction, on both sides (Zheng et al.
    2024). Published: 10 or 100 steps, dim 32768.

    Differs from released code: noise is keyed by image, not by batch position; the system is solved in float64, which
    keeps small dampings usable; an unknown output is an error instead of the loss.
    """
    return InnerProduct(
        "d_trak",
        part(output, draws, dim, parameters),
        precondition=Gram(damping),
        aggregate=aggregate.mean if ensemble else aggregate.last,
    )


def das(
    output: Output = mean,
    draws: Draws = uniform(10),
    dim: int | None = 4096,
    damping: float = 0.1,
    parameters: str = "all",
    unit: bool = True,
    residual: int = 100,
    leverage: bool = False,
    square: bool = False,
) -> InnerProduct:
    """psi_q^T (Phi^T Phi + lambda I)^-1 phi_i r_i [/ (1 - h_i)] [squared], the scalar form of the Diffusion Attribution
    Score (Lin et al. 2025). Published: dim 32768, residual 1000.

        phi_i = P mean_t u_t / ||u_t||, u_t = grad of the mean of the prediction        unit=False: without the norms
        r_i = mean_t e_it / ||e_i||,    e_it = sqrt((1/D) ||prediction - target||^2)    on a grid of `residual` steps
        h_i = phi_i^T (Phi^T Phi + lambda I)^-1 phi_i                                   leverage=True

    residual=0: r_i = 1. square: how much an image matters, without its sign. Differs from released code, which cannot run:
    the residual scales training images, h is the leverage of training images, noise is keyed by image, the system is solved
    in float64.
    """
    if residual < 0:
        raise WhenceError(f"das: residual is {residual} steps; accepted: 1 and more, or 0 for no residual weight")
    return InnerProduct(
        "das",
        part(output, replace(draws, unit=unit), dim, parameters),
        precondition=Gram(damping),
        normalize=normalize.leverage if leverage else normalize.none,
        weight=Value(rmse, uniform(residual, draws.seed), unit_average) if residual else None,
        square=square,
    )


@dataclass(frozen=True)
class DasFunction:
    """tau[q, i] = mean_{s, v} (u_qsv^T H^-1 g_i / (1 - h_i))^2,  u_qsv = J_qs^T v / sqrt(D): by how much, in the mean square
    over draws and pixels, removing image i changes the prediction at query q. train: loss gradients g_i; query: `Pullbacks`.

    Removing image i moves the parameters by -H^-1 A_i^T (I - K_i)^-1 rho_i, with rho_i its residuals over all draws and
    pixels, A_i their Jacobian, K_i = A_i H^-1 A_i^T and g_i = A_i^T rho_i (exact where the model is linear). The leverage
    block K_i is stood for by one number, the least-squares fit of K_i rho_i by h_i rho_i:

        h_i = rho_i^T K_i rho_i / rho_i^T rho_i = g_i^T H^-1 g_i / (2 loss_i)           H a Gauss-Newton matrix
        h_i = g_i^T H^-1 g_i                                                            H the Gram matrix of the g_i

    Exact where rho_i is an eigenvector of K_i: one draw and one output, or one draw and a last layer of the same curvature
    in all outputs (then h_i = tr K_i / D too). In between, tr K_i / D would need probes of every training image.
    """

    name: str
    train: Gradient
    query: Pullbacks
    precondition: Preconditioner
    leverage: bool = True

    @property
    def damping(self) -> float | None:
        return self.precondition.damping

    def __call__(self, task: Task) -> Scores:
        return self.grid(task, (self.damping,))[0]

    def grid(self, task: Task, dampings: Sequence[float | None]) -> list[Scores]:
        """Scores for each damping, from one set of features."""
        for damping in dampings:
            check_damping(float("nan") if damping is None else damping)
        chosen = aggregate.last(task)
        checkpoint, m = chosen[0][0], len(task.queries)
        train = rows(self.train, task, checkpoint, task.train, f"{self.name}: training images")
        probes = rows(self.query, task, checkpoint, task.queries, f"{self.name}: queries").all().double()
        losses = self._losses(task)
        every = []
        site = Site(task, checkpoint, self.train)
        systems = self.precondition.solve(site, train, probes.reshape(-1, train.width), dampings)
        for damping, system in zip(dampings, systems, strict=True):
            values = system.kernel().reshape(m, -1, len(train)).square().mean(1)
            if self.leverage:
                values /= (1 - self._leverage(system, losses)).square()
            every.append(recorded(with_damping(self, damping), task, values, signed=False, chosen=chosen))
        return every

    def _losses(self, task: Task) -> Tensor | None:
        """loss_i [n], where H is a Gauss-Newton matrix."""
        if not self.leverage or isinstance(self.precondition, Gram):
            return None
        value = Value(self.train.outputs[0], self.train.draws)
        return rows(value, task, task.checkpoints[-1], task.train, f"{self.name}: losses").all().double()[:, 0]

    def _leverage(self, system: Solution, losses: Tensor | None) -> Tensor:
        h = system.train_self()
        if losses is not None:
            h = torch.where(losses > 0, h / (2 * losses), 0.0)
        return normalize.below_one(h)


def das_function(
    draws: Draws = uniform(10),
    dim: int | None = 4096,
    damping: float = 0.1,
    parameters: str = "all",
    count: int = 1,
    leverage: bool = True,
) -> DasFunction:
    """The change of the prediction at a query without a training image, in the mean square: DAS in the space of functions
    (Lin et al. 2025, eq. 16); see `DasFunction`. count: probes per draw of a query. Says how much, not which way.

    H is the Gram matrix of projected loss gradients, as in TRAK; for sum_i J_i^T J_i itself, on small networks:
    `replace(das_function(dim=None), precondition=GaussNewton(damping))`. Differs from released code: there is none.
    """
    features = part(loss, draws, dim, parameters)
    return DasFunction(
        "das_function", features, Pullbacks(count, draws, features.projection, parameters), Gram(damping), leverage
    )


@dataclass(frozen=True)
class JourneyTrak:
    """(1/J) sum_t psi_q(t)^T H^-1 phi_i over the J timesteps t of the sampler, H the Gram system of the phi_i.

    psi_q(t): gradient of the loss at the clean image that the network saw in q at t, noised again to t, over `noises`
    noises; phi_i as in TRAK. step: one timestep of the sampler instead of the mean over all. ensemble: the mean over all
    checkpoints of the task.
    """

    name: str
    train: Gradient
    noises: int
    step: int | None
    precondition: Gram
    ensemble: bool

    @property
    def damping(self) -> float:
        return self.precondition.damping

    def __call__(self, task: Task) -> Scores:
        return self.grid(task, (self.damping,))[0]

    def grid(self, task: Task, dampings: Sequence[float | None]) -> list[Scores]:
        """Scores for each damping, from one set of features and one eigendecomposition per checkpoint."""
        for damping in dampings:
            check_damping(self.damping if damping is None else damping)
        chosen = (aggregate.mean if self.ensemble else aggregate.last)(task)
        total = torch.zeros(len(dampings), len(task.queries), len(task.train), dtype=torch.float64)
        for checkpoint, eta in chosen:
            train = rows(self.train, task, checkpoint, task.train, f"{self.name}: training images")
            query = self._queries(task, checkpoint)  # first the mean, then one system: the score is linear in psi
            systems = self.precondition.solve(Site(task, checkpoint, self.train), train, query, dampings)
            for at, system in enumerate(systems):
                total[at] += eta * system.kernel()
        every = []
        for values, damping in zip(total, dampings, strict=True):
            every.append(recorded(with_damping(self, damping), task, values, chosen=chosen))
        return every

    def _queries(self, task: Task, checkpoint: Checkpoint) -> Tensor:
        """mean over t of psi_q(t): [m, k]."""
        steps = self._timesteps(task)
        total = torch.zeros(())
        for number, t in enumerate(steps, 1):
            assert task.journey is not None
            there = task.journey.predicted(t)
            place = {name: row for row, name in enumerate(there.ids)}
            missing = [name for name in task.queries.ids if name not in place]
            if missing:
                raise WhenceError(
                    f"{self.name}: the journey says nothing of query {missing[0]!r}; give that of all queries"
                )
            images = subset(there, [place[name] for name in task.queries.ids])
            assert isinstance(self.train.draws, Draws)
            part = replace(self.train, draws=replace(self.train.draws, timesteps=Fixed(t, self.noises)))
            what = f"{self.name}: queries at step {number} of {len(steps)}"
            total = total + rows(part, task, checkpoint, images, what).all().double() / len(steps)
        return total

    def _timesteps(self, task: Task) -> Sequence[int]:
        if task.journey is None:
            raise WhenceError(
                f"{self.name} needs to know how the queries were sampled; accepted: `whence attribute --generate N`, the "
                "generated/ folder of a run as queries, or a Task with a journey"
            )
        steps = task.journey.timesteps
        if self.step is None:
            return steps
        if self.step not in steps:
            raise WhenceError(
                f"{self.name}: step {self.step} is none of the sampler's; accepted: {', '.join(map(str, steps))}"
            )
        return [self.step]


def journey_trak(
    output: Output = loss,
    draws: Draws = uniform(10),
    dim: int | None = 4096,
    damping: float = 0.1,
    parameters: str = "all",
    noises: int = 1,
    step: int | None = None,
    ensemble: bool = False,
) -> JourneyTrak:
    """TRAK of the images on the way to a sampled picture (Georgiev et al. 2023), averaged over sampling steps as in Zheng et
    al. 2024 (one noise per step), or at one of them (published: 20 noises, one score per step); see `JourneyTrak`.

    Differs from released code: noise is keyed by image, not unseeded; means instead of sums over draws; no random flips.
    """
    features = part(output, draws, dim, parameters)
    return JourneyTrak("journey_trak", features, noises, step, Gram(damping), ensemble)


@dataclass(frozen=True)
class Replay:
    """sum_c rate_c B (step_c - step_c-1) / n <psi_q, phi_i> over training checkpoints, B images per step: TracIn whose
    training images are seen as training saw them.

        phi_i = P grad loss(i; t_i, eps_i)  [unit]                      the event of image i in the last whole epoch before c
        psi_q = P mean_t [unit of] mean over noises of grad loss(q)     over the timesteps and noises of `query`

    unit: both divided by their norms before projection, so that no image stands out for the timestep it happened to get.
    """

    name: str
    output: Output
    query: Draws
    unit: bool
    projection: Projection
    parameters: str

    damping = None

    def __call__(self, task: Task) -> Scores:
        training = self._training(task)
        total = torch.zeros(len(task.queries), len(task.train), dtype=torch.float64)
        chosen = self._checkpoints(task, training)
        for number, (checkpoint, eta) in enumerate(chosen, 1):
            where = f"{self.name} {number}/{len(chosen)}"
            epoch = epoch_before(training, len(task.train), checkpoint.step or 0)
            seen = Seen(task.train, training, epoch)
            shown = Replayed(training, epoch, self.unit, density_of(task.forward))
            train = rows(self._part(shown), task, checkpoint, seen, f"{where}: training images")
            query = rows(self._part(self.query), task, checkpoint, task.queries, f"{where}: queries").all().double()
            total += eta * Plain(train, query).kernel()
        return recorded(self, task, total, chosen=chosen)

    def _part(self, draws: Draws | Replayed) -> Gradient:
        return Gradient(self.output, draws, self.projection, self.parameters)

    def _training(self, task: Task) -> Training:
        if task.study is None:
            raise WhenceError(
                f"{self.name} replays training and finds no log of it; accepted: a model made by `whence train`, with the "
                "images it was trained on, or a Task with a study"
            )
        return task.study.training

    def _checkpoints(self, task: Task, training: Training) -> list[tuple[Checkpoint, float]]:
        """eta_c = rate_c B (step_c - step_c-1) / n: the steps taken on image i in the interval, on average."""
        found, before = [], 0
        for checkpoint, rate in sorted(aggregate.rate_weighted(task), key=lambda pair: pair[0].step or 0):
            step = checkpoint.step or 0
            found.append((checkpoint, rate * training.batch_size * (step - before) / len(task.train)))
            before = step
        return found


def _replay(
    name: str, output: Output, draws: Draws, noises: int, unit: bool, dim: int | None, parameters: str
) -> Replay:
    query = replace(draws, timesteps=Repeated(draws.timesteps, noises), unit=unit, group=noises)
    return Replay(name, output, query, unit, part(output, draws, dim, parameters).projection, parameters)


def diffusion_tracin(
    output: Output = loss,
    draws: Draws = Draws(Linspace(10)),
    dim: int | None = 4096,
    parameters: str = "all",
    noises: int = 4,
) -> Replay:
    """Diffusion-TracIn (Xie et al. 2024): TracIn with the timestep and noise that training itself drew; see `Replay`. An
    image that got a timestep of large gradients looks influential for every query: see `retrac`."""
    return _replay("diffusion_tracin", output, draws, noises, False, dim, parameters)


def retrac(
    output: Output = loss,
    draws: Draws = Draws(Linspace(10)),
    dim: int | None = 4096,
    parameters: str = "all",
    noises: int = 4,
) -> Replay:
    """Diffusion-ReTrac (Xie et al. 2024): `diffusion_tracin` with unit gradients; see `Replay`. Published: 100 timesteps
    from 1 to T-1, 16 noises at each, L1 loss, a checkpoint every 20 epochs.

    Differs from released code: the noise of training is replayed too, not only its timestep, and so are its flips; the
    loss is `output`; intervals between checkpoints may differ. One event per image and checkpoint is noisy: it takes many
    checkpoints.
    """
    return _replay("retrac", output, draws, noises, True, dim, parameters)
