"""What each image did to the representations of the pictures while the model was trained: our reconstruction of MONTRAGE.

Of Brokman et al. 2024 ("MONTRAGE: Monitoring training for attribution of generative diffusion models", ECCV) it is known
that internal representations are watched during training and their changes credited to the images of each step; not which
representations, how they are added up, and by what loss a model of them is trained. Everything below is ours:

    r_q(theta)     activations that the network has for picture q at a few noisy steps, mean over space (see `activations`)
    d_q            (r_q(theta_T) - r_q(theta_0)) / its length, the direction in which training moved them
    score[q, i] =  sum over steps s that image i was in of <r_q(theta_{s+1}) - r_q(theta_s), d_q> / images of the step

so that a row adds up to the length that r_q was moved. The training is repeated, twice: once for d_q, once watched. At small
rates a step of SGD does rate <grad <r_q, d_q>, -grad L_s>, which is TracIn for representations.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from whence.diffusion.draws import Draws
from whence.features.activations import STEPS, Layers
from whence.features.rows import identity
from whence.methods.errors import Stated, unmeasured
from whence.methods.inner_product import recorded
from whence.methods.needs import check_scored, known_study
from whence.methods.registry import Trial, method
from whence.storage.arrays import Store
from whence.storage.files import progress
from whence.training.loop import steps
from whence.training.optimizer import State, start
from whence.training.order import noise_keys, slots_of, with_prior_images
from whence.types import Scores, Task, Weights, WhenceError, describe


@method("our reconstruction of Brokman et al.", 2024, "two trainings, and a pass per query, draw and step", classifier=None,
        needs=("training",), trial=Trial(own_draws=True))  # fmt: skip
@dataclass(frozen=True)
class MontrageStyle:
    """What the steps that saw an image did to the network's representation of a picture, along the direction in which the
    whole training moved it; our reconstruction of MONTRAGE (Brokman et al. 2024; see `monitor`).

    No better than chance on the digits bank (LDS .00 and .02), where what a step did is shared by the 64 images of its
    batch alike; on 15 digits of three classes, in batches of 1 to 3, hardly better.

    Args:
        name: in recipes and on the screen.
        layers: a module's name, or a regular expression that matches several; empty for the middle block of a UNet, and
            otherwise for what the last layer reads.
        draws: the (timestep, noise) pairs at which activations are read.
        every: steps from one look to the next; what happened between is shared by the images of these steps.
    """

    name: str = "montrage_style"
    layers: str = ""
    draws: Draws = STEPS
    every: int = 1

    def __post_init__(self) -> None:
        if self.every < 1:
            raise WhenceError(f"every is {self.every}", self.name, "a number of steps, from 1")

    def stated(self, task: Task) -> Stated:
        return Stated(because="it is what happened in one training, and there is no other to compare it with")

    def __call__(self, task: Task) -> Scores:
        check_scored(self.name, self, task)
        study = known_study(self.name, task)
        key = {"part": "monitored", "method": replace(self, name=""), "study": study, "engine": str(task.engine.dtype)}
        key |= {"forward": task.forward, "images": identity(task.train), "queries": identity(task.queries)}
        array = Store(task.root).array(key, (len(task.queries), len(task.train)), torch.float64, len(task.queries))
        for rows in array.missing():
            array.write(rows, self._watched(task))
        scores = recorded(self, task, array.all(), chosen=[])
        return unmeasured(replace(scores, recipe={**scores.recipe, "study": describe(study)}), self, task)

    def _watched(self, task: Task) -> Tensor:
        """[m, n]"""
        study = known_study(self.name, task)
        looker = _Looker.of(task, Layers(self.layers, self.draws))
        first = looker(start(study.network_at(study.recipe.seed)).weights)
        watched = progress(self._states(task), f"{self.name}, to its end", total=study.recipe.steps)
        (end,) = deque(watched, maxlen=1)
        way = looker(end.weights) - first
        length = way.norm(dim=1, keepdim=True)
        way = torch.where(length > 0, way / length.clamp(min=torch.finfo(way.dtype).tiny), 0.0)
        seen, weights = with_prior_images(study, task.train)
        keys, n = noise_keys(seen), len(task.train)
        table, before, since = torch.zeros(len(way), len(seen), dtype=torch.float64), first, list[Tensor]()
        for state in progress(self._states(task), self.name, total=study.recipe.steps):
            since.append(slots_of(study.recipe, keys, weights, state.step - 1).rows)
            if len(since) == self.every or state.step == study.recipe.steps:
                after = looker(state.weights)
                moved = ((after - before) * way).sum(1).double().cpu()
                rows = torch.cat(since)
                table.index_add_(1, rows, (moved[:, None] / len(rows)).expand(-1, len(rows)).contiguous())
                before, since = after, []
        return table[:, :n]

    def _states(self, task: Task) -> Iterator[State]:
        study = known_study(self.name, task)
        seen, weights = with_prior_images(study, task.train)
        network = study.network_at(study.recipe.seed)
        for state, _ in steps(network, study.forward(), seen, study.recipe, weights, engine=task.engine):
            yield state


@dataclass(frozen=True, eq=False)
class _Looker:
    """The representations of all queries at other weights.

    Args:
        module: a network of its own, whose weights are overwritten.
        task: whose queries they are.
        layers: that are read.
    """

    module: nn.Module
    task: Task
    layers: Layers

    @classmethod
    def of(cls, task: Task, layers: Layers) -> _Looker:
        study = known_study("montrage_style", task)
        module = study.network_at(study.recipe.seed).to(task.engine.device, task.engine.dtype)
        return cls(module.eval().requires_grad_(False), task, layers)

    def __call__(self, weights: Weights) -> Tensor:
        """[m, k]"""
        task, at_once = self.task, self.task.engine.batch_size
        own = dict(self.module.named_parameters())
        with torch.no_grad():
            for name, value in weights.items():
                own[name].copy_(value)
            found = [
                self.layers(
                    self.module,
                    task.forward,
                    task.queries.batch(range(begin, min(begin + at_once, len(task.queries)))).to(
                        task.engine.device, task.engine.dtype
                    ),
                )
                for begin in range(0, len(task.queries), at_once)
            ]
        return torch.cat(found)
