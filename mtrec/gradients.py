"""The tasks' gradients: where they are compared, and what one backward pass a task is used for.

Legend: B rows on this rank, D width of the shared representation, K tasks, P dense parameters, S shared ones of them.

What each place sees:
- `parameters`: gradients of the shared dense parameters over the global batch, the ones that an update adds up.
- `batch_sum`: gradients at x_BD, summed over the rows of the global batch: D numbers a task, cheaper by one third.
- `representation`: gradients at x_BD row by row. Only K x K numbers travel between ranks, but what two tasks want of
  *different* rows is never compared: tasks that conflict in their parameters may read cosine 0 there.
"""

import dataclasses
from collections.abc import Sequence
from contextlib import nullcontext

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mtrec import parallel
from mtrec.architectures.products import backward_to
from mtrec.balancing import make_balancer
from mtrec.experiment import Experiment
from mtrec.model import ANY_WIDTH, DensePart, task_specs


@dataclasses.dataclass(frozen=True)
class TaskGradients:
    """This rank's share of each task's gradient: `dense_KP` by the dense parameters, `x_KBD` (K tensors) by x_BD.

    Where one of them is None, the graph from `leaf_BD` and `parameters` to `share_K` is still there.
    """

    share_K: Tensor
    leaf_BD: Tensor
    parameters: Sequence[nn.Parameter]
    dense_KP: Tensor | None
    x_KBD: list[Tensor] | None

    def weighted(self, weights_K: Tensor) -> tuple[Tensor, Tensor]:
        """(P,) and (B, D): the gradient of weights_K @ losses_K; frees the graph."""
        missing = [*(self.parameters if self.dense_KP is None else ()), *([self.leaf_BD] if self.x_KBD is None else ())]
        taken: list[Tensor] = []
        if missing:
            with backward_to("inputs") if self.dense_KP is not None else nullcontext():
                taken += torch.autograd.grad(torch.dot(weights_K, self.share_K), missing, materialize_grads=True)
        if self.x_KBD is None:
            x_BD = taken.pop()
        else:
            x_BD = self.x_KBD[0] * weights_K[0]
            for weight, gradient_BD in zip(weights_K[1:], self.x_KBD[1:], strict=True):
                x_BD.addcmul_(gradient_BD, weight)
        return _flat(taken) if self.dense_KP is None else weights_K @ self.dense_KP, x_BD


def _flat(gradients: Sequence[Tensor]) -> Tensor:
    return torch.cat([gradient.flatten() for gradient in gradients])


def task_gradients(
    share_K: Tensor, leaf_BD: Tensor, parameters: Sequence[nn.Parameter], *, to_x: bool = True
) -> TaskGradients:
    """Takes one backward pass a task; with all dense parameters in it, their weighted sum is the step's gradient.

    `to_x`: each pass goes down to x_BD, so that no further one is needed. False ends each at the parameters, and one pass at
    the end, without parameters, goes down to x_BD: less work where the widest layers read x_BD itself.
    """
    rows: list[Tensor] = []
    x_KBD: list[Tensor] = []
    for index in range(len(share_K)):
        wanted = [*parameters, leaf_BD] if to_x else [*parameters]
        last = to_x and index + 1 == len(share_K)
        with nullcontext() if to_x else backward_to("parameters"):
            gradients = torch.autograd.grad(share_K[index], wanted, retain_graph=not last, materialize_grads=True)
        rows.append(_flat(gradients[: len(parameters)]))
        x_KBD += gradients[len(parameters) :]
    return TaskGradients(share_K, leaf_BD, parameters, torch.stack(rows), x_KBD if to_x else None)


def representation_gradients(share_K: Tensor, leaf_BD: Tensor, parameters: Sequence[nn.Parameter]) -> TaskGradients:
    """Takes one pass a task down to x_BD, none of them to the parameters; keeps the graph."""
    with backward_to("inputs"):
        x_KBD = [torch.autograd.grad(share, leaf_BD, retain_graph=True)[0] for share in share_K]
    return TaskGradients(share_K, leaf_BD, parameters, None, x_KBD)


def gramian_of_parameters(dense_KP: Tensor, parameters: Sequence[nn.Parameter], shared: Sequence[nn.Parameter]) -> Tensor:
    """K x K, float64, the same on every rank: one all-reduce of K x S numbers.

    Args:
        dense_KP: columns in the order of `parameters`.
        shared: those of `parameters` that count.
    """
    chosen = {id(parameter) for parameter in shared}
    columns = dense_KP.split([parameter.numel() for parameter in parameters], dim=1)
    shared_KS = torch.cat([part for part, p in zip(columns, parameters, strict=True) if id(p) in chosen], dim=1)
    return gramian(parallel.all_reduce_sum(shared_KS))


def gramian_of_representation(x_KBD: Sequence[Tensor], at: str) -> Tensor:
    """K x K, float64, the same on every rank, from the tasks' gradients at x_BD.

    `at`: `batch_sum` (one all-reduce of K x D numbers) or `representation` (one of K x K).
    """
    if at == "batch_sum":
        return gramian(parallel.all_reduce_sum(torch.stack([gradient_BD.sum(0) for gradient_BD in x_KBD])))
    x_BKD = torch.stack(list(x_KBD), dim=1)
    # a row's own inner products in float32, their sum over the rows in float64: no float64 copy of the gradients
    return parallel.all_reduce_sum(torch.bmm(x_BKD, x_BKD.transpose(1, 2)).sum(0, dtype=torch.float64))


def gramian(jacobian: Tensor) -> Tensor:
    """Inner products of the rows of (K, N), in float64.

    >>> gramian(torch.tensor([[1.0, 2.0], [0.0, -1.0]])).tolist()
    [[5.0, -2.0], [-2.0, 1.0]]
    """
    exact = jacobian.double()
    return exact @ exact.T


def sampled_rows(rows: float, stream_rows: Sequence[int], streams: Sequence[int], seed: int, step: int) -> list[Tensor]:
    """Row numbers of a share of each stream's rows (rounded up), sorted, one tensor a stream.

    Drawn by (seed, step, stream): the same rows of the global batch on any number of ranks.

    >>> [len(index) for index in sampled_rows(0.25, [8, 5, 0], [0, 1, 2], seed=1, step=0)]
    [2, 2, 0]
    >>> both = sampled_rows(0.5, [8, 6], [0, 1], seed=1, step=0)
    >>> torch.equal(both[1] - 8, sampled_rows(0.5, [6], [1], seed=1, step=0)[0])
    True
    """
    chosen, start = [], 0
    for stream, count in zip(streams, stream_rows, strict=True):
        kept = np.random.default_rng((seed, step, stream)).permutation(count)[: int(np.ceil(rows * count))]
        chosen.append(torch.from_numpy(np.sort(kept) + start))
        start += count
    return chosen


def check_place(experiment: Experiment) -> None:
    """Raises ValueError where the model of an experiment has no gradients to compare at `balancing.at`, or mixes rows there.

    Builds the dense part on `meta`, so it costs milliseconds and needs no data.
    """
    config, tasks = experiment.balancing, list(experiment.tasks)
    auxiliary = [name for name, task in experiment.tasks.items() if task.auxiliary]
    balancer = make_balancer(config.kind, config.options, tasks, auxiliary, experiment.seed)
    if not (balancer.needs_gramian or config.log_gradients):
        return
    with torch.device("meta"):
        dense = DensePart(ANY_WIDTH, experiment, task_specs(experiment))
    if config.at == "parameters" and not dense.shared_parameters():
        raise ValueError(
            "`balancing.at` should be batch_sum or representation, or `balancing.kind` one that needs no gradients (static, "
            f"uncertainty, ...): with `model.architecture.kind: {experiment.model.architecture.kind}` and "
            f"`model.interaction.kind: {experiment.model.interaction.kind}` tasks share no dense parameter (they share the "
            "tables only). Found parameters."
        )
    mixing = [name for name, module in dense.named_modules() if isinstance(module, _BatchNorm)]
    if config.at == "representation" and mixing:
        raise ValueError(
            "`balancing.at` should be parameters or batch_sum in a model with batch norm, which mixes the rows of a batch, so "
            f"that no row has a gradient of its own. Found representation, and the batch norm `{mixing[0]}`."
        )


__all__ = [
    "TaskGradients",
    "check_place",
    "gramian",
    "gramian_of_parameters",
    "gramian_of_representation",
    "representation_gradients",
    "sampled_rows",
    "task_gradients",
]
