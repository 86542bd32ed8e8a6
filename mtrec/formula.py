"""The ranking formula, such as `p_click * p_conversion**0.5 * log1p(dwell_seconds)`: parsed and checked, never run as code.

    formula  = numbers, names of predictions (in `backticks` where they hold other than letters, digits and _), + - * / **,
               parentheses, and
               log, log1p, exp, expm1, sqrt, abs (of one), min, max (of two or more), clip(x, low, high)

Computed in float64, a column at a time. Legend: B rows.
"""

import ast
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce

import numpy as np
import numpy.typing as npt

from mtrec.experiment import Experiment
from mtrec.kinds import nearest
from mtrec.model import task_specs
from mtrec.tasks import Objectives

Floats = npt.NDArray[np.float64]

SCORE = "score"  # the column that a formula makes
MAX_LENGTH = 1_000  # characters: nothing that ranks is longer, and the parser's own limits are never met
MAX_DEPTH = 50

_OPERATORS: dict[type, Callable[[Floats, Floats], Floats]] = {
    ast.Add: np.add,
    ast.Sub: np.subtract,
    ast.Mult: np.multiply,
    ast.Div: np.divide,
    ast.Pow: np.power,
}
_OF_ONE: dict[str, Callable[[Floats], Floats]] = {
    "log": np.log,
    "log1p": np.log1p,
    "exp": np.exp,
    "expm1": np.expm1,
    "sqrt": np.sqrt,
    "abs": np.abs,
}
_OF_SEVERAL: dict[str, Callable[[Floats, Floats], Floats]] = {"min": np.minimum, "max": np.maximum}
FUNCTIONS = (*_OF_ONE, *_OF_SEVERAL, "clip")


@dataclass(frozen=True)
class Formula:
    """A checked formula: `text` as it was written, `names` of the predictions that it reads, in order."""

    text: str
    names: tuple[str, ...]
    _tree: ast.expr

    def __call__(self, columns: Mapping[str, npt.ArrayLike]) -> Floats:
        """(B,) values from columns (B,). What is undefined (log of 0, division by 0) is NaN or infinite, without a warning."""
        values = {name: np.asarray(columns[name], np.float64) for name in self.names}
        with np.errstate(all="ignore"):
            return _value(self._tree, values)


def parse_formula(text: str, predictions: Sequence[str], place: str) -> Formula:
    """The formula over the columns `predictions` that `text` states.

    Raises ValueError naming `place`, what is not allowed, and the nearest name of a misspelt one.

    >>> formula = parse_formula("p_click * max(p_buy, 0.1)**0.5", ["p_click", "p_buy"], "scoring.formula")
    >>> formula.names, formula({"p_click": [0.5, 1.0], "p_buy": [0.25, 0.01]}).round(4).tolist()
    (('p_click', 'p_buy'), [0.25, 0.3162])
    >>> parse_formula("p_clik", ["p_click", "p_buy"], "--formula")
    Traceback (most recent call last):
    ...
    ValueError: `--formula` should use the predictions p_click, p_buy. Found 'p_clik'. Did you mean 'p_click'?
    """
    if text.strip() in predictions:
        return _column(text.strip())
    if len(text) > MAX_LENGTH:
        raise ValueError(f"`{place}` should have at most {MAX_LENGTH:,} characters. Found {len(text):,}.")
    quoted = list(dict.fromkeys(re.findall(r"`([^`]+)`", text)))
    bare = re.sub(r"`([^`]+)`", lambda match: f" _{quoted.index(match[1])}_ ", text)
    try:
        tree = _Named(quoted).visit(ast.parse(bare.strip(), mode="eval")).body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        where = f" at position {error.offset}" if isinstance(error, SyntaxError) and error.offset else ""
        raise ValueError(
            f"`{place}` should be an expression such as p_click * log1p(dwell_seconds). Found {text!r}, not readable{where}."
        ) from None
    names: dict[str, None] = {}
    _check(tree, frozenset(predictions), predictions, place, names, 0)
    if not names:
        raise ValueError(f"`{place}` should use at least one of {', '.join(predictions)}. Found {text!r}.")
    return Formula(text.strip(), tuple(names), tree)


class _Named(ast.NodeTransformer):
    """Puts the names that stood in backticks in the places of those that were parsed for them."""

    def __init__(self, quoted: Sequence[str]) -> None:
        self._names = {f"_{number}_": name for number, name in enumerate(quoted)}

    def visit_Name(self, node: ast.Name) -> ast.Name:
        """A name of a prediction, or of none."""
        return ast.copy_location(ast.Name(self._names.get(node.id, node.id), node.ctx), node)


def _column(name: str) -> Formula:
    return Formula(name, (name,), ast.Name(name, ast.Load()))


def prediction_columns(experiment: Experiment, objectives: Objectives) -> tuple[str, ...]:
    """The columns that scoring writes, in order: those of every task that is not auxiliary; the formula's comes after them.

    Raises ValueError where a task's would have the formula's name.
    """
    found: list[str] = []
    for name, spec in objectives.specs.items():
        if not experiment.tasks[name].auxiliary:
            found += spec.task.prediction_names()
            found += objectives.expected_names(name) if spec.given is not None else ()
            if SCORE in found:
                raise ValueError(f"`tasks.{name}` should have another name: '{SCORE}' is the column of the ranking formula.")
    return tuple(found)


def ranking_formula(experiment: Experiment, text: str | None = None) -> Formula:
    """The formula of the column `score`: `text` (--formula), else the experiment's `scoring.formula`.

    Without either it is the first prediction over all rows of the first task that is not auxiliary. Raises ValueError
    naming where the formula stands and what is wrong with it.
    """
    objectives = Objectives(task_specs(experiment))
    columns = prediction_columns(experiment, objectives)
    if not columns:
        raise ValueError("`tasks` should hold a task that is not auxiliary: scoring would write no prediction.")
    given = text if text is not None else experiment.scoring.formula
    if given is not None:
        return parse_formula(given, columns, "scoring.formula" if text is None else "--formula")
    first = next(name for name in objectives.names if not experiment.tasks[name].auxiliary)
    spec = objectives.specs[first]
    names = objectives.expected_names(first) if spec.given is not None else spec.task.prediction_names()
    return _column(names[0])


def _check(node: ast.expr, known: frozenset[str], ordered: Sequence[str], place: str, names: dict[str, None], depth: int) -> None:
    """Everything that is not on the lists above is refused, by its form alone."""
    if depth > MAX_DEPTH:
        raise ValueError(f"`{place}` should nest at most {MAX_DEPTH} deep.")
    below: Sequence[ast.expr] = ()
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float) and not isinstance(node.value, bool):
        if not _is_finite(node.value):
            raise ValueError(f"`{place}` should hold finite numbers. Found {ast.unparse(node)[:40]}.")
    elif isinstance(node, ast.Name):
        if node.id not in known:
            function = node.id in FUNCTIONS
            found = "the name of a function without its brackets." if function else f"'{node.id}'.{nearest(node.id, ordered)}"
            raise ValueError(f"`{place}` should use the predictions {', '.join(ordered)}. Found {found}")
        names[node.id] = None
    elif isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        below = (node.left, node.right)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
        below = (node.operand,)
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.keywords:
        _check_call(node.func.id, len(node.args), place)
        below = node.args
    else:
        raise ValueError(
            f"`{place}` should hold numbers, predictions, + - * / **, brackets and {', '.join(FUNCTIONS)}. "
            f"Found {ast.unparse(node)[:60]!r}."
        )
    for each in below:
        _check(each, known, ordered, place, names, depth + 1)


def _is_finite(value: int | float) -> bool:
    try:
        return bool(np.isfinite(float(value)))
    except OverflowError:  # an integer beyond any float
        return False


def _check_call(name: str, count: int, place: str) -> None:
    if name not in FUNCTIONS:
        raise ValueError(f"`{place}` should use the functions {', '.join(FUNCTIONS)}. Found '{name}'.{nearest(name, FUNCTIONS)}")
    wish = "1 value" if name in _OF_ONE else "2 or more values" if name in _OF_SEVERAL else "3 values: clip(x, low, high)"
    good = count == 1 if name in _OF_ONE else count >= 2 if name in _OF_SEVERAL else count == 3
    if not good:
        raise ValueError(f"`{place}`: {name} should have {wish}. Found {count}.")


def _value(node: ast.expr, values: Mapping[str, Floats]) -> Floats:
    if isinstance(node, ast.Constant):
        assert isinstance(node.value, int | float)
        return np.float64(node.value)  # type: ignore[return-value]  # broadcasts as an array would
    if isinstance(node, ast.Name):
        return values[node.id]
    if isinstance(node, ast.BinOp):
        return _OPERATORS[type(node.op)](_value(node.left, values), _value(node.right, values))
    if isinstance(node, ast.UnaryOp):
        operand = _value(node.operand, values)
        return -operand if isinstance(node.op, ast.USub) else operand
    assert isinstance(node, ast.Call)
    assert isinstance(node.func, ast.Name)
    found = [_value(each, values) for each in node.args]
    if node.func.id in _OF_ONE:
        return _OF_ONE[node.func.id](found[0])
    if node.func.id in _OF_SEVERAL:
        return reduce(_OF_SEVERAL[node.func.id], found)
    return np.minimum(np.maximum(found[0], found[1]), found[2])
