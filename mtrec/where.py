"""`where:`, a filter on rows such as `dt <= 2026-01-14 and channel in [1, 2]`: parsed here, never evaluated as code.

    condition  = and-terms joined by `or`; and-terms joined by `and`; `not` before a term; parentheses
    term       = COLUMN < VALUE          (also <=, >, >=, ==, !=; the value may stand on the left; a <= COLUMN < b)
               | COLUMN [not] in [VALUE, ...]
               | COLUMN is [not] null
    VALUE      = 3, -0.5, 'text', true, 2026-01-14, 2026-01-14T08:30:00
    COLUMN     = a name of letters, digits, _ and . ; any other name in `backticks`

Nulls follow SQL: a comparison with null is neither true nor false, and only rows for which the condition is true stay.
"""

import datetime
import itertools
import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from mtrec.kinds import nearest

# The outcomes that a condition can have over the rows of a row group, as a set of bits.
TRUE, FALSE, NULL = 1, 2, 4

Value = bool | int | float | str | datetime.date | datetime.datetime


class Bounds(NamedTuple):
    """What a footer says of one column in one row group; `low`, `high`, `nulls` are None where it says nothing."""

    low: Any
    high: Any
    nulls: int | None
    rows: int


@dataclass(frozen=True)
class Compare:
    """`column op value`, op one of <, <=, >, >=, ==, !=; null where the column is."""

    column: str
    op: str
    value: Value


@dataclass(frozen=True)
class In:
    """`column in [values]`; null where the column is."""

    column: str
    values: tuple[Value, ...]


@dataclass(frozen=True)
class IsNull:
    """`column is null`: true or false, never null."""

    column: str


@dataclass(frozen=True)
class Not:
    """`not of`; null where `of` is."""

    of: "Condition"


@dataclass(frozen=True)
class Both:
    """`left and right`: false where one of them is, else null where one of them is, else true."""

    left: "Condition"
    right: "Condition"


@dataclass(frozen=True)
class Either:
    """`left or right`: true where one of them is, else null where one of them is, else false."""

    left: "Condition"
    right: "Condition"


Condition = Compare | In | IsNull | Not | Both | Either

_FLIPPED = {"<": ">", "<=": ">=", ">": "<", ">=": "<=", "==": "==", "!=": "!="}
_TOKENS = re.compile(
    r"""\s*(?:
    (?P<moment>\d{4}-\d\d-\d\d(?:[T\ ]\d\d:\d\d(?::\d\d(?:\.\d{1,6})?)?(?:Z|[+-]\d\d:\d\d)?)?)(?![\w.-])
    |(?P<number>[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)(?![\w.])
    |(?P<text>'[^']*'|"[^"]*")
    |`(?P<quoted>[^`]+)`
    |(?P<name>[^\W\d][\w.]*)
    |(?P<op><=|>=|==|!=|<>|<|>|=)
    |(?P<mark>[()\[\],])
    )""",
    re.VERBOSE,
)


def parse(text: str, place: str) -> Condition:
    """The condition that `text` states. Raises ValueError naming `place` (a YAML path) and the position in the text.

    >>> parse("0 < x and not channel in [1, 2]", "data.train.where")
    Both(left=Compare(column='x', op='>', value=0), right=Not(of=In(column='channel', values=(1, 2))))
    >>> parse("x < on", "data.where")
    Traceback (most recent call last):
    ...
    ValueError: `data.where` should compare a column with a value; text stands in quotes: 'on'. Found 'x < on'.
    """
    return _Parser(text, place).condition()


class _Parser:
    """Recursive descent over the tokens; `self.at` is the next one."""

    def __init__(self, text: str, place: str) -> None:
        self.text, self.place, self.at = text, place, 0
        self.tokens: list[tuple[str, str, int]] = []  # (sort, text, column from 1)
        position, end = 0, len(text.rstrip())
        while position < end:
            match = _TOKENS.match(text, position)
            if match is None:
                start = position + len(text[position:]) - len(text[position:].lstrip())
                raise self.error(f"not have '{text[start]}' at column {start + 1}")
            sort = match.lastgroup or ""
            self.tokens.append((sort, match.group(sort), match.start(sort) + 1))
            position = match.end()
        self.tokens.append(("end", "", len(text) + 1))

    def error(self, wish: str) -> ValueError:
        return ValueError(f"`{self.place}` should {wish}. Found '{self.text}'.")

    def word(self, *words: str) -> bool:
        """Takes the next token if it is one of these keywords or marks."""
        sort, text, _ = self.tokens[self.at]
        if sort in ("name", "mark") and text.lower() in words:
            self.at += 1
            return True
        return False

    def need(self, word: str) -> None:
        if not self.word(word):
            raise self.error(f"have '{word}' at column {self.tokens[self.at][2]}")

    def condition(self) -> Condition:
        """either, to the end of the text."""
        found = self.either()
        if self.tokens[self.at][0] != "end":
            _, text, column = self.tokens[self.at]
            raise self.error(f"end, or go on with `and` or `or`, before '{text}' at column {column}")
        return found

    def either(self) -> Condition:
        """both { "or" both }"""
        found = self.both()
        while self.word("or"):
            found = Either(found, self.both())
        return found

    def both(self) -> Condition:
        """term { "and" term }"""
        found = self.term()
        while self.word("and"):
            found = Both(found, self.term())
        return found

    def term(self) -> Condition:
        """"not" term, "(" either ")", or a column or value compared once, or twice as in 0 < x < 9."""
        if self.word("not"):
            return Not(self.term())
        if self.word("("):
            inner = self.either()
            self.need(")")
            return inner
        left = self.operand()
        if isinstance(left, _Column):
            if self.word("is"):
                negated = self.word("not")
                self.need("null")
                return Not(IsNull(left.name)) if negated else IsNull(left.name)
            if self.word("in"):
                return In(left.name, self.values())
            if self.word("not"):
                self.need("in")
                return Not(In(left.name, self.values()))
        op = self.op()
        middle = self.operand()
        first = self.compare(left, op, middle)
        if isinstance(middle, _Column) and self.tokens[self.at][0] == "op":
            return Both(first, self.compare(middle, self.op(), self.operand()))
        return first

    def op(self) -> str:
        """The comparison that stands here, in one spelling."""
        sort, text, column = self.tokens[self.at]
        if sort != "op":
            raise self.error(f"have a comparison (<, <=, >, >=, ==, !=, in, is null) at column {column}")
        self.at += 1
        return {"=": "==", "<>": "!="}.get(text, text)

    def compare(self, left: "_Column | Value", op: str, right: "_Column | Value") -> Compare:
        """The column on the left, whichever side it stood on."""
        if isinstance(left, _Column) and not isinstance(right, _Column):
            return Compare(left.name, op, right)
        if isinstance(right, _Column) and not isinstance(left, _Column):
            return Compare(right.name, _FLIPPED[op], left)
        word = right.name if isinstance(right, _Column) else left
        raise self.error(f"compare a column with a value; text stands in quotes: '{word}'")

    def values(self) -> tuple[Value, ...]:
        """"[" value { "," value } "]"."""
        self.need("[")
        found: list[Value] = []
        while not self.word("]"):
            if found:
                self.need(",")
            value = self.operand()
            if isinstance(value, _Column):
                raise self.error(f"have values in the brackets; text stands in quotes: '{value.name}'")
            found.append(value)
        return tuple(found)

    def operand(self) -> "_Column | Value":
        """A column or a value, of the type that its spelling says."""
        sort, text, column = self.tokens[self.at]
        self.at += 1
        if sort == "quoted":
            return _Column(text)
        if sort == "name" and text.lower() in ("true", "false"):
            return text.lower() == "true"
        if sort == "name" and text.lower() not in ("and", "or", "not", "in", "is", "null"):
            return _Column(text)
        if sort == "text":
            return text[1:-1]
        if sort == "number":
            return int(text) if re.fullmatch(r"[+-]?\d+", text) else float(text)
        if sort == "moment":
            try:
                return datetime.date.fromisoformat(text) if len(text) == 10 else _moment(text)
            except ValueError as error:
                raise self.error(f"have a date that exists at column {column}; {error}") from None
        raise self.error(f"have a column or a value at column {column}")


class _Column(NamedTuple):
    name: str


def _moment(text: str) -> datetime.datetime:
    """A timestamp, in UTC and without a zone."""
    return _without_zone(datetime.datetime.fromisoformat(text))


def _midnight(day: datetime.date) -> datetime.datetime:
    return datetime.datetime(day.year, day.month, day.day)


def _without_zone(moment: datetime.datetime) -> datetime.datetime:
    return moment if moment.tzinfo is None else moment.astimezone(datetime.UTC).replace(tzinfo=None)


def columns_of(condition: Condition) -> tuple[str, ...]:
    """The columns that a condition reads, each once, in order.

    >>> columns_of(parse("a < 1 or b == 2 and a > 0", "where"))
    ('a', 'b')
    """
    if isinstance(condition, Not):
        return columns_of(condition.of)
    if isinstance(condition, Both | Either):
        return tuple(dict.fromkeys(columns_of(condition.left) + columns_of(condition.right)))
    return (condition.column,)


def window(column: str, first: Value, last: Value, type_: pa.DataType) -> Condition:
    """first <= column <= last; a last day counts to its end where the column holds timestamps."""
    if pa.types.is_timestamp(type_) and not isinstance(last, datetime.datetime) and isinstance(last, datetime.date):
        return Both(Compare(column, ">=", first), Compare(column, "<", last + datetime.timedelta(days=1)))
    return Both(Compare(column, ">=", first), Compare(column, "<=", last))


def bind(condition: Condition, types: Mapping[str, pa.DataType], place: str) -> Condition:
    """The condition with its values converted to the types of the columns.

    Raises ValueError naming `place` where a column does not exist or cannot be compared with the value.

    >>> bind(parse("dt <= 2026-01-14", "data.train.where"), {"dt": pa.string()}, "data.train.where")
    Compare(column='dt', op='<=', value='2026-01-14')
    """
    if isinstance(condition, Not):
        return Not(bind(condition.of, types, place))
    if isinstance(condition, Both):
        return Both(bind(condition.left, types, place), bind(condition.right, types, place))
    if isinstance(condition, Either):
        return Either(bind(condition.left, types, place), bind(condition.right, types, place))
    column = condition.column
    if column not in types:
        raise ValueError(f"`{place}` should name a column of the data. Found '{column}'.{nearest(column, types)}")
    if isinstance(condition, Compare):
        return Compare(column, condition.op, _converted(condition.value, column, types[column], place))
    if isinstance(condition, In):
        return In(column, tuple(_converted(value, column, types[column], place) for value in condition.values))
    return condition


def _converted(value: Value, column: str, type_: pa.DataType, place: str) -> Value:
    wish: str
    if pa.types.is_null(type_):
        return value
    if pa.types.is_boolean(type_):
        wish = "true or false"
        if isinstance(value, bool) or (isinstance(value, int) and value in (0, 1)):
            return bool(value)
    elif pa.types.is_integer(type_):
        low, high = (0, 2**64 - 1) if type_ == pa.uint64() else (-(2**63), 2**63 - 1)
        wish = f"an integer between {low} and {high}"
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, int) and not isinstance(value, bool) and low <= value <= high:
            return value
    elif pa.types.is_floating(type_):
        wish = "a number"
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
    elif pa.types.is_string(type_) or pa.types.is_large_string(type_):
        wish = "text in quotes or a date"
        if isinstance(value, str):
            return value
        if isinstance(value, datetime.date):
            return value.isoformat()
    elif pa.types.is_date(type_) or pa.types.is_timestamp(type_):
        return _converted_moment(value, column, type_, place)
    else:
        raise ValueError(
            f"`{place}` should compare columns of integers, numbers, text, booleans, dates or timestamps. "
            f"Found '{column}', which is {type_}."
        )
    raise ValueError(f"`{place}` should compare '{column}', which is {type_}, with {wish}. Found {value!r}.")


def _converted_moment(value: Value, column: str, type_: pa.DataType, place: str) -> Value:
    wanted = "timestamp" if pa.types.is_timestamp(type_) else "date"
    found: Value = value
    if isinstance(value, str):
        try:
            found = _moment(value) if wanted == "timestamp" else datetime.date.fromisoformat(value)
        except ValueError:
            wanted += " such as 2026-01-14"
    if isinstance(found, datetime.datetime):
        found = _without_zone(found)
        if wanted == "timestamp" and (type_.unit != "ns" or 1678 <= found.year <= 2261):
            return found
    elif isinstance(found, datetime.date):
        return found if wanted == "date" else _converted_moment(_midnight(found), column, type_, place)
    raise ValueError(f"`{place}` should compare '{column}', which is {type_}, with a {wanted}. Found {value!s}.")


def outcomes(condition: Condition, bounds: Callable[[str], Bounds | None]) -> int:
    """Which of TRUE, FALSE, NULL the (bound) condition can have over the rows that the bounds describe: never too few.

    Without TRUE no row can stay; TRUE alone means that every row stays.

    >>> outcomes(Compare("x", "<=", 5), {"x": Bounds(6, 9, 0, 100)}.get) == FALSE
    True
    >>> outcomes(Compare("x", "<=", 5), {"x": Bounds(1, 5, 3, 100)}.get) == TRUE | NULL
    True
    """
    if isinstance(condition, Not):
        inner = outcomes(condition.of, bounds)
        return (inner & NULL) | (TRUE if inner & FALSE else 0) | (FALSE if inner & TRUE else 0)
    if isinstance(condition, Both | Either):
        left, right = outcomes(condition.left, bounds), outcomes(condition.right, bounds)
        # of Kleene's three values the strongest wins: `and` FALSE before NULL before TRUE, `or` the reverse
        rank = (FALSE, NULL, TRUE) if isinstance(condition, Both) else (TRUE, NULL, FALSE)
        found = 0
        for one, other in itertools.product(rank, rank):
            if left & one and right & other:
                found |= min(one, other, key=rank.index)
        return found
    known = bounds(condition.column)
    if known is None:
        return TRUE | FALSE | NULL
    if isinstance(condition, IsNull):
        return (TRUE if known.nulls != 0 else 0) | (FALSE if known.nulls != known.rows else 0)
    if known.nulls is not None and known.nulls == known.rows:
        return NULL
    null = 0 if known.nulls == 0 else NULL
    if known.low is None or known.high is None:
        return TRUE | FALSE | null
    # NaN is in no footer: it equals nothing and is less than nothing
    nan = isinstance(known.low, float)
    if isinstance(condition, In):
        true = any(known.low <= value <= known.high for value in condition.values)
        false = nan or known.low != known.high or known.low not in condition.values
    else:
        true, false = _comparison_outcomes(condition.op, known.low, known.high, condition.value)
        true, false = (true or nan, false) if condition.op == "!=" else (true, false or nan)
    return (TRUE if true else 0) | (FALSE if false else 0) | null


def _comparison_outcomes(op: str, low: Any, high: Any, value: Any) -> tuple[bool, bool]:
    """(can be true, can be false) for low <= column <= high."""
    if op in ("==", "!="):
        equal, different = low <= value <= high, not low == high == value
        return (equal, different) if op == "==" else (different, equal)
    if op in ("<", "<="):
        compare = operator.lt if op == "<" else operator.le
        return bool(compare(low, value)), not compare(high, value)
    compare = operator.gt if op == ">" else operator.ge
    return bool(compare(high, value)), not compare(low, value)


_KERNELS = {
    "<": pc.less,
    "<=": pc.less_equal,
    ">": pc.greater,
    ">=": pc.greater_equal,
    "==": pc.equal,
    "!=": pc.not_equal,
}


def mask(condition: Condition, batch: pa.RecordBatch) -> pa.BooleanArray:
    """True for the rows of the batch that stay, False for the others (never null). The condition must be bound.

    >>> batch = pa.RecordBatch.from_pydict({"x": [1, None, 7]})
    >>> mask(Compare("x", "<", 5), batch).to_pylist()
    [True, False, False]
    """
    return pc.fill_null(_truth(condition, batch), False)


def _truth(condition: Condition, batch: pa.RecordBatch) -> pa.BooleanArray:
    if isinstance(condition, Not):
        return pc.invert(_truth(condition.of, batch))
    if isinstance(condition, Both):
        return pc.and_kleene(_truth(condition.left, batch), _truth(condition.right, batch))
    if isinstance(condition, Either):
        return pc.or_kleene(_truth(condition.left, batch), _truth(condition.right, batch))
    column = batch.column(condition.column)
    if isinstance(condition, IsNull):
        return column.is_null()
    if pa.types.is_null(column.type):
        return pa.nulls(len(column), pa.bool_())
    type_ = _value_type(column.type)
    if isinstance(condition, Compare):
        return _KERNELS[condition.op](column.cast(type_), pa.scalar(condition.value, type_))
    # is_in compares bits, so that it would tell -0.0 from 0.0
    both_zeros = (0.0, -0.0) if pa.types.is_floating(type_) and 0.0 in condition.values else ()
    found = pc.is_in(column.cast(type_), value_set=pa.array((*condition.values, *both_zeros), type_))
    return pc.if_else(column.is_valid(), found, pa.scalar(None, pa.bool_()))


def _value_type(type_: pa.DataType) -> pa.DataType:
    """The type in which a column is compared: wide enough for the column and for the bound value."""
    if pa.types.is_integer(type_):
        return type_ if type_ == pa.uint64() else pa.int64()
    if pa.types.is_floating(type_):
        return pa.float64()
    if pa.types.is_date(type_):
        return pa.date32()
    if pa.types.is_timestamp(type_) and type_.unit in ("s", "ms"):
        return pa.timestamp("us", type_.tz)
    return type_
