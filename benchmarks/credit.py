"""Which methods say whom to credit as retraining does, and do the intervals of shares hold?

python benchmarks/credit.py DATA [FOLDER [BANK]]      minutes, after pictures.py and further_pictures.py on the icons

The truth: exact Shapley values of eight creators from all their coalitions, two seeds (`whence bank creators`). Beside it,
for every method with rows in FOLDER (runs/bench-icons), the sums of its scores by creator: rank and linear correlation with
the truth over creators, mean over pictures, with intervals over pictures; how far its shares of all pictures are from the
true ones; the same of paying by the number of images. How well two seeds agree says what can be reached. Coverage: credit
from a few coalitions that kernel SHAP draws and from every fourth picture, against the exact shares of all pictures.
"""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from _record import RUNS, SMOKE, digits, numbers, record
from further_pictures import EVERY, FURTHER, further, scored
from whence.data.owners import owners
from whence.evaluation import banks, designs
from whence.evaluation.credit import Sums, credit, shares, sums_of
from whence.evaluation.games import game_of
from whence.evaluation.lds import Interval, spearman
from whence.evaluation.readers import VALUES, whole_game
from whence.evaluation.tables import pearson_columns
from whence.features.rows import identity
from whence.methods.removal.semivalues import kernel_masks, kernel_shap
from whence.storage.scores import load_scores
from whence.types import Scores

REPEATS, COALITIONS, BY = 100, 60, "creator"
if SMOKE:
    REPEATS, COALITIONS, BY = 3, 12, "digit"


def smoke_bank(folder):
    """All coalitions of three of the digits, trained here."""
    recipe = digits()
    rows = owners(recipe.train, BY)
    players = dict(list(rows.items())[:3])
    base = [row for name, own in rows.items() if name not in players for row in own]
    recipe = replace(recipe, subsets=designs.coalitions(len(recipe.train), players, base, (1, 2)))
    banks.build(recipe, "creators", folder)
    return recipe, banks.load("creators", recipe, folder / "bank")


def over_pictures(values, resamples=2000):
    """Mean and interval of a number per picture [m], pictures drawn again."""
    known = np.asarray(values)[np.isfinite(values)]
    rng = np.random.default_rng(0)
    means = known[rng.integers(0, len(known), (resamples, len(known)))].mean(axis=1)
    low, high = (float(q) for q in np.quantile(means, [0.025, 0.975]))
    return numbers(Interval(float(known.mean()), low, high, 0))


def beside(truth, phi):
    """How near sums [m, k] are to the truth [m, k]."""
    apart = np.abs(shares(phi).mean(axis=0) - shares(truth).mean(axis=0)).sum() / 2
    return {
        "rank": over_pictures(spearman(phi.T, truth.T)),
        "linear": over_pictures(pearson_columns(phi.T, truth.T)),
        "share of the money that goes elsewhere": float(apart),
    }


def methods(bank, recipe, folder, kind, names):
    """Method -> rows of its pictures, and its sums by creator."""
    found = {}
    for path in sorted(folder.glob(f"rows/*/{kind}")):
        scores = load_scores(path)
        if scores.signed:
            own = replace(scores, train_meta=recipe.train.meta)
            found[path.parent.name] = range(len(scores.query_ids)), sums_of(own, BY)
    if not SMOKE:
        values, _ = scored(bank, recipe, folder, FURTHER, further(recipe), EVERY)
        rows = range(0, len(bank.queries[kind]), EVERY)
        meta = recipe.train.meta
        asked = [bank.queries[kind].ids[row] for row in rows]
        scores = Scores(torch.from_numpy(values[kind]), asked, recipe.train.ids, {}, train_meta=meta)
        found[FURTHER] = rows, sums_of(scores, BY)
    return {name: (rows, columns(sums, names)) for name, (rows, sums) in found.items()}


def columns(sums, names):
    return sums.values[:, [list(sums.names).index(name) for name in names]]


def coverage(game, exact):
    """Of credit from few coalitions and every fourth picture: how often its intervals hold the share of all pictures."""
    masks, means, _ = game.averaged()
    place = {mask.tobytes(): row for row, mask in enumerate(masks)}
    size, k = masks.sum(axis=1), masks.shape[1]
    whole, inside, total = shares(exact).mean(axis=0), 0, 0
    for repeat in range(REPEATS):
        drawn = [place[mask.tobytes()] for mask in kernel_masks(k, COALITIONS, seed=repeat)]
        pictures = np.random.default_rng(repeat).permutation(len(exact))[: max(2, len(exact) // 4)]
        few = means[:, pictures]
        try:
            found = kernel_shap(masks[drawn], few[drawn], few[size == 0][0], few[size == k][0], game.better)
        except ValueError:  # the few coalitions do not tell all players apart
            continue
        told = credit(Sums(game.players, [1] * k, found.values, found.stderr, None), resamples=400, seed=repeat)
        inside += int(((told.low <= whole) & (whole <= told.high)).sum())
        total += k
    return {"inside": inside / max(total, 1), "intervals": total, "coalitions": COALITIONS}


def of_seed(game, seed):
    return game.only(lambda unit: unit.seed == seed)


def main(bank, recipe, folder):
    result = {}
    for kind in banks.QUERIES:
        players = owners(recipe.train, BY)
        game = whole_game(game_of(bank.tables[kind], players))
        assert game is not None, "some coalitions are not there"
        exact = VALUES["shapley"].read(game)
        seeds = [VALUES["shapley"].read(of_seed(game, seed)).values for seed in game.seeds]
        pairs = spearman(seeds[0].T, seeds[1].T), pearson_columns(seeds[0].T, seeds[1].T)
        owned = np.tile([len(players[name]) for name in game.players], (len(exact.values), 1)).astype(float)
        rows = {"by the number of images": beside(exact.values, owned)}
        for name, (pictures, phi) in methods(bank, recipe, folder, kind, game.players).items():
            rows[name] = beside(exact.values[list(pictures)], phi)
        for name in ("leave_one_out", "banzhaf"):
            rows[f"{name}, retrained"] = beside(exact.values, VALUES[name].read(game).values)
        result[kind] = {
            "methods": rows,
            "one seed beside the other": {"rank": over_pictures(pairs[0]), "linear": over_pictures(pairs[1])},
            "error of a value over its spread": float(np.median(exact.stderr) / exact.values.std()),
            "coverage": coverage(game, exact.values),
            "shares": dict(zip(game.players, shares(exact.values).mean(axis=0).tolist(), strict=True)),
        }
    return result


if __name__ == "__main__":
    torch.set_num_threads(1)
    if SMOKE:
        folder = RUNS / "bench-credit"
        recipe, bank = smoke_bank(folder)
    else:
        data, *rest = sys.argv[1:]
        folder = Path(rest[0]) if rest else RUNS / "bench-icons"
        recipe = banks.creators(Path(data))
        bank = banks.load("creators", recipe, Path(rest[1]) if len(rest) > 1 else None)
        icons = banks.load("icons", banks.icons(Path(data)))
        for kind in banks.QUERIES:
            assert identity(icons.queries[kind]) == identity(bank.queries[kind]), (
                f"{kind}: the rows are of other pictures"
            )
    record("credit", {"question": __doc__.split("\n")[0], **main(bank, recipe, folder)})
