"""The variance of AUC over users, from placement values.

The placement value of a positive row is the share of the negatives that it beats, that of a negative row the share of the
positives that beat it; a tie counts 1/2. AUC is the mean of either, and how they vary says how AUC does.

Legend: N rows (all with a label), R runs, G users.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


def placements(prediction_N: Floats, label_N: Floats, weight_N: Floats) -> Floats:
    """(N,) placement values of predictions against labels 0 and 1, a row counted by its weight. O(N log N).

    NaN where the other class is missing.

    >>> placements(np.array([0.1, 0.4, 0.4, 0.8]), np.array([0.0, 0.0, 1.0, 1.0]), np.ones(4))
    array([1.  , 0.75, 0.75, 1.  ])
    """
    order = np.argsort(prediction_N, kind="stable")
    ranked = prediction_N[order]
    positive, negative = (weight_N * label_N)[order], (weight_N * (1 - label_N))[order]
    starts = np.flatnonzero(np.concatenate([[True], ranked[1:] != ranked[:-1]]))
    cell_N = np.repeat(np.arange(len(starts)), np.diff(np.append(starts, len(ranked))))
    cell_positive, cell_negative = np.add.reduceat(positive, starts), np.add.reduceat(negative, starts)
    above = np.sum(cell_positive) - np.cumsum(cell_positive) + cell_positive / 2
    below = np.cumsum(cell_negative) - cell_negative / 2
    with np.errstate(invalid="ignore", divide="ignore"):
        beaten = below[cell_N] / np.sum(cell_negative)
        beaten_by = above[cell_N] / np.sum(cell_positive)
    found_N = np.empty_like(ranked)
    found_N[order] = np.where(label_N[order] == 1, beaten, beaten_by)
    return found_N


@dataclass(frozen=True)
class AUCInfluence:
    """AUC of R runs on the same rows, and what each user adds to its deviation.

    `auc` (R,); `positive` and `negative` (R, G): sums over the user's rows of weight x (placement value - AUC);
    `positive_weight`, `negative_weight` (G,): the user's weight in either class.
    """

    auc: Floats
    positive: Floats
    negative: Floats
    positive_weight: Floats
    negative_weight: Floats

    def variance(self, contrast_R: Floats) -> float:
        """Of `contrast_R @ auc` over users, by Obuchowski (1997); NaN with fewer than two users in a class.

        Nonparametric analysis of clustered ROC curve data, Biometrics 53. Its S10 / M + S01 / N + 2 S11 / (M N) is bilinear,
        so that the variance of any contrast of correlated AUCs is that of the contrast's placement sums. With sample weights
        (not in the paper) M and N are sums of weights. With every row a user of its own it is DeLong et al. (1988).
        """
        positive_G, negative_G = contrast_R @ self.positive, contrast_R @ self.negative
        total_positive, total_negative = float(np.sum(self.positive_weight)), float(np.sum(self.negative_weight))
        with_positive = int(np.sum(self.positive_weight > 0))
        with_negative = int(np.sum(self.negative_weight > 0))
        users = int(np.sum(self.positive_weight + self.negative_weight > 0))
        if min(with_positive, with_negative) < 2:
            return math.nan
        s10 = with_positive / (with_positive - 1) * float(positive_G @ positive_G) / total_positive**2
        s01 = with_negative / (with_negative - 1) * float(negative_G @ negative_G) / total_negative**2
        s11 = users / (users - 1) * float(positive_G @ negative_G) / (total_positive * total_negative)
        return max(s10 + s01 + 2 * s11, 0.0)  # the three have factors of their own, so few users can take it below 0

    def effective_users(self) -> float:
        """Kish's number of equally large users, where a user is as large as its share of both classes; NaN without one."""
        with np.errstate(invalid="ignore"):
            share_G = self.positive_weight / np.sum(self.positive_weight) + self.negative_weight / np.sum(self.negative_weight)
        return float(np.sum(share_G)) ** 2 / float(share_G @ share_G)


def auc_influence(prediction_RN: Floats, label_N: Floats, weight_N: Floats, user_N: Ints, num_users: int) -> AUCInfluence:
    """AUC and its influence values of R runs; `user_N` are numbers from 0 to `num_users` - 1.

    >>> label, user = np.array([0.0, 0.0, 1.0, 1.0]), np.array([0, 1, 1, 2])
    >>> found = auc_influence(np.array([[0.1, 0.4, 0.4, 0.8]]), label, np.ones(4), user, 3)
    >>> found.auc
    array([0.875])
    >>> found.positive
    array([[ 0.   , -0.125,  0.125]])
    """
    # As float64 also where there are no rows, which bincount counts in integers
    positive_weight = np.bincount(user_N, weight_N * label_N, num_users).astype(np.float64)
    negative_weight = np.bincount(user_N, weight_N * (1 - label_N), num_users).astype(np.float64)
    auc = np.empty(len(prediction_RN))
    positive, negative = np.empty((2, len(prediction_RN), num_users))
    total_positive = float(np.sum(positive_weight))
    for run, prediction_N in enumerate(prediction_RN):
        placement_N = placements(prediction_N, label_N, weight_N)
        auc[run] = np.dot(weight_N * label_N, placement_N) / total_positive if total_positive > 0 else math.nan
        centred_N = weight_N * (placement_N - auc[run])
        positive[run] = np.bincount(user_N, centred_N * label_N, num_users)
        negative[run] = np.bincount(user_N, centred_N * (1 - label_N), num_users)
    return AUCInfluence(auc, positive, negative, positive_weight, negative_weight)
