"""Write docs/noise.md, and the LDS of the methods' own settings into it, from the results of noise.py."""

import json

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from _record import RESULTS, ROOT, RUNS, SMOKE

BANKS = ("digits", "icons", "photos")
KINDS = {"heldout": "held-out", "generated": "generated"}
PAGE = """# The same draws for all images

A diffusion model is measured at *draws*: pairs of a timestep and noise. whence measures all images of a run, queries
included, at **the same** draws, unless a method is better off otherwise. `--noise own` gives each image draws of its
own, `--noise shared` the same to all (in Python `draws=whence.uniform(10, shared=False)`).

## Why

A gradient at ten draws is mostly noise of these draws: for a small model on digits two images of the same digit have
gradients that differ more by their noise than by what they show. With draws of its own for each image, the inner
product of two gradients is a small sum of what both images say, under the inner products of two noises that have
nothing to do with each other; a hundred draws make these ten times smaller, and they are still there. With the same
draws both images are asked the same questions: what is left between two training images is what they show. The noise
that is common to all moves all scores of a picture alike, which changes no order among them.

## How much

LDS at the methods' own settings, which here differ in nothing but the noise, two seeds of the draws each, all queries
of the bank (`python benchmarks/noise.py`). *Seeds*: rank correlation of the scores of two seeds.

{tables}

![LDS against the number of draws, shared and own](../benchmarks/results/noise-draws.png)

*LDS on digits against the number of draws: with shared draws ten do what a hundred do, and a hundred own ones do not
reach ten shared ones. A single draw of `uniform` is at timestep 0, where there is hardly any noise, so that both are one.*

## The first command

At its own settings, less `pixel_cosine`, which asks no model, with the paired interval:

{pixels}

`das` is the method of the README's first command, and what is asked where no method is named: above raw pixels
everywhere, on held-out photos by no more than chance could make it. `d_trak` is better on digits and behind raw pixels on
photos. What else is above them costs more, or needs more than the finished model ([bench.md](bench.md)).

## When it does not help

* **A few fixed draws are one sample.** Scores are then about these timesteps and noises, not about all. The more draws,
  the nearer both kinds come to each other; with ten, another seed still orders some images otherwise (the column
  *seeds*), which is what the [standard errors](errors.md) beside the scores say, and a warning where it is much.
* **What is fitted to the draws gains from other noise for each image**: `last_layer_ridge` refits a layer on all images
  and draws, and has draws of its own (a hundred by default: they cost a forward pass each). `nda` is no better with
  shared noise, and keeps its own.
* **What sees the noise of a sampler or of the training** (`journey_trak`, `retrac`, `diffusion_tracin`,
  `montrage_style`), and what compares an image with itself (`abu`, `mucs`, `guda`), has nothing to share.
* Absolute sizes: predicted rises of a loss (`influence`, `ek_fac` ...) hold what the common noise adds to all of them.

The rows of an image do not depend on its company with either kind: noise is a function of seed and draw, and with `own`
of the bytes of the image's file. The same pixels saved as another file are another image there.
"""


def lds(row):
    return "{:.3f} [{:.3f}, {:.3f}]".format(*row["lds"][0])


def table(name, rows):
    lines = [
        f"**{name}**",
        "",
        "| method | held-out, own | held-out, shared | seeds | generated, own | generated, shared | seeds |",
    ]
    lines.append("|---|---|---|---|---|---|---|")
    for method, row in sorted(rows.items(), key=lambda item: -item[1]["heldout"]["shared"]["lds"][0][0]):
        label, _, count = method.partition(":")
        cells = []
        for kind in KINDS:
            own, shared = row[kind]["own"], row[kind]["shared"]
            cells += [lds(own), lds(shared), f"{own['seeds']:.2f} / {shared['seeds']:.2f}"]
        lines.append(f"| `{label}`{f', {count} draws' if count else ''} | {' | '.join(cells)} |")
    return "\n".join(lines)


def over_pixels(found, methods=("das", "d_trak")):
    """A row for each bank and kind of queries: by how much the LDS of some methods is above that of raw pixels."""
    lines = [f"| bank | queries | {' | '.join(f'`{name}`' for name in methods)} |", "|---|---|" + "---|" * len(methods)]
    for bank, rows in found.items():
        for kind, words in KINDS.items():
            known = [rows[name][kind]["shared"]["pixels"] if name in rows else None for name in methods]
            cells = ["" if each is None else "{:+.3f} [{:+.3f}, {:+.3f}]".format(*each) for each in known]
            lines.append(f"| {bank} | {words} | {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(rows, path, methods=("d_trak", "das")):
    """LDS against the number of draws, own and shared."""
    figure, every = plt.subplots(1, 2, figsize=(8, 3), sharey=True, layout="constrained")
    for axes, (kind, words) in zip(every, KINDS.items(), strict=True):
        for method, color in zip(methods, ("tab:blue", "tab:orange"), strict=True):
            known = {
                int(row.partition(":")[2] or 10): rows[row][kind] for row in rows if row.partition(":")[0] == method
            }
            for noise, style in (("shared", "-"), ("own", "--")):
                values = [known[count][noise]["lds"][0] for count in sorted(known)]
                middle, low, high = zip(*values, strict=True) if values else ((), (), ())
                axes.plot(sorted(known), middle, style, marker="o", ms=3, color=color, label=f"{method}, {noise}")
                axes.fill_between(sorted(known), low, high, alpha=0.12, color=color)
        axes.set(xscale="log", title=f"digits, {words}", xlabel="draws")
        axes.set_xticks([1, 10, 100], labels=["1", "10", "100"])
    every[0].set(ylabel="LDS")
    every[1].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    results = {name: RESULTS / f"noise-{name}.json" for name in BANKS}
    found = {name: json.loads(path.read_text())["rows"] for name, path in results.items() if path.exists()}
    text = PAGE.format(
        tables="\n\n".join(table(name, rows) for name, rows in found.items()),
        pixels=over_pixels(found),
    )
    path = RUNS / "noise.md" if SMOKE else ROOT / "docs" / "noise.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    plot(found.get("digits", {}), (RUNS if SMOKE else RESULTS) / "noise-draws.png")
