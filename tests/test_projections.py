"""Random projections: pure functions of (seed, block, row, column) that keep inner products."""

import pytest
import torch
from torch import Tensor

from agreement import close
from errors import refuses
from whence.features import projections
from whence.features.projections import SJLT, Gaussian, Identity, Kept, Rademacher

KINDS = [Rademacher, Gaussian, SJLT]
DENSE = [Rademacher, Gaussian]
G = torch.Generator().manual_seed(0)


def matrix(projection, sizes: dict[str, int]) -> Tensor:
    """P as a d x k matrix, read off by projecting the unit vectors."""
    unit = torch.eye(sum(sizes.values()), dtype=torch.float64)
    return projection(dict(zip(sizes, unit.split(list(sizes.values()), 1), strict=True)))


def test_identity_puts_blocks_side_by_side():
    a, b = torch.randn(3, 2, generator=G), torch.randn(3, 4, generator=G)
    assert torch.equal(Identity()({"a": a, "b": b}), torch.cat([a, b], 1))
    assert Identity().width({"a": (2,), "b": (4,)}) == 6


@pytest.mark.parametrize("kind", KINDS)
def test_projection_is_linear_and_sums_over_blocks(kind):
    P = matrix(kind(7), {"a": 20, "b": 31})
    x = torch.randn(5, 51, generator=G, dtype=torch.float64)
    torch.testing.assert_close(kind(7)({"a": x[:, :20], "b": x[:, 20:]}), x @ P, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("entries", [1, 70, 7 * 13, 10**6])
@pytest.mark.parametrize("kind", DENSE)
def test_entries_do_not_depend_on_the_slab(monkeypatch, kind, entries):
    expected = matrix(kind(70), {"a": 40, "b": 41})
    monkeypatch.setattr(projections, "ENTRIES_AT_ONCE", entries)
    assert torch.equal(matrix(kind(70), {"a": 40, "b": 41}), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_entries_depend_on_seed_block_name_and_row_alone(kind):
    P = matrix(kind(70), {"a": 50, "b": 60})
    swapped = matrix(kind(70), {"b": 60, "a": 50})
    assert torch.equal(swapped, torch.cat([P[50:], P[:50]])), "the order of the blocks does not matter"
    longer = matrix(kind(70), {"a": 80, "b": 60})
    assert torch.equal(longer[:50], P[:50]), "nor does the length of a block"
    for other in (matrix(kind(70, seed=1), {"a": 50, "b": 60}), matrix(kind(70), {"A": 50, "B": 60}), P.roll(1, 0)):
        assert abs(float((P * other).sum() / P.square().sum())) < 5 / P.numel() ** 0.5


@pytest.mark.parametrize("k", [1, 63, 64, 65, 100])
@pytest.mark.parametrize("kind", DENSE)
def test_narrower_projection_is_a_prefix(kind, k):
    wide, narrow = matrix(kind(130), {"a": 150}), matrix(kind(k), {"a": 150})
    torch.testing.assert_close(narrow * k**0.5, wide[:, :k] * 130**0.5, rtol=1e-12, atol=1e-12)


def test_rademacher_entries_are_signs():
    P = matrix(Rademacher(200), {"a": 500}) * 200**0.5
    close(P.abs(), torch.ones_like(P), 1e-12)
    assert abs(float(P.mean())) < 5 / P.numel() ** 0.5
    assert float((P.mean(0) * 500**0.5).abs().max()) < 4.5, "no column prefers a sign"
    assert float((P.mean(1) * 200**0.5).abs().max()) < 4.5, "no row prefers a sign"


def test_gaussian_entries_have_normal_moments():
    P = matrix(Gaussian(200), {"a": 500}) * 200**0.5
    error = P.numel() ** -0.5
    for power, expected, spread in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(float((P**power).mean()) - expected) < 4.5 * spread**0.5 * error


def test_sparse_rows_have_one_sign_in_a_uniform_column():
    P = matrix(SJLT(50), {"a": 4000})
    assert torch.equal((P != 0).sum(1), torch.ones(4000, dtype=torch.int64))
    assert torch.equal(P.abs().sum(1), torch.ones(4000, dtype=torch.float64))
    counts = P.abs().sum(0)
    assert float(((counts - 80) / 80**0.5).abs().max()) < 4, "columns are filled alike"
    assert abs(float(P.sum())) < 5 * 4000**0.5
    assert float((P.sum(0) / counts.sqrt()).abs().max()) < 4, "the sign does not go with the column"


@pytest.mark.parametrize("kind", DENSE)
def test_rows_and_columns_are_uncorrelated(kind):
    P = matrix(kind(100), {"a": 300}) * 10
    columns = P.T @ P / 300
    assert float((columns - torch.diag(columns.diag())).abs().max()) < 5 / 300**0.5
    rows = P @ P.T / 100
    assert float((rows - torch.diag(rows.diag())).abs().max()) < 5.5 / 100**0.5


@pytest.mark.parametrize("kind", KINDS)
def test_inner_products_are_kept_within_the_johnson_lindenstrauss_error(kind):
    """Var(<Px, Py>) = (|x|² |y|² + <x, y>²)/k for normal entries, a little less for signs; the mean is <x, y>."""
    x, y = torch.randn(2, 400, generator=G, dtype=torch.float64)
    y = 0.6 * x + y
    inner, seeds, k = float(x @ y), 150, 64
    spread = float((x.square().sum() * y.square().sum() + inner**2) / k) ** 0.5
    found = torch.empty(seeds, dtype=torch.float64)
    for seed in range(seeds):
        a, b = kind(k, seed)({"a": torch.stack([x, y])})
        found[seed] = a @ b
    assert abs(float(found.mean()) - inner) < 4 * spread / seeds**0.5
    assert 0.75 * spread < float(found.std()) < 1.25 * spread


def one_by_one(k: int, seed: int, blocks: dict[str, Tensor]) -> Tensor:
    """The sparse projection as its formula says: each parameter times its sign, added to its column."""
    total = torch.zeros(len(next(iter(blocks.values()))), k, dtype=torch.float64)
    for name, block in blocks.items():
        column, sign = SJLT(k, seed).entries(name, block[0].numel())
        total.index_add_(1, column, block.reshape(len(block), -1).double() * sign)
    return total


@pytest.mark.parametrize("entries", [1, 37, 60, 10**6])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_joined_blocks_of_a_sparse_projection(monkeypatch, entries, dtype):
    """In slabs of whatever size, of shapes and memory layouts of any kind; half precision is summed in float32."""
    monkeypatch.setattr(projections, "ENTRIES_AT_ONCE", entries)
    monkeypatch.setattr(Kept, "found", {})
    shapes = {"a": (3, 4, 2, 2), "b": (5,), "c": (), "d": (6, 7)}
    blocks = {name: torch.randn(9, *shape, generator=G).to(dtype) for name, shape in shapes.items()}
    blocks["a"] = blocks["a"].mT.contiguous().mT  # strided
    tolerance = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    for _ in range(2):  # made, and kept
        found = SJLT(16, 3)(blocks)
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), one_by_one(16, 3, blocks), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_not_summed_in_itself(dtype):
    """A sum of 5,000 ones stops at 256 in bfloat16."""
    ones = {"a": torch.ones(1, 40_000, dtype=dtype)}
    torch.testing.assert_close(SJLT(4)(ones).double(), one_by_one(4, 0, ones), rtol=1e-2, atol=0)


def test_entries_of_a_sparse_projection_are_made_once(monkeypatch):
    """For each projection and set of parameters; what is kept has a limit."""
    monkeypatch.setattr(projections, "ENTRIES_AT_ONCE", 100)
    monkeypatch.setattr(Kept, "found", {})
    made, true = [], SJLT.entries
    monkeypatch.setattr(SJLT, "entries", lambda *a: made.append(a[1:]) or true(*a))
    few, many = {"a": torch.ones(2, 40), "b": torch.ones(2, 30)}, {"a": torch.ones(2, 120)}
    for _ in range(3):
        SJLT(8)(few)
    assert made == [("a", 40), ("b", 30)]
    SJLT(9)(few)  # another projection, whose entries take the place of those
    SJLT(8)(few)
    assert len(made) == 6
    SJLT(8)({"a": torch.ones(2, 30), "b": torch.ones(2, 40)})  # other sizes of the same names
    assert len(made) == 8
    SJLT(8)(many)
    SJLT(8)(many)
    assert made[-2:] == [("a", 120), ("a", 120)], "larger than the limit: not kept"
    assert sum(map(len, Kept.found.values())) <= 100


@pytest.mark.parametrize("kind", KINDS)
def test_more_columns_than_parameters_are_refused(kind):
    assert kind(10).width({"a": (4,), "b": (2, 3)}) == 10
    for k in (11, 0, -1):
        with refuses("there are 10 parameters", accepted="1 to 10"):
            kind(k).width({"a": (4,), "b": (2, 3)})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_number_format_of_the_rows_is_kept(kind, dtype):
    rows = kind(8)({"a": torch.randn(3, 20, generator=G).to(dtype)})
    assert rows.dtype == dtype
    assert rows.shape == (3, 8)


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_does_not_depend_on_how_many_there_are(kind):
    """To the last bit: what a shard holds, and in which order, must not show."""
    rows = torch.randn(70, 500, generator=G)
    every = kind(90)({"a": rows})
    for chosen in ([3], [69, 3], list(range(50, 61)), torch.randperm(70, generator=G).tolist()):
        assert torch.equal(kind(90)({"a": rows[chosen]}), every[chosen])
