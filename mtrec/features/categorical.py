"""Ids: one a row, or a list of them, in an embedding table that other features may share.

Shapes: B rows, n values.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pyarrow import types

from mtrec.features.arrays import (
    BadRowsError,
    Lists,
    Words,
    floats,
    id_key,
    is_list,
    is_number,
    known_keys,
    lists,
    look_up,
    with_nulls,
)
from mtrec.features.counting import KeyCounter
from mtrec.features.encoded import Ids
from mtrec.features.hashing import mix64
from mtrec.features.tables import Family, Pooling, Sharding
from mtrec.features.vocabulary import FIRST_ROW, NULL_ROW, UNSEEN_ROW, Key, Rows, hash_array, row_type
from mtrec.kinds import PositiveFloat, PositiveInt


class Categorical:
    """Ids in an integer, string, bool, date or enum (dictionary) column; scalar or list.

    A table's rows: 0 for null, 1 for ids it does not know, then the ids. A scalar gives one row; a null list gives the
    row of null, an empty list nothing (the pooled vector is 0), a null inside of a list the row of null. Features that
    name the same `table` share it: options of the table are stated by any one of them.

    Args:
        name: the feature's name, and its key in the batch.
        column: input column (default: the name).
        table: embedding table (default: the name).
        encoding: `vocabulary` gives each id that came `min_count` times in the training data a row of its own; `hash`
            spreads ids over the rows (ids may meet); `identity` takes the id itself, 0 to num_embeddings - 3.
        num_embeddings: rows of the table, the two for null and unseen included; `auto` (with `vocabulary` only) is 1.2
            times what the fit needs. With a number the most frequent ids get the rows.
        min_count: ids that came less often in the training data count as unseen (default 2).
        dim: width of the table, a multiple of 4 (any with `sharding: data_parallel`; default: `model.embedding_dim`).
        pooling: how the vectors of a list become one (default mean).
        max_length: of a list only the last so many values are used: lists are expected oldest first.
        weights: column with a weight for each value, not negative; null counts as 1. `mean` is then the weighted mean.
        sharding, num_column_shards: how the table is spread over workers.
        optional: the column may be missing from a file; all of its values are null then.
        init_std: standard deviation of the initial values (default 0.01).

    >>> Categorical("history", column="last_items", table="item_id", max_length=20).columns
    ('last_items',)
    """

    family: ClassVar[Family] = "vocabulary"

    def __init__(
        self,
        name: str,
        *,
        column: str | None = None,
        table: str | None = None,
        encoding: Literal["vocabulary", "hash", "identity"] | None = None,
        num_embeddings: PositiveInt | Literal["auto"] | None = None,
        min_count: PositiveInt | None = None,
        dim: PositiveInt | None = None,
        pooling: Pooling | None = None,
        max_length: PositiveInt | None = None,
        weights: str | None = None,
        sharding: Sharding | None = None,
        num_column_shards: PositiveInt | None = None,
        optional: bool = False,
        init_std: PositiveFloat | None = None,
    ) -> None:
        self.name = name
        self.column = column or name
        self.table = table or name
        self.encoding = encoding
        self.num_embeddings = num_embeddings
        self.min_count = min_count
        self.dim = dim
        self.pooling = pooling
        self.max_length = max_length
        self.weights = weights
        self.sharding = sharding
        self.num_column_shards = num_column_shards
        self.optional = optional
        self.init_std = init_std

    @property
    def columns(self) -> tuple[str, ...]:
        """Input columns: the ids, and the weights if there are any."""
        return (self.column,) if self.weights is None else (self.column, self.weights)

    def check_type(self, type_: pa.DataType) -> None:
        """Raises ValueError naming `features.NAME.column` where a column of this type holds no ids.

        >>> Categorical("item").check_type(pa.float64())
        Traceback (most recent call last):
            ...
        ValueError: `features.item.column` should hold ids (integers, strings, bools, dates, enums) or lists of them. \
Found column 'item' of type double: floats merge ids above 2^53, cast it to int64 where it is written.
        """
        element = type_.value_type if is_list(type_) else type_
        if types.is_null(element) or id_key(element) is not None:
            if self.max_length is not None and not is_list(type_) and not types.is_null(type_):
                found = f"Found column '{self.column}' of type {type_}."
                raise ValueError(f"`features.{self.name}.max_length` should stand on a list column. {found}")
            return
        hint = ": floats merge ids above 2^53, cast it to int64 where it is written"
        raise ValueError(
            f"`features.{self.name}.column` should hold ids (integers, strings, bools, dates, enums) or lists of them. "
            f"Found column '{self.column}' of type {type_}{hint if types.is_floating(element) else ''}."
        )

    def check_weights_type(self, type_: pa.DataType) -> None:
        """Raises ValueError naming `features.NAME.weights` where a column of this type holds no weights."""
        if not is_number(type_.value_type if is_list(type_) else type_):
            found = f"Found column '{self.weights}' of type {type_}."
            raise ValueError(f"`features.{self.name}.weights` should hold numbers. {found}")

    def start(self, key: Key, limit: int, rows_of: Callable[[Any], Rows] | None = None) -> "CategoricalFit":
        """A fit that counts at most `limit` distinct ids exactly, or the rows that `rows_of` gives them."""
        return CategoricalFit(self, key, limit, rows_of)


class CategoricalFit:
    """Counts of a feature's ids (of its rows, for hash and identity) in the training data."""

    def __init__(self, feature: Categorical, key: Key, limit: int, rows_of: Callable[[Any], Rows] | None) -> None:
        self.counter = KeyCounter(text=key == "string" and rows_of is None, limit=limit)
        self.rows = self.null_rows = self.values = self.nulls = 0
        self._feature, self._key, self._rows_of = feature, key, rows_of

    def update(self, array: Any) -> None:
        """Counts a column of a batch. ValueError where `encoding: identity` meets an id that is no row of its table."""
        elements, parts = _elements(array, self._feature.max_length)
        known, counts = known_keys(elements, self._key, f"features.{self._feature.name}.column")
        num_known = len(known) if counts is None else int(counts.sum())
        null_lists = 0 if parts is None or parts.null_B is None else int(parts.null_B.sum())
        total = len(elements) + null_lists  # a null list stands for one null value
        self.rows += len(array)
        self.null_rows += len(elements) - num_known if parts is None else null_lists
        self.values += total
        self.nulls += total - num_known
        if self._rows_of is not None:
            rows_n = self._rows_of(known).astype(np.int64)
            outside = np.flatnonzero(rows_n == UNSEEN_ROW)
            if len(outside):
                feature = self._feature
                raise ValueError(
                    f"`features.{feature.name}.column` should hold ids from 0 to num_embeddings - {FIRST_ROW + 1} with "
                    f"`encoding: identity`. Found {known[outside[0]]} in column '{feature.column}' of the training "
                    "data: raise num_embeddings, or use `encoding: vocabulary`."
                )
            known = rows_n
        self.counter.update(known, counts)

    def statistics(self, unseen: int) -> dict[str, Any]:
        """What the training data were like; `unseen` counts the values without a row of their own."""
        return {
            "rows": self.rows,
            "null_share": self.null_rows / max(1, self.rows),
            "unseen_share": unseen / max(1, self.values),
            "mean_length": self.values / max(1, self.rows),
            "distinct": len(self.counter.result()[0]),
            "count_error": self.counter.error,
        }


@dataclass(frozen=True)
class HashRows:
    """The rows of `encoding: hash`: FIRST_ROW + 64-bit hash modulo the other rows; the same in every process.

    >>> HashRows("int64", 12).rows(np.array([5, 6, 5])).tolist()
    [10, 4, 10]
    """

    key: Key
    num_embeddings: int

    def rows(self, keys_n: Any) -> Rows:
        """(n,) rows of int64 or large_binary keys."""
        hash_n = hash_array(keys_n) if self.key == "string" else mix64(keys_n)
        return (hash_n % np.uint64(self.num_embeddings - FIRST_ROW)).view(np.int64) + FIRST_ROW


@dataclass(frozen=True)
class IdentityRows:
    """The rows of `encoding: identity`: FIRST_ROW + id, UNSEEN_ROW where that is no row of the table.

    >>> IdentityRows(10).rows(np.array([0, 7, 8, -1])).tolist()
    [2, 9, 1, 1]
    """

    num_embeddings: int

    def rows(self, keys_n: npt.NDArray[np.int64]) -> Rows:
        """(n,) rows of int64 keys."""
        bits_n = keys_n.view(np.uint64)
        # first: it brings what the next passes read into the cache
        all_known = not len(bits_n) or np.maximum.reduce(bits_n) < self._num_ids
        rows_n: Rows = keys_n.astype(self._dtype)
        rows_n += FIRST_ROW
        if not all_known:
            rows_n[bits_n >= self._num_ids] = UNSEEN_ROW
        return rows_n

    @cached_property
    def _num_ids(self) -> np.uint64:
        return np.uint64(self.num_embeddings - FIRST_ROW)

    @cached_property
    def _dtype(self) -> type[np.signedinteger[Any]]:
        return row_type(self.num_embeddings)


class CategoricalEncoding:
    """A fitted categorical feature.

    `rows_of` maps keys to rows; `weighted` says whether the table is (a feature without weights then gets 1 each).
    """

    def __init__(
        self, feature: Categorical, key: Key, rows_of: Callable[[Any], Rows], *, weighted: bool, mean_of_weights: bool
    ) -> None:
        self.feature = feature
        self._key: Key = key
        self._rows_of = rows_of
        self._words = Words(rows_of)
        self._weighted = weighted
        self._mean_of_weights = mean_of_weights

    def encode(self, array: Any, weights: Any = None) -> Ids:
        """The rows of a column. ValueError where its type cannot be the fitted one's, BadRowsError for bad weights."""
        values, lengths_B, parts = self._rows(array)
        if parts is None:
            null_rows = int(np.count_nonzero(values == NULL_ROW)) if _may_be_null(array) else 0
        else:
            null_rows = 0 if parts.null_B is None else int(parts.null_B.sum())
        if not self._weighted:
            return Ids(values, lengths_B, None, null_rows)
        weights_n = np.ones(len(values)) if self.feature.weights is None else self._weights(weights, parts, len(array))
        if self._mean_of_weights:
            weights_n = _normalized(weights_n, lengths_B)
        return Ids(values, lengths_B, weights_n.astype(np.float32), null_rows)

    def takes_plain(self, type_: pa.DataType) -> bool:
        """Whether `plain_rows` takes columns of this type."""
        return self._key == "int64" and not self._weighted and type_ == pa.int64()

    def plain_rows(self, array: pa.Int64Array) -> Rows:
        """What `encode` gives for a column without nulls, one id a row: most of its cost is in asking what a column is like."""
        return self._rows_of(array.to_numpy())

    def encode_rows(self, array: Any) -> Rows:
        """The rows of a column alone, without its weights."""
        return self._rows(array)[0]

    def _rows(self, array: Any) -> tuple[Rows, npt.NDArray[np.int64] | None, Lists | None]:
        """(values, lengths_B or None, the list column taken apart or None)."""
        self._check(array.type)
        elements, parts = _elements(array, self.feature.max_length)
        values = look_up(elements, self._key, self._rows_of, self._words)
        if parts is None:
            return values, None, None
        values, lengths_B = with_nulls(values, parts, NULL_ROW)
        return values, lengths_B, parts

    def _check(self, type_: Any) -> None:
        element = type_.value_type if is_list(type_) else type_
        if types.is_null(element):
            return
        found = id_key(element)
        if found is None:
            self.feature.check_type(type_)
        if (found == "string") != (self._key == "string"):
            wish = "strings" if self._key == "string" else "integers"
            raise ValueError(
                f"`features.{self.feature.name}.column` should hold {wish}, as in the training data. "
                f"Found column '{self.feature.column}' of type {type_}."
            )

    def _weights(self, array: Any, parts: Lists | None, num_rows: int) -> npt.NDArray[np.float64]:
        """(n,) weights of the kept values, null lists included as one value of weight 1."""
        name = f"`features.{self.feature.name}.weights`"
        column = str(self.feature.weights)
        if array is None or types.is_null(array.type):
            if parts is None:
                return np.ones(num_rows)
            return with_nulls(np.ones(len(parts.elements)), parts, 1.0)[0]
        if is_list(array.type) != (parts is not None):
            raise ValueError(
                f"{name} should be a list column where the ids are one, and a plain one else. "
                f"Found column '{column}' of type {array.type}."
            )
        if parts is None:
            weights_n = np.nan_to_num(floats(array), nan=1.0, posinf=np.inf)
            row_n = np.arange(num_rows)
        else:
            own = lists(array, self.feature.max_length)
            known_B = np.ones(num_rows, np.bool_) if own.null_B is None else ~own.null_B
            if parts.null_B is not None:
                known_B = known_B & ~parts.null_B
            bad = np.flatnonzero(known_B & (own.full_lengths_B != parts.full_lengths_B))
            if len(bad):
                counts = f"{own.full_lengths_B[bad[0]]} weights for {parts.full_lengths_B[bad[0]]} values"
                raise BadRowsError(name, column, bad, "hold a weight for each value", counts)
            weights_n = np.ones(int(parts.lengths_B.sum()))
            weights_n[np.repeat(known_B, parts.lengths_B)] = np.nan_to_num(
                floats(own.elements)[np.repeat(known_B, own.lengths_B)], nan=1.0, posinf=np.inf
            )
            weights_n, lengths_B = with_nulls(weights_n, parts, 1.0)
            row_n = np.repeat(np.arange(num_rows), lengths_B)
        with np.errstate(over="ignore"):  # they become float32
            wrong = np.flatnonzero(~((weights_n >= 0) & np.isfinite(weights_n.astype(np.float32))))
        if len(wrong):
            raise BadRowsError(
                name, column, np.unique(row_n[wrong]), "hold finite weights, not negative", weights_n[wrong[0]]
            )
        return weights_n


def _elements(array: Any, max_length: int | None) -> tuple[Any, Lists | None]:
    if not is_list(array.type):
        return array, None
    parts = lists(array, max_length)
    return parts.elements, parts


def _may_be_null(array: Any) -> bool:
    return types.is_dictionary(array.type) or bool(array.null_count)


def _normalized(weights_n: npt.NDArray[np.float64], lengths_B: npt.NDArray[np.int64] | None) -> npt.NDArray[np.float64]:
    """Weights divided by their sum over the bag; a bag whose weights are all 0 stays 0."""
    if lengths_B is None:
        return (weights_n > 0).astype(np.float64)
    row_n = np.repeat(np.arange(len(lengths_B)), lengths_B)
    total_n = np.bincount(row_n, weights_n, len(lengths_B))[row_n]
    return np.divide(weights_n, total_n, out=np.zeros_like(weights_n), where=total_n > 0)
