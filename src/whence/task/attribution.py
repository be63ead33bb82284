"""`whence.attribute`: a model, its training images and pictures in, scores out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import FunctionType
from typing import Any

from torch import nn

from whence.data.memory import InMemory
from whence.features.rows import identity
from whence.methods import build, entry
from whence.methods.candidates import Candidates
from whence.methods.registry import spelled, understood
from whence.methods.strongest import Strongest
from whence.models import Adapter
from whence.storage.hub import on_disk
from whence.storage.owned import claimed
from whence.storage.scores import save_scores
from whence.task.checks import check_methods, refuse_other_pictures
from whence.task.drawn import Sampling
from whence.task.request import Request, refuse_unlike, source_of, task_from_module
from whence.types import Engine, Forward, Images, Scores, WhenceError, describe, expect


def attribute(
    model: str | Path | tuple[nn.Module, Forward],
    train: str | Path | Images | InMemory,
    queries: str | Path | Images | InMemory | Sampling,
    method: str = "das",
    root: str | Path = "runs/whence",
    adapter: Adapter | None = None,
    engine: Engine = Engine(),
    **settings: Any,
) -> Scores:
    """Which training images made these pictures: scores [queries, training images], larger = did more for the picture.

    They are kept in the run folder, too, where `whence report`, `whence lds` and `whence.load_scores` find them.

    Args:
        model: a diffusers folder, or (module, forward).
        train: the training images: what `Request` or `tensor_images` takes, [n, C, H, W] in [-1, 1].
        queries: the pictures to explain, likewise.
        method: its name, as `whence methods` lists it.
        root: the run folder, made or gone on with.
        adapter: what was trained on the pipeline.
        engine: how the work is carried out.
        settings: those of the method; `errors`, whether standard errors are measured, too (True); `index`, a folder that
            runs on the same model and training images share, as `Request` has it; and `candidates`, so that only the
            training images are scored that `candidates_by` ("pixel_cosine", a method's name) ranks among the first so many
            of any query. Their scores are those that they would have anyway; and `top`, so that only the scores of so many
            of the strongest and of the weakest images of each query are kept, and nothing of m x n is held.
    """
    index, errors = settings.pop("index", None), settings.pop("errors", True)
    expect(errors, bool, "errors", "True or False")
    expect(root, (str, Path), "root", "a run folder")
    expect(engine, Engine, "engine", 'whence.Engine(device="cuda"), for example')
    candidates = _candidates(settings.pop("candidates", None), settings.pop("candidates_by", None))
    top = None if settings.get("top") is None else Strongest(settings.pop("top"))
    if top is not None and candidates is not None:
        raise WhenceError("top and candidates exclude each other", "attribute", "one of them")
    _refuse_objects(model, method)
    if isinstance(model, tuple):
        if adapter is not None:
            raise WhenceError(
                "an adapter lies on a pipeline folder", "attribute", "a module with what was trained in it"
            )
        task = task_from_module(*model, train, queries, root, engine, index, errors)  # type: ignore[arg-type]
        chosen = build(method, task.forward, settings)
    else:
        sides = (source_of("train", train), source_of("queries", queries))
        request = Request(on_disk(model), *sides, root, adapter, engine=engine, index=index, errors=errors)
        chosen = build(method, request.opened.forward, settings)
        check_methods(request, {method: chosen})
        task = request.task()
    refuse_other_pictures(task.root, [spelled(method)], identity(task.queries))
    with claimed(task.root, task.folder_of(task.train)):
        if top is not None:
            scores = top.score(task, chosen)
        elif candidates is None:
            scores = chosen(task)
        else:
            first = build(candidates.by, task.forward, {})
            candidates.check({candidates.by: first, method: chosen})
            scores = candidates.score(candidates.named(task, first(task)), chosen)
        call = {"method": spelled(method), "settings": describe(understood(entry(method).make, settings))}
        scores = replace(scores, recipe={**scores.recipe, "call": call})
        save_scores(task.root / "scores" / spelled(method), scores)
        return scores


def _candidates(count: int | None, by: str | None) -> Candidates | None:
    """What `candidates` and `candidates_by` among the settings say."""
    if count is None and by is not None:
        raise WhenceError(
            f"{by} names no candidates", "candidates_by", "how many of each query, candidates=50, besides"
        )
    return None if count is None else Candidates(count, by or Candidates.by)


def _refuse_objects(model: object, method: object) -> None:
    """What people hand over as they have it, and what else it takes."""
    if not isinstance(model, str | Path) and not (isinstance(model, tuple) and len(model) == 2):
        raise WhenceError(
            f"a {type(model).__name__} alone does not say how it is measured",
            "model",
            "a diffusers folder, or (module, forward): whence.Classifier(), whence.Denoiser(...) or whence.Custom(...)",
        )
    if isinstance(model, tuple):
        refuse_unlike(*model)
    if not isinstance(method, str):
        raise WhenceError(
            f"{method.__name__ if isinstance(method, FunctionType) else type(method).__name__} is no name",
            "method",
            'its name, like "trak", with its settings beside it; one that you made is called on a task: '
            "method(whence.task_from_module(...))",
        )
