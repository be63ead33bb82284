"""How good are gradients through further training, from the finished weights alone, and at what price?

python benchmarks/further.py [FOLDER]      an hour of one core; goes on where it was cut off, with what digits.py left there

On the digits bank, all queries of both kinds, test subsets. (a) Steps, rate, its schedule and the number of masks: LDS,
seconds, and seconds per gradient of an (image, draw). (b) The defaults beside EK-FAC and its ensemble of four models of
random halves: LDS with intervals, paired differences. Settings were chosen on tune subsets and every second query; `chosen`
says what each would have got there.
"""

import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from _record import RUNS, SMOKE, digits, digits_bank, numbers, peak_bytes, record
from whence.diffusion.draws import stratified
from whence.diffusion.outputs import loss
from whence.evaluation import banks, bench
from whence.evaluation.lds import bootstrap, lds, predict
from whence.features.gradients import per_image
from whence.methods.further import FurtherTraining
from whence.models import open_model
from whence.storage.scores import load_scores
from whence.types import Engine, Task

ENGINE = Engine(budget=2**31)
PEERS = ("ek_fac", "ek_fac_ensemble")
TRIED: list[dict[str, Any]] = [
    {"steps": 400, "learning_rate": 2e-3, "masks": 4},
    {"steps": 25, "learning_rate": 1e-3, "schedule": "constant", "masks": 2},
    {"steps": 50, "learning_rate": 1e-3, "schedule": "constant", "masks": 2},
    {"steps": 50, "learning_rate": 1e-3, "schedule": "constant", "masks": 8},
    {"steps": 100, "learning_rate": 5e-4, "schedule": "constant", "masks": 2},
    {"steps": 100, "learning_rate": 5e-4, "schedule": "constant", "masks": 8},
    {"steps": 100, "learning_rate": 3e-3, "schedule": "constant", "masks": 2},
    {"steps": 200, "learning_rate": 1e-3, "schedule": "constant", "masks": 2},
    {"steps": 300, "learning_rate": 3e-3, "masks": 2},
]
DEFAULTS: list[dict[str, Any]] = [{"masks": count} for count in (2, 4, 8)]
if SMOKE:
    TRIED, DEFAULTS, PEERS = [{"steps": 2, "learning_rate": 1e-3, "masks": 2}], [{"steps": 2, "masks": 2}], ("ek_fac",)


def seconds_per_gradient(task):
    """Of one (image, draw), from gradients of 16 images at 32 draws."""
    module, images = task.trajectory[-1].load(), task.train.batch(range(min(16, len(task.train))))
    names, draws = [name for name, _ in module.named_parameters()], stratified(32)
    begun = time.process_time()
    for _ in per_image(module, task.forward, loss, draws, images, names, 16):
        pass
    return (time.process_time() - begun) / (len(images.x0) * draws.count)


def scores(tasks, draws, settings):
    """Of each kind of query, and the processor's seconds."""
    begun = time.process_time()
    method = FurtherTraining(draws=draws, redraw=False, **settings)
    found = {kind: method(task) for kind, task in tasks.items()}
    rate = found["heldout"].recipe["study"]["recipe"]["optimizer"]["learning_rate"]
    return {kind: each.values.numpy() for kind, each in found.items()}, time.process_time() - begun, rate


def words(settings):
    return ", ".join(f"{name} {value}" for name, value in settings.items())


def judged(bank, values, folder):
    """kind -> settings or peer -> LDS on test subsets, and differences to the peers."""
    found = {}
    for kind, of_settings in values.items():
        masks, outputs = bank.tables[kind].role("test").averaged()
        peers = {name: load_scores(folder / "rows" / name / kind).values.numpy() for name in PEERS}
        resampled = bootstrap({name: predict(v, masks) for name, v in (of_settings | peers).items()}, outputs)
        found[kind] = {name: {"lds": numbers(resampled.interval(name))} for name in [*of_settings, *peers]}
        for name in of_settings:
            found[kind][name]["over"] = {peer: numbers(resampled.difference(name, peer)) for peer in peers}
            chosen = lds(of_settings[name], *bank.tables[kind].role("tune").averaged())[::2].mean()
            found[kind][name]["chosen"] = float(chosen)
    return found


def main(folder):
    """The result after each row."""
    recipe = digits()
    bank, model = digits_bank(recipe), open_model(banks.train_reference(recipe, folder))
    bench.run(bank, recipe, folder, PEERS, bench.Settings(stratified(2), 8) if SMOKE else bench.Settings(), ENGINE)
    task = Task(model.forward, (model.final,), recipe.train, recipe.heldout, folder / "further", ENGINE)
    tasks = {kind: replace(task, queries=queries) for kind, queries in bank.queries.items()}
    one, values, kept = seconds_per_gradient(task), {kind: {} for kind in tasks}, folder / "further-costs.json"
    costs = json.loads(kept.read_text()) if kept.exists() else {}  # of rows that an earlier run has finished
    for settings in [*DEFAULTS, *TRIED]:
        found, seconds, rate = scores(tasks, recipe.draws, settings)
        # Masks of a row before are there already.
        fewer = [words(settings | {"masks": k}) for k in (2, 4) if k < settings["masks"]]
        seconds += max((costs[name]["seconds"] for name in fewer if name in costs), default=0.0)
        per_query = seconds / one / sum(len(each) for each in found.values())
        costs.setdefault(words(settings), {"seconds": seconds, "gradients per query": per_query, "rate": rate})
        kept.write_text(json.dumps(costs))
        for kind, each in found.items():
            values[kind][words(settings)] = each
        done = judged(bank, values, folder)
        yield {"seconds per gradient": one, "costs": costs, **done, "peak bytes": peak_bytes()}


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else RUNS / "bench-digits"
    for result in main(folder):
        record("further", {"question": __doc__.split("\n")[0], **result})
