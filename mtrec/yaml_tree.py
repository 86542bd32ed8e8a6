"""YAML text -> a tree of plain values: doubled keys are errors, 1e-3 is a number, dates stay text, `${NAME}` is expanded."""

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import yaml


class _Loader(yaml.SafeLoader):
    """YAML 1.1 with repairs: keys are text (`on` is no truth value), none stands twice, and 1e-3 is a number."""


def _mapping(loader: _Loader, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
    seen: dict[Any, int] = {}
    for key_node, _ in node.value:
        if not isinstance(key_node, yaml.ScalarNode):
            raise ValueError(
                f"Line {key_node.start_mark.line + 1}: a key should be a word. Found a {key_node.id}: a template such as "
                "{{ ds }} that was not rendered? Text with braces stands in quotes."
            )
        key = key_node.value
        if key in seen and key != "<<":
            raise ValueError(
                f"Line {key_node.start_mark.line + 1}: the key `{key}` stands twice in one mapping (first in line {seen[key]})."
            )
        seen[key] = key_node.start_mark.line + 1
    loader.flatten_mapping(node)
    return {key_node.value: loader.construct_object(value_node, deep=True) for key_node, value_node in node.value}


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?([eE][-+]?[0-9]+)$"), list("-+0123456789")
)
# dates stay text: they are compared with partition values and written back as they came
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in _Loader.yaml_implicit_resolvers.items()
}


def read_yaml(text: str, place: str, keys: Iterable[str] = ("data", "features", "tasks")) -> dict[str, Any]:
    """A YAML mapping as plain values; `keys`: the file's own, for the message. Raises ValueError naming the file and the line.

    >>> read_yaml("a: 1e-3", "x.yaml")
    {'a': 0.001}
    >>> read_yaml("a: {b: 1, b: 2}", "x.yaml")
    Traceback (most recent call last):
    ValueError: x.yaml: Line 1: the key `b` stands twice in one mapping (first in line 1).
    """
    try:
        tree = yaml.load(text, Loader=_Loader)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise ValueError(f"{place}: {where}not readable as YAML: {getattr(error, 'problem', None) or error}.") from None
    except RecursionError:
        raise ValueError(f"{place}: the YAML is nested too deeply.") from None
    if not isinstance(tree, dict):
        raise ValueError(
            f"{place}: should be a YAML mapping with keys such as {', '.join(keys)}. Found {type(tree).__name__}."
        )
    return tree


@contextmanager
def naming(place: str) -> Iterator[None]:
    """Around checks: what they raise as ValueError begins with the place (a file, say), which precedes several lines on its own.

    >>> with naming("x.yaml"):
    ...     raise ValueError("`seed` should be an integer. Found a.")
    Traceback (most recent call last):
    ValueError: x.yaml: `seed` should be an integer. Found a.
    """
    try:
        yield
    except ValueError as error:
        text = str(error)
        separator = "\n" if "\n" in text else " "
        raise ValueError(f"{place}:{separator}{text}") from error


@contextmanager
def naming_keys(path: str | Path, overrides: Sequence[str] | None = None) -> Iterator[None]:
    """Around what an experiment is used for: those of its ValueErrors that begin with a key of it begin with its file, too.

    `--set` is named where one of `overrides` (`key.path=value`) states that key, a part of it, or what it is a part of.

    >>> with naming_keys("x.yaml", ["data.train=b", "seed=1"]):
    ...     raise ValueError("`data.train.path` names nothing. Found 'b'.")
    Traceback (most recent call last):
    ValueError: x.yaml with --set: `data.train.path` names nothing. Found 'b'.
    >>> with naming_keys("x.yaml", ["seed=1"]):
    ...     raise ValueError("`data.train` should have a column 'click'. Found none in 'a.parquet'.")
    Traceback (most recent call last):
    ValueError: x.yaml: `data.train` should have a column 'click'. Found none in 'a.parquet'.
    """
    try:
        yield
    except ValueError as error:
        key = re.match(r"`([^`]*)`", str(error))
        stated = [override.partition("=")[0].strip() for override in overrides or ()]
        overridden = key is not None and any(_one_holds_the_other(key[1], each) for each in stated)
        with naming(f"{path} with --set" if overridden else str(path)) if key is not None else nullcontext():
            raise


def _one_holds_the_other(first: str, second: str) -> bool:
    return f"{first}.".startswith(f"{second}.") or f"{second}.".startswith(f"{first}.")


def expand(value: Any, place: str) -> Any:
    """A tree with `${NAME}` replaced by the environment variable, in every string. ValueError naming the YAML path if unset.

    >>> expand({"a": ["x"]}, "")
    {'a': ['x']}
    """
    if isinstance(value, dict):
        return {key: expand(below, f"{place}.{key}" if place else str(key)) for key, below in value.items()}
    if isinstance(value, list):
        return [expand(below, f"{place}.{index}") for index, below in enumerate(value)]
    if not isinstance(value, str):
        return value

    def variable(match: re.Match[str]) -> str:
        found = os.environ.get(match[1])
        if found is None:
            raise ValueError(f"`{place}` uses ${{{match[1]}}}, but the environment variable {match[1]} is not set.")
        return found

    return re.sub(r"\$\{(\w+)\}", variable, value)
