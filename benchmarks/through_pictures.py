"""How near the ceiling is the derivative of the whole training on real pictures, and how near is that of further training?

python benchmarks/through_pictures.py icons|photos DATA [FOLDER]      an hour of one core, after further_pictures.py

Every fourth query of both kinds, test subsets: `averaged_metagradient` on two masks, beside further training of the same
queries. LDS with intervals, the share of the ceiling, paired differences.
"""

import torch

import further_pictures
from _record import asked_bank, record
from further_pictures import FURTHER, chosen, judged, scored
from whence.evaluation import banks
from whence.methods.metagradient import AveragedMetagradient

EVERY, NAME = 4, "averaged_metagradient"


def main(bank, recipe, folder):
    method = AveragedMetagradient(masks=2, draws=recipe.draws, redraw=False)
    mine, seconds = scored(bank, recipe, folder, NAME, method, EVERY)
    further, _ = scored(bank, recipe, folder, FURTHER, further_pictures.further(recipe), further_pictures.EVERY)
    found = {"seconds": seconds, "masks": 2, "queries": EVERY}
    for kind in banks.QUERIES:
        wanted = list(chosen(bank, EVERY)[kind])
        there = list(chosen(bank, further_pictures.EVERY)[kind])
        beside = {NAME: mine[kind], FURTHER: further[kind][[there.index(row) for row in wanted]]}
        found[kind] = judged(bank, kind, wanted, beside, NAME)
        ceiling = found[kind]["ceiling"][0]
        found[kind]["share of the ceiling"] = {name: found[kind][name]["lds"][0] / ceiling for name in beside}
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    name, bank, recipe, folder = asked_bank()
    record(f"through-{name}", {"question": __doc__.split("\n")[0], **main(bank, recipe, folder)})
