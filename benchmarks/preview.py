"""How well does the preview foresee the pictures that a model retrained without some images would draw?

python benchmarks/preview.py [FOLDER]      about a quarter of an hour of one core

The digits bank's model; groups of 1 to 20 % of the images, at random, and a whole class (the digit 4); the same seed
everywhere. Beside the preview: the first order, that is the derivative at the model itself; two points of the midpoint rule,
for random groups of 10 and 20 %; one step of influence functions, H^-1 sum of the group's gradients, with EK-FAC and with
the Gram matrix of the training gradients. Their damping is the one that does best on these very groups.
"""

import sys
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch

from _record import RESULTS, RUNS, SMOKE, digits, record
from whence.curvature.factors import Factors
from whence.curvature.kfac import EKFAC
from whence.curvature.solve import Problem
from whence.diffusion.draws import stratified
from whence.diffusion.outputs import loss
from whence.evaluation import banks
from whence.evaluation.preview import Preview, plot, preview
from whence.features.parts import Gradient
from whence.features.rows import rows
from whence.models import denoise, open_model, start_noise, with_weights
from whence.storage.files import progress
from whence.task import Sampling, drawing
from whence.training.unroll import Run, tangent
from whence.types import Engine, Task

FRACTIONS, GROUPS, PICTURES = (0.01, 0.02, 0.05, 0.1, 0.2), 2, 32
MANY, OURS = (0.1, 0.2), ("preview", "preview, 2 points", "first order")
DAMPINGS = tuple(10.0**e for e in range(-2, 4))
DRAWS, STEPS, ENGINE = 64, 50, Engine(budget=2**31)
if SMOKE:
    FRACTIONS, GROUPS, PICTURES, MANY, DAMPINGS, DRAWS, STEPS = (0.1, 0.2), 1, 2, (0.1, 0.2), (1.0, 10.0), 2, 2


def groups(recipe):
    """[(name, fraction, mask [n])]"""
    n, rng = len(recipe.train), np.random.default_rng(0)
    for fraction in FRACTIONS:
        for number in range(GROUPS):
            mask = torch.zeros(n, dtype=torch.bool)
            mask[torch.from_numpy(rng.permutation(n)[: round(fraction * n)])] = True
            yield f"random {number}", fraction, mask
    digit = torch.tensor(recipe.train.meta["digit"])
    yield "digit 4", float((digit == 4).double().mean()), digit == 4


def steps_of(recipe, model, root):
    """damping name -> function from a mask to changed weights."""
    part, point = Gradient(loss, stratified(DRAWS)), model.final
    task = Task(model.forward, (point,), recipe.train, recipe.train, root, ENGINE)
    phi = rows(part, task, point, task.train, "gradients").all().double()
    sizes = part.sizes(point.load())
    theta = {name: p.detach() for name, p in point.load().named_parameters()}

    def moved(row):
        pieces = row.split(list(sizes.values()))
        return {
            name: theta[name] + piece.view_as(theta[name]).float() for name, piece in zip(sizes, pieces, strict=True)
        }

    def by_gram(mask, damping):
        values, vectors = gram  # (Phi^T Phi + lambda)^-1 Phi^T 1_R = Phi^T (Phi Phi^T + lambda)^-1 1_R
        damped = vectors @ ((vectors.T @ mask.double()) / (values + damping * values.mean()))
        return moved(phi.T @ damped)

    def by_ekfac(mask, damping):
        total, row = phi[mask].sum(0, keepdim=True), torch.zeros(1, phi.shape[1], dtype=torch.float64)
        for eigen in curvature:
            solved = eigen.rotate(total) * eigen.inverse(damping, False) / len(phi)
            eigen.block.scatter(eigen.back(solved), row)
        return moved(row[0])

    gram = torch.linalg.eigh(phi @ phi.T)
    curvature = EKFAC(0.01, factors=Factors(skip_others=True)).curvature(Problem(task, point, part))
    return {"EK-FAC step": by_ekfac, "Gram step": by_gram}


def main(folder):
    recipe = digits()
    model = open_model(banks.train_reference(recipe, folder))
    noise = start_noise(model, PICTURES, 0)
    others, network = steps_of(recipe, model, folder / "preview"), model.final.load().eval()
    result = []
    draw = drawing(model, Sampling(PICTURES, steps=STEPS), ENGINE)
    run = Run.of(recipe.study, recipe.train, engine=ENGINE)
    for name, fraction, mask in progress(list(groups(recipe)), "groups"):
        own = model.final.load()  # `network` holds whatever was drawn from last
        found = preview(own, recipe.study, recipe.train, mask, draw, True, ENGINE)
        row = {"group": name, "fraction": fraction, "images": int(mask.sum()), "preview": found.facts()}
        theta, change = tangent(run, -mask.float())
        first = draw(with_weights(network, {key: theta[key] + change[key] for key in theta}))
        row["first order"] = replace(found, predicted=first).facts()
        if fraction in MANY:
            more = preview(own, recipe.study, recipe.train, mask, draw, False, ENGINE, points=2)
            row["preview, 2 points"] = replace(found, predicted=more.predicted).facts()
        for other, step in others.items():
            tried = {}
            for damping in DAMPINGS:
                weights = step(mask, damping)
                drawn = denoise(with_weights(network, weights), model, noise, STEPS, {}, ENGINE, quiet=True)
                tried[damping] = Preview(found.before, drawn, found.retrained, 0.0).facts()
            row[other] = [{"damping": damping, **facts} for damping, facts in tried.items()]
        if name == "digit 4":
            plot(found, f"Without the digit 4 ({row['images']} of {len(recipe.train)} images)", folder / "preview.png")
        result.append(row)
    return {"question": __doc__.split("\n")[0], "pictures": PICTURES, "groups": result, "summary": summary(result)}


def summary(result):
    """Mean over groups of about one size, and for the steps the damping with the best mean `explained` over all groups."""
    found = {}
    for other in ("EK-FAC step", "Gram step"):
        means = [np.mean([row[other][k]["explained"] for row in result]) for k in range(len(DAMPINGS))]
        found[other] = int(np.argmax(means))
    table = []
    for fraction in FRACTIONS:
        some = [row for row in result if row["group"].startswith("random") and row["fraction"] == fraction]
        line = {"fraction": fraction}
        for key in ("correlation", "explained"):
            for name in OURS:
                if name in some[0]:
                    line[f"{name} {key}"] = float(np.mean([row[name][key] for row in some]))
            for other, best in found.items():
                line[f"{other} {key}"] = float(np.mean([row[other][best][key] for row in some]))
        table.append(line)
    return {"damping": {other: DAMPINGS[best] for other, best in found.items()}, "random groups": table}


def figure(result, path):
    table = result["summary"]["random groups"]
    drawing, axes = plt.subplots(1, 2, figsize=(8, 3.2), layout="constrained")
    for at, key in zip(axes, ("correlation", "explained"), strict=True):
        colours = ("#0b66c3", "#0b9a8d", "#8a5cc3", "#d1600c", "0.5")
        for name, colour in zip((*OURS, "EK-FAC step", "Gram step"), colours, strict=True):
            there = [line for line in table if f"{name} {key}" in line]
            x, y = zip(*((100 * line["fraction"], line[f"{name} {key}"]) for line in there), strict=True)
            at.plot(x, y, "o-", ms=4, label=name, color=colour)
        at.set_xscale("log")
        at.set_xlabel("images removed, %")
        at.axhline(0, color="0.3", ls=":", lw=1)
        at.spines[["top", "right"]].set_visible(False)
    axes[0].set_title("correlation of predicted and true change", loc="left", fontsize=10)
    axes[1].set_ylim(-1, 1.02)
    axes[1].set_title("share of it explained (0 = no change)", loc="left", fontsize=10)
    axes[0].legend(frameon=False, fontsize=8)
    drawing.savefig(path, dpi=150)


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else RUNS / "bench-digits"
    result = main(folder)
    record("preview", result)
    figure(result, RESULTS / "preview.png")
    (RESULTS / "preview-digit-4.png").write_bytes((folder / "preview.png").read_bytes())
    for line in result["summary"]["random groups"]:
        print({key: round(value, 3) for key, value in line.items()})
