"""The one place that speaks torch.distributed: start and end a process group, shard the tables, reduce, gather.

One process is a group of one: the same code, the same fused tables, no special case. What ranks promise each other: all
call the functions below in the same order, every step, whatever their number of rows.
"""

import datetime
import logging
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchrec.distributed import comm_ops
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
from torchrec.distributed.planner.types import PlannerError
from torchrec.distributed.types import ShardingEnv, ShardingType
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.optim.keyed import KeyedOptimizer

from mtrec import shared_memory
from mtrec.embeddings import Embeddings, module_name, table_name, write_initial_rows
from mtrec.features import Table

for _name in ("torchrec.distributed.planner", "torch.fx"):
    logging.getLogger(_name).setLevel(logging.ERROR)  # advice on topologies that users of mtrec cannot follow


_within_host: shared_memory.SharedMemoryGroup | None = None  # what is exchanged at every step goes through it, where it is


def start(device: torch.device, timeout_seconds: int = 600) -> bool:
    """Joins the process group that the environment describes (RANK, WORLD_SIZE, ...), or makes a group of one.

    Returns whether it started one: a Ray worker is in a group already.
    """
    comm_ops.set_gradient_division(False)  # losses are sums over global counts: gradients are summed, never averaged
    if dist.is_initialized():
        return False
    backend = "nccl" if device.type == "cuda" else "gloo"
    timeout = datetime.timedelta(seconds=timeout_seconds)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        dist.init_process_group(backend, timeout=timeout)
    else:
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout)
    return True


def stop() -> None:
    """Leaves the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def process_group(device: torch.device, timeout_seconds: int = 600, share_memory: bool = True) -> Iterator[None]:
    """`start`, and `stop` at the end if this call started the group.

    Args:
        share_memory: within the block, CPU ranks of one host exchange tensors through shared memory, not gloo.
    """
    global _within_host
    started, made = start(device, timeout_seconds), None
    try:
        if share_memory and device.type == "cpu" and world_size() > 1 and _within_host is None:
            _within_host = made = shared_memory.connect(timeout_seconds)
        yield
    finally:
        if made is not None:
            made.close()
            dist.destroy_process_group(made)
            _within_host = None
        if started:
            stop()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Sums a tensor over all ranks, in place."""
    if world_size() > 1:
        dist.all_reduce(tensor, group=_within_host)
    return tensor


class Pending:
    """A reduction under way; `wait` before its tensor is read."""

    def __init__(self, work: Any = None) -> None:
        self._work = work

    def wait(self) -> None:
        if self._work is not None:
            self._work.wait()


def start_all_reduce_sum(tensor: Tensor) -> Pending:
    """Starts to sum a tensor over all ranks, in place, beside what is computed until `wait`."""
    return Pending(dist.all_reduce(tensor, group=_within_host, async_op=True)) if world_size() > 1 else Pending()


def broadcast(tensors: Sequence[Tensor], source: int = 0) -> None:
    """Copies the tensors of rank `source` to all ranks."""
    if world_size() > 1:
        for tensor in tensors:
            dist.broadcast(tensor, source)


def broadcast_object(value: Any, source: int = 0) -> Any:
    """The picklable value of rank `source`, on all ranks."""
    if world_size() == 1:
        return value
    holder = [value]
    dist.broadcast_object_list(holder, source)
    return holder[0]


def gather_objects(value: Any) -> list[Any] | None:
    """The picklable values of all ranks, in their order, on rank 0; None elsewhere."""
    if world_size() == 1:
        return [value]
    gathered: list[Any] | None = [None] * world_size() if rank() == 0 else None
    dist.gather_object(value, gathered)
    return gathered


def barrier() -> None:
    if world_size() > 1:
        dist.barrier()


def new_group(timeout_seconds: int = 600) -> Any:
    """A second group of the same ranks on gloo: what saves a checkpoint beside the training must not share its collectives."""
    return dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=timeout_seconds))


class ShardedTables:
    """The fused tables of a model after sharding: their optimizers, and their shards as (table, rows, columns, tensor)."""

    def __init__(self, embeddings: Embeddings) -> None:
        self._embeddings = embeddings

    def _modules(self) -> list[tuple[str, nn.Module]]:
        named = [("tables", self._embeddings.tables), ("weighted_tables", self._embeddings.weighted_tables)]
        return [(name, module) for name, module in named if module is not None]

    def optimizers(self) -> list[KeyedOptimizer]:
        return [module.fused_optimizer for _, module in self._modules()]

    def set_learning_rate(self, learning_rate: float) -> None:
        """The rate of the next backward pass. The kernel sees it only through `step()`, which updates nothing else."""
        for optimizer in self.optimizers():
            for group in optimizer.param_groups:
                group["lr"] = learning_rate
            optimizer.step()

    def weights(self) -> dict[str, Any]:
        """{table: ShardedTensor}, every table, on every rank."""
        found: dict[str, Any] = {}
        for _, module in self._modules():
            for key, value in module.state_dict().items():
                found[table_name(key.removeprefix("embedding_bags.").removesuffix(".weight"))] = value
        return found

    def optimizer_states(self) -> dict[str, Any]:
        """{`table.state`: ShardedTensor} of the tables that have a shard on this rank; empty for SGD."""
        states: dict[str, Any] = {}
        for optimizer in self.optimizers():
            for by_name in optimizer.state_dict()["state"].values():
                for key, value in by_name.items():
                    module, state = key.rsplit(".", 1)
                    states[f"{table_name(module)}.{state}"] = value
        return states

    def initialise(self, seed: int, generation: int = 0) -> None:
        """Writes the initial rows of every shard, the same for any number of ranks, and clears the optimizer's state."""
        for name, sharded in self.weights().items():
            for shard in sharded.local_shards():
                row, column = shard.metadata.shard_offsets
                table = self._embeddings.specs[name]
                write_initial_rows(shard.tensor.detach(), table, seed, row=row, column=column, generation=generation)
        for state in self.optimizer_states().values():
            for shard in state.local_shards():
                shard.tensor.zero_()


def shard(
    embeddings: Embeddings,
    optimizer_class: type[torch.optim.Optimizer],
    optimizer_options: Mapping[str, Any],
    device: torch.device,
    batch_size: int,
) -> ShardedTables:
    """Replaces the collections of `embeddings` (built on `meta`) by sharded ones with a fused optimizer, in place.

    The planner places the tables; `Table.sharding` fixes how each is cut. Rows are not initialised yet.
    """
    for name in ("tables", "weighted_tables"):
        collection = getattr(embeddings, name)
        if collection is None:
            continue
        with torch.enable_grad():  # it looks at the parameters' place in the graph
            apply_optimizer_in_backward(optimizer_class, collection.parameters(), dict(optimizer_options))
        tables = [embeddings.specs[table_name(config.name)] for config in collection.embedding_bag_configs()]
        sharder = EmbeddingBagCollectionSharder()
        plan = _plan(collection, tables, sharder, device, batch_size)
        environment = ShardingEnv.from_process_group(_within_host or dist.group.WORLD)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            setattr(embeddings, name, sharder.shard(collection, plan, environment, device=device))
    return ShardedTables(embeddings)


def _plan(
    collection: nn.Module,
    tables: Sequence[Table],
    sharder: EmbeddingBagCollectionSharder,
    device: torch.device,
    batch_size: int,
) -> Any:
    constraints = {module_name(table.name): _constraint(table, device) for table in tables}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        planner = EmbeddingShardingPlanner(
            topology=Topology(world_size=world_size(), compute_device=device.type),
            constraints=constraints,
            batch_size=max(1, batch_size // world_size()),
        )
        try:
            plan = planner.collective_plan(collection, [sharder], dist.group.WORLD)
        except PlannerError as error:
            sizes = ", ".join(f"{t.name} {t.num_embeddings:,} x {t.dim}" for t in tables)
            raise ValueError(
                f"The tables do not fit on {world_size()} workers ({sizes}). torchrec's planner says: {error}"
            ) from error
    return plan.plan[""]


def _constraint(table: Table, device: torch.device) -> ParameterConstraints:
    sharding = ShardingType.TABLE_WISE.value
    if table.sharding == "column_wise":
        sharding = ShardingType.COLUMN_WISE.value
    elif table.sharding == "row_wise":
        sharding = ShardingType.ROW_WISE.value
    return ParameterConstraints(
        sharding_types=[sharding],
        compute_kernels=[EmbeddingComputeKernel.FUSED.value],
        min_partition=table.dim // table.num_column_shards if table.sharding == "column_wise" else None,
    )
