"""Is EK-FAC, its product and its damped inverse, that of curvlinops 3.0.1?

A convolution, GroupNorm, a Linear layer shared by all pixels and a convolution, float64; all D directions of the
prediction on both sides, curvlinops "type-2" on flattened outputs; bias joint and separate. Eigenvectors and eigenvalues
are not comparable (signs, equal eigenvalues), so products with the same random vectors are compared: of K-FAC, EK-FAC
and (EK-FAC + damping)^-1. Largest difference relative to the largest entry; mark: 1e-10.

curvlinops's requirements list torchvision, which must never be in .venv. In an environment that is deleted afterwards:

    bash benchmarks/curvlinops_check.sh
"""

import os
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

os.environ["WHENCE_QUIET"] = "1"

import torch
from torch import Tensor, nn

from _record import SMOKE, record
from whence.curvature import factors as fitting
from whence.curvature.factors import Factors
from whence.curvature.kfac import EKFAC, KFAC
from whence.curvature.layers import layer_parameters
from whence.curvature.solve import Problem
from whence.data.images import tensor_images
from whence.diffusion import outputs
from whence.diffusion.draws import uniform
from whence.diffusion.forward import Denoiser
from whence.features.parts import Gradient
from whence.types import Checkpoint, Engine, Task

IMAGES, DRAWS, SIZE, VECTORS, DAMPING, MARK = 6, 3, 4, 5, 1e-3, 1e-10
FORWARD = Denoiser(torch.linspace(0.9, 0.2, DRAWS, dtype=torch.float64))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.GroupNorm(2, 4)
        self.pixel = nn.Linear(4, 5)
        self.last = nn.Conv2d(5, 1, 3, padding=1)

    def forward(self, x, t=None):
        h = torch.tanh(self.norm(self.first(x))).permute(0, 2, 3, 1)
        return self.last(torch.tanh(self.pixel(h)).permute(0, 3, 1, 2))


def net():
    torch.manual_seed(0)
    return Net().double()


def world(root):
    x0 = torch.randn(IMAGES, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x0 = x0 * torch.logspace(0.5, -0.5, SIZE, dtype=torch.float64)  # isotropic images would hide a wrong rotation
    images = tensor_images(x0)
    task = Task(FORWARD, (Checkpoint(net, "check"),), images, images, Path(root), Engine(dtype=torch.float64))
    return task, Gradient(outputs.loss, uniform(DRAWS), parameters=layer_parameters(net()))


def ours(task, part, joint, rows):
    """Products of rows [v, d] with K-FAC, EK-FAC, and the inverse of EK-FAC + damping."""
    problem, settings = Problem(task, task.trajectory[0], part), Factors(samples=None, joint_bias=joint)
    kfac, ekfac = (kind(DAMPING, True, settings).curvature(problem) for kind in (KFAC, EKFAC))
    return {
        "kfac": product(kfac, rows, lambda eigen: eigen.values.flatten()),
        "ekfac": product(ekfac, rows, lambda eigen: eigen.values.flatten()),
        "ekfac_inverse": product(ekfac, rows, lambda eigen: eigen.inverse(DAMPING, True)),
    }


def product(curvature, rows, spectrum):
    found = torch.zeros_like(rows)
    for eigen in curvature:
        eigen.block.scatter(eigen.back(eigen.rotate(rows) * spectrum(eigen)), found)
    return found


def theirs(task, part, joint, rows):
    if SMOKE:  # where whence is tested, curvlinops must not be installed
        return ours(task, part, joint, rows)
    from curvlinops import EKFACLinearOperator, KFACInverseLinearOperator, KFACLinearOperator

    module = net()
    every = dict(module.named_parameters())
    parameters = [every[name] for name in part.sizes(module)]
    x = torch.cat([noised(task, part, i) for i in range(len(task.train))])
    data = [(x, torch.zeros(len(x), SIZE * SIZE, dtype=x.dtype))]  # targets never enter
    settings = {"fisher_type": "type-2", "separate_weight_and_bias": not joint, "check_deterministic": False}
    kfac, ekfac = (
        kind(nn.Sequential(module, nn.Flatten()), nn.MSELoss(), parameters, data, **settings)
        for kind in (KFACLinearOperator, EKFACLinearOperator)
    )
    inverse = KFACInverseLinearOperator(ekfac, damping=DAMPING, use_exact_damping=True)
    columns = [
        c.reshape(len(rows), *p.shape)
        for c, p in zip(rows.split([p.numel() for p in parameters], 1), parameters, strict=True)
    ]

    def multiply(operator) -> Tensor:
        found = [operator @ [c[v] for c in columns] for v in range(len(rows))]
        return torch.stack([torch.cat([piece.flatten() for piece in each]) for each in found]).detach()

    return {"kfac": multiply(kfac), "ekfac": multiply(ekfac), "ekfac_inverse": multiply(inverse)}


def noised(task, part, i):
    """x_t of every draw of an image."""
    return torch.cat(
        [task.forward(lambda x, t: x, d.batch, d.draw)[0] for d in fitting.passes(task.train, [i], part.draws, task)]
    )


def main():
    figures = {}
    for joint in (True, False):
        with tempfile.TemporaryDirectory() as folder:
            task, part = world(folder)
            count = sum(part.sizes(net()).values())
            generator = torch.Generator().manual_seed(2)
            rows = torch.randn(VECTORS, count, generator=generator, dtype=torch.float64)
            mine, other = ours(task, part, joint, rows), theirs(task, part, joint, rows)
        figures["joint" if joint else "separate"] = {
            name: float((mine[name] - other[name]).abs().max() / other[name].abs().max()) for name in mine
        }
    passed = max(max(each.values()) for each in figures.values()) <= MARK
    record(
        "curvlinops",
        {
            "question": __doc__.splitlines()[0],
            "images": IMAGES,
            "draws": DRAWS,
            "outputs": SIZE * SIZE,
            "parameters": count,
            "damping": DAMPING,
            "curvlinops": None if SMOKE else version("curvlinops-for-pytorch"),
            "largest_relative_difference": figures,
            "mark": MARK,
            "passed": passed,
        },
    )
    sys.exit(not passed)


if __name__ == "__main__":
    main()
