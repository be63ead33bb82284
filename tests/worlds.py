"""Small worlds in which the truth is known: the linear denoiser, whose retraining is one small solve, and tiny nets."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from whence.draws import Draws, Grid, Repeated
from whence.forward import Denoiser
from whence.noise import key_of
from whence.types import Batch, Checkpoint, Draw, Engine, Task, digest


@dataclass(frozen=True)
class Tensors:
    """Images in memory for the tests of the lower rooms (the real thing is whence.data)."""

    x0: Tensor
    ids: tuple[str, ...]
    digests: tuple[str, ...]
    meta: dict
    cond: dict

    def __len__(self) -> int:
        return len(self.x0)

    def describe(self) -> dict:
        return {"is": "Tensors"}

    def batch(self, rows) -> Batch:

        keys = torch.tensor([key_of(self.digests[i]) for i in rows])
        return Batch(self.x0[rows], keys, {k: v[rows] for k, v in self.cond.items()})


def tensors(x0: Tensor, name: str, cond: dict | None = None) -> Tensors:
    ids = tuple(f"{name}-{i:04d}" for i in range(len(x0)))
    return Tensors(x0, ids, tuple(digest([row.tolist()], 64) for row in x0), {}, cond or {})


class LinearNet(nn.Module):
    """prediction = W_t x_t, one matrix per timestep."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.weight = nn.Parameter(weight.clone())

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return (self.weight[t] @ x[..., None])[..., 0]


DRAWS = Draws(Repeated(Grid(6), 4), seed=5)


@dataclass
class LinearWorld:
    """W_S = (sum_{i in S} B_i) (sum_{i in S} A_i + ridge I)^-1 per timestep, with A_i = sum z z^T, B_i = sum eps z^T over
    the frozen draws: the exact minimiser of the summed loss on any subset."""

    train: Tensors
    queries: Tensors
    forward: Denoiser
    A: Tensor  # [n, T, D, D]
    B: Tensor
    ridge: float

    def fit(self, mask: np.ndarray | None = None) -> Tensor:
        m = torch.ones(len(self.train)) if mask is None else torch.as_tensor(mask)
        m = m.to(self.A)
        A = torch.einsum("i,itab->tab", m, self.A) + self.ridge * torch.eye(self.A.shape[-1], dtype=self.A.dtype)
        B = torch.einsum("i,itab->tab", m, self.B)
        return torch.linalg.solve(A, B.mT).mT

    def losses(self, weight: Tensor) -> np.ndarray:
        """Loss of every query at these weights: [m]."""
        x0 = self.queries.x0
        draw = DRAWS(self.queries.batch(range(len(x0))).keys, x0.shape[1:], self.forward.timesteps, x0.dtype)
        values = torch.zeros(len(x0), DRAWS.count, dtype=x0.dtype)
        net = LinearNet(weight)
        with torch.no_grad():
            for s in range(DRAWS.count):
                pred, target = self.forward(net, Batch(x0, torch.zeros(len(x0))), Draw(draw.t[:, s], draw.noise[:, s]))
                values[:, s] = (pred - target).square().mean(1)
        return values.mean(1).numpy()

    def task(self, root: Path, **engine) -> Task:
        weight = self.fit()
        point = Checkpoint(lambda: LinearNet(weight), digest(weight), "linear", step=1, rate=0.1)
        return Task(self.forward, (point,), self.train, self.queries, root, Engine(dtype=torch.float64, **engine))


def linear_world(n: int = 400, m: int = 30, dim: int = 24, ridge: float = 1.0, seed: int = 0) -> LinearWorld:
    """8 clusters (spread 1.5 between, 0.5 within); 6 timesteps from abar .95 to .1; 4 noises each."""
    g = torch.Generator().manual_seed(seed)
    centres = 1.5 * torch.randn(8, dim, generator=g, dtype=torch.float64)

    def sample(count: int) -> Tensor:
        own = torch.randint(8, (count,), generator=g)
        return centres[own] + 0.5 * torch.randn(count, dim, generator=g, dtype=torch.float64)

    train, queries = tensors(sample(n), "train"), tensors(sample(m), "query")
    forward = Denoiser(torch.linspace(0.95, 0.1, 6, dtype=torch.float64))
    draw = DRAWS(train.batch(range(n)).keys, (dim,), 6, torch.float64)
    signal = forward.alphas_cumprod[draw.t][..., None]
    z = signal.sqrt() * train.x0[:, None] + (1 - signal).sqrt() * draw.noise
    A, B = torch.zeros(n, 6, dim, dim, dtype=torch.float64), torch.zeros(n, 6, dim, dim, dtype=torch.float64)
    for s in range(DRAWS.count):
        t = draw.t[0, s]
        A[:, t] += z[:, s, :, None] * z[:, s, None, :]
        B[:, t] += draw.noise[:, s, :, None] * z[:, s, None, :]
    return LinearWorld(train, queries, forward, A, B, ridge)


def half_masks(r: int, n: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    masks = np.zeros((r, n), dtype=bool)
    for row in masks:
        row[rng.permutation(n)[: n // 2]] = True
    return masks
