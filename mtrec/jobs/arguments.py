"""The arguments of a command, parsed and written again: what was typed on the laptop becomes what runs in the job."""

from collections.abc import Mapping, Sequence
from typing import Any


def parsed(command: Any, arguments: Sequence[str]) -> dict[str, Any]:
    """{parameter: value} of `arguments`, as the command (of typer's kind) reads them; nothing is run.

    Raises the command line's own usage error.
    """
    values: dict[str, Any] = command.make_context(command.name, list(arguments)).params
    return values


def written(command: Any, values: Mapping[str, Any]) -> list[str]:
    """The arguments that make `command` read `values`; what equals the default is left out."""
    positional, options = [], []
    for parameter in command.params:
        value = values.get(parameter.name)
        if parameter.param_type_name == "argument":
            positional += [str(each) for each in (value or () if parameter.nargs != 1 else [value]) if each is not None]
        elif value is None or value == parameter.default or value == []:
            continue
        elif parameter.is_flag:
            options.append(parameter.opts[0] if value else parameter.secondary_opts[0])
        else:
            for each in value if parameter.multiple else [value]:
                options += [parameter.opts[0], str(each)]
    return [*positional, *options]
