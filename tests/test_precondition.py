"""The solved systems against explicit inverses, and the Gauss-Newton matrix against autograd's Hessian."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from agreement import close
from errors import refuses
from whence.curvature import exact, gram
from whence.curvature.exact import GaussNewton
from whence.curvature.gram import Dual, Gram, Primal
from whence.curvature.solve import Basis, Damped, NoPreconditioner, Plain, Problem, Solution
from whence.diffusion import draws, outputs
from whence.diffusion.forward import Classifier
from whence.features.parts import Gradient, Value
from whence.features.projections import Rademacher
from whence.features.rows import rows
from whence.methods import normalize
from whence.storage.arrays import Rows, Store
from whence.types import Checkpoint, Engine, Task
from worlds import DRAWS, checkpoint, classifier_task, labelled, linear_world, unet_task

FORMS = (
    "dual",
    "primal",
    "dual, in a grid",
    "primal, in a grid",
)  # n x n and k x k; by Cholesky alone, by eigenvectors in a grid
PROBLEM = Problem(None, None, None)  # type: ignore[arg-type]  # Gram looks at the rows alone


def features(n: int, k: int, rank: int | None = None, seed: int = 0) -> Tensor:
    """Anisotropic rows: column scales fall by a factor 1000, so that a mistake in the basis shows."""
    g = torch.Generator().manual_seed(seed)
    rank = min(n, k) if rank is None else rank
    inner = torch.randn(n, rank, generator=g, dtype=torch.float64) * torch.logspace(0, -3, rank, dtype=torch.float64)
    return inner @ torch.linalg.qr(torch.randn(k, rank, generator=g, dtype=torch.float64)).Q.T


def stored(root: Path, values: Tensor, per_shard: int = 3) -> Rows:
    array = Store(root).array({"values": values.tolist()}, tuple(values.shape), values.dtype, per_shard)
    for shard in array.missing():
        array.write(shard, values[shard])
    return array


def explicit(phi: Tensor, psi: Tensor, damping: float) -> dict[str, Tensor]:
    """The five pieces by a plain inverse of Phi^T Phi + lambda I."""
    inverse = torch.linalg.inv(phi.T @ phi + damping * torch.eye(phi.shape[1], dtype=phi.dtype))
    return {
        "kernel": psi @ inverse @ phi.T,
        "train_self": (phi @ inverse * phi).sum(1),
        "train_square": (phi @ inverse).square().sum(1),
        "query_self": (psi @ inverse * psi).sum(1),
        "train_norm": phi.norm(dim=1),
    }


def in_form(
    form: str, root: Path, phi: Tensor, psi: Tensor, damping: float, absolute: bool = False, per_shard: int = 3
) -> Damped | Dual | Primal:
    """The Gram system in one of its two forms, alone or first of a grid. The smaller one is taken: zeros that change no
    number are put after the columns until the dual is smaller, or after the images until the primal is."""
    (n, k), dual = phi.shape, form.startswith("dual")
    if dual:
        phi, psi = (F.pad(values, (0, max(0, n + 1 - k))) for values in (phi, psi))
    else:
        phi = F.pad(phi, (0, 0, 0, max(0, k - n)))
    dampings = [None, 0.7] if form.endswith("grid") else [None]
    system = Gram(damping, absolute).solve(PROBLEM, stored(root, phi, per_shard), psi, dampings)[0]
    assert isinstance(system, Damped | Dual | Primal)
    assert (system.basis.dual if isinstance(system, Damped) else isinstance(system, Dual)) == dual
    return system


PIECES = ("kernel", "train_self", "train_square", "query_self", "train_norm")


def assert_close(found: Tensor, expected: Tensor, rtol: float) -> None:
    """Of the largest number: single ones may cancel."""
    torch.testing.assert_close(found, expected, rtol=rtol, atol=rtol * float(expected.abs().max()))


def assert_solves(system: Solution, expected: dict[str, Tensor], rtol: float = 1e-10) -> None:
    """What stands after the expected images are those of zeros, see `in_form`."""
    for name, value in expected.items():
        scale = float(value.abs().max())
        found = getattr(system, name)()[..., : value.shape[-1]]
        torch.testing.assert_close(found, value, rtol=rtol, atol=rtol * scale, msg=lambda m, n=name: n + m)


SHAPES = {
    "n<k": (11, 20, None),
    "n>k": (25, 9, None),
    "n=k": (10, 10, None),
    "rank 4": (12, 10, 4),
    "rank 5": (9, 14, 5),
}


@pytest.mark.parametrize("damping", [1e-3, 0.1, 10.0])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES)
def test_both_forms_equal_the_explicit_inverse(tmp_path, shape, form, damping):
    """Queries have parts outside the row space, which only query_self sees."""
    n, k, rank = SHAPES[shape]
    phi = features(n, k, rank)
    psi = torch.randn(4, k, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    psi = torch.cat([psi, phi[:2]])
    assert_solves(in_form(form, tmp_path, phi, psi, damping, absolute=True), explicit(phi, psi, damping))


@pytest.mark.parametrize("shape", SHAPES)
def test_damping_is_in_units_of_the_mean_nonzero_eigenvalue(tmp_path, shape):
    n, k, rank = SHAPES[shape]
    phi, psi = features(n, k, rank), features(3, k, seed=1)
    unit = float(phi.square().sum()) / (min(n, k) if rank is None else rank)
    for form in FORMS:
        system = in_form(form, tmp_path, phi, psi, 0.05)
        if isinstance(system, Damped):
            assert system.basis.mean_eigenvalue() == pytest.approx(unit, rel=1e-9)
        assert_solves(system, explicit(phi, psi, 0.05 * unit))


@pytest.mark.parametrize(("n", "k", "dual"), [(11, 20, True), (25, 9, False), (10, 10, False)])
def test_the_smaller_form_is_taken(tmp_path, n, k, dual):
    (alone,) = Gram(0.1).solve(PROBLEM, stored(tmp_path, features(n, k)), features(3, k), [None])
    assert isinstance(alone, Dual if dual else Primal)
    assert len(alone.factor) == min(n, k)
    (system, _) = Gram(0.1).solve(PROBLEM, stored(tmp_path, features(n, k)), features(3, k), [None, 1.0])
    assert isinstance(system, Damped)
    assert system.basis.dual == dual
    assert len(system.basis.values) == min(n, k)


@pytest.mark.parametrize(("n", "k", "rank"), [(11, 20, None), (25, 9, None), (12, 10, 4), (9, 14, 5)])
def test_a_grid_of_dampings_equals_one_at_a_time(tmp_path, n, k, rank):
    """Cholesky, and the eigenvectors of a grid: the same in float64. Without full rank both are of the eigenvectors."""
    train, psi = stored(tmp_path, features(n, k, rank)), features(3, k, seed=1)
    grid = [1e-3, 0.1, 10.0, None]
    together = Gram(0.02).solve(PROBLEM, train, psi, grid)
    for damping, system in zip(grid, together, strict=True):
        alone = Gram(damping or 0.02).solve(PROBLEM, train, psi, [None])[0]
        assert isinstance(alone, Damped) == (rank is not None)
        for piece in PIECES:
            assert_close(getattr(alone, piece)(), getattr(system, piece)(), 1e-10 if rank is None else 0)


@pytest.mark.parametrize(("n", "k"), [(11, 20), (25, 9)])
def test_dampings_share_what_is_made_of_training_rows(tmp_path, monkeypatch, n, k):
    """The numbers of one do not depend on the others, and however many there are, the training rows are turned once."""
    train, psi = stored(tmp_path, features(n, k)), features(3, k, seed=1)
    few, many = (Gram(1.0).solve(PROBLEM, train, psi, grid) for grid in ([0.5, 2.0], [0.5, 1e-3, 1.0, 2.0]))
    for piece in PIECES:
        assert torch.equal(getattr(few[1], piece)(), getattr(many[3], piece)())
    turned = []
    true = Basis.train
    monkeypatch.setattr(Basis, "train", lambda basis: turned.append(basis) or true(basis))
    systems = Gram(1.0).solve(PROBLEM, train, psi, [0.5, 1e-3, 1.0, 2.0])
    for system in systems:
        normalize.cosine(system), normalize.relatif_theta(system)
    assert len(turned) == 1


@pytest.mark.parametrize("form", ["dual", "primal"])
def test_a_column_of_a_system_is_a_row_of_the_images_with_each_other(tmp_path, form):
    for how in (form, f"{form}, in a grid"):
        phi = features(11, 9)
        system = in_form(how, tmp_path, phi, phi, 0.1)
        expected = phi @ torch.linalg.inv(phi.T @ phi + _unit(phi) * 0.1 * torch.eye(9).double()) @ phi.T
        for image in (0, 7):
            assert_close(system.column(image)[:11], expected[image], 1e-10)


def _unit(phi: Tensor) -> float:
    return float(phi.square().sum()) / min(phi.shape)


@pytest.mark.parametrize("form", ["dual", "primal"])
def test_images_of_hardly_any_gradient(tmp_path, form):
    """By Cholesky their self-influence is a number of its own, not what is left of 1 - 1; of no gradient it is 0."""
    phi, psi = torch.randn(11, 20, generator=torch.Generator().manual_seed(0)).double(), features(3, 20, seed=1)
    phi[2] *= 1e-6
    system, expected = in_form(form, tmp_path, phi, psi, 3.0, absolute=True), explicit(phi, psi, 3.0)
    assert isinstance(system, Dual) == (form == "dual")
    assert float(system.train_self()[2]) == pytest.approx(float(expected["train_self"][2]), rel=1e-8, abs=0)
    phi[2] = 0
    system = in_form(form, tmp_path, phi, psi, 0.1)
    assert float(system.train_self()[2]) == float(system.kernel()[:, 2].abs().max()) == 0


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("block", [1, 3, 8])
def test_blocks_and_panels_of_a_matrix_do_not_matter(tmp_path, monkeypatch, form, block):
    """Some columns of all shards at a time, some rows of the product; also of rows that are mixed, weighed and cut."""
    phi, psi = features(11, 20), features(3, 20, seed=1)
    monkeypatch.setattr(gram, "PANEL", 4)
    monkeypatch.setattr(gram, "BLOCK_BYTES", block * 8 * 11)
    assert_solves(in_form(form, tmp_path, phi, psi, 0.1, absolute=True), explicit(phi, psi, 0.1))
    other, factors = features(11, 24, seed=2), torch.linspace(0.5, 2, 15).double()
    mixed = stored(tmp_path, features(11, 24, seed=3)).plus(0.3, stored(tmp_path, other, per_shard=4), 0.7)
    read = mixed.only(slice(2, 17)).times(factors)
    phi = (0.3 * features(11, 24, seed=3) + 0.7 * other)[:, 2:17] * factors
    dampings = [None, 0.7] if form.endswith("grid") else [None]
    assert_solves(Gram(0.1, True).solve(PROBLEM, read, psi[:, :15], dampings)[0], explicit(phi, psi[:, :15], 0.1))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rank", [None, 4])
def test_freedom_is_the_sum_of_self_influences(tmp_path, form, rank):
    system = in_form(form, tmp_path, features(12, 10, rank), features(3, 10, seed=1), 0.3)
    assert system.freedom() == pytest.approx(float(system.train_self().sum()), rel=1e-9)


@pytest.mark.parametrize(("n", "k", "times"), [(25, 9, 2), (9, 25, 3)])
def test_a_matrix_is_formed_once_for_the_errors_of_scores(tmp_path, monkeypatch, n, k, times):
    """Also where its columns are weighed, if it is one of columns; outside nothing is kept."""
    train, psi, weights = stored(tmp_path, features(n, k)), features(3, k, seed=1), torch.linspace(0.9, 1.1, k).double()
    other = train.plus(0.5, stored(tmp_path, features(n, k, seed=2)), 0.5)
    read, true = [], Rows.read
    monkeypatch.setattr(Rows, "read", lambda rows, at: read.append(rows.folder) or true(rows, at))
    asked = (train, train, train.times(weights), other)
    with gram.formed_once():
        found = [Gram(0.1).solve(PROBLEM, each, psi, [None])[0] for each in asked]
    assert read.count(train.folder) == times * len(train.shards)
    for system, each in zip(found, asked, strict=True):
        alone = Gram(0.1).solve(PROBLEM, each, psi, [None])[0]
        for piece in PIECES:
            assert_close(getattr(system, piece)(), getattr(alone, piece)(), 1e-11)
    assert gram.Last.matrix is None


def test_every_number_of_a_dual_system_is_read_once(tmp_path, monkeypatch):
    """And once more where the queries meet the training images: S shards, not S (S + 1) / 2."""
    train = stored(tmp_path, features(12, 40), per_shard=1)
    train.all()  # compared with their digests: once, as a whole
    monkeypatch.setattr(gram, "BLOCK_BYTES", 8 * 12 * 8)  # five blocks of 8 columns
    read, true = [], Rows.read
    monkeypatch.setattr(Rows, "read", lambda rows, at: read.append(rows.width) or true(rows, at))
    Gram(0.1).solve(PROBLEM, train, features(3, 40), [None])[0].kernel()
    assert sorted(read) == [8] * 5 * 12 + [40] * 12


def test_small_damping_stays_exact(tmp_path):
    """lambda = 1e-12 of the mean eigenvalue of a rank-deficient matrix, where a float32 inverse is noise. The truth is the
    pseudo-inverse; the damped one differs from it by lambda over the smallest eigenvalue, 3e-4."""
    phi = features(12, 40, 6)
    phi[6:] = phi[:6] * 2
    psi = features(3, 40, seed=2)
    expected = psi @ torch.linalg.pinv(phi, rtol=1e-9)
    for form in FORMS:
        kernel = in_form(form, tmp_path, phi, psi, 1e-12).kernel()[:, : len(phi)]
        assert float((kernel - expected).norm() / expected.norm()) < 1e-3


@pytest.mark.parametrize("per_shard", [1, 4, 100])
@pytest.mark.parametrize("form", FORMS)
def test_shards_do_not_matter(tmp_path, form, per_shard):
    phi, psi = features(11, 20), features(3, 20, seed=1)
    system = in_form(form, tmp_path, phi, psi, 0.1, absolute=True, per_shard=per_shard)
    assert_solves(system, explicit(phi, psi, 0.1))


@pytest.mark.parametrize(("n", "k"), [(11, 20), (25, 9)])
def test_float32_features_are_solved_in_float64(tmp_path, n, k):
    phi, psi = features(n, k).float(), features(3, k, seed=1).float()
    system = Gram(1e-6, absolute=True).solve(PROBLEM, stored(tmp_path, phi), psi, [None])[0]
    assert system.kernel().dtype == torch.float64
    # The condition number is 1e6 and the damping 1e-6 of the largest eigenvalue: float64 leaves 1e-16 * 1e7.
    assert_solves(system, explicit(phi.double(), psi.double(), 1e-6), rtol=1e-7)


def test_no_preconditioner(tmp_path):
    phi, psi = features(11, 5), features(3, 5, seed=1)
    identity = {
        "kernel": psi @ phi.T,
        "train_self": phi.square().sum(1),
        "train_square": phi.square().sum(1),
        "query_self": psi.square().sum(1),
        "train_norm": phi.norm(dim=1),
    }
    assert_solves(NoPreconditioner().solve(PROBLEM, stored(tmp_path, phi), psi, [None])[0], identity, 1e-14)


@pytest.mark.parametrize("form", FORMS)
def test_zero_features_are_an_error(tmp_path, form):
    phi, psi = torch.zeros(4, 6, dtype=torch.float64), torch.ones(2, 6, dtype=torch.float64)
    with refuses("all training features ... are zero"):
        in_form(form, tmp_path, phi, psi, 0.1)


@pytest.mark.parametrize("damping", [0.0, -1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("kind", [Gram, GaussNewton])
def test_damping_must_be_positive(kind, damping):
    with refuses("above 0 and finite"):
        kind(damping)


# --------------------------------------------------------------------------------------------------------- row scales


@pytest.mark.parametrize(("n", "k"), [(11, 20), (25, 9)])
def test_row_scales(tmp_path, n, k):
    phi, psi, damping = features(n, k), features(3, k, seed=1), 0.03
    phi[2] = 0
    system = Gram(damping, absolute=True).solve(PROBLEM, stored(tmp_path, phi), psi, [None])[0]
    inverse = torch.linalg.inv(phi.T @ phi + damping * torch.eye(k, dtype=torch.float64))

    def check(scale: normalize.Normalize, a: Tensor | None, b: Tensor | None) -> None:
        expected = psi @ inverse @ phi.T * (1 if a is None else a[:, None]) * (1 if b is None else b)
        # An image without gradient has no influence, whatever divides it.
        expected = torch.where(expected.isfinite(), expected, 0.0)
        torch.testing.assert_close(scale(system), expected, rtol=1e-9, atol=1e-9 * float(expected.abs().max()))

    own = (phi @ inverse * phi).sum(1)
    check(normalize.none, None, None)
    check(normalize.cosine, (psi @ inverse * psi).sum(1) ** -0.5, own**-0.5)
    check(normalize.renormalized, None, 1 / phi.norm(dim=1))
    check(normalize.relatif_theta, None, 1 / (phi @ inverse).norm(dim=1))
    check(normalize.relatif_loss, None, own**-0.5)
    check(normalize.leverage, None, 1 / (1 - own))
    apart = psi[:, None] - phi  # in the metric of the inverse
    expected = -torch.einsum("mnk,kl,mnl->mn", apart, inverse, apart).sqrt()
    torch.testing.assert_close(normalize.distance(system), expected, rtol=1e-7, atol=0)


def test_cosine_of_an_image_with_itself_is_one(tmp_path):
    phi = features(7, 9)
    for system in (Gram(0.1).solve(PROBLEM, stored(tmp_path, phi), phi, [None])[0], Plain(stored(tmp_path, phi), phi)):
        close(normalize.cosine(system).diag(), torch.ones(7), 1e-9)
        # The square root of rounding, where psi and phi are one.
        assert float(normalize.distance(system).diag().abs().max()) < 1e-6


def test_leverage_corrects_the_first_order_step_to_exact_removal(tmp_path):
    """Least squares y = X theta: theta - theta_{-i} = A^-1 x_i r_i / (1 - h_i), so that psi^T of it is the kernel of Gram
    on X, times r_i, times the leverage scale (Ling 1984)."""
    g = torch.Generator().manual_seed(0)
    X, y = features(14, 4), torch.randn(14, generator=g, dtype=torch.float64)
    psi, ridge = torch.randn(3, 4, generator=g, dtype=torch.float64), 0.01
    eye = ridge * torch.eye(4, dtype=torch.float64)
    theta = torch.linalg.solve(X.T @ X + eye, X.T @ y)
    system = Gram(ridge, absolute=True).solve(PROBLEM, stored(tmp_path, X), psi, [None])[0]
    predicted = normalize.leverage(system) * (y - X @ theta)
    for i in range(14):
        keep = [j for j in range(14) if j != i]
        without = torch.linalg.solve(X[keep].T @ X[keep] + eye, X[keep].T @ y[keep])
        torch.testing.assert_close(predicted[:, i], psi @ (theta - without), rtol=1e-9, atol=1e-12)


def test_leverage_of_one_is_an_error(tmp_path):
    class Full(Plain):
        pass

    with refuses("not below 1"):
        normalize.leverage(Full(stored(tmp_path, 2 * torch.eye(3).double()), torch.ones(1, 3).double()))


# ------------------------------------------------------------------------------------------------- exact Gauss-Newton


def gauss_newton(task: Task, part: Gradient, point: Checkpoint | None = None) -> Tensor:
    """The matrix [d, d] of the exact solver at a checkpoint (by default the last), from the eigenvectors of its system."""
    point = point or task.trajectory[-1]
    train = rows(part, task, point, task.train, "x")
    nothing = torch.zeros(1, train.width, dtype=torch.float64)
    (system,) = GaussNewton(1.0, absolute=True).solve(Problem(task, point, part), train, nothing, [None])
    assert isinstance(system, Damped)
    return (system.basis.vectors * system.basis.values) @ system.basis.vectors.mT


def total_hessian(task: Task, part: Gradient) -> Tensor:
    """Hessian of the summed training measure by autograd, with a plain loop over images and draws."""
    net = task.trajectory[-1].load().to(task.engine.dtype)
    names = [name for name, _ in net.named_parameters()]
    flat = torch.cat([p.detach().flatten() for p in net.parameters()])
    sizes = [p.numel() for p in net.parameters()]
    shapes = [p.shape for p in net.parameters()]
    (output,) = part.outputs

    def value(theta: Tensor) -> Tensor:
        pieces = theta.split(sizes)
        weights = {name: p.reshape(s) for name, p, s in zip(names, pieces, shapes, strict=True)}

        def call(*args: object) -> object:
            return torch.func.functional_call(net, weights, args)

        total = torch.zeros((), dtype=theta.dtype)
        batch = task.train.batch(range(len(task.train))).to("cpu", task.engine.dtype)
        every = part.draws(batch.keys, batch.x0.shape[1:], task.forward.timesteps, batch.x0.dtype)
        for s in range(part.draws.count):
            draw = replace(every, t=every.t[:, s], noise=every.noise[:, s])
            prediction, target = task.forward(call, batch, draw)
            total = total + output.of(prediction, target, draw.t, task.forward).sum() / part.draws.count
        return total

    return torch.autograd.functional.hessian(value, flat)


@pytest.mark.parametrize("output", [outputs.loss, outputs.elbo, outputs.squared_norm], ids=lambda o: o.name)
def test_gauss_newton_is_the_hessian_of_a_linear_denoiser(tmp_path, output):
    task = linear_world(n=3, m=1, dim=3).task(tmp_path)
    part = Gradient(output, DRAWS)
    torch.testing.assert_close(gauss_newton(task, part), total_hessian(task, part), rtol=1e-9, atol=1e-12)


def test_gauss_newton_is_the_hessian_of_logistic_regression(tmp_path):
    def make() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(16, 3))

    point = (checkpoint(make, "linear"),)
    task = Task(Classifier(), point, labelled(5, "train"), labelled(2, "query"), tmp_path, Engine(dtype=torch.float64))
    part = Gradient(outputs.cross_entropy, draws.once())
    torch.testing.assert_close(gauss_newton(task, part), total_hessian(task, part), rtol=1e-9, atol=1e-12)


def test_gauss_newton_of_a_classifier(tmp_path):
    """sum_i J_i^T (diag(p) - p p^T) J_i, with J from one backward pass per logit."""
    task = classifier_task(tmp_path)
    net = task.trajectory[-1].load().double()
    expected = torch.zeros(1, dtype=torch.float64)
    for i in range(len(task.train)):
        logits = net(task.train.batch([i]).x0.double())[0]
        rows_ = [torch.autograd.grad(z, list(net.parameters()), retain_graph=True) for z in logits]
        J = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows_])
        p = logits.detach().softmax(0)
        expected = expected + J.T @ (torch.diag(p) - torch.outer(p, p)) @ J
    found = gauss_newton(task, Gradient(outputs.cross_entropy, draws.once()))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_gauss_newton_solves_like_an_explicit_inverse(tmp_path):
    task = linear_world(n=4, m=2, dim=3).task(tmp_path)
    part = Gradient(outputs.loss, DRAWS)
    point = task.trajectory[-1]
    train = rows(part, task, point, task.train, "train")
    psi = rows(part, task, point, task.queries, "queries").all()
    H = gauss_newton(task, part)
    values = torch.linalg.eigvalsh(H)
    unit = float(values[values > 1e-9 * values.max()].mean())
    for damping, absolute in ((0.05, False), (0.3, True)):
        system = GaussNewton(damping, absolute).solve(Problem(task, point, part), train, psi, [None])[0]
        inverse = torch.linalg.inv(H + damping * (1 if absolute else unit) * torch.eye(len(H), dtype=H.dtype))
        phi = train.all()
        expected = {
            "kernel": psi @ inverse @ phi.T,
            "train_self": (phi @ inverse * phi).sum(1),
            "train_square": (phi @ inverse).square().sum(1),
            "query_self": (psi @ inverse * psi).sum(1),
        }
        assert_solves(system, expected)


def test_gauss_newton_of_some_parameters_is_that_block(tmp_path):
    """Also: attention blocks lie between the chosen layer and the loss, and no graph of the others is kept."""
    task = classifier_task(tmp_path)
    whole = gauss_newton(task, Gradient(outputs.cross_entropy, draws.once()))
    head = gauss_newton(task, Gradient(outputs.cross_entropy, draws.once(), parameters="head"))
    close(head, whole[-len(head) :, -len(head) :], 1e-9)
    assert not head.requires_grad
    task = unet_task(tmp_path, n=2)
    some = gauss_newton(task, Gradient(outputs.loss, draws.uniform(2), parameters=r"attentions.*to_v\.weight"))
    assert not some.requires_grad
    assert float(torch.linalg.eigvalsh(some)[-1]) > 0


def test_what_gauss_newton_cannot_do_is_refused(tmp_path, monkeypatch):
    task = classifier_task(tmp_path)

    def solve(part: Gradient | Value) -> None:
        train = stored(tmp_path, torch.ones(2, 156, dtype=torch.float64))
        GaussNewton(0.1).solve(Problem(task, task.trajectory[-1], part), train, torch.ones(1, 156), [None])

    good = Gradient(outputs.cross_entropy, draws.once())
    with refuses("unprojected"):
        solve(replace(good, projection=Rademacher(8)))
    with refuses("one output"):
        solve(replace(good, output=outputs.probes(2)))
    with refuses(accepted="unit=False"):
        solve(replace(good, draws=draws.uniform(1, unit=True)))
    with refuses("negative eigenvalues"):
        solve(replace(good, output=outputs.margin))
    monkeypatch.setattr(exact, "LARGEST", 155)
    with refuses("156 parameters; at most 155"):
        solve(good)
