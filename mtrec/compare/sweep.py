"""Preference sweeps: one variant of a comparison for each preference, so that the report can draw the front they reach.

    variants:
      static: {preference: [{click: 3, dwell: 1}, {click: 1, dwell: 1}, {click: 1, dwell: 3}]}
      cagrad: {set: {balancing.kind: cagrad}, preference: [...]}

The method's `preference` is set; of a method of fixed weights (static, scheduled) its `weights`, scaled to the number of tasks
(`balancing.normalize`), so that only their ratios change and not the step.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from mtrec.balancing import BALANCERS
from mtrec.experiment import Experiment
from mtrec.kinds import nearest, option_types, resolve

OPTIONS = ("preference", "weights")


def option_of(kind: str) -> str | None:
    """The option of a balancing method that holds a preference; None where it has none.

    >>> option_of("cagrad"), option_of("static"), option_of("pcgrad")
    ('preference', 'weights', None)
    """
    known = option_types(resolve(kind, BALANCERS, "balancing.kind"))
    return next((option for option in OPTIONS if option in known), None)


def points(
    name: str, preferences: Sequence[Mapping[str, float]], changes: Mapping[str, Any], experiment: Experiment, place: str
) -> dict[str, tuple[dict[str, Any], dict[str, float]]]:
    """{name of a point: (its changes of the base, {task: preference})}; its name ends in the preference of each task.

    Args:
        name: of the swept variant; `changes`: its `set`; `experiment`: the variant without a preference.
        place: the YAML path of the preferences.

    Raises ValueError naming that path for a method without preference, a task that is not there, a preference named twice.
    """
    kind = experiment.balancing.kind
    option = option_of(kind)
    if option is None:
        able = [each for each in BALANCERS if option_of(each)]
        raise ValueError(f"`{place}`: the balancing method {kind} has no preference. Methods that have one: {', '.join(able)}.")
    if option in experiment.balancing.options:
        raise ValueError(f"`{place}` sets `balancing.{option}`, which the variant has already. Leave out one of them.")
    tasks = [task for task, each in experiment.tasks.items() if not each.auxiliary]
    found: dict[str, tuple[dict[str, Any], dict[str, float]]] = {}
    for index, preference in enumerate(preferences):
        for task in preference:
            if task not in tasks:
                raise ValueError(
                    f"`{place}.{index}.{task}` should name a task ({', '.join(tasks)}). Found '{task}'.{nearest(task, tasks)}"
                )
        whole = {task: float(preference.get(task, 1.0)) for task in tasks}
        point = f"{name}-{'-'.join(f'{value:g}' for value in whole.values())}"
        if point in found:
            raise ValueError(f"`{place}.{index}` should differ from the others. Found {dict(preference)} twice.")
        made = {**changes, f"balancing.{option}": whole}
        if option == "weights" and "normalize" not in experiment.balancing.options:
            made["balancing.normalize"] = True
        found[point] = (made, whole)
    return found
