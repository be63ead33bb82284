"""Values of images, or of their owners, from a ledger: `Scores` that retraining itself gives, with standard errors."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from whence.data.owners import IMAGE, owners, standing_for
from whence.evaluation.games import Game, game_of
from whence.evaluation.ledger import Ledger
from whence.evaluation.outcomes import Table
from whence.evaluation.readers import SEEDS, VALUES, whole_game
from whence.features.rows import identity
from whence.methods.registry import unfit
from whence.methods.removal.leave_out import Estimate
from whence.methods.removal.semivalues import knn_shapley as knn_values
from whence.plain import owner_of
from whence.storage.owned import claim
from whence.storage.scores import save_scores
from whence.task import note_images, write_report
from whence.task.reports import note_page
from whence.types import VERSION, Images, Scores, WhenceError, describe

ITSELF = "itself"
"""The query of `memorization`, where every training image is its own."""


def values(ledger: Ledger, method: str = "shapley", by: str = IMAGE, name: str = "loss", **settings: object) -> Scores:
    """What each training image, or owner of some, did FOR each measured picture, by retraining.

    Scores [m, k] of k players in units of the measured output: how much better it is with a player than without, on average
    over the subsets that the method names. `stderr` is what other seeds, and other subsets where they were drawn, would
    change; NaN where every subset was trained with one seed.

    Args:
        ledger: run, and measured under the name.
        method: a key of `readers.VALUES`.
        by: "image", or a column of the training images whose values are the players.
        name: of the measurement (`whence ledger measure --name`).
        settings: those of the method.

    Raises:
        WhenceError: the ledger lacks the trainings that the method reads, or a setting is none of its.
    """
    entry = VALUES.get(method)
    if entry is None:
        near = difflib.get_close_matches(method, VALUES, 3) or list(VALUES)
        raise WhenceError(f"no method {method!r} reads a ledger", "values", ", ".join(near))
    for key, value in settings.items():
        if key not in entry.settings:
            raise WhenceError(f"{method} has no setting {key!r}", "values", ", ".join(entry.settings) or "none")
        if accepted := unfit(entry.read, key, value):
            raise WhenceError(f"{key} is {value!r}", method, accepted)
    table = ledger.table(name)
    groups = owners(ledger.images, by)
    game = _game(table, groups, by, entry.semivalue)
    found = entry.read(game, **settings)
    _say_of_errors(method, found)
    recipe = {
        "whence": VERSION,
        "method": {"name": method, **settings},
        "values": {"by": by, "players": len(game.players), "trainings": found.runs, "torn": game.torn},
        "ledger": {key: ledger.notes[key] for key in ("masks", "study", "n")},
        "measurement": name,
        "train": identity(ledger.images),
        "queries": table.queries,
    }
    queries = [ITSELF] if method == "memorization" else list(table.query_ids)
    counts = {"images": [len(groups[player]) for player in game.players]}
    meta = ledger.images.meta if by == IMAGE and len(game.players) == len(ledger.images) else counts
    scores, errors = (torch.from_numpy(np.ascontiguousarray(each)) for each in (found.values, found.stderr))
    of = SEEDS if entry.semivalue and whole_game(game) is not None else entry.stderr_of  # of all subsets none was drawn
    return Scores(scores, queries, list(game.players), describe(recipe), entry.scale, True, meta, None, errors, of)


def _game(table: Table, players: Mapping[str, Sequence[int]], by: str, semivalue: bool) -> Game:
    """The game that was measured, for the players, and a warning of what is no part of it.

    Args:
        table: what was measured.
        players: name -> the rows of its images.
        by: what they are called.
        semivalue: whether players in all coalitions are the ground that the others stand on.
    """
    game = game_of(table, players)
    if len(game.players) < 2:
        raise WhenceError(
            f"one player ({game.players[0]!r}) has no value beside others", "by", "a column with two values"
        )
    whole = whole_game(game) if semivalue else None
    if whole is not None:
        always = [player for player in game.players if player not in whole.players]
        if always:
            told = f"{len(always)} of {len(game.players)} players are in all coalitions, and have no value of their own"
            warnings.warn(f"{told}: {', '.join(always[:5])}{' ...' if len(always) > 5 else ''}", stacklevel=4)
        return whole
    if game.torn:
        warnings.warn(
            f"{game.torn:,} of {len(game.units) + game.torn:,} trainings saw some images of a player and not the others, "
            f"and are left aside (--by {by})",
            stacklevel=4,
        )
    return game


def _say_of_errors(method: str, found: Estimate) -> None:
    if not np.isfinite(found.stderr).any():
        warnings.warn(
            f"{method}: every subset was trained with one seed, so that how much of the values is noise cannot be told; "
            "plan with --seeds 2 or more",
            stacklevel=4,
        )


def knn_shapley(train: Images, queries: Images, column: str = "label", k: int = 5) -> Scores:
    """KNN-Shapley: the exact Shapley value of the vote of the k nearest training images, by pixels, for the value that a
    column has for the picture. It asks no model and no retraining; see `semivalues.knn_shapley`.

    Args:
        train: the training images, with the column.
        queries: the pictures, with the column.
        column: of both, compared as text.
        k: neighbours that vote.
    """
    for what, images in (("training images", train), ("pictures to explain", queries)):
        if column not in images.meta:
            raise WhenceError(
                f"the {what} have no column {column!r} to vote for", "knn_shapley", ", ".join(images.meta) or "metadata"
            )
    rows, asked = (images.pictures.batch(range(len(images))).x0.flatten(1).double() for images in (train, queries))
    if rows.shape[1] != asked.shape[1]:
        raise WhenceError("training images and pictures have other sizes", "knn_shapley", "one --resolution for both")
    labels, votes = ([owner_of(value) for value in images.meta[column]] for images in (train, queries))
    found = knn_values(torch.cdist(asked, rows).numpy(), labels, votes, k)
    notes = {
        "whence": VERSION,
        "method": {"name": "knn_shapley", "column": column, "k": k},
        "train": identity(train),
        "queries": identity(queries),
    }
    scores, errors = (torch.from_numpy(each) for each in (found.values, found.stderr))
    none = "nothing: no part of it is drawn by chance"
    return Scores(scores, queries.ids, train.ids, notes, "value", True, train.meta, None, errors, none)


def write_values(
    found: Mapping[str, Scores], train: Images, queries: Images, by: str, root: Path, facts: Mapping[str, str]
) -> Path | None:
    """Write scores, their tables and the report into a run folder; the path of the page, None where the queries are the
    training images themselves, which no page shows.

    Args:
        found: method -> values of the same players.
        train: the training images.
        queries: the measured pictures.
        by: whose values they are.
        root: the folder, which belongs to these images from now on.
        facts: lines about ledger and data, name -> text.
    """
    claim(root, {"values": by, "train": identity(train), "images": len(train)})
    for method, scores in found.items():
        save_scores(root / "scores" / method, scores)
    shown = {method: scores for method, scores in found.items() if list(scores.query_ids) != [ITSELF]}
    if not shown:
        return None
    who = "were the training images" if by == IMAGE else f"was each {by}"
    title = f"What {who} worth to these pictures?"
    players = list(next(iter(shown.values())).train_ids)
    stand = standing_for(train.pictures, by, None if by == IMAGE else players)
    sides, seen = {"train": train.pictures, "queries": queries.pictures}, {"train": train, "queries": queries}
    note_images(root, sides, seen, None, {} if by == IMAGE else {"by": by, "players": players})
    if by != IMAGE:
        facts = {**facts, "Shown": f"one image of each {by}, which stands for all of its images"}
    path = write_report(root, shown, stand, queries.pictures, title, facts)
    note_page(root, title, facts, list(shown))
    return path
