"""Embedding tables, and which features share one."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import pyarrow as pa

from mtrec.features.vocabulary import FIRST_ROW
from mtrec.kinds import nearest

Encoding = Literal["vocabulary", "hash", "identity", "bucketized"]
Pooling = Literal["sum", "mean"]
Sharding = Literal["auto", "table_wise", "column_wise", "row_wise", "data_parallel"]
Family = Literal["dense", "buckets", "vocabulary"]

COLUMNS = 4  # fbgemm's kernels read so many at a time: tables have a multiple of them, but for those that are plain torch
AUTO_ROOM = 1.2  # rows of an `auto` table for each row that is used, so that tomorrow's ids find a place


@runtime_checkable
class Feature(Protocol):
    """What every kind of feature has.

    `family` says how the encoder treats it: `dense` (numbers in `dense_BF`), `buckets` (one row of a table of its own
    for each value), `vocabulary` (ids in a table that features may share; Categorical).

    The first two are open to kinds from outside. They also have `fitted_by` (options that decide the fit),
    `start(type) -> fit` with `fit.update(array)`, `fit.finish() -> (state, statistics)` (dicts for JSON; the state has
    a `width` if it has one) and `fit.profile(encoding)`; `restore(state) -> encoding` with `encoding.count(array)` (a
    FeatureProfile), and for `dense` `encoding.names` and `encoding.encode(array, out_BW) -> rows with a missing value`,
    for `buckets` `encoding.rows(array)` and the feature's `num_embeddings`.
    """

    family: ClassVar[Family]
    name: str
    optional: bool

    @property
    def columns(self) -> tuple[str, ...]:
        """Input columns."""
        ...

    def check_type(self, type_: pa.DataType) -> None:
        """Raises ValueError naming `features.NAME.column` where the first of `columns` cannot have this type."""
        ...


@dataclass(frozen=True)
class Table:
    """An embedding table as the model builds it.

    `features` are keys of the batch; `vocabulary_size` counts known ids (for hash and identity: rows for ids);
    `weighted` tables stand in the weighted part of the batch, always with pooling `sum` (the encoder divides the
    weights of a bag by their sum where the user asked for `mean`).
    """

    name: str
    num_embeddings: int
    dim: int
    features: tuple[str, ...]
    pooling: Pooling
    weighted: bool
    sharding: Sharding
    num_column_shards: int
    init_std: float
    vocabulary_size: int
    encoding: Encoding


@dataclass(frozen=True)
class TablePlan:
    """What the features say about a table, before the fit; `num_embeddings` None stands for auto."""

    name: str
    features: tuple[str, ...]
    encoding: Encoding
    num_embeddings: int | None
    min_count: int
    dim: int
    pooling: Pooling
    mean_of_weights: bool
    weighted: bool
    sharding: Sharding
    num_column_shards: int
    init_std: float

    def built(self, num_embeddings: int, vocabulary_size: int) -> Table:
        """The table once its rows are known."""
        return Table(
            self.name,
            num_embeddings,
            self.dim,
            self.features,
            self.pooling,
            self.weighted,
            self.sharding,
            self.num_column_shards,
            self.init_std,
            vocabulary_size,
            self.encoding,
        )


# Options that any one of the features of a table may state.
_SHARED = ("encoding", "num_embeddings", "min_count", "dim", "pooling", "sharding", "num_column_shards", "init_std")


def auto_rows(vocabulary_size: int) -> int:
    """Rows of a table with `num_embeddings: auto`.

    >>> auto_rows(98)
    120
    """
    return math.ceil(AUTO_ROOM * (FIRST_ROW + vocabulary_size))


def plan_tables(features: Sequence[Feature], embedding_dim: int) -> list[TablePlan]:
    """The tables of the features, in the order of their first features.

    Raises ValueError naming both paths where two features of a table disagree, and the path of an option that is
    missing or does not fit the others.
    """
    groups: dict[str, list[Any]] = {}
    for feature in features:
        if feature.family == "dense":
            continue
        name = getattr(feature, "table", None) or feature.name
        groups.setdefault(name, []).append(feature)
        families = {each.family for each in groups[name]}
        if families != {"vocabulary"} and len(groups[name]) > 1:
            first = groups[name][0]
            raise ValueError(
                f"`features.{feature.name}.table` should name a table of categorical features. Found '{name}', "
                f"which is also the table of `features.{first.name}`; only categorical features share tables."
            )
    return [_plan(name, members, embedding_dim) for name, members in groups.items()]


def _plan(name: str, members: list[Any], embedding_dim: int) -> TablePlan:
    stated: dict[str, tuple[str, Any]] = {}
    for option in _SHARED:
        for feature in members:
            value = getattr(feature, option, None)
            if value is None:
                continue
            owner, before = stated.setdefault(option, (feature.name, value))
            if before != value:
                raise ValueError(
                    f"`features.{owner}.{option}` and `features.{feature.name}.{option}` should agree, since both "
                    f"features use the table '{name}'. Found {before!r} and {value!r}."
                )

    def of(option: str, default: Any) -> Any:
        return stated[option][1] if option in stated else default

    def path(option: str) -> str:
        return f"features.{stated[option][0] if option in stated else members[0].name}.{option}"

    buckets = members[0].family == "buckets"
    encoding: Encoding = "bucketized" if buckets else of("encoding", "vocabulary")
    rows = of("num_embeddings", "auto")
    if not buckets and encoding != "vocabulary":
        if rows == "auto":
            raise ValueError(
                f"`{path('num_embeddings')}` should be a number of rows with `encoding: {encoding}`. Found none."
            )
        if "min_count" in stated:
            raise ValueError(
                f"`{path('min_count')}` should be left out: it is for `encoding: vocabulary`. Found {encoding}."
            )
    if not buckets and rows != "auto" and rows <= FIRST_ROW:
        raise ValueError(
            f"`{path('num_embeddings')}` should be at least {FIRST_ROW + 1} (rows for null, unseen and one id). "
            f"Found {rows}."
        )
    dim = of("dim", embedding_dim)
    sharding: Sharding = of("sharding", "auto")
    shards = of("num_column_shards", 2 if sharding == "column_wise" else 1)
    if shards > 1 and sharding != "column_wise":
        raise ValueError(
            f"`{path('num_column_shards')}` should stand beside `sharding: column_wise`. Found sharding {sharding}."
        )
    if dim % shards:
        raise ValueError(
            f"`{path('num_column_shards')}` should divide the dimension {dim} of the table '{name}'. Found {shards}."
        )
    if dim % COLUMNS and sharding != "data_parallel":
        raise ValueError(
            f"`{path('dim') if 'dim' in stated else 'model.embedding_dim'}` should be a multiple of {COLUMNS} for the table "
            f"'{name}': fbgemm has no others. Found {dim}. `sharding: data_parallel` takes any dimension."
        )
    weighted = any(getattr(feature, "weights", None) for feature in members)
    pooling: Pooling = "sum" if buckets else of("pooling", "mean")
    return TablePlan(
        name=name,
        features=tuple(feature.name for feature in members),
        encoding=encoding,
        num_embeddings=None if rows == "auto" else rows,
        min_count=of("min_count", 2),
        dim=dim,
        pooling="sum" if weighted else pooling,
        mean_of_weights=weighted and pooling == "mean",
        weighted=weighted,
        sharding=sharding,
        num_column_shards=shards,
        init_std=of("init_std", 0.01),
    )


def id_columns(features: Sequence[Feature]) -> frozenset[str]:
    """The columns of ids that no other kind reads: their text may come as dictionary arrays.

    >>> from mtrec.features import Categorical, Dense
    >>> sorted(id_columns([Categorical("item"), Categorical("tags", weights="shares"), Dense("age")]))
    ['item', 'tags']
    """
    ids = {feature.columns[0] for feature in features if feature.family == "vocabulary"}
    others = {column for each in features for column in each.columns[1 if each.family == "vocabulary" else 0 :]}
    return frozenset(ids - others)


def check_schema(features: Iterable[Feature], schema: pa.Schema) -> None:
    """Checks that the columns of the features are there, with types that fit; an optional one may be missing.

    Raises ValueError with a line for each finding.
    """
    findings = []
    for feature in features:
        for position, column in enumerate(feature.columns):
            if column not in schema.names:
                if not feature.optional:
                    option = "column" if position == 0 else "weights"
                    findings.append(
                        f"`features.{feature.name}.{option}` should name a column of the data. Found '{column}'."
                        f"{nearest(column, schema.names)}"
                    )
                continue
            try:
                if position == 0:
                    feature.check_type(schema.field(column).type)
                elif hasattr(feature, "check_weights_type"):
                    feature.check_weights_type(schema.field(column).type)
            except ValueError as error:
                findings.append(str(error))
    if findings:
        raise ValueError("\n".join(findings))
