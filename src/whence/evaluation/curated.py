"""The lists of `whence clean`: what was found, how, and how sure that is, in words, tables and files of names.

OUTPUT/clean.html            the lists with pictures
OUTPUT/LIST.csv              all images of a list, the most suspicious first
OUTPUT/drop/LIST.txt         names of those that may be dropped, one a line: what `--without` reads (`data.dropping`)
OUTPUT/images.csv            a row per image with all numbers; images.parquet the same, as Hugging Face `datasets` reads it
OUTPUT/fiftyone.json         samples for `whence.to_fiftyone`
OUTPUT/clean.json            the sentences and counts
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from whence.data.dropping import write_names
from whence.data.images import ImageFolder
from whence.data.layout import some
from whence.evaluation.curation import (
    FEW_PICTURES,
    Curation,
    Doubt,
    Harm,
    Neighbourhood,
    Rows,
    doubts,
    duplicates,
    lookalikes,
    neighbourhood,
    outliers,
    ranks,
)
from whence.evaluation.exported import as_datasets, fiftyone_samples
from whence.features.encoders import Thumbnail
from whence.features.pretrained import Pretrained
from whence.report.clean import Evidence, Section, clean_page
from whence.storage.columns import as_csv
from whence.storage.files import FORMAT_VERSION, write_bytes, write_json
from whence.storage.tables import Array, Mask
from whence.types import Engine, Images

LISTS = ("duplicates", "lookalikes", "mislabelled", "hurt", "outliers")
Table = dict[str, list[object]]


@dataclass(frozen=True, eq=False)
class Listed:
    """One list.

    Args:
        title: its heading.
        what: how its images were found.
        sure: how sure that is.
        order: rows of all images it ranks, the most suspicious first.
        drop: rows of those that may be dropped, in this order.
        evidence: what is said of an image, by its row.
        beside: the image that is shown beside it, by its row.
        note: what is to be said of the list when it is made, "" for nothing.
        shown: rows that the page shows; None for those that may be dropped.
    """

    title: str
    what: str
    sure: str
    order: Sequence[int]
    drop: Sequence[int]
    evidence: Mapping[int, str]
    beside: Mapping[int, int] = field(default_factory=dict)
    note: str = ""
    shown: Sequence[int] | None = None


@dataclass(frozen=True, eq=False)
class Model:
    """What a model says of its training images.

    Args:
        method: by which.
        reads: what it is told of an image, "labels" or "captions"; "" for nothing.
        self_influence: how much each image did for itself [n].
        harm: what images did against held-out pictures; None without such pictures.
    """

    method: str
    reads: str
    self_influence: Array
    harm: Harm | None = None


@dataclass(frozen=True, eq=False)
class Curated:
    """What was found.

    Args:
        lists: those that could be made, by their names.
        absent: why the others could not.
        table: a row per image.
    """

    lists: Mapping[str, Listed]
    absent: Mapping[str, str]
    table: Table


def curated(
    images: Images, how: Curation = Curation(), model: Model | None = None, engine: Engine = Engine()
) -> Curated:
    """All lists of some training images.

    Args:
        images: as they look; their `labels` are judged where they have some.
        how: what counts as suspicious.
        model: what it says; None for what images alone tell.
        engine: device of the encoder.
    """
    found = neighbourhood(images, how, engine)
    labels = None if images.labels is None else images.labels.numpy()
    copy_of = duplicates(found, images.ids, labels)
    looks_like = lookalikes(found, images.ids, labels, how.near)
    z, far = outliers(found, how.far)
    names = _class_names(images)
    doubt = None if labels is None or len(np.unique(labels)) < 2 else doubts(found, labels)
    told = [None] * len(images) if labels is None else [names(label) for label in labels]
    lists, absent = {"duplicates": _duplicates(copy_of, told)}, {}
    lists["lookalikes"] = _lookalikes(found, looks_like, images.ids, told, how)
    wrong = _mislabelled(found, doubt, model, names, _one_of_many(copy_of, looks_like), images.ids)
    if isinstance(wrong, str):
        absent["mislabelled"] = wrong
    else:
        lists["mislabelled"] = wrong
    if model is not None and model.harm is not None:
        lists["hurt"] = _hurt(model, model.harm, how)
    else:
        absent["hurt"] = "it takes --model and --query_data_dir, held-out pictures that the model should make"
    lists["outliers"] = _outliers(found, z, far, how)
    nearest, similarity = _nearest_of_all(found, copy_of, images.ids)
    alike = set(lists["lookalikes"].drop)
    table: Table = {
        "image": list(images.ids),
        "label": list(told),
        "copy_of": [None if row == i else images.ids[row] for i, row in enumerate(copy_of.tolist())],
        "looks_like": [images.ids[row] if i in alike else None for i, row in enumerate(looks_like.tolist())],
        "nearest": [None if row < 0 else images.ids[row] for row in nearest.tolist()],
        "similarity": _numbers(similarity),
        "outlier_z": _numbers(z),
        "one_colour": found.flat.tolist(),
    }
    if doubt is not None:
        table |= {
            "doubt": _numbers(doubt.doubt),
            "neighbours_say": [None if row < 0 else names(row) for row in doubt.most.tolist()],
            "votes": doubt.votes.tolist(),
        }
    if model is not None:
        table["self_influence"] = _numbers(model.self_influence)
        if model.harm is not None:
            of = {"harm": model.harm.harm, "harm_stderr": model.harm.stderr, "harm_q": model.harm.q}
            table |= {name: _numbers(values) for name, values in of.items()}
    dropped = {name: set(each.drop) for name, each in lists.items()}
    table["drop"] = [" ".join(name for name, rows in dropped.items() if row in rows) for row in range(len(images))]
    return Curated(lists, absent, table)


def _numbers(values: Array) -> list[object]:
    return [float(value) if np.isfinite(value) else None for value in values]


def _class_names(images: Images) -> Callable[[int], str]:
    seen = images.pictures
    names = seen.classes if isinstance(seen, ImageFolder) else None
    return lambda label: str(label) if names is None or not 0 <= label < len(names) else names[label]


def _by(how: Curation) -> str:
    encoder = how.encoder
    if isinstance(encoder, Thumbnail):
        return f"pixels ({encoder.side} px along the longer edge, without the mean)"
    return f"the encoder {Path(encoder.folder).name if isinstance(encoder, Pretrained) else encoder.name}"


def _nearest_of_all(found: Neighbourhood, copy_of: Rows, ids: Sequence[str]) -> tuple[Rows, Array]:
    """The nearest image of each, its copies among them, and their cosine: 1 where it has one [n], [n]."""
    nearest, similarity = found.nearest[:, 0].copy(), found.similarity[:, 0].copy()
    copies = np.nonzero(copy_of != np.arange(len(copy_of)))[0].tolist()
    for row in sorted(copies, key=lambda row: ids[row], reverse=True):
        nearest[[row, copy_of[row]]] = copy_of[row], row
        similarity[[row, copy_of[row]]] = 1.0
    return nearest, similarity


def _one_of_many(copy_of: Rows, looks_like: Rows) -> Mask:
    """The images that are kept as the one of their copies, or of what looks like them [n]."""
    kept = np.zeros(len(copy_of), bool)
    for of in (copy_of, looks_like):
        kept[of[of != np.arange(len(of))]] = True
    return kept


KEPT = (
    "Of each group one is kept: with the label that most of the group and of its nearest images have, then the first by "
    "name."
)


def _duplicates(copy_of: Rows, told: Sequence[object]) -> Listed:
    order = np.nonzero(copy_of != np.arange(len(copy_of)))[0].tolist()
    kept = {row: int(copy_of[row]) for row in order}
    evidence = {row: f"the same pixels{_other_label(told, row, to)}" for row, to in kept.items()}
    sure = f"The same pixels are the same picture. {KEPT}{_other_labels(told, kept)}"
    return Listed("Duplicates", "The same pixels as another image.", sure, order, order, evidence, kept)


def _lookalikes(
    found: Neighbourhood, looks_like: Rows, ids: Sequence[str], told: Sequence[object], how: Curation
) -> Listed:
    near, nearest = found.similarity[:, 0], found.nearest[:, 0].tolist()
    order = np.nonzero(found.same != found.same[looks_like])[0].tolist()
    order = sorted(order, key=lambda row: (-near[row], ids[row]))
    kept = {row: int(looks_like[row]) for row in order}
    evidence = {}
    for row, to in kept.items():
        other = "" if found.same[to] == found.same[nearest[row]] else f"; kept of all that look like it: {ids[to]}"
        evidence[row] = f"cosine {_cosine(near[row])} with {ids[nearest[row]]}{other}{_other_label(told, row, to)}"
    sure = (
        "These are near, not the same: drawings that differ in colour alone are on it, and so are copies that were saved "
        f"anew or made paler. Look at each before you drop it. A chain of images, each near the next, is one group. {KEPT}"
    )
    if isinstance(how.encoder, Thumbnail):
        sure += " What is mirrored, cut out or moved by a pixel or two is not found."
    what = f"A cosine of {how.near:g} or more with an image of other pixels, by {_by(how)}."
    beside = {row: nearest[row] for row in order}
    return Listed("Lookalikes", what, sure + _other_labels(told, kept), order, order, evidence, beside)


def _cosine(value: float) -> str:
    """Of images with other pixels: never as if they were the same."""
    return "above 0.999" if value > 0.9995 - 1e-9 else f"{value:.3f}"


def _other_label(told: Sequence[object], row: int, kept: int) -> str:
    return "" if told[row] == told[kept] else f"; the labels differ: {told[row]}, {told[kept]}"


def _other_labels(told: Sequence[object], kept: Mapping[int, int]) -> str:
    count = sum(told[row] != told[to] for row, to in kept.items())
    also = f" Another label than the one that is kept: {count:,}. Of two labels of one picture one is often wrong."
    return also if count else ""


NO_LABELS = "the images have no labels (class folders, or a `label` column in metadata.jsonl)"


def _mislabelled(
    found: Neighbourhood,
    doubt: Doubt | None,
    model: Model | None,
    names: Callable[[int], str],
    one: Mask,
    ids: Sequence[str],
) -> Listed | str:
    """The list, or why there is none. `one` of a group is kept whatever its label: else the lists together take them all."""
    own = None if model is None or not model.reads else model.self_influence
    if doubt is None and own is None:
        knows = "" if model is None else ", and the model is told neither labels nor captions"
        return f"{NO_LABELS}, or all have the same{knows}"
    k = found.nearest.shape[1]
    place = np.zeros(len(found.same)) if doubt is None else np.nan_to_num(ranks(doubt.doubt))
    if own is not None:
        place = place + ranks(own)
    order = np.argsort(-place, kind="stable").tolist()
    likely = [] if doubt is None else [row for row in order if doubt.flagged[row]]
    kept = [row for row in likely if one[row]]
    evidence, what, sure = {}, [], []
    first = None if own is None else np.argsort(np.argsort(-own, kind="stable"), kind="stable")
    for row in order:
        say = []
        if doubt is not None and doubt.most[row] >= 0:
            say.append(f"{doubt.votes[row]} of its {k} nearest are {names(int(doubt.most[row]))}")
        if first is not None:
            say.append(f"self-influence: rank {first[row] + 1:,}")
        evidence[row] = "; ".join(say)
    evidence |= {row: f"{evidence[row]}; kept as the one of its copies or lookalikes" for row in kept}
    if doubt is not None:
        what.append(f"More than half of the {k} nearest other images have one other label.")
        sure.append(
            f"If one of these labels was put wrong at random, the list would hold it in {100 * doubt.finds:.0f} % of cases. "
            "What it holds may be right all the same, where classes look alike: look at each."
        )
    if model is not None and own is not None:
        alone = (
            "" if doubt is not None else " Without labels beside them there is no cut, and none is said to be wrong."
        )
        what.append(
            f"Ranked {'with' if doubt is not None else 'by'} self-influence by {model.method}: what the model learned of an "
            "image from that image alone."
        )
        sure.append(f"Rare images rank high by self-influence, too, not only wrong {model.reads}.{alone}")
    note = f"likely mislabelled, but kept as the one of its copies or lookalikes: {some(ids[row] for row in kept)}"
    return Listed(
        "Likely mislabelled",
        " ".join(what),
        " ".join(sure),
        order,
        [row for row in likely if not one[row]],
        evidence,
        note=note if kept else "",
        shown=order if doubt is None else likely,
    )


def _hurt(model: Model, found: Harm, how: Curation) -> Listed:
    order = np.lexsort((-found.harm, ~found.flagged)).tolist()
    drop = [row for row in order if found.flagged[row]]
    what = (
        f"More against the {found.pictures:,} pictures than for them by {model.method}, every picture counting alike: the "
        "mean over pictures of the share of all scores."
    )
    few = f"; {found.pictures:,} are too few, so that none is said to hurt" if found.pictures < FEW_PICTURES else ""
    sure = (
        f"Of those listed about {100 * how.rate:g} % are chance of which pictures were asked about (t-test, false discovery "
        f"rate{few}). Whether the method is right is not in it: its LDS says that, and taking them away and training again. "
        "What hurts these pictures may help others."
    )
    unsure = ["" if np.isnan(error) else f" ± {error:.1g}" for error in found.stderr]
    evidence = {row: f"harm {found.harm[row]:.2g}{unsure[row]}" for row in order}
    return Listed("Hurt most", what, sure, order, drop, evidence)


def _outliers(found: Neighbourhood, z: Array, far: Mask, how: Curation) -> Listed:
    order = np.argsort(-z, kind="stable").tolist()
    flat = int(found.flat.sum())
    told = f" {flat:,} are of one colour, which is near to nothing." if flat else ""
    what = f"Far from its {found.nearest.shape[1]} nearest by {_by(how)}: modified z-score above {how.far:g}.{told}"
    sure = "Rare is not wrong: look at each. A set of several kinds has outliers at the edge of every kind."
    evidence = {row: "of one colour" if found.flat[row] else f"z {z[row]:.1f}" for row in order}
    beside = {row: int(found.nearest[row, 0]) for row in order if found.nearest[row, 0] >= 0}
    return Listed("Outliers", what, sure, order, [row for row in order if far[row]], evidence, beside)


# ------------------------------------------------------------------------------------------------------------ written


def write(found: Curated, images: Images, folder: Path, title: str, about: Mapping[str, object]) -> list[str]:
    """All files of a folder; returns a line for each list.

    Args:
        found: the lists.
        images: as they look.
        folder: of the results.
        title: of the page.
        about: what was asked, kept in clean.json.
    """
    lines, sections, counts = [], [], {}
    for name, each in found.lists.items():
        write_bytes(folder / f"{name}.csv", as_csv(_of(found.table, each.order)))
        path = folder / "drop" / f"{name}.txt"
        write_names(path, [images.ids[row] for row in each.drop])
        counts[name] = {"title": each.title, "what": each.what, "sure": each.sure, "drop": len(each.drop)}
        dropped = set(each.drop)
        rows = each.drop if each.shown is None else each.shown
        shown = [Evidence(row, each.evidence[row], each.beside.get(row), row in dropped) for row in rows]
        sure = f"{each.sure} {each.note[:1].upper()}{each.note[1:]}." if each.note else each.sure
        more = len(each.order) - len(shown)
        sections.append(Section(name, each.title, each.what, sure, shown, len(dropped), f"drop/{name}.txt", more))
        lines.append(f"{name}: {len(each.drop):,} of {len(images):,} ({path})")
        lines += [f"{name}: {each.note}"] if each.note else []
    lines += [f"{name}: not looked for, {why}" for name, why in found.absent.items()]
    write_bytes(folder / "images.csv", as_csv(found.table))
    for note in (as_datasets(folder / "images.parquet", found.table, images),
                 fiftyone_samples(folder / "fiftyone.json", found.table, images)):  # fmt: skip
        lines += [note] if note else []
    write_bytes(folder / "clean.html", clean_page(title, images, found.table["label"], sections, found.absent))
    write_json(folder / "clean.json", {"format_version": FORMAT_VERSION, **about, "images": len(images), "lists": counts,
                                       "absent": dict(found.absent)})  # fmt: skip
    return lines


def _of(table: Table, rows: Sequence[int]) -> Table:
    return {name: [column[row] for row in rows] for name, column in table.items()}
