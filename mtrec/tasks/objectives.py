"""All tasks of an experiment together: `given`, which rows count, losses, prediction columns, base rates.

A task with `given: click` models p(. | click). A chain of such tasks is a funnel, root first: click -> cart -> buy. A
link counts as 1 only where the links before it do; one observed 0 settles all that follows, whatever is unobserved.
B rows of this rank, K tasks, C logits of a head, G tasks that one is given, N rows of a sample.
"""

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from mtrec.kinds import nearest
from mtrec.tasks.finite import bounded
from mtrec.tasks.task import Task

Space = Literal["observed", "entire"]


@dataclass(frozen=True)
class TaskSpec:
    """A task and where it is trained.

    `given`: the binary task this one is conditional on. `space`: `observed` trains it on the rows where `given` is
    observed and 1; `entire` (binary tasks only) trains p(given) p(task | given) on all rows, so that there is no
    selection bias (ESMM).
    """

    task: Task
    given: str | None = None
    space: Space = "observed"


class Objectives:
    """Losses, masks and predictions of several tasks, in the order given.

    Raises ValueError where a `given` names no task, a task that is not binary, or leads in a circle; where the space
    `entire` is asked of a task that is not binary or has no `given`; where two tasks predict the same column.

    Source of the entire space: Ma et al. (2018), ESMM. Deviations: chains of any length, and the log form
    log(1 - p) = logaddexp(ls(-a), ls(a) + log(1 - rest)), ls = logsigmoid, which is finite at any logits.

    >>> from mtrec.tasks import Binary, Dwell
    >>> objectives = Objectives({
    ...     "click": TaskSpec(Binary("click")),
    ...     "conversion": TaskSpec(Binary("conversion"), given="click", space="entire"),
    ...     "dwell": TaskSpec(Dwell("dwell", loss="poisson"), given="click"),
    ... })
    >>> nan = float("nan")
    >>> labels = {"click": torch.tensor([1.0, 0.0]), "conversion": torch.tensor([1.0, nan]),
    ...           "dwell": torch.tensor([2.0, 3.0])}
    >>> loss_BK, mask_BK = objectives.losses({name: torch.zeros(2, 1) for name in labels}, labels)
    >>> loss_BK
    tensor([[0.6931, 1.3863, 0.3863],
            [0.6931, 0.2877, 0.0000]])
    >>> mask_BK.tolist()
    [[True, True, True], [True, True, False]]
    >>> objectives.prediction_names()
    ('p_click', 'p_conversion', 'p_conversion_and_click', 'dwell_seconds', 'dwell_seconds_expected')
    """

    def __init__(self, tasks: Mapping[str, TaskSpec]) -> None:
        self.specs = dict(tasks)
        self.names = tuple(self.specs)
        if not self.specs:
            raise ValueError("`tasks` should hold at least one task. Found none.")
        for name, spec in self.specs.items():
            _check_task(name, spec.task)
        self.chains = {name: self._find_chain(name) for name in self.names}
        for name, spec in self.specs.items():
            self._check_space(name, spec)
        self._check_prediction_names()

    def losses(self, logits: Mapping[str, Tensor], labels: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """(loss_BK, mask_BK) of logits {task: (B, C)} and labels {task: (B,)}, where NaN is unobserved.

        A masked row has loss 0 and a gradient of exactly 0, whatever its label.
        """
        target_BK = self.targets(labels)
        return self.losses_at(logits, target_BK), ~target_BK.isnan()

    def losses_at(self, logits: Mapping[str, Tensor], target_BK: Tensor) -> Tensor:
        """loss_BK, of the `targets` of the same rows."""
        masked_BK = target_BK.isnan()
        losses = []
        for (name, spec), target_B, masked_B in zip(self.specs.items(), target_BK.unbind(1), masked_BK.unbind(1), strict=True):
            # of what is masked, NaN would come back through the gradient of the loss; an allowed label does not
            allowed_B = target_B.masked_fill(masked_B, _allowed_label(spec.task))
            if spec.space == "entire":
                losses.append(self._entire_loss(name, logits, allowed_B))
            else:
                losses.append(spec.task.loss(logits[name], allowed_B))
        return torch.stack(losses, dim=1).masked_fill(masked_BK, 0.0)

    def targets(self, labels: Mapping[str, Tensor]) -> Tensor:
        """target_BK: the labels that the losses see, NaN where the row does not count for the task."""
        return torch.stack([self.target(name, labels) for name in self.names], dim=1)

    def target(self, name: str, labels: Mapping[str, Tensor]) -> Tensor:
        """(B,) labels the loss of a task sees, NaN where the row does not count."""
        if self.specs[name].space == "entire":
            return self.joint_label(name, labels)
        return self.reached_label(name, labels)

    def reached_label(self, name: str, labels: Mapping[str, Tensor]) -> Tensor:
        """(B,) labels of a task where all it is given has happened, NaN elsewhere: what its own prediction is held against."""
        if not self.chains[name]:
            return labels[name]
        return torch.where(self.reached(name, labels) == 1.0, labels[name], math.nan)

    def joint_label(self, name: str, labels: Mapping[str, Tensor]) -> Tensor:
        """(B,) labels of a task over all rows: 0 where what it is given did not happen, NaN where that is not settled."""
        return _and(self.reached(name, labels), labels[name]) if self.chains[name] else labels[name]

    def reached(self, name: str, labels: Mapping[str, Tensor]) -> Tensor:
        """(B,) 1 where all that the task is given has happened, 0 where not, NaN where unknown; 1 without a `given`."""
        links = [labels[link] for link in self.chains[name]]
        return functools.reduce(_and, links) if links else torch.ones_like(labels[name])

    def predictions(self, logits: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """{column: (B,)} in natural units, in the order of `prediction_names`.

        A task with a `given` also gets its value over all rows: `p_conversion_and_click` = p(click) p(conversion |
        click), for a longer chain `p_buy_and_cart_and_click`; `dwell_seconds_expected` = p(click) dwell_seconds.
        """
        columns: dict[str, Tensor] = {}
        for name, spec in self.specs.items():
            prediction = spec.task.predict(logits[name])
            own = prediction.unbind(1) if prediction.dim() == 2 else (prediction,)
            columns.update(zip(spec.task.prediction_names(), own, strict=True))
            if spec.given is not None:
                links_GB = torch.stack([bounded(logits[link][:, 0]) for link in self.chains[name]])
                given_B = F.logsigmoid(links_GB).sum(0).exp()
                columns.update(zip(self.expected_names(name), [given_B * column for column in own], strict=True))
        return columns

    def log_predictions(self, logits: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """{task: (B,)} predictions of log1p(label), for the tasks whose head has a log-scale output."""
        found = {name: spec.task.log_prediction(logits[name]) for name, spec in self.specs.items()}
        return {name: prediction for name, prediction in found.items() if prediction is not None}

    def prediction_names(self) -> tuple[str, ...]:
        """The columns of `predictions`, without computing any."""
        return tuple(
            column
            for name, spec in self.specs.items()
            for column in spec.task.prediction_names() + (self.expected_names(name) if spec.given is not None else ())
        )

    def initial_bias(self, name: str, mean: float, sample_N: Tensor) -> Tensor:
        """(C,) constant logits that predict the base rate; `mean` and sample of the labels where `given` is 1."""
        bias_C = self.specs[name].task.initial_bias(mean, sample_N).float()
        assert bias_C.shape == (self.specs[name].task.num_logits,), (name, bias_C.shape)
        return bias_C

    def base_loss(self, name: str, mean: float, sample_N: Tensor) -> float:
        """Mean loss of predicting the base rate: L0. `mean` and sample are of `target`, the labels the loss sees.

        Of binary tasks it is the entropy of `mean`, so a sample that lacks the rare class does no harm.
        """
        task = self.specs[name].task
        if task.family == "binary":
            rate = min(max(mean, 1e-6), 1.0 - 1e-6)
            return -rate * math.log(rate) - (1.0 - rate) * math.log1p(-rate)
        bias_C = self.initial_bias(name, mean, sample_N)
        logits_NC = bias_C.expand(len(sample_N), task.num_logits)
        return float(task.loss(logits_NC, sample_N.float()).double().mean())

    def _entire_loss(self, name: str, logits: Mapping[str, Tensor], joint_B: Tensor) -> Tensor:
        """-log p of the joint label, p the product of the sigmoids along the chain."""
        links = [bounded(logits[link][:, 0]) for link in (*self.chains[name], name)]
        log_p_B = F.logsigmoid(links[-1])
        log_not_p_B = F.logsigmoid(-links[-1])
        for logit_B in reversed(links[:-1]):
            log_not_p_B = torch.logaddexp(F.logsigmoid(-logit_B), F.logsigmoid(logit_B) + log_not_p_B)
            log_p_B = F.logsigmoid(logit_B) + log_p_B
        return -(joint_B * log_p_B + (1.0 - joint_B) * log_not_p_B)

    def expected_names(self, name: str) -> tuple[str, ...]:
        """The columns of a task's value over all rows, for a task with a `given`."""
        task = self.specs[name].task
        if task.family in ("binary", "multiclass"):
            ending = "".join(f"_and_{link}" for link in reversed(self.chains[name]))
        else:
            ending = "_expected"
        return tuple(column + ending for column in task.prediction_names())

    def _find_chain(self, name: str) -> tuple[str, ...]:
        """What a task is given, root first; () without a `given`."""
        path = [name]
        while (given := self.specs[path[-1]].given) is not None:
            place = f"`tasks.{path[-1]}.given`"
            if given not in self.specs:
                hint = nearest(given, self.names)
                raise ValueError(f"{place} should name a task ({', '.join(self.names)}). Found '{given}'.{hint}")
            if given in path:
                circle = " -> ".join([*path[path.index(given) :], given])
                raise ValueError(f"{place} should not lead back to where it started. Found {circle}.")
            family = self.specs[given].task.family
            if family != "binary":
                raise ValueError(f"{place} should name a binary task. Found '{given}', a task of the family {family}.")
            path.append(given)
        return tuple(reversed(path[1:]))

    def _check_space(self, name: str, spec: TaskSpec) -> None:
        if spec.space == "observed":
            return
        if spec.given is None:
            raise ValueError(
                f"`tasks.{name}.space` should be left out where there is no `tasks.{name}.given`. Found '{spec.space}'."
            )
        if spec.task.family != "binary":
            raise ValueError(
                f"`tasks.{name}.space` should be 'observed' for a task that is not binary: only a probability can be "
                f"multiplied with p({spec.given}) in the loss. Found '{spec.space}'; a column "
                f"{self.expected_names(name)[0]} is predicted anyway."
            )

    def _check_prediction_names(self) -> None:
        owners: dict[str, str] = {}
        for name, spec in self.specs.items():
            for column in spec.task.prediction_names() + (self.expected_names(name) if spec.given is not None else ()):
                if column in owners:
                    raise ValueError(
                        f"`tasks.{name}` should predict columns of its own. Found '{column}', which "
                        f"`tasks.{owners[column]}` predicts too: rename one of the two."
                    )
                owners[column] = name


def automatic_weight(base_loss: float) -> float:
    """`weight: auto`: 1 / (2 x the loss of predicting the base rate), clipped to [0.2, 5].

    A likelihood of a density (ZILN) may be negative; as any small loss, it gets 5.

    >>> automatic_weight(0.25), automatic_weight(0.01), automatic_weight(-1.0), automatic_weight(50.0)
    (2.0, 5.0, 5.0, 0.2)
    """
    return 5.0 if base_loss <= 0.1 else max(0.5 / base_loss, 0.2)


def _and(reached_B: Tensor, label_B: Tensor) -> Tensor:
    """Three-valued and: an observed 0 on either side settles it, else NaN is contagious."""
    return torch.where((reached_B == 0.0) | (label_B == 0.0), 0.0, reached_B * label_B)


def _allowed_label(task: Task) -> float:
    """The label nearest to 0 within the task's range."""
    low, high, _ = task.label_range
    return min(max(0.0, low if low is not None else 0.0), high if high is not None else math.inf)


def _check_task(name: str, task: object) -> None:
    members = ("name", "family", "num_logits", "label_range", "label_scale", "loss", "predict", "log_prediction")
    missing = [m for m in (*members, "initial_bias", "prediction_names") if not hasattr(task, m)]
    if missing:
        raise ValueError(
            f"`tasks.{name}.kind` should be a class with the members of mtrec.tasks.Task. Found "
            f"{type(task).__name__}, which lacks {', '.join(missing)}."
        )
