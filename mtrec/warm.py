"""Warm start: a new run begins with the weights and optimizer state of another one.

Legend: D columns of the shared representation, K tasks, S values of optimizer state a row (1, or one a column shard or column).

What is taken over, by name and never by position:
- tables: the rows of all ids that the other run knew, with their optimizer state (a vocabulary is append-only, so an id
  keeps its row). Rows of new ids, and tables that the other run did not have, keep their initial values. Adam's state, and
  that of another kind of optimizer, begins anew.
- the dense part and its optimizer state: axes that follow the columns of the shared representation are matched column by
  column (feature and place, or dense column), axes that follow the tasks are matched task by task, heads by their task.
The balancer, the schedules, the step and the position in the data begin anew.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from mtrec import checkpoint, parallel
from mtrec.embeddings import Embeddings
from mtrec.experiment import Experiment
from mtrec.features import FIRST_ROW, Encoder, Table
from mtrec.model import DensePart, task_specs
from mtrec.run import Run
from mtrec.step import TrainState
from mtrec.tasks import Task, TaskSpec

SAME_STATE = {"momentum1": "sum", "sum": "momentum1"}  # Adagrad's sum of squares: the fused kernel's name, and torch's
ADAGRAD = ("rowwise_adagrad", "adagrad")  # torchrec calls Adam's means momentum1, too, and Adam's count of steps begins anew
PROBE = "warm_start_probe"

Pairs = tuple[Tensor, Tensor]  # places of an axis in the new tensor, and in the old one


@dataclasses.dataclass(frozen=True)
class WarmStart:
    """What was taken over: the checkpoint, and `notes` on what changed, was dropped or begins anew."""

    folder: Path
    notes: tuple[str, ...]


def warm_start(state: TrainState, run: Run, previous: Run) -> WarmStart:
    """Writes the weights of `previous` (its best checkpoint) into a state that was just built; every rank calls it.

    A rank reads the tables of which it holds a part, whole, one after the other. Raises ValueError where `previous` has no
    valid checkpoint, where its folder holds another run than when `run` was prepared, or where a table has another dimension
    there (`prepare` says so before any worker starts).

    Deviation from a resumed run: not bit for bit the same training, since schedules and balancer begin anew.
    """
    timeout = run.experiment.training.collective_timeout_seconds
    parallel.by_rank_zero(lambda: _check_source(run, previous), timeout)
    folder = parallel.by_rank_zero(lambda: previous.best().folder, timeout)  # which reads all of its checkpoints
    shapes = checkpoint.shapes(folder)
    tensors = state.tensors()
    notes = [*run.encoder.changes]
    kinds = (each.experiment.optimizer.tables.kind for each in (run, previous))
    notes += _tables(tensors, run.encoder, previous.encoder, folder, shapes, keep_state=all(kind in ADAGRAD for kind in kinds))
    state.tables.forget_cached_rows()
    notes += _dense(tensors, run, previous, folder, shapes)
    return WarmStart(folder, tuple(notes))


def _check_source(run: Run, previous: Run) -> None:
    """Rows of the tables are matched with the vocabularies that the fit has grown: of others they would be those of other ids."""
    noted = run.info.get("warm_start_encoder")  # runs of an earlier mtrec have none
    if noted is None or (found := previous.encoder.fingerprint()) == noted:
        return
    raise ValueError(
        f"{previous.folder} should hold the run whose vocabularies {run.folder} was prepared from, with the fingerprint "
        f"{noted[:12]}. Found {found[:12]}: it was made anew since. Put the old one back, or remove {run.folder} and start again "
        "with --warm-start."
    )


def known_rows(table: Table, previous: Table) -> int:
    """How many rows, from the first on, mean the same in both tables.

    >>> old = Table("item", 120, 8, ("item",), "mean", False, "auto", 1, 0.01, vocabulary_size=98, encoding="vocabulary")
    >>> known_rows(dataclasses.replace(old, num_embeddings=160, vocabulary_size=130), old)
    100
    """
    if table.dim != previous.dim:
        raise ValueError(
            f"`features.{table.features[0]}.dim` should be {previous.dim}, as in the run that this one starts from "
            f"(table '{table.name}'). Found {table.dim}."
        )
    same = table.encoding == previous.encoding
    if table.encoding in ("hash", "bucketized"):
        same = same and table.num_embeddings == previous.num_embeddings
    return min(FIRST_ROW + previous.vocabulary_size, table.num_embeddings) if same else 0


def _tables(
    tensors: Mapping[str, object],
    encoder: Encoder,
    before: Encoder,
    folder: Path,
    shapes: Mapping[str, tuple[int, ...]],
    *,
    keep_state: bool,
) -> list[str]:
    old_tables = {table.name: table for table in before.tables}
    notes, fresh = [], []
    for table in encoder.tables:
        old = old_tables.pop(table.name, None)
        rebucketed = table.encoding == "bucketized" and encoder.states.get(table.name) != before.states.get(table.name)
        count = 0 if old is None or rebucketed else known_rows(table, old)
        if not count or old is None:
            fresh.append(table.name)
            continue
        weight = tensors[f"tables.{table.name}"]
        if _held(weight):
            _write(weight, checkpoint.read_keys(folder, [f"tables.{table.name}"])[f"tables.{table.name}"], count, table)
        prefix = f"tables_state.{table.name}."
        names = [key.removeprefix(prefix) for key in tensors if key.startswith(prefix)]
        for name in [name for name in names if "." not in name]:
            known = (name, SAME_STATE.get(name)) if keep_state else ()
            key = next((f"{prefix}{each}" for each in known if f"{prefix}{each}" in shapes), None)
            if key is None:
                if name != "step":
                    notes.append(f"table {table.name}: optimizer state '{name}' begins anew")
            elif _held(tensors[prefix + name]):
                stored = checkpoint.read_keys(folder, [key])[key]
                if stored.dim() == 0:
                    _plain(tensors[prefix + name]).copy_(stored)
                else:
                    _write(tensors[prefix + name], by_row(stored, old.num_embeddings), count, table)
    notes += [f"table {name}: dropped" for name in old_tables]
    return [*notes, *(f"table {name}: begins anew" for name in fresh)]


def by_row(stored: Tensor, rows: int) -> Tensor:
    """Optimizer state of a table as (rows, S), whatever form the kernel keeps it in.

    A row-wise optimizer keeps one number a row; of a column-wise table, one number a row and shard, shard after shard.

    >>> by_row(torch.tensor([1.0, 2.0, 3.0, 10.0, 20.0, 30.0]), 3).tolist()
    [[1.0, 10.0], [2.0, 20.0], [3.0, 30.0]]
    """
    return stored.reshape(-1, rows).T if stored.dim() == 1 else stored


def to_width(state: Tensor, width: int, dim: int) -> Tensor:
    """State (rows, S) with `width` values a row, for a table of `dim` columns; means over what falls together.

    Row-wise Adagrad's number is the mean over a shard's columns of what Adagrad keeps for each of them.

    >>> to_width(torch.tensor([[1.0, 3.0]]), 1, 4).tolist(), to_width(torch.tensor([[2.0]]), 4, 4).tolist()
    ([[2.0]], [[2.0, 2.0, 2.0, 2.0]])
    """
    if state.shape[1] == width:
        return state
    return state.repeat_interleave(dim // state.shape[1], 1).view(len(state), width, dim // width).mean(2)


def _held(value: object) -> bool:
    """Whether this rank holds a part of a tensor."""
    return not hasattr(value, "local_shards") or bool(value.local_shards())  # torchrec's sharded tensors are Tensors, too


def _plain(value: object) -> Tensor:
    """The tensor, or this rank's only shard of it."""
    if type(value) is Tensor or isinstance(value, torch.nn.Parameter):
        return value.detach()
    found: Tensor = value.local_shards()[0].tensor  # type: ignore[attr-defined]
    return found.detach()


def _write(target: object, source: Tensor, rows: int, table: Table) -> None:
    """Writes the first `rows` rows of `source` (all rows, S) into what this rank holds of `target`."""
    if not hasattr(target, "local_shards"):
        whole = _plain(target)
        whole[:rows].copy_(to_width(source[:rows], whole.shape[1], table.dim))
        return
    size = tuple(target.metadata().size)  # type: ignore[attr-defined]
    width = size[0] // table.num_embeddings if len(size) == 1 else size[1]
    wanted = to_width(source[:rows], width, table.dim)
    for shard in target.local_shards():
        offsets, sizes = shard.metadata.shard_offsets, shard.metadata.shard_sizes
        if len(size) == 1:  # one number a row: shard s of the columns lies after those before it
            column, first = divmod(offsets[0], table.num_embeddings)
            last, columns = first + sizes[0], slice(column, column + 1)
        else:
            first, last, columns = offsets[0], offsets[0] + sizes[0], slice(offsets[1], offsets[1] + sizes[1])
        last = min(last, rows)
        if first < last:
            part = wanted[first:last, columns]
            held = shard.tensor.detach()
            held[: last - first].copy_(part.reshape(held[: last - first].shape))


def input_columns(encoder: Encoder) -> list[tuple[str, int]]:
    """What each column of x_BD is: (dense column, -1), or (feature, place in its embedding)."""
    embeddings = Embeddings(encoder.tables, encoder.num_dense, torch.device("meta"))
    columns = [(name, -1) for name in encoder.dense_names]
    for name, dim in zip(embeddings.feature_names, embeddings.feature_dims, strict=True):
        columns += [(name, place) for place in range(dim)]
    return columns


def _dense(
    tensors: Mapping[str, object], run: Run, previous: Run, folder: Path, shapes: Mapping[str, tuple[int, ...]]
) -> list[str]:
    axes = _Axes(run, previous)
    fresh = []
    wanted: dict[str, tuple[str, list[Pairs]]] = {}
    for key in tensors:
        if not key.startswith("dense."):
            continue
        name = key.removeprefix("dense.")
        pairs = axes.pairs(name, shapes.get(key))
        if pairs is None:
            fresh.append(name)
            continue
        wanted[key] = (key, pairs)
        for other in tensors:
            if other.startswith(f"dense_state.{name}.") and other in shapes:
                wanted[other] = (other, pairs if shapes[other] else [])
    stored = checkpoint.read_keys(folder, list(wanted))
    for key, (source, pairs) in wanted.items():
        copy_places(_plain(tensors[key]), stored[source], pairs)
    dropped = [name for name in previous.experiment.tasks if name not in run.experiment.tasks]
    return [*(f"tasks.{name}: dropped" for name in dropped), *(f"{name}: begins anew" for name in fresh)]


def copy_places(target: Tensor, source: Tensor, pairs: Sequence[Pairs]) -> None:
    """target[new places] = source[old places], with a pair of places for each axis.

    >>> target = torch.zeros(2, 3)
    >>> rows, columns = (torch.tensor([1]), torch.tensor([0])), (torch.tensor([0, 2]), torch.tensor([1, 0]))
    >>> copy_places(target, torch.tensor([[1.0, 2.0]]), [rows, columns])
    >>> target.tolist()
    [[0.0, 0.0, 0.0], [2.0, 0.0, 1.0]]
    """
    if not pairs:
        target.copy_(source)
        return
    places = []
    for axis, (new, old) in enumerate(pairs):
        source = source.index_select(axis, old)
        places.append(new.view([-1 if each == axis else 1 for each in range(len(pairs))]).to(target.device))
    target[tuple(places)] = source.to(target.device)


class _Axes:
    """Which axes of the dense parameters follow the columns of x_BD, and which the tasks; and how old places become new ones.

    Found by building the dense part on `meta` with one more column and with one more task: an axis that grows by one with
    the columns has one place a column, one that grows by m with the K tasks and has m K places holds m places a task, task
    after task. That holds for every architecture in this package, and asks nothing of those from outside.
    """

    def __init__(self, run: Run, previous: Run) -> None:
        experiment = run.experiment
        specs, old_specs = task_specs(experiment), task_specs(previous.experiment)
        columns, old_columns = input_columns(run.encoder), input_columns(previous.encoder)
        self._unchanged = columns == old_columns and list(specs) == list(old_specs)
        self._shapes = _shapes(experiment, len(columns), specs)
        self._wider = _shapes(experiment, len(columns) + 1, specs)
        self._more = _shapes(experiment, len(columns), {**specs, PROBE: next(iter(specs.values()))})
        self._old_shapes = _shapes(experiment, len(old_columns), old_specs)
        self._num_columns, self._num_tasks = len(columns), len(specs)
        self._columns = _matched(columns, old_columns)
        self._tasks = _matched(list(specs), list(old_specs))
        self._other_heads = {
            f"heads.head_{name}."
            for name, task in experiment.tasks.items()
            if name in old_specs and (
                previous.experiment.tasks[name].kind != task.kind or not _same_logits(specs[name].task, old_specs[name].task)
            )
        }

    def pairs(self, name: str, stored: tuple[int, ...] | None) -> list[Pairs] | None:
        """(new places, old places) of each axis of a parameter; None where it does not fit and begins anew."""
        if stored is None or name not in self._old_shapes or tuple(self._old_shapes[name]) != stored:
            return None
        if any(name.startswith(prefix) for prefix in self._other_heads):
            return None
        found = []
        for axis, size in enumerate(self._shapes[name]):
            by_column = self._wider[name][axis] - size
            by_task = self._more[name][axis] - size
            if self._unchanged or (by_column == 0 and by_task == 0):
                every = torch.arange(size)
                found.append((every, every))
            elif by_column == 1 and by_task == 0 and size == self._num_columns:
                found.append(self._columns)
            elif by_column == 0 and size == by_task * self._num_tasks:
                found.append(_blocks(self._tasks, by_task))
            else:
                return None
            if size != stored[axis] and by_column == 0 and by_task == 0:
                return None
        return found


def _same_logits(task: Task, old: Task) -> bool:
    """Whether a logit means the same to both: they make the same predictions of it, and read labels in the same unit."""
    if (task.num_logits, task.label_scale) != (old.num_logits, old.label_scale):
        return False
    logits_BC = torch.linspace(-3.0, 3.0, 7 * task.num_logits).reshape(7, task.num_logits)
    return torch.equal(task.predict(logits_BC), old.predict(logits_BC))


def _shapes(experiment: Experiment, num_columns: int, specs: Mapping[str, TaskSpec]) -> dict[str, torch.Size]:
    with torch.device("meta"):
        return {name: each.shape for name, each in DensePart(num_columns, experiment, specs).named_parameters()}


def _matched(names: Sequence[object], old_names: Sequence[object]) -> Pairs:
    places = {name: place for place, name in enumerate(old_names)}
    both = [(place, places[name]) for place, name in enumerate(names) if name in places]
    return torch.tensor([new for new, _ in both], dtype=torch.long), torch.tensor([old for _, old in both], dtype=torch.long)


def _blocks(tasks: Pairs, size: int) -> Pairs:
    """Places of a task become the `size` places that belong to it."""
    within = torch.arange(size)
    new, old = ((places[:, None] * size + within).flatten() for places in tasks)
    return new, old
