"""Search spaces: {path of the experiment: what it may be}, for the search of a comparison and for `mtrec tune`.

    optimizer.dense.learning_rate: {log_uniform: [1e-4, 1e-2]}
    model.architecture.kind: {choice: [mmoe, ple]}
    model.architecture.num_experts: {int: [2, 8]}       # drawn where the kind has it

A parameter maps a share of [0, 1) to a value (`at`), so that whoever searches needs to know no more than numbers.
"""

import math
from collections.abc import Mapping
from typing import Annotated, Any

import pydantic
from pydantic import BeforeValidator, Field, Strict

from mtrec.balancing import Balancer
from mtrec.config import KNOWN
from mtrec.experiment import Balancing, Section, Task
from mtrec.kinds import option_types, resolve

Number = Annotated[float, Strict()]
Whole = Annotated[int, Strict()]
FORMS = ("uniform", "log_uniform", "int", "log_int", "choice")
EDGE = 0.05  # a value within this share of a range's end lies at its edge


class Parameter(Section):
    """What one path may be: exactly one of the five; a list is short for `choice`. Both ends belong to a range."""

    uniform: tuple[Number, Number] | None = None
    log_uniform: tuple[Number, Number] | None = None
    int: tuple[Whole, Whole] | None = None
    log_int: tuple[Whole, Whole] | None = None
    choice: list[Any] | None = None

    @pydantic.model_validator(mode="after")
    def _one(self) -> "Parameter":
        given = [name for name in FORMS if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"should be one of {', '.join(FORMS)}. Found {', '.join(given) or 'none'}.")
        if self.choice is not None:
            if len(self.choice) < 2 or any(each in self.choice[:index] for index, each in enumerate(self.choice)):
                raise ValueError(f"choice should be at least 2 different values. Found {self.choice!r}.")
            return self
        low, high = self.ends
        if not low < high or not math.isfinite(low) or not math.isfinite(high):
            raise ValueError(f"{given[0]} should be [low, high] with low < high. Found {[low, high]}.")
        if self.log and low <= 0:
            raise ValueError(f"{given[0]} should begin above 0: it is even on a log scale. Found {[low, high]}.")
        return self

    @property
    def log(self) -> bool:
        """Whether the logarithm is drawn evenly."""
        return self.log_uniform is not None or self.log_int is not None

    @property
    def whole(self) -> bool:
        """Whether values are integers."""
        return self.int is not None or self.log_int is not None

    @property
    def ends(self) -> tuple[float, float]:
        """(low, high) of a range."""
        found = self.uniform or self.log_uniform or self.int or self.log_int
        assert found is not None
        return found

    @property
    def extremes(self) -> list[Any]:
        """The values that are checked before anything runs: the ends of a range, all of a choice."""
        return list(self.ends) if self.choice is None else list(self.choice)

    def at(self, share: float) -> Any:
        """The value at a share in [0, 1) of the range: even, or even on a log scale.

        >>> Parameter(log_uniform=(1e-4, 1e-2)).at(0.5)
        0.001
        >>> Parameter(int=(2, 4)).at(0.99), Parameter(choice=["mmoe", "ple"]).at(0.2)
        (4, 'mmoe')
        """
        if self.choice is not None:
            return self.choice[math.floor(share * len(self.choice))]
        low, high = self.ends
        if self.log_int is not None:
            return min(math.floor(low * ((high + 1) / low) ** share), int(high))
        if self.int is not None:
            return int(low) + math.floor(share * (high - low + 1))
        value = math.exp(math.log(low) + share * (math.log(high) - math.log(low))) if self.log else low + share * (high - low)
        return float(f"{min(max(value, low), high):.12g}")


def _from_list(value: Any) -> Any:
    return {"choice": value} if isinstance(value, list) else value


AnyParameter = Annotated[Parameter, BeforeValidator(_from_list, json_schema_input_type=list[Any] | Parameter)]
Space = Annotated[dict[str, AnyParameter], Field(min_length=1)]


def active(space: Mapping[str, Parameter], values: Mapping[str, Any]) -> dict[str, Any]:
    """The values that apply, kinds first: an option of a kind that was not drawn is left out.

    >>> space = {"model.architecture.kind": Parameter(choice=["mmoe", "shared_bottom"]),
    ...          "model.architecture.num_experts": Parameter(int=(2, 8))}
    >>> active(space, {"model.architecture.num_experts": 4, "model.architecture.kind": "shared_bottom"})
    {'model.architecture.kind': 'shared_bottom'}
    """
    kinds = {path: value for path, value in values.items() if path.endswith(".kind")}
    others = {}
    for path, value in values.items():
        above, _, option = path.rpartition(".")
        kind = f"{above}.kind"
        if path in kinds:
            continue
        if kind in space and kind in values:
            known = {each: _options(above, each) for each in space[kind].choice or ()}
            if option not in known.get(values[kind], {option}) and any(option in each for each in known.values()):
                continue
        others[path] = value
    return {**kinds, **others}


def at_edge(space: Mapping[str, Parameter], values: Mapping[str, Any]) -> list[str]:
    """The paths of `values` whose value lies at an end of its range, so that a wider one may hold a better one.

    >>> at_edge({"a": Parameter(int=(2, 8)), "b": Parameter(uniform=(0.0, 1.0))}, {"a": 8, "b": 0.9})
    ['a']
    """
    ranges = {path: space[path] for path in values if space[path].choice is None}
    return [path for path, each in ranges.items() if not EDGE < place_of(each, values[path]) < 1 - EDGE]


def place_of(parameter: Parameter, value: float) -> float:
    """Where a value lies in its range, 0 to 1, on a log scale where the range has one.

    >>> round(place_of(Parameter(log_uniform=(1e-4, 1e-2)), 1e-3), 3)
    0.5
    """
    low, high = parameter.ends
    if parameter.log:
        low, high, value = math.log(low), math.log(high), math.log(value)
    return (value - low) / (high - low)


def _options(above: str, kind: Any) -> set[str]:
    """What may stand beside `kind` at a path; nothing where there is no such kind (which is told when it is set)."""
    parts = above.split(".")
    place = parts[0] if parts[0] in ("features", "tasks") else parts[-1]
    try:
        found = set(option_types(resolve(str(kind), KNOWN.get(place, {}), f"{above}.kind")))
    except ValueError:
        return set()
    if place == "balancing":
        found |= {*option_types(Balancer), *Balancing.model_fields}
    return found | (set(Task.model_fields) if place == "tasks" else set())
