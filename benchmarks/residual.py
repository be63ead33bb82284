"""At how many steps must DAS measure the residual of a training image, and does it beat raw pixels?

python benchmarks/residual.py digits [FOLDER]             minutes of one core
python benchmarks/residual.py icons|photos DATA [FOLDER]

`das` at its own settings but for `residual`, the steps of the grid that r_i is measured at (0: r_i = 1; published: 1,000),
with `leverage`, and `d_trak` beside it. All queries of the bank, test subsets, two-way bootstrap intervals.

lds        of the method
pixels     less that of pixel_cosine, paired
"""

import shutil

import torch

from _record import SMOKE, asked_bank, numbers, record
from whence.evaluation import banks
from whence.evaluation.lds import bootstrap, predict
from whence.methods import build, settings_of
from whence.models import open_model
from whence.types import Engine, Task

STEPS = (0, 5) if SMOKE else (0, 5, 10, 20, 50, 100)
ROWS = {f"das, residual {steps}": ("das", {"residual": steps}) for steps in STEPS} | {
    "das, leverage": ("das", {"leverage": True}),
    "d_trak": ("d_trak", {}),
    "pixels": ("pixel_cosine", {}),
}


def scores_of(name, settings, task):
    """Values [m, n]."""
    small = {"draws": settings_of(name)["draws"].with_count(2)} if SMOKE and "draws" in settings_of(name) else {}
    return build(name, task.forward, small | settings)(task).values.numpy()


if __name__ == "__main__":
    torch.set_num_threads(1)
    name, bank, recipe, folder = asked_bank()
    model = open_model(banks.train_reference(recipe, folder))
    trajectory, engine, rows = (*model.checkpoints, model.final), Engine(budget=2**30), {}
    for kind in banks.QUERIES:
        task = Task(model.forward, trajectory, recipe.train, bank.queries[kind], folder / "residual", engine)
        table = bank.tables[kind]
        masks, outputs = table.role("test").averaged()
        predictions = {row: predict(scores_of(*asked, task), masks) for row, asked in ROWS.items()}
        judge = bootstrap(predictions, outputs, table.better or "lower")
        for row in ROWS:
            over = numbers(judge.difference(row, "pixels"))
            rows.setdefault(row, {})[kind] = {"lds": numbers(judge.interval(row)), "pixels": over}
    shutil.rmtree(folder / "residual")
    for bank_name in ("digits", name) if SMOKE else (name,):
        record(f"residual-{bank_name}", {"question": __doc__.split("\n")[0], "bank": bank.name, "rows": rows})
