"""Banks: what a ledger has measured, small enough to ship. Masks, raw values and queries, but no weights.

    manifest.json   study, units, measurement, sha256 of each file, machine
    masks.safetensors, heldout.safetensors, generated.safetensors (values [units, m, K]), queries.safetensors (uint8)

A bank is rebuilt from its recipe by one command, `whence bank NAME`.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import torch
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from torch import Tensor

from whence.data.images import image_folder, subset, tensor_images
from whence.data.owners import groups
from whence.diffusion.draws import Draws, stratified
from whence.diffusion.outputs import loss
from whence.evaluation import designs
from whence.evaluation.designs import Subset
from whence.evaluation.ledger import Ledger, write_tensors
from whence.evaluation.ledger_files import NoteOfUnit
from whence.evaluation.outcomes import Table, Unit
from whence.features.rows import identity
from whence.models import Model, open_model, sample
from whence.storage.files import differences, file_digest, read_json, write_json
from whence.storage.jsons import refuse_unexpected, whole
from whence.training.optimizer import AdamW
from whence.training.recipe import Augmentation, New, NoiseSchedule, Recipe, Schedule
from whence.training.runs import train_study
from whence.training.study import Study, unet_config
from whence.types import VERSION, Engine, Images, WhenceError, describe

SHIPPED = Path(__file__).parent / "shipped"
QUERIES = ("heldout", "generated")
FORMAT_VERSION = 1


@dataclass(frozen=True, eq=False)
class BankRecipe:
    """How a bank comes about.

    Args:
        study: what is trained, and how. The attributed model is trained on all images with its seed, which no unit has.
        train: the training images.
        heldout: queries that are no training images.
        subsets: what is retrained.
        generated: pictures drawn from the attributed model, the other queries.
        draws: how queries are measured.
        checkpoint: steps between the checkpoints of the attributed model.
        stack: models trained together.
        pictures_of: the shipped bank whose drawn pictures are asked about, so that the scores of one serve for both: drawn
            anew on another processor they would differ in their last bits. None to draw them.
    """

    study: Study
    train: Images
    heldout: Images
    subsets: list[Subset]
    generated: int
    draws: Draws
    checkpoint: int
    stack: int
    pictures_of: str | None = None


@dataclass(frozen=True, eq=False)
class Bank:
    """A bank, read.

    Args:
        name: of its recipe.
        tables: what was measured, per query set.
        queries: the images of each query set.
        manifest: the content of manifest.json.
    """

    name: str
    tables: Mapping[str, Table]
    queries: Mapping[str, Images]
    manifest: Mapping[str, object]


def digit_images(start: int, stop: int) -> Images:
    """scikit-learn's digits in [-1, 1], with their class as `digit`."""
    data = load_digits()
    pixels = torch.tensor(data.images[start:stop], dtype=torch.float32)[:, None] / 8 - 1
    names = [f"digit-{i:04d}" for i in range(start, stop)]
    return tensor_images(pixels, names, {"digit": [int(y) for y in data.target[start:stop]]})


def digits() -> BankRecipe:
    """512 digits of 8 x 8 pixels, a perceptron of 141k parameters, 1000 steps of AdamW."""
    n = 512
    recipe = Recipe(
        New({"_class_name": "MLPDenoiser", "sample_size": 8, "in_channels": 1, "width": 128, "layers": 2}),
        AdamW(3e-3, beta1=0.9),
        Schedule(1000, 50),
        batch_size=64,
        max_grad_norm=0.0,
        ema=0.99,
        seed=99_999,
    )
    test = designs.fixed(n, 64, seeds=(1000, 1001, 1002), role="test", seed=1, common=False)
    subsets = [
        *test,
        *designs.fixed(n, 32, seeds=(2000, 2001, 2002), role="tune", seed=2, common=False),
        *designs.full(n, seeds=(3000, 3001, 3002)),
        *designs.fixed(n, 160, seeds=(4000,), role="fit", seed=3, common=False),
        # With three seeds the reliability on generated queries was 0.29 per seed: five bring the ceiling up.
        *designs.again(test, first=6000, count=2),
    ]
    draws = stratified(20, seed=777, shared=False)
    return BankRecipe(Study(recipe), digit_images(0, n), digit_images(1000, 1100), subsets, 100, draws, 100, 32)


def small_unet(channels: int) -> dict[str, object]:
    """68 thousand parameters, attention in the middle at 4 x 4: what two cores can train hundreds of times."""
    levels = 3
    return {
        **unet_config(16, channels, (8, 16, 16)),
        "down_block_types": ["DownBlock2D"] * levels,
        "up_block_types": ["UpBlock2D"] * levels,
    }


def _small(train: Images, heldout: Images, channels: int) -> BankRecipe:
    """A bank of 256 pictures of 16 x 16 pixels and a convolutional network that predicts the velocity: one this small,
    trained this shortly, draws nothing but noise where it predicts the noise. With eps_root 1e-8 its training was not smooth
    in the weights of its images (metasmoothness 0.3 at a rate of 3e-3, less at higher ones); with 1e-5 it is (0.6 to 0.9)
    and learns as much.

    The same seeds for all subsets, seed by seed, so that what is there early is of use: 48 subsets to judge on, 24 to choose
    settings on.
    """
    n = 256
    rows = sorted(np.random.default_rng(0).permutation(len(train))[:n].tolist())
    recipe = Recipe(
        New(small_unet(channels), NoiseSchedule(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")),
        AdamW(1e-2, beta1=0.9, eps_root=1e-5),
        Schedule(500, 20),
        batch_size=32,
        max_grad_norm=0.0,
        ema=0.98,
        seed=99_999,
    )
    subsets: list[Subset] = []
    for k in range(4):
        subsets += designs.fixed(n, 48, seeds=(1000 + k,), role="test", seed=1)
        if k < 2:
            subsets += designs.fixed(n, 24, seeds=(2000 + k,), role="tune", seed=2)
    subsets += designs.full(n, seeds=(3000, 3001))
    queries = subset(heldout, np.linspace(0, len(heldout) - 1, 48).round().astype(int).tolist())
    return BankRecipe(
        Study(recipe), subset(train, rows), queries, subsets, 48, stratified(20, seed=777, shared=False), 50, 12
    )


def icons(folder: Path) -> BankRecipe:
    """256 grey icons by ten named creators, 16 x 16 pixels.

    Args:
        folder: with train/ and val/.
    """
    train, heldout = (image_folder(folder / part, 16, channels=1) for part in ("train", "val"))
    return _small(train, heldout, 1)


def photos(folder: Path) -> BankRecipe:
    """256 CIFAR-10 photos of cars and horses, 16 x 16 pixels.

    Args:
        folder: with train/ and val/.
    """
    train, heldout = (image_folder(folder / part, 16) for part in ("train", "val"))
    return _small(train, heldout, 3)


def creators(folder: Path) -> BankRecipe:
    """The icons bank's study and queries, on creators in place of random halves: the truth for credit.

    Every coalition of the eight creators with the most images; those of the other two are in all of them, because nobody
    trains on nothing. Who leaves the whole set alone is among them for the eight, and added for the two.

    Args:
        folder: as for `icons`.
    """
    recipe = icons(folder)
    n, owned = len(recipe.train), groups(recipe.train.meta["creator"])
    largest = sorted(owned, key=lambda name: -len(owned[name]))[:8]
    players = {name: owned[name] for name in owned if name in largest}
    rest = [owned[name] for name in owned if name not in largest]
    base, subsets = [row for rows in rest for row in rows], list[Subset]()
    for seed in (5000, 5001):  # one after the other, so that what is there early is of use
        subsets += designs.coalitions(n, players, base, (seed,))
        subsets += designs.leave_out(n, rest, (seed,))
    return replace(recipe, subsets=subsets, pictures_of="icons")


def cifar2(folder: Path, n: int = 5000) -> BankRecipe:
    """CIFAR-10 cars and horses (n = 5000 or 1000 of them), 32 x 32 pixels, a UNet of a few million parameters."""
    images = image_folder(folder / "train", 32)
    rows = np.random.default_rng(0).permutation(len(images))[:n]
    recipe = Recipe(
        New(unet_config(32, 3, (64, 128, 128, 128), layers=1)),
        AdamW(4e-4, eps_root=0.0),
        Schedule(20_000, 500),
        data=Augmentation(flip=True),
        batch_size=128,
        ema=0.9999,
        seed=99_999,
    )
    subsets = [
        *designs.fixed(n, 64, seeds=(1000, 1001, 1002), role="test", seed=1, common=False),
        *designs.fixed(n, 32, seeds=(2000, 2001, 2002), role="tune", seed=2, common=False),
        *designs.full(n, seeds=(3000, 3001, 3002)),
    ]
    heldout = subset(image_folder(folder / "val", 32), range(0, 1000, 10))
    return BankRecipe(
        Study(recipe),
        subset(images, sorted(rows.tolist())),
        heldout,
        subsets,
        100,
        stratified(20, seed=777, shared=False),
        2000,
        16,
    )


def by_name(name: str, data_dir: Path | None = None) -> BankRecipe:
    """The recipe of a bank.

    Args:
        name: digits, icons, photos, creators, cifar2 or cifar2-1000.
        data_dir: folder with train/ and val/ of its pictures; None for digits.
    """
    if name == "digits":
        return digits()
    of_folder: dict[str, Callable[[Path], BankRecipe]] = {
        "icons": icons,
        "photos": photos,
        "creators": creators,
        "cifar2": cifar2,
        "cifar2-1000": partial(cifar2, n=1000),
    }
    if name not in of_folder:
        raise WhenceError(f"unknown bank {name!r}", accepted=", ".join(["digits", *of_folder]))
    if data_dir is None:
        raise WhenceError(f"bank {name} needs --data_dir", accepted="a folder with train/ and val/ of its pictures")
    return of_folder[name](data_dir)


def train_reference(recipe: BankRecipe, root: Path, engine: Engine = Engine()) -> Path:
    """The attributed model: trained on all images, with checkpoints.

    Args:
        recipe: of the bank.
        root: the model lies in its `model` folder, and is trained where it is not there.
        engine: how the work is carried out.
    """
    if not (root / "model" / "scheduler").exists():
        train_study(recipe.study, recipe.train, root / "model", recipe.checkpoint, engine)
    return root / "model"


def build(
    recipe: BankRecipe, name: str, root: Path, shard: tuple[int, int] = (0, 1), engine: Engine = Engine()
) -> Ledger:
    """Train every unit of a bank and measure all queries, going on where an earlier run stopped.

    Args:
        recipe: of the bank.
        name: of the bank, for its manifest.
        root: for the model, the ledger, and the bank once all units are trained.
        shard: (i, N) trains every N-th block from i.
        engine: how the work is carried out.
    """
    model = open_model(train_reference(recipe, root, engine))
    ledger = Ledger.plan(root / "ledger", recipe.study, recipe.train, recipe.subsets, recipe.stack)
    ledger.run(shard, engine)
    generated = root / "generated.safetensors"
    if not generated.exists():
        write_tensors(generated, {"generated": _pictures(recipe, model, engine)})
    if not any(counts["missing"] for counts in ledger.status().values()):
        queries = {"heldout": recipe.heldout, "generated": drawn_images(load_file(generated)["generated"])}
        for kind, images in queries.items():
            ledger.measure(kind, images, loss, recipe.draws, engine)
        export(ledger, queries, recipe, name, root / "bank")
    return ledger


def _pictures(recipe: BankRecipe, model: Model, engine: Engine) -> Tensor:
    """The drawn pictures that are asked about, as 8 bits."""
    if recipe.pictures_of is None:
        return to_bytes(sample(model, recipe.generated, seed=0, engine=engine))
    folder = SHIPPED / recipe.pictures_of
    return _whole(folder, read_json(folder / "manifest.json"), "queries")["generated"]


def to_bytes(images: Tensor) -> Tensor:
    """Pictures in [-1, 1] as 8 bits: what is attributed is what would be saved."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu()


def drawn_images(pixels: Tensor) -> Images:
    """Drawn pictures kept as 8 bits, as images."""
    return tensor_images(pixels.float() / 127.5 - 1, [f"drawn-{i:04d}" for i in range(len(pixels))])


def export(ledger: Ledger, queries: Mapping[str, Images], recipe: BankRecipe, name: str, folder: Path) -> None:
    """Write the bank of a finished ledger.

    Args:
        ledger: whose queries are measured.
        queries: the images of each query set.
        recipe: of the bank.
        name: of the bank.
        folder: where it is written.
    """
    tables = {kind: ledger.table(kind) for kind in QUERIES}
    units = tables["heldout"].units
    drawn = queries["generated"]
    files = {
        "masks": {"masks": torch.from_numpy(np.packbits(tables["heldout"].masks, axis=1))},
        **{kind: {"values": torch.from_numpy(table.values)} for kind, table in tables.items()},
        "queries": {"generated": to_bytes(drawn.batch(range(len(drawn))).x0)},
    }
    for file, values in files.items():
        write_tensors(folder / f"{file}.safetensors", values)
    seconds = [read_json(ledger.folder(unit) / "DONE.json")["seconds"] for unit in units]
    manifest = {
        "format_version": FORMAT_VERSION,
        "whence": VERSION,
        "torch": torch.__version__,
        "machine": f"{platform.machine()}, {platform.processor() or platform.system()}",
        "name": name,
        "study": describe(recipe.study),
        "train": identity(recipe.train),
        "heldout": identity(recipe.heldout),
        "n": len(recipe.train),
        "draws": describe(recipe.draws),
        "output": loss.name,
        "better": loss.better,
        "units": [{k: v for k, v in describe(unit).items() if k not in ("is", "number")} for unit in units],
        "training_seconds": sum(seconds),
        "sha256": {file: file_digest(folder / f"{file}.safetensors") for file in files},
    }
    write_json(folder / "manifest.json", manifest)


def load(name: str, recipe: BankRecipe, folder: Path | None = None) -> Bank:
    """Read a bank, shipped or built, and check that it is the recipe's.

    Args:
        name: of a shipped bank.
        recipe: of the bank.
        folder: of a bank that was built; None for the shipped one.
    """
    folder = folder or SHIPPED / name
    if not (folder / "manifest.json").is_file():
        raise WhenceError(f"no bank in {folder}; build it with `whence bank {name} --output_dir DIR` and give DIR/bank")
    path, again = folder / "manifest.json", "the bank built again, or installed again"
    manifest = read_json(path, dict, again)
    if whole(number := manifest.get("format_version")) and number > FORMAT_VERSION:
        raise WhenceError(f"{folder}: written by a newer whence (format {number})")
    refuse_unexpected(manifest, Manifest, str(path), again)
    expected = {
        "study": describe(recipe.study),
        "train": identity(recipe.train),
        "heldout": identity(recipe.heldout),
        "draws": describe(recipe.draws),
    }
    different = differences(expected, {key: manifest.get(key) for key in expected})
    if different:
        raise WhenceError(f"{folder} is the bank of another recipe ({different[0][:200]}); build it again")
    pictures = _whole(folder, manifest, "queries")
    queries = {"heldout": recipe.heldout, "generated": drawn_images(pictures["generated"])}
    found = {kind: replace(table, query_ids=queries[kind].ids) for kind, table in tables(folder, manifest).items()}
    _planned(found[QUERIES[0]].units, found[QUERIES[0]].masks, recipe, folder)
    return Bank(name, found, queries, manifest)


class Manifest(TypedDict):
    """What is read of the manifest.json of a bank."""

    study: dict[str, Any]
    train: str
    heldout: str
    draws: dict[str, Any]
    n: int
    units: list[NoteOfUnit]
    better: str
    sha256: dict[str, str]


def tables(folder: Path, manifest: Mapping[str, Any]) -> dict[str, Table]:
    """What was measured of each query set, queries by number; it takes none of the bank's pictures.

    Args:
        folder: of the bank.
        manifest: the content of its manifest.json.
    """
    packed = _whole(folder, manifest, "masks")["masks"].numpy()
    masks = np.unpackbits(packed, axis=1, count=manifest["n"]).astype(bool)
    units = [Unit(number, **unit) for number, unit in enumerate(manifest["units"])]
    values = {kind: _whole(folder, manifest, kind)["values"].numpy() for kind in QUERIES}
    better = manifest["better"]
    return {
        kind: Table(units, masks, each, [str(q) for q in range(each.shape[1])], better) for kind, each in values.items()
    }


def _whole(folder: Path, manifest: Mapping[str, Any], name: str) -> dict[str, Tensor]:
    """A file of a bank, whose content is what was written."""
    path, noted = folder / f"{name}.safetensors", manifest.get("sha256", {}).get(name)
    if not path.is_file() or file_digest(path) != noted:
        raise WhenceError(
            "is not what was written, or not there", str(path), "the bank built again, or installed again"
        )
    return load_file(path)


def _planned(units: Sequence[Unit], masks: np.ndarray, recipe: BankRecipe, folder: Path) -> None:
    """Refuse a bank with a retraining that its recipe does not plan."""
    planned = {
        (seed, known.role, known.design, known.mask.tobytes()) for known in recipe.subsets for seed in known.seeds
    }
    for unit, mask in zip(units, masks, strict=True):
        if (unit.seed, unit.role, unit.design, mask.tobytes()) not in planned:
            raise WhenceError(f"{folder} is the bank of another recipe (subset {unit.subset}); build it again")
