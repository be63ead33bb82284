"""How often is a picture called a copy, or a set of pictures a training set, when it is not one, and when it is?

    python benchmarks/copies.py [ICONS CIFAR2]        about half an hour of one core

Copies, by pixels: the share of held-out pictures that is flagged at a rate, which should be no more than that; the share of
training images that are flagged when noise of some size is added to them (in units of [-1, 1], then rounded to 8 bits); and
what becomes of a copy of an image that lies in the training set 50 times, as the same pixels or each time a little
different. Digits, and the folders of pictures, each with train/ and val/.

Membership, on a perceptron that was trained on 128 digits: p of sets of which neither was in the training, over random
splits, by the permutation test and by Welch's test on the same scores (uniform if they are right: Kolmogorov-Smirnov); p of
70 of the 128 after more and more steps; and the verdict on unseen pictures of another kind (digits in negative).
"""

import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from scipy.stats import kstest

from _record import SMOKE, digits, record
from whence.data.images import image_folder, tensor_images
from whence.data.pixels import to_pixels, to_x0
from whence.evaluation import membership as testing
from whence.evaluation.banks import digit_images
from whence.evaluation.copies import calibrated, judged
from whence.evaluation.neighbours import neighbours
from whence.features.membership import NAMES, Signals
from whence.features.rows import rows
from whence.models import open_model
from whence.training.recipe import Schedule
from whence.training.runs import train_study
from whence.types import Engine, Task

RATES, NOISES, PLANTED, TIMES = (0.01, 0.02, 0.05, 0.1), (0.01, 0.02, 0.05, 0.1, 0.2, 0.5), 200, 50
MEMBERS, OTHERS, SET, SPLITS, SHUFFLES, DRAWN = 128, 1669, 70, 200, 199, 5
STEPS = (100, 300, 1000, 10_000)
if SMOKE:
    PLANTED, TIMES, MEMBERS, OTHERS, SET, SPLITS, SHUFFLES, DRAWN, STEPS = 4, 3, 12, 20, 6, 2, 3, 1, (2, 4)


def all_of(images):
    return images.batch(range(len(images))).x0


def noisy(x0, size, seed=0):
    """As a picture that was saved: 8 bits."""
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(seed))
    return to_x0(to_pixels(x0 + size * noise).numpy())


def copies_of(train, heldout):
    """What is flagged of held-out pictures and of planted ones."""
    x0 = all_of(train)
    found = neighbours(train, heldout)
    rates = [rate for rate in RATES if rate * (len(found.between) + 1) >= 1]
    rows_ = np.random.default_rng(0).permutation(len(train))[:PLANTED]
    planted = {}
    for size in NOISES:
        near = neighbours(train, tensor_images(noisy(x0[rows_], size)))
        right = [near.nearest[j] == train.ids[row] for j, row in enumerate(rows_)]
        planted[f"{size:g}"] = {
            "the right image is the nearest": float(np.mean(right)),
            **{f"flagged at {rate:g}": share(judged(near, rate)) for rate in rates[:1]},
        }
    return {
        "training images": len(train),
        "held out": len(heldout),
        "compared": len(found.between),
        "flagged of held out": {f"{rate:g}": share(judged(found, rate)) for rate in rates},
        "threshold": {f"{rate:g}": calibrated(found, rate).threshold for rate in rates},
        "flagged of planted, by noise": planted,
        "an image that is there many times": many_times(x0, rows_[0], rates[0]),
    }


def many_times(x0, row, rate):
    """A training image that is there 50 times more; a picture that is it with a little noise."""
    query = tensor_images(noisy(x0[row : row + 1], 0.02, seed=1))
    same = x0[row : row + 1].repeat(TIMES, 1, 1, 1)
    found = {}
    for name, more in (("the same pixels", same), ("noise of 0.02 on each", noisy(same, 0.02, seed=2))):
        near = neighbours(tensor_images(torch.cat([x0, more])), query)
        copy = judged(near, rate)[0]
        found[name] = {"flagged": copy.flagged, "similarity": copy.similarity, "threshold": copy.threshold, "p": copy.p}
    return found


def share(copies):
    return float(np.mean([copy.flagged for copy in copies]))


def membership_of_digits(folder):
    """p-values where there is nothing to find, and where there is."""
    members, others = digit_images(0, MEMBERS), digit_images(MEMBERS, MEMBERS + OTHERS)
    negative = tensor_images(-all_of(others)[:SET])
    whole = digits().study
    study = replace(whole, recipe=replace(whole.recipe, schedule=Schedule(STEPS[-1], min(50, STEPS[0] - 1)), seed=1))
    train_study(study, members, folder, STEPS[0])
    rng, found = np.random.default_rng(0), {}
    for checkpoint in open_model(folder).checkpoints:
        if checkpoint.step in STEPS:
            ours, theirs = (signals_of(folder, checkpoint, images) for images in (members, others))
            found[str(checkpoint.step)] = [told(pick(rng, ours), pick(rng, theirs), 999) for _ in range(DRAWN)]
    # The last checkpoint is the one that has learned most by heart.
    splits = []
    for _ in range(SPLITS):
        chosen = theirs[rng.permutation(len(theirs))[: 2 * SET]]
        splits.append(testing.separation(chosen[:SET], chosen[SET:], testing.Comparison(permutations=SHUFFLES)))
    kind = told(signals_of(folder, checkpoint, negative), pick(rng, theirs), 999)
    return {
        "features": len(NAMES),
        "pictures of each kind": SET,
        "splits of unseen pictures": {
            "splits": SPLITS,
            "permutations": SHUFFLES,
            "permutation test": uniform([each.p for each in splits]),
            "Welch's test on the same scores": uniform([each.welch_p for each in splits]),
        },
        "members, by steps of training": found,
        "unseen, but in negative": kind,
    }


def signals_of(folder, checkpoint, images):
    model = open_model(folder)
    task = Task(model.forward, (checkpoint,), images, images, folder, Engine())
    return rows(Signals(), task, checkpoint, images, "signals").all().double().numpy()


def pick(rng, values):
    return values[rng.permutation(len(values))[:SET]]


def told(first, second, permutations):
    found = testing.separation(first, second, testing.Comparison(permutations=permutations if not SMOKE else SHUFFLES))
    loss = testing.loss_effect(first, second)
    return {"p": found.p, "welch_p": found.welch_p, "effect": found.effect, "auc": found.auc, "loss_effect": loss}


def uniform(values):
    p = np.array(values)
    below = {f"below {level:g}": float(np.mean(p <= level)) for level in (0.01, 0.05, 0.1, 0.5)}
    return {"Kolmogorov-Smirnov p": float(kstest(p, "uniform").pvalue), **below}


def main(folders):
    torch.set_num_threads(1)
    sets = {"digits": (digit_images(0, 512), digit_images(512, 512 + (8 if SMOKE else 1285)))}
    for folder in folders:
        sets[folder.name] = tuple(image_folder(folder / part) for part in ("train", "val"))
    with tempfile.TemporaryDirectory() as work:
        record(
            "copies",
            {
                "question": __doc__.split("\n")[0],
                "copies": {name: copies_of(*sides) for name, sides in sets.items()},
                "membership": membership_of_digits(Path(work)),
            },
        )


if __name__ == "__main__":
    main([Path(word) for word in sys.argv[1:]])
