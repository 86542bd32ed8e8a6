"""One training step: everything between a batch and new weights, top to bottom.

Legend: B rows on this rank, D width of the shared representation, K tasks, P shared dense parameters.

Promise between ranks: every loss is a local sum over a *global* count, and gradients are summed over ranks. So a step
equals the one that a single process would make on the whole batch, however its rows and labels are spread.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from mtrec import parallel
from mtrec.architectures.fan_out import apart
from mtrec.balancing import Balancer, make_balancer
from mtrec.balancing.static import Static
from mtrec.batch import Batch
from mtrec.dropout import stream_dropout
from mtrec.embeddings import table_name, write_initial_rows
from mtrec.experiment import Balancing, Experiment
from mtrec.flags import Flags
from mtrec.gradients import (
    TaskGradients,
    gramian_of_parameters,
    gramian_of_representation,
    representation_gradients,
    sampled_rows,
    task_gradients,
)
from mtrec.labels import LabelStatistics
from mtrec.model import MultiTaskModel, loss_weights
from mtrec.optim import Schedules, dense_optimizer, replicated_optimizer, skip_where, table_optimizer
from mtrec.parallel import Memory, ShardedTables


class FlatGradients:
    """The gradients of some parameters in one buffer: one all-reduce, one norm, one fill.

    Args:
        parameters: float32, on one device. Their `.grad` become views of `buffer` (P,).
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.parameters = list(parameters)
        device = self.parameters[0].device if self.parameters else torch.device("cpu")
        self.buffer = torch.zeros(sum(p.numel() for p in self.parameters), device=device)
        parts = self.buffer.split([parameter.numel() for parameter in self.parameters])
        self._parts = [part.view_as(parameter) for part, parameter in zip(parts, self.parameters, strict=True)]
        for parameter, part in zip(self.parameters, self._parts, strict=True):
            parameter.grad = part

    def take(self, gradients: Sequence[Tensor]) -> None:
        """Takes the gradients, in the order of the parameters; they may lie in memory as they like."""
        if self._parts:
            torch._foreach_copy_(self._parts, list(gradients))


@dataclasses.dataclass
class TrainState:
    """All that a step changes. `tensors()` is what a checkpoint holds of it.

    What the host knows of the steps that were done, with `flags.late` (on a GPU) of all but the last until `read_flags` waits:

    Attributes:
        known_step: the newest step of which it knows.
        finite: whether that one was.
        nonfinite_in_a_row: steps up to that one; nonfinite_steps: in all, since this state was made.
        stop: whether a rank has asked to stop.
        constant_weights_K: of the balancer, on the device, where it needs nothing from there: steps do without it then, and it
            is told which tasks were active, for the log, where they are not those it was told of last (`told`).
        tables_since: the step at which the tables' optimizer began.
    """

    model: MultiTaskModel
    tables: ShardedTables
    dense_optimizer: torch.optim.Optimizer
    replicated_optimizer: torch.optim.Optimizer | None
    balancer: Balancer
    balancing: Balancing
    schedules: Schedules
    dense_gradients: FlatGradients
    replicated_gradients: FlatGradients
    task_weights_K: Tensor
    expected_rates_K: Tensor
    device: torch.device
    seed: int
    streams: tuple[int, ...]
    bf16: bool
    clip_norm: float | None
    flags: Flags
    constant_weights_K: Tensor | None
    tables_use_adam: bool
    step: int = 0
    tables_since: int = 0
    known_step: int = 0
    finite: bool = True
    nonfinite_in_a_row: int = 0
    nonfinite_steps: int = 0
    stop: bool = False
    told: tuple[bool, ...] = ()
    mark: Callable[[str], None] = lambda phase: None  # told the name of each phase of a step as it ends; for `mtrec bench`

    def autocast(self) -> torch.autocast:
        """The precision in which the dense part is trained."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.bf16)

    def read_flags(self, *, wait: bool = False) -> None:
        """Takes note of the flags that can be read without waiting for the device; of all, if `wait`."""
        for known in self.flags.read(wait=wait):
            self.known_step, self.finite, self.stop = known.step, known.finite, self.stop or known.stop
            self.nonfinite_in_a_row = 0 if known.finite else self.nonfinite_in_a_row + 1
            self.nonfinite_steps += not known.finite
            if self.constant_weights_K is not None and known.active != self.told:
                self.balancer(torch.zeros(len(known.active)), None, known.step - 1, torch.tensor(known.active))
                self.told = known.active

    def tensors(self) -> dict[str, object]:
        """{key: tensor} of weights, optimizer states and buffers; tables as ShardedTensor."""
        found: dict[str, object] = {}
        found.update({f"tables.{name}": value for name, value in self.tables.weights().items()})
        found.update({f"tables_state.{name}": value for name, value in self.tables.optimizer_states().items()})
        collection = self.model.embeddings.replicated_tables
        replicated = {} if collection is None else dict(collection.named_parameters())
        names = {name: table_name(name.removeprefix("embedding_bags.").removesuffix(".weight")) for name in replicated}
        found.update({f"tables.{names[name]}": value.data for name, value in replicated.items()})
        if self.replicated_optimizer is not None:
            found.update(
                _optimizer_tensors(
                    self.replicated_optimizer, {names[n]: p for n, p in replicated.items()}, "tables_state"
                )
            )
        dense = dict(self.model.dense.named_parameters())
        found.update({f"dense.{name}": value.data for name, value in dense.items()})
        found.update(_optimizer_tensors(self.dense_optimizer, dense, "dense_state"))
        found.update({f"balancer.{name}": value for name, value in self.balancer.state_dict().items()})
        return found


def _optimizer_tensors(
    optimizer: torch.optim.Optimizer, named: Mapping[str, nn.Parameter], prefix: str
) -> dict[str, Tensor]:
    found = {}
    for name, parameter in named.items():
        for state, value in optimizer.state[parameter].items():
            found[f"{prefix}.{name}.{state}"] = value
    return found


def build_state(
    experiment: Experiment,
    model: MultiTaskModel,
    labels: Mapping[str, LabelStatistics],
    *,
    batch_size: int,
    total_steps: int,
    device: torch.device,
    memory: Memory | None = None,
) -> TrainState:
    """Shards the tables, initialises them, and makes the optimizers, the balancer and their state.

    The same weights on any number of ranks: rank 0's dense part is copied, rows are drawn by (seed, table, block).
    `memory` for this rank's tables; None: what there is.
    """
    optimizer_class, options = table_optimizer(experiment.optimizer.tables)
    tables = parallel.shard(model.embeddings, optimizer_class, options, device, batch_size, memory)
    tables.initialise(experiment.seed)
    replicated = _make_replicated(model, experiment.seed, device)
    schedules = Schedules(experiment, batch_size, total_steps)
    parallel.broadcast([parameter.data for parameter in model.dense.parameters()])
    dense = [parameter for parameter in model.dense.parameters() if parameter.requires_grad]  # kinds may freeze some
    optimizer = dense_optimizer(experiment.optimizer.dense, dense, schedules.dense_learning_rate(0))
    names = list(model.specs)
    auxiliary = [name for name in names if experiment.tasks[name].auxiliary]
    balancing = experiment.balancing
    balancer = make_balancer(balancing.kind, balancing.options, names, auxiliary, experiment.seed)
    constant_K = balancer.constant()
    state = TrainState(
        model=model,
        tables=tables,
        dense_optimizer=optimizer,
        replicated_optimizer=replicated_optimizer(experiment.optimizer.tables, replicated),
        balancer=balancer,
        balancing=balancing,
        schedules=schedules,
        dense_gradients=FlatGradients(dense),
        replicated_gradients=FlatGradients(replicated),
        task_weights_K=_per_task(loss_weights(experiment, model.objectives, labels), names, device),
        expected_rates_K=_per_task(
            {
                name: labels[name].density
                if task.denominator == "expected"
                else float("nan")
                for name, task in experiment.tasks.items()
            },
            names,
            device,
        ),
        device=device,
        seed=experiment.seed,
        streams=tuple(
            v
            for v in range(experiment.data.num_streams)
            if v * parallel.world_size() // experiment.data.num_streams == parallel.rank()
        ),
        bf16=experiment.training.precision == "bf16",
        clip_norm=experiment.optimizer.dense.clip_norm,
        flags=Flags(late=device.type == "cuda"),
        constant_weights_K=None if constant_K is None else constant_K.to(device, torch.float32),
        tables_use_adam=experiment.optimizer.tables.kind == "adam",
    )
    _create_optimizer_state(state.dense_optimizer)
    if state.replicated_optimizer is not None:
        _create_optimizer_state(state.replicated_optimizer)
    return state


def _per_task(values: Mapping[str, float], names: Sequence[str], device: torch.device) -> Tensor:
    return torch.tensor([values[name] for name in names], dtype=torch.float32, device=device)


def _make_replicated(model: MultiTaskModel, seed: int, device: torch.device) -> list[nn.Parameter]:
    collection = model.embeddings.replicated_tables
    if collection is None:
        return []
    collection.to_empty(device=device)
    reset_replicated(model, seed, 0)
    return list(collection.parameters())


def reset_replicated(model: MultiTaskModel, seed: int, generation: int) -> None:
    """Writes the initial rows of `sharding: data_parallel` tables."""
    if model.embeddings.replicated_tables is None:
        return
    for name, bag in model.embeddings.replicated_tables.embedding_bags.items():
        spec = model.embeddings.specs[table_name(name)]
        write_initial_rows(bag.weight.data, spec, seed, generation=generation)


def reset_tables(state: TrainState, generation: int) -> None:
    """`reset_tables: every_epoch`: all tables and their optimizer state start anew, the dense part stays."""
    state.tables.initialise(state.seed, generation)
    reset_replicated(state.model, state.seed, generation)
    if state.replicated_optimizer is not None:
        for values in state.replicated_optimizer.state.values():
            for value in values.values():
                value.zero_()


def _create_optimizer_state(optimizer: torch.optim.Optimizer) -> None:
    """Makes the optimizer's lazily created state, at its initial value, so that a checkpoint can be loaded into it.

    One step with zero gradients and a zero learning rate changes no weight; then the state is set to zero again.
    """
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    optimizer.step()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    for values in optimizer.state.values():
        for value in values.values():
            if isinstance(value, Tensor):
                value.zero_()


@dataclasses.dataclass(frozen=True)
class StepResult:
    """What a step saw, on the device: nothing here waits for it.

    Attributes:
        losses_K: global mean loss of each task before weighting (0 where no row of the batch has a label).
        weights_K: what the loss of each task was multiplied with (task weight x balancer's weight).
        counts_K: global sum of sample weights of the rows that count for each task.
        x_BD: the shared representation of this rank's rows, where it was asked for.

    Whether it was finite, and whether to stop, `TrainState` knows.
    """

    losses_K: Tensor
    weights_K: Tensor
    counts_K: Tensor
    x_BD: Tensor | None = None


def train_step(
    state: TrainState, batch: Batch, *, stop: bool = False, upcoming: Batch | None = None, keep_x: bool = False
) -> StepResult:
    """Trains on one global batch; every rank calls it with its own rows, none is fine. One backward pass, one table update.

    `upcoming` is the batch of the next step, on all ranks or none: its ids travel between ranks beside this one's passes.
    `keep_x`: the result holds x_BD.
    """
    model = state.model
    state.tables.set_learning_rate(state.schedules.table_learning_rate(state.step))
    if state.tables_use_adam:
        state.tables.set_step(state.step - state.tables_since)

    counting = _start_counting(state, batch.labels, batch.sample_weight_B)
    x_BD = model.embeddings(batch)
    leaf_BD = x_BD.detach().requires_grad_()  # cut here: its gradient is looked at before it reaches the fused tables
    if upcoming is not None:
        model.embeddings.begin(upcoming)
    state.mark("lookup")
    share_K, counts_K = _shares(state, leaf_BD, batch.stream_rows, counting)
    model.embeddings.proceed()
    state.mark("forward")

    active_K = counts_K > 0
    weights_K, gradients = _balance(state, batch, share_K, leaf_BD, active_K)
    if gradients is None:
        wanted = [leaf_BD, *state.dense_gradients.parameters]
        x_gradient_BD, *found = torch.autograd.grad(torch.dot(weights_K, share_K), wanted, materialize_grads=True)
        state.dense_gradients.take(found)
    else:
        dense_gradient, x_gradient_BD = gradients.weighted(weights_K)
        state.dense_gradients.buffer.copy_(dense_gradient)
    state.mark("backward")

    sums = torch.stack([state.dense_gradients.buffer.sum(), x_gradient_BD.sum()]) * 0.0  # NaN of what is not finite
    flags = torch.cat([share_K.detach(), sums, share_K.new_full((1,), float(stop))])
    parallel.all_reduce_sum(flags)
    dense_work = parallel.start_all_reduce_sum(state.dense_gradients.buffer)
    all_finite = torch.isfinite(flags).all()  # an infinite loss can have a gradient of 0
    state.flags.put(state.step + 1, all_finite, flags[-1] > 0, active_K)
    state.read_flags()
    finite = all_finite if state.flags.late else state.finite  # on the device, or known here
    state.mark("flags")
    state.replicated_gradients.buffer.zero_()
    if x_BD.requires_grad:  # there are tables
        x_BD.backward(_zero_unless(finite, x_gradient_BD))  # here the fused tables step
    parallel.all_reduce_sum(state.replicated_gradients.buffer) if state.replicated_optimizer else None
    state.mark("tables")
    dense_work.wait()
    _optimizer_steps(state, finite)
    state.mark("optimizer")
    state.step += 1
    return StepResult(
        losses_K=flags[: len(share_K)] / state.task_weights_K,
        weights_K=weights_K * state.task_weights_K,
        counts_K=counts_K,
        x_BD=leaf_BD.detach() if keep_x else None,
    )


def _zero_unless(finite: Tensor | bool, gradient_BD: Tensor) -> Tensor:
    """The gradient, or zeros; a tensor `finite` is looked at by the device only. Zeros leave rows where they are, but for Adam,
    whose momentum goes on."""
    if isinstance(finite, Tensor):
        return gradient_BD.masked_fill(~finite, 0.0)
    return gradient_BD if finite else torch.zeros_like(gradient_BD)


def _optimizer_steps(state: TrainState, finite: Tensor | bool) -> None:
    """Steps the dense and the replicated optimizer, unless not `finite`; where that is a tensor, the device decides.

    Replicated tables then step with a gradient of 0, which changes nothing but the number of steps that Adagrad keeps.
    """
    if isinstance(finite, Tensor):
        skip_where(state.dense_optimizer, ~finite)
    elif not finite:
        return
    if state.clip_norm is not None:
        buffer = state.dense_gradients.buffer
        factor = (state.clip_norm / (torch.linalg.vector_norm(buffer) + 1e-6)).clamp(max=1.0)
        if buffer.device.type != "cpu" or factor < 1.0:  # a GPU is not waited for
            buffer.mul_(factor)
    for group in state.dense_optimizer.param_groups:
        group["lr"] = state.schedules.dense_learning_rate(state.step)
    state.dense_optimizer.step()
    if state.replicated_optimizer is not None:
        for group in state.replicated_optimizer.param_groups:
            group["lr"] = state.schedules.table_learning_rate(state.step)
        state.replicated_optimizer.step()


@dataclasses.dataclass(frozen=True)
class _Counting:
    """What the losses see, and how many rows count for each task: `row_weight_BK` of these rows; of all ranks,
    once `work` is done, `counts` (K + 1, the last of all rows).
    """

    target_BK: Tensor
    row_weight_BK: Tensor
    counts: Tensor
    work: parallel.Pending


def _start_counting(state: TrainState, labels: Mapping[str, Tensor], sample_weight_B: Tensor | None) -> _Counting:
    """Begins the sum over ranks; a property of the labels, so that it runs beside the forward pass."""
    target_BK = state.model.objectives.targets(labels)
    row_weight_BK = (~target_BK.isnan()).float()
    if sample_weight_B is not None:
        row_weight_BK = row_weight_BK * sample_weight_B[:, None]
    rows = row_weight_BK.new_full((1,), float(len(row_weight_BK))) if sample_weight_B is None else sample_weight_B.sum()[None]
    counts = torch.cat([row_weight_BK.sum(0), rows])
    return _Counting(target_BK, row_weight_BK, counts, parallel.start_all_reduce_sum(counts))


def _shares(
    state: TrainState, leaf_BD: Tensor, stream_rows: Sequence[int], counting: _Counting
) -> tuple[Tensor, Tensor]:
    """(share_K, counts_K): this rank's share of each task's global mean loss times its weight, and the global counts."""
    model = state.model
    with stream_dropout(state.seed, state.step, state.streams, stream_rows, state.device), state.autocast():
        logits = model.dense(leaf_BD)
    loss_BK = model.objectives.losses_at(logits, counting.target_BK)
    counting.work.wait()
    counts_K = counting.counts[:-1]
    expected_K = state.expected_rates_K * counting.counts[-1]
    denominator_K = torch.where(torch.isnan(expected_K), counts_K, expected_K)
    share_K = (loss_BK * counting.row_weight_BK).sum(0) / denominator_K.clamp(min=torch.finfo(torch.float32).tiny)
    return share_K * state.task_weights_K, counts_K


def _balance(
    state: TrainState, batch: Batch, share_K: Tensor, leaf_BD: Tensor, active_K: Tensor
) -> tuple[Tensor, TaskGradients | None]:
    """weights_K, the same on every rank; and the tasks' gradients over the whole batch where they were taken for it."""
    balancer = state.balancer
    due = balancer.needs_gramian_at(state.step) or (state.balancing.log_gradients and state.step % balancer.every == 0)
    if isinstance(balancer.method, Static) and not balancer.needs_gramian and not due:
        # the weights do not depend on the losses: no reduction, no waiting
        if state.constant_weights_K is not None:
            return state.constant_weights_K, None
        weights_K: Tensor = balancer(torch.zeros_like(share_K), None, state.step, active_K)
        return weights_K, None
    losses_K = parallel.all_reduce_sum(share_K.detach().clone())
    if not torch.isfinite(losses_K).all():  # on every rank alike: the step will change nothing, nor does the balancer
        return balancer.current(losses_K), None
    gramian_KK, gradients = _gramian(state, batch, share_K, leaf_BD) if due else (None, None)
    weights_K = balancer(losses_K, gramian_KK, state.step, active_K)
    return weights_K, gradients


def _gramian(
    state: TrainState, batch: Batch, share_K: Tensor, leaf_BD: Tensor
) -> tuple[Tensor, TaskGradients | None]:
    """The tasks' inner products at `balancing.at`, reduced over ranks; the gradients of the whole batch if it took them."""
    config, dense = state.balancing, state.model.dense
    whole = config.rows == 1.0
    if not whole:
        share_K, leaf_BD = _sampled_shares(state, batch, leaf_BD)
    shared = [parameter for parameter in dense.shared_parameters() if parameter.requires_grad]  # kinds may freeze some
    parameters = state.dense_gradients.parameters if whole else shared
    if config.at != "parameters":
        gradients = representation_gradients(share_K, leaf_BD, parameters)
        assert gradients.x_KBD is not None
        return gramian_of_representation(gradients.x_KBD, config.at), gradients if whole else None
    # where the first layers read x_BD, what they send down to it is much of a pass: then one for all tasks does so
    gradients = task_gradients(share_K, leaf_BD, parameters, to_x=whole and not dense.begins_at_x)
    assert gradients.dense_KP is not None
    found_KK = gramian_of_parameters(gradients.dense_KP, parameters, shared)
    return found_KK, gradients if whole else None


def _sampled_shares(state: TrainState, batch: Batch, leaf_BD: Tensor) -> tuple[Tensor, Tensor]:
    """(share_K, leaf_BD) of `balancing.rows` of each stream's rows: a forward pass of their own through the dense part.

    Where the backward passes go towards the shared parameters, what is not shared stays apart from them; towards x they go
    through all of it.
    """
    chosen = sampled_rows(state.balancing.rows, batch.stream_rows, state.streams, state.seed, state.step)
    rows = torch.cat(chosen).to(state.device)
    labels = {name: label[rows] for name, label in batch.labels.items()}
    weight_B = None if batch.sample_weight_B is None else batch.sample_weight_B[rows]
    counting = _start_counting(state, labels, weight_B)
    sampled_BD = leaf_BD.detach()[rows].requires_grad_()
    with nullcontext() if state.balancing.at != "parameters" else apart("readers" if state.model.dense.begins_at_x else "blocks"):
        share_K, _ = _shares(state, sampled_BD, [len(index) for index in chosen], counting)
    return share_K, sampled_BD


__all__ = ["StepResult", "TrainState", "build_state", "reset_tables", "train_step"]
