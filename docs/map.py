"""Write docs/map.html: the methods as a map, by year and family or by LDS and time, with a table of the same.

.venv/bin/python docs/map.py

One file, nothing from the net: docs/map.css and docs/map.js are put into it. What methods are made of is read from the
methods themselves; who builds on whom is the table LINEAGE, after the papers.
"""

import base64
import hashlib
import html
import inspect
import json
import re
import textwrap
from collections import defaultdict
from pathlib import Path

from whence.evaluation.readers import VALUES
from whence.features.parts import Encoded
from whence.methods import METHODS, NEEDS, describe_parts, settings_of
from whence.methods.inner_product import InnerProduct

ROOT = Path(__file__).resolve().parent.parent
BOARDS, KINDS = ("digits", "icons", "photos"), ("heldout", "generated")
SHOWN = {"heldout": "held-out", "generated": "generated"}

# Family -> (modules of its methods, shape). Colour and shape say the same, so that either is enough.
FAMILIES = {
    "Likeness": (("similarity", "nda", "distilled"), "circle"),
    "Gradients and TracIn": (("tracin", "retrac"), "square"),
    "Influence functions": (("influence", "curvature", "last_layer"), "triangle"),
    "TRAK and kin": (("trak", "block_trak", "journey", "das"), "diamond"),
    "Unlearning": (("unlearning", "groups"), "cross"),
    "Through training": (("metagradient", "further", "monitor"), "hexagon"),
    "Retraining": ((), "star"),  # the readers of a ledger
}

# (method, what it builds on, in the words of its paper's own section on it)
LINEAGE = (
    ("gradient_cosine", "gradient_dot", "Charpiat et al. 2019: the same, without its length"),
    ("output_cosine", "output_dot", "Charpiat et al. 2019: the same, without its length"),
    ("tracin", "gradient_dot", "Pruthi et al. 2020: summed over checkpoints with their rates"),
    ("tracin_projected", "tracin", "Pruthi et al. 2020: random projection"),
    ("tracin_last_layer", "tracin", "Pruthi et al. 2020: the last layer alone"),
    ("gas", "tracin", "Hammoudeh & Lowd 2022: cosine in place of dot"),
    ("gas_layerwise", "gas", "Hammoudeh & Lowd 2022: layer by layer"),
    ("diffusion_tracin", "tracin", "Xie et al. 2024: for diffusion models"),
    ("retrac", "diffusion_tracin", "Xie et al. 2024: normed at each timestep"),
    ("last_layer_ridge", "leave_one_out", "Ling 1984: leaving one out of a regression, in closed form"),
    ("influence", "leave_one_out", "Koh & Liang 2017: to first order, without retraining"),
    ("exact_influence", "influence", "Koh & Liang 2017"),
    ("influence_cg", "influence", "Koh & Liang 2017: conjugate gradients"),
    ("influence_lissa", "influence", "Koh & Liang 2017: LiSSA"),
    ("relatif_theta", "influence", "Barshan et al. 2020: at equal change of the weights"),
    ("relatif_loss", "influence", "Barshan et al. 2020: at equal change of the loss"),
    ("renormalized_influence", "influence", "Hammoudeh & Lowd 2022"),
    ("datainf", "influence", "Kwon et al. 2024: closed form for each layer"),
    ("ek_fac", "influence", "Grosse et al. 2023"),
    ("ek_fac", "k_fac", "Grosse et al. 2023: corrected eigenvalues"),
    ("ek_fac_refined", "ek_fac", "Wang et al. 2025 (2507.14740): as a preconditioner"),
    ("source", "ek_fac", "Bae et al. 2024: over segments of the training"),
    ("trak", "influence", "Park et al. 2023: projected gradients"),
    ("trak", "datamodel_lasso", "Park et al. 2023: estimates datamodels"),
    ("d_trak", "trak", "Zheng et al. 2024: another output function"),
    ("journey_trak", "trak", "Georgiev et al. 2023: along the sampling"),
    ("block_trak", "trak", "a system for each block of layers"),
    ("weighted_d_trak", "d_trak", "2506.05647: learned weights of layers"),
    ("das", "d_trak", "Lin et al. 2025"),
    ("das_function", "das", "Lin et al. 2025: distance of functions"),
    ("abu_ek_fac", "abu", "Wang et al. 2025: another curvature"),
    ("abu_ek_fac", "ek_fac", "Wang et al. 2025: its curvature"),
    ("mucs", "abu", "Serra et al. 2026: bounded ascent"),
    ("guda", "abu", "Murata et al. 2026: groups are forgotten, and the query is looked at"),
    ("montrage_style", "tracin", "ours: at small rates it is TracIn for representations"),
    ("averaged_metagradient", "metagradient", "whence 2026: averaged over masks"),
    ("averaged_metagradient", "datamodel_lasso", "whence 2026: estimates the same coefficients"),
    ("further_training", "averaged_metagradient", "whence 2026: from the finished weights"),
    ("shapley", "leave_one_out", "Ghorbani & Zou 2019: over all coalitions"),
    ("beta_shapley", "shapley", "Kwon & Zou 2022: other weights of sizes"),
    ("banzhaf", "shapley", "Wang & Jia 2023: equal weights of coalitions"),
    ("kernel_shap", "shapley", "Lundberg & Lee: as a regression"),
    ("memorization", "empirical_influence", "Feldman & Zhang 2020: of an image on itself"),
    ("datamodel_lasso", "empirical_influence", "Ilyas et al. 2022: as a regression"),
    ("datamodel_ridge", "datamodel_lasso", "Ilyas et al. 2022, with ridge"),
    ("pixel_cosine", "pixel_dot", "without its length"),
    ("representation_cosine", "representation_dot", "Hanawa et al. 2021"),
    ("representation_l2", "representation_dot", "Hanawa et al. 2021"),
    ("abc_cosine", "dino_cosine", "Wang et al. 2023: maps of such features, learned on fine-tunes"),
    ("distilled", "dino_cosine", "Wang et al. 2025 (2511.10721): its features"),
)
PARTS = ("encoder", "gradient of", "draws", "projection", "preconditioner", "normalisation", "checkpoints")

LANE, ROW, LEFT, TOP, LETTER = 34, 25, 10, 46, 7


def family_of(make):
    module = make.__module__.rpartition(".")[2]
    return next(name for name, (modules, _) in FAMILIES.items() if module in modules)


def parts_of(method):
    """What fills the slots of an inner product; {} for a method of another form."""
    if not isinstance(method, InnerProduct):
        return {}
    said, train = describe_parts(method), method.train
    if isinstance(train, Encoded):
        found = {"encoder": type(train.encoder).__name__}
    else:
        output = " and ".join(dict.fromkeys(one.name for one in train.outputs))
        output = "random probes" if len(train.outputs) > 1 else output
        found = {"gradient of": output, "projection": type(train.projection).__name__}
        found["draws"] = type(getattr(train.draws, "timesteps", train.draws)).__name__
    names = {"precondition": "preconditioner", "normalize": "normalisation", "checkpoints": "checkpoints"}
    return found | {ours: said[own].partition("(")[0] for own, ours in names.items() if own in said}


def begins(make, most=260):
    """What a docstring says first: its formula, as a rule."""
    whole = " ".join((inspect.getdoc(make) or "").partition("\n\n")[0].split())
    return textwrap.shorten(whole, most, placeholder=" ...")


def figures(name, boards):
    """board -> kind -> [LDS, low, high], and seconds."""
    found = {}
    for board, result in boards.items():
        row = result["rows"].get(name)
        if row is not None:
            kinds = {kind: [row[kind][key] for key in ("lds", "low", "high")] for kind in KINDS if kind in row}
            found[board] = {**kinds, "seconds": row["seconds"]}
    return found


def nodes():
    boards = {name: json.loads((ROOT / f"benchmarks/results/bench-{name}.json").read_text()) for name in BOARDS}
    found = []
    for name, entry in METHODS.items():
        common = {"name": name, "source": entry.paper, "year": entry.year, "cost": entry.cost}
        needs = "; ".join(NEEDS[need].words for need in entry.needs)
        said = {
            "family": family_of(entry.make),
            "formula": begins(entry.make),
            "needs": needs,
            "parts": parts_of(entry.make()),
        }
        command = f"whence attribute MODEL --train_data_dir IMAGES --query_data_dir QUERIES --method {name}"
        found.append({**common, **said, "settings": ", ".join(settings_of(name)), "command": command})
    for name, value in VALUES.items():
        said = {"name": name, "source": value.paper, "year": value.year, "cost": "reads retrained models"}
        said |= {
            "family": "Retraining",
            "formula": begins(value.read),
            "needs": f"a ledger: {value.needs}",
            "parts": {},
        }
        command = f"whence values LEDGER --train_data_dir IMAGES --query_data_dir QUERIES --method {name}"
        found.append({**said, "settings": ", ".join(value.settings), "command": command})
    for node in found:
        node["lds"] = figures(node["name"], boards)
    return placed(found), {name: result["ceiling"] for name, result in boards.items()}


def placed(found):
    """Every node at its year and in the lane of its family; those of one year and family below each other."""
    years = [None, *sorted({node["year"] for node in found if node["year"] is not None})]
    columns, right = {}, LEFT
    for year in years:
        columns[year] = right
        right += 44 + LETTER * max(len(node["name"]) for node in found if node["year"] == year)
    top, lanes = TOP, []
    for family, (_, kind) in FAMILIES.items():
        cells = defaultdict(list)
        for node in found:
            if node["family"] == family:
                cells[node["year"]].append(node)
        height = LANE + ROW * max(len(cell) for cell in cells.values())
        for year, cell in cells.items():
            for row, node in enumerate(cell):
                node["x"], node["y"] = columns[year] + 14, top + LANE + ROW * row
        lanes.append({"name": family, "top": top, "height": height, "shape": kind})
        top += height
    shown = [{"label": "no paper" if year is None else str(year), "x": x} for year, x in columns.items()]
    return {"nodes": found, "lanes": lanes, "columns": shown, "size": [right, top + 10]}


POINTS = {
    "square": "-6,-6 6,-6 6,6 -6,6",
    "triangle": "0,-8 7.5,6 -7.5,6",
    "diamond": "0,-8 8,0 0,8 -8,0",
    "cross": "-3,-8 3,-8 3,-3 8,-3 8,3 3,3 3,8 -3,8 -3,3 -8,3 -8,-3 -3,-3",
    "hexagon": "-7.5,0 -4,-6.5 4,-6.5 7.5,0 4,6.5 -4,6.5",
    "star": "0,-9 2.5,-3 9,-3 4,1.5 5.5,8 0,4 -5.5,8 -4,1.5 -9,-3 -2.5,-3",
}


def shape(kind):
    return '<circle r="6.5"/>' if kind == "circle" else f'<polygon points="{POINTS[kind]}"/>'


def text(value):
    return html.escape(str(value), quote=True)


def path(a, b):
    """From the older to the younger: out below, in from the left; within a column, around its left side."""
    x, y, end, to = a["x"], a["y"], b["x"] - 10, b["y"]
    if abs(x - b["x"]) < 1:
        return f"M{x - 9} {y} Q{x - 22 - abs(y - to) / 12:g} {(y + to) / 2:g} {end} {to}"
    middle = (end - x) / 2
    return f"M{x} {y + 8} C{x + middle:g} {y + 14} {b['x'] - middle / 2 - 10:g} {to} {end} {to}"


HEAD = """<svg id="map" xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {0} {1}" width="{0}" height="{1}" role="group"
aria-label="Methods by year and family"><defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7"
markerHeight="7" orient="auto"><path d="M0 0L8 4L0 8z"/></marker></defs>"""


def drawing(world):
    """The map as it stands without a script."""
    width, height = world["size"]
    parts = [HEAD.format(width, height), '<g id="ground">', *ground(world), '</g><g id="axes"></g><g id="shared"></g>']
    parts += ['<g id="lineage">', *arrows(world), '</g><g id="nodes">', *map(drawn, world["nodes"]), "</g></svg>"]
    return "\n".join(parts)


def ground(world):
    """Lanes and years."""
    width, height = world["size"]
    for at, lane in enumerate(world["lanes"]):
        top = lane["top"]
        yield f'<rect class="lane l{at % 2}" x="0" y="{top}" width="{width}" height="{lane["height"]}"/>'
        yield f'<g class="f{at}" transform="translate({LEFT + 4},{top + 13}) scale(.8)">{shape(lane["shape"])}</g>'
        yield f'<text class="family" x="{LEFT + 16}" y="{top + 17}">{text(lane["name"])}</text>'
    for column in world["columns"]:
        x = column["x"]
        yield f'<line class="year" x1="{x}" x2="{x}" y1="{TOP - 8}" y2="{height}"/>'
        yield f'<text class="year" x="{x + 4}" y="{TOP - 14}">{text(column["label"])}</text>'


def arrows(world):
    """Who builds on whom."""
    by_name = {node["name"]: node for node in world["nodes"]}
    for child, parent, why in LINEAGE:
        told = f"<title>{text(f'{child} builds on {parent}: {why}')}</title>"
        way = f'd="{path(by_name[parent], by_name[child])}"'
        yield f'<path data-from="{parent}" data-to="{child}" {way} marker-end="url(#tip)">{told}</path>'


def drawn(node):
    """A node: its shape and its name."""
    name, family = text(node["name"]), node["family"]
    year = "" if node["year"] is None else f", {node['year']}"
    label = text(f"{node['name']}: {family}, {node['source']}{year}")
    head = f'<g class="node f{list(FAMILIES).index(family)}" data-name="{name}" tabindex="0" role="button"'
    head += f' aria-label="{label}" transform="translate({node["x"]},{node["y"]})">'
    hit = f'<rect class="hit" x="-11" y="-12" width="{28 + LETTER * len(node["name"])}" height="24"/>'
    return f'{head}{hit}<path class="whisker"/>{shape(FAMILIES[family][1])}<text x="13" y="4">{name}</text></g>'


def cell(lds, board, kind):
    value = lds.get(board, {}).get(kind)
    return "" if value is None else "{:.3f} [{:.3f}, {:.3f}]".format(*value)


def table(world):
    heads = ["method", "family", "source", "year", "computes"]
    heads += [f"{board}, {SHOWN[kind]}" for board in BOARDS for kind in KINDS] + ["seconds on digits"]
    rows = []
    for node in world["nodes"]:
        cells = [node["family"], node["source"], node["year"] or "", node["cost"]]
        cells += [cell(node["lds"], board, kind) for board in BOARDS for kind in KINDS]
        seconds = node["lds"].get("digits", {}).get("seconds")
        cells.append("" if seconds is None else f"{seconds:.1f}")
        inside = "".join(f"<td>{text(one)}</td>" for one in cells)
        rows.append(f'<tr><th scope="row">{text(node["name"])}</th>{inside}</tr>')
    head = "".join(f'<th scope="col">{text(one)}</th>' for one in heads)
    return f"<table><thead><tr>{head}</tr></thead><tbody>\n" + "\n".join(rows) + "\n</tbody></table>"


def digest(code):
    return base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()


def legend():
    """What the shapes and colours are."""
    for at, (name, (_, kind)) in enumerate(FAMILIES.items()):
        box = (
            f'<svg class="f{at}" width="18" height="18" viewBox="-10 -10 20 20" aria-hidden="true">{shape(kind)}</svg>'
        )
        yield f"<span>{box}{text(name)}</span>"


def page():
    world, ceilings = nodes()
    style, script = ((ROOT / "docs" / f"map.{kind}").read_text() for kind in ("css", "js"))
    data = {**world, "lineage": LINEAGE, "parts": PARTS, "ceilings": ceilings, "families": list(FAMILIES)}
    # In a script element only "<" could end it, or begin a comment.
    inside = json.dumps(data, sort_keys=True, separators=(",", ":")).replace("<", "\\u003c")
    boards = [(f"{board} {kind}", f"{board}, {SHOWN[kind]}") for board in BOARDS for kind in KINDS]
    views = "".join(f'<option value="{value}">LDS against seconds: {told}</option>' for value, told in boards)
    shared = "".join(f'<option value="{part}">{part}</option>' for part in PARTS)
    policy = f"default-src 'none'; style-src 'sha256-{digest(style)}'; script-src 'sha256-{digest(script)}'"
    body = (ROOT / "docs" / "map.template.html").read_text()
    slots = {"policy": policy, "style": style, "script": script, "data": inside, "views": views, "shared": shared}
    slots |= {
        "legend": "".join(legend()),
        "map": drawing(world),
        "table": table(world),
        "count": str(len(world["nodes"])),
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda found: slots[found[1]], body)


if __name__ == "__main__":
    (ROOT / "docs" / "map.html").write_text(page())
