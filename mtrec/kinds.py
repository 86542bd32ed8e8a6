"""Kinds: a YAML `kind:` names a class; its options are the class's keyword-only parameters.

Positional parameters of `__init__` come from the house (dimensions, task names); keyword-only ones are what a user may
write beside `kind:`. So a new architecture, task, balancer or feature needs no line of configuration code, inside the
package (an entry in its module's dictionary) or outside of it (`kind: my_module:MyClass`).
"""

import difflib
import functools
import importlib
import inspect
import re
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Annotated, Any

import pydantic
from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic import AllowInfNan, BeforeValidator
from pydantic_core import PydanticCustomError


def _no_bool(value: Any) -> Any:
    """Python takes true for 1, and YAML takes `yes` for true."""
    if isinstance(value, bool):
        raise PydanticCustomError("a_number", "Input should be a number")
    return value


_A_NUMBER = BeforeValidator(_no_bool)  # after the bounds, which a JSON Schema would lack otherwise
_FINITE = AllowInfNan(False)
PositiveInt = Annotated[int, Ge(1), _A_NUMBER]
TwoOrMore = Annotated[int, Ge(2), _A_NUMBER]
NonNegativeInt = Annotated[int, Ge(0), _A_NUMBER]
PositiveFloat = Annotated[float, Gt(0.0), _FINITE, _A_NUMBER]
NonNegativeFloat = Annotated[float, Ge(0.0), _FINITE, _A_NUMBER]
Fraction = Annotated[float, Ge(0.0), Lt(1.0), _FINITE, _A_NUMBER]
Probability = Annotated[float, Ge(0.0), Le(1.0), _FINITE, _A_NUMBER]
Widths = tuple[PositiveInt, ...]
NonEmptyWidths = Annotated[tuple[PositiveInt, ...], MinLen(1)]


def nearest(word: str, words: Iterable[str]) -> str:
    """A hint `Did you mean 'x'?` (with a leading blank), or nothing where no word is close, or where it is one of the words.

    >>> nearest("num_expert", ["num_experts", "expert_layers"])
    " Did you mean 'num_experts'?"
    >>> nearest("zzz", ["num_experts"])
    ''
    """
    close = difflib.get_close_matches(word, list(words), n=1, cutoff=0.6)
    return f" Did you mean '{close[0]}'?" if close and close[0] != word else ""


def counted(count: int, noun: str) -> str:
    """A number and what it counts, as messages say it.

    >>> counted(1, "other file"), counted(1_200, "row")
    ('1 other file', '1,200 rows')
    """
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


class Kinds(dict[str, type]):
    """{kind: class}; `members`: what a class named by an import path must have, too, to stand among them."""

    def __init__(self, known: Mapping[str, type], members: tuple[str, ...]) -> None:
        super().__init__(known)
        self.members = members


def check_members(found: Any, members: Iterable[str], kind: str, place: str) -> None:
    """Raises ValueError naming `place` where the class of a kind, or an object of it, lacks some of the members it needs.

    >>> check_members(int, ["to_bytes", "forward"], "builtins:int", "model.architecture.kind")
    Traceback (most recent call last):
    ValueError: `model.architecture.kind` should name a class with to_bytes, forward. Found 'builtins:int' without forward.
    """
    missing = [name for name in members if not hasattr(found, name)]
    if missing:
        raise ValueError(
            f"`{place}` should name a class with {', '.join(members)}. Found '{kind}' without {', '.join(missing)}."
        )


def resolve(kind: str, known: Mapping[str, type], place: str) -> type:
    """The class that `kind` names: a key of `known`, or an import path `module:Class`.

    Raises ValueError naming `place` (a YAML path) where there is no such kind, or its class lacks what all `Kinds` have.

    >>> resolve("int", {"int": int}, "features.age.kind")
    <class 'int'>
    """
    if kind in known:
        return known[kind]
    if ":" not in kind:
        raise ValueError(
            f"`{place}` should be one of {', '.join(sorted(known))}, or an import path module:Class. "
            f"Found '{kind}'.{nearest(kind, known)}"
        )
    if not _OWN_KIND.fullmatch(kind):
        raise ValueError(f"`{place}` should name a class as module:Class, such as my_module:MyClass. Found '{kind}'.")
    module_name, _, class_name = kind.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and not module_name.startswith(error.name):
            raise  # the user's module exists and imports something that does not
        raise ValueError(
            f"`{place}` should name an importable class. Found '{kind}', but there is no module '{module_name}' "
            "on the Python path (the folder of the experiment file and the current folder are on it)."
        ) from error
    found = getattr(module, class_name, None)
    if not isinstance(found, type):
        raise ValueError(
            f"`{place}` should name a class. Found '{kind}', but '{module_name}' has no class '{class_name}'."
        )
    check_members(found, known.members if isinstance(known, Kinds) else (), kind, place)
    return found


_OWN_KIND = re.compile(r"[A-Za-z_]\w*(\.\w+)*:[A-Za-z_]\w*")


def own_modules(tree: Any) -> set[str]:
    """The top-level modules of all import paths that stand for a kind, or may (a search's choices), in a tree of plain values.

    >>> sorted(own_modules({"kind": "towers.wide:Own", "loss": "losses:Mine", "space": {"x": {"choice": ["mmoe", "more:Own"]}}}))
    ['losses', 'more', 'towers']
    >>> own_modules({"kind": "mmoe", "path": "s3://bucket", "note": "see a:b"})
    set()
    """
    if isinstance(tree, list | tuple):
        return {name for below in tree for name in own_modules(below)}
    if not isinstance(tree, Mapping):
        return set()
    found = {name for below in tree.values() for name in own_modules(below)}
    named = [each for key in ("kind", "loss", "choice") if key in tree for each in _texts(tree[key])]
    return found | {text.partition(":")[0].partition(".")[0] for text in named if _OWN_KIND.fullmatch(text)}


def _texts(value: Any) -> list[str]:
    return [each for each in (value if isinstance(value, list) else [value]) if isinstance(each, str)]


_ENTRY = re.compile(r"    (\w+(?:, \w+)*)(?: \([^)]*\))?: (.*)")


def option_descriptions(cls: type) -> dict[str, str]:
    """{option: what the class's docstring says of it}, from its sections `Args:` and `Options:`; `a, b: ...` is of both.

    >>> class Mean:
    ...     '''The mean of what lies near.
    ...
    ...     Options:
    ...         width: values on each side; the more,
    ...             the smoother.
    ...     '''
    >>> option_descriptions(Mean)
    {'width': 'values on each side; the more, the smoother.'}
    """
    found: dict[str, str] = {}
    names: list[str] = []
    inside = False
    for line in inspect.cleandoc(cls.__doc__ or "").splitlines():
        entry = _ENTRY.fullmatch(line)
        if line and not line.startswith(" "):
            inside, names = line in ("Args:", "Options:"), []
        elif inside and entry:
            names = entry[1].split(", ")
            found |= dict.fromkeys(names, entry[2])
        elif inside and line:
            found |= {name: f"{found[name]} {line.strip()}" for name in names}
    return found


def option_types(cls: type) -> dict[str, tuple[Any, Any]]:
    """{option: (type, default)} of a kind, read from the keyword-only parameters of its `__init__`; `...` is no default.

    >>> class Mean:
    ...     def __init__(self, input_dim: int, *, width: PositiveInt = 4) -> None: ...
    >>> option_types(Mean)["width"][1]
    4
    """
    init = cls.__init__  # type: ignore[misc]
    hints = typing.get_type_hints(init, include_extras=True)
    return {
        name: (hints.get(name, Any), ... if parameter.default is inspect.Parameter.empty else parameter.default)
        for name, parameter in inspect.signature(init).parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    }


@functools.cache
def options_model(cls: type) -> type[pydantic.BaseModel]:
    """A pydantic model with the options of a kind, which forbids any other key."""
    said = option_descriptions(cls)
    fields: dict[str, Any] = {
        name: (type_, pydantic.Field(default, description=said.get(name))) for name, (type_, default) in option_types(cls).items()
    }
    return pydantic.create_model(
        cls.__name__, __config__=pydantic.ConfigDict(extra="forbid", protected_namespaces=()), **fields
    )


def kind_schema(
    known: Mapping[str, type], house: Mapping[str, Any] | None = None, *, default: str | None = None, short: bool = True
) -> dict[str, Any]:
    """The JSON Schema of a node that names one of the `known` kinds, with its options, or an import path.

    `house`: properties beside the options of every kind; `default`: the kind of a node without `kind`; `short`: the name alone
    may stand for the node.
    """
    own_kind = {"type": "string", "pattern": ":", "description": "import path module:Class"}
    choices: list[dict[str, Any]] = [{"enum": sorted(known)}, own_kind] if short else []
    for name, cls in known.items():
        options = options_model(cls).model_json_schema()
        choices.append(
            {
                "type": "object",
                "title": name,
                "description": " ".join(inspect.cleandoc(cls.__doc__ or "").partition("\n\n")[0].split()),
                "properties": {**(house or {}), **options.get("properties", {}), "kind": {"const": name}},
                "required": [*([] if name == default else ["kind"]), *options.get("required", [])],
                "additionalProperties": False,
            }
        )
    choices.append({"type": "object", "properties": {**(house or {}), "kind": own_kind}, "required": ["kind"]})
    return {"anyOf": choices}


class KindOf:
    """Says of an option that it names a kind itself: `Annotated[str | dict[str, Any], KindOf(DWELL_LOSSES)]`.

    For the JSON Schema alone: the class with that option resolves and checks the kind.
    """

    def __init__(self, known: Mapping[str, type]) -> None:
        self.known = known

    def __get_pydantic_json_schema__(self, core_schema: Any, handler: Any) -> dict[str, Any]:
        return kind_schema(self.known)


def check_options(cls: type, options: Mapping[str, Any], place: str, also_known: Iterable[str] = ()) -> dict[str, Any]:
    """The options, converted to the declared types, defaults filled in.

    Raises ValueError naming `place.option`, what was found and the nearest right name of a misspelt one
    (`also_known` are keys that may stand at `place` beside the options).
    """
    model = options_model(cls)
    try:
        checked = model.model_validate(dict(options))
    except pydantic.ValidationError as error:
        raise ValueError(explain(error, place, model, also_known)) from None
    return {name: getattr(checked, name) for name in model.model_fields}


def explain(
    error: pydantic.ValidationError, place: str, model: type[pydantic.BaseModel], also_known: Iterable[str] = ()
) -> str:
    """A pydantic error in the house's form, a line for each finding: `path` should be ... Found ..."""
    found: dict[tuple[str, str], list[str]] = {}  # {(path, what was found): wishes}; a sentence of its own has none
    for finding in error.errors():
        keys = _yaml_keys(model, finding["loc"])
        path = ".".join(([place] if place else []) + keys)
        if finding["type"] == "extra_forbidden":
            known = [*_keys_at(model, keys[:-1]), *also_known]
            what = f"`{path}` is not a known key.{nearest(keys[-1], known)}"
            what += "" if nearest(keys[-1], known) or not known else f" Known here: {', '.join(sorted(known))}."
        elif finding["type"] == "missing" and isinstance(finding["loc"][-1], int):
            what = f"`{path.rpartition('.')[0]}` should have more entries. Found only {keys[-1]}."
        elif finding["type"] == "missing":
            what = f"`{path}` is missing and has no default."
        elif finding["type"] == "value_error":
            what = str(finding["ctx"]["error"]) if "`" in finding["msg"] else f"`{path}`: {finding['ctx']['error']}"
        else:
            found.setdefault((path, f" Found {finding['input']!r}."), []).append(_wish(finding))
            continue
        found.setdefault((what, ""), [])
    return "\n".join(f"`{what}` should {' or '.join(wishes)}.{end}" if wishes else what for (what, end), wishes in found.items())


def _wish(finding: Any) -> str:
    """What a finding says should be, from its verb on."""
    if finding["type"] == "too_short":
        least = finding["ctx"]["min_length"]
        return f"hold at least {'one entry' if least == 1 else f'{least} entries'}"
    if finding["type"] == "string_too_short":
        return f"hold at least {counted(finding['ctx']['min_length'], 'character')}"
    if finding["type"] in ("dict_type", "model_type", "model_attributes_type"):
        return "be a mapping"
    return f"be {finding['msg'].removeprefix('Input should be ').removeprefix('Value should have ')}"


def _yaml_keys(model: Any, location: tuple[int | str, ...]) -> list[str]:
    """The keys of pydantic's location that stand in the file: of a union it also names the member that did not fit."""
    keys: list[str] = []
    here = model
    for number, key in enumerate(location):
        members = [here]
        while len(members) == 1 and typing.get_origin(members[0]) in (Annotated, typing.Union, types.UnionType):
            parts = typing.get_args(members[0])
            inside = parts[:1] if typing.get_origin(members[0]) is Annotated else parts
            members = [each for each in inside if each is not type(None)]
        if len(members) > 1:
            return [*keys, *map(str, location[number + 1 :])]
        keys.append(str(key))
        here, arguments = members[0], typing.get_args(members[0])
        if isinstance(here, type) and issubclass(here, pydantic.BaseModel):
            here = here.model_fields[str(key)].annotation if str(key) in here.model_fields else Any
        else:
            here = arguments[-1 if isinstance(key, str) else 0] if arguments else Any
    return keys


def _keys_at(model: type[pydantic.BaseModel], keys: list[str]) -> list[str]:
    """The known keys of the model that lies at `keys` below `model`; follows dict values and unions."""
    here: list[type[pydantic.BaseModel]] = [model]
    for key in keys:
        following: list[type[pydantic.BaseModel]] = []
        for parent in here:
            if key in parent.model_fields:
                following += _models_in(parent.model_fields[key].annotation)
        here = following or here
    return [name for parent in here for name in parent.model_fields]


def _models_in(annotation: Any) -> list[type[pydantic.BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, pydantic.BaseModel):
        return [annotation]
    return [model for part in typing.get_args(annotation) for model in _models_in(part)]
