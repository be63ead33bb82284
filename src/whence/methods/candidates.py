"""Candidates: a cheap method names the training images that a dear one scores.

    scored = those that the cheap method ranks among the first k of at least one query

The curvature of the dear method is still that of all training images, so that a candidate's score is the one it has when all
images are scored; what is saved is the work of each image that is no candidate. Methods whose score of one image depends on
the rows of the others (see `types.ImageByImage`) are refused.
"""

from __future__ import annotations

import numbers
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch

from whence.data.images import subset
from whence.methods.needs import check_by_image
from whence.scores import strongest
from whence.types import Method, Scores, Task, WhenceError, describe


@dataclass(frozen=True)
class Candidates:
    """Which training images are scored.

    Args:
        count: k, images of each query.
        by: the cheap method, as in METHODS.
        settings: of the cheap method, where they are not its own.
    """

    count: int
    by: str = "pixel_cosine"
    settings: Mapping[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.count, numbers.Integral) or isinstance(self.count, bool) or self.count < 1:
            raise WhenceError(f"candidates is {self.count!r}", accepted="a whole number of images per query, from 1")
        object.__setattr__(self, "count", int(self.count))  # numbers of numpy as Python's own, which recipes hold

    def check(self, methods: Mapping[str, Method]) -> None:
        """Refuse methods that cannot score candidates alone, before anything is computed.

        Args:
            methods: name -> method; the one that names the candidates may be among them.
        """
        others = {name: method for name, method in methods.items() if name != self.by}
        if not others:
            raise WhenceError(
                f"{self.by} names the candidates, and no other method is asked to score them",
                "candidates",
                "a further method, like ek_fac, or no candidates",
            )
        for name, method in others.items():
            check_by_image(name, method)

    def rows(self, cheap: Scores) -> list[int]:
        """The columns that are among the first of any query, in ascending order; of equal scores the first images."""
        first = torch.cat([strongest(row, self.count) for row in cheap.values])
        return first.unique(sorted=True).tolist()

    def named(self, task: Task, cheap: Scores) -> Task:
        """The task with the candidates as the training images that are scored; as it is where they are all of them.

        Args:
            task: the question.
            cheap: scores of all of its training images.
        """
        if list(cheap.train_ids) != list(task.train.ids):
            raise WhenceError(f"the scores of {self.by} are of other training images", "candidates", "scores of all")
        rows = self.rows(cheap)
        return task if len(rows) == len(task.train) else replace(task, scored=subset(task.train, rows))

    def score(self, task: Task, method: Method) -> Scores:
        """Scores of the candidates, whose recipe says who named them.

        Args:
            task: the question, as `named` gives it; of one before that, all images are scored.
            method: the dear one, or the cheap one before it.
        """
        found = method(task)
        return replace(found, recipe={**found.recipe, "candidates": describe(self)}) if found.some_only else found
