"""The small convex programs behind MGDA, UPGrad, DualProj and CAGrad, solved exactly.

All are quadratic over a positive semi-definite K x K matrix with K a handful. Up to `MOST_ENUMERATED` tasks every
active set is tried in one batched solve (63 systems for K = 6, some 0.1 ms): exact and without a tolerance to tune.
Beyond, an active-set method (scipy's Lawson-Hanson NNLS) does the same. TorchJD's own solvers stop unconverged (MGDA),
add 1e-4 to the diagonal (UPGrad, DualProj) or need cvxpy (CAGrad).

Everything is solved for the matrix of cosines C, G = diag(n) C diag(n), so that a task whose gradient is 1e-6 of
another's is solved as exactly. C gets eigenvalues of at least `RIDGE`: then the solution is unique, and of equal
gradients each gets an equal share.

Legend: K tasks, S sets of tasks (those whose variable is not at its bound).
"""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.float64]
MOST_ENUMERATED = 6
RIDGE = 1e-9
STATIONARY = 1e-8  # squared length of the min-norm point of the gradients, each of length 1


def on_active(solve: Callable[[Array], Array], gramian_KK: Tensor, active_K: Tensor) -> Tensor:
    """(K,) float64: `solve` of the active tasks' Gramian, 0 for the others.

    `solve` gets the Gramian divided by its largest diagonal entry, so 1e30 and 1e-30 are the same to it.

    >>> on_active(lambda G: G.diagonal(), torch.diag(torch.tensor([2.0, 4.0, 8.0])), torch.tensor([True, True, False]))
    tensor([0.5000, 1.0000, 0.0000], dtype=torch.float64)
    """
    index = active_K.cpu().numpy().nonzero()[0]
    weights_K = np.zeros(len(active_K))
    if len(index):
        gramian = gramian_KK.detach().double().cpu().numpy()[np.ix_(index, index)]
        weights_K[index] = solve(gramian / gramian.diagonal().max())
    return torch.from_numpy(weights_K)


def cosines(gramian: Array) -> tuple[Array, Array]:
    """(C, n): cosines with eigenvalues of at least RIDGE, and norms. The diagonal should be positive.

    >>> C, norms = cosines(np.array([[4.0, -1.0], [-1.0, 1.0]]))
    >>> C[0, 1], norms.tolist()
    (np.float64(-0.5), [2.0, 1.0])
    """
    norm_K = np.sqrt(gramian.diagonal())
    cosine_KK = gramian / norm_K[:, None] / norm_K
    cosine_KK = (cosine_KK + cosine_KK.T) / 2.0
    values, vectors = np.linalg.eigh(cosine_KK)
    if values[0] < RIDGE:  # rank-deficient, or indefinite by rounding
        cosine_KK = (vectors * np.maximum(values, RIDGE)) @ vectors.T
    return cosine_KK, norm_K


def dual_cone(gramian: Array, u_K: Array) -> Array:
    """argmin v^T G v subject to v >= u: the weights of J^T u projected onto the cone that conflicts with no row.

    Quinton & Rey 2024, proposition 1.

    >>> dual_cone(np.array([[1.0, -1.0], [-1.0, 2.0]]), np.array([1.0, 0.0])).round(6).tolist()
    [1.0, 0.5]
    """
    cosine_KK, norm_K = cosines(gramian)
    lift = nonnegative_quadratic(cosine_KK, cosine_KK @ (norm_K * u_K))
    return np.asarray(u_K + lift / norm_K)


def nonnegative_quadratic(matrix_KK: Array, linear_K: Array) -> Array:
    """argmin 1/2 x^T M x + q^T x subject to x >= 0, for a positive definite M.

    >>> nonnegative_quadratic(np.eye(2), np.array([-3.0, 1.0])).tolist()
    [3.0, 0.0]
    """
    size = len(linear_K)
    if size > MOST_ENUMERATED:
        from scipy.optimize import nnls  # here, not above: half a second that most trainings do without

        upper = np.linalg.cholesky(matrix_KK).T
        target = np.linalg.solve(upper.T, -linear_K)
        return np.asarray(nnls(upper, target, maxiter=100 * size)[0])
    sets_SK = _sets(size)
    x_SK = -_solve_sets(matrix_KK, linear_K[:, None])[..., 0]
    slack_SK = np.where(sets_SK, x_SK, x_SK @ matrix_KK + linear_K)  # both should be >= 0 at the optimum
    best = int(np.argmax(np.minimum(slack_SK.min(axis=1), 0.0)))
    return np.asarray(np.maximum(x_SK[best], 0.0))


def min_norm(gramian: Array) -> Array:
    """argmin a^T G a on the simplex: the point of least norm in the convex hull of the gradients.

    >>> min_norm(np.diag([1.0, 3.0])).round(6).tolist()
    [0.75, 0.25]
    """
    size = len(gramian)
    cosine_KK, norm_K = cosines(gramian)
    if size > MOST_ENUMERATED:
        # Both programs have the same optimality conditions up to the length of the solution.
        inverse_K = norm_K.min() / norm_K
        x_K = nonnegative_quadratic(cosine_KK, -inverse_K) * inverse_K
        return np.asarray(x_K / x_K.sum())
    sets_SK = _sets(size)
    y_SK = _solve_sets(cosine_KK, (1.0 / norm_K)[:, None])[..., 0]  # norm * weight, up to the factor `level`
    with np.errstate(divide="ignore", invalid="ignore"):
        level_S1 = 1.0 / (y_SK / norm_K).sum(axis=1, keepdims=True)
        y_SK = y_SK * level_S1
        slack_SK = np.where(sets_SK, y_SK, y_SK @ cosine_KK - level_S1 / norm_K)
    slack_S = np.where(sets_SK.any(axis=1), slack_SK.min(axis=1), -np.inf)
    best = int(np.argmax(np.minimum(slack_S, 0.0)))
    a_K = np.maximum(y_SK[best], 0.0) / norm_K
    return np.asarray(a_K / a_K.sum())


def conflict_averse(gramian: Array, share_K: Array, c: float) -> Array:
    """Weights of the d with max_d min_k g_k . d subject to |d - g_0| <= c |g_0|, g_0 = J^T share (Liu et al. 2021).

    Where the gradients have a combination that is 0 (nothing improves all tasks), the maximisers need not be unique; of
    those the nearest to g_0 is taken.

    >>> conflict_averse(np.diag([1.0, 4.0]), np.array([0.5, 0.5]), 0.4).round(4).tolist()
    [0.9472, 0.5]
    """
    cosine_KK, norm_K = cosines(gramian)
    start_K = norm_K * share_K  # in units of the normalised gradients, as all that follows
    pull_K = cosine_KK @ start_K
    radius2 = c * c * float(start_K @ pull_K)
    if radius2 <= RIDGE**2 or len(share_K) == 1:
        return share_K
    a_K = min_norm(cosine_KK)
    if float(a_K @ cosine_KK @ a_K) <= STATIONARY:
        lift_K = nonnegative_quadratic(cosine_KK, pull_K)
        if float(lift_K @ cosine_KK @ lift_K) <= radius2:
            return np.asarray(share_K + lift_K / norm_K)
    best = _enumerate_ball if len(share_K) <= MOST_ENUMERATED else _search_ball
    return np.asarray(share_K + best(cosine_KK, norm_K, pull_K, radius2) / norm_K)


def _enumerate_ball(cosine_KK: Array, norm_K: Array, pull_K: Array, radius2: float) -> Array:
    """The y >= 0 with |J^T y|^2 = radius2 and, on its support, g_k . d = level = min_j g_j . d."""
    sets_SK = _sets(len(pull_K))
    a_SK, b_SK = np.moveaxis(_solve_sets(cosine_KK, np.stack([1.0 / norm_K, pull_K], axis=1)), -1, 0)
    sum_a_S = (a_SK / norm_K).sum(axis=1)
    sum_b_S = (b_SK / norm_K).sum(axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        # y = level a - b, so |J^T y|^2 = radius2 is a quadratic in `level`; the larger root has sum(y / norm) > 0.
        root_S = np.sqrt(np.maximum(sum_b_S**2 - sum_a_S * ((b_SK * pull_K).sum(axis=1) - radius2), 0.0))
        level_S1 = ((sum_b_S + root_S) / sum_a_S)[:, None]
        y_SK = level_S1 * a_SK - b_SK
        slack_SK = np.where(sets_SK, y_SK, (y_SK @ cosine_KK + pull_K) - level_S1 / norm_K)
    valid_S = sets_SK.any(axis=1) & (root_S > 0.0)
    slack_S = np.where(valid_S, slack_SK.min(axis=1), -np.inf)
    return np.asarray(np.maximum(y_SK[int(np.argmax(np.minimum(slack_S, 0.0)))], 0.0))


def _search_ball(cosine_KK: Array, norm_K: Array, pull_K: Array, radius2: float) -> Array:
    """As `_enumerate_ball` for many tasks: the length of y grows with the level, so the level is a root."""
    from scipy.optimize import brentq

    def at(level: float) -> Array:
        return nonnegative_quadratic(cosine_KK, pull_K - level / norm_K)

    def excess(level: float) -> float:
        y_K = at(level)
        return float(y_K @ cosine_KK @ y_K) - radius2

    low = float((pull_K * norm_K).min())  # y = 0 there
    width = float(abs(low) + np.sqrt(radius2) * norm_K.max())
    high = low + width
    while excess(high) < 0.0:
        high += width
        width *= 2.0
    return at(float(brentq(excess, low, high, xtol=1e-15 * max(abs(low), abs(high)), rtol=1e-14)))


@functools.cache
def _sets(size: int) -> NDArray[np.bool_]:
    """(2^K, K): every set of K tasks, the empty one first."""
    return np.asarray((np.arange(2**size)[:, None] >> np.arange(size)) % 2 == 1)


def _solve_sets(matrix_KK: Array, right_KR: Array) -> NDArray[Any]:
    """(S, K, R): for each set the solution of M x = right within it, 0 outside."""
    sets_SK = _sets(len(matrix_KK))
    both_SKK = sets_SK[:, :, None] & sets_SK[:, None, :]
    matrix_SKK = np.where(both_SKK, matrix_KK, np.eye(len(matrix_KK)))
    return np.asarray(np.linalg.solve(matrix_SKK, np.where(sets_SK[..., None], right_KR, 0.0)))
