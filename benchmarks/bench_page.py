"""Write docs/bench.md from the results of digits.py, pictures.py, counterfactual.py and draws.py."""

import json
from itertools import combinations

from scipy.stats import spearmanr

from _record import ROOT, RUNS, SMOKE
from whence.methods import METHODS, settings_of

KINDS = {"heldout": "held-out", "generated": "generated"}  # and in words
LINK_DTRAK = "[Zheng et al. 2024](https://arxiv.org/abs/2311.00500)"
LINKS = "[bench-digits.json](../benchmarks/results/bench-digits.json), [counterfactual-digits.json]"
LINKS += "(../benchmarks/results/counterfactual-digits.json)"


RESULTS = ROOT / "benchmarks" / "results"


def read(name):
    return json.loads((RESULTS / f"{name}.json").read_text())


def with_interval(row, digits=3, sign=""):
    return "{:{s}.{d}f} [{:{s}.{d}f}, {:{s}.{d}f}]".format(*row, s=sign, d=digits)


def lds(row):
    return with_interval([row["lds"], row["low"], row["high"]])


def bench_rows(result):
    rows = sorted(result["rows"].items(), key=lambda item: -item[1].get("generated", {"lds": -1})["lds"])
    for name, row in rows:
        cells = [lds(row[kind]) if kind in row else "" for kind in KINDS]
        cells.append(" / ".join(f"{row[kind]['of_ceiling']:.0%}" if kind in row else "" for kind in KINDS))
        over = row.get("generated")
        cells.append("" if name == "pixel_cosine" or over is None else with_interval(over["over_pixels"], sign="+"))
        cells.append(" / ".join(chosen(row[kind]) if kind in row else "" for kind in KINDS).strip(" /"))
        cells += ["" if row["seconds"] is None else str(round(row["seconds"])), f"{row['bytes'] / 1e6:.1f}"]
        yield f"| `{name}` | {' | '.join(cells)} |"
    limits = [with_interval([result["ceiling"][k][p] for p in ("estimate", "low", "high")]) for k in KINDS]
    yield f"| **ceiling** | {limits[0]} | {limits[1]} | | | | | | |"


def chosen(row):
    words = row["variant"].replace("own draws", "").replace("measured draws", "m").strip(", ")
    number = "" if row["setting"] is None else f"{row['setting']:.0e}"
    return f"{number} {words}".strip()


# LDS in % on CIFAR-2, 100 timesteps, validation | generated queries (Zheng et al. 2024; nda: its own paper).
PUBLISHED = {
    "d_trak_ensemble": (35.4, 27.8),
    "d_trak": (33.7, 25.7),
    "trak_ensemble": (28.6, 20.7),
    "trak": (23.6, 15.9),
    "relatif_theta": (23.4, 15.9),
    "nda": (None, 15.8),
    "renormalized_influence": (21.5, 14.7),
    "empirical_influence": (16.7, 13.0),
    "datamodel_ridge": (16.9, 12.8),
    "journey_trak": (None, 12.2),
    "pixel_cosine": (7.9, 5.4),
    "gradient_dot": (5.1, 4.0),
    "gradient_cosine": (4.9, 3.9),
    "tracin": (5.5, 3.7),
    "gas": (5.2, 3.3),
}


def ranks(result):
    """A line per method with a published LDS: its rank there and here, among the same methods, on generated queries."""
    here = {n: result["rows"][n]["generated"]["lds"] for n in PUBLISHED if "generated" in result["rows"].get(n, {})}
    there = {name: PUBLISHED[name][1] for name in here}
    order = [{n: 1 + sum(v > values[n] for v in values.values()) for n in here} for values in (there, here)]
    lines = [
        f"| `{name}` | {there[name]:.1f} | {order[0][name]} | {100 * here[name]:.1f} | {order[1][name]} |"
        for name in here
    ]
    return "\n".join(lines), spearmanr([there[n] for n in here], [here[n] for n in here]).statistic


def not_above_pixels(result, kind):
    names = [
        n
        for n, r in result["rows"].items()
        if n not in ("random", "pixel_cosine") and kind in r and r[kind]["over_pixels"][1] <= 0
    ]
    return ", ".join(f"`{name}`" for name in sorted(names)) or "none"


def removal_rows(result):
    for arm in result["arms"]:
        rise = with_interval([1e3 * arm["dL"][part] for part in ("mean", "low", "high")], 2, "+")
        worth = f"> {result['largest_random']}" if arm["worth_random"] is None else f"{arm['worth_random']:.0f}"
        shown = f"{arm['l2']['mean']:.2f} | {arm['ssim']['mean']:.3f} | {worth}"
        yield f"| {arm['arm']} | {arm['removed']} | {rise} | {shown} |"


BANKS = {
    "digits": "512 digits of 8 x 8 pixels, a perceptron of 141 k parameters that predicts the noise, 64 subsets x 5 seeds",
    "icons": "256 grey icons of 16 x 16 pixels, a UNet2DModel of 68 k that predicts the velocity, 48 subsets x 4 seeds",
    "photos": "256 photos of cars and horses, 16 x 16 pixels, the same network, 48 subsets x 4 seeds",
}


def earlier(result, kind, name):
    """Whether a row was computed with draws of its own for each image, which are no longer the method's."""
    row, name = result["rows"].get(name, {}).get(kind, {}), name.removesuffix("_ensemble").removesuffix("_sharpened")
    draws = settings_of(name).get("draws") if name in METHODS else None
    always = name in ("abu", "abu_ek_fac", "mucs", "guda")  # each image is compared with itself, at the same draws
    return "noise" not in row and not always and getattr(draws, "shared", False)


def compared(found, names, interval, marked=lambda *place: False):
    """A row per method, best first, and the ceiling; a column per bank and kind of query.

    interval: (the result of a bank, kind, method or "ceiling") -> [estimate, low, high], or None.
    marked: the same -> whether it carries a mark.
    """
    places = [(result, kind) for result in found.values() for kind in KINDS]
    rows = {name: [interval(*place, name) for place in places] for name in [*names, "ceiling"]}
    order = sorted(names, key=lambda name: (-max((cell[0] for cell in rows[name] if cell), default=-1), name))
    head = " | ".join(f"{bank}, {words}" for bank in found for words in KINDS.values())
    lines = [f"| method | {head} |", "|---" * (1 + len(places)) + "|"]
    for name in [*order, "ceiling"]:
        marks = [" °" if marked(*place, name) else "" for place in places]
        cells = " | ".join(
            with_interval(cell) + mark if cell else "" for cell, mark in zip(rows[name], marks, strict=True)
        )
        lines.append(f"| {'**ceiling**' if name == 'ceiling' else f'`{name}`'} | {cells} |")
    return "\n".join(lines)


def boards(found):
    """The boards side by side: the LDS of every method on both kinds of query, and how far ranks carry over."""

    def interval(result, kind, name):
        if name == "ceiling":
            return [result["ceiling"][kind][part] for part in ("estimate", "low", "high")]
        row = result["rows"].get(name, {}).get(kind)
        return row and [row["lds"], row["low"], row["high"]]

    table = compared(found, {name for result in found.values() for name in result["rows"]}, interval, earlier)
    figures = "\n".join(
        f"![LDS of every method with intervals and ceilings, {bank}](../benchmarks/results/bench-{bank}.png)\n"
        for bank in found
    )
    about = "\n".join(f"* **{bank}**: {BANKS[bank]}." for bank in found)
    about += "\n\nLDS with 95 % intervals; best first. Empty: not computed yet. °: computed when each image "
    about += "had draws of its own, which is no longer so ([noise.md](noise.md))."
    return f"{about}\n\n{table}\n\n{carried(found)}\n\n{figures}"


def carried(found):
    """Rank correlations of the methods that two boards share."""
    told = []
    for first, second in combinations(found, 2):
        for kind in KINDS:
            rows = [found[bank]["rows"] for bank in (first, second)]
            shared = [n for n in rows[0] if n != "random" and all(kind in row.get(n, {}) for row in rows)]
            if len(shared) > 3:
                rank = spearmanr(*([row[n][kind]["lds"] for n in shared] for row in rows)).statistic
                told.append(f"{first} and {second}, {kind}: {rank:.2f} ({len(shared)} methods)")
    return f"How far ranks of methods carry over from bank to bank (Spearman): {'; '.join(told)}." if told else ""


def there(pattern):
    """Bank -> the result of this kind that is there for it."""
    return {bank: read(f"{pattern}-{bank}") for bank in BANKS if (RESULTS / f"{pattern}-{bank}.json").exists()}


def on_pictures(further, through):
    """LDS on the queries that further training was asked about, beside all rows of the boards of pictures."""
    names = {name for result in further.values() for kind in KINDS for name in result[kind]} - {"ceiling"}

    def interval(result, kind, name):
        row = result[kind].get(name)
        return row["lds"] if row and name != "ceiling" else row

    text = (
        "## Further training on the banks of pictures\n\nEvery second query of both kinds "
        "(`python benchmarks/further_pictures.py`): 50 steps at 3e-3, falling, two masks.\n\n"
        + compared(further, names, interval)
    )
    for bank, result in through.items():
        told = ", ".join(
            f"{words} {with_interval(result[kind]['averaged_metagradient']['lds'])} "
            f"({result[kind]['share of the ceiling']['averaged_metagradient']:.0%} of the ceiling)"
            for kind, words in KINDS.items()
        )
        text += f"\n\nThe derivative of the whole training, {bank}, two masks, every fourth query: {told}."
    return text


def taken_away(top):
    """What the removal of the images that each method ranks first does, on every bank."""
    names = dict.fromkeys(arm["arm"] for result in top.values() for arm in result["arms"])

    def cell(result, name):
        arm = next((arm for arm in result["arms"] if arm["arm"] == name), None)
        return "" if arm is None else with_interval([1e3 * arm["dL"][p] for p in ("mean", "low", "high")], 2, "+")

    def first(name):
        arms = [arm for arm in next(iter(top.values()))["arms"] if arm["arm"] == name]
        return -arms[0]["dL"]["mean"] if arms else 0.0

    said = ", ".join(
        f"{max(arm['removed'] for arm in result['arms'])} of {result['n']} ({bank})" for bank, result in top.items()
    )
    lines = [f"| removed by | {' | '.join(top)} |", "|---" * (1 + len(top)) + "|"]
    lines += [f"| {name} | {' | '.join(cell(r, name) for r in top.values())} |" for name in sorted(names, key=first)]
    return (
        f"## The first 1 % taken away\n\nRise of the loss of generated pictures, x 1000, when the images that each method "
        f"ranks first are left out: {said}; trained again with two seeds of full models "
        "(`python benchmarks/top_removals.py`). Intervals over pictures.\n\n" + "\n".join(lines)
    )


def page(bench, removed, draws, linear, others, sections):
    optimism = max(
        (row[kind]["optimism"], name, kind) for name, row in bench["rows"].items() for kind in KINDS if kind in row
    )
    lines, agreement = ranks(bench)
    even, bound = ([linear[kind][key] for kind in KINDS] for key in ("even share", "linear ceiling"))
    reliability = [bench["ceiling"][kind]["reliability"] for kind in KINDS]
    table, removal = "\n".join(bench_rows(bench)), "\n".join(removal_rows(removed))
    return f"""# How close to retraining?

{boards({"digits": bench, **others})}
{sections}
## The digits bank in full

Written by `benchmarks/bench_page.py` from {LINKS}:
one small diffusion model on 512 digits of 8 x 8 pixels. It says how methods rank *there*; on other models they may rank
otherwise.

Gradients: 100 draws (`uniform(100)`), sparse projection to 4,096 columns. Damping and penalties chosen on 32 tune subsets,
reported on 64 test subsets x 5 seeds. Brackets: 95 % two-way bootstrap. *Over pixels*: paired difference to `pixel_cosine`
on generated queries. *Chosen*: damping (the penalty of a datamodel, the factor of SOURCE), and *m* where the queries are
measured on the draws of the bank instead of the method's own; the better of the two on tune subsets.

| method | LDS held-out | LDS generated | of ceiling (both) | over pixels | chosen (both) | s | MB |
|---|---|---|---|---|---|---|---|
{table}

* **Not shown to beat raw pixels** (interval of the paired difference includes 0 or lies below). Generated queries:
  {not_above_pixels(bench, "generated")}. Held-out queries: {not_above_pixels(bench, "heldout")}.
* `influence` and `trak` are one row twice: with a loss as output and a single checkpoint they are the same formula.
* Missing: {"; ".join(f"`{name}` ({why})" for name, why in bench["skipped"].items())}.
* Optimism (choosing on the test rows instead): at most {optimism[0]:.3f} LDS (`{optimism[1]}`, {optimism[2]}).
* Agreement of two seeds of one subset (Pearson): {reliability[0]:.2f} held-out, {reliability[1]:.2f} generated. The second
  is low, so the bank trains every test subset with five seeds; the ceiling takes that into account.
* Scores add up over images, training does not: {even[0]:.0%} (held-out) and {even[1]:.0%} (generated) of what varies between
  subsets is the same for a subset and its complement, which no score foresees. So no score exceeds {bound[0]:.3f} and
  {bound[1]:.3f} ([linear.json](../benchmarks/results/linear.json)).
* Queries are measured on {draws["draws"]} stratified draws. Against all 1,000 timesteps {draws["models"]} models are ranked
  alike with Pearson {draws["pearson_over_models_mean"]:.2f} on average over {draws["queries"]} queries,
  {draws["pearson_over_models_min"]:.2f} at worst ([draws.json](../benchmarks/results/draws.json)).
* The bank cost 72 minutes of training on a busy core (`training_seconds` in its manifest).

* `averaged_metagradient`: {bench["masks"]} masks with a seed each, queries on the bank's draws. `*_ensemble`: the mean over
  {bench["masks"]} models on the same random halves. `*_sharpened`: sign(tau) |tau|^p, p chosen on tune subsets.
* Not computed, for their cost: `ek_fac_refined`, `influence_cg`, `influence_lissa` (passes over all images per step and
  query: hours).

## Damping, draws, projection

![LDS against damping](../benchmarks/results/curve-damping.png)

Solved in float64, no method falls to zero at small dampings: the cliff in published curves is float32. TRAK and D-TRAK are
at their best near one mean eigenvalue, EK-FAC near a hundredth of one, and flat to the left.

![LDS against the number of draws](../benchmarks/results/curve-draws.png)

More timesteps always help, except that D-TRAK does as well with the single step 0, where there is almost no noise
(`uniform(1)`), as with a hundred.

![LDS against the width of the projection](../benchmarks/results/curve-dim.png)

4,096 columns lose about 0.03 (TRAK, held-out) against none at all; the numbers are in
[curves.json](../benchmarks/results/curves.json), dampings chosen on tune subsets point by point.

## Do published ranks hold?

LDS on CIFAR-2, generated queries, 100 timesteps, as published ({LINK_DTRAK}), beside this bank. Rank among these methods.

| method | published, % | rank | here, % | rank |
|---|---|---|---|---|
{lines}

Rank correlation {agreement:.2f}. The banks differ in everything (38 M parameters and 5,000 photos there, 0.14 M and 512
digits here), so this says what does not carry over, not who is right. On banks of their own, EK-FAC was published at 26.7
beside 10.3 for D-TRAK, and DAS 9 points above D-TRAK.

## Taking the images away

![Effect of removal](../benchmarks/results/counterfactual-digits.png)

{removed["queries"]} generated queries; the top 1, 5 and 10 % of each method removed, {removed["seeds"]} retrainings each
with the seeds of the full models, random removal of five sets per size, and the arm in which nothing is removed but the
seed is another. *Worth*: how many random images must go for the same mean rise of the loss (beyond
{removed["largest_random"]}
nothing was measured).

| removed by | images | rise of loss x 1000 | l2 | SSIM | worth random |
|---|---|---|---|---|---|
{removal}

Another seed changes the redrawn picture more than any removal here: a picture that merely *looks different* after retraining
proves nothing. The loss on fixed draws does not have this problem.
"""


if __name__ == "__main__":
    others = {bank: result for bank, result in there("bench").items() if bank != "digits"}
    further, top = there("further"), there("top")
    told = [on_pictures(further, there("through"))] * bool(further) + [taken_away(top)] * bool(top)
    sections = "".join(f"{section}\n\n" for section in told)
    text = page(read("bench-digits"), read("counterfactual-digits"), read("draws"), read("linear"), others, sections)
    (RUNS if SMOKE else ROOT / "docs").joinpath("bench.md").write_text(text)
