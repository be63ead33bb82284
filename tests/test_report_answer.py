"""The first answer of a page: it says what the scores support, copies first, and no effect that they do not predict."""

from __future__ import annotations

import dataclasses
import html
import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pages import unscripted
from whence.data.images import tensor_images
from whence.diffusion.outputs import OUTPUTS
from whence.report import answer, page, statistics
from whence.report.answer import About, Asked
from whence.report.attributable import Leaning
from whence.types import Images, Scores

N, M = 60, 3
CREATORS = ["anna", "ben", "carl"]
LOSS = {"method": {"name": "through training", "output": "loss"}}


def bell(n: int = N) -> Tensor:
    """n scores as a bell curve has them, none of which stands out."""
    return torch.distributions.Normal(0.0, 1.0).icdf((torch.arange(n, dtype=torch.float64) + 0.5) / n)


def scores_of(row: Tensor, **changes: Any) -> Scores:
    values = row[None].repeat(M, 1)
    names = [f"{i:02}.png" for i in range(len(row))]
    return dataclasses.replace(Scores(values, [f"q{j}" for j in range(M)], names, dict(LOSS)), **changes)


def standing(rows: list[int], height: float = 30.0) -> Tensor:
    row = bell()
    row[rows] = torch.linspace(height, height - 1, len(rows), dtype=torch.float64)
    return row


def images(creators: list[str] | None = None) -> Images:
    meta = {} if creators is None else {"creator": creators}
    return tensor_images(torch.zeros(N, 1, 8, 8), [f"{i:02}.png" for i in range(N)], meta)


def asked(scores: Scores, creators: list[str] | None = None, **changes: Any) -> Asked:
    train = images(creators)
    groups = statistics.groups_of(train.meta, N)
    return dataclasses.replace(Asked("m", scores, range(N), train, groups, About()), **changes)


def said(found: answer.Answer) -> str:
    return "".join(found.parts)


def told(found: answer.Answer) -> str:
    return " ".join("".join(sentence) for sentence in found.evidence)


def test_images_that_stand_out_are_counted_and_named() -> None:
    found = answer.answer(asked(scores_of(standing([7, 3]))), 0)
    assert said(found) == "This picture leans on 2 training images: 07.png and 03.png."
    assert found.rows == [7, 3]
    assert found.kind == answer.LEANS
    assert "was not measured" in told(found)
    many = answer.answer(asked(scores_of(standing([5, 6, 7, 8], 100.0))), 0)
    assert said(many) == "This picture leans on 4 training images: 05.png, 06.png, 07.png and 1 more."


def test_owners_are_named_where_there_are_some() -> None:
    creators = ["anna" if i in (3, 7, 9) else CREATORS[1 + i % 2] for i in range(N)]
    one = answer.answer(asked(scores_of(standing([7, 3, 9])), creators), 0)
    assert said(one) == "This picture leans on 3 training images by anna."
    creators[9] = "ben"
    two = answer.answer(asked(scores_of(standing([7, 3, 9])), creators), 0)
    assert said(two) == "This picture leans on 3 training images, by anna (2) and ben (1)."
    assert list(two.parts[1::2]) == ["anna", "ben"], "every second part is a name, and is isolated on the page"
    nobody: list[Any] = [None if i in (3, 7, 9) else name for i, name in enumerate(creators)]
    assert said(answer.answer(asked(scores_of(standing([7, 3, 9])), nobody), 0)).endswith(
        "images by an unknown creator."
    )


def test_nothing_is_named_where_nothing_stands_out() -> None:
    assert (
        said(answer.answer(asked(scores_of(bell())), 0)) == "No single training image stands out for this picture by m."
    )
    assert answer.answer(asked(scores_of(torch.ones(N, dtype=torch.float64))), 0).kind == answer.NOTHING
    below = bell() - 100
    below[7] = -1.0
    assert answer.answer(asked(scores_of(below)), 0).rows == [], "what worked least against the picture did not make it"
    assert answer.answer(asked(scores_of(below, signed=False)), 0).rows == [7]


def test_scores_that_another_run_would_not_give_name_nobody() -> None:
    row = standing([7])
    noisy = scores_of(row, stderr=torch.full((M, N), 2 * float(row.std())).double(), stderr_of="draws")
    found = answer.answer(asked(noisy), 0)
    assert (found.kind, found.rows, found.evidence) == (answer.UNSURE, [], [])
    assert "another run by m would name others (reliability 0)" in said(found)
    steady = scores_of(row, stderr=torch.full((M, N), 0.01).double(), stderr_of="draws")
    assert "Another run would put it first (reliability 1.0)." in told(answer.answer(asked(steady), 0))


def test_held_out_pictures_have_the_last_word() -> None:
    lean = Leaning(0.4, 0.6, False, 50, 0.1)
    found = answer.answer(asked(scores_of(standing([7])), leaning=[lean] * M), 0)
    assert (found.kind, found.rows) == (answer.ALIKE, [])
    assert "p = 0.40" in said(found)
    yes = dataclasses.replace(lean, p=0.01, stands_out=True)
    assert answer.answer(asked(scores_of(standing([7])), leaning=[yes] * M), 0).kind == answer.LEANS
    assert "none of them stands out alone" in said(answer.answer(asked(scores_of(bell()), leaning=[yes] * M), 0))


def test_a_copy_comes_first_and_the_rest_after() -> None:
    found = answer.answer(asked(scores_of(standing([7]))), 0, "looks like a copy of 07.png")
    assert said(found) == "This picture looks like a copy of 07.png."
    assert told(found).startswith("This picture leans on 1 training image: 07.png.")


def test_what_has_no_sign_or_never_asks_the_model_says_so() -> None:
    unsigned = answer.answer(asked(scores_of(standing([7]), signed=False)), 0)
    assert said(unsigned).startswith("1 training image mattered most for this picture, in which direction is not known")
    alone = answer.answer(asked(scores_of(standing([7])), about=About("", True)), 0)
    assert "the model was not asked" in said(alone)
    assert "leans" not in said(alone)


@pytest.mark.parametrize(
    ("changes", "unit"),
    [
        ({"scale": "removal"}, 1.0),
        ({"scale": "upweight"}, 1 / N),
        ({"scale": "rank"}, None),
        ({"scale": "value"}, None),
        ({"scale": "removal", "signed": False}, None),
        ({"scale": "removal", "recipe": {"method": {"output": "squared_norm"}}}, None),
        ({"scale": "removal", "recipe": {}}, None),
        (
            {"scale": "removal", "recipe": {"method": {"train": {"output": "loss", "draws": {"shared": True}}}}},
            None,
        ),
        ({"scale": "removal", "recipe": {"method": {"train": {"output": "loss", "draws": {"shared": False}}}}}, 1.0),
    ],
)
def test_an_effect_is_foretold_only_where_scores_are_one(changes: dict[str, Any], unit: float | None) -> None:
    scores = scores_of(standing([7, 3]), **changes)
    assert answer.loss_per_score(scores) == unit
    found = told(answer.answer(asked(scores), 0))
    assert ("is predicted to change the loss of this picture by" in found) == (unit is not None)
    if unit is not None:
        total = statistics.number(59.0 * unit, 2, plus=True)
        assert (
            f"Leaving these 2 out of the training is predicted to change the loss of this picture by {total}." in found
        )


def test_losses_are_those_that_are_better_when_lower() -> None:
    assert set(answer.LOSSES) == {name for name, output in OUTPUTS.items() if output.better == "lower"}


def test_without_all_images_of_an_owner() -> None:
    creators = ["anna" if i % 2 else "ben" for i in range(N)]
    row = standing([7])
    found = told(answer.answer(asked(scores_of(row, scale="removal"), creators), 0))
    total = statistics.number(float(row[1::2].sum()), 2, plus=True)
    assert f"Without all 30 images by anna: by {total}, if effects add up." in found


def test_all_pictures_in_a_sentence() -> None:
    kinds = [answer.LEANS, answer.LEANS, answer.SPREAD, answer.COPY, answer.UNSURE]
    found = answer.in_short([answer.Answer(kind, [], [], []) for kind in kinds], "training image")
    assert found == (
        "Of 5 pictures, 1 looks like a copy of a training image; 2 lean on single training images; for 1 no single training "
        "image stands out; for 1 it cannot be told: another run would name others."
    )

    alike = [answer.Answer(answer.SPREAD, [], [], [])] * 4
    assert answer.in_short(alike, "contributor") == "For all 4 no single contributor stands out."


def test_the_answer_is_of_the_first_method_that_asks_the_model() -> None:
    scores = scores_of(bell())
    results = {"pixels": scores, "magnitude": dataclasses.replace(scores, signed=False), "d_trak": scores}
    about = {"pixels": About("", True)}
    assert answer.leading(results, about) == "d_trak"
    assert answer.leading({"pixels": scores}, about) == "pixels"
    assert answer.leading({name: results[name] for name in ("pixels", "magnitude")}, about) == "magnitude"


# ---------------------------------------------------------------------------------------------------------- on the page


def rendered(scores: Scores, creators: list[str] | None = None, count: int = M, **known: Any) -> str:
    some = dataclasses.replace(scores, values=scores.values[:count], query_ids=scores.query_ids[:count])
    train = images(creators)
    queries = tensor_images(torch.zeros(count, 1, 8, 8), list(some.query_ids))
    some = dataclasses.replace(some, train_meta=train.meta)
    found = page.render({"m": some}, train, queries, "A test", {"Date": "2031-02-03"}, page.Known(**known))
    return unscripted(found["report.html"].decode())


def text(part: str) -> str:
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", re.sub(r"</?bdi[^>]*>|<wbr>", "", part))).split())


@pytest.mark.parametrize("count", [1, M])
def test_the_answer_stands_before_everything_else(count: int) -> None:
    whole = rendered(scores_of(standing([7])), count=count)
    first = text(whole.split("<main>")[1].split('id="overview"')[0])
    assert "This picture leans on 1 training image: 07.png." in first
    assert ("All 3 lean on single training images." in first) == (count > 1)


def test_a_page_says_what_to_cite() -> None:
    whole = rendered(
        scores_of(bell(), recipe={"whence": "9.9", "train": "t" * 32, "queries": "q" * 32, "checkpoints": ["c" * 64]})
    )
    cite = text(whole.split('id="cite"')[1].split("</section>")[0])
    for part in ("whence: 9.9", "2031-02-03", "c" * 64, "t" * 32, "q" * 32):
        assert part in cite
    assert re.search(r"m: recipe [0-9a-f]{16}, scores [0-9a-f]{16}", cite)
    foot = re.findall(r'@bottom-left \{ content: "([^"]*)"', whole)
    assert foot[0].startswith("whence 9.9 · 2031-02-03 · recipe ")


def test_nothing_of_a_recipe_gets_into_the_style_sheet() -> None:
    whole = rendered(scores_of(bell(), recipe={"whence": '9"; } body { display: none } .x { content: "'}))
    foot = re.findall(r"@bottom-left \{ content: \"([^\n]*)\"; font", whole)
    assert foot[0].startswith("whence 9bodydisplay:noney".replace("noney", "none"))
    assert "display: none }" not in whole.split("@page")[1].split("</style>")[0]


def test_other_scores_have_another_digest() -> None:
    digests = [re.findall(r"scores ([0-9a-f]{16})", rendered(scores_of(row))) for row in (bell(), bell() + 1e-9)]
    assert digests[0] != digests[1]


def test_words_of_a_page_are_explained_and_no_others() -> None:
    plain = text(rendered(scores_of(bell())).split('id="glossary"')[1].split("</section>")[0])
    sure = scores_of(bell(), stderr=torch.ones(M, N).double(), stderr_of="draws")
    with_errors = text(rendered(sure).split('id="glossary"')[1].split("</section>")[0])
    assert "reliability" not in plain
    assert "reliability" in with_errors
    assert "proponent" in plain
    unsigned = rendered(scores_of(bell(), signed=False)).split('id="glossary"')[1]
    assert "proponent" not in text(unsigned.split("</section>")[0])


def test_no_creator_is_left_out_of_the_totals() -> None:
    row = torch.arange(N, dtype=torch.float64)
    whole = rendered(scores_of(row), [f"creator {i:02}" for i in range(N - 1)] + ["creator 00"])
    table = whole.split('id="totals-1"')[1].split("</table>")[0]
    assert len(re.findall(r'<th scope="row">', table)) == N - 1


def test_what_does_not_fit_the_totals_is_one_row() -> None:
    n = statistics.MAX_GROUPS + 7
    values = torch.arange(n, dtype=torch.float64)[None]
    scores = Scores(values, ["q"], [str(i) for i in range(n)], {}, scale="removal")
    group = statistics.Group("creator", [f"c{i}" for i in range(n)], np.arange(n))
    table: Any = statistics.group_table(group, {"m": scores}, {"m": range(n)})
    assert len(table["rows"]) == statistics.MAX_GROUPS
    assert table["rest"]["images"] == 7
    assert table["rest"]["sums"][0][0] == "+21.0"


@pytest.mark.parametrize("letters", ["x" * 100_000, "\u202e" + "abc", "שלום"])
def test_names_are_isolated_and_long_ones_folded(letters: str) -> None:
    creators = [letters if i in (3, 7) else "ben" for i in range(N)]
    whole = rendered(scores_of(standing([7, 3])), creators)
    first = whole.split("<main>")[1].split('id="overview"')[0]
    names = re.findall(r"by <bdi[^>]*>([^<]*)</bdi>", first)
    assert names
    assert all(len(name) <= 70 for name in names)
    assert "\u202e" not in whole
    assert len(whole) < 1_500_000
