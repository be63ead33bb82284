"""Further training: what do other subsets, other optimizers and other ways back give?

python benchmarks/further_variants.py [FOLDER]      an hour of one core; goes on where it was cut off

On the digits bank, all queries of both kinds, with what digits.py left there. Each row changes one thing in the defaults
with two masks: the size of the subsets, what is left out on the way back ("none" is TracIn along the steps), SGD, moments
that are estimated first while the weights are held, and AdamW in the eigenbasis of the model's Kronecker factors (what
EK-FAC would precondition the steps by). LDS on test subsets with its paired difference to the defaults; `chosen`, on tune
subsets and every second query, is what a choice may look at.
"""

import json
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from _record import RUNS, SMOKE, digits, digits_bank, numbers, record
from whence.diffusion.draws import stratified
from whence.diffusion.outputs import loss
from whence.evaluation import banks
from whence.evaluation.lds import bootstrap, lds, predict
from whence.features.gradients import measure
from whence.methods.further import Further, FurtherTraining
from whence.models import open_model
from whence.training.optimizer import SGD, AdamW
from whence.training.order import noise_keys
from whence.training.recipe import Schedule
from whence.types import Draw, Engine, Task

HELD = 50
STEPS = 3 if SMOKE else 200


@dataclass(frozen=True)
class HeldFirst(Schedule):
    """The weights are held while AdamW's moments are estimated."""

    held: int = HELD

    def rate(self, height, step):
        return 0.0 if step < self.held else super().rate(height, step - self.held)


class Rotated(nn.Module):
    """A linear layer whose weights are written in the eigenbasis of its inputs and of its output's gradients."""

    def __init__(self, layer, inputs, outputs):
        super().__init__()
        self.weight, self.bias = nn.Parameter(outputs.T @ layer.weight.detach() @ inputs), layer.bias
        self.register_buffer("inputs", inputs)
        self.register_buffer("outputs", outputs)

    def forward(self, x):
        return nn.functional.linear(nn.functional.linear(x, self.inputs.T), self.outputs @ self.weight, self.bias)


def rotated(module, forward, images):
    """The same network with every linear layer in its eigenbasis."""
    layers = {name: part for name, part in module.named_modules() if type(part) is nn.Linear}
    seen = {}

    def keep(name):
        def hook(_, given, output):
            output.retain_grad()
            seen[name] = given[0].detach(), output

        return hook

    handles = [part.register_forward_hook(keep(name)) for name, part in layers.items()]
    batch = images.batch(range(len(images)))
    drawn = stratified(16, seed=11)(noise_keys(images), batch.x0.shape[1:], forward.timesteps)
    sums = {name: [0.0, 0.0] for name in layers}
    for number in range(drawn.t.shape[1]):
        draw = Draw(drawn.t[:, number], drawn.noise[:, number])
        measure(module, dict(module.named_parameters()), forward, loss, batch, draw).sum().backward()
        for name, (given, output) in seen.items():
            for side, x in enumerate((given, output.grad)):
                sums[name][side] = sums[name][side] + x.flatten(0, -2).double().T @ x.flatten(0, -2).double()
    for handle in handles:
        handle.remove()
    for name, both in sums.items():
        bases = [torch.linalg.eigh(each)[1].to(layers[name].weight.dtype) for each in both]
        owner, _, last = name.rpartition(".")
        setattr(module.get_submodule(owner), last, Rotated(layers[name], *bases))
    return module.zero_grad() or module


@dataclass(frozen=True, eq=False)
class InEigenbasis(Further):
    """Further training of the rotated network."""

    images: object = None

    def network_at(self, seed):
        return rotated(super().network_at(seed), self.measured, self.images)

    def describe(self):
        return super().describe() | {"is": "InEigenbasis"}


@dataclass(frozen=True)
class Variant(FurtherTraining):
    """Another optimizer, another schedule, another basis."""

    sgd: float | None = None
    held: int = 0
    eigenbasis: bool = False

    def study(self, task):
        study = super().study(task)
        recipe = study.recipe
        if self.sgd is not None:
            recipe = replace(recipe, optimizer=SGD(self.sgd, momentum=0.9))
        if self.held:
            recipe = replace(recipe, schedule=HeldFirst(self.steps, self.warmup_steps, self.schedule, self.held))
        study = replace(study, recipe=recipe)
        if self.eigenbasis:
            return InEigenbasis(study.checkpoint, study.measured, study.recipe, study.engine, task.train)
        return study


DEFAULTS = "defaults"
ROWS = {
    DEFAULTS: {},
    "subsets of 3/4": {"fraction": 0.75, "pairs": False},
    "subsets of 7/8": {"fraction": 0.875, "pairs": False},
    "the Hessian": {"curvature": "hessian"},
    "the Hessian, slopes as trained": {"curvature": "hessian", "resample_draws": None},
    "no curvature: TracIn along the steps": {"curvature": "none"},
    "SGD, rate 0.03": {"sgd": 0.03},
    "SGD, rate 0.1": {"sgd": 0.1},
    "SGD, rate 0.3": {"sgd": 0.3},
    "moments estimated first": {"held": HELD, "steps": STEPS + HELD},
    "AdamW in the eigenbasis": {"eigenbasis": True},
}
if SMOKE:
    ROWS = {
        DEFAULTS: {},
        "moments estimated first": {"held": 1, "steps": STEPS + 1},
        "AdamW in the eigenbasis": {"eigenbasis": True},
    }


def scores(tasks, draws, rate, settings):
    """Of each kind of query, and the processor's seconds."""
    begun = time.process_time()
    method = Variant(**{"steps": STEPS, "masks": 2, "draws": draws, "redraw": False, "learning_rate": rate} | settings)
    found = {kind: method(task).values.numpy() for kind, task in tasks.items()}
    return found, time.process_time() - begun


def judged(bank, values):
    """Kind -> row -> LDS on test subsets, and what it is above the defaults."""
    found = {}
    for kind, rows in values.items():
        masks, outputs = bank.tables[kind].role("test").averaged()
        resampled = bootstrap({name: predict(v, masks) for name, v in rows.items()}, outputs)
        found[kind] = {
            name: {
                "lds": numbers(resampled.interval(name)),
                "over the defaults": numbers(resampled.difference(name, DEFAULTS)),
                "chosen": float(lds(v, *bank.tables[kind].role("tune").averaged())[::2].mean()),
            }
            for name, v in rows.items()
        }
    return found


def main(folder):
    """The result after each row."""
    recipe = digits()
    bank, model = digits_bank(recipe), open_model(banks.train_reference(recipe, folder))
    task = Task(model.forward, (model.final,), recipe.train, recipe.heldout, folder / "variants", Engine(budget=2**31))
    tasks = {kind: replace(task, queries=queries) for kind, queries in bank.queries.items()}
    rate = FurtherTraining(steps=STEPS, masks=2).study(task).recipe.optimizer.learning_rate
    assert isinstance(FurtherTraining(learning_rate=rate).study(task).recipe.optimizer, AdamW)
    values, kept = {kind: {} for kind in tasks}, folder / "variants-costs.json"
    seconds = json.loads(kept.read_text()) if kept.exists() else {}  # of rows that an earlier run has finished
    for name, settings in ROWS.items():
        found, took = scores(tasks, recipe.draws, rate, settings)
        seconds.setdefault(name, took)
        kept.write_text(json.dumps(seconds))
        for kind, each in found.items():
            values[kind][name] = each
        yield {"rate": rate, "seconds": {row: seconds[row] for row in ROWS if row in seconds}, **judged(bank, values)}


if __name__ == "__main__":
    torch.set_num_threads(1)
    for result in main(Path(sys.argv[1]) if len(sys.argv) > 1 else RUNS / "bench-digits"):
        record("further_variants", {"question": __doc__.split("\n")[0], **result})
