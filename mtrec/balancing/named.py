"""Options that name tasks, such as `preference: {click: 1, dwell: 3}`, as a tensor in the order of the tasks."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mtrec.kinds import nearest


def per_task(values: Mapping[str, float] | None, tasks: Sequence[str], option: str, default: float = 1.0) -> Tensor:
    """(K,) float64: the value of each task, `default` where none is given.

    Raises ValueError naming `balancing.<option>.<task>` where there is no such task.

    >>> per_task({"dwell": 3.0}, ["click", "dwell"], "preference")
    tensor([1., 3.], dtype=torch.float64)
    """
    given = dict(values or {})
    for name in given:
        if name not in tasks:
            raise ValueError(
                f"`balancing.{option}.{name}` should name a task ({', '.join(tasks)}). Found '{name}'."
                f"{nearest(name, tasks)}"
            )
    return torch.tensor([given.get(task, default) for task in tasks], dtype=torch.float64)


def task_index(name: str, tasks: Sequence[str], option: str) -> int:
    """The position of the task that `balancing.<option>` names.

    >>> task_index("dwell", ["click", "dwell"], "primary")
    1
    """
    if name not in tasks:
        raise ValueError(
            f"`balancing.{option}` should name a task ({', '.join(tasks)}). Found '{name}'.{nearest(name, tasks)}"
        )
    return list(tasks).index(name)
