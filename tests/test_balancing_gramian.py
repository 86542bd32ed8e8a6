"""Methods on the Gramian: TorchJD on the explicit Jacobian, generic solvers, and the properties their papers claim.

K tasks, P parameters.
"""

import numpy as np
import pytest
import scipy.optimize
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchjd.aggregation import IMTLG, AlignedMTL, FairGradWeighting, GradVacWeighting, PCGrad

from mtrec.balancing import BALANCERS, programs
from mtrec.balancing.draws import generator

GRAMIAN_KINDS = [kind for kind, method in BALANCERS.items() if method.needs_gramian]
STATELESS = ["mgda", "pcgrad", "cagrad", "imtl_g", "nash_mtl", "fairgrad", "aligned_mtl", "upgrad", "dualproj"]
SIZES = (2, 3, 5, 8)  # 8 is beyond what `programs` enumerates


def jacobian(size: int, seed: int, spread: float = 10.0) -> Tensor:
    """(K, P) with conflicts and norms that differ by `spread`."""
    draws = torch.Generator().manual_seed(seed)
    rows = torch.randn(size, size + 4, generator=draws, dtype=torch.float64)
    rows += 0.3 * torch.randn(1, size + 4, generator=draws, dtype=torch.float64)
    norms = torch.logspace(0.0, np.log10(spread), size, dtype=torch.float64)
    return rows * norms[torch.randperm(size, generator=draws), None]


def solve(kind: str, jacobian_KP: Tensor, step: int = 0, **options: object) -> Tensor:
    names = [f"task{k}" for k in range(len(jacobian_KP))]
    losses_K = torch.linspace(0.5, 2.0, len(names), dtype=torch.float64)
    method = BALANCERS[kind](names, **options)
    return method(losses_K, jacobian_KP @ jacobian_KP.T, step, torch.ones(len(names), dtype=torch.bool))


def simplex_minimum(value: object, size: int) -> np.ndarray:
    """A generic solver for a convex function on the simplex; the best of several starts."""
    results = [
        scipy.optimize.minimize(
            value,  # type: ignore[arg-type]
            start,
            bounds=[(0.0, None)] * size,
            constraints={"type": "eq", "fun": lambda w: w.sum() - 1.0},
            method="SLSQP",
            options={"ftol": 1e-15, "maxiter": 500},
        )
        for start in [np.full(size, 1.0 / size), *(0.7 * np.eye(size) + 0.3 / size)]
    ]
    return min(results, key=lambda result: result.fun).x


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("seed", range(4))
def test_mgda_equals_a_generic_solver_and_is_stationary(size: int, seed: int) -> None:
    rows = jacobian(size, seed)
    gramian = (rows @ rows.T).numpy()
    weights = solve("mgda", rows).numpy()
    scale = gramian.diagonal().max()
    expected = simplex_minimum(lambda w: w @ gramian @ w / scale, size)
    assert weights @ gramian @ weights <= expected @ gramian @ expected * (1.0 + 1e-9)
    np.testing.assert_allclose(weights, expected, atol=2e-4)
    # Désidéri 2012: every gradient has an inner product of at least |d|^2 with d, equality where it has a weight.
    inner = gramian @ weights
    squared = weights @ inner
    assert (inner >= squared - 1e-8 * scale).all()
    np.testing.assert_allclose(inner[weights > 1e-6], squared, atol=1e-8 * scale)


def test_mgda_of_two_tasks_has_the_closed_form_of_sener_and_koltun() -> None:
    for seed in range(20):
        a, b = jacobian(2, seed)
        gamma = float(((b - a) @ b / (a - b).square().sum()).clamp(0.0, 1.0))
        assert solve("mgda", torch.stack([a, b])).tolist() == pytest.approx([gamma, 1.0 - gamma], abs=1e-8)


def test_mgda_of_nearly_parallel_gradients_is_as_exact() -> None:
    a, b = torch.tensor([[1.0, 0.0], [1.0, 0.003]], dtype=torch.float64)
    b = b * 0.9999975  # |b| < |a|, so that the least norm lies between them
    gamma = float((b - a) @ b / (a - b).square().sum())
    assert 0.1 < gamma < 0.9
    assert solve("mgda", torch.stack([a, b])).tolist() == pytest.approx([gamma, 1.0 - gamma], abs=1e-6)


def test_mgda_normalisations_solve_for_the_normalised_gradients() -> None:
    rows = jacobian(3, 5)
    losses_K = torch.linspace(0.5, 2.0, 3, dtype=torch.float64)  # as in `solve`
    for normalization, unit_K in [("l2", rows.norm(dim=1)), ("loss", losses_K)]:
        direction = solve("mgda", rows, normalization=normalization) @ rows
        expected = solve("mgda", rows / unit_K[:, None]) @ (rows / unit_K[:, None])
        assert float(torch.cosine_similarity(direction, expected, dim=0)) == pytest.approx(1.0, abs=1e-8)
    with pytest.raises(ValueError, match=r"`tasks\.b` should have a positive loss"):
        BALANCERS["mgda"](["a", "b"], normalization="loss")(
            torch.tensor([1.0, 0.0]), torch.eye(2), 0, torch.tensor([True, True])
        )


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("seed", range(4))
def test_cagrad_equals_a_generic_solver(size: int, seed: int) -> None:
    rows = jacobian(size, seed, spread=3.0)
    gramian = (rows @ rows.T).numpy()
    gramian = gramian / gramian.diagonal().max()
    mean = np.full(size, 1.0 / size)
    radius = 0.5 * np.sqrt(mean @ gramian @ mean)

    def value(w: np.ndarray) -> float:  # equation 4 of Liu et al. 2021
        return float(w @ gramian @ mean + radius * np.sqrt(w @ gramian @ w + 1e-18))

    best = simplex_minimum(value, size)
    expected = mean + radius / np.sqrt(best @ gramian @ best) * best
    found = solve("cagrad", rows, c=0.5).numpy()
    lift = found - mean
    assert lift @ gramian @ lift == pytest.approx(radius**2, rel=1e-6)
    # What is maximised: the least improvement. Ours should be as good; the directions should agree.
    assert (gramian @ found).min() >= (gramian @ expected).min() - 1e-7
    np.testing.assert_allclose(found @ rows.numpy(), expected @ rows.numpy(), atol=3e-3)


def test_cagrad_without_radius_is_the_mean_and_follows_a_preference() -> None:
    rows = jacobian(3, 1)
    assert solve("cagrad", rows, c=0.0).tolist() == pytest.approx([1 / 3] * 3)
    assert solve("cagrad", rows, c=0.0, preference={"task1": 2.0}).tolist() == pytest.approx([0.25, 0.5, 0.25])


@pytest.mark.parametrize("cosine", [-0.9, 0.0, 0.9])
@pytest.mark.parametrize("norm", [1e-2, 1e-4, 1e-6])
def test_cagrad_raises_the_least_improvement_however_small_a_gradient_is(cosine: float, norm: float) -> None:
    rows = torch.tensor([[1.0, 0.0], [norm * cosine, norm * (1.0 - cosine**2) ** 0.5]], dtype=torch.float64)
    mean = rows.mean(dim=0)
    angles = torch.linspace(0.0, 2.0 * torch.pi, 200_001, dtype=torch.float64)
    around = mean + 0.4 * mean.norm() * torch.stack([angles.cos(), angles.sin()], dim=1)
    best = float((around @ rows.T).min(dim=1).values.max())
    assert float((rows @ (solve("cagrad", rows, c=0.4) @ rows)).min()) == pytest.approx(best, rel=1e-6)


def test_cagrad_where_no_direction_improves_all_stays_with_the_free_task() -> None:
    rows = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    direction = solve("cagrad", rows) @ rows
    torch.testing.assert_close(direction, rows.mean(dim=0), rtol=0.0, atol=1e-6)
    assert solve("cagrad", rows).max() < 10.0


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("seed", range(4))
def test_upgrad_and_dualproj_equal_a_generic_solver(size: int, seed: int) -> None:
    rows = jacobian(size, seed, spread=3.0).numpy()

    def project(target: np.ndarray) -> np.ndarray:
        """argmin |d - target| with rows @ d >= 0, by Moreau: d = target + rows^T x, x >= 0."""
        return target + rows.T @ scipy.optimize.nnls(rows.T, -target)[0]

    expected_upgrad = np.mean([project(row) for row in rows], axis=0)
    np.testing.assert_allclose(solve("upgrad", torch.from_numpy(rows)).numpy() @ rows, expected_upgrad, atol=1e-6)
    expected_dual = project(rows.mean(axis=0))
    np.testing.assert_allclose(solve("dualproj", torch.from_numpy(rows)).numpy() @ rows, expected_dual, atol=1e-6)


@pytest.mark.parametrize("size", [2, 4, 6])
def test_enumeration_and_active_set_agree(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(5):
        rows = jacobian(size, seed)
        first = [solve(kind, rows) for kind in ("mgda", "cagrad", "upgrad", "dualproj")]
        with monkeypatch.context() as patch:
            patch.setattr(programs, "MOST_ENUMERATED", 1)
            second = [solve(kind, rows) for kind in ("mgda", "cagrad", "upgrad", "dualproj")]
        for a, b in zip(first, second, strict=True):
            torch.testing.assert_close(a @ rows, b @ rows, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [2, 3, 5])
def test_adapted_methods_equal_torchjd_on_the_explicit_jacobian(size: int) -> None:
    for seed in range(5):
        rows = jacobian(size, seed)
        preference = torch.arange(1.0, size + 1.0, dtype=torch.float64)
        named = {f"task{k}": float(value) for k, value in enumerate(preference)}
        torch.testing.assert_close(solve("imtl_g", rows) @ rows, IMTLG()(rows), rtol=1e-7, atol=1e-9)
        for scale in ("min", "median", "rmse"):
            found = solve("aligned_mtl", rows, scale=scale, preference=named) @ rows
            expected = AlignedMTL(preference / preference.sum(), scale_mode=scale)(rows)
            torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)


def test_pcgrad_equals_torchjd_given_the_same_orders() -> None:
    for seed in range(10):
        rows = jacobian(4, seed)
        found = solve("pcgrad", rows, step=seed, seed=7) @ rows
        torch.manual_seed(generator(7, seed).initial_seed())
        torch.testing.assert_close(found, PCGrad()(rows), rtol=1e-12, atol=1e-12)


def test_gradvac_equals_torchjd_given_the_same_orders_over_many_steps() -> None:
    names = ["a", "b", "c", "d"]
    method, reference = BALANCERS["gradvac"](names, beta=0.3, seed=7), GradVacWeighting(beta=0.3, eps=1e-12)
    for step in range(15):
        rows = jacobian(4, step)
        gramian = rows @ rows.T
        found = method(torch.ones(4), gramian, step, torch.ones(4, dtype=torch.bool))
        torch.manual_seed(generator(7, step).initial_seed())
        torch.testing.assert_close(found, reference(gramian), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0, 5.0])
def test_fairgrad_solves_its_equation_and_equals_torchjd(alpha: float) -> None:
    for seed in range(4):
        rows = jacobian(3, seed, spread=2.0)
        weights = solve("fairgrad", rows, alpha=alpha)
        gains = rows @ (weights @ rows)
        torch.testing.assert_close(gains, weights ** (-1.0 / alpha), rtol=1e-8, atol=0.0)
        torch.testing.assert_close(weights, FairGradWeighting(alpha)(rows @ rows.T), rtol=1e-3, atol=1e-4)


def test_nash_mtl_solves_its_equation_with_a_preference() -> None:
    for size in SIZES:
        rows = jacobian(size, size)
        weights = solve("nash_mtl", rows, preference={"task1": 3.0})
        asked = torch.ones(size, dtype=torch.float64)
        asked[1] = 3.0
        torch.testing.assert_close(weights * (rows @ (weights @ rows)), asked, rtol=1e-8, atol=0.0)


def test_imtl_g_projects_equally_onto_every_gradient() -> None:
    rows = jacobian(4, 2)
    projections = (rows / rows.norm(dim=1, keepdim=True)) @ (solve("imtl_g", rows) @ rows)
    torch.testing.assert_close(projections, projections.mean().expand(4), rtol=1e-8, atol=1e-10)


def test_metabalance_by_hand() -> None:
    names, on = ["click", "save", "dwell"], torch.ones(3, dtype=torch.bool)
    norms = torch.tensor([2.0, 0.5, 8.0], dtype=torch.float64)
    for strategy, expected in [
        ("both", [1.0, 0.7 * 4.0 + 0.3, 0.7 * 0.25 + 0.3]),
        ("reduce", [1.0, 1.0, 0.7 * 0.25 + 0.3]),
        ("enlarge", [1.0, 0.7 * 4.0 + 0.3, 1.0]),
    ]:
        method = BALANCERS["metabalance"](names, strategy=strategy)
        assert method(torch.ones(3), torch.diag(norms**2), 0, on).tolist() == pytest.approx(expected)
    # A task seen once is not taken for a small one: its average is corrected for its own start.
    method = BALANCERS["metabalance"](names, relax=1.0)
    for step in range(3):
        rare = torch.tensor([True, step == 2, True])
        weights = method(torch.ones(3), torch.diag(norms**2), step, rare)
    assert weights.tolist() == pytest.approx([1.0, 4.0, 0.25])
    # The moving average m <- .9 m + .1 n, over .1 and .19 of mass: (.9 * .1 * 8 + .1 * 2) / .19 for dwell.
    method = BALANCERS["metabalance"](names, relax=1.0)
    method(torch.ones(3), torch.diag(norms**2), 0, on)
    weights = method(torch.ones(3), torch.diag(torch.tensor([2.0, 0.5, 2.0]) ** 2), 1, on)
    assert weights[2].item() == pytest.approx(2.0 / ((0.9 * 0.1 * 8.0 + 0.1 * 2.0) / 0.19))


def test_db_mtl_stretches_log_gradients_to_the_largest() -> None:
    rows = jacobian(3, 4)
    losses_K = torch.linspace(0.5, 2.0, 3, dtype=torch.float64)
    log_rows = rows / losses_K[:, None]
    expected = (log_rows.norm(dim=1).max() / log_rows.norm(dim=1))[:, None] * log_rows
    torch.testing.assert_close(solve("db_mtl", rows) @ rows, expected.sum(dim=0), rtol=1e-10, atol=1e-12)


def test_db_mtl_averages_squared_norms_with_a_fading_past() -> None:
    method = BALANCERS["db_mtl"](["a", "b"], beta=0.8, sigma=0.5)
    on, ones = torch.tensor([True, True]), torch.ones(2, dtype=torch.float64)
    method(ones, torch.diag(torch.tensor([1.0, 4.0])), 0, on)
    weights = method(ones, torch.diag(torch.tensor([1.0, 16.0])), 1, on)
    past = 0.8 / 2**0.5
    assert weights.tolist() == pytest.approx([((1 - past) * 16.0 + past * 4.0) ** 0.5, 1.0])


@pytest.mark.parametrize("kind", ["upgrad", "dualproj", "mgda"])
@settings(max_examples=40, deadline=None)
@given(size=st.integers(2, 8), seed=st.integers(0, 10**6), spread=st.sampled_from([1.0, 100.0, 1e4]))
def test_the_direction_conflicts_with_no_gradient(kind: str, size: int, seed: int, spread: float) -> None:
    rows = jacobian(size, seed, spread)
    direction = solve(kind, rows) @ rows
    inner = (rows @ direction) / rows.norm(dim=1)
    assert inner.min() >= -1e-6 * direction.norm() - 1e-9 * rows.norm()


@pytest.mark.parametrize("kind", [kind for kind in STATELESS if kind != "pcgrad"])
@settings(max_examples=15, deadline=None)
@given(size=st.integers(2, 6), seed=st.integers(0, 10**6))
def test_permutation_equivariance(kind: str, size: int, seed: int) -> None:
    rows = jacobian(size, seed)
    order = torch.randperm(size, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(solve(kind, rows[order]) @ rows[order], solve(kind, rows) @ rows, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", STATELESS)
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10**6), exponent=st.sampled_from([-30, -12, 12, 30]))
def test_the_unit_of_all_gradients_does_not_change_the_relative_weights(kind: str, seed: int, exponent: int) -> None:
    rows = jacobian(3, seed)
    weights, scaled = solve(kind, rows), solve(kind, rows * 10.0 ** (exponent / 2))
    torch.testing.assert_close(scaled / scaled.abs().sum(), weights / weights.abs().sum(), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("kind", ["nash_mtl", "imtl_g", "db_mtl"])
def test_methods_that_are_invariant_to_the_scale_of_each_task(kind: str) -> None:
    rows = jacobian(3, 9)
    units = torch.tensor([[1.0], [100.0], [0.01]], dtype=torch.float64)
    direction, other = solve(kind, rows) @ rows, solve(kind, rows * units) @ (rows * units)
    assert float(torch.cosine_similarity(direction, other, dim=0)) == pytest.approx(1.0, abs=1e-7)


@pytest.mark.parametrize("kind", GRAMIAN_KINDS)
def test_equal_gradients_have_equal_weights(kind: str) -> None:
    rows = torch.ones(3, 2, dtype=torch.float64)
    names, on = ["a", "b", "c"], torch.ones(3, dtype=torch.bool)
    weights = BALANCERS[kind](names)(torch.ones(3), rows @ rows.T, 0, on)
    assert (weights / weights.sum()).tolist() == pytest.approx([1 / 3] * 3, abs=1e-5)


@pytest.mark.parametrize("kind", ["pcgrad", "upgrad", "dualproj"])
def test_without_conflict_the_mean_direction_is_kept(kind: str) -> None:
    rows = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]], dtype=torch.float64)
    weights = solve(kind, rows)
    assert (weights / weights.sum()).tolist() == pytest.approx([1 / 3] * 3, abs=1e-7)
