"""How much faster are 16 subset models trained together than one by one?

One core, one run, the arms in turn, set-up left out: the digits bank's perceptron, and a small UNet on the same digits.
"""

import os

os.environ["WHENCE_QUIET"] = "1"

import time
from dataclasses import replace

import torch

from _record import SMOKE, digits, record
from whence.training.loop import stacked_steps, steps
from whence.training.recipe import New, Recipe, Schedule
from whence.training.study import Study, unet_config

MODELS, STEPS, ROUNDS = 16, 8, 3
if SMOKE:
    MODELS, STEPS, ROUNDS = 4, 1, 1


def seconds(run):
    """Per step, without the first two."""
    next(run), next(run)
    begun = time.process_time()
    for _ in run:
        pass
    return (time.process_time() - begun) / STEPS


def compare(study, images):
    torch.manual_seed(0)
    masks = (torch.rand(MODELS, len(images)) < 0.5).float()
    study = replace(study, recipe=replace(study.recipe, schedule=replace(study.recipe.schedule, steps=STEPS + 2)))
    networks = [study.network_at(seed) for seed in range(MODELS)]
    starts = [{name: p.detach().clone() for name, p in network.named_parameters()} for network in networks]
    trainings = [study.at(seed) for seed in range(MODELS)]
    rounds = []
    for _ in range(ROUNDS):
        alone = (
            sum(seconds(steps(study.network_at(s), study.forward(), images, trainings[s], masks[s])) for s in range(4))
            / 4
        )
        together = seconds(stacked_steps(networks[0], study.forward(), images, trainings, masks, starts)) / MODELS
        rounds.append({"alone": alone, "together": together, "ratio": alone / together})
    return {"rounds": rounds, "ratio": sorted(r["ratio"] for r in rounds)[ROUNDS // 2]}


if __name__ == "__main__":
    torch.set_num_threads(1)
    recipe = digits()
    network = {**unet_config(8, 1, (16, 32)), "add_attention": False}
    unet = Study(Recipe(New(network), schedule=Schedule(1, 0), batch_size=32, ema=0.0))
    record(
        "stacked",
        {
            "question": __doc__.split("\n")[0],
            "models": MODELS,
            "measure": "CPU seconds per step and model; the median of three rounds",
            "perceptron": compare(recipe.study, recipe.train),
            "unet": compare(unet, recipe.train),
        },
    )
