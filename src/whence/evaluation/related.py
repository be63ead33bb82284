"""A folder of LoRAs: which is related to which, as tables, JSON and a picture.

loras.csv                  a row per LoRA: its nearest neighbour, and why it has none
pairs.csv                  a row per pair: both cosines, the layers they share, and why they cannot be compared
plain.csv, centred.csv     the whole matrices
query.csv                  of the LoRA asked about: all others, the most similar first
loras.json                 all but the matrices, for programs; written last
loras.png                  the matrix in the order of a tree (average linkage of 1 - cosine)
"""

from __future__ import annotations

import csv
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray
from scipy.cluster.hierarchy import dendrogram, linkage
from scipy.spatial.distance import squareform

from whence.data.layout import some
from whence.evaluation.loras import KINDS, Labelled, Relations, labelled, nearest, relations
from whence.models.lora_changes import Change, Collection, base_told, changes, lora_collection
from whence.storage.columns import as_csv, valid_text
from whence.storage.files import FORMAT_VERSION, progress, text_of, write_bytes, write_json, writing
from whence.types import WhenceError

matplotlib.use("Agg")
SAME = 1 - 1e-9  # a cosine above it is of one and the same change
FARTHEST = 2.0  # 1 - cosine of opposites, and of what cannot be compared
SHOWN, NAMED, ORDERED = 30, 60, 300  # lines of a table, names in a picture, leaves that are put in the best order
Labels = Mapping[str, str | None]
Table = dict[str, list[object]]


@dataclass(frozen=True, eq=False)
class Related:
    """The LoRAs of a folder.

    Args:
        relations: of all that could be read.
        kind: of the cosine that neighbours are found by.
        labels: of each; None where it has none.
        told: how often neighbours have the same label; None where labels do not allow to ask.
        layers: that each changes.
        unread: what could not be read, or is no LoRA: why.
        inside: files in the folders of LoRAs that were left out.
        query: the name of the one asked about; "" for none.
    """

    relations: Relations
    kind: str
    labels: Labels
    told: Labelled | None
    layers: Mapping[str, int]
    unread: Mapping[str, str]
    inside: Sequence[str]
    query: str = ""

    @property
    def cosine(self) -> NDArray[np.float64]:
        return self.relations.of(self.kind)


def related(folder: Path, query: Path | None = None, labels: Path | None = None, kind: str = "plain") -> Related:
    """Which LoRAs below a folder are related.

    Args:
        folder: of the LoRAs.
        query: one that is asked about, in the folder or elsewhere; what is taken away by `centred` is the mean of the
            folder's.
        labels: a CSV file with columns lora and label; by default LoRAs that lie in subfolders have these as labels.
        kind: "plain" or "centred".

    Raises:
        WhenceError: fewer than two LoRAs that can be read, or a query that cannot.
    """
    there = lora_collection(folder)
    given = None if labels is None else _read_labels(labels, there.loras)
    read, bases, unread = _read(there)
    own, asked = list(read), ""
    if query is not None:
        same = [name for name in own if there.loras[name].resolve() == query.resolve()]
        asked = same[0] if same else str(query)
        if not same:
            read[asked], bases[asked] = changes(query), base_told(query)
    if len(own) < 2 - bool(query is not None and asked not in own):
        first = "".join(f"; {name}: {why}" for name, why in list(unread.items())[:1])
        told = f"{len(own)} LoRAs in it can be read{first}"
        raise WhenceError(told, str(folder), "2 or more of diffusers, peft or kohya, in files or subfolders")
    _tell_bases(bases)
    found = relations(read, own)
    every = {name: _folder_of(name) if given is None else given.get(name) for name in own} | (
        {} if asked in own or not asked else {asked: None}
    )
    try:
        judged = labelled(found.of(kind), list(every.values()))
    except WhenceError:
        if given is not None:
            raise
        judged = None  # subfolders that are no labels
    layers = {name: len(change) for name, change in read.items()}
    return Related(found, kind, every, judged, layers, unread, there.inside, asked)


def _read(there: Collection) -> tuple[dict[str, Mapping[str, Change]], dict[str, str], dict[str, str]]:
    """What each changes, the base that it tells of, and what could not be read."""
    read: dict[str, Mapping[str, Change]] = {}
    bases, unread = dict[str, str](), dict(there.others)
    for name in progress(list(there.loras), "LoRAs"):
        try:
            read[name], bases[name] = changes(there.loras[name]), base_told(there.loras[name])
        except WhenceError as error:
            read.pop(name, None)
            unread[name] = " ".join(str(error).split())
    return read, bases, unread


def _folder_of(name: str) -> str | None:
    """The first of several folders that a LoRA lies in."""
    return name.split("/")[0] if "/" in name else None


def _read_labels(path: Path, loras: Mapping[str, Path]) -> dict[str, str]:
    accepted = "a CSV file with the columns lora and label, and a row per LoRA"
    rows = csv.DictReader(text_of(path, accepted).splitlines())
    if not {"lora", "label"} <= {*(rows.fieldnames or ())}:
        raise WhenceError(f"its columns are {some(rows.fieldnames or ['none'], 5)}", str(path), accepted)
    found: dict[str, str] = {}
    for row in rows:
        name, label = ((row[column] or "").strip() for column in ("lora", "label"))
        if name not in loras:
            raise WhenceError(f"there is no LoRA {name!r}", str(path), f"names such as {some(loras, 5)}")
        if name in found or not label:
            raise WhenceError(f"{name} has {'two labels' if name in found else 'no label'}", str(path), accepted)
        found[name] = label
    return found


def _tell_bases(bases: Mapping[str, str]) -> None:
    """Warn where LoRAs say that they are for several bases: layers of the same shape tell nobody."""
    told: dict[str, list[str]] = {}
    for name, base in bases.items():
        if base:
            told.setdefault(base, []).append(name)
    if len(told) > 1:
        which = some(f"{base} ({some(names, 1)})" for base, names in told.items())
        what = f"the LoRAs say that they are for {len(told)} bases: {which}"
        warnings.warn(f"{what}; if these differ, cosines between their LoRAs mean nothing", stacklevel=3)


# ------------------------------------------------------------------------------------------------------------- tables


def neighbours(found: Related) -> Table:
    """A row per LoRA."""
    names, cosine = found.relations.names, found.cosine
    table: Table = {"lora": [], "label": [], "nearest": [], "similarity": [], "nearest_label": [], "layers": []}
    table |= {"norm": [], "note": []}
    for i, j in enumerate(nearest(cosine).tolist()):
        one, name = names[j] if j >= 0 else "", names[i]
        beside = (
            (one, float(cosine[i, j]), found.labels[one], "") if one else ("", None, None, _alone(found.relations, i))
        )
        row = (name, found.labels[name], *beside[:3], found.layers[name], float(found.relations.norms[i]), beside[3])
        for column, value in zip(table.values(), row, strict=True):
            column.append(value)
    for name, why in found.unread.items():
        for column, value in zip(table.values(), (name, None, "", None, None, None, None, why), strict=True):
            column.append(value)
    return table


def _alone(relations: Relations, i: int) -> str:
    """Why a LoRA has no neighbour."""
    if relations.norms[i] == 0:
        return "it changes nothing: B A = 0"
    reasons = sorted({why for pair, why in relations.reasons.items() if i in pair})
    return "; ".join(reasons[:2]) or "without the mean nothing is left of it to compare"


def pairs(found: Related, of: str = "") -> Table:
    """A row per pair, or per pair of one LoRA, the most similar first.

    Args:
        found: what is known.
        of: name of the LoRA; "" for all.
    """
    relations, n = found.relations, len(found.relations.names)
    every = list(combinations(range(n), 2))
    if of:
        i = relations.names.index(of)
        order = np.argsort(-np.nan_to_num(found.cosine[i], nan=-np.inf), kind="stable")
        every = [(i, int(j)) for j in order if j != i]
    table: Table = {"lora": [relations.names[i] for i, _ in every], "other": [relations.names[j] for _, j in every]}
    for kind, cosine in relations.cosine.items():
        table[kind] = [_number(cosine[pair]) for pair in every]
    table["shared_layers"] = [int(relations.shared[pair]) for pair in every]
    table["share_of_lora"] = [_number(relations.coverage[i, j]) for i, j in every]
    table["share_of_other"] = [_number(relations.coverage[j, i]) for i, j in every]
    table["note"] = [relations.reasons.get((min(pair), max(pair)), "") for pair in every]
    return table


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def matrix(names: Sequence[str], cosine: NDArray[np.float64]) -> Table:
    """All cosines, a row and a column per LoRA; nothing where two cannot be compared."""
    table: Table = {"": list(names)}
    for name, column in zip(names, cosine.T, strict=True):
        table[name] = [_number(value) for value in column]
    return table


def write_related(found: Related, folder: Path) -> None:
    """All tables, the picture, and loras.json, which is last.

    Args:
        found: what is known.
        folder: that they are written to.
    """
    names = found.relations.names
    tables = {"loras": neighbours(found), "pairs": pairs(found)}
    tables |= {kind: matrix(names, cosine) for kind, cosine in found.relations.cosine.items()}
    if found.query:
        tables["query"] = pairs(found, found.query)
    for stale in {*KINDS, "query"} - {*tables}:
        (folder / f"{stale}.csv").unlink(missing_ok=True)  # of a run before
    for name, table in tables.items():
        write_bytes(folder / f"{name}.csv", as_csv(table))
    plot(found, folder / "loras.png")
    rows = neighbours(found)
    plain = {
        "format_version": FORMAT_VERSION,
        "similarity": found.kind,
        "loras": [dict(zip(rows, row, strict=True)) for row in zip(*rows.values(), strict=True)],
        "labels": None if found.told is None else asdict(found.told),
        "order": [names[i] for i in tree(found.cosine)[1]],
        "not_compared": [[names[i], names[j], why] for (i, j), why in found.relations.reasons.items()],
        "unread": dict(found.unread),
        "left_out": list(found.inside),
        "query": found.query or None,
    }
    write_json(folder / "loras.json", plain)


# ------------------------------------------------------------------------------------------------------- tree and picture


def tree(cosine: NDArray[np.float64]) -> tuple[NDArray[np.float64], list[int]]:
    """Average linkage of 1 - cosine, and the LoRAs that can be compared with another in the order of its leaves.

    Args:
        cosine: of all pairs [n, n]; those that cannot be compared are as far apart as opposites.
    """
    there = np.flatnonzero(nearest(cosine) >= 0)
    if len(there) < 2:
        return np.zeros((0, 4)), there.tolist()
    apart = np.nan_to_num(1 - cosine[np.ix_(there, there)], nan=FARTHEST).clip(0)
    np.fill_diagonal(apart, 0)
    links = linkage(squareform(apart, checks=False), "average", optimal_ordering=len(there) <= ORDERED)
    return links, there[dendrogram(links, no_plot=True)["leaves"]].tolist()


def plot(found: Related, path: Path) -> None:
    """The tree, and the matrix in its order; the diagonal, which is 1, and what cannot be compared are left grey.

    Args:
        found: what is known.
        path: of the PNG.
    """
    links, order = tree(found.cosine)
    side = min(4 + 0.22 * len(order), 16)
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(side + 4, side), width_ratios=(1, 4), layout="constrained", squeeze=True
    )
    left.axis("off")
    if len(links):
        height = np.clip(links[:, 2], 0, None)
        dendrogram(links, ax=left, orientation="left", no_labels=True, color_threshold=0, above_threshold_color="black")
        left.set_xlim(1.05 * float(height.max()) or 1, 0)
        left.invert_yaxis()
    _heat_map(right, found, order)
    left_out = len(found.relations.names) - len(order) + len(found.unread)
    told = f"; {left_out} that cannot be compared are left out" if left_out else ""
    figure.suptitle(f"Cosine of what {len(order)} LoRAs change, {found.kind}{told}")
    with writing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
    plt.close(figure)


def _heat_map(axes: Axes, found: Related, order: Sequence[int]) -> None:
    shown = found.cosine[np.ix_(order, order)].copy()
    np.fill_diagonal(shown, np.nan)
    largest = float(np.nanmax(np.abs(shown), initial=1e-3))
    axes.set_facecolor("lightgrey")
    image = axes.imshow(shown, cmap="RdBu_r", vmin=-largest, vmax=largest, aspect="auto", interpolation="nearest")
    axes.figure.colorbar(image, ax=axes, label="cosine", location="bottom", shrink=0.6)
    axes.yaxis.tick_right()
    names = [found.relations.names[i] for i in order] if len(order) <= NAMED else []
    texts = [ascii(name)[1:-1].replace("$", r"\$")[-40:] for name in names]  # the end tells more than the beginning
    axes.set_xticks([])
    axes.set_yticks(range(len(names)), texts, fontsize=8)


# --------------------------------------------------------------------------------------------------------------- words


def lines(found: Related) -> Iterator[str]:
    """What was found, for a terminal."""
    rows = list(zip(*neighbours(found).values(), strict=True))
    for name, label, one, similarity, other, *_, note in rows[:SHOWN]:
        told = f"nearest {one}{_of(other)}, cosine {similarity:.3f}" if one else str(note)
        yield valid_text(f"{name}{_of(label)}: {told}")
    if len(rows) > SHOWN:
        yield f"... and {len(rows) - SHOWN} more in loras.csv"
    if found.told is not None:
        yield judgement(found.told)
    yield from _of_query(found)
    yield from _notes(found)


def _of_query(found: Related) -> Iterator[str]:
    """Whether what is asked about is nearer to its neighbour than LoRAs of different labels are to each other."""
    names, cosine = list(found.relations.names), found.cosine
    if found.told is None or found.query not in names:
        return
    labels = [found.labels.get(name) for name in names]
    own = [i for i, label in enumerate(labels) if label is not None and names[i] != found.query]
    apart = [float(cosine[i, j]) for i, j in combinations(own, 2) if labels[i] != labels[j]]
    row = [float(cosine[names.index(found.query), i]) for i in own]
    known = [[each for each in some if np.isfinite(each)] for some in (apart, row)]
    if all(known) and max(known[1]) <= max(known[0]):
        near, far = max(known[1]), max(known[0])
        told = f"is no nearer to any of them ({near:.3f}) than those of different labels are to each other (up to {far:.3f})"
        yield valid_text(f"{found.query} {told}: no label is told")


def _of(label: object) -> str:
    return "" if label is None else f" ({label})"


def judgement(told: Labelled) -> str:
    """How well neighbours tell labels."""
    few = f"{told.correct} of {told.count} have a nearest neighbour with their label"
    return f"{few} ({told.labels} labels); chance has {told.chance:.1f}, p = {told.p:.2g}"


def _notes(found: Related) -> Iterator[str]:
    """What was left out, and what looks odd."""
    names, reasons = found.relations.names, found.relations.reasons
    without = sum(label is None for name, label in found.labels.items() if name != found.query)
    if found.told is not None and without:
        yield f"LoRAs without a label, which count for none: {without}"
    cosine = found.relations.cosine["plain"]
    same = [f"{names[i]} = {names[j]}" for i, j in combinations(range(len(names)), 2) if cosine[i, j] > SAME]
    if same:
        yield f"pairs that change the same, up to strength: {len(same)} ({some(same)})"
    if reasons:
        i, j = next(iter(reasons))
        yield f"pairs that cannot be compared: {len(reasons)}, such as {names[i]} and {names[j]}: {reasons[i, j]}"
    if found.unread:
        yield f"left out, since not read: {len(found.unread)} ({some(found.unread)}); loras.csv says why"
    if found.inside:
        yield f"left out in the folders of LoRAs: {len(found.inside)}, such as {found.inside[0]}"
