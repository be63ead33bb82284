"""Narrower questions than a method's own: about a region of the pictures, or about some timesteps.

They change how queries are measured. The training images stay as they are, and so does everything that is computed of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from whence.data.masks import Mask, read_mask
from whence.diffusion.draws import DrawRule, Draws
from whence.diffusion.outputs import Output, region
from whence.diffusion.window import check_window, within
from whence.types import Forward, Method, Scores, WhenceError

MASKS = "masks"
"""The folder of a run that keeps the masks of its questions."""


@runtime_checkable
class Narrowable(Protocol):
    """A method whose queries can be measured in another way than its training images."""

    def narrowed(self, output: Callable[[Output], Output], draws: Callable[[DrawRule], Draws]) -> Method:
        """The method with other measurements of the queries.

        Args:
            output: from the output function of the method to that of the queries.
            draws: likewise of the draws.
        """
        ...


@runtime_checkable
class LinearInQuery(Protocol):
    """A method that declares whether its scores are linear in what is measured of the query (a_q = 1 in `inner_product`).
    The difference of two rows is then the row of the difference of their two measurements."""

    @property
    def linear_in_query(self) -> bool: ...


def linear_in_query(method: object) -> bool:
    """Whether a method says that its scores are linear in the query. Who says nothing is taken not to be."""
    return isinstance(method, LinearInQuery) and method.linear_in_query


@dataclass(frozen=True)
class Question:
    """What is asked of the queries.

    Args:
        mask: the part of the pictures that is asked about; None for the whole.
        timesteps: (low, high), the steps low to high - 1 of the schedule, 0 the least noisy; None for those of the method.
    """

    mask: Mask | None = None
    timesteps: tuple[int, int] | None = None

    def describe(self) -> dict[str, object]:
        mask = None if self.mask is None else {"digest": self.mask.digest, "share": self.mask.share}
        return {"mask": mask, "timesteps": None if self.timesteps is None else list(self.timesteps)}

    def keep(self, root: Path) -> None:
        """Keep the mask in a run folder, from where `whence replay` reads it."""
        if self.mask is not None:
            self.mask.save(root / MASKS)

    def asked(self, name: str, method: Method, forward: Forward, shape: Sequence[int]) -> Method:
        """The method that answers this question.

        Args:
            name: of the method, for errors.
            method: that answers its own.
            forward: how the model is measured.
            shape: of what the network sees of one picture: [C, height, width].

        Raises:
            WhenceError: the question does not apply to the method, the model or the pictures.
        """
        where = "mask" if self.timesteps is None else "timesteps"
        if forward.models == "classifier":
            raise WhenceError("this model is a classifier, which is asked about whole pictures", where, "a denoiser")
        if self.timesteps is not None:
            check_window(self.timesteps, forward.timesteps)
        if not isinstance(method, Narrowable):
            told = f"{name} measures pictures in a way of its own, which cannot be narrowed"
            raise WhenceError(
                told, where, "a method that measures an output, such as d_trak, ek_fac or further_training"
            )
        return method.narrowed(lambda output: self._output(output, shape), self._draws)

    def _output(self, output: Output, shape: Sequence[int]) -> Output:
        if self.timesteps is not None and output.whole is not None:
            raise WhenceError(f"output {output.name!r} is of all timesteps together", "timesteps", "loss")
        return output if self.mask is None else region(output, self.mask.at(shape))

    def _draws(self, draws: DrawRule) -> Draws:
        if self.timesteps is not None:
            return within(draws, *self.timesteps)
        if not isinstance(draws, Draws):
            raise WhenceError(f"{type(draws).__name__} is no rule of draws", "mask", "draws by a rule")
        return draws


def question_of(note: Mapping[str, Any] | None, root: Path) -> Question | None:
    """The question of a recipe, None for the method's own.

    Args:
        note: what `Question.describe` wrote.
        root: the run folder, which keeps the mask.
    """
    if note is None:
        return None
    mask = None
    if note["mask"] is not None:
        path = root / MASKS / f"{note['mask']['digest']}.png"
        mask = read_mask(path)
        if mask.digest != note["mask"]["digest"]:
            raise WhenceError("it is not the mask of the result", str(path), "the mask that was kept there")
    return Question(mask, None if note["timesteps"] is None else tuple(note["timesteps"]))


def question_note(scores: Scores) -> Mapping[str, Any] | None:
    """What the recipe of scores says of their question; None for the method's own."""
    call = scores.recipe.get("call")
    return call.get("question") if isinstance(call, Mapping) else None
