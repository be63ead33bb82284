"""Write docs/bench.md from the results of digits.py, counterfactual.py and draws.py."""

import json

from _record import ROOT

LINKS = "[bench-digits.json](../benchmarks/results/bench-digits.json), [counterfactual-digits.json]"
LINKS += "(../benchmarks/results/counterfactual-digits.json)"


def read(name):
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())


def with_interval(row, digits=3, sign=""):
    return "{:{s}.{d}f} [{:{s}.{d}f}, {:{s}.{d}f}]".format(*row, s=sign, d=digits)


def lds(row):
    return with_interval([row["lds"], row["low"], row["high"]])


def bench_rows(result):
    rows = sorted(result["rows"].items(), key=lambda item: -item[1]["generated"]["lds"])
    for name, row in rows:
        h, g = row["heldout"], row["generated"]
        share = f"{h['of_ceiling']:.0%} / {g['of_ceiling']:.0%}"
        setting = "" if g["setting"] is None else f"{h['setting']:.0e} / {g['setting']:.0e}"
        over = "" if name == "pixel_cosine" else with_interval(g["over_pixels"], sign="+")
        cost = f"{'' if row['seconds'] is None else round(row['seconds'])} | {row['bytes'] / 1e6:.1f}"
        yield f"| `{name}` | {lds(h)} | {lds(g)} | {share} | {over} | {setting} | {cost} |"
    limits = [
        with_interval([result["ceiling"][k][p] for p in ("estimate", "low", "high")]) for k in ("heldout", "generated")
    ]
    yield f"| **ceiling** | {limits[0]} | {limits[1]} | | | | | |"


def not_above_pixels(result, kind):
    names = [
        n for n, r in result["rows"].items() if n not in ("random", "pixel_cosine") and r[kind]["over_pixels"][1] <= 0
    ]
    return ", ".join(f"`{name}`" for name in sorted(names)) or "none"


def removal_rows(result):
    for arm in result["arms"]:
        rise = with_interval([1e3 * arm["dL"][part] for part in ("mean", "low", "high")], 2, "+")
        worth = f"> {result['largest_random']}" if arm["worth_random"] is None else f"{arm['worth_random']:.0f}"
        shown = f"{arm['l2']['mean']:.2f} | {arm['ssim']['mean']:.3f} | {worth}"
        yield f"| {arm['arm']} | {arm['removed']} | {rise} | {shown} |"


def page(bench, removed, draws):
    optimism = max(
        (row[kind]["optimism"], name, kind) for name, row in bench["rows"].items() for kind in ("heldout", "generated")
    )
    reliability = [bench["ceiling"][kind]["reliability"] for kind in ("heldout", "generated")]
    table, removal = "\n".join(bench_rows(bench)), "\n".join(removal_rows(removed))
    return f"""# How close to retraining? The digits bank

Written by `benchmarks/bench_page.py` from {LINKS}:
one small diffusion model on 512 digits of 8 x 8 pixels. It says how methods rank *there*; on other models they may rank
otherwise.

![LDS of every method with intervals and ceilings](../benchmarks/results/bench-digits.png)

Gradients: 100 draws (`uniform(100)`), sparse projection to 4,096 columns. Damping and penalties chosen on 32 tune subsets,
reported on 64 test subsets x 5 seeds. Brackets: 95 % two-way bootstrap. *Over pixels*: paired difference to `pixel_cosine`
on generated queries.

| method | LDS held-out | LDS generated | of ceiling (held-out / generated) | over pixels | damping | s | MB |
|---|---|---|---|---|---|---|---|
{table}

* **Not shown to beat raw pixels** (interval of the paired difference includes 0 or lies below). Generated queries:
  {not_above_pixels(bench, "generated")}. Held-out queries: {not_above_pixels(bench, "heldout")}.
* `influence` and `trak` are one row twice: with a loss as output and a single checkpoint they are the same formula.
* Missing: {"; ".join(f"`{name}` ({why})" for name, why in bench["skipped"].items())}.
* Optimism (choosing on the test rows instead): at most {optimism[0]:.3f} LDS (`{optimism[1]}`, {optimism[2]}).
* Agreement of two seeds of one subset (Pearson): {reliability[0]:.2f} held-out, {reliability[1]:.2f} generated. The second
  is low, so the bank trains every test subset with five seeds; the ceiling takes that into account.
* Queries are measured on {draws["draws"]} stratified draws. Against all 1,000 timesteps {draws["models"]} models are ranked
  alike with Pearson {draws["pearson_over_models_mean"]:.2f} on average over {draws["queries"]} queries,
  {draws["pearson_over_models_min"]:.2f} at worst ([draws.json](../benchmarks/results/draws.json)).
* The bank cost 72 minutes of training on a busy core (`training_seconds` in its manifest).

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
    text = page(read("bench-digits"), read("counterfactual-digits"), read("draws"))
    (ROOT / "docs" / "bench.md").write_text(text)
