"""How many trainings does it cost to differentiate a training, per query?

The study of the digits bank (142 000 parameters, batch 64, n = 512) cut to a few steps: processor seconds of a whole
metagradient (training, replay, reverse pass) for 1, 4, 16 and 40 queries at once, at all images, at half of them, and there
with the Gauss-Newton matrix and resampled slopes, as averaged metagradients have them; divided by those of the training
alone and by the number of queries. Forward mode for one direction and for 16. States and adjoints
stay within the engine's budget. Queries taken together must equal those taken alone to 1e-3 of the largest derivative, or
there is no result. Three rounds, the arms one after the other, so that what else runs on the machine meets all of them; the
figure is the median over rounds.

    OMP_NUM_THREADS=1 python benchmarks/unroll.py
"""

from collections import defaultdict
from dataclasses import replace
from itertools import pairwise
from statistics import median
from time import process_time

import torch

from _record import SMOKE, digits, peak_bytes, record
from whence.data.images import subset
from whence.evaluation import designs
from whence.training.unroll import Differentiation, Queries, Resample, Run, final_weights, metagradient, tangent
from whence.types import Engine

STEPS, COUNTS, ROUNDS, BUDGET = 32, (1, 4, 16, 40), 3, 512 * 2**20
if SMOKE:
    STEPS, COUNTS, ROUNDS = 3, (1, 2), 1


def timed(work):
    # Of the processor, not of the clock: other work on the machine is not ours.
    start = process_time()
    result = work()
    return result, process_time() - start


def agree(found):
    """Refuse queries that depend on their company."""
    for fewer, more in pairwise(found):
        apart = float((more[: len(fewer)] - fewer).abs().max() / more.abs().max())
        if apart > 1e-3:
            raise SystemExit(f"queries taken together differ by {apart} from those taken alone; no result is recorded")


def main():
    torch.set_num_threads(1)
    recipe = digits()
    whole = recipe.study.recipe
    study = replace(recipe.study, recipe=replace(whole, schedule=replace(whole.schedule, steps=STEPS)))
    images, engine = recipe.train, Engine(budget=BUDGET)
    half = torch.from_numpy(designs.fixed(len(images), 1, seeds=(0,))[0].mask).float()
    whole, part = (Run.of(study, images, weights=weights, engine=engine) for weights in (None, half))
    averaged = Differentiation("gauss-newton", Resample(len(images)))
    plain = Differentiation()
    runs = {"all": (whole, plain), "half": (part, plain), "half, averaged": (part, averaged)}
    asked = {count: Queries(subset(recipe.heldout, range(count)), study.recipe.loss, recipe.draws) for count in COUNTS}
    ways = torch.randn(16, len(images), generator=torch.Generator().manual_seed(0))
    metagradient(part, asked[1])  # the first call loads libraries
    per_step, ratios = defaultdict(list), defaultdict(list)
    for _ in range(ROUNDS):
        for name, (run, how) in runs.items():
            training = timed(lambda run=run: final_weights(run))[1]
            per_step[f"{name}: training"].append(training / STEPS)
            found = []
            for count in COUNTS:
                result, seconds = timed(lambda run=run, how=how, count=count: metagradient(run, asked[count], how))
                found.append(result)
                per_step[f"{name}: {count} queries"].append(seconds / STEPS)
                ratios[f"{name}: {count} queries"].append(seconds / training / count)
            agree(found)
        training = timed(lambda: final_weights(whole))[1]
        for count in (1, len(ways)):
            seconds = timed(lambda count=count: tangent(whole, ways[:count]))[1]
            ratios[f"forward: {count} directions"].append(seconds / training / count)
    record(
        "unroll",
        {
            "question": __doc__.splitlines()[0],
            "parameters": sum(p.numel() for p in study.network_at(0).parameters()),
            "images": len(images),
            "batch": study.recipe.batch_size,
            "steps": STEPS,
            "rounds": ROUNDS,
            "budget_bytes": BUDGET,
            "peak_resident_bytes": peak_bytes(),
            "trainings_per_query": {name: median(values) for name, values in ratios.items()},
            "processor_seconds_per_step": {name: median(values) for name, values in per_step.items()},
        },
    )


if __name__ == "__main__":
    main()
