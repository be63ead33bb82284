"""Which recipes are smooth in the weights of their images, and train as well?

python benchmarks/smooth.py      about four minutes of one core

The digits bank's model under variations of its recipe: metasmoothness at a step of 0.1 (`unroll.smoothness`), and the loss
on training images and on held-out ones, each over 100 stratified draws.
"""

from dataclasses import replace

import torch

from _record import SMOKE, digits, record
from whence.data.images import subset
from whence.diffusion.draws import stratified
from whence.diffusion.outputs import loss
from whence.training.recipe import Schedule
from whence.training.unroll import Queries, Run, final_weights, smoothness
from whence.training.unroll.measured import values
from whence.training.unroll.run import Trainer
from whence.types import Engine

BANK, DRAWS = digits().study.recipe, 2 if SMOKE else 100
STEPS, WARMUP = BANK.schedule.steps, BANK.schedule.warmup_steps
ADAMW = BANK.optimizer
VARIANTS = {
    "the bank's: AdamW, eps_root 1e-8, batch 64, averaged": BANK,
    "eps_root 0 (torch's AdamW)": replace(BANK, optimizer=replace(ADAMW, eps_root=0.0)),
    "eps_root 1e-6": replace(BANK, optimizer=replace(ADAMW, eps_root=1e-6)),
    "eps_root 1e-4": replace(BANK, optimizer=replace(ADAMW, eps_root=1e-4)),
    "batch 256, a quarter of the steps": replace(BANK, batch_size=256, schedule=Schedule(STEPS // 4, WARMUP // 4)),
    "rate 1e-2": replace(BANK, optimizer=replace(ADAMW, learning_rate=1e-2)),
    "weights not averaged": replace(BANK, ema=0.0),
}


def main():
    recipe, engine, rows = digits(), Engine(budget=2**31), {}
    some = subset(recipe.train, range(min(100, len(recipe.train))))
    for name, variant in VARIANTS.items():
        study = replace(recipe.study, recipe=variant)
        run = Run.of(study, recipe.train, engine=engine)
        final, row = final_weights(run), {"metasmoothness": smoothness(run).score}
        for kind, images in (("train", some), ("held-out", recipe.heldout)):
            row[f"{kind} loss"] = float(values(Trainer(run), Queries(images, loss, stratified(DRAWS)), final).mean())
        rows[name] = row
        print(name, {key: round(value, 4) for key, value in row.items()}, flush=True)
    return rows


if __name__ == "__main__":
    torch.set_num_threads(1)
    record("smooth", {"question": __doc__.split("\n")[0], "recipes": main()})
