"""The encoder: record batches -> the arrays of a batch, with what a fit has decided.

Shapes: B rows, F dense columns.
"""

import dataclasses
import hashlib
import json
import urllib.parse
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from mtrec.features.arrays import is_plain, plain
from mtrec.features.categorical import Categorical, CategoricalEncoding
from mtrec.features.encoded import Encoded, EncodedIds, EncodedRows, Ids, Order, encoded_ids, join, num_rows, put, taken
from mtrec.features.fit import Fitted, fit, rows_of_table
from mtrec.features.kinds import FEATURES
from mtrec.features.profile import FeatureCounts, FeatureProfile
from mtrec.features.tables import Feature, Table, check_schema, id_columns
from mtrec.features.vocabulary import FIRST_ROW, NULL_ROW, UNSEEN_ROW, Vocabulary, hash_array, row_type
from mtrec.kinds import check_options, nearest, option_types, resolve
from mtrec.written import as_written

_VERSION = 1
_FILE = "encoder.json"


@dataclasses.dataclass(frozen=True)
class _Places:
    """Where the features find their columns in batches of a schema.

    Attributes:
        columns: {column: (its number, whether `plain` would change nothing)} of those that are there.
        plain_ids: features whose columns `CategoricalEncoding.plain_rows` takes, where they have no nulls.
    """

    schema: pa.Schema
    columns: dict[str, tuple[int, bool]]
    plain_ids: frozenset[str]


class Encoder:
    """Fitted features.

    Attributes:
        features: as given to the fit.
        tables: embedding tables.
        columns: input columns that `encode` reads (optional ones included); `id_columns`: those of ids alone.
        sparse_keys, weighted_keys: features with ids in the order of the batch, without and with weights.
        dense_names, num_dense: columns of `dense_BF`.
        statistics: {feature: {rows, null_share, unseen_share, ...}} of the training data.
        profiles: {feature: FeatureProfile} of the training data.
        states: {feature: what the fit decided} of dense and bucketized features: scales, boundaries.
        changes: what a fit with `previous` did, in words.

    >>> batch = pa.record_batch({"item": [7, 9, None, 7], "price": [1.0, 3.0, 1.0, 3.0]})
    >>> from mtrec.features import Dense
    >>> features = [Categorical("item", min_count=1), Dense("price")]
    >>> encoder = Encoder.fit(features, [batch], schema=batch.schema, embedding_dim=8)
    >>> encoded = encoder.encode(pa.record_batch({"item": [9, 8], "price": [3.0, None]}))
    >>> encoded.values.tolist(), encoded.dense_BF.tolist(), encoder.tables[0].num_embeddings
    ([3, 1], [[1.0], [0.0]], 5)
    """

    def __init__(self, fitted: Fitted) -> None:
        self._fitted = fitted
        self.features = fitted.features
        self.tables = fitted.tables
        self.statistics = fitted.statistics
        self.profiles = fitted.profiles
        self.changes = fitted.changes
        self.states = fitted.states
        by_name = {feature.name: feature for feature in fitted.features}
        self._index = {feature.name: place for place, feature in enumerate(fitted.features)}
        self.columns = tuple(dict.fromkeys(column for feature in fitted.features for column in feature.columns))
        self.id_columns = id_columns(fitted.features)
        self.sparse_keys = tuple(name for table in self.tables if not table.weighted for name in table.features)
        self.weighted_keys = tuple(name for table in self.tables if table.weighted for name in table.features)
        self._rows_dtype = row_type(max((table.num_embeddings for table in self.tables), default=0))
        self._known_places: _Places | None = None  # of the newest batch
        self._ids: dict[str, CategoricalEncoding] = {}
        self._others: dict[str, Any] = {}  # dense and bucketized
        for table in self.tables:
            for name in table.features:
                if table.encoding == "bucketized":
                    continue
                feature, key = by_name[name], fitted.keys[table.name]
                assert isinstance(feature, Categorical)
                self._ids[name] = CategoricalEncoding(
                    feature,
                    key,
                    rows_of_table(table, key, fitted.vocabularies.get(table.name)),
                    weighted=table.weighted,
                    mean_of_weights=fitted.mean_of_weights[table.name],
                )
        dense: list[str] = []
        self._dense: list[tuple[Any, Any, slice, bool]] = []  # feature, encoding, columns, whether it is a vector
        for name, state in fitted.states.items():
            encoding = self._others[name] = by_name[name].restore(state)  # type: ignore[attr-defined]
            if by_name[name].family == "dense":
                columns = slice(len(dense), len(dense) + len(encoding.names))
                self._dense.append((by_name[name], encoding, columns, state.get("width") is not None))
                dense += encoding.names
        self._numbers = _runs([columns for _, _, columns, is_vector in self._dense if not is_vector])
        self._vectors = _runs([columns for _, _, columns, is_vector in self._dense if is_vector])
        self.dense_names = tuple(dense)
        self.num_dense = len(dense)

    @classmethod
    def fit(
        cls,
        features: Sequence[Feature],
        batches: Iterable[pa.RecordBatch],
        *,
        schema: pa.Schema,
        embedding_dim: int,
        previous: "Encoder | None" = None,
        max_candidates: int = 10_000_000,
    ) -> "Encoder":
        """Reads the training data once and decides vocabularies, scales and buckets.

        Args:
            features: each with a name of its own.
            batches: the training data; only the features' columns are read.
            schema: of the data; optional columns may be missing.
            embedding_dim: of tables whose features state no `dim`.
            previous: an earlier encoder: known ids keep their rows, new ones follow; scales, buckets and indicator
                columns of features with the same options stay, so that the same row gives the same input.
            max_candidates: distinct ids a feature that are counted exactly; beyond that rare ones may be missed
                (`statistics[name]["count_error"]` says below which count), see `KeyCounter`. Each takes 24 bytes, and
                for strings their bytes; about three times that while counts are merged.

        Raises ValueError naming the feature's path: a missing column, a type that does not fit, tables whose features
        disagree, a table of `previous` with another encoding or dimension.
        """
        before = None if previous is None else previous._fitted
        return cls(
            fit(
                features,
                batches,
                schema=schema,
                embedding_dim=embedding_dim,
                previous=before,
                max_candidates=max_candidates,
            )
        )

    def check_schema(self, schema: pa.Schema) -> None:
        """Raises ValueError, a line for each finding, where columns are missing or of a type that does not fit."""
        check_schema(self.features, schema)

    def counts(self) -> FeatureCounts:
        """An empty accumulator for `encode`."""
        return FeatureCounts([feature.name for feature in self.features])

    def encode(self, batch: pa.RecordBatch, counts: FeatureCounts | None = None) -> Encoded:
        """The arrays of a batch; adds null and unseen values to `counts`. Numpy and Arrow only, and safe in threads.

        Raises ValueError naming the feature where a column is missing or of another type than in the fit, BadRowsError
        where single rows are broken (weights that do not match the values, a vector of another width).
        """
        (rows,) = self.encode_rows(batch, [slice(0, batch.num_rows)], counts)
        return join([(rows, 0, rows.num_rows)])

    def encode_rows(
        self, batch: pa.RecordBatch, orders: Sequence[Order], counts: FeatureCounts | None = None
    ) -> list[EncodedRows]:
        """For each of `orders` these rows of a batch, in this order, such that batches can be cut from them (`join`).

        Several windows of the reader at once cost less than one after the other. Raises as `encode` does; `counts` counts
        all rows of the batch.
        """
        places = self._places_in(batch.schema)
        dense = self._encode_dense(batch, orders, counts, places)

        def ids(keys: Sequence[str], weighted: bool) -> list[EncodedIds]:
            encoded = (self._encode_ids(name, batch, counts, places) for name in keys)
            return encoded_ids(encoded, len(keys), orders, weighted=weighted, dtype=self._rows_dtype)

        groups = zip(dense, ids(self.sparse_keys, weighted=False), ids(self.weighted_keys, weighted=True), strict=True)
        return [EncodedRows(*group) for group in groups]

    def _encode_dense(
        self, batch: pa.RecordBatch, orders: Sequence[Order], counts: FeatureCounts | None, places: "_Places"
    ) -> list[npt.NDArray[np.float32]]:
        """(b, F) of each order. Numbers are scaled and put in order column by column, while a column is in the cache, and where
        there is nothing else they stay so: a view of (F, b), which `join` brings into rows. Vectors are rows from the start.
        """
        rows, num_numbers = batch.num_rows, sum(run.stop - run.start for run in self._numbers)
        numbers = [_columns(num_numbers, num_rows(order)) for order in orders]  # (numbers, b) each
        vectors_BV = np.empty((rows, self.num_dense - num_numbers), np.float32)
        at = {False: 0, True: 0}  # in the numbers, in the vectors
        for feature, encoding, _, is_vector in self._dense:
            first, stop = at[is_vector], at[is_vector] + len(encoding.names)
            out_BW = vectors_BV[:, first:stop] if is_vector else np.empty((stop - first, rows), np.float32).T
            missing = encoding.encode(self._column(batch, feature, 0, places), out_BW)
            if not is_vector:
                for column in range(first, stop):
                    put((each[column] for each in numbers), out_BW[:, column - first], orders)
            at[is_vector] = stop
            if counts is not None:
                counts.add(self._index[feature.name], rows=rows, nulls=missing, values=rows, unseen=0)
        if num_numbers == self.num_dense:
            return [each.T for each in numbers]
        return [self._side_by_side(each.T, taken(vectors_BV, order)) for each, order in zip(numbers, orders, strict=True)]

    def _side_by_side(
        self, numbers_bN: npt.NDArray[np.float32], vectors_bV: npt.NDArray[np.float32]
    ) -> npt.NDArray[np.float32]:
        """(b, F): numbers and vectors in their columns."""
        dense_bF = np.empty((len(numbers_bN), self.num_dense), np.float32)
        for runs, values in ((self._numbers, numbers_bN), (self._vectors, vectors_bV)):
            at = 0
            for run in runs:
                dense_bF[:, run] = values[:, at : at + run.stop - run.start]
                at += run.stop - run.start
        return dense_bF

    def profile(self, batches: Iterable[pa.RecordBatch]) -> dict[str, FeatureProfile]:
        """{feature: profile of its values in these batches}, in the bins of the fit; compare with `psi`."""
        totals = {name: np.zeros(len(profile.bins), np.int64) for name, profile in self.profiles.items()}
        for batch in batches:
            places = self._places_in(batch.schema)
            for feature in self.features:
                array = self._column(batch, feature, 0, places)
                name = feature.name
                totals[name] += (
                    self._others[name].count(array).counts_P if name in self._others else self._count_ids(name, array)
                )
        return {name: FeatureProfile(name, self.profiles[name].bins, counts_P) for name, counts_P in totals.items()}

    def fingerprint(self) -> str:
        """A hash of all that decides what `encode` gives: equal encoders have equal ones."""
        digest = hashlib.sha256(json.dumps(self._state(), sort_keys=True).encode())
        for name in sorted(self._fitted.vocabularies):
            words = self._fitted.vocabularies[name].words
            digest.update((hash_array(words) if isinstance(words, pa.Array) else words).tobytes())
        return digest.hexdigest()

    def save(self, folder: Path) -> None:
        """Writes encoder.json and a Parquet file for each vocabulary into `folder` (made where it is not there)."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, vocabulary in self._fitted.vocabularies.items():
            vocabulary.save(folder / _file(name))
        (folder / _FILE).write_text(json.dumps(self._state(), indent=1, allow_nan=False), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> "Encoder":
        """Reads what `save` wrote. ValueError where it was written by a later version."""
        with as_written(folder / _FILE, "JSON"):
            state = json.loads((folder / _FILE).read_text(encoding="utf-8"))
            version = state["version"]
        if version != _VERSION:
            raise ValueError(
                f"{folder / _FILE} should have version {_VERSION}. Found {version}: "
                "use the mtrec that wrote it."
            )
        features = []
        for each in state["features"]:
            place = f"features.{each['name']}"
            kind = resolve(each["kind"], FEATURES, f"{place}.kind")
            features.append(kind(each["name"], **check_options(kind, each["options"], place)))
        tables = tuple(Table(**{**each, "features": tuple(each["features"])}) for each in state["tables"])
        keys = state["keys"]
        vocabularies = {
            table.name: Vocabulary.load(folder / _file(table.name), keys[table.name])
            for table in tables
            if table.encoding == "vocabulary"
        }
        profiles = {name: FeatureProfile.restore(name, each) for name, each in state["profiles"].items()}
        return cls(
            Fitted(
                features=tuple(features),
                tables=tables,
                keys=keys,
                mean_of_weights=state["mean_of_weights"],
                vocabularies=vocabularies,
                states=state["states"],
                statistics=state["statistics"],
                profiles=profiles,
                top_rows=state["top_rows"],
                changes=tuple(state["changes"]),
            )
        )

    def _state(self) -> dict[str, Any]:
        fitted = self._fitted
        return {
            "version": _VERSION,
            "features": [
                {"name": each.name, "kind": _kind(each), "options": _options(each)} for each in fitted.features
            ],
            "tables": [dataclasses.asdict(table) for table in fitted.tables],
            "keys": fitted.keys,
            "mean_of_weights": fitted.mean_of_weights,
            "states": fitted.states,
            "statistics": fitted.statistics,
            "profiles": {name: profile.state() for name, profile in fitted.profiles.items()},
            "top_rows": fitted.top_rows,
            "changes": list(fitted.changes),
        }

    def _column(self, batch: pa.RecordBatch, feature: Feature, place: int, places: "_Places") -> Any:
        name = feature.columns[place]
        if name in places.columns:
            index, as_it_is = places.columns[name]
            column = batch.column(index)
            return column if as_it_is and not isinstance(column, pa.ChunkedArray) else plain(column)
        if not feature.optional:
            option = "weights" if place else "column"
            raise ValueError(
                f"`features.{feature.name}.{option}` should name a column of the data. Found '{name}'."
                f"{nearest(name, batch.schema.names)}"
            )
        return pa.nulls(batch.num_rows)

    def _places_in(self, schema: pa.Schema) -> "_Places":
        """Remembered for the newest schema: asking Arrow for each column again costs as much as converting thousands of ids."""
        known = self._known_places
        if known is None or not known.schema.equals(schema):
            columns = {name: schema.get_field_index(name) for name in self.columns}
            found = {name: (place, is_plain(schema.field(place).type)) for name, place in columns.items() if place >= 0}
            plain = [
                name
                for name, encoding in self._ids.items()
                if (place := columns[encoding.feature.column]) >= 0 and encoding.takes_plain(schema.field(place).type)
            ]
            known = self._known_places = _Places(schema, found, frozenset(plain))
        return known

    def _encode_ids(
        self, name: str, batch: pa.RecordBatch, counts: FeatureCounts | None, places: "_Places"
    ) -> Ids:
        feature = self.features[self._index[name]]
        array = self._column(batch, feature, 0, places)
        if name in places.plain_ids and not array.null_count:
            ids = Ids(self._ids[name].plain_rows(array), None, None, 0)
        elif name in self._others:
            rows_B = self._others[name].rows(array)
            ids = Ids(rows_B, None, None, int(np.count_nonzero(rows_B == NULL_ROW)) if counts is not None else 0)
        else:
            weights = self._column(batch, feature, 1, places) if len(feature.columns) > 1 else None
            ids = self._ids[name].encode(array, weights)
        self._count(ids, name, batch.num_rows, counts)
        return ids

    def _count(self, ids: Ids, name: str, num_rows: int, counts: FeatureCounts | None) -> None:
        if counts is not None:
            unseen = int(np.count_nonzero(ids.values == UNSEEN_ROW))
            counts.add(self._index[name], rows=num_rows, nulls=ids.null_rows, values=len(ids.values), unseen=unseen)

    def _count_ids(self, name: str, array: Any) -> npt.NDArray[np.int64]:
        values = self._ids[name].encode_rows(array)
        top = np.array(self._fitted.top_rows[name], np.int64)
        order = np.argsort(top)
        known = values[values >= FIRST_ROW]
        counts_P = np.zeros(len(top) + 3, np.int64)
        counts_P[0], counts_P[1] = np.count_nonzero(values == NULL_ROW), np.count_nonzero(values == UNSEEN_ROW)
        if len(top):
            place = np.minimum(np.searchsorted(top[order], known), len(top) - 1)
            hit = top[order][place] == known
            counts_P[2:-1] = np.bincount(order[place[hit]], minlength=len(top))
        counts_P[-1] = len(known) - counts_P[2:-1].sum()
        return counts_P


def _runs(columns: Sequence[slice]) -> list[slice]:
    """Ascending ranges, those put together that follow one another.

    >>> _runs([slice(0, 2), slice(2, 3), slice(5, 6)])
    [slice(0, 3, None), slice(5, 6, None)]
    """
    runs: list[slice] = []
    for each in columns:
        if runs and runs[-1].stop == each.start:
            runs[-1] = slice(runs[-1].start, each.stop)
        else:
            runs.append(each)
    return runs


def _columns(num_columns: int, num_rows: int) -> npt.NDArray[np.float32]:
    """(F, B), a column after the other, to be written each in one go.

    They lie such that a row's values, which are collected later, are in cache lines of different sets: columns of a multiple
    of 4 KiB would meet in the same one, which holds eight. Shorter ones lie as close as they can.
    """
    spare = (80 - num_rows) % 1024 if num_rows >= 1024 else 0
    return np.empty((num_columns, num_rows + spare), np.float32)[:, :num_rows]


def _file(table: str) -> str:
    return f"vocabulary_{urllib.parse.quote(table, safe='')}.parquet"


def _kind(feature: Feature) -> str:
    cls = type(feature)
    return next((name for name, known in FEATURES.items() if known is cls), f"{cls.__module__}:{cls.__qualname__}")


def _options(feature: Feature) -> dict[str, Any]:
    values = {option: getattr(feature, option) for option in option_types(type(feature))}
    return {option: list(value) if isinstance(value, tuple) else value for option, value in values.items()}
