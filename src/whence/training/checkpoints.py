"""checkpoint-N folders: written, gone on from, and read back as what made them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from whence.diffusion.outputs import OUTPUTS
from whence.features.rows import identity
from whence.models import (
    PRIOR_FILE,
    Adapter,
    CustomDiffusion,
    Lora,
    Prior,
    weights_digest,
)
from whence.storage.arrays import write_tensors
from whence.storage.files import building, differences, move_in, read_json, write_json
from whence.training.optimizer import State
from whence.training.recipe import Training
from whence.training.study import CustomStudy, LoraStudy, Study, declared_from
from whence.types import Images, Weights, WhenceError, describe


def save_checkpoint(
    folder: Path, write: Callable[[Path], object], state: State, training: Training, data: Mapping[str, Any]
) -> None:
    """checkpoint-N: raw weights as `write` writes them, the optimiser's state, our notes. Appears whole, by one rename."""
    target = folder / f"checkpoint-{state.step}"
    with building(target) as temporary:
        write(temporary)
        parts = {"weights": state.weights, "m": state.m, "v": state.v, "ema": state.ema}
        flat = {f"{part}/{name}": w.clone() for part, values in parts.items() for name, w in values.items()}
        write_tensors(temporary / "state.safetensors", flat)
        # The rate in force at this checkpoint is that of the step that led here.
        rate = training.rate_at(state.step - 1)
        notes = {"step": state.step, "rate": rate, "training": describe(training), "data": data}
        write_json(temporary / "whence.json", notes)
        move_in(temporary, target)


def load_state(folder: Path, training: Training, data: Mapping[str, Any]) -> State:
    """Go on from a checkpoint-N folder, or refuse one that another recipe or another data set made."""
    notes = read_json(folder / "whence.json")
    expected = {"training": describe(training), "data": describe(data)}
    different = differences(expected, {k: notes.get(k) for k in expected})
    if different:
        raise WhenceError(
            f"{folder} is from another run ({different[0]}); use the same options or another --output_dir"
        )
    flat = load_file(folder / "state.safetensors")
    parts: dict[str, Weights] = {"weights": {}, "m": {}, "v": {}, "ema": {}}
    for key, value in flat.items():
        part, name = key.split("/", 1)
        parts[part][name] = value
    return State(**parts, step=int(notes["step"]))


INITIAL = "initial"  # the folder with the weights that a training went on from


def study_of(model: Path) -> Study:
    """The study that made a model folder of `whence train`, to be repeated on other images or with other seeds."""
    found = known_study(model)
    if found is None:
        raise WhenceError(
            f"{model} has no checkpoint-N/whence.json; only models made by `whence train` can be repeated"
        )
    return found


def known_study(model: Path, images: Images | None = None) -> Study | None:
    """The same, or None where the model was not made by `whence train`, or not from these images."""
    found = _notes(model, images)
    if found is None or "network" not in found["data"]:
        return None
    schedule, network = found["data"]["schedule"], found["data"]["network"]
    if "scheduler" in found["data"]:
        weights = model / INITIAL if "initial" in found["data"] else None
        if weights is not None and (not weights.is_dir() or weights_digest(weights) != found["data"]["initial"]):
            return None
        return Study(
            network,
            _training(found),
            schedule={"_class_name": found["data"]["scheduler"], **schedule},
            weights=weights,
            **declared_from(found["data"]),
        )
    return Study(
        network,
        _training(found),
        schedule["num_train_timesteps"],
        schedule["beta_schedule"],
        schedule["prediction_type"],
        **declared_from(found["data"]),
    )


def study_on(base: Path, adapter: Adapter | None, images: Images) -> Study | LoraStudy | CustomStudy | None:
    """The study that made a model folder, or an adapter on it, from these images; None where it was not `whence train`."""
    match adapter:
        case Lora(folder):
            return known_lora_study(base, folder, images)
        case CustomDiffusion(folder):
            return known_custom_study(base, folder, images)
    return known_study(base, images)


def known_lora_study(base: Path, lora: Path, images: Images) -> LoraStudy | None:
    """The study that made a LoRA folder of `whence train` from these images, or None."""
    found = _notes(lora, images) if lora.is_dir() else None
    if found is None or "lora" not in found["data"]:
        return None
    told = {name: value for name, value in found["data"]["lora"].items() if name != "base"}
    study = LoraStudy(base, _training(found), **{**told, **declared_from(told)})
    return study if study.describe()["base"] == found["data"]["lora"]["base"] else None


def known_custom_study(base: Path, custom: Path, images: Images) -> CustomStudy | None:
    """The study that made a Custom Diffusion folder of `whence train` from these images, or None."""
    found = _notes(custom, images)
    if found is None or "custom" not in found["data"]:
        return None
    told = {name: value for name, value in found["data"]["custom"].items() if name not in ("base", "prior")}
    held = found["data"]["custom"]["prior"]
    if held is not None and not (custom / PRIOR_FILE).is_file():
        return None
    study = CustomStudy(
        base, _training(found), prior=None if held is None else Prior.read(custom), **{**told, **declared_from(told)}
    )
    known = study.describe()
    return study if all(known[name] == found["data"]["custom"][name] for name in ("base", "prior")) else None


def _notes(folder: Path, images: Images | None) -> dict[str, Any] | None:
    """What our trainer noted beside its last checkpoint; None where it did not, or trained on other images."""
    notes = sorted(folder.glob("checkpoint-*/whence.json"), key=lambda path: int(path.parent.name.split("-")[1]))
    found = read_json(notes[-1]) if notes else {}
    if "training" not in found or "data" not in found:  # a note of somebody else, that gives a learning rate
        return None
    if images is not None and found["data"]["images"] != identity(images):
        return None
    return found


def _training(found: Mapping[str, Any]) -> Training:
    recipe = {key: value for key, value in found["training"].items() if key != "is"}
    return Training(**{**recipe, "output": OUTPUTS[recipe["output"]]})
