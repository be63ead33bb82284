"""The ledger of retrained models: (subset, seed) -> weights -> outputs on any query. All truth is read from here.

    plan.json            what is retrained, on which images, in which blocks; never changed
    masks.safetensors    one bit per subset and image
    units/NNNNN/         model.safetensors and DONE.json (digest, loss, seconds); appears whole, by one rename
    units/NNNNN.failed.json   why a training diverged; it is tried again by the next run
    measurements/NAME/   one file per unit: raw values [m, K] of an output on m queries with K draws each

A unit is a pure function of the plan: blocks of `stack` units are trained as one stacked computation, always in the same
company, so that an interrupted ledger ends with the same bytes. The subset without images, where a design has it, is the
network before its training. Queries see the same draws in every unit (common random numbers).
"""

from __future__ import annotations

import time
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from whence.data.layout import some
from whence.diffusion.draws import Draws
from whence.diffusion.outputs import Output
from whence.evaluation.designs import EMPTY, Subset
from whence.evaluation.ledger_check import Broken, broken_in
from whence.evaluation.ledger_files import (
    FORMAT_VERSION,
    REPAIR,
    RESTORE,
    Measured,
    check_plan,
    made_with,
    masks_in,
    measured_values,
    measurement_of,
    planned_in,
    planned_study,
    subsets_differ,
)
from whence.evaluation.outcomes import Table, Unit
from whence.features.gradients import check, measure
from whence.features.rows import identity
from whence.storage.arrays import values_digest, write_checked, write_tensors
from whence.storage.files import (
    building,
    differences,
    file_digest,
    note_once,
    progress,
    read_json,
    telling,
    write_json,
)
from whence.storage.leftovers import sweep
from whence.storage.workers import Work, share
from whence.training.loop import stacked_steps, steps
from whence.training.optimizer import State, start
from whence.training.order import with_prior_images
from whence.training.standing import RecentLoss, Standing
from whence.training.step import Diverged
from whence.types import (
    VERSION,
    Batch,
    Draw,
    Engine,
    Forward,
    Images,
    Trainable,
    Weights,
    WhenceError,
    describe,
    digest,
)

Trained = tuple[Unit, Weights | None, Mapping[str, object]]  # weights, or None where it diverged, and facts
STANDING = "standing"  # the folder of trainings that are not over
ROWS_AT_ONCE = 4096  # (query, draw) pairs in one forward pass


class Ledger:
    """A ledger folder."""

    def __init__(self, root: Path, images: Images, study: Trainable | None = None):
        """Open a planned ledger.

        Args:
            root: its folder.
            images: those it was planned for.
            study: the one it was planned for. The plan says all of a study that starts from nothing (None); one that
                starts from the weights of a base is to be given.
        """
        self.root = Path(root)
        if not (self.root / "plan.json").is_file():
            raise WhenceError(f"{self.root} holds no plan.json; make one with `whence ledger plan`")
        self.images = images
        self.notes = planned_in(self.root)
        if self.notes["images"] != identity(images):
            raise WhenceError(
                "it was planned for other images",
                str(self.root),
                "those of the plan, at its resolution (and in Python `channels=1` for a model of grey pictures)",
            )
        self.digest = digest(self.notes)
        self.units = [Unit(number, **unit) for number, unit in enumerate(self.notes["units"])]
        self.masks = masks_in(self.root / "masks.safetensors", self.notes["masks"], len(images))
        if any(not 0 <= unit.subset < len(self.masks) for unit in self.units):
            raise WhenceError(
                "names subsets that masks.safetensors does not have", str(self.root / "plan.json"), RESTORE
            )
        with telling(self.root / "plan.json", RESTORE):
            self.study: Any = planned_study(self.root, self.notes["study"]) if study is None else study
        different = differences(self.notes["study"], describe(self.study))
        if different:
            raise WhenceError(f"{self.root} was planned for another study ({different[0][:200]})")

    @classmethod
    def plan(cls, root: Path, study: Trainable, images: Images, subsets: Sequence[Subset], stack: int) -> Ledger:
        """Write the plan, or open the folder if it holds this very plan already.

        Args:
            root: the folder.
            study: what is trained, and how.
            images: the training images, n of them.
            subsets: what is retrained.
            stack: units that are trained together.
        """
        check_plan(study, images, subsets, stack)
        # Equal subsets of one role are one row, so that their seeds are averaged together.
        first: dict[tuple[bytes, str], int] = {}
        own = [first.setdefault((subset.mask.tobytes(), subset.role), len(first)) for subset in subsets]
        kept = dict(zip(reversed(own), reversed(subsets), strict=True))  # of equal ones the first
        masks = np.stack([kept[row].mask for row in range(len(first))])
        packed = torch.from_numpy(np.packbits(masks, axis=1))
        units = [
            {"subset": row, "seed": seed, "role": subset.role, "design": subset.design, "chance": subset.chance}
            for row, subset in zip(own, subsets, strict=True)
            for seed in subset.seeds
        ]
        notes = {
            "format_version": FORMAT_VERSION,
            "study": describe(study),
            "images": identity(images),
            "n": len(images),
            "stack": stack,
            "masks": values_digest(packed),
            "units": units,
        }
        path, bits = Path(root) / "plan.json", Path(root) / "masks.safetensors"
        there = note_once(path, notes)
        different = differences(notes, there)
        if different:
            told = subsets_differ(different, there["units"], units) or different[0][:200]
            raise WhenceError(f"{path} is another plan ({told}); plans never change: use a new folder")
        sweep(Path(root))
        if not bits.exists():  # after the plan: whoever wrote that one says which images
            write_tensors(bits, {"masks": packed})
        return cls(root, images, study)

    def blocks(self) -> list[list[Unit]]:
        """Units that are trained together, always the same."""
        stack = self.notes["stack"]
        return [self.units[start : start + stack] for start in range(0, len(self.units), stack)]

    def folder(self, unit: Unit) -> Path:
        return self.root / "units" / f"{unit.number:05d}"

    def done(self, unit: Unit) -> bool:
        return (self.folder(unit) / "DONE.json").is_file()

    def _half(self, unit: Unit) -> str:
        """What is told of a unit that lacks a file, "" of any other: units appear by one rename, so something was removed,
        or put in the way."""
        missing = [name for name in ("DONE.json", "model.safetensors") if not (self.folder(unit) / name).is_file()]
        if not missing or not self.folder(unit).exists():
            return ""
        return f"{self.folder(unit)} is in the way and not whole (no {missing[0]}); {REPAIR}"

    def _say_half(self, unit: Unit) -> None:
        if told := self._half(unit):
            warnings.warn(told, stacklevel=4)

    def run(self, shard: tuple[int, int] = (0, 1), engine: Engine = Engine()) -> None:
        """Train what is missing.

        A training that diverges is noted and the others go on; `status` counts them. Any other error stops the run.

        Args:
            shard: (i, N) trains every N-th block from i, for N processes or machines side by side.
            engine: how the work is carried out.
        """
        index, count = shard
        if not 0 <= index < count:
            raise WhenceError(f"shard {index}/{count}; accepted: 0/{count} to {count - 1}/{count}")
        sweep(self.root)
        half = next(filter(None, map(self._half, self.units)), None)
        if half is not None:
            raise WhenceError(half)
        # Every N-th of all blocks, not of the missing ones: shards that start at different times must not miss a block.
        mine = [block for block in self.blocks()[index::count] if not self._finished(block)]
        for unit in chain.from_iterable(mine):
            self._failure(unit).unlink(missing_ok=True)  # it is tried again

        def over(block: Sequence[Unit]) -> bool:
            return all(self.done(unit) or self._failure(unit).exists() for unit in block)

        def compute(blocks: Iterable[Sequence[Unit]]) -> list[Trained]:
            return [trained for block in blocks for trained in self._train(block, engine)]

        def keep(block: Sequence[Unit], found: list[Trained]) -> None:
            for unit, weights, facts in found:
                if weights is None:
                    write_json(self._failure(unit), facts)
                elif not self.done(unit):
                    self._keep(unit, weights, facts)
            for unit in block:
                self._standing([unit], engine).over()

        work = Work(over, lambda block: self.folder(block[0]), compute, keep)
        share(mine, work, f"retraining in blocks of {self.notes['stack']}", engine)

    def _failure(self, unit: Unit) -> Path:
        """Where it is noted that a training diverged."""
        return self.folder(unit).with_suffix(".failed.json")

    def _finished(self, block: Sequence[Unit]) -> bool:
        return all(self.done(unit) for unit in block)

    def _train(self, block: Sequence[Unit], engine: Engine) -> Iterator[Trained]:
        begun = time.monotonic()
        for unit in (unit for unit in block if unit.design == EMPTY and not self.done(unit)):
            yield unit, start(self.study.network_at(unit.seed)).weights, {**made_with(engine), "seconds": 0.0}
        block = [unit for unit in block if unit.design != EMPTY]
        if len(block) > 1:
            try:
                yield from self._together(block, engine, begun)
                return
            except Diverged:
                pass  # find out which, and keep the others
        for unit in block:
            if self.done(unit):
                continue
            begun = time.monotonic()
            try:
                yield from self._together([unit], engine, begun)
            except Diverged as error:
                yield unit, None, {"error": str(error), "seed": unit.seed}

    def _together(
        self, block: Sequence[Unit], engine: Engine, begun: float
    ) -> Iterator[tuple[Unit, Weights, dict[str, object]]]:
        masks = torch.from_numpy(self.masks[[unit.subset for unit in block]]).float()
        network = self.study.network_at(block[0].seed)
        recipes, forward = [self.study.at(unit.seed) for unit in block], self.study.forward()
        pairs = [with_prior_images(self.study, self.images, mask) for mask in masks]
        images, given = pairs[0][0], torch.stack([weights for _, weights in pairs])
        standing, count = self._standing(block, engine), recipes[0].steps
        reached, what = standing.state(), f"training {block[0].number} to {block[-1].number}"
        run: Iterator[tuple[State, Any]]
        if len(block) == 1:
            run = steps(network, forward, images, recipes[0], given[0], reached, engine)
        else:
            # One after the other, kept by none: each may hold a whole base.
            others = (start(self.study.network_at(unit.seed)).weights for unit in block[1:])
            starts = [start(network).weights, *others]
            run = stacked_steps(network, forward, images, recipes, given, starts, engine, reached)
        left = count - (reached.step if reached else 0)
        for reached, loss in progress(standing.kept(run, count), what, left, RecentLoss().told, within=True):  # noqa: B007
            pass
        assert reached is not None
        losses = torch.as_tensor(loss, dtype=torch.float64).flatten().tolist()
        found = [reached.ema]
        if len(block) > 1:
            found = [{name: values[i] for name, values in reached.ema.items()} for i in range(len(block))]
        if not all(torch.isfinite(w).all() for weights in found for w in weights.values()):
            raise Diverged("training diverged at the last step: a weight is NaN or Inf; lower the learning rate")
        facts = {**made_with(engine), "seconds": (standing.seconds + time.monotonic() - begun) / len(block)}
        for unit, weights, loss in zip(block, found, losses, strict=True):
            yield unit, weights, {"last_loss": loss, **facts}

    def _standing(self, block: Sequence[Unit], engine: Engine) -> Standing:
        """Where the training of some units stands; on other machines of a cluster nothing is kept."""
        key = {"study": self.notes["study"], "images": self.notes["images"], "masks": self.notes["masks"]}
        key |= {"units": [unit.number for unit in block], "dtype": str(engine.dtype)}
        return Standing(None if engine.ray else self.root / STANDING, f"{block[0].number:05d}", key)

    def _keep(self, unit: Unit, weights: Weights, facts: Mapping[str, object]) -> None:
        target = self.folder(unit)
        with building(target) as folder:
            model = folder / "model.safetensors"
            write_tensors(model, weights)
            known = {"sha256": file_digest(model), "unit": asdict(unit), "plan": self.digest}
            notes = {**known, "whence": VERSION, **facts}
            write_json(folder / "DONE.json", notes)
            try:
                folder.rename(target)
            except OSError as error:
                if not self.done(unit):
                    raise WhenceError(f"{target} is in the way and not whole ({error.strerror}); delete it") from error
                # Another process was faster; its bytes are the same.
        self._failure(unit).unlink(missing_ok=True)

    def status(self) -> dict[str, dict[str, int]]:
        """Units done, failed and missing, by role."""
        found: dict[str, Counter[str]] = {}
        for unit in self.units:
            failed = self._failure(unit).exists()
            state = "done" if self.done(unit) else "failed" if failed else "missing"
            self._say_half(unit)
            found.setdefault(unit.role, Counter(done=0, failed=0, missing=0))[state] += 1
        return {role: dict(counts) for role, counts in found.items()}

    def verify(self) -> None:
        """Compare every file of the ledger with its digest; the first that differs is named (`broken` has all)."""
        for one in self.broken():
            raise WhenceError(one.why)

    def broken(self) -> list[Broken]:
        """Every file of the ledger that is not what was written."""
        return broken_in(self)

    def weights_of(self, unit: Unit) -> Path:
        """The file with the weights of a finished unit, re-hashed; one that is not what was written is refused."""
        noted = read_json(self.folder(unit) / "DONE.json", dict, REPAIR)
        path = self.folder(unit) / "model.safetensors"
        found = {"unit": asdict(unit), "sha256": file_digest(path) if path.is_file() else None, "plan": self.digest}
        # Earlier versions did not note the plan.
        different = differences({key: noted.get(key, self.digest if key == "plan" else None) for key in found}, found)
        if different:
            raise WhenceError(f"{self.folder(unit)} is not what was written ({different[0]}); {REPAIR}")
        return path

    def load(self, unit: Unit) -> nn.Module:
        """The trained network of a unit; weights that are not those that were written are refused."""
        if not self.done(unit):
            raise WhenceError(f"unit {unit.number} of {self.root} is not trained; run `whence ledger run` first")
        network, weights = self.study.network_at(unit.seed), load_file(self.weights_of(unit))
        if weights.keys() != start(network).weights.keys():
            raise WhenceError(f"unit {unit.number} of {self.root} holds the weights of another network")
        network.load_state_dict(weights, strict=False)  # what is not trained is as the study makes it
        return network

    def measure(self, name: str, queries: Images, output: Output, draws: Draws, engine: Engine = Engine()) -> None:
        """Measure an output on queries in every finished unit that lacks it.

        Values that are not finite are not kept: their units are named when all others are measured.

        Args:
            name: of the measurement.
            queries: the images, m of them.
            output: what is measured.
            draws: of each query, K of them.
            engine: how the work is carried out.
        """
        folder, forward = self.root / "measurements" / name, self.study.forward()
        check(output, forward)
        notes = {
            "output": output.name,
            "better": output.better,
            "draws": describe(draws),
            "queries": identity(queries),
            "query_ids": list(queries.ids),
        }
        different = differences(notes, note_once(folder / "manifest.json", notes))
        if different:
            raise WhenceError(f"{folder} is another measurement ({different[0][:200]}); choose another name")
        sweep(self.root)
        of = measurement_of(self.digest, notes)

        def at(unit: Unit) -> Path:
            return folder / f"{unit.number:05d}.safetensors"

        todo = [unit for unit in self.units if self.done(unit) and not at(unit).exists()]
        for unit in self.units:
            self._say_half(unit)
        if not todo:
            return
        inputs, bad = list(pairs(queries, draws, forward, engine)), []

        def compute(modules: Iterable[nn.Module]) -> Tensor:
            (module,) = (each.to(engine.device, engine.dtype).eval() for each in modules)
            with torch.no_grad():
                values = torch.cat([measure(module, {}, forward, output, batch, draw) for batch, draw in inputs])
            return values.reshape(len(queries), draws.count).float().cpu()

        def keep(unit: Unit, values: Tensor) -> None:
            if torch.isfinite(values).all():
                write_checked(at(unit), {"values": values}, f"{of}/{unit.number}")
            else:
                bad.append(unit.number)

        work = Work(lambda unit: at(unit).exists(), at, compute, keep, lambda unit: (self.load(unit),))
        share(todo, work, f"measuring {name}", engine)
        if bad:
            raise WhenceError(f"{folder}: values of unit {some(bad)} are NaN or Inf; they are left out")

    def table(self, name: str) -> Table:
        """Everything measured under a name. Units that are not finished are left out; failures are never values."""
        folder = self.root / "measurements" / name
        if not (folder / "manifest.json").is_file():
            if folder.is_dir():
                raise WhenceError("it is missing, or no file", str(folder / "manifest.json"), f"{folder} measured anew")
            known = sorted(path.parent.name for path in self.root.glob("measurements/*/manifest.json"))
            raise WhenceError(
                f"nothing was measured as {name!r}",
                str(self.root),
                ", ".join(known)
                or f"`whence ledger measure {self.root} ...` first, which measures the models that were trained",
            )
        notes = read_json(folder / "manifest.json", Measured, "measure again under another name")
        units = [unit for unit in self.units if (folder / f"{unit.number:05d}.safetensors").exists()]
        if not units:
            raise WhenceError(f"{folder} holds no measured unit yet; run the ledger, then measure")
        m, of = len(notes["query_ids"]), measurement_of(self.digest, notes)
        values = np.stack(
            [measured_values(folder / f"{unit.number:05d}.safetensors", m, f"{of}/{unit.number}") for unit in units]
        )
        masks = self.masks[[unit.subset for unit in units]]
        return Table(units, masks, values, notes["query_ids"], notes["better"], notes["queries"])


def pairs(queries: Images, draws: Draws, forward: Forward, engine: Engine) -> Iterator[tuple[Batch, Draw]]:
    """All (query, draw) pairs, query by query, in pieces that fit in memory.

    Args:
        queries: the images.
        draws: of each query.
        forward: says how many timesteps there are.
        engine: the device and the number format.
    """
    per_piece = max(1, ROWS_AT_ONCE // draws.count)
    for begin in range(0, len(queries), per_piece):
        batch = queries.batch(range(begin, min(begin + per_piece, len(queries)))).to(engine.device, engine.dtype)
        draw = draws(batch.keys, batch.x0.shape[1:], forward.timesteps, engine.dtype)

        def per_draw(value: Tensor) -> Tensor:
            return value.repeat_interleave(draws.count, dim=0)

        cond = {name: per_draw(value) for name, value in batch.cond.items()}
        flat = Draw(draw.t.flatten().to(batch.x0.device), draw.noise.flatten(0, 1).to(batch.x0))
        yield Batch(per_draw(batch.x0), per_draw(batch.keys), cond), flat
