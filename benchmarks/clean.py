"""Does `whence clean` find what is wrong with a data set, and as often as it says?

    python benchmarks/clean.py [CIFAR2]        about five minutes of one core; a folder of pictures with train/ and val/

1,000 digits of scikit-learn, and 1,000 photos of two classes. Planted: (a) 5 % labels put wrong at random; AUROC of the vote
of the neighbours, of self-influence in a classifier and in a class-conditional diffusion model that were trained on the
wrong labels, of both, and of cleanlab's label quality (logistic regression on pixels, five folds) where it is installed; how
many a list holds, how many of these are right, and the share that it says it would find. (b) What hurts 200 held-out
pictures: AUROC of harm for the same labels. (c) Copies by what was done to them. (d) Outliers: negatives and pictures of
shuffled pixels, beside scikit-learn's local outlier factor. Three draws of what is planted among digits, one
among photos; the diffusion model learns the first digits alone.
"""

import io
import sys
import tempfile
from importlib import import_module
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_predict
from sklearn.neighbors import LocalOutlierFactor
from torch.nn import functional

from _record import SMOKE, record
from whence.data.images import image_folder, tensor_images
from whence.data.pixels import to_pixels, to_x0
from whence.diffusion.forward import Classifier
from whence.evaluation.banks import digit_images
from whence.evaluation.curation import doubts, harm, lookalikes, neighbourhood, outliers, ranks
from whence.evaluation.retrieval import mislabel_auroc
from whence.methods import build
from whence.methods.inner_product import self_influence
from whence.models import open_model
from whence.task import task_from_module
from whence.training.optimizer import AdamW
from whence.training.recipe import New, Recipe, Schedule
from whence.training.runs import train_study
from whence.training.study import Study, unet_config
from whence.types import Task

COUNT, HELD_OUT, WRONG, EPOCHS, STEPS, COPIES = 1000, 200, 50, 20, {"digits": 600}, 100
DRAWN = {"digits": 3}  # of others one
if SMOKE:
    COUNT, HELD_OUT, WRONG, EPOCHS, STEPS, COPIES = 60, 10, 6, 1, {"digits": 3}, 6
    DRAWN = {"digits": 1}
METHODS = {"influence": {"dim": 512}, "d_trak": {"dim": 512}}


def data(name, folder):
    """Pictures and labels of both sides."""
    if name == "digits":
        sides = digit_images(0, COUNT), digit_images(COUNT, COUNT + HELD_OUT)
        return [(some.batch(range(len(some))).x0, np.array(some.meta["digit"])) for some in sides]
    found = []
    for part, count in (("train", COUNT), ("val", HELD_OUT)):
        images = image_folder(folder / part)
        rows = np.random.default_rng(0).permutation(len(images))[:count]
        labels = images.labels
        assert labels is not None
        found.append((images.batch(rows.tolist()).x0, labels[rows].numpy()))
    return found


def flipped(labels, seed):
    """Labels of which some are wrong, and which."""
    rng, classes = np.random.default_rng(seed), int(labels.max()) + 1
    bad = np.zeros(len(labels), bool)
    bad[rng.permutation(len(labels))[:WRONG]] = True
    return np.where(bad, (labels + rng.integers(1, classes, len(labels))) % classes, labels), bad


def classifier(x0, labels):
    """A small convolutional network, trained on these labels."""
    torch.manual_seed(0)
    nn, side = torch.nn, x0.shape[-1] // 4
    parts = [nn.Conv2d(x0.shape[1], 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3, padding=1)]
    parts += [nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(32 * side**2, int(labels.max()) + 1)]
    net, told = nn.Sequential(*parts), torch.tensor(labels)
    optimizer = torch.optim.Adam(net.parameters(), 2e-3)
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(x0)).split(50):
            optimizer.zero_grad()
            functional.cross_entropy(net(x0[rows]), told[rows]).backward()
            optimizer.step()
    return net


def of_classifier(x0, labels, bad, heldout, vote, folder):
    net = classifier(x0, labels)
    train, asked = tensor_images(x0, labels=labels.tolist()), tensor_images(heldout[0], labels=heldout[1].tolist())
    task = task_from_module(net, Classifier(), train, asked, folder)
    method = build("influence", task.forward, METHODS["influence"])
    own = self_influence(method, task).numpy()
    hurt = harm(method(task))
    return {
        "self-influence": mislabel_auroc(own, bad),
        "both": mislabel_auroc(ranks(own) + vote, bad),
        "first as many as were planted, by both": share_first(ranks(own) + vote, bad),
        "harm": mislabel_auroc(hurt.harm, bad),
        "listed as harmful": int(hurt.flagged.sum()),
        "of them with a wrong label": int((hurt.flagged & bad).sum()),
    }


def of_diffusion(name, x0, labels, bad, vote, folder):
    widths = (16, 16) if name == "digits" else (16, 32, 32)
    network = unet_config(x0.shape[-1], x0.shape[1], widths, classes=int(labels.max()) + 1)
    steps = STEPS[name]
    recipe = Recipe(New(network), AdamW(2e-3), Schedule(steps, min(100, steps // 2)), batch_size=32, seed=0)
    images = tensor_images(x0, labels=labels.tolist())
    train_study(Study(recipe), images, folder / "model", steps)
    opened = open_model(folder / "model")
    task = Task(opened.forward, (opened.final,), images, images, folder / "run")
    found = {"steps": steps}
    for method, settings in METHODS.items():
        own = self_influence(build(method, task.forward, settings), task).numpy()
        found[method] = {"self-influence": mislabel_auroc(own, bad), "both": mislabel_auroc(ranks(own) + vote, bad)}
    return found


def of_cleanlab(x0, labels, bad):
    """cleanlab's scores and issues, where it is installed; the score by itself needs no more than the probabilities."""
    model = LogisticRegression(max_iter=500)
    p = cross_val_predict(model, x0.flatten(1).numpy(), labels, cv=5, method="predict_proba")
    try:
        rank, issues = import_module("cleanlab.rank"), import_module("cleanlab.filter")
    except ImportError:
        return "not installed"
    found = issues.find_label_issues(labels, p)
    return {
        "version": import_module("cleanlab").__version__,
        "AUROC": mislabel_auroc(1 - rank.get_label_quality_scores(labels, p), bad),
        "listed": int(found.sum()),
        "right": int((found & bad).sum()),
    }


def share_first(suspicion, bad):
    return float(bad[np.argsort(-suspicion, kind="stable")[: bad.sum()]].mean())


def labels_of(name, sides, seed, folder):
    (x0, true), heldout = sides
    labels, bad = flipped(true, seed)
    found = doubts(neighbourhood(tensor_images(x0)), labels)
    vote = ranks(found.doubt)
    result = {
        "neighbours": {
            "AUROC": mislabel_auroc(found.doubt, bad),
            "listed": int(found.flagged.sum()),
            "right": int((found.flagged & bad).sum()),
            "planted": int(bad.sum()),
            "says it would find": found.finds,
            "finds": float(found.flagged[bad].mean()),
        },
        "classifier": of_classifier(x0, labels, bad, heldout, vote, folder / "classifier"),
        "cleanlab": of_cleanlab(x0, labels, bad),
    }
    if seed == 0 and name in STEPS:
        result["class-conditional diffusion"] = of_diffusion(name, x0, labels, bad, vote, folder)
    return result


def jpeg(x0, quality):
    found = []
    for pixels in to_pixels(x0).numpy().transpose(0, 2, 3, 1):
        buffer = io.BytesIO()
        Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels).save(buffer, "jpeg", quality=quality)
        found.append(np.atleast_3d(np.asarray(Image.open(buffer))).transpose(2, 0, 1))
    return to_x0(np.stack(found))


def copies_of(x0, seed):
    """The share of copies that is listed as a copy of what it is one of, by what was done, and what else is listed."""
    rng = np.random.default_rng(seed)
    rows = rng.permutation(len(x0))[:COPIES]
    some = x0[rows]
    noise = torch.tensor(rng.standard_normal(some.shape), dtype=torch.float32)
    done = {
        "the same pixels": some,
        "JPEG, quality 75": jpeg(some, 75),
        "JPEG, quality 30": jpeg(some, 30),
        "noise of 0.05": to_x0(to_pixels(some + 0.05 * noise).numpy()),
        "paler": some * 0.8,
        "moved by a pixel": torch.roll(some, 1, -1),
        "mirrored": some.flip(-1),
    }
    names = [f"a{i:05d}" for i in range(len(x0))]
    listed = {}
    for what, changed in done.items():
        every = tensor_images(torch.cat([x0, changed]), [*names, *(f"b{i:05d}" for i in range(len(rows)))])
        copy_of = lookalikes(neighbourhood(every), every.ids)[len(x0) :]
        listed[what] = float((copy_of == rows).mean())
    alone = lookalikes(neighbourhood(tensor_images(x0, names)), names)
    return {"found": listed, "listed among the images themselves": int((alone != np.arange(len(x0))).sum())}


def outliers_of(x0, seed):
    rng = np.random.default_rng(seed)
    rows = rng.permutation(len(x0))[: 2 * WRONG]
    flat = x0[rows[WRONG:]].flatten(2)
    shuffled = flat[..., torch.tensor(rng.permutation(flat.shape[-1]))].reshape(x0[rows[WRONG:]].shape)
    found = {}
    for what, planted in (("negatives", -x0[rows[:WRONG]]), ("shuffled pixels", shuffled)):
        every = tensor_images(torch.cat([x0, planted]))
        bad = np.arange(len(every)) >= len(x0)
        z, far = outliers(neighbourhood(every))
        flat_rows = torch.cat([x0, planted]).flatten(1)
        factor = -LocalOutlierFactor(metric="cosine").fit(flat_rows.numpy()).negative_outlier_factor_
        found[what] = {
            "AUROC": mislabel_auroc(np.nan_to_num(z, posinf=1e9), bad),
            "local outlier factor": mislabel_auroc(factor, bad),
            "listed": int(far.sum()),
            "right": int((far & bad).sum()),
        }
    return found


def main(folders):
    torch.set_num_threads(1)
    result = {}
    for name, folder in {"digits": None, **{folder.name: folder for folder in folders}}.items():
        sides = data(name, folder)
        result[name] = []
        for seed in range(DRAWN.get(name, 1)):
            with tempfile.TemporaryDirectory() as work:
                found = {"labels": labels_of(name, sides, seed, Path(work))}
            result[name].append(
                found | {"copies": copies_of(sides[0][0], seed), "outliers": outliers_of(sides[0][0], seed)}
            )
    record("clean", {"question": __doc__.split("\n")[0], "images": COUNT, "planted": WRONG, "draws": result})


if __name__ == "__main__":
    main([Path(word) for word in sys.argv[1:]])
