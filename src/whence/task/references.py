"""References: held-out pictures that say how much a picture that was never trained on leans on single training images."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NotRequired, TypedDict

from whence.data.layout import some
from whence.features.rows import identity
from whence.methods import check_needs
from whence.report.attributable import Attributability, Leaning, attributability
from whence.storage.files import file_digest, readable, write_json
from whence.types import Images, Method, Scores, Task, WhenceError

FORMAT_VERSION = 1
NOTE, SCORES = "attributable.json", "scores.safetensors"
"""Beside each other: what a picture leans on, by the scores of a method."""


class Compared(TypedDict):
    """With what pictures were compared."""

    images: str
    count: int


class Judged(TypedDict):
    """What a report reads of attributable.json."""

    references: Compared
    scores: NotRequired[str]
    queries: str
    query_ids: list[str]
    rate: float
    doubt: str
    p: list[float]
    adjusted: list[float]
    stands_out: list[bool]


@dataclass(frozen=True, eq=False)
class References:
    """Pictures that were not trained on, for the pictures of a run to be compared with.

    Args:
        images: as the network sees them.
        rate: of false discoveries among the pictures that are said to stand out.
        statistic: see `attributable.STATISTICS`.
    """

    images: Images
    rate: float = 0.1
    statistic: str = "first_mean"

    def check(self, task: Task, methods: Mapping[str, object]) -> None:
        """Refuse references that were trained on, or are asked about, and methods that cannot measure them.

        Args:
            task: the question.
            methods: by name.
        """
        for what, images in (("training images", task.train), ("pictures to explain", task.queries)):
            known = dict(zip(images.digests, images.ids, strict=True))
            pairs = zip(self.images.ids, self.images.digests, strict=True)
            same = [f"{name} = {known[digest]}" for name, digest in pairs if digest in known]
            if same:
                raise WhenceError(
                    f"{len(same)} of {len(self.images)} references are {what}: {some(same)}",
                    "references",
                    "pictures that are neither trained on nor asked about",
                )
        for name in methods:
            check_needs(name, self.asked(task))

    def asked(self, task: Task) -> Task:
        """The same question about the references."""
        return replace(task, queries=self.images, sampled=None, errors=False)

    def judge(self, task: Task, method: Method, scores: Scores) -> Attributability:
        """Which pictures stand out by a method.

        Args:
            task: the question.
            method: it itself.
            scores: of the pictures.
        """
        held = method(self.asked(task)).values.double().numpy()
        return attributability(scores.values.double().numpy(), held, self.statistic, self.rate)

    def write(self, folder: Path, found: Attributability, task: Task) -> None:
        """Keep it beside the scores.

        Args:
            folder: RUN/scores/METHOD.
            found: what came out.
            task: the question.
        """
        facts = {
            "statistic": found.statistic,
            "rate": found.rate,
            "references": {"images": identity(self.images), "count": len(self.images)},
            "scores": file_digest(folder / SCORES),
            "queries": identity(task.queries),
            "query_ids": list(task.queries.ids),
            "doubt": found.doubt,
            "values": found.values.tolist(),
            "p": found.p.tolist(),
            "adjusted": found.adjusted.tolist(),
            "stands_out": found.stands_out,
        }
        write_json(folder / NOTE, {"format_version": FORMAT_VERSION, **facts})


def leanings(folder: Path, scores: Scores) -> list[Leaning] | None:
    """What is known of the pictures of some scores, None where they were not compared with references.

    Args:
        folder: RUN/scores/METHOD.
        scores: read from it.
    """
    if not (folder / NOTE).is_file():
        return None
    note = readable(folder / NOTE, Judged)
    same = note["queries"] == scores.recipe.get("queries") and note["query_ids"] == list(scores.query_ids)
    # Earlier versions did not note the scores.
    if not same or ("scores" in note and note["scores"] != file_digest(folder / SCORES)):
        told = "it is of other scores than lie beside it: which pictures lean on single images is not told"
        warnings.warn(f"{folder / NOTE}: {told}; attribute again with --reference_data_dir, or remove it", stacklevel=4)
        return None
    count, rate, doubt = note["references"]["count"], note["rate"], note["doubt"]
    lengths = {len(note[name]) for name in ("query_ids", "p", "adjusted", "stands_out")}
    if len(lengths) > 1:
        raise WhenceError("its columns are of different lengths", str(folder / NOTE), "it deleted, to attribute again")
    rows = zip(note["p"], note["adjusted"], note["stands_out"], strict=True)
    return [Leaning(p, adjusted, out, count, rate, doubt) for p, adjusted, out in rows]
