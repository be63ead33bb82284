"""From what people have, a model folder and folders of images, to a task, its scores and its report."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from whence.data.images import ImageFolder, dataset_images, image_folder, tensor_images
from whence.data.pixels import header_size
from whence.data.saving import save_png
from whence.diffusion.forward import FlowMatching
from whence.features.rows import identity, prepare
from whence.methods import build
from whence.models import (
    Adapter,
    Model,
    Prompted,
    Recorded,
    draw_with_text,
    encode_images,
    labels_in_turn,
    open_model,
    sample,
)
from whence.report.page import render
from whence.storage.arrays import tensor_digest
from whence.storage.files import claim, differences, read_json, write_bytes, write_json
from whence.storage.scores import load_scores, save_scores
from whence.training.checkpoints import study_on
from whence.types import Checkpoint, Engine, Forward, Images, Scores, Task, Trainable, WhenceError, describe, digest


def task_from_pretrained(
    model: str | Path,
    train: str | Path | Images,
    queries: str | Path | Images,
    root: str | Path = "runs/whence",
    ensemble: Sequence[str | Path] = (),
    resolution: int | None = None,
    engine: Engine = Engine(),
    adapter: Adapter | None = None,
    caption_column: str = "text",
) -> Task:
    """A diffusers pipeline folder, its training images, and pictures to explain: anything that `image_folder` opens, a
    `datasets.Dataset`, or Images.

    root: the run folder, made or gone on with. ensemble: further pipelines trained alike, for methods that average
    over models. resolution: of the training; the model's sample size by default. adapter: what was trained on the pipeline
    (the ensemble is then one of such adapters). caption_column: of both sides' metadata, for models that read text.
    Folders are encoded as the model needs it (see `models.encode`); Images are taken as they are.
    """
    opened = open_model(model, adapter)
    others = [_alike(model, folder, adapter) for folder in ensemble]
    for other in others:
        different = differences(describe(opened.forward), describe(other.forward))
        if different:
            raise WhenceError(f"{other.folder} is not measured like {opened.folder} ({different[0]})")
    size = resolution or opened.resolution
    train = folder_images(train, size, opened.channels, Path(root))
    classes = train.classes if isinstance(train, ImageFolder) else None
    queries = folder_images(queries, size, opened.channels, None, classes)
    root = run_folder(Path(root), opened.final, train)
    sides = {"train": train, "queries": queries}
    seen = {
        name: encode_images(opened, images, root, engine, caption_column) if isinstance(images, ImageFolder) else images
        for name, images in sides.items()
    }
    made_of = {
        "folder": os.path.relpath(opened.folder.resolve(), root.resolve()),
        "adapter": adapter and {"is": type(adapter).__name__, "folder": os.path.relpath(adapter.folder, root)},
        "ensemble": [os.path.relpath(folder, root) for folder in ensemble],
        "caption_column": caption_column,
    }
    _note(root, sides, seen, made_of)
    study: Trainable | None = study_on(opened.folder, adapter, seen["train"])
    forward: Any = opened.forward if study is None else study.forward()  # with what the training declared
    return Task(
        forward,
        (*opened.checkpoints, opened.final),
        seen["train"],
        seen["queries"],
        root,
        engine,
        ensemble=tuple(other.final for other in others),
        study=study,
        sampled=trajectory_of(opened, queries, root, engine),
    )


def task_from_module(
    module: nn.Module,
    forward: Forward,
    train: Images | torch.Tensor,
    queries: Images | torch.Tensor,
    root: str | Path = "runs/whence",
    engine: Engine = Engine(),
) -> Task:
    """A network in memory and how it is measured; images as `Images` or tensors [b, C, H, W] in [-1, 1]."""
    train, queries = _images("train", train), _images("queries", queries)
    weights = {name: tensor_digest(value) for name, value in module.state_dict().items()}
    trained = [name for name, p in module.named_parameters() if p.requires_grad]  # what is attributed by default
    final = Checkpoint(lambda: module, digest([type(module).__name__, weights, trained], 64))
    return Task(forward, (final,), train, queries, run_folder(Path(root), final, train), engine)


def _alike(model: str | Path, other: str | Path, adapter: Adapter | None) -> Model:
    """A further model of an ensemble: a pipeline, or what lies on the same one."""
    return open_model(other) if adapter is None else open_model(model, replace(adapter, folder=Path(other)))


def folder_images(
    source: str | Path | Images,
    resolution: int | None,
    channels: int,
    cache_in: Path | None = None,
    classes: Sequence[str] | None = None,
) -> Images:
    """A folder, its shards or tables, or a `datasets.Dataset`, at the model's size; or images as they are."""
    if hasattr(source, "with_format"):  # whatever `datasets` has
        return dataset_images(source, resolution, channels, classes)
    if not isinstance(source, (str, Path)):
        return source
    cache = None if cache_in is None else cache_in / "digests.json"
    return image_folder(source, resolution, channels, classes, cache)


def run_folder(root: Path, final: Checkpoint, train: Images) -> Path:
    """A run folder belongs to one model and one set of training images."""
    claim(root, {"model": final.digest, "train": identity(train), "images": len(train)})
    return root


def trajectory_of(model: Model, queries: Images, root: Path, engine: Engine) -> Recorded | None:
    """How the queries were sampled, where they are what `generated` drew from this model."""
    if not isinstance(queries, ImageFolder) or queries.folder is None or "number" not in queries.meta:
        return None
    if queries.folder.name != "generated":
        return None
    note = queries.folder.parent / "generated.json"
    recipe = read_json(note) if note.is_file() else {}
    if recipe.get("model") != model.final.digest:
        return None
    numbers, told = [int(str(number)) for number in queries.meta["number"]], None
    if "prompts" in recipe:
        if "text" not in queries.meta:
            return None
        # Its own size, whatever the queries are brought to now.
        first = queries.folder / queries.ids[0]
        side = header_size(first, str(first))[0]
        told = Prompted([str(text) for text in queries.meta["text"]], recipe["guidance"], side)
    return Recorded(model, queries.ids, numbers, recipe["seed"], recipe["steps"], root, engine, told)


def _note(root: Path, sides: Mapping[str, Images], seen: Mapping[str, Images], model: Mapping[str, object]) -> None:
    """Where model and images of a run lie and how they are read, so that its report and its scores can be made again."""
    notes = {
        name: {
            "folder": os.path.relpath(images.folder.resolve(), root.resolve()),
            "classes": images.classes,
            "pictures": identity(images),
            "seen": identity(seen[name]),
            **images.preprocess,
        }
        for name, images in sides.items()
        if isinstance(images, ImageFolder) and images.folder is not None
    }
    write_json(root / "images.json", {"format_version": 1, "model": model, **notes})


def _seen(note: Mapping[str, Any], found: Images) -> str | None:
    """The identity of these pictures as the network saw them, None where the note is of others."""
    return note.get("seen") if note.get("pictures") == identity(found) else None


def pictures_of(images: Images) -> Images:
    """What a report shows: the pictures, where the network sees latents of them."""
    return images.pictures


def drawing(
    model: Model,
    count: int,
    seed: int,
    steps: int,
    engine: Engine,
    prompts: Sequence[str] | None = None,
    guidance: float = 1.0,
    resolution: int | None = None,
) -> Callable[[nn.Module | None], torch.Tensor]:
    """How pictures 0 .. count-1 of a seed are drawn from the model's network, or from another in its place.

    A class-conditional model draws its classes in turn, one that reads text the prompts in turn, with classifier-free
    guidance.
    """
    if model.reads_text != (prompts is not None):
        told = (
            "reads text: give --prompts FILE, a prompt per line"
            if model.reads_text
            else "is drawn from without prompts"
        )
        raise WhenceError(f"{model.folder}: this model {told}")
    if prompts is None:
        labels = labels_in_turn(model, count)
        return lambda network: sample(model, count, seed, steps, labels, engine, network)
    texts, side = _in_turn(prompts, count), resolution or model.resolution
    return lambda network: draw_with_text(model, texts, seed, steps, guidance, engine, side, network)


def prompts_in(path: Path) -> list[str]:
    """The prompts of a file, one per line."""
    if not path.is_file():
        raise WhenceError(f"--prompts {path}: no such file; accepted: a text file with a prompt per line")
    found = [line.strip() for line in path.read_text().splitlines() if line.strip()]
    if not found:
        raise WhenceError(f"--prompts {path} is empty; accepted: a text file with a prompt per line")
    return found


def _in_turn(prompts: Sequence[str], count: int) -> list[str]:
    return [prompts[i % len(prompts)] for i in range(count)]


def generated(
    model: Model,
    root: Path,
    count: int,
    seed: int,
    steps: int,
    engine: Engine,
    prompts: Sequence[str] | None = None,
    guidance: float = 1.0,
    resolution: int | None = None,
) -> Path:
    """A folder of pictures sampled from the model, made once: what is attributed is the 8-bit PNG, not the float.

    Drawn as `drawing` does; the prompts are the pictures' captions.
    """
    try:
        draw = drawing(model, count, seed, steps, engine, prompts, guidance, resolution)
    except WhenceError as error:
        raise WhenceError(f"{error}; or draw with diffusers and give --query_data_dir") from None
    folder, sampler = root / "generated", "Euler" if isinstance(model.forward, FlowMatching) else "DDIM eta 0"
    recipe = {"model": model.final.digest, "seed": seed, "steps": steps, "sampler": sampler, "count": count}
    if prompts is not None:
        recipe |= {"prompts": digest(list(prompts)), "guidance": guidance}
    if folder.exists():
        different = differences(recipe, read_json(root / "generated.json"))
        if different:
            raise WhenceError(f"{folder} holds other pictures ({different[0]}); choose another output folder")
        return folder
    prepare(model.final, engine)  # weights that hold NaN are told as such, not as a strange picture
    pictures = draw(None)
    columns: list[dict[str, Any]] = [{"seed": seed, "number": i} for i in range(count)]
    if prompts is not None:
        columns = [{**column, "text": text} for column, text in zip(columns, _in_turn(prompts, count), strict=True)]
    elif (labels := labels_in_turn(model, count)) is not None:
        columns = [{**column, "label": label} for column, label in zip(columns, labels.tolist(), strict=True)]
    write_json(root / "generated.json", recipe)
    return save_png(folder, pictures.cpu().float(), [f"seed{seed}-{i:04d}" for i in range(count)], columns)


def attribute(
    model: str | Path | tuple[nn.Module, Forward],
    train: str | Path | Images | torch.Tensor,
    queries: str | Path | Images | torch.Tensor,
    method: str = "d_trak",
    root: str | Path = "runs/whence",
    engine: Engine = Engine(),
    adapter: Adapter | None = None,
    caption_column: str = "text",
    **settings: Any,
) -> Scores:
    """Which training images made these pictures: scores [queries, training images], larger = did more for the picture.

    model: a diffusers folder, or (module, forward). train, queries: what `task_from_pretrained` takes, or
    tensors [b, C, H, W] in [-1, 1].
    adapter, caption_column: see `task_from_pretrained`. settings: those of the method (see `whence methods`).
    """
    if isinstance(model, tuple):
        task = task_from_module(*model, train, queries, root, engine)  # type: ignore[arg-type]
    else:
        task = task_from_pretrained(
            model, _in_memory(train), _in_memory(queries), root, (), None, engine, adapter, caption_column
        )
    return build(method, task.forward, settings)(task)


def _in_memory(images: Any) -> Any:
    return tensor_images(images) if isinstance(images, torch.Tensor) else images


def _images(name: str, given: Any) -> Images:
    if isinstance(given, (str, Path)):
        raise WhenceError(f"{name}={str(given)!r}: a module needs Images; use whence.image_folder({str(given)!r})")
    return _in_memory(given)


def explain(task: Task, methods: Mapping[str, Mapping[str, Any]], title: str, facts: Mapping[str, str]) -> Path:
    """Run methods (name -> settings), save their scores, and write the report; returns its path."""
    results = {}
    for name, settings in methods.items():
        found = build(name, task.forward, settings)(task)
        # What `whence replay` builds the method from again.
        results[name] = replace(
            found, recipe={**found.recipe, "call": {"method": name, "settings": describe(settings)}}
        )
        save_scores(task.root / "scores" / name, results[name])
    path = write_report(task.root, results, pictures_of(task.train), pictures_of(task.queries), title, facts)
    write_json(task.root / "report.json", {"title": title, "facts": list(facts.items()), "methods": list(methods)})
    return path


def write_report(
    folder: Path, results: Mapping[str, Scores], train: Images, queries: Images, title: str, facts: Mapping[str, str]
) -> Path:
    """Write `report.html` and `gallery.png` (see `report.page.render`) into a folder; returns the path of the page."""
    for name, content in render(results, train, queries, title, facts).items():
        write_bytes(folder / name, content)
    return folder / "report.html"


def report_again(root: Path, train: Path | None = None, queries: Path | None = None) -> Path:
    """The report of a finished run, with all methods that have scores in it. train, queries: where the images are now, if
    they moved; those that were scored and no others."""
    there = {path.parent.name for path in root.glob("scores/*/scores.json")}
    if not there:
        raise WhenceError(f"{root} holds no finished scores; run `whence attribute ... --output_dir {root}` first")
    if not (root / "images.json").is_file() or not (root / "report.json").is_file():
        raise WhenceError(f"{root} does not say where its images are; run `whence attribute` in it once more")
    notes, page = read_json(root / "images.json"), read_json(root / "report.json")
    order = [name for name in page["methods"] if name in there]
    results = {name: load_scores(root / "scores" / name) for name in [*order, *sorted(there - {*order})]}

    def images(name: str, option: str, folder: Path | None) -> Images:
        note = notes.get(name)
        if note is None:
            raise WhenceError(f"the {name} images of {root} were in memory; use whence.task.write_report in Python")
        found = image_folder(folder or root / note["folder"], note["resolution"], note["channels"], note["classes"])
        for method, scores in results.items():
            if scores.recipe.get(name, identity(found)) not in (identity(found), _seen(note, found)):
                raise WhenceError(f"{found.folder} holds other images than {method} was computed for; give {option}")
        return found

    sides = images("train", "--train_data_dir", train), images("queries", "--query_data_dir", queries)
    return write_report(root, results, *sides, page["title"], dict(page["facts"]))
