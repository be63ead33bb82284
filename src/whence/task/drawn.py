"""Pictures that are drawn from the model to be explained: how, into which folder, and how they came about."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from whence.data.images import ImageFolder
from whence.data.pixels import header_size
from whence.data.saving import save_png
from whence.diffusion.forward import FlowMatching
from whence.features.rows import prepare
from whence.models import Model, Prompted, Recorded, draw_with_text, guidance_of, labels_in_turn, sample
from whence.storage.files import differences, read_json, write_json
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
        told = (
            "reads text: give --prompts FILE, a prompt per line"
            if model.reads_text
            else "is drawn from without prompts"
        )
        raise WhenceError(f"{model.folder}: this model {told}")
    texts = how.texts
    if texts is None:
        labels = labels_in_turn(model, how.count)
        scale = guidance_of(model, how.guidance)
        return lambda network: sample(model, how.count, how.seed, how.steps, labels, engine, network, scale)
    side = resolution or model.resolution
    return lambda network: draw_with_text(model, texts, how.seed, how.steps, how.guidance, engine, side, network)


def prompts_in(path: Path) -> list[str]:
    """The prompts of a file, one per line."""
    if not path.is_file():
        raise WhenceError(f"--prompts {path}: no such file; accepted: a text file with a prompt per line")
    found = [line.strip() for line in path.read_text().splitlines() if line.strip()]
    if not found:
        raise WhenceError(f"--prompts {path} is empty; accepted: a text file with a prompt per line")
    return found


def generated(model: Model, root: Path, how: Sampling, engine: Engine, resolution: int | None = None) -> Path:
    """A folder of pictures sampled from the model, made once: what is attributed is the 8-bit PNG, not the float.

    Drawn as `drawing` does; the prompts are the pictures' captions. root: the run folder.
    """
    folder, sampler = root / "generated", "Euler" if isinstance(model.forward, FlowMatching) else "DDIM eta 0"
    recipe: dict[str, object] = {"model": model.final.digest, "seed": how.seed, "steps": how.steps, "sampler": sampler}
    recipe |= {"count": how.count}
    texts = how.texts
    if how.prompts is not None:
        recipe["prompts"] = digest(list(how.prompts))
    try:
        draw, guidance = drawing(model, how, engine, resolution), guidance_of(model, how.guidance)
    except WhenceError as error:
        raise WhenceError(f"{error}; or draw with diffusers and give --query_data_dir") from None
    recipe |= {} if guidance is None else {"guidance": guidance}
    recipe |= {} if model.vae is None else {"as": "the pipeline"}  # its scheduler's settings, its length of the text
    if folder.exists():
        different = differences(recipe, read_json(root / "generated.json"))
        if different:
            raise WhenceError(f"{folder} holds other pictures ({different[0]}); choose another output folder")
        return folder
    prepare(model.final, engine)  # weights that hold NaN are told as such, not as a strange picture
    pictures = draw(None)
    columns: list[dict[str, object]] = [{"seed": how.seed, "number": i} for i in range(how.count)]
    if texts is not None:
        columns = [{**column, "text": text} for column, text in zip(columns, texts, strict=True)]
    elif (labels := labels_in_turn(model, how.count)) is not None:
        columns = [{**column, "label": label} for column, label in zip(columns, labels.tolist(), strict=True)]
    write_json(root / "generated.json", recipe)
    return save_png(folder, pictures.cpu().float(), how.names, columns)


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
        told = Prompted([str(text) for text in queries.meta["text"]], recipe.get("guidance"), side)
    guidance = None if told else recipe.get("guidance")
    return Recorded(model, queries.ids, numbers, recipe["seed"], recipe["steps"], root, engine, told, guidance)
