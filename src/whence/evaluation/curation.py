"""What a curator asks of training images: which are there twice, which look alike, which may have a wrong label, which are
unlike the others, and which the model was hurt by.

    c_il       cosine of images i and l: of thumbnails without their mean, or of an encoder's rows
    duplicate  the same pixels
    lookalike  other pixels, and c_il >= near
    apart_i    1 - mean of c_il over the k nearest l                          far from its neighbours: an outlier
    doubt_i    most votes of another label among the k nearest - those of its own, / k
    harm_i     -mean_j s[j, i] / |s[j, :]|                                    opposed to pictures that the model should make

Neighbours are among images with different pixels, so that an image that lies there twice does not vote for itself. Sources:
distance to the k nearest as a mark of outliers, Ramaswamy et al. 2000; the vote of the others over a label, Wilson 1972
("edited nearest neighbours"); the cut of outliers, the modified z-score of Iglewicz & Hoaglin 1993; which of many tests to
believe, Benjamini & Hochberg 1995.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.stats import false_discovery_control, t
from sklearn.neighbors import NearestNeighbors
from torch import nn

from whence.diffusion.forward import Classifier
from whence.evaluation.neighbours import FLAT, OfPictures
from whence.features.encoders import Thumbnail
from whence.storage.arrays import tensor_digest
from whence.storage.files import progress
from whence.storage.tables import Array, Mask
from whence.types import Engine, Images, Scores, WhenceError, check_signed

Rows = NDArray[np.int64]
DIGITS = 6  # the others depend on how sums are grouped
READ = 64
FEW_PICTURES = 8
"""With fewer pictures nothing is said of harm: a mean of so few tells little, and its error less."""
SPREAD = 0.6745  # of a normal distribution, the median of absolute deviations


SMALL = Thumbnail(32)


@dataclass(frozen=True)
class Curation:
    """What counts as suspicious.

    Args:
        neighbours: k, images that are asked about each.
        near: the cosine from which on two images look alike.
        far: the modified z-score above which an image is an outlier.
        rate: the share of false ones among the images that are said to hurt.
        encoder: by what images are compared.
    """

    neighbours: int = 10
    near: float = 0.99
    far: float = 3.5
    rate: float = 0.05
    encoder: OfPictures = SMALL

    def __post_init__(self) -> None:
        for name, value, low, high in (
            ("near", self.near, 0, 1),
            ("rate", self.rate, 0, 1),
            ("far", self.far, 0, np.inf),
        ):
            if not low < value < high:
                raise WhenceError(f"{name} is {value:g}", "clean", f"above {low}{f' and below {high}' * (high == 1)}")
        if self.neighbours < 1:
            raise WhenceError(f"neighbours is {self.neighbours}", "clean", "1 or more")


@dataclass(frozen=True, eq=False)
class Neighbourhood:
    """The nearest other pictures of each image.

    Args:
        same: the first image by name that has the same pixels, itself where that is it [n].
        flat: images of one colour, which are near to nothing [n].
        nearest: rows of the k nearest images with other pixels, the nearest first [n, k]; -1 where there is none.
        similarity: their cosines [n, k]; NaN likewise.
    """

    same: Rows
    flat: Mask
    nearest: Rows
    similarity: Array

    @cached_property
    def apart(self) -> Array:
        """1 - mean cosine of the neighbours [n]; NaN for images that have none."""
        return np.asarray(1 - self.similarity.mean(axis=1))


def neighbourhood(images: Images, how: Curation = Curation(), engine: Engine = Engine()) -> Neighbourhood:
    """The nearest other pictures of each image. One pass over the images; their rows are held in memory.

    Args:
        images: as they look, n of them.
        how: how many neighbours, and by what they are compared.
        engine: device of the encoder.
    """
    n = len(images)
    unit, pixels = _rows(images, how.encoder, engine)
    first = {pixels[row]: row for row in sorted(range(n), key=lambda row: images.ids[row], reverse=True)}
    same = np.array([first[digest] for digest in pixels], np.int64)
    flat: Mask = np.logical_not(np.any(unit, axis=1, keepdims=True))[:, 0]
    # By content: which of equals is the neighbour does not depend on the order of the files.
    there = np.array(sorted((row for row in first.values() if not flat[row]), key=lambda row: pixels[row]), np.int64)
    k = min(how.neighbours, len(there) - 1)
    if k < 1:
        raise WhenceError(f"{max(len(there), 0)} images differ and can be compared", "clean", "two or more")
    distance, near = NearestNeighbors(n_neighbors=k, metric="cosine", algorithm="brute").fit(unit[there]).kneighbors()
    order = np.lexsort((near, np.round(distance, DIGITS)))
    distance, near = (np.take_along_axis(table, order, 1) for table in (distance, near))
    nearest, similarity = np.full((n, k), -1), np.full((n, k), np.nan)
    nearest[there], similarity[there] = there[near], np.round(1 - distance.astype(np.float64), DIGITS)
    return Neighbourhood(same, flat, nearest[same], similarity[same])


def _rows(images: Images, encoder: OfPictures, engine: Engine) -> tuple[NDArray[np.float32], list[str]]:
    """Unit rows, zero for images of one colour [n, width], and the digests of the pixels."""
    found, pixels = [], []
    small = isinstance(encoder, Thumbnail)
    for start in progress(range(0, len(images), READ), "comparing images"):
        batch = images.batch(list(range(start, min(start + READ, len(images)))))
        pixels += [tensor_digest(picture) for picture in batch.x0]
        moved = batch.to("cpu" if small else engine.device, torch.float64 if small else torch.float32)
        with torch.no_grad():
            values = encoder(nn.Module(), Classifier(), moved).double().cpu()
        bad = (~torch.isfinite(values)).any(1).nonzero()
        if len(bad):
            raise WhenceError("what is compared of it holds NaN or Inf", f"image {images.ids[start + int(bad[0])]!r}",
                              "finite numbers")  # fmt: skip
        norm = values.norm(dim=1, keepdim=True)
        found.append(torch.where(norm > FLAT, values / norm, 0.0).float().numpy())
    return np.concatenate(found), pixels


# ------------------------------------------------------------------------------------------------------------ the lists


def duplicates(found: Neighbourhood, names: Sequence[str], labels: Rows | None = None) -> Rows:
    """The image with the same pixels that is kept of each; itself where it is that or has no copy [n].

    Kept is one with the label that most of the copies and of their neighbours have, each with one vote; of these the first
    by name.

    Args:
        found: the neighbours.
        names: of the images.
        labels: class of each image [n]; None for none.
    """
    return _kept(found.same, found, names, labels, np.ones(len(names), bool))


def lookalikes(
    found: Neighbourhood, names: Sequence[str], labels: Rows | None = None, near: float = Curation.near
) -> Rows:
    """The image that is kept of each and all that look like it, chosen as among copies; itself where it is that [n].

    Groups hang together by pairs: a chain of images, each near the next, is one group. Copies are in the same one, and what
    is kept of a group is kept of its copies, too.

    Args:
        found: the neighbours.
        names: of the images.
        labels: class of each image [n]; None for none.
        near: the cosine from which on two images look alike.
    """
    n = len(names)
    left, place = np.nonzero(found.similarity >= near)  # false for NaN
    pairs = np.concatenate([np.stack([left, found.nearest[left, place]]), np.stack([np.arange(n), found.same])], axis=1)
    group = connected_components(coo_array((np.ones(pairs.shape[1]), pairs), shape=(n, n)), directed=False)[1]
    return _kept(group, found, names, labels, duplicates(found, names, labels) == np.arange(n))


def _kept(group: Rows, found: Neighbourhood, names: Sequence[str], labels: Rows | None, among: Mask) -> Rows:
    """Of each image the one that is kept of its group, one of those `among` which is chosen [n]."""
    labels = np.zeros(len(names), np.int64) if labels is None else labels
    groups: dict[int, list[int]] = defaultdict(list)
    for row in sorted(range(len(names)), key=lambda row: names[row]):
        groups[int(group[row])].append(row)
    kept = np.arange(len(names))
    for rows in groups.values():
        if len(rows) > 1:
            votes = _votes_on(rows, found, labels)
            asked = [row for row in rows if among[row]]
            kept[rows] = asked[int(np.argmax([votes[int(labels[row])] for row in asked]))]
    return kept


def _votes_on(rows: Sequence[int], found: Neighbourhood, labels: Rows) -> Counter[int]:
    """The votes of a group and of the mean neighbours of its images for each label, in whole numbers: times the group."""
    near = found.nearest[rows]
    votes = Counter(labels[near[near >= 0]].tolist())
    for label in labels[rows].tolist():
        votes[label] += len(rows)
    return votes


@dataclass(frozen=True, eq=False)
class Doubt:
    """What the neighbours say of the labels.

    Args:
        doubt: of each label, from -1 (all have it) to 1 (all have one other); NaN where nobody was asked [n].
        most: the label that most of the others have [n]; -1 where nobody was asked.
        votes: how many of them have it [n].
        flagged: whether more than half have one other label [n].
        finds: the share of labels put wrong at random, drawn as often as labels occur, that would be flagged.
    """

    doubt: Array
    most: Rows
    votes: Rows
    flagged: Mask
    finds: float


def doubts(found: Neighbourhood, labels: Rows) -> Doubt:
    """Whether the neighbours of an image have another label than it. Nobody votes on himself, so no training is needed.

    `finds` is exact for single mistakes among labels that are right: a wrong label of one image changes nobody's vote on it.

    Args:
        found: the neighbours.
        labels: class of each image, two or more of them [n].
    """
    n, k = found.nearest.shape
    asked = found.nearest[:, 0] >= 0
    names, own = np.unique(labels, return_inverse=True)
    votes = np.zeros((n, len(names)), np.int64)
    for place in range(k):
        np.add.at(votes, (np.nonzero(asked)[0], own[found.nearest[asked, place]]), 1)
    others, mine = votes.copy(), votes[np.arange(n), own]
    others[np.arange(n), own] = -1
    top, most = votes.argmax(axis=1), votes.max(axis=1)
    clear = asked & (most > k / 2)
    frequency = np.bincount(own, minlength=len(names)) / n
    missed = np.where(top == own, 0.0, frequency[top] / np.maximum(1 - frequency[own], 1 / n))
    finds = float((clear * (1 - missed))[asked].mean())
    doubt = np.where(asked, (others.max(axis=1) - mine) / k, np.nan)
    return Doubt(doubt, np.where(asked, names[top], -1), most, clear & (top != own), finds)


def outliers(found: Neighbourhood, far: float = Curation.far) -> tuple[Array, Mask]:
    """How far each image is from its neighbours, as modified z-score of log apart_i, and which are too far [n], [n].

    Images of one colour are infinitely far. The logarithm, because distances are skewed: most images are near to some.

    Args:
        found: the neighbours.
        far: the z-score above which an image is an outlier.
    """
    apart = np.log(np.clip(found.apart, 10.0**-DIGITS, None))
    known = ~np.isnan(apart)
    centre = float(np.median(apart[known]))
    spread = float(np.median(np.abs(apart[known] - centre))) / SPREAD
    z = np.divide(apart - centre, spread, out=np.zeros_like(apart), where=spread > 0) if spread > 0 else apart * 0
    z = np.where(found.flat, np.inf, z)
    return z, z > far


@dataclass(frozen=True, eq=False)
class Harm:
    """What images did against some pictures.

    Args:
        harm: mean share of a picture's scores that opposes it [n]; above 0 where an image did more against than for them.
        stderr: its standard error over the pictures [n].
        q: the share of false ones among all that are at least as sure [n]; 1 with fewer than FEW_PICTURES pictures.
        flagged: whether q is at most the rate [n].
        pictures: that were counted: those for which any image has a score that is not 0.
    """

    harm: Array
    stderr: Array
    q: Array
    flagged: Mask
    pictures: int


def harm(scores: Scores, rate: float = Curation.rate) -> Harm:
    """Which images did more against the pictures than for them: opponents, summed over pictures of equal weight.

    A t-test over the pictures, one-sided, with the false discovery rate of Benjamini & Hochberg: it says that other pictures
    of the kind would be opposed, too. It does not say that the method is right.

    Args:
        scores: of pictures that the model should make, [m, n].
        rate: the share of false ones among those flagged.
    """
    check_signed("clean", scores)
    values = scores.values.double().numpy()
    size = np.linalg.norm(values, axis=1, keepdims=True)
    values = -(values / np.where(size > 0, size, 1))[size[:, 0] > 0]
    m, n = len(values), values.shape[1]
    if m < FEW_PICTURES:
        nothing = np.full(n, np.nan)
        mean = values.mean(axis=0) if m else np.zeros(n)
        return Harm(mean, nothing, np.ones(n), np.zeros(n, bool), m)
    mean, stderr = values.mean(axis=0), values.std(axis=0, ddof=1) / m**0.5
    sure = np.divide(mean, stderr, out=np.where(mean > 0, np.inf, -np.inf), where=stderr > 0)
    q = np.asarray(false_discovery_control(t.sf(sure, m - 1)))
    return Harm(mean, stderr, q, (q <= rate) & (mean > 0), m)


def ranks(values: Array) -> Array:
    """Where each value stands among all, from 0 (lowest) to 1 (highest) [n]; equal ones share a place, NaN has none."""
    known = ~np.isnan(values)
    ordered = np.sort(values[known])
    low, high = (np.searchsorted(ordered, values, side) for side in ("left", "right"))
    return np.where(known, (low + high) / 2 / max(1, len(ordered)), np.nan)
