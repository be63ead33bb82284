"""How well methods find the exemplars of fine-tunes among the base's own images: `whence abc fit` and `whence abc judge`.

    recall at K        exemplars among the K first, over exemplars          K = 5, 10, 100
    average precision  sum_j (j / rank_j) over exemplars j, over exemplars
    calibration error  see `maps.calibration_error`; kappa and beta are those of the other fine-tunes, of scores in standard
                       deviations of each query

of each query, a picture that a fine-tune drew. Its own exemplars and the distractors are ranked, nobody else's exemplars.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from whence.evaluation.exemplars import FIT, TEST, Exemplars, FineTune, opened_at
from whence.evaluation.maps import (
    LABEL,
    Calibration,
    Known,
    Learning,
    average_precisions,
    calibrate,
    calibration_error,
    learn_and_calibrate,
)
from whence.evaluation.retrieval import recall_at_k
from whence.features.encoders import Encoder
from whence.features.maps import Maps, encoder_named
from whence.methods import build, check_needs
from whence.methods.inner_product import InnerProduct
from whence.models import encode_images, open_model
from whence.storage.files import made, progress, read_json, write_json
from whence.storage.scores import load_scores, save_scores
from whence.training.order import Together
from whence.types import Engine, Images, Method, Scores, Task, WhenceError, describe

CUTS = (5, 10, 100)
AT_ONCE = 64
MOST = 2_000
"""Distractors that maps are learned against, at most."""
Array = NDArray[np.float64]


def embedded(encoder: Encoder, images: Images) -> Tensor:
    """Rows of an encoder that does not look at a model: [n, k].

    Args:
        encoder: that.
        images: pictures.
    """
    pictures, forward, network = images.pictures, None, nn.Module()
    with torch.no_grad():
        found = [
            encoder(network, forward, pictures.batch(range(start, min(start + AT_ONCE, len(pictures)))))  # type: ignore[arg-type]
            for start in range(0, len(pictures), AT_ONCE)
        ]
    return torch.cat(found).float()


def fit(benchmark: Exemplars, encoder: str, how: Learning, folder: Path) -> Maps:
    """Learn maps on the fine-tunes that are for learning, and write them.

    Args:
        benchmark: finished.
        encoder: by its name (see `features.maps.encoder_named`).
        how: they are learned.
        folder: of the maps, a new one.
    """
    if folder.exists():
        raise WhenceError("is there already", str(folder), "a new folder")
    found = encoder_named(encoder)
    known = [Known(embedded(found, each.exemplars), embedded(found, each.drawn)) for each in benchmark.of(FIT)]
    order = sorted(range(len(benchmark.distractors)), key=lambda row: benchmark.distractors.digests[row])
    pool = embedded(found, benchmark.distractors)[order]
    few = np.random.default_rng(0).permutation(len(pool))[:MOST].tolist()
    learned = learn_and_calibrate(known, pool[few], how)
    notes = {
        "benchmark": benchmark.digest,
        "learned_on": [each.name for each in benchmark.of(FIT)],
        "exemplars": sorted({digest for each in benchmark.of(FIT) for digest in each.exemplars.digests}),
        "strength": learned.strength,
        "encoder_alone": learned.without[0],
        "left_out": learned.without[1],
        "kappa": learned.calibration.kappa,
        "beta": learned.calibration.beta,
        "shares_are": LABEL,
        "learning": describe(how),
    }
    maps = Maps(encoder, how.kind, learned.sides, notes)
    maps.write(folder)
    return maps


# ----------------------------------------------------------------------------------------------------------------- judging


@dataclass(frozen=True)
class Asked:
    """What is judged, and how.

    Args:
        methods: name -> settings.
        engine: how the work is carried out.
    """

    methods: Mapping[str, Mapping[str, object]]
    engine: Engine = Engine()


def judge(benchmark: Exemplars, asked: Asked, root: Path) -> dict[str, Any]:
    """A row per method: how well it finds the exemplars of the fine-tunes that are for judging.

    Args:
        benchmark: finished.
        asked: the methods.
        root: where scores are kept as they are finished; a run that was cut off goes on there.
    """
    judged = benchmark.of(TEST)
    for name, settings in asked.methods.items():  # before anything is computed
        _check_maps(benchmark, build(name, open_model(benchmark.base).forward, settings))
    found: dict[str, list[tuple[Array, NDArray[np.bool_]]]] = {name: [] for name in asked.methods}
    seconds = dict.fromkeys(asked.methods, 0.0)
    for fine_tune in progress(judged, "fine-tunes"):
        task = _task(benchmark, fine_tune, asked.engine, root / fine_tune.name)
        truth = np.zeros((len(fine_tune.drawn), len(task.train)), bool)
        truth[:, len(benchmark.distractors) :] = True
        for name, settings in asked.methods.items():
            scores, took = _scored(benchmark, name, settings, task, root / fine_tune.name / "rows" / name)
            found[name].append((scores.values.double().numpy(), truth))
            seconds[name] += took
    rows = {name: {**row_of(found[name]), "seconds": seconds[name]} for name in asked.methods}
    sizes = [len(each.exemplars) for each in judged]
    result = {
        "fine_tunes": [each.name for each in judged],
        "kind": benchmark.notes["kind"],
        "exemplars": sizes,
        "queries": sum(len(each.drawn) for each in judged),
        "distractors": len(benchmark.distractors),
        "chance": {"recall": {str(k): k / (len(benchmark.distractors) + min(sizes)) for k in _cuts(benchmark)}},
        "shares_are": LABEL,
        "rows": rows,
    }
    write_json(made(root) / "judged.json", result)
    return result


def _cuts(benchmark: Exemplars) -> list[int]:
    return [k for k in CUTS if k <= len(benchmark.distractors)]


def _task(benchmark: Exemplars, fine_tune: FineTune, engine: Engine, root: Path) -> Task:
    """Who made these pictures, the exemplars or one of the base's images?"""
    opened = opened_at(benchmark.base, fine_tune.model, benchmark.notes["kind"])
    sides = {"distractors": benchmark.distractors, "exemplars": fine_tune.exemplars, "drawn": fine_tune.drawn}
    column = benchmark.notes["caption_column"]
    seen = {name: encode_images(opened, images, made(root / name), engine, column) for name, images in sides.items()}
    train = Together((seen["distractors"], seen["exemplars"]))
    return Task(opened.forward, (opened.final,), train, seen["drawn"], root, engine)


def _scored(
    benchmark: Exemplars, name: str, settings: Mapping[str, object], task: Task, folder: Path
) -> tuple[Scores, float]:
    """Scores of a method, those that are kept where they are of the same settings, and the seconds that they took."""
    method = build(name, task.forward, settings)
    _check_maps(benchmark, method)
    noted = {"method": describe(method)}
    if (folder / "row.json").is_file():
        row = read_json(folder / "row.json", dict[str, Any])
        if row.get("method") == noted["method"]:
            return load_scores(folder / "scores"), float(row.get("seconds", 0.0))
    check_needs(name, task)
    begun = time.monotonic()
    scores = method(task)
    took = time.monotonic() - begun
    save_scores(folder / "scores", scores)
    write_json(folder / "row.json", {**noted, "seconds": took})
    return scores, took


def _check_maps(benchmark: Exemplars, method: Method) -> None:
    """Refuse maps that learned what is judged: on these fine-tunes, or in another benchmark on their exemplars."""
    encoder = getattr(method.train, "encoder", None) if isinstance(method, InnerProduct) else None
    maps = getattr(encoder, "maps", None)
    if not isinstance(maps, Maps):
        return
    judged = benchmark.of(TEST)
    names = {each.name for each in judged} if maps.notes.get("benchmark") == benchmark.digest else set[str]()
    both = sorted(names & set(_texts(maps, "learned_on")))
    if both:
        raise WhenceError(f"its maps were learned on {', '.join(both)}, which are judged", "abc_cosine", "other maps")
    known = set(_texts(maps, "exemplars"))
    both = [each.name for each in judged if known & {*each.exemplars.digests}]
    if both:
        told = f"its maps were learned on the exemplars of {', '.join(both)}, which are judged"
        raise WhenceError(told, "abc_cosine", "maps of this benchmark, or of other exemplars")


def _texts(maps: Maps, name: str) -> list[str]:
    found = maps.notes.get(name)
    return [str(each) for each in found] if isinstance(found, list) else []


def row_of(found: Sequence[tuple[Array, NDArray[np.bool_]]], resamples: int = 2000) -> dict[str, Any]:
    """Metrics of a method, each with an interval over fine-tunes drawn again, and queries in them.

    Args:
        found: scores [m, n] and truth [m, n] of each fine-tune.
        resamples: of the intervals.
    """
    row: dict[str, Any] = {"map": interval([average_precisions(*each) for each in found], resamples)}
    least = min(scores.shape[1] for scores, _ in found)
    for k in (k for k in CUTS if k <= least):
        row[f"recall@{k}"] = interval([recall_at_k(*each, k) for each in found], resamples)
    row["calibration_error"] = _left_out_error(found)
    return row


def interval(values: Sequence[Array], resamples: int) -> list[float]:
    """Mean and 95 % interval of a number per query, fine-tunes drawn again, and queries in each.

    Args:
        values: of each fine-tune [m].
        resamples: how often.
    """
    rng = np.random.default_rng(0)
    means = []
    for _ in range(resamples):
        drawn = rng.integers(0, len(values), len(values))
        means.append(np.concatenate([rng.choice(values[at], len(values[at])) for at in drawn]).mean())
    low, high = np.quantile(means, [0.025, 0.975])
    return [float(np.concatenate(list(values)).mean()), float(low), float(high)]


def _left_out_error(found: Sequence[tuple[Array, NDArray[np.bool_]]]) -> float | None:
    """The calibration error, each fine-tune by the calibration of the others; None where there is but one, or where scores
    do not differ."""
    if len(found) < 2 or any((scores.std(1) == 0).any() for scores, _ in found):
        return None
    in_sd = [(scores / scores.std(1, keepdims=True), truth) for scores, truth in found]
    p = []
    for left in range(len(in_sd)):
        others = [each for number, each in enumerate(in_sd) if number != left]
        known = calibrate([(row, truth) for values, told in others for row, truth in zip(values, told, strict=True)])
        p.append(known(in_sd[left][0]))
    most = max(each.shape[1] for each in p)
    padded = [np.pad(each, ((0, 0), (0, most - each.shape[1]))) for each in p]
    truth = [np.pad(told, ((0, 0), (0, most - told.shape[1]))) for _, told in in_sd]
    return calibration_error(np.concatenate(padded), np.concatenate(truth))


def shares(scores: Scores, maps: Maps) -> Array:
    """The calibrated probability that each training image is retrieved as an exemplar of each picture: [m, n], rows sum
    to 1. No causal influence.

    Args:
        scores: of `abc_cosine`, by these maps.
        maps: whose calibration it is.
    """
    method = scores.recipe.get("method")
    encoder = method.get("train", {}).get("encoder", {}) if isinstance(method, Mapping) else {}
    if encoder.get("maps") != maps.notes["tensors"]:
        raise WhenceError("these scores are not of abc_cosine by these maps", "abc shares", "the maps of the run")
    known = Calibration(float(str(maps.notes["kappa"])), float(str(maps.notes["beta"])))
    return known(scores.values.double().numpy())
