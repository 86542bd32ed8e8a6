"""What the values of a feature look like, in few numbers: profiles and their distance, and counts of nulls and unseen.

Shapes: P bins of a profile, F features.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

TOP = 30  # rows of a table that have a bin of their own
_FLOOR = 1e-4  # least share of a bin in the index: an empty bin would make it infinite


@dataclass(frozen=True, eq=False)
class FeatureProfile:
    """Counts of a feature's values in bins that the fit has fixed.

    Ids: `null`, `unseen`, the TOP most frequent rows, `other`; numbers: `null` and ten bins with the deciles as edges.

    >>> FeatureProfile("age", ("null", "low", "high"), np.array([10, 60, 30])).null_share
    0.1
    """

    name: str
    bins: tuple[str, ...]
    counts_P: npt.NDArray[np.int64]

    @property
    def num_values(self) -> int:
        """Values counted: rows, or elements for a list feature."""
        return int(self.counts_P.sum())

    @property
    def null_share(self) -> float:
        """Share of nulls among the values; NaN of no values."""
        return self._share("null")

    @property
    def unseen_share(self) -> float:
        """Share of ids that the table does not know among the values; 0 for numbers, NaN of no values."""
        return self._share("unseen")

    def _share(self, label: str) -> float:
        if not self.num_values:
            return float("nan")
        return float(self.counts_P[self.bins.index(label)]) / self.num_values if label in self.bins else 0.0

    def state(self) -> dict[str, Any]:
        """The profile for JSON."""
        return {"bins": list(self.bins), "counts": self.counts_P.tolist()}

    @classmethod
    def restore(cls, name: str, state: dict[str, Any]) -> "FeatureProfile":
        """The profile that `state` describes."""
        return cls(name, tuple(state["bins"]), np.array(state["counts"], np.int64))


def psi(expected: FeatureProfile, found: FeatureProfile) -> float:
    """Population stability index of two profiles over the same bins: sum of (q - p) ln(q / p) over the shares p and q.

    Source: Siddiqi (2006), Credit Risk Scorecards; there below 0.1 is stable and above 0.25 a shift. Shares below 1e-4
    are taken as 1e-4. NaN where one of the profiles is empty; ValueError where the bins differ.

    >>> p = FeatureProfile("age", ("null", "low", "high"), np.array([0, 50, 50]))
    >>> q = FeatureProfile("age", ("null", "low", "high"), np.array([0, 80, 20]))
    >>> round(psi(p, q), 4), psi(p, p)
    (0.4159, 0.0)
    """
    if expected.bins != found.bins:
        raise ValueError(
            f"The profiles of '{expected.name}' and '{found.name}' should have the same bins: make both with one "
            f"encoder. Found {len(expected.bins)} and {len(found.bins)} bins."
        )
    if not expected.num_values or not found.num_values:
        return float("nan")
    p = np.maximum(expected.counts_P / expected.num_values, _FLOOR)
    q = np.maximum(found.counts_P / found.num_values, _FLOOR)
    return float(np.sum((q - p) * np.log(q / p)))


class FeatureCounts:
    """Rows, null rows, values and unseen values of each feature, added up by `Encoder.encode(batch, counts)`.

    A null row is one whose value is null (for a dense feature also NaN, infinite or a sentinel). Merge those of several
    workers with `merge`.

    >>> counts = FeatureCounts(["user_id"])
    >>> counts.add(0, rows=10, nulls=1, values=10, unseen=4)
    >>> counts.null_share(), counts.unseen_share()
    ({'user_id': 0.1}, {'user_id': 0.4})
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self.counts_F4 = np.zeros((len(self.names), 4), np.int64)

    def add(self, index: int, *, rows: int, nulls: int, values: int, unseen: int) -> None:
        """Adds one batch of the feature at `index`."""
        self.counts_F4[index] += (rows, nulls, values, unseen)

    def merge(self, other: "FeatureCounts") -> None:
        """Adds the counts of another worker; ValueError where its features are others."""
        if other.names != self.names:
            raise ValueError(f"Counts of the same features should be merged. Found {self.names} and {other.names}.")
        self.counts_F4 += other.counts_F4

    def null_share(self) -> dict[str, float]:
        """{feature: null rows / rows}; NaN of no rows."""
        return self._ratio(1, 0)

    def unseen_share(self) -> dict[str, float]:
        """{feature: unseen values / values}; NaN of no values."""
        return self._ratio(3, 2)

    def _ratio(self, top: int, bottom: int) -> dict[str, float]:
        with np.errstate(invalid="ignore"):
            share_F = self.counts_F4[:, top] / self.counts_F4[:, bottom]
        return dict(zip(self.names, share_F.tolist(), strict=True))
