"""Numbers cut into buckets, each with a row of an embedding table of its own.

Shapes: B rows.
"""

import math
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
from pyarrow import types

from mtrec.features.arrays import floats, is_list, is_number
from mtrec.features.counting import Sample
from mtrec.features.profile import FeatureProfile
from mtrec.features.tables import Family, Sharding
from mtrec.features.vocabulary import FIRST_ROW, NULL_ROW, Rows
from mtrec.kinds import PositiveFloat, PositiveInt


class Bucketized:
    """A number that picks a row by the bucket it falls in; null and NaN have the row of null.

    Bucket i holds boundaries[i - 1] <= x < boundaries[i]; the first and the last are open.

    Args:
        name: the feature's name, its key in the batch and its table.
        column: input column (default: the name).
        boundaries: ascending; null: quantiles of the training data, so that buckets hold about as many rows each
            (values that come very often leave fewer buckets).
        num_buckets: without `boundaries`.
        dim: width of the table, a multiple of 4 (any with `sharding: data_parallel`; default: `model.embedding_dim`).
        sharding, num_column_shards: how the table is spread over workers.
        optional: the column may be missing from a file; all of its values are null then.
        init_std: standard deviation of the initial values (default 0.01).

    >>> age = Bucketized("age", boundaries=(18, 30, 50))
    >>> age.restore({"boundaries": [18, 30, 50]}).rows(pa.array([17, 18, None])).tolist()
    [2, 3, 0]
    """

    family: ClassVar[Family] = "buckets"
    fitted_by: ClassVar[tuple[str, ...]] = ("boundaries", "num_buckets")

    def __init__(
        self,
        name: str,
        *,
        column: str | None = None,
        boundaries: tuple[float, ...] | None = None,
        num_buckets: PositiveInt = 32,
        dim: PositiveInt | None = None,
        sharding: Sharding | None = None,
        num_column_shards: PositiveInt | None = None,
        optional: bool = False,
        init_std: PositiveFloat | None = None,
    ) -> None:
        if boundaries is not None:
            edges = np.array(boundaries, np.float64)
            if not len(edges) or not np.isfinite(edges).all() or (np.diff(edges) <= 0).any():
                raise ValueError(
                    f"`features.{name}.boundaries` should be finite numbers, each above the one before. "
                    f"Found {list(boundaries)}."
                )
        self.name = name
        self.column = column or name
        self.boundaries = None if boundaries is None else tuple(float(edge) for edge in boundaries)
        self.num_buckets = num_buckets
        self.dim = dim
        self.sharding = sharding
        self.num_column_shards = num_column_shards
        self.optional = optional
        self.init_std = init_std

    @property
    def columns(self) -> tuple[str, ...]:
        """Input columns."""
        return (self.column,)

    @property
    def num_embeddings(self) -> int:
        """Rows of the table."""
        return FIRST_ROW + (self.num_buckets if self.boundaries is None else len(self.boundaries) + 1)

    def check_type(self, type_: pa.DataType) -> None:
        """Raises ValueError naming `features.NAME.column` where a column of this type does not hold a number a row."""
        if is_list(type_) or not is_number(type_):
            found = f"Found column '{self.column}' of type {type_}."
            raise ValueError(f"`features.{self.name}.column` should hold one number a row. {found}")

    def start(self, type_: pa.DataType) -> "BucketFit":
        """A fit for a column of this type."""
        return BucketFit(self)

    def restore(self, state: dict[str, Any]) -> "BucketEncoding":
        """The fitted feature that a fit's `state` describes."""
        return BucketEncoding(self, state)


class BucketFit:
    """A sample of the numbers in the training data."""

    def __init__(self, feature: Bucketized) -> None:
        self._feature = feature
        self._sample = Sample()
        self._rows = self._nulls = 0

    def update(self, array: Any) -> None:
        """Adds a column of a batch."""
        values_B = floats(array)
        self._sample.update(values_B, self._rows)
        self._rows += len(values_B)
        self._nulls += int(np.isnan(values_B).sum())

    def finish(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """(state to encode with, statistics)."""
        known = self._sample.values()
        known = known[np.isfinite(known)]
        largest = float(np.abs(known).max()) if len(known) else 0.0
        if not math.isfinite(largest * largest):
            raise ValueError(
                f"`features.{self._feature.name}.column` should hold numbers whose squares a double holds (up to some 1e150). "
                f"Found {float(known.min())!r} to {float(known.max())!r} in column '{self._feature.column}'."
            )
        boundaries: Any = self._feature.boundaries
        if boundaries is None:
            ranks = np.arange(1, self._feature.num_buckets) / self._feature.num_buckets
            boundaries = np.unique(np.quantile(known, ranks)).tolist() if len(known) else []
        statistics = {
            "rows": self._rows,
            "null_share": self._nulls / max(1, self._rows),
            "mean": float(known.mean()) if len(known) else 0.0,
            "sd": float(known.std()) if len(known) else 0.0,
            "min": float(known.min()) if len(known) else 0.0,
            "max": float(known.max()) if len(known) else 0.0,
        }
        return {"boundaries": list(boundaries)}, statistics

    def profile(self, encoding: "BucketEncoding") -> FeatureProfile:
        """The training data's profile in the bins of `encoding`, from the sample."""
        sample = self._sample.values()
        counts = encoding.count_rows(encoding.rows_of(sample[~np.isnan(sample)])).counts_P
        known = self._rows - self._nulls
        counts = np.rint(counts * (known / max(1, counts.sum()))).astype(np.int64)
        counts[0] = self._nulls
        return FeatureProfile(self._feature.name, encoding.bins, counts)


class BucketEncoding:
    """A fitted bucketized feature."""

    def __init__(self, feature: Bucketized, state: dict[str, Any]) -> None:
        self.feature = feature
        self.state = state
        self._boundaries = np.array(state["boundaries"], np.float64)

    @property
    def bins(self) -> tuple[str, ...]:
        """Labels of the profile's bins."""
        edges = self._boundaries.tolist()
        return ("null", *(f"<{edge!r}" for edge in edges), f">={edges[-1]!r}" if edges else "any")

    def rows(self, array: Any) -> Rows:
        """(B,) rows of a column. ValueError where it holds no numbers."""
        if not types.is_null(array.type):
            self.feature.check_type(array.type)
        return self.rows_of(floats(array))

    def rows_of(self, values_B: Any) -> Rows:
        """(B,) rows of float64 numbers."""
        rows_B: Rows = np.searchsorted(self._boundaries, values_B, side="right") + FIRST_ROW
        rows_B[np.isnan(values_B)] = NULL_ROW
        return rows_B

    def count(self, array: Any) -> FeatureProfile:
        """The profile of one column of a batch."""
        return self.count_rows(self.rows(array))

    def count_rows(self, rows_B: Rows) -> FeatureProfile:
        """The profile of rows."""
        counts = np.bincount(rows_B, minlength=FIRST_ROW + len(self._boundaries) + 1)
        counts_P = np.concatenate([counts[:1], counts[FIRST_ROW:]]).astype(np.int64)
        return FeatureProfile(self.feature.name, self.bins, counts_P)
