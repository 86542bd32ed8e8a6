"""Tasks: heads, losses per row, predictions in natural units, and which rows count.

    finite.py        arithmetic that stays finite at any logit
    huber.py         the constant prediction of least Huber loss
    task.py          the protocol a task satisfies; write yours against it
    binary.py        click, conversion: one logit, p = sigmoid(logit)
    dwell.py         seconds; dwell_losses.py holds its seven losses
    regression.py    a number
    multiclass.py    one class of several
    objectives.py    all tasks together: `given`, masks, the entire space, prediction columns, base rates

A task of your own needs no line here: `kind: my_module:MyTask` in the experiment file.
"""

from mtrec.kinds import Kinds
from mtrec.tasks.binary import Binary
from mtrec.tasks.dwell import Dwell
from mtrec.tasks.dwell_losses import DWELL_LOSSES, DwellLoss
from mtrec.tasks.multiclass import Multiclass
from mtrec.tasks.objectives import Objectives, TaskSpec, automatic_weight
from mtrec.tasks.regression import Regression
from mtrec.tasks.task import LabelRange, Task

__all__ = [
    "DWELL_LOSSES",
    "TASKS",
    "Binary",
    "Dwell",
    "DwellLoss",
    "LabelRange",
    "Multiclass",
    "Objectives",
    "Regression",
    "Task",
    "TaskSpec",
    "automatic_weight",
]

TASKS = Kinds(
    {"binary": Binary, "dwell": Dwell, "regression": Regression, "multiclass": Multiclass},
    ("loss", "predict", "log_prediction", "initial_bias", "prediction_names"),
)
