"""Which methods find the image that a fine-tune was made with, among the images of its base?

python benchmarks/customization.py digits                an hour of one core; fine-tunes of the digits bank's reference model
python benchmarks/customization.py icons DATA [METHOD ...]     fine-tunes of the icons bank's
python benchmarks/customization.py --smoke               two methods on tiny fine-tunes

The first half of the fine-tunes is for learning maps (abc_cosine), the other half is judged. What is finished lies in
runs/abc-BANK and is not computed again.
"""

import sys
from pathlib import Path

import torch

from _record import RUNS, SMOKE, digits, record
from whence.data.images import image_folder, subset
from whence.data.saving import save_png
from whence.diffusion.draws import uniform
from whence.evaluation import banks
from whence.evaluation.exemplars import Exemplars, FineTunes, Sources, build
from whence.evaluation.maps import Learning
from whence.evaluation.retrieved import Asked, fit, judge
from whence.features.maps import KINDS, Maps
from whence.methods import METHODS, settings_of
from whence.task import Sampling
from whence.training.optimizer import AdamW
from whence.training.recipe import Full, Recipe, Schedule
from whence.types import Engine

LEFT_OUT = {
    "exact_influence",
    "influence_cg",
    "influence_lissa",
    "ek_fac_refined",
    "guda",
    "mucs",
    "abu",
    "further_training",
}
"""Hours each, or about groups."""


def methods(names):
    """Name -> settings; all that ask for nothing but weights and images where none is named."""
    known = [name for name, entry in METHODS.items() if not entry.needs or entry.needs == ("layers",)]
    chosen = names or [name for name in known if name not in LEFT_OUT]
    return {name: settings(name) for name in chosen}


def settings(name):
    if SMOKE:
        return {key: value for key, value in {"draws": uniform(2), "dim": 8}.items() if key in settings_of(name)}
    return {}


def learning(kind):
    return Learning(kind, (1.0,), steps=2) if SMOKE else Learning(kind)


def images(name, data):
    """Training images of the base, and others."""
    if name == "digits":
        return digits().train, banks.digit_images(600, 900)
    recipe = banks.by_name(name, data)
    return recipe.train, image_folder(data / "val", 16, channels=recipe.train.batch([0]).x0.shape[1])


def folder_of(pictures, folder):
    if not folder.is_dir():
        x0 = pictures.batch(range(len(pictures))).x0
        save_png(folder, x0, [f"{row:04d}" for row in range(len(pictures))])
    return folder


def main(name, data, names):
    torch.set_num_threads(1)
    root, engine = RUNS / f"abc-{name}", Engine(budget=2**31)
    train, others = images(name, data)
    if SMOKE:
        train, others = subset(train, range(16)), subset(others, range(20))
    sources = Sources(folder_of(train, root / "train"), folder_of(others, root / "others"))
    base = banks.train_reference(digits() if name == "digits" else banks.by_name(name, data), RUNS / f"bench-{name}")
    models, steps, drawn = (6, 2, 2) if SMOKE else (8, 60, 10)
    recipe = Recipe(Full(base), AdamW(3e-4, beta1=0.9, eps_root=0.0), Schedule(steps, 0, "constant"), ema=0.0)
    how = FineTunes(recipe, models, 1, Sampling(drawn, 0, 2 if SMOKE else 20))
    build(sources, how, root / "benchmark", engine)
    benchmark = Exemplars.read(root / "benchmark", sources.train)
    maps, learned = {}, {}
    for kind in KINDS:
        place = root / f"maps-{kind}"
        maps[kind] = Maps.read(place) if place.is_dir() else fit(benchmark, "pixels", learning(kind), place)
        learned[kind] = {
            key: maps[kind].notes[key] for key in ("encoder_alone", "left_out", "strength", "kappa", "beta")
        }
    asked = methods(names or (["pixel_cosine", "trak"] if SMOKE else None))
    best = max(KINDS, key=lambda kind: float(str(learned[kind]["left_out"])))
    asked["abc_cosine"] = {"encoder": str(root / f"maps-{best}")}
    result = judge(benchmark, Asked(asked, engine), root / "judged")
    record(f"abc-{name}", {"question": __doc__.split("\n")[0], "maps": learned, "chosen": best, **result})


if __name__ == "__main__":
    given = [argument for argument in sys.argv[1:] if argument != "--smoke"] or ["digits"]
    place = None if given[0] == "digits" else Path(given[1])
    main(given[0], place, given[1 if place is None else 2 :])
