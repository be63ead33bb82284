"""What does removing the images that D-TRAK or raw pixels name really change, against removing random ones?

python benchmarks/counterfactual.py [BENCH_FOLDER] [FOLDER]      after benchmarks/digits.py; about ten minutes of a core
"""

import shutil
import sys
from pathlib import Path

import torch

from _record import RESULTS, RUNS, SMOKE, digits, digits_bank, record
from whence.evaluation import banks, counterfactual
from whence.models import open_model
from whence.storage.scores import load_scores

METHODS, QUERIES, PLAN = ("d_trak", "pixel_cosine"), 8, counterfactual.Plan()
if SMOKE:
    QUERIES, PLAN = 2, counterfactual.Plan(fractions=(0.1,), random=2, sizes=(0.1, 0.5))

if __name__ == "__main__":
    torch.set_num_threads(1)
    bench, folder = (
        Path(sys.argv[i]) if len(sys.argv) > i else RUNS / name
        for i, name in ((1, "bench-digits"), (2, "counterfactual-digits"))
    )
    recipe = digits()
    generated = digits_bank(recipe).queries["generated"]
    result = counterfactual.run(
        PLAN,
        recipe.study,
        recipe.train,
        open_model(banks.train_reference(recipe, bench)),
        counterfactual.Asked(generated, range(QUERIES), recipe.draws, range(len(generated))),
        {method: load_scores(bench / "rows" / method / "generated") for method in METHODS},
        folder,
    )
    record("counterfactual-digits", {"question": __doc__.split("\n")[0], **result})
    counterfactual.plot(result, folder / "counterfactual.png")
    shutil.copy(folder / "counterfactual.png", RESULTS / "counterfactual-digits.png")
