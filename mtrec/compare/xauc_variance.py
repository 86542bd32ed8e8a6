"""The variance of XAUC over users: what placement values are to AUC, for labels that are numbers.

Legend: N rows (all with a label), W rows of padded blocks, R runs, G users.
"""

import math

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


def weight_below(first_N: Floats, second_N: Floats, weight_N: Floats) -> Floats:
    """(N,) the weight of the rows that are strictly smaller than a row in both `first_N` and `second_N`. O(N log N).

    As `mtrec.metrics.ranking.ascending_pairs`, but for each row: rows laid out by `second_N` are parted by the bits of their
    place in the order of `first_N`, the highest first; a row of a block's right half has as partners those of the left half
    laid out before it. Ties are laid out and placed so that they never count.

    >>> weight_below(np.array([1.0, 2.0, 2.0, 3.0]), np.array([1.0, 2.0, 3.0, 3.0]), np.ones(4))
    array([0., 1., 1., 2.])
    """
    count = len(first_N)
    bits = max(1, (count - 1).bit_length())
    size = 1 << bits
    by_first = np.lexsort((-second_N, first_N))
    place_N = np.empty(count, np.int64)
    place_N[by_first] = np.arange(count)
    layout = np.lexsort((-place_N, second_N))
    # Padding has weight 0 and the last places
    places_W = np.concatenate([np.arange(size - 1, count - 1, -1), place_N[layout]])
    weights_W = np.concatenate([np.zeros(size - count), weight_N[layout]])
    below_W = np.zeros(size)
    for bit in reversed(range(bits)):
        half = 1 << bit
        right = (places_W & half) != 0
        left = ~right
        lefts = np.cumsum(np.where(left, weights_W, 0.0).reshape(-1, 2 * half), axis=1).ravel()
        below_W[places_W[right]] += lefts[right]
        places_W, weights_W = (
            np.concatenate([each[left].reshape(-1, half), each[right].reshape(-1, half)], axis=1).ravel()
            for each in (places_W, weights_W)
        )
    return below_W[place_N]


def _weight_of_equal(keys: tuple[Floats, ...], weight_N: Floats) -> Floats:
    """(N,) the weight of the rows that equal a row in all keys, itself included."""
    order = np.lexsort(keys)
    changes = np.zeros(len(order) - 1, bool)
    for key in keys:
        changes |= key[order][1:] != key[order][:-1]
    cell = np.concatenate([[0], np.cumsum(changes)])
    found_N = np.empty(len(order))
    found_N[order] = np.bincount(cell, weight_N[order])[cell]
    return found_N


def xauc_influence(
    prediction_RN: Floats, label_N: Floats, weight_N: Floats, user_N: Ints, num_users: int
) -> tuple[Floats, Floats]:
    """(XAUC of R runs (R,), what each user adds to its deviation (R, G)); NaN where all labels are equal.

    XAUC is a ratio of U-statistics of order 2: the first-order (Hájek) projection of a user is twice the sum over its rows of
    weight x (weight ordered rightly - XAUC x weight comparable), over the weight of all comparable pairs. For labels 0 and 1 it
    is Obuchowski's placement sum. `user_N` are numbers from 0 to `num_users` - 1.

    >>> label, user = np.array([0.0, 3.0, 9.0, 4.0]), np.array([0, 1, 1, 2])
    >>> xauc, influence = xauc_influence(np.array([[1.0, 2.0, 2.0, 5.0]]), label, np.ones(4), user, 3)
    >>> xauc, influence.round(3)
    (array([0.75]), array([[ 0.125, -0.083, -0.042]]))
    """
    comparable_N = np.sum(weight_N) - _weight_of_equal((label_N,), weight_N)
    total = float(np.dot(weight_N, comparable_N))
    xauc, influence = np.full(len(prediction_RN), math.nan), np.full((len(prediction_RN), num_users), math.nan)
    if total <= 0:
        return xauc, influence
    for run, prediction_N in enumerate(prediction_RN):
        rightly_N = weight_below(prediction_N, label_N, weight_N) + weight_below(-prediction_N, -label_N, weight_N)
        equal = (prediction_N,)
        tied_N = _weight_of_equal(equal, weight_N) - _weight_of_equal((*equal, label_N), weight_N)
        ordered_N = rightly_N + tied_N / 2
        xauc[run] = np.dot(weight_N, ordered_N) / total
        influence[run] = 2 / total * np.bincount(user_N, weight_N * (ordered_N - xauc[run] * comparable_N), num_users)
    return xauc, influence
