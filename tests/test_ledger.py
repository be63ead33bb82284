"""The ledger: a plan that never changes, units that are whole or absent, and the same bytes whatever happened."""

from __future__ import annotations

import random
import shutil
import stat
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import whence.evaluation.ledger as rooms
from agreement import close
from errors import refuses
from recipes import changed, pixel_study
from slow_training import MLP, STUDY, UNET, images, kill, plan, retrain_slowly, start, subsets
from whence.data.images import subset
from whence.diffusion.draws import stratified, uniform
from whence.diffusion.outputs import Output, loss, margin, squared_norm
from whence.evaluation import designs
from whence.evaluation.calibrate import calibrate
from whence.evaluation.ledger import FORMAT_VERSION, Ledger
from whence.evaluation.ledger_check import repair, unfinished_in
from whence.evaluation.outcomes import Table, Unit
from whence.storage.arrays import write_tensors
from whence.storage.files import read_json, write_json
from whence.training.loop import stacked_steps, steps
from whence.training.study import Study
from whence.types import Engine, WhenceError

DRAWS = stratified(4, seed=7)
QUERIES = images(5, seed=3)


def trained(folder: Path) -> dict[str, bytes]:
    """The weights of every finished unit."""
    return {path.parent.name: path.read_bytes() for path in sorted(folder.glob("units/[0-9]*/model.safetensors"))}


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Ledger:
    """A ledger that nothing ever happened to; not to be changed."""
    made = plan(tmp_path_factory.mktemp("whole"))
    made.run()
    made.measure("loss", QUERIES, loss, DRAWS)
    return made


@pytest.fixture
def copy(whole, tmp_path) -> Ledger:
    """A copy of it, to be changed."""
    shutil.copytree(whole.root, tmp_path / "copy")
    return Ledger(tmp_path / "copy", images())


# ---------------------------------------------------------------------------------------------------------------- plan


def test_a_plan_is_units_of_subsets_and_seeds(whole):
    expected = [(s, seed, sub.role, sub.design) for s, sub in enumerate(subsets()) for seed in sub.seeds]
    assert [(u.subset, u.seed, u.role, u.design) for u in whole.units] == expected
    assert [u.number for u in whole.units] == list(range(12))
    assert np.array_equal(whole.masks, np.stack([s.mask for s in subsets()]))
    assert [[u.number for u in block] for block in whole.blocks()] == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]]
    assert [u.chance for u in whole.units] == [0.5] * 10 + [None] * 2


def test_an_opened_ledger_knows_its_study(whole):
    opened = Ledger(whole.root, images())
    assert opened.units == whole.units
    assert opened.study.recipe == STUDY.recipe
    assert opened.study.recipe.loss is loss


def test_masks_of_any_length_survive_the_packing(tmp_path):
    for n in (7, 8, 9):
        chosen = designs.bernoulli(n, 6, seed=n) + designs.full(n)
        made = Ledger.plan(tmp_path / str(n), STUDY, images(n), chosen, 2)
        assert np.array_equal(made.masks, np.stack([s.mask for s in chosen]))


def other_subsets() -> list[designs.Subset]:
    chosen = subsets()
    mask = chosen[0].mask.copy()
    mask[0] = not mask[0]
    return [replace(chosen[0], mask=mask), *chosen[1:]]


def other_seeds() -> list[designs.Subset]:
    return [replace(subsets()[0], seeds=(100, 999)), *subsets()[1:]]


CHANGES: dict[str, tuple[Study, list[designs.Subset], int]] = {
    "stack": (STUDY, subsets(), 4),
    "masks": (STUDY, other_subsets(), 3),
    "units": (STUDY, other_seeds(), 3),
    "study.recipe.optimizer.learning_rate": (
        replace(STUDY, recipe=changed(STUDY.recipe, learning_rate=0.5)),
        subsets(),
        3,
    ),
    "study.recipe.model.network.width": (pixel_study({**MLP, "width": 8}, STUDY.recipe, steps=50), subsets(), 3),
    "study.recipe.model.noise.steps": (pixel_study(MLP, STUDY.recipe, steps=51), subsets(), 3),
    "study.recipe.objective.output": (replace(STUDY, recipe=changed(STUDY.recipe, output=squared_norm)), subsets(), 3),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_plan_never_changes(copy, name):
    study, chosen, stack = CHANGES[name]
    before = (copy.root / "plan.json").read_bytes(), (copy.root / "masks.safetensors").read_bytes()
    told = {"masks": "other subsets", "units": "other seeds"}.get(name, f"{name}: found ")
    with refuses(f"plan.json is another plan ({told}...use a new folder"):
        Ledger.plan(copy.root, study, images(), chosen, stack)
    assert before == ((copy.root / "plan.json").read_bytes(), (copy.root / "masks.safetensors").read_bytes())
    assert Ledger.plan(copy.root, STUDY, images(), subsets(), 3).status() == copy.status(), "the same plan is opened"


def test_other_images_are_refused(copy):
    for other in (images(seed=1), images(23), subset(images(), range(23, -1, -1))):
        with refuses("was planned for other images"):
            Ledger(copy.root, other)
    with refuses("another plan (images: "):
        Ledger.plan(copy.root, STUDY, images(seed=1), subsets(), 3)


def test_masks_of_the_wrong_length_are_refused(tmp_path):
    with refuses("masks are for 23 images, but there are 24"):
        Ledger.plan(tmp_path, STUDY, images(), designs.full(23), 1)
    with refuses("masks are for 25 images, but there are 24"):
        Ledger.plan(tmp_path, STUDY, images(), [*designs.full(24), *designs.full(25)], 1)
    assert files(tmp_path) == []


def test_plans_that_cannot_be_carried_out_are_refused(tmp_path):
    def refused(what: str, study: Study = STUDY, chosen: list[designs.Subset] = subsets(), stack: int = 3) -> None:
        with refuses(what):
            Ledger.plan(tmp_path, study, images(), chosen, stack)
        assert files(tmp_path) == []

    refused("0 subsets, 3 models together; at least 1", chosen=[])
    refused("6 subsets, 0 models together; at least 1", stack=0)
    nobody = designs.Subset(np.zeros(24, dtype=bool), "fit", "bernoulli(0.01)", (1,))
    refused("subset 6 (bernoulli(0.01)) holds no image", chosen=[*subsets(), nobody])
    refused("dropout are trained one by one; 3 together cannot be, give stack 1", study=UNET)
    mine = Output("mine", loss.value, "lower")
    refused("output 'mine' is not one of loss, elbo", study=replace(STUDY, recipe=changed(STUDY.recipe, output=mine)))
    Ledger.plan(tmp_path, UNET, images(), subsets(), 1)


def test_a_folder_without_a_plan_says_how_to_make_one(tmp_path):
    with refuses("holds no plan.json; make one with `whence ledger plan`"):
        Ledger(tmp_path, images())


def test_masks_that_are_not_those_of_the_plan_are_refused(copy):
    path = copy.root / "masks.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with refuses("masks.safetensors does not match plan.json; restore it"):
        Ledger(copy.root, images())
    path.write_bytes(content[:20])
    with refuses("masks.safetensors cannot be read ...restore it"):
        Ledger(copy.root, images())
    path.unlink()
    with refuses("masks.safetensors cannot be read ...restore it"):
        Ledger(copy.root, images())


def test_a_newer_format_is_refused(copy):
    path = copy.root / "plan.json"
    write_json(path, {**read_json(path), "format_version": FORMAT_VERSION + 1})
    with refuses("newer whence"):
        Ledger(copy.root, images())


# ------------------------------------------------------------------------------------------------------------ training


def test_units_are_what_the_trainer_makes(whole):
    """Stacked in blocks of three, they are the models that training one by one gives."""
    for unit in (whole.units[0], whole.units[7], whole.units[11]):
        mask = torch.from_numpy(subsets()[unit.subset].mask).float()
        net = STUDY.network_at(unit.seed)
        for state, value in steps(net, STUDY.forward(), images(), STUDY.at(unit.seed), mask):  # noqa: B007
            pass
        loaded = whole.load(unit).state_dict()
        close(*(torch.cat([w[k].flatten() for k in state.ema]) for w in (loaded, state.ema)), 1e-4)
        done = read_json(whole.folder(unit) / "DONE.json")
        assert done["unit"] == asdict(unit)
        assert done["last_loss"] == pytest.approx(value, rel=1e-3)
        assert done["seconds"] > 0
        assert (done["device"], done["dtype"], done["torch"]) == ("cpu", "torch.float32", torch.__version__)


def test_a_unit_depends_on_its_subset_and_its_seed(whole):
    models = trained(whole.root)
    assert len(models) == 12
    assert len(set(models.values())) == 12
    assert whole.status() == {role: {"done": k, "failed": 0, "missing": 0} for role, k in
                              {"test": 6, "tune": 4, "other": 2}.items()}  # fmt: skip
    whole.verify()


def test_finished_files_are_readable_by_others(whole, tmp_path):
    plain = tmp_path / "plain"
    plain.write_text("x")
    modes = {stat.S_IMODE(path.stat().st_mode) for path in whole.root.rglob("*") if path.is_file()}
    assert modes == {stat.S_IMODE(plain.stat().st_mode)}
    assert not [name for name in files(whole.root) if ".tmp" in name]


@pytest.mark.parametrize("shard", [(-1, 2), (2, 2), (0, 0)])
def test_shards_that_do_not_exist_are_refused(whole, shard):
    with refuses(f"shard {shard[0]}/{shard[1]}", accepted=f"0/{shard[1]} to"):
        whole.run(shard)


def test_shards_one_after_the_other_miss_nothing(tmp_path, whole):
    """A shard is every N-th block of the plan, not of what happens to be missing when it starts."""
    made = plan(tmp_path)
    made.run((0, 2))
    assert sorted(trained(tmp_path)) == ["00000", "00001", "00002", "00006", "00007", "00008"]
    made.run((1, 2))
    assert trained(tmp_path) == trained(whole.root)


def test_shards_side_by_side(tmp_path, whole):
    plan(tmp_path)
    workers = [start(retrain_slowly, tmp_path, (i, 2), 0.0) for i in (0, 1)]
    for worker in workers:
        worker.join(300)
        assert worker.exitcode == 0
    assert trained(tmp_path) == trained(whole.root)
    assert files(tmp_path) == [name for name in files(whole.root) if not name.startswith("measurements")]


def test_killed_runs_end_with_the_same_bytes(tmp_path, whole):
    """kill -9 of two workers three times at random moments, then once more to the end."""
    made, moments, begun = plan(tmp_path), random.Random(0), []
    for least in (1, 4, 7):
        workers = [start(retrain_slowly, tmp_path, (i, 2), 0.04) for i in (0, 1)]
        deadline = time.monotonic() + 300
        while len(trained(tmp_path)) < least:
            assert any(worker.is_alive() for worker in workers), "they ended before they could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.005)
        time.sleep(moments.uniform(0, 0.15))
        for worker in workers:
            kill(worker)
        begun.append(trained(tmp_path))
    # On a busy machine a late kill may find everything done; the first, after one unit of twelve, may not.
    assert len(begun[0]) < 12, "killed in the middle"
    made.run()
    assert trained(tmp_path) == trained(whole.root)
    assert all(trained(tmp_path).items() >= some.items() for some in begun), "finished units stay"
    made.verify()
    made.measure("loss", QUERIES, loss, DRAWS)
    for unit in made.units:
        part = Path("measurements", "loss", f"{unit.number:05d}.safetensors")
        assert (tmp_path / part).read_bytes() == (whole.root / part).read_bytes()
    assert np.array_equal(made.table("loss").values, whole.table("loss").values)


def test_what_a_killed_run_leaves_is_harmless(tmp_path, whole):
    made = plan(tmp_path)
    left = tmp_path / "units" / ".00001.123.tmp"
    left.mkdir(parents=True)
    (left / "model.safetensors").write_bytes(b"half")
    (left / "DONE.json.123.tmp").write_text("{")
    assert made.status()["test"] == {"done": 0, "failed": 0, "missing": 6}
    made.run()
    made.verify()
    assert trained(tmp_path) == trained(whole.root)
    made.measure("loss", QUERIES, loss, DRAWS)
    assert len(made.table("loss").units) == 12


def test_a_deleted_unit_is_trained_again_to_the_same_bytes(copy, whole):
    shutil.rmtree(copy.folder(copy.units[4]))
    assert copy.status()["test"] == {"done": 5, "failed": 0, "missing": 1}
    times = {unit: copy.folder(unit).stat().st_mtime_ns for unit in copy.units if copy.done(unit)}
    copy.run()
    assert trained(copy.root) == trained(whole.root)
    assert {unit: copy.folder(unit).stat().st_mtime_ns for unit in times} == times, "its company is left alone"


def test_two_processes_that_finish_the_same_unit(copy, whole, tmp_path, monkeypatch):
    """The slower one finds the unit there, at the moment of its rename, and leaves it."""
    unit, written = copy.units[1], []
    shutil.rmtree(copy.folder(unit))

    def late(path: Path, *content: Any) -> None:
        shutil.copytree(whole.folder(unit), copy.folder(unit))  # by the faster one
        write_tensors(path, *content)
        written.append(path)

    with monkeypatch.context() as patch:
        patch.setattr(rooms, "write_tensors", late)
        copy.run()
    assert len(written) == 1
    theirs = {path.name: path.read_bytes() for path in whole.folder(unit).iterdir()}
    assert {path.name: path.read_bytes() for path in copy.folder(unit).iterdir()} == theirs, "the time it took, too"
    assert files(copy.root) == files(whole.root), "no temporary folder stays"
    # And two that train everything at the same time.
    workers = [start(retrain_slowly, tmp_path / "race", (0, 1), 0.01) for _ in range(2)]
    for worker in workers:
        worker.join(300)
        assert worker.exitcode == 0
    assert trained(tmp_path / "race") == trained(whole.root)
    plan(tmp_path / "race").verify()
    assert files(tmp_path / "race") == [name for name in files(whole.root) if not name.startswith("measurements")]


def test_a_block_that_another_process_finished_is_not_trained(tmp_path, monkeypatch):
    made, other, seen = plan(tmp_path), Ledger(tmp_path, images()), []

    def spy(*args: Any, **kwargs: Any) -> Iterator[Any]:
        seen.append(args[3][0].seed)
        yield from stacked_steps(*args, **kwargs)
        if len(seen) == 1:
            other.run((1, 2))

    monkeypatch.setattr(rooms, "stacked_steps", spy)
    made.run()
    assert seen == [100, 103, 203, 200], "each block once: the second and the last by the other process"
    assert len(trained(tmp_path)) == 12


def test_a_folder_that_is_in_the_way_is_told(copy):
    (copy.folder(copy.units[2]) / "DONE.json").unlink()
    assert not copy.done(copy.units[2])
    with refuses("units/00002 is in the way and not whole ...; delete it"):
        copy.run()
    assert not [name for name in files(copy.root) if ".tmp" in name]


def test_ctrl_c_keeps_what_is_finished_and_nothing_else(tmp_path, whole, monkeypatch):
    made, calls = plan(tmp_path), []

    def interrupted(*args: Any, **kwargs: Any) -> Iterator[Any]:
        calls.append(1)
        for number, item in enumerate(stacked_steps(*args, **kwargs)):
            if len(calls) == 2 and number == 3:
                raise KeyboardInterrupt
            yield item

    def while_writing(path: Path, value: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(rooms, "stacked_steps", interrupted)
        with pytest.raises(KeyboardInterrupt):
            made.run()
        patch.setattr(rooms, "stacked_steps", stacked_steps)
        patch.setattr(rooms, "write_json", while_writing)
        with pytest.raises(KeyboardInterrupt):
            made.run()
    assert sorted(trained(tmp_path)) == ["00000", "00001", "00002"]
    assert not [name for name in files(tmp_path) if ".tmp" in name or "failed" in name]
    made.run()
    assert trained(tmp_path) == trained(whole.root)


# ------------------------------------------------------------------------------------------------------------ failures


def wild(at: int, factor: float = 1e30) -> Callable[[Study, int], nn.Module]:
    """A network_at whose weights are far out for one seed."""
    plain = Study.network_at

    def network_at(study: Study, seed: int) -> nn.Module:
        net = plain(study, seed)
        if seed == at:
            for p in net.parameters():
                p.data *= factor
        return net

    return network_at


def test_a_diverging_unit_is_noted_and_tried_again_and_is_never_a_value(tmp_path, whole, monkeypatch):
    made = plan(tmp_path)
    bad = made.units[4]
    note = made.folder(bad).with_suffix(".failed.json")
    with monkeypatch.context() as patch:
        patch.setattr(Study, "network_at", wild(bad.seed))
        for _ in range(2):  # the second run tries it again, and only it
            made.run()
            failure = read_json(note)
            assert "training diverged at step 1: the loss is" in failure["error"]
            assert failure["seed"] == bad.seed
            note.unlink()
        made.run()
        assert made.status()["test"] == {"done": 5, "failed": 1, "missing": 0}
        assert made.status()["tune"]["failed"] == 0
        made.verify()
        made.measure("loss", QUERIES, loss, DRAWS)
        table = made.table("loss")
        assert [u.number for u in table.units] == [0, 1, 2, 3, 5, 6, 7, 8, 9, 10, 11]
        assert np.array_equal(table.masks, made.masks[[u.subset for u in table.units]])
        masks, outputs = table.averaged()
        assert len(masks) == len(outputs) == 6
        assert np.array_equal(outputs[2], table.outputs[[u.number for u in table.units].index(5)]), "its other seed"
        with refuses("unit 4 ... is not trained"):
            made.load(bad)
    made.run()
    assert made.status()["test"] == {"done": 6, "failed": 0, "missing": 0}
    assert not note.exists()
    made.measure("loss", QUERIES, loss, DRAWS)
    assert len(made.table("loss").units) == 12
    # All units of other blocks are as if nothing had happened; in its block they were trained one by one.
    other = {f"{u.number:05d}" for block in made.blocks() if bad not in block for u in block}
    assert {k: v for k, v in trained(tmp_path).items() if k in other} == {
        k: v for k, v in trained(whole.root).items() if k in other
    }
    close(made.table("loss").values, whole.table("loss").values, 1e-3)


def test_the_company_of_a_diverged_unit_is_not_trained_again(tmp_path, monkeypatch):
    made = plan(tmp_path)
    monkeypatch.setattr(Study, "network_at", wild(made.units[4].seed))
    made.run()
    seen = []

    def spy(*args: Any, **kwargs: Any) -> Iterator[Any]:
        seen.append(args[3].seed)
        return steps(*args, **kwargs)

    monkeypatch.setattr(rooms, "steps", spy)
    made.run()
    assert seen == [made.units[4].seed]


@pytest.mark.parametrize("stack", [1, 3])
def test_weights_that_overflow_at_the_last_step_are_a_failure(tmp_path, monkeypatch, stack):
    """The last loss is finite, what it leads to is not."""
    made = plan(tmp_path, stack)

    def overflown(run: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
        def steps(*args: Any, **kwargs: Any) -> Iterator[Any]:
            for state, value in run(*args, **kwargs):
                if state.step == STUDY.recipe.steps:
                    state.ema["into.bias"][..., -1] = float("inf")
                yield state, value

        return steps

    monkeypatch.setattr(rooms, "steps", overflown(steps))
    monkeypatch.setattr(rooms, "stacked_steps", overflown(stacked_steps))
    made.run()
    assert {role: counts["failed"] for role, counts in made.status().items()} == {"test": 6, "tune": 4, "other": 2}
    assert "a weight is NaN or Inf" in read_json(tmp_path / "units" / "00000.failed.json")["error"]
    assert trained(tmp_path) == {}


def test_errors_that_are_not_of_the_training_stop_the_run(tmp_path, monkeypatch):
    """A picture that cannot be read is no result of any unit."""
    made = plan(tmp_path)

    def unreadable(*args: Any, **kwargs: Any) -> Iterator[Any]:
        raise WhenceError("0001.png: the file changed after the folder was opened")

    monkeypatch.setattr(rooms, "stacked_steps", unreadable)
    with refuses("0001.png: the file changed"):
        made.run()
    assert not list(tmp_path.rglob("*.failed.json"))


@pytest.mark.parametrize("what", ["model.safetensors", "DONE.json", "missing"])
def test_a_tampered_unit_is_found_and_refused(copy, what):
    unit = copy.units[3]
    path = copy.folder(unit) / what
    if what == "missing":
        (copy.folder(unit) / "model.safetensors").unlink()
    elif what == "DONE.json":  # with a checksum of its own
        write_json(path, {**read_json(path), "unit": {**asdict(unit), "seed": 104}})
    else:
        content = bytearray(path.read_bytes())
        content[-20] += 1
        path.write_bytes(bytes(content))
    field = "unit.seed" if what == "DONE.json" else "sha256"
    said = f"units/00003 is not what was written ({field}: ...; delete it and run the ledger again"
    with refuses(said):
        copy.verify()
    with refuses(said):
        copy.load(unit)
    with refuses(said):
        copy.measure("norms", QUERIES, squared_norm, DRAWS)
    assert len(copy.table("norms").units) == 3, "those before it"


def test_whole_files_of_another_ledger_are_told(copy, tmp_path):
    """A training of the same number, subset and seed, and what was measured of it or of its neighbour."""
    study = replace(STUDY, recipe=changed(STUDY.recipe, learning_rate=0.02))
    other = Ledger.plan(tmp_path / "other", study, images(), subsets(), 3)
    other.run()
    other.measure("loss", QUERIES, loss, DRAWS)
    unit = copy.units[3]
    shutil.rmtree(copy.folder(unit))
    shutil.copytree(other.folder(unit), copy.folder(unit))
    with refuses("units/00003 is not what was written (plan: found"):
        copy.load(unit)
    folder = copy.root / "measurements" / "loss"
    shutil.copy(other.root / "measurements" / "loss" / "00001.safetensors", folder)
    with refuses("00001.safetensors: it belongs elsewhere...delete it and measure again"):
        copy.table("loss")
    shutil.copy(folder / "00005.safetensors", folder / "00006.safetensors")
    assert [one.path.name for one in copy.broken()] == ["00003", "00001.safetensors", "00006.safetensors"]
    removed, left = repair(copy.broken())
    assert (len(removed), left) == (3, [])
    copy.run()
    copy.measure("loss", QUERIES, loss, DRAWS)
    assert copy.broken() == []


def test_a_claim_is_no_damage(copy):
    """It stays where a measurement was refused, until the next one."""
    (copy.root / "measurements" / "loss" / "00001.safetensors.claim").write_text("{}")
    assert copy.broken() == []


def test_every_file_of_a_ledger_is_verified(copy):
    """Measurements, notes and what lacks, too: each by its own line, and all at once."""
    assert copy.broken() == []
    part = copy.root / "measurements" / "loss" / "00001.safetensors"
    content = bytearray(part.read_bytes())
    content[-1] ^= 1
    part.write_bytes(bytes(content))
    (copy.folder(copy.units[4]) / "DONE.json").unlink()
    (copy.root / "measurements" / "loss" / "mine.txt").write_text("x")
    told = [one.why for one in copy.broken()]
    assert [name for name in ("00001.safetensors", "00004", "mine.txt") if any(name in why for why in told)]
    assert len(told) == 3
    with refuses("units/00004"):
        copy.verify()
    with pytest.warns(UserWarning, match="00004 is in the way and not whole .no DONE.json."):
        copy.status()
    with refuses("00004 is in the way and not whole (no DONE.json); delete it and run the ledger again"):
        copy.run()


def test_what_is_broken_is_made_anew(copy, whole):
    for unit, name in ((2, "model.safetensors"), (5, "DONE.json")):
        (copy.folder(copy.units[unit]) / name).write_bytes(b"")
    (copy.root / "measurements" / "loss" / "00007.safetensors").write_bytes(b"{}")
    removed, left = repair(copy.broken())
    assert ([one.path.name for one in removed], left) == (["00002", "00005", "00007.safetensors"], [])
    copy.run()
    assert trained(copy.root) == trained(whole.root)
    assert unfinished_in(copy) == [f"{copy.root / 'measurements' / 'loss'} holds 11 of 12 finished trainings; "
                                   "`whence ledger measure` adds the others"]  # fmt: skip
    copy.measure("loss", QUERIES, loss, DRAWS)
    assert np.array_equal(copy.table("loss").values, whole.table("loss").values)
    assert copy.broken() == unfinished_in(copy) == []


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"units": [3]}, "`units.0` is 3"),
        ({"stack": 0}, "0 models together"),
        ({"n": "256"}, "`n` is "),
        ({"units": [{"subset": 99, "seed": 1, "role": "test", "design": "x", "chance": None}]}, "names subsets"),
        ({"study": {"is": "TemporaryDirectory"}}, ""),
    ],
)
def test_a_plan_that_is_none_is_refused_by_its_field(copy, change, what):
    path = copy.root / "plan.json"
    write_json(path, {**read_json(path), **change})
    with refuses(what, "plan.json"):
        Ledger(copy.root, copy.images)


# ----------------------------------------------------------------------------------------------------------- measuring


def naive(ledger: Ledger, unit: Unit, output: Output = loss, draws: Any = DRAWS) -> np.ndarray:
    """One query and one draw at a time: [m, K]."""
    forward, net, found = STUDY.forward(), ledger.load(unit).eval(), np.zeros((len(QUERIES), draws.count))
    for q in range(len(QUERIES)):
        batch = QUERIES.batch([q])
        at = draws(batch.keys, batch.x0.shape[1:], forward.timesteps)
        for s in range(draws.count):
            t, noise = at.t[0, s], at.noise[0, s]
            signal = forward.alphas_cumprod[t].float()
            with torch.no_grad():
                out = net(signal.sqrt() * batch.x0 + (1 - signal).sqrt() * noise, t[None])[0]
            wanted = (out - noise).square().mean() if output is loss else out.square().mean()
            found[q, s] = float(wanted)
    return found


def test_measured_values_are_those_of_a_naive_loop(whole):
    table = whole.table("loss")
    assert table.values.shape == (12, 5, 4)
    assert table.values.dtype == np.float32
    assert table.better == "lower"
    assert list(table.query_ids) == list(QUERIES.ids)
    for number in (0, 6, 11):
        close(table.values[number], naive(whole, whole.units[number]))


def test_values_do_not_depend_on_the_other_queries(copy, monkeypatch):
    """Common random numbers: the draws of a query are its own, whatever is measured with it."""
    reference = copy.table("loss").values
    for name, rows in (("one", [3]), ("some", [4, 0, 2])):
        copy.measure(name, subset(QUERIES, rows), loss, DRAWS)
        close(copy.table(name).values, reference[:, rows])
        assert list(copy.table(name).query_ids) == [QUERIES.ids[row] for row in rows]
    monkeypatch.setattr(rooms, "ROWS_AT_ONCE", 8)  # two queries with four draws each
    copy.measure("pieces", QUERIES, loss, DRAWS)
    close(copy.table("pieces").values, reference)
    monkeypatch.setattr(rooms, "ROWS_AT_ONCE", 1)
    copy.measure("slices", QUERIES, loss, DRAWS)
    close(copy.table("slices").values, reference)


def test_every_unit_sees_the_same_draws(copy, monkeypatch):
    """Were all units the same model, they would measure the same values."""
    load = Ledger.load
    monkeypatch.setattr(Ledger, "load", lambda self, unit: load(self, self.units[0]))
    copy.measure("same", QUERIES, loss, DRAWS)
    values = copy.table("same").values
    assert np.array_equal(values, np.broadcast_to(copy.table("loss").values[0], values.shape))


def test_several_measurements_side_by_side(copy):
    copy.measure("norms", QUERIES, squared_norm, uniform(3))
    table = copy.table("norms")
    assert table.values.shape == (12, 5, 3)
    assert table.better is None
    close(table.values[5], naive(copy, copy.units[5], squared_norm, uniform(3)))
    assert copy.table("loss").values.shape == (12, 5, 4)


@pytest.mark.parametrize(
    ("field", "queries", "output", "draws"),
    [
        ("draws.seed", QUERIES, loss, stratified(4, seed=8)),
        ("draws.timesteps.count", QUERIES, loss, stratified(6, seed=7)),
        ("better", QUERIES, squared_norm, DRAWS),
        ("queries", images(5, seed=4), loss, DRAWS),
        ("queries", subset(QUERIES, [1, 0, 2, 3, 4]), loss, DRAWS),
        ("query_ids", replace(QUERIES, ids=list("abcde")), loss, DRAWS),
    ],
)
def test_another_measurement_under_the_same_name_is_refused(copy, field, queries, output, draws):
    before = copy.table("loss").values
    with refuses(f"measurements/loss is another measurement ({field}: ...another name"):
        copy.measure("loss", queries, output, draws)
    assert np.array_equal(copy.table("loss").values, before)


def test_outputs_that_do_not_fit_are_refused(copy):
    with refuses("'margin' is for a classifier"):
        copy.measure("margin", QUERIES, margin, DRAWS)
    with refuses("nothing was measured as 'margin'"):
        copy.table("margin")


def test_an_unmeasured_name_lists_what_there_is(copy, tmp_path):
    with refuses("nothing was measured as 'elbo'", accepted="loss"):
        copy.table("elbo")
    copy.measure("norms", QUERIES, squared_norm, DRAWS)
    with refuses("nothing was measured as 'elbo'", accepted="loss, norms"):
        copy.table("elbo")
    empty = plan(tmp_path / "empty")
    with refuses("nothing was measured as 'loss'", accepted=f"`whence ledger measure {tmp_path / 'empty'} ...` first"):
        empty.table("loss")
    empty.measure("loss", QUERIES, loss, DRAWS)
    with refuses("holds no measured unit yet; run the ledger, then measure"):
        empty.table("loss")
    with refuses("unit 0 of ... is not trained; run `whence ledger run` first"):
        empty.load(empty.units[0])


def test_measuring_goes_on_where_it_stopped(copy, whole, monkeypatch):
    folder = copy.root / "measurements" / "loss"
    for number in (2, 5, 11):
        (folder / f"{number:05d}.safetensors").unlink()
    assert [u.number for u in copy.table("loss").units] == [0, 1, 3, 4, 6, 7, 8, 9, 10]
    loaded = []
    load = Ledger.load
    monkeypatch.setattr(Ledger, "load", lambda self, unit: (loaded.append(unit.number), load(self, unit))[1])
    copy.measure("loss", QUERIES, loss, DRAWS)
    assert loaded == [2, 5, 11]
    assert np.array_equal(copy.table("loss").values, whole.table("loss").values)
    copy.measure("loss", QUERIES, loss, DRAWS)
    assert loaded == [2, 5, 11]


def test_values_that_are_not_finite_are_named_and_left_out(copy, monkeypatch):
    load = Ledger.load

    def broken(self: Ledger, unit: Unit) -> nn.Module:
        net = load(self, unit)
        if unit.number in (2, 7):
            net.out.bias.data[0] = float("nan")
        return net

    monkeypatch.setattr(Ledger, "load", broken)
    with refuses("values of unit 2, 7 are NaN or Inf; they are left out"):
        copy.measure("again", QUERIES, loss, DRAWS)
    assert [u.number for u in copy.table("again").units] == [0, 1, 3, 4, 5, 6, 8, 9, 10, 11]


def test_a_damaged_measurement_is_told(copy):
    path = copy.root / "measurements" / "loss" / "00003.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    with refuses("00003.safetensors is damaged ...delete it and measure again"):
        copy.table("loss")


# -------------------------------------------------------------------------------------------------------------- tables


def small_table() -> Table:
    """Units out of order: subsets 2, 0, 2, 1, 0 in roles test, fit, test, tune, fit."""
    units = [
        Unit(number, sub, seed, role, "fixed(0.5)", 0.5)
        for number, (sub, seed, role) in enumerate(
            [(2, 1, "test"), (0, 2, "fit"), (2, 3, "test"), (1, 4, "tune"), (0, 5, "fit")]
        )
    ]
    masks = np.eye(3, 4, dtype=bool)[[2, 0, 2, 1, 0]]
    values = np.arange(5 * 2 * 3, dtype=np.float32).reshape(5, 2, 3)
    return Table(units, masks, values, ["a", "b"], "higher")


def test_roles_are_rows_of_the_table():
    table = small_table()
    test = table.role("test")
    assert [u.number for u in test.units] == [0, 2]
    assert np.array_equal(test.masks, table.masks[[0, 2]])
    assert np.array_equal(test.values, table.values[[0, 2]])
    assert (test.query_ids, test.better) == (table.query_ids, "higher")
    assert [u.number for u in table.role("tune", "fit").units] == [1, 3, 4]
    assert table.role("other").units == []
    assert table.role("other").values.shape == (0, 2, 3)


def test_outputs_are_means_over_draws_and_subsets_means_over_seeds():
    table = small_table()
    assert np.array_equal(table.subsets, [2, 0, 2, 1, 0])
    assert np.array_equal(table.outputs, [[1, 4], [7, 10], [13, 16], [19, 22], [25, 28]])
    assert table.outputs.dtype == np.float64
    masks, outputs = table.averaged()
    assert np.array_equal(masks, np.eye(3, 4, dtype=bool))
    assert np.array_equal(outputs, [[16, 19], [19, 22], [7, 10]])


def test_a_missing_training_does_not_move_its_subset():
    """Seeds that all subsets share move them alike; without one of them a subset is still ranked by its images."""
    rng = np.random.default_rng(0)
    effect, shift = rng.normal(size=(5, 1, 2)), 100 * rng.normal(size=(1, 3, 2))
    units = [Unit(3 * s + k, s, 40 + k, "test", "fixed(0.5)", 0.5) for s in range(5) for k in range(3)]
    values = (effect + shift).reshape(15, 2, 1)
    whole = Table(units, np.repeat(np.eye(5, dtype=bool), 3, 0), values, ["a", "b"], "lower")
    assert np.array_equal(whole.averaged()[1], values.reshape(5, 3, 2).mean(1)), "nothing is missing: the plain mean"
    keep = [0, 1, 2, 4, 5, 6, 8, 9, 10, 11, 12, 13]
    some = Table([units[r] for r in keep], whole.masks[keep], values[keep], ["a", "b"], "lower")
    found = some.averaged()[1]
    close(found - found[0], effect[:, 0] - effect[0, 0])
    assert some.ceiling().pearson.estimate == pytest.approx(1, rel=1e-6)


def test_the_table_of_a_ledger_has_the_masks_of_its_units(whole):
    table = whole.table("loss")
    assert np.array_equal(table.masks, np.stack([subsets()[u.subset].mask for u in table.units]))
    assert table.role("test").masks.sum(1).tolist() == [12] * 6
    masks, outputs = table.averaged()
    assert np.array_equal(masks, np.stack([s.mask for s in subsets()]))
    assert np.allclose(outputs[4], table.values[8:10].mean((0, 2)))


# --------------------------------------------------------------------------------------------------------- calibration


def test_calibration_returns_seconds_for_each_size():
    before = torch.get_rng_state()
    found = calibrate(STUDY, images(), sizes=(1, 2, 3), count=2)
    assert list(found) == [1, 2, 3]
    assert all(0 < seconds < 60 for seconds in found.values())
    assert torch.equal(torch.get_rng_state(), before)
    assert list(calibrate(STUDY, images(), sizes=(2,), count=1, engine=Engine(dtype=torch.float64))) == [2]
