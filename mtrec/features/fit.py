"""The fit: one streaming pass over the training data, bounded in memory, that decides vocabularies, scales, buckets."""

import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pyarrow import types

from mtrec.features.arrays import id_key, is_list, plain
from mtrec.features.categorical import Categorical, CategoricalFit, HashRows, IdentityRows
from mtrec.features.counting import KeyCounter
from mtrec.features.profile import TOP, FeatureProfile
from mtrec.features.tables import Feature, Table, TablePlan, auto_rows, check_schema, plan_tables
from mtrec.features.vocabulary import FIRST_ROW, UNSEEN_ROW, Key, Rows, Vocabulary


@dataclass(frozen=True, eq=False)
class Fitted:
    """All that a fit has decided.

    By table: `tables`, `keys` (how ids are held), `mean_of_weights`, `vocabularies` (of encoding vocabulary). By
    feature: `states` (of dense and bucketized ones), `statistics`, `profiles`, `top_rows` (rows with a bin of their
    own). `changes`: what a fit with a previous one did, in words.
    """

    features: tuple[Feature, ...]
    tables: tuple[Table, ...]
    keys: dict[str, Key]
    mean_of_weights: dict[str, bool]
    vocabularies: dict[str, Vocabulary]
    states: dict[str, dict[str, Any]]
    statistics: dict[str, dict[str, Any]]
    profiles: dict[str, FeatureProfile]
    top_rows: dict[str, list[int]]
    changes: tuple[str, ...]


def rows_of_table(table: Table | TablePlan, key: Key, vocabulary: Vocabulary | None) -> Callable[[Any], Rows]:
    """The function from keys (int64 array or large_binary array) to rows of a categorical table."""
    if vocabulary is not None:
        return vocabulary.rows
    assert table.num_embeddings is not None
    return (
        HashRows(key, table.num_embeddings) if table.encoding == "hash" else IdentityRows(table.num_embeddings)
    ).rows


def fit(
    features: Sequence[Feature],
    batches: Iterable[pa.RecordBatch],
    *,
    schema: pa.Schema,
    embedding_dim: int,
    previous: Fitted | None,
    max_candidates: int,
) -> Fitted:
    """Fits features to the batches; see `Encoder.fit`."""
    _check_names(features)
    check_schema(features, schema)
    plans = plan_tables(features, embedding_dim)
    plan_of = {name: plan for plan in plans for name in plan.features}
    keys = {plan.name: _key(plan, features, schema, previous) for plan in plans if plan.encoding != "bucketized"}
    if previous is not None:
        _check_previous(plans, keys, previous)
    fits: dict[str, Any] = {}
    for feature in features:
        if isinstance(feature, Categorical):
            plan = plan_of[feature.name]
            key = keys[plan.name]
            rows_of = None if plan.encoding == "vocabulary" else rows_of_table(plan, key, None)
            fits[feature.name] = feature.start(key, max_candidates, rows_of)
        else:
            column = feature.columns[0]
            column_type = schema.field(column).type if column in schema.names else pa.null()
            fits[feature.name] = feature.start(column_type)  # type: ignore[attr-defined]
    for batch in batches:
        names = batch.schema.names
        for feature in features:
            column = feature.columns[0]
            if column not in names and not feature.optional:
                raise ValueError(
                    f"`features.{feature.name}.column` should name a column of every batch. "
                    f"Found a batch without '{column}'."
                )
            array = plain(batch.column(column)) if column in names else pa.nulls(batch.num_rows)
            if not types.is_null(array.type):
                feature.check_type(array.type)
            fits[feature.name].update(array)
    return _finish(features, plans, keys, fits, previous)


def _finish(
    features: Sequence[Feature],
    plans: list[TablePlan],
    keys: dict[str, Key],
    fits: dict[str, Any],
    previous: Fitted | None,
) -> Fitted:
    by_name = {feature.name: feature for feature in features}
    states: dict[str, dict[str, Any]] = {}
    statistics: dict[str, dict[str, Any]] = {}
    profiles: dict[str, FeatureProfile] = {}
    top_rows: dict[str, list[int]] = {}
    tables: list[Table] = []
    vocabularies: dict[str, Vocabulary] = {}
    changes = [] if previous is None else _removed(by_name, previous)
    for feature in features:
        if isinstance(feature, Categorical):
            continue
        state, statistics[feature.name] = fits[feature.name].finish()
        kept = None if previous is None else _kept_state(feature, state, previous)
        if previous is not None and kept is None and feature.name in previous.states:
            changes.append(f"features.{feature.name}: other options or another width than before, fitted anew")
        states[feature.name] = state if kept is None else kept
        profiles[feature.name] = fits[feature.name].profile(feature.restore(states[feature.name]))  # type: ignore[attr-defined]
    before = {} if previous is None else {table.name: table for table in previous.tables}
    for plan in plans:
        if plan.encoding == "bucketized":
            rows = by_name[plan.name].num_embeddings  # type: ignore[attr-defined]
            tables.append(plan.built(rows, rows - FIRST_ROW))
            continue
        vocabulary = None
        if plan.encoding == "vocabulary":
            old = None if previous is None else previous.vocabularies.get(plan.name)
            counters = [fits[name] for name in plan.features]
            vocabulary = vocabularies[plan.name] = _grow(plan, keys[plan.name], counters, old)
            table = plan.built(_rows(plan, vocabulary, before.get(plan.name)), len(vocabulary))
            if old is not None and len(vocabulary) > len(old):
                changes.append(f"table {plan.name}: {len(vocabulary) - len(old):,} new ids beside {len(old):,}")
        else:
            assert plan.num_embeddings is not None
            table = plan.built(plan.num_embeddings, plan.num_embeddings - FIRST_ROW)
        if plan.name in before and table.num_embeddings != before[plan.name].num_embeddings:
            changes.append(
                f"table {plan.name}: {before[plan.name].num_embeddings:,} rows become {table.num_embeddings:,}"
            )
        tables.append(table)
        for name in plan.features:
            profiles[name], top_rows[name], unseen = _profile(name, fits[name], vocabulary)
            statistics[name] = fits[name].statistics(unseen)
    return Fitted(
        features=tuple(features),
        tables=tuple(tables),
        keys=keys,
        mean_of_weights={plan.name: plan.mean_of_weights for plan in plans},
        vocabularies=vocabularies,
        states=states,
        statistics=statistics,
        profiles=profiles,
        top_rows=top_rows,
        changes=tuple(changes),
    )


def _check_names(features: Sequence[Feature]) -> None:
    seen: set[str] = set()
    for feature in features:
        if feature.name in seen:
            raise ValueError(f"`features` should have one feature of a name. Found '{feature.name}' twice.")
        seen.add(feature.name)


def _key(plan: TablePlan, features: Sequence[Feature], schema: pa.Schema, previous: Fitted | None) -> Key:
    """How the ids of a table are held; ValueError where its features, or the previous fit, disagree."""
    found: dict[str, Key] = {}
    for feature in features:
        if feature.name in plan.features and feature.columns[0] in schema.names:
            type_ = schema.field(feature.columns[0]).type
            key = id_key(type_.value_type if is_list(type_) else type_)
            if key is not None:  # a column of nulls fits any
                found[feature.name] = key
    texts = [name for name, key in found.items() if key == "string"]
    numbers = [name for name in found if name not in texts]
    if texts and numbers:
        raise ValueError(
            f"`features.{texts[0]}.table` and `features.{numbers[0]}.table` should not both be '{plan.name}': "
            "one column holds strings, the other integers."
        )
    if texts and plan.encoding == "identity":
        raise ValueError(
            f"`features.{texts[0]}.encoding` should be vocabulary or hash for a column of strings. Found identity."
        )
    before = None if previous is None else previous.keys.get(plan.name)
    if previous is not None and before is not None and len(previous.vocabularies.get(plan.name, ())):
        if found and bool(texts) != (before == "string"):
            name = next(iter(found))
            raise ValueError(
                f"`features.{name}.column` should hold {'strings' if before == 'string' else 'integers'}, as in the "
                f"run that this one starts from. Found {'strings' if texts else 'integers'}."
            )
        return before
    if texts:
        return "string"
    return "uint64" if found and all(key == "uint64" for key in found.values()) else "int64"


def _check_previous(plans: list[TablePlan], keys: dict[str, Key], previous: Fitted) -> None:
    """A table that was there before keeps its encoding and dimension; a hashed one its rows."""
    before = {table.name: table for table in previous.tables}
    for plan in plans:
        old = before.get(plan.name)
        if old is None:
            continue
        place = f"features.{plan.features[0]}"
        end = f"as in the run that this one starts from (table '{plan.name}')"
        if old.encoding != plan.encoding:
            raise ValueError(f"`{place}.encoding` should be {old.encoding}, {end}. Found {plan.encoding}.")
        if old.dim != plan.dim:
            raise ValueError(f"`{place}.dim` should be {old.dim}, {end}. Found {plan.dim}.")
        rows = plan.num_embeddings
        if plan.encoding == "hash" and rows != old.num_embeddings:
            raise ValueError(
                f"`{place}.num_embeddings` should be {old.num_embeddings}, {end}: else all ids change places. "
                f"Found {rows}."
            )
        if plan.encoding in ("vocabulary", "identity") and rows is not None and rows < old.num_embeddings:
            raise ValueError(f"`{place}.num_embeddings` should be at least {old.num_embeddings}, {end}. Found {rows}.")
        if plan.encoding == "hash" and keys[plan.name] == "string" and previous.keys[plan.name] != "string":
            raise ValueError(f"`{place}.column` should hold integers, {end}. Found strings.")


def _removed(by_name: dict[str, Feature], previous: Fitted) -> list[str]:
    return [f"features.{each.name}: removed" for each in previous.features if each.name not in by_name]


def _kept_state(feature: Any, state: dict[str, Any], previous: Fitted) -> dict[str, Any] | None:
    """The previous state where it still applies: then the inputs of old rows, and so their predictions, do not move."""
    old: Any = next((each for each in previous.features if each.name == feature.name), None)
    if (
        old is None
        or type(old) is not type(feature)
        or previous.states[feature.name].get("width") != state.get("width")
    ):
        return None
    same = all(getattr(old, option) == getattr(feature, option) for option in feature.fitted_by)
    return previous.states[feature.name] if same else None


def _grow(plan: TablePlan, key: Key, fits: list[CategoricalFit], old: Vocabulary | None) -> Vocabulary:
    """The old words, then the new ones that came min_count times: most frequent first, ties in the order of the ids."""
    counter = fits[0].counter
    if len(fits) > 1:  # of features that share the table
        counter = KeyCounter(text=key == "string", limit=sys.maxsize)
        for each in fits:
            counter.update(*each.counter.result())
    words, counts = counter.result()
    order = np.argsort(-counts, kind="stable")
    words, counts = words.take(pa.array(order)) if key == "string" else words[order], counts[order]
    if old is None:
        old_counts: npt.NDArray[np.int64] = np.zeros(0, np.int64)
        fresh = counts >= plan.min_count
    else:
        rows = old.rows(words)
        known = rows != UNSEEN_ROW
        old_counts = np.zeros(len(old), np.int64)
        old_counts[rows[known] - FIRST_ROW] = counts[known]
        fresh = (counts >= plan.min_count) & ~known
    taken = np.flatnonzero(fresh)
    if plan.num_embeddings is not None:
        taken = taken[: plan.num_embeddings - FIRST_ROW - len(old_counts)]
    if key == "string":
        new = words.take(pa.array(taken))
        words = new if old is None else pa.concat_arrays([old.words, new])
    else:
        words = words[taken] if old is None else np.concatenate([old.words, words[taken]])
    return Vocabulary(key, words, np.concatenate([old_counts, counts[taken]]))


def _rows(plan: TablePlan, vocabulary: Vocabulary, old: Table | None) -> int:
    if plan.num_embeddings is not None:
        return plan.num_embeddings
    if old is not None and len(vocabulary) + FIRST_ROW <= old.num_embeddings:
        return old.num_embeddings
    return auto_rows(len(vocabulary))


def _profile(name: str, fitted: CategoricalFit, vocabulary: Vocabulary | None) -> tuple[FeatureProfile, list[int], int]:
    """(profile, rows with a bin of their own, values without a row of their own)."""
    keys, counts = fitted.counter.result()
    rows = keys if vocabulary is None else vocabulary.rows(keys)
    known = rows >= FIRST_ROW
    rows, counts = rows[known], counts[known]
    order = np.lexsort((rows, -counts))[:TOP]
    top = rows[order].astype(np.int64)
    total = int(counts.sum())
    unseen = fitted.values - fitted.nulls - total
    in_top = counts[order]
    labels = [_label(int(row), vocabulary) for row in top]
    bins = ("null", "unseen", *labels, "other")
    counts_P = np.concatenate([[fitted.nulls, unseen], in_top, [total - int(in_top.sum())]]).astype(np.int64)
    return FeatureProfile(name, bins, counts_P), top.tolist(), unseen


def _label(row: int, vocabulary: Vocabulary | None) -> str:
    if vocabulary is None:
        return f"row {row}"
    if vocabulary.key == "string":
        return f"id {vocabulary.words[row - FIRST_ROW].as_py().decode(errors='replace')}"
    words = vocabulary.words.view(np.uint64) if vocabulary.key == "uint64" else vocabulary.words
    return f"id {words[row - FIRST_ROW]}"
