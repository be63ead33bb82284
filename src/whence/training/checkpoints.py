"""checkpoint-N folders: written, gone on from, and read back as what made them.

whence.json          step, rate (in force there), study (recipe and digests), images (their digest), content (that of what
                     they show, whatever their names and order)
state.safetensors    weights, moments and averaged weights
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from types import NoneType
from typing import Any, NotRequired, TypedDict, cast

import torch
from torch import nn

from whence.features.rows import identity
from whence.models import PRIOR_FILE, Adapter, CustomDiffusion, Lora, Model, Prior
from whence.storage.arrays import read_checked, write_checked
from whence.storage.files import building, differences, move_in, read_json, telling, write_json
from whence.training.optimizer import State
from whence.training.recipe import Full, New, NewCustomDiffusion, NewLora, Recipe, Text
from whence.training.recipe_file import FILE, read_recipe
from whence.training.study import Study
from whence.training.subjects import INITIAL
from whence.types import Images, Weights, WhenceError, describe, digest


def checkpoint_folders(folder: Path) -> list[Path]:
    """The checkpoint-N folders that we wrote, by step."""
    found = [path.parent for path in folder.glob("checkpoint-*/whence.json") if path.parent.name[11:].isdecimal()]
    return sorted((path for path in found if "study" in notes_in(path)), key=lambda p: int(p.name[11:]))


class Notes(TypedDict):
    """What the whence.json of a checkpoint holds; of checkpoints that others made, its learning rate alone."""

    step: NotRequired[int]
    rate: NotRequired[float | None]
    study: NotRequired[dict[str, Any]]
    images: NotRequired[str]
    content: NotRequired[str]


def notes_in(folder: Path) -> dict[str, Any]:
    """What the whence.json of a checkpoint-N folder says."""
    found = read_json(folder / "whence.json", Notes, OTHERWISE)
    if "study" in found and not {"step", "images"} <= found.keys():
        raise WhenceError("says nothing of step and images", str(folder / "whence.json"), OTHERWISE)
    return cast("dict[str, Any]", found)


OTHERWISE = "restore it, or remove the checkpoint and train again"


def save_checkpoint(
    folder: Path, write: Callable[[Path], object], state: State, recipe: Recipe, notes: Mapping[str, object]
) -> None:
    """checkpoint-N: weights, the optimizer's state, our notes. Appears whole, by one rename.

    Args:
        folder: of the training.
        write: writes the raw weights into a folder.
        state: after step N.
        recipe: of the training.
        notes: kept in whence.json beside step and rate.
    """
    target = folder / f"checkpoint-{state.step}"
    with building(target) as temporary:
        write(temporary)
        parts = {"weights": state.weights, "m": state.m, "v": state.v, "ema": state.ema}
        flat = {f"{part}/{name}": w.clone() for part, values in parts.items() for name, w in values.items()}
        write_checked(temporary / "state.safetensors", flat, _of(notes, state.step))
        # The rate in force at this checkpoint is that of the step that led here.
        write_json(temporary / "whence.json", {"step": state.step, "rate": recipe.rate_at(state.step - 1), **notes})
        move_in(temporary, target)


def _of(notes: Mapping[str, object], step: int) -> str:
    """Of which training a state is, and after which step."""
    return f"{digest([notes.get('study'), notes.get('images')])}/{step}"


def load_state(folder: Path, notes: Mapping[str, object]) -> State:
    """Go on from a checkpoint-N folder, or refuse one that another recipe or another data set made."""
    found = notes_in(folder)
    different = differences(notes, {name: found.get(name) for name in notes})
    if different:
        raise WhenceError(
            f"{folder} is from another run ({different[0]}); use the same options or another --output_dir"
        )
    path = folder / "state.safetensors"
    flat = read_checked(path, OTHERWISE, _of(notes, int(found["step"])))
    parts: dict[str, Weights] = {"weights": {}, "m": {}, "v": {}, "ema": {}}
    for key, value in flat.items():
        part, _, name = key.partition("/")
        if part not in parts or not bool(torch.isfinite(value).all()):
            raise WhenceError(f"{key} is no part of a state of training, or not finite", str(path), OTHERWISE)
        parts[part][name] = value
    if len({tuple(sorted(values)) for values in parts.values()}) > 1:
        raise WhenceError("weights, moments and averages are of other parameters", str(path), OTHERWISE)
    return State(**parts, step=int(found["step"]))


def left_by(done: Path, network: nn.Module) -> bool:
    """Whether a network has the weights that its training left, as far as both name them.

    Args:
        done: the last checkpoint-N folder.
        network: read from what was saved at the end.
    """
    found, now = notes_in(done), network.state_dict()
    left = load_state(done, {name: found[name] for name in ("study", "images")}).ema
    return all(torch.equal(now[name].cpu(), value.to(now[name].dtype)) for name, value in left.items() if name in now)


def study_of(model: Path) -> Study:
    """The study that made a model folder of `whence train`, to be repeated on other images or with other seeds."""
    found = study_on(model)
    if found is None:
        raise WhenceError(
            f"{model} has no checkpoint-N/whence.json; only models made by `whence train` can be repeated"
        )
    return found


def study_on(base: Path, adapter: Adapter | None = None, images: Images | None = None) -> Study | None:
    """The study that made a model folder, or an adapter on it.

    None where it was not made by `whence train`, not on this base, or not from these images.

    Args:
        base: a model folder.
        adapter: what was trained on it; None for the model itself.
        images: the training images; None for any.
    """
    folder = base if adapter is None else adapter.folder
    done = checkpoint_folders(folder)
    if not done or not (folder / FILE).is_file():
        return None
    noted = notes_in(done[-1])
    if images is not None and noted["images"] != identity(images):
        return None
    with telling(folder / FILE, "restore it"):
        found = _bound(read_recipe(folder / FILE), base, adapter, noted["study"])
        if found is None:
            return None
        different = differences(noted["study"], describe(found))
    if any(line.startswith("recipe") for line in different):
        raise WhenceError(f"{folder / FILE} is not what {done[-1].name} was trained with ({different[0]}); restore it")
    return None if different else found


def content_of(images: Images) -> str:
    """The digest of what images show, whatever their names, order and size."""
    return digest(sorted(images.digests), 32)


def say_of_other_images(folder: Path, images: Images) -> None:
    """Warn that a model of `whence train` was trained on other images than those at hand.

    Args:
        folder: of the model, or of the adapter that was trained on it.
        images: that are said to have trained it, as the network sees them.
    """
    done = checkpoint_folders(folder)
    noted = notes_in(done[-1]).get("content") if done else None
    if noted not in (None, content_of(images)):
        warnings.warn(
            f"{folder} was trained by `whence train` on other images than these {len(images):,}, or with other captions: "
            "what is not among its training images did not make its pictures",
            stacklevel=3,
        )


def say_of_another_schedule(opened: Model, study: Study | None) -> None:
    """Warn where a model of `whence train` has another noise schedule now than it was trained with.

    Args:
        opened: the model.
        study: what made it; None where nobody knows.
    """
    if study is None:
        return
    now, then = opened.forward.alphas_cumprod, study.forward().alphas_cumprod
    if now is not None and then is not None and not (now.shape == then.shape and torch.allclose(now, then, rtol=1e-5)):
        path = opened.folder / "scheduler" / "scheduler_config.json"
        warnings.warn(f"{path}: this is not the noise schedule that the model was trained with", stacklevel=3)


KINDS: Mapping[type, tuple[type, ...]] = {
    NoneType: (New, Text, Full),
    Lora: (NewLora,),
    CustomDiffusion: (NewCustomDiffusion,),
}
"""What `whence train` makes of the kinds of folders that are opened."""


def _bound(recipe: Recipe, base: Path, adapter: Adapter | None, noted: Mapping[str, object]) -> Study | None:
    """A recipe on the files in a folder and on the base, None where some are missing."""
    folder = base if adapter is None else adapter.folder
    model = recipe.model
    if not isinstance(model, KINDS[type(adapter)]):
        return None
    if isinstance(model, New):
        return Study(recipe)
    recipe = recipe.on(base)
    if recipe.data.prior:
        return Study(recipe, Prior.read(folder)) if (folder / PRIOR_FILE).is_file() else None
    if "network" not in noted:
        return Study(recipe)
    initial = folder / INITIAL if isinstance(model, Full) else None
    return Study(recipe, None, initial, noted) if initial is None or initial.is_dir() else None
