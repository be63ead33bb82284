"""Whether a picture leans on single images: statistics by hand, honest p-values, and what few references cannot tell."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import kstest

from errors import refuses
from whence.report.attributable import STATISTICS, attributability


def rows(m: int, seed: int, n: int = 60) -> np.ndarray:
    return np.random.default_rng(seed).standard_t(3, size=(m, n))


def test_statistics_by_hand():
    row = np.array([[4.0, 1, 0, -1, 1, 1, 0, 0, -1, -1, 0, 0]])
    median, mad = 0.0, 1.0
    assert STATISTICS["largest"](row)[0] == pytest.approx((4 - median) / (1.4826 * mad))
    assert STATISTICS["first_share"](row)[0] == pytest.approx(1)
    assert STATISTICS["concentration"](row)[0] == pytest.approx((16 + 3) / 7**2)
    assert STATISTICS["first_mean"](row)[0] == pytest.approx((4 + 1 + 1 + 1 - 1) / 10)
    spread = np.array([[1.0] * 20])
    assert STATISTICS["first_share"](spread)[0] == pytest.approx(0.5)
    assert STATISTICS["concentration"](spread)[0] == pytest.approx(1 / 20)


@pytest.mark.parametrize("name", STATISTICS)
def test_statistics_lean_on_nobody_where_there_is_nothing(name):
    """All but the mean of the first know no units."""
    some, scale = rows(5, 0), 1e-9 if name == "first_mean" else 1.0
    np.testing.assert_allclose(scale * STATISTICS[name](some), STATISTICS[name](1e-9 * some))
    np.testing.assert_allclose(STATISTICS[name](some), STATISTICS[name](some[:, ::-1]))
    assert STATISTICS[name](np.zeros((1, 9)))[0] == 0
    assert STATISTICS[name](np.full((1, 9), -3.0))[0] == (-3 if name == "first_mean" else 0)


@pytest.mark.parametrize("name", STATISTICS)
def test_p_values_of_held_out_pictures_are_uniform(name):
    """One picture beside 99 references, again and again: p takes its values 1/100 ... 1 alike."""
    found = [attributability(rows(1, 2 * s), rows(99, 2 * s + 1), name).p[0] for s in range(300)]
    jitter = np.random.default_rng(0).uniform(0, 0.01, 300)
    assert kstest(np.array(found) - jitter, "uniform").pvalue > 0.01


def test_false_discoveries_stay_below_the_rate():
    wrong = []
    for seed in range(60):
        own = rows(20, 10 * seed)
        own[:4, 0] += 60  # four lean on one image
        out = np.array(attributability(own, rows(400, 10 * seed + 1)).stands_out)
        assert out[:4].sum() >= 3
        wrong.append(out[4:].sum() / max(out.sum(), 1))
    assert np.mean(wrong) < 0.1


def test_a_picture_says_the_same_whatever_its_company_but_for_the_adjustment():
    own, held = rows(6, 1), rows(50, 2)
    whole = attributability(own, held)
    alone = [attributability(own[j : j + 1], held) for j in range(6)]
    np.testing.assert_array_equal(whole.p, [each.p[0] for each in alone])
    turned = attributability(own[::-1], held[::-1])
    np.testing.assert_array_equal(whole.adjusted, turned.adjusted[::-1])


def test_equal_statistics_count_against_the_picture():
    assert attributability(np.zeros((1, 5)), np.zeros((9, 5))).p[0] == 1


def test_what_few_references_cannot_tell_is_told():
    few = attributability(rows(4, 0), rows(5, 1))
    assert few.least == 1 / 6
    assert (
        few.doubt
        == "5 references allow no p-value below 0.17: at a rate of 0.1 no picture can stand out; give 9 or more"
    )
    some = attributability(rows(10, 0), rows(30, 1))
    assert "a picture stands out only if 4 of the 10 do together; give 99 or more" in some.doubt
    assert attributability(rows(10, 0), rows(99, 1)).doubt == ""
    assert "this says little" in attributability(rows(1, 0), rows(15, 1)).doubt


def test_what_makes_no_sense_is_refused():
    with refuses("scores of shape (2, 60), of references (9, 7)", "attributability"):
        attributability(rows(2, 0), rows(9, 1, 7))
    with refuses("no statistic 'max'", "attributability", "largest, first_share"):
        attributability(rows(2, 0), rows(9, 1), "max")
    with refuses("a rate of 10", "attributability"):
        attributability(rows(2, 0), rows(9, 1), rate=10)
