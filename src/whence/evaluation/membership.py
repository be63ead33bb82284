"""Was this set of pictures used in training? The test of CDI (Dubinski et al. 2024, arXiv 2411.12858), p-value exact.

Every picture is measured by what attacks on membership look at (`features.membership`). A logistic regression learns to
tell the suspect pictures P from as many surely unseen ones U, on four fifths of both, and scores the fifth that it has not
seen, five times. If held-out suspects score higher, the model treats the two sets differently:

    t = (mean s_P - mean s_U) / sqrt(var s_P / n + var s_U / n)                              Welch's statistic, one-sided
    p = (1 + #{b : t_b >= t}) / (B + 1)              t_b  all of it again, with the labels of each fold shuffled

Differs from released code.
(1) p is that of a permutation test, valid for any n if P and U are of the same kind. CDI's is that of Welch's t-test on the
held-out scores, which takes them for independent: but each was scored by a regression that learned from the others. Where
nothing is to be found, that p falls below .01 several times as often as it says (benchmarks/copies.py); it is given besides,
as `welch_p`.
(2) It is one-sided: a two-sided test calls a reversed result significant.
(3) The regression finds any difference, also that of two kinds of pictures. So it is told besides whether the model's losses
are lower on the suspects, as they are on pictures that were learned; where they are not, nothing follows.

Traps. U must come from where P comes from (same artist, camera, size, file format, the same preparation) and must surely not
have been in the training: pictures made after it, or never published. Otherwise the test answers another question. Pictures
that occur twice would be learned and held out at once; they are refused.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from scipy.stats import rankdata, ttest_ind
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from whence.data.classes import Classes
from whence.data.images import ImageFolder, image_folder
from whence.data.layout import some
from whence.features.membership import NAMES, Signals
from whence.features.rows import rows
from whence.models import Model, encode_images, model_classes
from whence.storage.files import progress
from whence.types import Checkpoint, Engine, Forward, Images, Task, WhenceError

LEAST = 70
"""Pictures of each kind, at least: the smallest number for which CDI was shown to work."""
LEVEL = 0.01
"""The p at which the verdict changes, CDI's."""
SHUFFLES = 99
"""Permutations, at least: with fewer, p could not be as small as LEVEL, and the verdict would be no from the start."""
LOSSES = [place for place, name in enumerate(NAMES) if "loss" in name and "masked" not in name]


@dataclass(frozen=True)
class Comparison:
    """How the two sets are told apart.

    Args:
        folds: parts, each of which is scored by what was learned from the others.
        permutations: B, of the labels; p is never below 1 / (B + 1), so that a yes needs 99 or more.
        seed: of the permutations.
    """

    folds: int = 5
    permutations: int = 999
    seed: int = 0

    def __post_init__(self) -> None:
        if self.folds < 2 or self.permutations < 1:
            raise WhenceError(
                f"{self.folds} folds and {self.permutations} permutations",
                "membership",
                "2 folds or more, and 1 or more",
            )


@dataclass(frozen=True)
class Separation:
    """How well held-out rows of two sets are told apart.

    Args:
        p: of the permutation test.
        welch_p: of Welch's one-sided t-test, as published; too small where nothing is to be found.
        t: Welch's statistic.
        effect: difference of the mean scores in standard deviations (Cohen's d).
        auc: how often a held-out row of the first set scores higher than one of the second.
    """

    p: float
    welch_p: float
    t: float
    effect: float
    auc: float


@dataclass(frozen=True)
class Membership:
    """What the test found.

    Args:
        pictures: of each set.
        separation: how well they are told apart.
        loss_effect: how much lower the model's losses are on the suspects, in standard deviations; below 0 where they are
            higher.
        comparison: how it was tested.
        signals: what was measured of each picture.
        features: the names of that.
    """

    pictures: int
    separation: Separation
    loss_effect: float
    comparison: Comparison
    signals: Signals
    features: tuple[str, ...] = field(default=NAMES)

    @property
    def verdict(self) -> str:
        """In one sentence."""
        n, p = self.pictures, f"p = {self.separation.p:.3g}"
        if self.separation.p > LEVEL:
            return f"No sign that these {n:,} pictures were used in training ({p}, against as many unseen ones)."
        if self.loss_effect <= 0:
            return (
                f"The two sets differ ({p}), but not as learned and unseen pictures do, since the model's losses on the "
                f"{n:,} suspect ones are no lower: they are probably of different kinds, and nothing follows."
            )
        return (
            f"These {n:,} pictures, or a good part of them, were very probably used in training: the model does better on "
            f"them than on as many unseen ones, and chance alone rarely tells two such sets apart so well ({p})."
        )

    @property
    def caveat(self) -> str:
        """What the verdict does not mean."""
        if self.separation.p > LEVEL:
            return (
                "This does not show that they were not used: a model that has seen many pictures, or each of them seldom, "
                "may leave no trace that this test finds."
            )
        return (
            "This does not say which of them were used, nor that a picture was copied; and it holds only if the unseen "
            "pictures are surely unseen, of the same kind and prepared in the same way."
        )


def membership(
    checkpoint: Checkpoint,
    forward: Forward,
    suspects: Images,
    unseen: Images,
    root: Path,
    signals: Signals = Signals(),
    how: Comparison = Comparison(),
    engine: Engine = Engine(),
) -> Membership:
    """Whether a model was trained on a set of pictures. The result does not depend on their order or names.

    Args:
        checkpoint: the weights.
        forward: how the network is measured.
        suspects: P, as the network sees them.
        unseen: U, as many, of the same kind, which were surely not in the training.
        root: the folder that keeps what is measured.
        signals: what is measured of each picture.
        how: how the sets are told apart.
        engine: how the work is carried out.

    Raises:
        WhenceError: sets that cannot be compared, or too few pictures.
    """
    check_sets(suspects, unseen)
    if how.permutations < SHUFFLES:
        least = f"{SHUFFLES} or more: the smallest p that they allow is 1 / ({how.permutations} + 1), and {LEVEL:g} is a yes"
        raise WhenceError(f"{how.permutations} permutations can never say yes", "membership", least)
    task = Task(forward, (checkpoint,), suspects, unseen, root, engine)
    found = []
    for images, what in ((suspects, "suspect pictures"), (unseen, "unseen pictures")):
        values = rows(signals, task, checkpoint, images, what).all().double().numpy()
        # By content: neither the folds nor the permutations may depend on the names of files.
        found.append(values[np.argsort(np.array(images.digests))])
    first, second = found
    return Membership(len(suspects), separation(first, second, how), loss_effect(first, second), how, signals)


def check_sets(suspects: Images, unseen: Images) -> None:
    """Refuse sets that a test would lie about.

    Args:
        suspects: P.
        unseen: U.
    """
    p, u = len(suspects), len(unseen)
    where = "suspect and unseen pictures"
    if not u:
        raise WhenceError(
            "there are no unseen pictures, and without them nothing can be said", where, "as many of each"
        )
    if p != u:
        raise WhenceError(
            f"{p:,} suspect and {u:,} unseen ones", where, f"as many of each: {min(p, u):,} and {min(p, u):,}"
        )
    if p < LEAST:
        raise WhenceError(f"{p:,} of each are too few", where, f"{LEAST} of each, or more")
    shapes = [list(images.batch([0]).x0.shape[1:]) for images in (suspects, unseen)]
    if shapes[0] != shapes[1]:
        raise WhenceError(
            f"they are {shapes[0]} and {shapes[1]}", where, "pictures of one size, prepared in the same way"
        )
    for images, what in ((suspects, "suspect pictures"), (unseen, "unseen pictures")):
        times = Counter(images.digests)
        repeated = [name for name, digest in zip(images.ids, images.digests, strict=True) if times[digest] > 1]
        if repeated:
            raise WhenceError(f"{len(repeated)} are there more than once: {some(repeated)}", what, "each of them once")
    both = set(suspects.digests) & set(unseen.digests)
    names = [name for name, digest in zip(unseen.ids, unseen.digests, strict=True) if digest in both]
    if names:
        told = f"{len(names)} of the unseen pictures are suspects, too: {some(names)}"
        raise WhenceError(told, where, "unseen pictures that were surely not in the training")


def separation(first: np.ndarray, second: np.ndarray, how: Comparison = Comparison()) -> Separation:
    """How well held-out rows of two sets are told apart. Row i of either is in fold i modulo the folds.

    Args:
        first: rows of the suspects [n, d].
        second: rows of the unseen [n, d].
        how: folds and permutations.
    """
    n = len(first)
    values, own = np.concatenate([first, second]), np.repeat([True, False], n)
    fold = np.tile(np.arange(n) % how.folds, 2)
    cuts = list(_cuts(values, fold, how.folds))
    scores = _held_out(cuts, own)
    t, welch_p = _welch(scores, own)
    rng, reached = np.random.default_rng(how.seed), 0
    for _ in progress(range(how.permutations), "shuffling labels"):
        labels = own.copy()
        for k in range(how.folds):
            labels[fold == k] = rng.permutation(own[fold == k])
        reached += _welch(_held_out(cuts, labels), labels)[0] >= t
    return Separation(
        (1 + reached) / (how.permutations + 1), welch_p, t, _cohen(scores[own], scores[~own]), _auc(scores, own)
    )


@dataclass(frozen=True, eq=False)
class _Cut:
    """One fold: rows to learn from and rows to score, by their numbers, and standardised by the former."""

    learned: np.ndarray
    scored: np.ndarray
    inputs: np.ndarray
    asked: np.ndarray


def _cuts(values: np.ndarray, fold: np.ndarray, folds: int) -> Iterator[_Cut]:
    for k in range(folds):
        learned, scored = np.flatnonzero(fold != k), np.flatnonzero(fold == k)
        scale = StandardScaler().fit(values[learned])
        yield _Cut(learned, scored, scale.transform(values[learned]), scale.transform(values[scored]))


def _held_out(cuts: list[_Cut], labels: np.ndarray) -> np.ndarray:
    """The probability that a row is of the first set, by a regression that has not seen it: [2 n]."""
    scores = np.empty(len(labels))
    for cut in cuts:
        fitted = LogisticRegression(max_iter=1000).fit(cut.inputs, labels[cut.learned])
        scores[cut.scored] = fitted.predict_proba(cut.asked)[:, 1]
    return scores


def _welch(scores: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """Welch's t, and the probability of one as large if scores were independent."""
    found = ttest_ind(scores[labels], scores[~labels], equal_var=False, alternative="greater")
    return float(found.statistic), float(found.pvalue)


def _cohen(a: np.ndarray, b: np.ndarray) -> float:
    """(mean a - mean b) / sqrt((var a + var b) / 2); 0 where neither varies and the means are equal."""
    spread = np.sqrt((a.var(ddof=1) + b.var(ddof=1)) / 2)
    return float((a.mean() - b.mean()) / spread) if spread > 0 else 0.0


def _auc(scores: np.ndarray, own: np.ndarray) -> float:
    n = int(own.sum())
    return float((rankdata(scores)[own].sum() - n * (n + 1) / 2) / (n * (len(own) - n)))


def loss_effect(first: np.ndarray, second: np.ndarray) -> float:
    """How much lower the losses of the first set are: the mean of its standardised losses, as Cohen's d.

    Args:
        first: rows of the suspects [n, d], in the order of `features.membership.NAMES`.
        second: rows of the unseen [n, d].
    """
    losses = StandardScaler().fit_transform(np.concatenate([first, second])[:, LOSSES]).mean(1)
    return _cohen(losses[len(first) :], losses[: len(first)])


def pictures_of(
    model: Model,
    folder: Path,
    root: Path,
    resolution: int | None = None,
    caption_column: str | None = None,
    like: Images | None = None,
    engine: Engine = Engine(),
) -> Images:
    """The pictures of a folder as a model's network sees them.

    Pictures of other sizes than the model's are refused unless a size is asked for: how they are made small leaves traces,
    and if one set was and the other was not, the test finds that.

    Args:
        model: the pipeline.
        folder: anything that `image_folder` opens.
        root: the folder that keeps what is computed for that.
        resolution: side of the square that they are brought to.
        caption_column: of their metadata, for models that read text; "text" by default.
        like: the other set, whose classes these pictures have.
        engine: how the work is carried out.
    """
    classes = model_classes(model)
    known = None if like is None else like.pictures
    if isinstance(known, ImageFolder) and known.classes is not None:
        classes = Classes(known.classes, classes.count)
    found, side = image_folder(folder, resolution, model.channels, classes), model.side(resolution)
    if found.size != (side, side):
        width, height = found.size
        accepted = f"pictures of {side}x{side}, or --resolution {side} for both sets, if they are prepared alike"
        raise WhenceError(f"the pictures are {width}x{height}, the model's {side}x{side}", str(folder), accepted)
    return encode_images(model, found, root, engine, caption_column)
