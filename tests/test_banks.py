"""Banks: built end to end from a recipe, exported, and read again as what they are."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from errors import refuses
from recipes import changed, pixel_study
from slow_training import MLP, STUDY, images, subsets
from whence.data.images import subset
from whence.data.owners import groups
from whence.data.saving import save_png
from whence.diffusion.draws import stratified, uniform
from whence.evaluation import banks, bench, designs, ledger
from whence.evaluation.banks import BankRecipe, build, load, to_bytes
from whence.evaluation.ledger import Ledger
from whence.features.rows import identity
from whence.models import open_model, sample
from whence.storage.files import read_json, write_json
from whence.training import runs, subjects
from whence.types import describe

RECIPE = BankRecipe(STUDY, images(), images(4, seed=3), subsets(), 3, stratified(2, seed=7), checkpoint=3, stack=3)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A tiny bank; not to be changed."""
    root = tmp_path_factory.mktemp("bank")
    build(RECIPE, "tiny", root)
    return root


@pytest.fixture
def copy(built, tmp_path) -> Path:
    """A copy of the exported bank, to be changed."""
    for name, content in contents(built / "bank").items():
        (tmp_path / name).write_bytes(content)
    return tmp_path


def test_a_bank_holds_the_tables_of_its_ledger(built):
    bank, made = load("tiny", RECIPE, built / "bank"), Ledger(built / "ledger", images())
    assert made.status() == {role: {"done": k, "failed": 0, "missing": 0} for role, k in
                             {"test": 6, "tune": 4, "other": 2}.items()}  # fmt: skip
    assert bank.name == "tiny"
    assert bank.tables.keys() == bank.queries.keys() == {"heldout", "generated"}
    for kind, count in (("heldout", 4), ("generated", 3)):
        a, b = bank.tables[kind], made.table(kind)
        assert list(a.units) == list(b.units) == made.units
        assert np.array_equal(a.masks, b.masks)
        assert np.array_equal(a.values, b.values)
        assert a.values.shape == (12, count, 2)
        assert list(a.query_ids) == list(b.query_ids) == list(bank.queries[kind].ids)
        assert a.better == b.better == "lower"
    assert not np.array_equal(bank.tables["heldout"].values[:, :3], bank.tables["generated"].values)
    assert identity(bank.queries["heldout"]) == identity(RECIPE.heldout)
    assert bank.manifest["training_seconds"] > 0


def test_the_queries_are_the_pictures_of_the_attributed_model(built):
    """As they would be saved: in 8 bits, from a model that no unit of the ledger is."""
    model = open_model(built / "model")
    assert [point.step for point in model.checkpoints] == [3, 6]
    drawn = to_bytes(sample(model, 3, seed=0))
    pictures = load("tiny", RECIPE, built / "bank").queries["generated"]
    shown = pictures.batch(range(3)).x0
    assert torch.equal(((shown + 1) * 127.5).round().to(torch.uint8), drawn)
    assert float(shown.min()) >= -1
    assert float(shown.max()) <= 1
    made = Ledger(built / "ledger", images())
    assert STUDY.recipe.seed not in {unit.seed for unit in made.units}
    assert identity(pictures) == read_json(built / "ledger/measurements/generated/manifest.json")["queries"]


def test_eight_bits_keep_every_level():
    levels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    assert torch.equal(to_bytes(levels.float() / 127.5 - 1), levels)
    assert torch.equal(to_bytes(torch.tensor([-3.0, -1.0, 0.0, 1.0, 2.0])), torch.tensor([0, 0, 128, 255, 255]).byte())


def test_building_again_changes_nothing(built, monkeypatch):
    def never(*args: object, **kwargs: object) -> None:
        raise AssertionError("everything is there")

    before = {name: content for name, content in contents(built).items()}
    for room, name in ((ledger, "stacked_steps"), (ledger, "steps"), (runs, "steps"), (banks, "sample")):
        monkeypatch.setattr(room, name, never)
    build(RECIPE, "tiny", built)
    assert contents(built) == before


def test_a_bank_appears_when_its_last_shard_is_done(built, tmp_path):
    build(RECIPE, "tiny", tmp_path, (1, 2))
    assert not (tmp_path / "bank").exists()
    assert not (tmp_path / "ledger" / "measurements").exists()
    with refuses("no bank in "):
        load("tiny", RECIPE, tmp_path / "bank")
    build(RECIPE, "tiny", tmp_path, (0, 2))
    ours, theirs = contents(tmp_path / "bank"), contents(built / "bank")
    assert {k: v for k, v in ours.items() if k != "manifest.json"} == {
        k: v for k, v in theirs.items() if k != "manifest.json"
    }
    a, b = (read_json(root / "bank" / "manifest.json") for root in (tmp_path, built))
    assert {**a, "training_seconds": 0} == {**b, "training_seconds": 0}


def test_an_attributed_model_that_was_interrupted_is_finished(built, tmp_path, monkeypatch):
    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(subjects, "save_pipeline", interrupted)
        with pytest.raises(KeyboardInterrupt):
            build(RECIPE, "tiny", tmp_path)
    banks.train_reference(RECIPE, tmp_path)
    assert contents(tmp_path / "model") == contents(built / "model")


def test_a_bank_holds_no_weights(built):
    assert sorted(contents(built / "bank")) == [
        "generated.safetensors",
        "heldout.safetensors",
        "manifest.json",
        "masks.safetensors",
        "queries.safetensors",
    ]
    assert load_file(built / "bank" / "queries.safetensors")["generated"].dtype == torch.uint8


def other_mask() -> list[designs.Subset]:
    chosen = subsets()
    return [replace(chosen[0], mask=np.roll(chosen[0].mask, 1)), *chosen[1:]]


OTHERS = {
    "study.recipe.schedule.steps": replace(RECIPE, study=replace(STUDY, recipe=changed(STUDY.recipe, steps=7))),
    "study.recipe.model.network.width": replace(RECIPE, study=pixel_study({**MLP, "width": 8}, STUDY.recipe, steps=50)),
    "train": replace(RECIPE, train=images(seed=1)),
    "heldout": replace(RECIPE, heldout=images(4, seed=4)),
    "draws.seed": replace(RECIPE, draws=stratified(2, seed=8)),
    "subset 0": replace(RECIPE, subsets=other_mask()),
    "subset 5": replace(RECIPE, subsets=subsets()[:5]),
    "subset 3": replace(
        RECIPE, subsets=[replace(s, seeds=(s.seeds[0],)) if i == 3 else s for i, s in enumerate(subsets())]
    ),
    "subset 1": replace(RECIPE, subsets=[replace(s, role="fit") if i == 1 else s for i, s in enumerate(subsets())]),
}


@pytest.mark.parametrize("name", OTHERS)
def test_the_bank_of_another_recipe_is_refused(built, name):
    with refuses(f"is the bank of another recipe ({name}...build it again"):
        load("tiny", OTHERS[name], built / "bank")


def test_images_in_another_order_are_another_recipe(built):
    turned = replace(RECIPE, train=subset(images(), range(23, -1, -1)))
    with refuses("another recipe (train: "):
        load("tiny", turned, built / "bank")


def test_a_missing_bank_says_how_to_build_it(tmp_path):
    with refuses("no bank in ...tiny; build it with `whence bank tiny --output_dir DIR` and give DIR/bank"):
        load("tiny", RECIPE, tmp_path / "tiny")
    with refuses("no bank in ...shipped/no-such; build it with `whence bank no-such"):
        load("no-such", RECIPE)


@pytest.mark.parametrize("file", ["masks", "heldout", "generated", "queries"])
def test_a_changed_file_is_refused(copy, file):
    path = copy / f"{file}.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))
    with refuses("is not what was written", where=f"{file}.safetensors", accepted="the bank built again"):
        load("tiny", RECIPE, copy)


def test_a_newer_format_is_refused(copy):
    notes = read_json(copy / "manifest.json")
    write_json(copy / "manifest.json", {**notes, "format_version": banks.FORMAT_VERSION + 1})
    with refuses("newer whence"):
        load("tiny", RECIPE, copy)


def test_the_recipe_of_the_digits_is_planned_as_published():
    """Nothing is trained: 64 test, 32 tune and 160 fit subsets of half of 512 digits, and the full set. The test subsets
    are there twice: three seeds, then two more."""
    recipe = banks.digits()
    assert (len(recipe.train), len(recipe.heldout)) == (512, 100)
    masks = {role: {s.mask.tobytes() for s in recipe.subsets if s.role == role} for role in designs.ROLES}
    assert {role: len(found) for role, found in masks.items()} == {"test": 64, "tune": 32, "fit": 160, "other": 1}
    assert {int(s.mask.sum()) for s in recipe.subsets} == {256, 512}
    seeds = [seed for s in recipe.subsets for seed in s.seeds]
    assert len(seeds) == len(set(seeds)) == 64 * 5 + 32 * 3 + 160 + 3
    assert recipe.study.recipe.seed not in seeds
    assert len(set.union(*masks.values())) == 64 + 32 + 160 + 1, "no test subset is used to fit or tune"


def test_equal_subsets_are_averaged_together(tmp_path):
    """A subset planned again with other seeds is the same row of the masks."""
    train = images()
    first = designs.fixed(len(train), 3, seeds=(1, 2), role="test", common=False)
    made = Ledger.plan(tmp_path, STUDY, train, [*first, *designs.again(first, 50, 3)], 4)
    assert len(made.masks) == 3
    by_subset = {row: [unit.seed for unit in made.units if unit.subset == row] for row in range(3)}
    assert by_subset == {0: [1, 2, 50, 51, 52], 1: [3, 4, 53, 54, 55], 2: [5, 6, 56, 57, 58]}


def test_the_shipped_digits_are_those_of_the_recipe():
    bank = banks.load("digits", banks.digits())
    assert {kind: table.values.shape for kind, table in bank.tables.items()} == {
        "heldout": (579, 100, 20),
        "generated": (579, 100, 20),
    }


def test_train_and_queries_of_the_digits_are_apart():
    recipe = banks.digits()
    assert not set(recipe.train.digests) & set(recipe.heldout.digests)
    assert set(recipe.train.meta["digit"]) == set(range(10))


def test_the_creators_bank_is_every_coalition_twice(tmp_path):
    """On the pictures, queries and trainings of the icons bank; each creator alone is left out of all others once a seed."""
    names = [f"creator {i}" for i in range(10)]
    metadata = [{"creator": names[min(row % 13, 9)]} for row in range(260)]
    rng = np.random.default_rng(0)
    for part, count in (("train", 260), ("val", 48)):
        pictures = torch.from_numpy(rng.uniform(-1, 1, (count, 1, 4, 4)))
        save_png(tmp_path / part, pictures, [f"{row:03d}" for row in range(count)], metadata[:count])
    recipe, of_icons = banks.creators(tmp_path), banks.icons(tmp_path)
    assert describe(recipe.study) == describe(of_icons.study)
    assert identity(recipe.train) == identity(of_icons.train)
    column = recipe.train.meta["creator"]
    for seed in (5000, 5001):
        here = [s.mask for s in recipe.subsets if s.seeds == (seed,)]
        together = {frozenset(column[row] for row in np.flatnonzero(mask)) for mask in here}
        assert len(together) == len(here) == 2**8 + 2
        assert {frozenset(names) - {name} for name in names} <= together, "each one left out"
        for mask in here:
            assert all(len({mask[row] for row in rows}) == 1 for rows in groups(column).values()), "whole creators"
    assert len(recipe.subsets) == 2 * (2**8 + 2)


@pytest.mark.parametrize("name", ["averaged_metagradient", "further_training"])
def test_what_trains_again_measures_at_the_draws_of_the_bank_alone(monkeypatch, name):
    asked = []
    monkeypatch.setattr(bench, "build", lambda name, forward, given: asked.append(given) or (lambda task: None))
    bench.by_method(name, bench.Settings(), uniform(3))("heldout", SimpleNamespace(forward=None))
    assert [(given["draws"], given["redraw"]) for given in asked] == [(uniform(3), False)]
