"""Noise and draws: the same bits as the written formula, and nothing but (seed, image, draw) decides them."""

import math

import pytest
import torch
from scipy import stats
from torch import Tensor

from errors import refuses
from whence.diffusion import draws
from whence.diffusion.draws import Draws, Fixed, Grid, Random, Repeated, Stratified
from whence.diffusion.noise import counters, key_of, mix, normals, seed_for, stream, uniforms

ALL = (1 << 64) - 1
KEYS = torch.tensor([0, 1, 2, -1, 2**63 - 1, -(2**63), 123456789012345678])


def py_mix(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) & ALL
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & ALL
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & ALL
    return x ^ (x >> 31)


def py_row(seed: int, draw: int, image: int) -> int:
    return py_mix((py_mix((py_mix(seed & ALL) + draw) & ALL) + image) & ALL)


def py_uniform(row: int, j: int) -> float:
    return ((py_mix((row + j) & ALL) >> 11) + 0.5) * 2.0**-53


def py_normal(row: int, j: int, size: int) -> float:
    return math.sqrt(-2 * math.log(py_uniform(row, j))) * math.cos(2 * math.pi * py_uniform(row, size + j))


def unsigned(words: Tensor) -> list[int]:
    return [word & ALL for word in words.flatten().tolist()]


# -------------------------------------------------------------------------------------------------------------- noise


def test_mix_is_splitmix64():
    """The first two outputs of SplitMix64 from state 0, as published with the generator."""
    assert unsigned(mix(torch.tensor([0]))) == [0xE220A8397B1DCDAF]
    assert unsigned(mix(torch.tensor([0x9E3779B97F4A7C15 - 2**64]))) == [0x6E789E6AA1B965F4]


@pytest.mark.parametrize("seed", [0, 1, -7, 2**62 + 3])
@pytest.mark.parametrize("draw", [0, 1, 99])
def test_words_and_uniforms_equal_big_integer_arithmetic_bit_for_bit(seed, draw):
    rows = stream(seed, draw, KEYS)
    expected = [py_row(seed, draw, int(key) & ALL) for key in KEYS]
    assert unsigned(rows) == expected
    assert unsigned(counters(rows, 5, start=3)) == [py_mix((r + j) & ALL) for r in expected for j in range(3, 8)]
    assert uniforms(rows, 5).flatten().tolist() == [py_uniform(r, j) for r in expected for j in range(5)]


def test_normals_are_box_muller_of_the_words():
    rows = stream(3, 2, KEYS)
    expected = torch.tensor([[py_normal(r, j, 6) for j in range(6)] for r in unsigned(rows)], dtype=torch.float64)
    found = normals(rows, (2, 3), torch.float64)
    torch.testing.assert_close(found.flatten(1), expected, rtol=1e-13, atol=1e-15)
    assert torch.equal(normals(rows, (2, 3)), found.float())


def test_normals_never_change():
    """Stored features depend on these numbers: a change of generator is a new format."""
    found = normals(stream(0, 0, torch.tensor([1])), (3,), torch.float64)[0]
    assert found.tolist() == pytest.approx([-1.1672458668053198, -0.5886567265461848, 0.5993678661122762], rel=1e-13)


@pytest.fixture(scope="module")
def sample() -> Tensor:
    return normals(stream(0, 0, torch.arange(4000)), (50,), torch.float64)


def test_moments_and_distribution(sample):
    """Bounds are 4.5 to 5 standard errors of 200 000 normal numbers."""
    flat = sample.flatten()
    assert abs(float(flat.mean())) < 0.010
    assert abs(float(flat.var()) - 1) < 0.015
    assert abs(float(stats.skew(flat))) < 0.025
    assert abs(float(stats.kurtosis(flat))) < 0.05
    assert stats.kstest(flat.numpy(), "norm").pvalue > 1e-3
    assert float((sample.mean(0) * 4000**0.5).abs().max()) < 4.5
    assert float((sample.mean(1) * 50**0.5).abs().max()) < 5


def test_elements_images_draws_and_seeds_are_uncorrelated(sample):
    off_diagonal = torch.corrcoef(sample.T) - torch.eye(50, dtype=torch.float64)
    assert float(off_diagonal.abs().max()) < 5 / 4000**0.5
    images = torch.corrcoef(sample[:400]) - torch.eye(400, dtype=torch.float64)
    assert float(images.abs().max()) < 0.75
    assert float((images * 49**0.5).square().mean()) == pytest.approx(1, abs=0.05)
    for other in (
        normals(stream(0, 1, torch.arange(4000)), (50,), torch.float64),
        normals(stream(1, 0, torch.arange(4000)), (50,), torch.float64),
        sample.roll(1, 0),
        sample.roll(1, 1),
        sample.square().roll(1, 0) - 1,
    ):
        assert abs(float((sample * other).mean())) < 0.012


def test_uniforms_fill_the_unit_interval():
    u = uniforms(stream(0, 0, torch.arange(4000)), 50)
    assert 0 < float(u.min()) < 1e-4
    assert 1 - 1e-4 < float(u.max()) <= 1
    assert stats.kstest(u.flatten().numpy(), "uniform").pvalue > 1e-3


def test_rows_do_not_depend_on_company():
    keys = torch.arange(12)
    together = normals(stream(0, 5, keys), (4, 3))
    for order in ([3], [11, 0], list(range(11, -1, -1))):
        assert torch.equal(normals(stream(0, 5, keys[order]), (4, 3)), together[order])


def test_keys_come_from_the_first_64_bits_of_a_digest():
    assert key_of("0000000000000001ffff") == 1
    assert key_of("ffffffffffffffff00") == -1
    assert key_of("8000000000000000") == -(2**63)
    purposes = [seed_for(s, p) for s in (0, 1) for p in ("timesteps", "flips", "projection a", "projection b")]
    assert len(set(purposes)) == len(purposes)
    assert all(-(2**63) <= value < 2**63 for value in purposes)


# -------------------------------------------------------------------------------------------------------------- draws


def call(d: Draws, keys: Tensor = KEYS, total: int = 1000, shape: tuple[int, ...] = (3,)):
    return d(keys, shape, total, torch.float64)


def test_grid_starts_at_zero_and_never_reaches_the_last_step():
    assert call(draws.uniform(10)).t[0].tolist() == [0, 100, 200, 300, 400, 500, 600, 700, 800, 900]
    assert call(draws.uniform(3)).t[0].tolist() == [0, 333, 666]
    assert call(draws.uniform(1)).t.tolist() == [[0]] * len(KEYS)


def test_other_rules():
    assert call(draws.cumulative(4)).t[1].tolist() == [0, 1, 2, 3]
    assert call(draws.fixed(7, 3)).t[2].tolist() == [7, 7, 7]
    assert call(Draws(Repeated(Grid(2), 3))).t[0].tolist() == [0, 0, 0, 500, 500, 500]
    assert Draws(Repeated(Grid(2), 3)).count == 6


def test_noise_is_keyed_by_seed_draw_and_image():
    noise = call(draws.uniform(3, seed=4, shared=False)).noise
    for i, key in enumerate(KEYS.tolist()):
        for s in range(3):
            row = py_row(4, s, key & ALL)
            assert noise[i, s].tolist() == pytest.approx([py_normal(row, j, 3) for j in range(3)], rel=1e-13)


@pytest.mark.parametrize("make", [draws.uniform, draws.cumulative, draws.random, draws.stratified])
def test_shared_draws_are_one_and_the_same_for_all_images_and_for_each_alone(make):
    every = call(make(4, seed=4))
    assert torch.equal(every.t, every.t[:1].expand_as(every.t))
    assert torch.equal(every.noise, every.noise[:1].expand_as(every.noise))
    assert torch.equal(make(4, seed=4)(KEYS[1:2], (3,), 1000, torch.float64).noise, every.noise[:1])
    assert not torch.equal(call(make(4, seed=5)).noise, every.noise)
    own = call(make(4, seed=4, shared=False))
    assert len({tuple(row) for row in own.noise.flatten(1).tolist()}) == len(KEYS)


@pytest.mark.parametrize("count", [1, 2, 7, 50])
@pytest.mark.parametrize("total", [1000, 60])
def test_stratified_steps_lie_one_in_each_bin(count, total):
    t = Draws(Stratified(count))(torch.arange(200), (1,), total).t
    edges = torch.arange(count + 1) * total / count
    assert ((t >= edges[:-1].floor()) & (t <= edges[1:])).all()
    if count < 50:
        assert (t.double().std(0) > 0.2 * total / count).all(), "steps of different images must differ"


@pytest.mark.parametrize("rule", [Random(5), Stratified(5)])
def test_random_and_stratified_steps_are_uniform(rule):
    t = rule(0, torch.arange(4000), 1000)
    assert 0 <= int(t.min()) <= 3
    assert 996 <= int(t.max()) <= 999
    assert stats.kstest((t.flatten().double() / 1000).numpy(), "uniform").pvalue > 1e-3


def test_random_steps_are_independent():
    t = Random(2)(0, torch.arange(4000), 1000).double()
    assert abs(float(torch.corrcoef(t.T)[0, 1])) < 5 / 4000**0.5


def test_stratified_needs_far_fewer_steps():
    """The mean of t² over 8 steps: independent steps scatter 8 times as much as stratified ones, and more."""
    scatter = [(rule(0, torch.arange(2000), 1000).double() / 1000).square().mean(1).std() for rule in (RANDOM, STRATA)]
    assert scatter[0] > 5 * scatter[1]


RANDOM, STRATA = Random(8), Stratified(8)


def test_antithetic_pairs_see_opposite_noise():
    noise = call(draws.stratified(6)).noise
    assert torch.equal(noise[:, 0::2], -noise[:, 1::2])
    assert float((noise[:, 0] * noise[:, 2]).abs().max()) > 0
    assert not torch.equal(noise[:, 0], noise[:, 2])
    assert draws.stratified(6).antithetic


def test_shared_draws_are_the_same_for_every_image():
    shared = call(Draws(Stratified(4), shared=True))
    assert torch.equal(shared.noise, shared.noise[:1].expand_as(shared.noise))
    assert torch.equal(shared.t, shared.t[:1].expand_as(shared.t))
    own = call(Draws(Stratified(4)))
    assert not torch.equal(own.noise[0], own.noise[1])
    assert not torch.equal(own.t[1], own.t[2])


def test_unit_changes_the_measurement_but_not_the_draws():
    assert draws.uniform(4, unit=True).unit
    assert torch.equal(call(draws.uniform(4, unit=True)).noise, call(draws.uniform(4)).noise)


@pytest.mark.parametrize("make", [draws.cumulative, draws.random, draws.stratified])
def test_more_draws_begin_with_the_same_noise(make):
    few, many = call(make(4)), call(make(8))
    assert torch.equal(few.noise, many.noise[:, :4])
    if make is not draws.stratified:
        assert torch.equal(few.t, many.t[:, :4])


def test_seeds_differ():
    a, b = call(draws.random(4, seed=0)), call(draws.random(4, seed=1))
    assert not torch.equal(a.t, b.t)
    assert not torch.equal(a.noise, b.noise)


@pytest.mark.parametrize("make", [draws.uniform, draws.random, draws.stratified])
def test_draws_of_an_image_do_not_depend_on_the_batch(make):
    whole = call(make(4))
    for rows in ([2], [6, 0], [5, 4, 3, 2, 1, 0]):
        part = call(make(4), KEYS[rows])
        assert torch.equal(part.noise, whole.noise[rows])
        assert torch.equal(part.t, whole.t[rows])


def test_draw_errors_say_what_would_be_accepted():
    with refuses("at least 1"):
        draws.uniform(0)
    with refuses("pairs; 3 is odd"):
        draws.stratified(3)
    with refuses("timestep 1000 asked...0 to 999"):
        call(draws.fixed(1000))
    with refuses("timestep -1"):
        call(Draws(Fixed(-1, 2)))
    with refuses("0 to 4"):
        call(draws.cumulative(6), total=5)
