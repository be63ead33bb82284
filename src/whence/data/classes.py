"""Classes: what number the class of an image has in the model that was trained on it.

A model knows its classes by number. Names get theirs from the first of these that says them: what the user gives, the
model's folder (`classes.txt`, or `id2label` in model_index.json), the data (`classes.txt`, a ClassLabel). Sorted names are
numbered only where there are as many as the model has classes: fewer of them would silently get the numbers of others.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from whence.data.layout import CLASSES, Layout, some
from whence.plain import WhenceError
from whence.storage.files import text_of, write_bytes
from whence.storage.opening import regular

MODEL_INDEX = "model_index.json"
GIVE = "--classes FILE (a name per line) or --classes cat,dog,... in the order of the training"


@dataclass(frozen=True)
class Classes:
    """What is known of a model's classes.

    Args:
        names: in the model's order, None where nobody says them.
        count: how many the model has, None for a model without classes.
        sure: whether labels must be among the names; those in a model's folder may be written otherwise.
    """

    names: tuple[str, ...] | None = None
    count: int | None = None
    sure: bool = True

    def number(self, name: str) -> int | None:
        """The class of this name; of "tench, Tinca tinca" either part is one."""
        if self.names is None:
            return None
        if name in self.names:
            return self.names.index(name)
        found = [i for i, full in enumerate(self.names) if name in (part.strip() for part in full.split(","))]
        return found[0] if len(found) == 1 else None


NO_CLASSES = Classes()


def classes_of(folder: Path, count: int | None, given: str | Sequence[str] | None = None) -> Classes:
    """The classes of a model.

    Args:
        folder: of the model.
        count: how many it has, None for a model without.
        given: by its user: names, a file with one per line, or a text of names with commas between them.
    """
    if given is not None:
        if count is None:
            raise WhenceError(f"{folder} has no classes", "--classes", "no such option")
        return _counted(Classes(class_names(given), count), "--classes")
    if count is None:
        return Classes()
    if (folder / CLASSES).is_file():
        return _counted(Classes(lines_of(folder / CLASSES), count), str(folder / CLASSES))
    return Classes(_id2label(folder / MODEL_INDEX), count, sure=False)


def class_names(given: str | Sequence[str]) -> tuple[str, ...]:
    """The names that a user gives: themselves, a file with one per line, or a text of names with commas between them."""
    if isinstance(given, str) and Path(given).is_file():
        return lines_of(Path(given))
    return _distinct(given.split(",") if isinstance(given, str) else given, "--classes")


def _counted(classes: Classes, where: str) -> Classes:
    count, names = classes.count, classes.names
    if names is not None and count is not None and len(names) > count:
        raise WhenceError(f"{len(names)} names, but the model has {count} classes", where, "one name for each")
    return classes


def lines_of(path: Path) -> tuple[str, ...]:
    """The names of classes in a classes.txt."""
    return _distinct(text_of(path, "a text file with the name of a class per line").splitlines(), str(path))


def write_classes(folder: Path, names: Sequence[str]) -> None:
    """What `lines_of` reads; names that it would read otherwise are left to the next user."""
    if tuple("\n".join(names).splitlines()) == tuple(name.strip() for name in names) == tuple(names):
        write_bytes(folder / CLASSES, "".join(f"{name}\n" for name in names).encode())


def _distinct(names: Sequence[str], where: str) -> tuple[str, ...]:
    found = tuple(stripped for name in names if (stripped := name.strip()))
    twice = next((name for name in found if found.count(name) > 1), None)
    if not found or twice is not None:
        what = "names no class" if not found else f"names {twice!r} twice"
        raise WhenceError(what, where, "the name of each class once, in the order of the training")
    return found


def _id2label(path: Path) -> tuple[str, ...] | None:
    """{"0": name, ...} of a class-conditional pipeline, None where it does not say it for each."""
    try:
        noted = json.loads(regular(path).read_text(encoding="utf-8")).get("id2label")
        return tuple(str(noted[str(i)]) for i in range(len(noted))) or None
    except (OSError, ValueError, AttributeError, KeyError, TypeError):
        return None


# ------------------------------------------------------------------------------------------------------------- labels


@dataclass(frozen=True)
class Labels:
    """numbers: [n], None without classes; names: of the classes, None where they are not known; problem: why labels
    that are there are none."""

    numbers: Sequence[int] | None = None
    names: tuple[str, ...] | None = None
    problem: str = ""


def class_labels(found: Layout, model: Classes, where: str | Path) -> Labels:
    """The classes of the images: whole numbers are the numbers themselves, names count as the module says.

    Where the model has classes, labels that are none are an error; elsewhere nobody needs them.

    Args:
        found: the images and their labels.
        model: what is known of the classes of the model.
        where: the data set, as errors name it.
    """
    if model.names is None and found.classes is not None:
        # A classes.txt may be of something else, which only matters where the model has classes.
        model = Classes(found.classes, model.count, sure=model.count is not None)
    values = found.meta.get("label") if found.labels is None else found.labels
    if values is None:
        values = _only_folder(found, model)
        if values is None:
            return Labels()
    problem = _problem(values, found.names)
    if problem:
        if model.count is not None:
            raise WhenceError(problem, str(where), "all names, or the number of a class from 0 for each image")
        return Labels(problem=problem)
    named = [value for value in values if isinstance(value, str)]
    if named:
        return _by_name(named, model, where)
    return _by_number([int(value) for value in values if isinstance(value, (int, float))], model, where)


def _only_folder(found: Layout, model: Classes) -> list[object] | None:
    """One folder is a class where the classes are known: pictures to explain are often of one class."""
    known = bool(found.folders) and all(model.number(name) is not None for name in found.folders)
    return list(found.folders) if known else None


def _problem(values: Sequence[object], names: Sequence[str]) -> str:
    """Why some values are no labels, "" where they are."""
    missing = [name for name, value in zip(names, values, strict=True) if value is None]
    if missing:
        return f"`label` is missing for {len(missing)} of {len(values)} images: {some(missing)}"
    if all(isinstance(value, str) for value in values):
        return ""
    strange = [
        f"{name} has {value!r}" for name, value in zip(names, values, strict=True) if not _is_class_number(value)
    ]
    if not strange:
        return ""
    kind = "neither all names nor all whole numbers from 0"
    return f"`label` is {kind}, so there are no classes: {some(strange)}"


def _is_class_number(value: object) -> bool:
    """Whole and from 0; tables with gaps write 3 as 3.0."""
    whole = type(value) is int or (isinstance(value, float) and value.is_integer())
    return whole and isinstance(value, (int, float)) and 0 <= value < 2**63


def _by_number(numbers: list[int], model: Classes, where: str | Path) -> Labels:
    most = max(numbers, default=0)
    if model.names is not None and model.sure and most >= len(model.names):
        told = f"label {most} of {len(model.names)} classes; labels count from 0"
        raise WhenceError(told, str(where), f"0 to {len(model.names) - 1}")
    if model.count is not None and most >= model.count:
        raise _beyond(most, model.count, where)
    return Labels(numbers, model.names if model.sure else None)


def _beyond(largest: int, count: int, where: str | Path) -> WhenceError:
    told = f"labels go up to {largest}, but the model has {count} classes (0 to {count - 1})"
    return WhenceError(told, str(where), "the images and labels that the model was trained on")


def _by_name(named: Sequence[str], model: Classes, where: str | Path) -> Labels:
    numbers = {name: model.number(name) for name in dict.fromkeys(named)}
    unknown = [name for name, number in numbers.items() if number is None]
    if model.names is not None and not unknown:
        known = Classes(model.names, model.count)
        return _by_number([number for name in named if (number := numbers[name]) is not None], known, where)
    if model.names is not None and model.sure:
        told = f"label {min(unknown)!r} is not a class; the classes are {some(model.names, 9)}"
        raise WhenceError(told, str(where), "" if model.count is None else GIVE)
    names = tuple(sorted(numbers))
    if model.count is not None and len(names) > model.count:
        raise _beyond(len(names) - 1, model.count, where)
    if model.count is not None and len(names) != model.count:
        told = f"{len(names)} class names ({some(names)}), but the model has {model.count} classes"
        if model.names is not None:
            told += f" and calls them {some(model.names)}"
        raise WhenceError(f"{told}: their numbers are not known", str(where), GIVE)
    place = {name: number for number, name in enumerate(names)}
    return Labels([place[name] for name in named], names)


def same_numbering(train: Labels, queries: Labels, where: str | Path, count: int | None) -> None:
    """Names beside training images that have numbers only would be numbered by guess."""
    if count is not None and train.numbers is not None and train.names is None and queries.names is not None:
        told = "the labels are names, but those of the training images are numbers"
        raise WhenceError(told, str(where), f"numbers here, too, or {GIVE}")
