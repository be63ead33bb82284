"""Write docs/noise.md, and the LDS of the methods' own settings into it, from the results of noise.py."""

import json

from _record import RESULTS, ROOT, RUNS, SMOKE

BANKS = ("digits", "icons", "photos")
KINDS = ("heldout", "generated")
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

`d_trak`, the method of the README's first command, less `pixel_cosine`, which asks no model: {pixels}.

**On the photos it is behind the raw pixels** on held-out pictures: what helps there is another method
([bench.md](bench.md)), not more draws.

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


def over_pixels(found):
    told = []
    for name, rows in found.items():
        if "d_trak" in rows and "pixels" in rows["d_trak"]["heldout"]["shared"]:
            both = ["{:+.3f} [{:+.3f}, {:+.3f}]".format(*rows["d_trak"][kind]["shared"]["pixels"]) for kind in KINDS]
            told.append(f"{name} {both[0]} held-out, {both[1]} generated")
    return "; ".join(told)


if __name__ == "__main__":
    results = {name: RESULTS / f"noise-{name}.json" for name in BANKS}
    found = {name: json.loads(path.read_text())["rows"] for name, path in results.items() if path.exists()}
    text = PAGE.format(
        tables="\n\n".join(table(name, rows) for name, rows in found.items()),
        pixels=over_pixels(found) or "not computed",
    )
    path = RUNS / "noise.md" if SMOKE else ROOT / "docs" / "noise.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
