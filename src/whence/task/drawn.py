"""Pictures that are drawn from the model to be explained: how, into which folder, and how they came about."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NotRequired, TypedDict

import torch
from torch import nn

from whence.data.decoding import header_size
from whence.data.images import ImageFolder
from whence.data.saving import save_png
from whence.diffusion.forward import FlowMatching
from whence.diffusion.noise import check_seed
from whence.features.rows import prepare
from whence.models import Model, Prompted, Recorded, draw_with_text, guidance_of, labels_in_turn, sample
from whence.storage.files import differences, file_digest, note_once, read_json, telling, text_of, write_json
from whence.storage.jsons import refuse_unexpected
from whence.types import Engine, Images, WhenceError, digest


@dataclass(frozen=True)
class Sampling:
    """Pictures to be drawn from a model: by DDIM (eta 0), or by Euler steps for flow matching.

    A class-conditional model draws its classes in turn, one that reads text the prompts in turn, with classifier-free
    guidance.

    Args:
        count: of the pictures.
        seed: of their first noise.
        steps: of the sampler.
        prompts: for a model that reads text, None for others.
        guidance: scale of the classifier-free guidance, 1 for none; that of the model's pipeline by default. A model that
            has none is drawn from without.
    """

    count: int
    seed: int = 0
    steps: int = 50
    prompts: Sequence[str] | None = None
    guidance: float | None = None

    def __post_init__(self) -> None:
        if self.count < 1 or self.steps < 1:
            raise WhenceError(f"{self.count} pictures in {self.steps} steps", "sampling", "1 or more of both")
        check_seed(self.seed)

    @property
    def texts(self) -> list[str] | None:
        """The prompt of each picture."""
        return None if self.prompts is None else [self.prompts[i % len(self.prompts)] for i in range(self.count)]

    @property
    def names(self) -> list[str]:
        """The name of each picture."""
        return [f"seed{self.seed}-{i:04d}" for i in range(self.count)]


def drawing(
    model: Model, how: Sampling, engine: Engine, resolution: int | None = None
) -> Callable[[nn.Module | None], torch.Tensor]:
    """How pictures are drawn from the model's network, or from another in its place.

    Args:
        model: a pipeline.
        how: the pictures.
        engine: how the work is carried out.
        resolution: their side, for a model that reads text; the model's own by default.
    """
    if model.reads_text != (how.prompts is not None):
        way = (
            "reads text: give --prompts FILE, a prompt per line"
            if model.reads_text
            else "is drawn from without prompts"
        )
        raise WhenceError(f"{model.folder}: this model {way}")
    most = model.forward.timesteps
    if how.steps > most and not isinstance(model.forward, FlowMatching):
        told = f"{how.steps} steps of the sampler (--num_inference_steps), but the model has {most} timesteps"
        raise WhenceError(told, str(model.folder), f"1 to {most}")
    texts = how.texts
    if texts is None:
        labels = labels_in_turn(model, how.count)
        scale = guidance_of(model, how.guidance)
        return lambda network: sample(model, how.count, how.seed, how.steps, labels, engine, network, scale)
    side = model.side(resolution)
    return lambda network: draw_with_text(model, texts, how.seed, how.steps, how.guidance, engine, side, network)


def drawable(
    model: Model, how: Sampling, engine: Engine, resolution: int | None = None
) -> tuple[Callable[[nn.Module | None], torch.Tensor], float | None]:
    """How pictures are drawn (see `drawing`), and the scale of guidance; or why they cannot be."""
    try:
        return drawing(model, how, engine, resolution), guidance_of(model, how.guidance)
    except WhenceError as error:
        raise WhenceError(f"{error}; or draw with diffusers and give --query_data_dir") from None


def prompts_in(path: Path) -> list[str]:
    """The prompts of a file, one per line."""
    accepted = "a text file with a prompt per line (--prompts)"
    found = [line.strip() for line in text_of(path, accepted).splitlines() if line.strip()]
    if not found:
        raise WhenceError("is empty", str(path), accepted)
    return found


def generated(model: Model, root: Path, how: Sampling, engine: Engine, resolution: int | None = None) -> Path:
    """A folder of pictures sampled from the model, made once: what is attributed is the 8-bit PNG, not the float.

    Drawn as `drawing` does; the prompts are the pictures' captions.

    Args:
        model: a pipeline.
        root: the run folder.
        how: the pictures.
        engine: how the work is carried out.
        resolution: their side, for a model that reads text; the model's own by default.
    """
    folder, sampler = root / GENERATED, "Euler" if isinstance(model.forward, FlowMatching) else "DDIM eta 0"
    recipe: dict[str, object] = {"model": model.final.digest, "seed": how.seed, "steps": how.steps, "sampler": sampler}
    recipe |= {"count": how.count, "schedule": schedule_digest(model)}
    texts = how.texts
    if how.prompts is not None:
        recipe["prompts"] = digest(list(how.prompts))
    draw, guidance = drawable(model, how, engine, resolution)
    recipe |= {} if guidance is None else {"guidance": guidance}
    recipe |= {} if model.vae is None else {"as": "the pipeline"}  # its scheduler's settings, its length of the text
    claim_pictures(root / NOTE, recipe, folder)
    if drawn(folder):
        return folder
    prepare(model.final, engine)  # weights that hold NaN are an error, not a strange picture
    pictures = draw(None)
    columns: list[dict[str, object]] = [{"seed": how.seed, "number": i} for i in range(how.count)]
    if texts is not None:
        columns = [{**column, "text": text} for column, text in zip(columns, texts, strict=True)]
    elif (labels := labels_in_turn(model, how.count)) is not None:
        columns = [{**column, "label": label} for column, label in zip(columns, labels.tolist(), strict=True)]
    return kept_pictures(folder, pictures.cpu().float(), how.names, columns, root / NOTE)


def schedule_digest(model: Model) -> str:
    """Of how a model is sampled and measured, as its scheduler_config.json says it."""
    said = {name: value for name, value in model.scheduler.items() if not name.startswith("_")}
    return digest([model.scheduler.get("_class_name"), said])


GENERATED, NOTE = "generated", "generated.json"
FILES = "files"
"""The field of a note that has the digests of what was drawn: folder -> file -> sha256."""
SINCE = ("schedule",)
"""Fields of notes that earlier versions did not write."""


def claim_pictures(note: Path, recipe: Mapping[str, object], *folders: Path) -> None:
    """Tie folders of pictures to how they are drawn, or refuse those that were drawn in another way, or changed since.

    Before anything is drawn: of two processes that begin at once, the slower one must not take the pictures of the other
    for its own.

    Args:
        note: the JSON file that says how.
        recipe: what decides the pictures.
        folders: that will hold them.
    """
    there = [folder for folder in folders if drawn(folder)]  # looked for before the note, which is written first
    if there and not note.exists():
        raise WhenceError(
            f"{there[0]} exists and is not empty, and no {note.name} tells how it was drawn; give a new folder"
        )
    noted = note_once(note, dict(recipe))
    refuse_unexpected(noted, Note, str(note), f"remove it and {', '.join(map(str, folders))} to draw again")
    asked = {name: value for name, value in recipe.items() if name in noted or name not in SINCE}
    different = differences(asked, {name: value for name, value in noted.items() if name != FILES})
    if not different:
        check_pictures(note, *there)
        note_pictures(note, *there)
    if different:
        holds = f"{there[0]} holds other pictures" if there else f"{note} was begun for other pictures"
        raise WhenceError(f"{holds} ({different[0]}); choose another output folder")


def drawn(folder: Path) -> bool:
    """Whether a folder of pictures is there: it appears whole."""
    return folder.is_dir() and any(folder.iterdir())


class Note(TypedDict):
    """What a note of drawn pictures says besides how they are drawn."""

    files: NotRequired[dict[str, dict[str, str]]]


def digests_in(folder: Path) -> dict[str, str]:
    """The digest of every file of a folder of pictures, by its name."""
    return {
        path.relative_to(folder).as_posix(): file_digest(path) for path in sorted(folder.rglob("*")) if path.is_file()
    }


def note_pictures(note: Path, *folders: Path) -> None:
    """Note the digests of drawn pictures of which none are noted yet: after they were drawn, or an earlier version was.

    Args:
        note: the JSON file that says how.
        folders: the pictures.
    """
    found = read_json(note, Note)
    files = {**{folder.name: digests_in(folder) for folder in folders}, **found.get(FILES, {})}
    if files != found.get(FILES, {}):
        with suppress(PermissionError):  # a finished run may be read-only
            write_json(note, {**found, FILES: files})


def check_pictures(note: Path, *folders: Path) -> None:
    """Refuse drawn pictures that are not what was drawn.

    Args:
        note: the JSON file that has their digests.
        folders: the pictures.
    """
    noted = read_json(note, Note).get(FILES, {})
    for folder in folders:
        now, before = digests_in(folder), noted.get(folder.name)
        changed = sorted(name for name in {*now, *(before or now)} if before and now.get(name) != before.get(name))
        if changed:
            told = (
                "is gone" if changed[0] not in now else "is not what was drawn" if changed[0] in before else "was added"
            )
            raise WhenceError(
                f"{told} ({len(changed)} of {len(before)} files)",
                str(folder / changed[0]),
                f"{folder} removed, to draw again",
            )


def check_drawn(folder: Path) -> None:
    """Refuse the folder of a run that holds other pictures than were drawn; any other folder is as it is."""
    note = folder.parent / NOTE
    if folder.name == GENERATED and folder.is_dir() and note.is_file():
        refuse_unexpected(read_json(note), DrawnHow, str(note), f"{folder} removed with it, to draw again")
        check_pictures(note, folder)


def kept_pictures(
    folder: Path,
    pictures: torch.Tensor,
    names: Sequence[str],
    columns: Sequence[Mapping[str, object]] | None = None,
    note: Path | None = None,
) -> Path:
    """Save claimed pictures, once: those that are there are the same, from an earlier run or a process beside this one.

    Args:
        folder: of the pictures.
        pictures: [b, C, H, W] in [-1, 1].
        names: of the files.
        columns: of their metadata; None for none.
        note: the JSON file that claims them, which gets their digests; None where there is none.
    """
    if not drawn(folder):
        try:
            save_png(folder, pictures, names, columns)
        except (OSError, WhenceError):
            if not drawn(folder):
                raise
    if note is not None:
        note_pictures(note, folder)
    return folder


class DrawnHow(TypedDict):
    """What generated.json says of how pictures were drawn."""

    model: str
    seed: int
    steps: int
    guidance: NotRequired[float]
    prompts: NotRequired[str]


def trajectory_of(model: Model, queries: Images, root: Path, engine: Engine) -> Recorded | None:
    """How the queries were sampled, where they are what `generated` drew from this model; None for others.

    Args:
        model: a pipeline.
        queries: the pictures to explain.
        root: the run folder, which keeps what is sampled once more.
        engine: how the work is carried out.
    """
    if not isinstance(queries, ImageFolder) or queries.folder is None or "number" not in queries.meta:
        return None
    if queries.folder.name != GENERATED:
        return None
    note = queries.folder.parent / NOTE
    recipe = read_json(note, DrawnHow) if note.is_file() else {}
    if recipe.get("model") != model.final.digest:
        return None
    with telling(queries.folder / "metadata.jsonl", "remove the folder, to draw again"):
        numbers, prompted = [int(str(number)) for number in queries.meta["number"]], None
    if "prompts" in recipe:
        if "text" not in queries.meta:
            return None
        # Its own size, whatever the queries are brought to now.
        first = queries.folder / queries.ids[0]
        side = header_size(first, str(first))[0]
        prompted = Prompted([str(text) for text in queries.meta["text"]], recipe.get("guidance"), side)
    guidance = None if prompted else recipe.get("guidance")
    return Recorded(model, queries.ids, numbers, recipe["seed"], recipe["steps"], root, engine, prompted, guidance)
