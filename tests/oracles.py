"""Rows with ties for the tests of metrics, and slow metrics to hold the fast ones against."""

import itertools

import numpy as np
from sklearn.metrics import roc_auc_score

from mtrec.metrics import NULL_GROUP

TIGHT = {"rel": 1e-9, "abs": 1e-9}
TINY_LIMIT = 20_000  # bytes: a buffer of some 200 rows


def binary_data(num_rows, seed, levels=37, groups=25):
    """(prediction with ties, label, group, weight)"""
    rng = np.random.default_rng(seed)
    prediction = rng.integers(1, levels, num_rows) / levels
    label = (rng.random(num_rows) < prediction).astype(np.float64)
    return prediction, label, rng.integers(-3, groups, num_rows), rng.gamma(2.0, size=num_rows)


def number_data(num_rows, seed):
    """(prediction with ties, skewed label with many zeros and ties, weight)"""
    rng = np.random.default_rng(seed)
    label = np.round(rng.exponential(5.0, num_rows)) * (rng.random(num_rows) < 0.6)
    return np.round(0.3 * label + rng.exponential(2.0, num_rows), 1), label, rng.gamma(2.0, size=num_rows)


def brute_xauc(prediction, label, weight):
    right = total = 0.0
    for i, j in itertools.combinations(range(len(label)), 2):
        if label[i] != label[j]:
            sign = np.sign(prediction[i] - prediction[j]) * np.sign(label[i] - label[j])
            right += weight[i] * weight[j] * (1 + sign) / 2
            total += weight[i] * weight[j]
    return right / total


def brute_gauc(prediction, label, group, weight):
    areas, sizes = [], []
    for key in set(group.tolist()) - {NULL_GROUP}:
        rows = group == key
        if len(set(label[rows])) == 2:
            areas.append(roc_auc_score(label[rows], prediction[rows], sample_weight=weight[rows]))
            sizes.append(weight[rows].sum())
    return np.average(areas, weights=sizes), sum(sizes) / weight.sum()
