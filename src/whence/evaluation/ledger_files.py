"""What a ledger keeps besides weights and values, read back: its plan, its masks, and what was measured.

Earlier versions wrote the same without checksums; what is no plan of ours is refused by the field that is wrong.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict, cast

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from whence.diffusion.outputs import OUTPUTS
from whence.evaluation.designs import EMPTY, Subset
from whence.storage.arrays import read_checked, values_digest
from whence.storage.files import read_json, readable
from whence.storage.jsons import refuse_unexpected, whole
from whence.storage.opening import regular
from whence.training.dropout import active_dropout
from whence.training.recipe import New, Recipe, Text
from whence.training.study import Study
from whence.types import Engine, Images, Trainable, WhenceError, digest, from_plain

FORMAT_VERSION = 1
RESTORE = "restore it, or plan a new ledger"
REPAIR = "delete it and run the ledger again, or `whence ledger run --repair`"


class NoteOfUnit(TypedDict):
    """What a plan says of a training."""

    subset: int
    seed: int
    role: str
    design: str
    chance: NotRequired[float | None]


class Plan(TypedDict):
    """What plan.json holds."""

    format_version: int
    study: dict[str, Any]
    images: str
    n: int
    stack: int
    masks: str
    units: list[NoteOfUnit]


class Measured(TypedDict):
    """What the manifest.json of a measurement holds."""

    output: str
    better: Literal["lower", "higher"] | None
    draws: dict[str, Any]
    queries: str
    query_ids: list[str]


def planned_in(root: Path) -> dict[str, Any]:
    """What the plan.json of a ledger says."""
    path = root / "plan.json"
    found = read_json(path, dict, RESTORE)
    if whole(number := found.get("format_version")) and number > FORMAT_VERSION:
        raise WhenceError(f"{root}: written by a newer whence (format {number})")
    refuse_unexpected(found, Plan, str(path), RESTORE)
    if found["stack"] < 1 or found["n"] < 1:
        raise WhenceError(f"{found['stack']} models together on {found['n']} images", str(path), RESTORE)
    return cast("dict[str, Any]", found)


def planned_study(root: Path, notes: Mapping[str, object]) -> Study:
    """The study of a plan, where the plan says all of it."""
    recipe = from_plain(notes["recipe"], Recipe)
    if isinstance(recipe.model, New | Text):
        return Study(recipe, known=notes if isinstance(recipe.model, Text) else None)
    raise WhenceError(
        f"{root} retrains a {type(recipe.model).__name__} on a pipeline; open it with its study: "
        "Ledger(root, images, study)"
    )


Units = Sequence[Mapping[str, object]]  # as a plan notes them


def subsets_differ(different: Sequence[str], found: Units, asked: Units) -> str:
    """In words, where two plans differ in nothing but their subsets and seeds: digests of masks tell nobody anything.

    Args:
        different: in which fields.
        found: what is planned.
        asked: what was to be.
    """
    names = {line.split(":")[0] for line in different}
    if not names <= {"masks", "units"}:
        return ""
    there, wanted = _trainings(found), _trainings(asked)
    if there != wanted:
        return f"{there}; asked for are {wanted}"
    return "other subsets" if "masks" in names else "other seeds"


def _trainings(units: Units) -> str:
    """How many trainings a plan has, by their role: "16 test, 8 tune trainings on 12 subsets"."""
    roles = Counter(unit["role"] for unit in units)
    words = ", ".join(f"{count} {role}" for role, count in roles.items())
    return f"{words} trainings on {len({unit['subset'] for unit in units})} subsets"


def planned_stack(root: Path) -> int | None:
    """How many units a plan trains together, None where there is no plan yet."""
    path = root / "plan.json"
    return readable(path).get("stack") if path.exists() else None


def made_with(engine: Engine) -> dict[str, object]:
    """With what a training was made."""
    return {"torch": torch.__version__, "device": engine.device, "dtype": str(engine.dtype)}


def measurement_of(plan: str, notes: Mapping[str, object]) -> str:
    """What the values of a measurement are of, before the number of the training.

    Args:
        plan: digest of the plan.
        notes: of the measurement, as its manifest.json has them.
    """
    return f"{plan}/{digest(dict(notes))}"


def measured_values(path: Path, queries: int, of: str) -> np.ndarray:
    """Raw values of a training: [m, K].

    Args:
        path: of the file.
        queries: m.
        of: the training and the measurement.
    """
    found = read_checked(path, "measure again", of).get("values")
    if found is None or found.ndim != 2 or len(found) != queries or not bool(torch.isfinite(found).all()):
        held = "no values" if found is None else f"{list(found.shape)} values, or some that are not finite,"
        raise WhenceError(f"{path} is damaged (it holds {held} of {queries} queries); delete it and measure again")
    return found.numpy()


def masks_in(path: Path, digest: str, n: int) -> np.ndarray:
    """Which images each subset holds. digest: of the packed bits; n: images."""
    try:
        packed = load_file(regular(path))["masks"]
    except (OSError, SafetensorError, KeyError) as error:
        raise WhenceError(f"{path} cannot be read ({error}); {RESTORE}") from None
    if values_digest(packed) != digest:
        raise WhenceError(f"{path} does not match plan.json; restore it, or plan a new ledger")
    if packed.dtype != torch.uint8 or packed.ndim != 2 or packed.shape[1] != -(-n // 8):
        raise WhenceError(f"holds {packed.dtype} {list(packed.shape)}, no masks of {n} images", str(path), RESTORE)
    return np.unpackbits(packed.numpy(), axis=1, count=n).astype(bool)


def check_plan(study: Trainable, images: Images, subsets: Sequence[Subset], stack: int) -> None:
    """Refuse a plan that could not be carried out.

    Args:
        study: what is trained, and how.
        images: the training images.
        subsets: what is retrained.
        stack: units that are trained together.
    """
    if not subsets or stack < 1:
        raise WhenceError(f"plan: {len(subsets)} subsets, {stack} models together; at least 1 of each is needed")
    for row, subset in enumerate(subsets):
        if subset.mask.shape != (len(images),):
            raise WhenceError(f"masks are for {len(subset.mask)} images, but there are {len(images)}")
        if not subset.mask.any() and subset.design != EMPTY:
            raise WhenceError(f"plan: subset {row} ({subset.design}) holds no image; nothing can be trained on it")
    if stack > 1 and active_dropout(study.network_at(0)):
        raise WhenceError(
            f"plan: networks with dropout are trained one by one; {stack} together cannot be, give stack 1"
        )
    if study.recipe.loss.name not in OUTPUTS:
        raise WhenceError(f"plan: output {study.recipe.loss.name!r} is not one of {', '.join(OUTPUTS)}")
