"""The one place that speaks torch.distributed: start and end a process group, shard the tables, reduce, gather.

One process is a group of one: the same code, the same fused tables; what would travel stays where it is. What ranks promise
each other: all call the functions below in the same order, every step, whatever their number of rows.
"""

import datetime
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchrec.distributed import comm_ops
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
from torchrec.distributed.planner.types import PlannerError
from torchrec.distributed.sharding.tw_sharding import TwPooledEmbeddingSharding
from torchrec.distributed.types import BoundsCheckMode, ShardingEnv, ShardingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.optim.keyed import KeyedOptimizer

from mtrec import shared_memory
from mtrec.embeddings import Embeddings, module_name, table_name, write_initial_rows
from mtrec.features import Table
from mtrec.pooled_exchange import Layout

for _name in ("torchrec.distributed.planner", "torch.fx"):
    logging.getLogger(_name).setLevel(logging.ERROR)  # advice on topologies that users of mtrec cannot follow

T = TypeVar("T")

LEAST_IDS_A_ROW = 0.01  # a feature that is nearly always empty costs something, too
HOST_SHARE = 0.75  # of a host's memory for tables; of the GPU's torchrec's planner leaves some by itself

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
    """This process's number, 0 where it is alone."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes, 1 where this one is alone."""
    return dist.get_world_size() if dist.is_initialized() else 1


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Sums a tensor over all ranks, in place."""
    start_all_reduce_sum(tensor).wait()
    return tensor


class Pending:
    """A reduction under way; `wait` before its tensor is read."""

    def __init__(self, work: Any = None) -> None:
        self._work = work

    def wait(self) -> None:
        """Waits until the tensor holds the sum (on a GPU its stream does, not the host); at once where this process is alone."""
        if self._work is not None:
            self._work.wait()


def start_all_reduce_sum(tensor: Tensor) -> Pending:
    """Starts to sum a tensor over all ranks, in place, beside what is computed until `wait`."""
    if _within_host is not None:  # without the layers of torch.distributed above it
        return Pending(_within_host.allreduce([tensor]))
    return Pending(dist.all_reduce(tensor, async_op=True)) if world_size() > 1 else Pending()


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


def gather_objects(value: Any, group: Any = None) -> list[Any] | None:
    """The picklable values of all ranks, in their order, on rank 0; None elsewhere. `group`: of `new_group`, else that of all."""
    if world_size() == 1:
        return [value]
    gathered: list[Any] | None = [None] * world_size() if rank() == 0 else None
    dist.gather_object(value, gathered, group=group)
    return gathered


def wait_for_rank_zero(done: Callable[[float], bool], timeout_seconds: float) -> None:
    """Waits until `done(seconds)`, which itself waits so long at most, is true on rank 0: longer than one collective may take."""
    while not broadcast_object(rank() != 0 or done(timeout_seconds / 4)):
        pass


def by_rank_zero(work: Callable[[], T], timeout_seconds: float) -> T:
    """What `work()` returned on rank 0, or its error, on all ranks, however long it takes."""

    def outcome() -> tuple[T | None, Exception | None]:
        try:
            return work(), None
        except Exception as error:
            return None, error  # raised below, on all ranks

    with ThreadPoolExecutor(1) as pool:
        futures = [pool.submit(outcome)] if rank() == 0 else []
        wait_for_rank_zero(lambda seconds: not wait(futures, seconds).not_done, timeout_seconds)
    value, problem = broadcast_object(futures[0].result() if futures else None)
    if problem is not None:
        raise problem
    return value  # type: ignore[no-any-return]  # of rank 0


def barrier() -> None:
    """Waits until all ranks are here."""
    if world_size() > 1:
        dist.barrier()


def new_group(timeout_seconds: int = 600) -> Any:
    """A second group of the same ranks on gloo: what saves a checkpoint beside the training must not share its collectives."""
    return dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=timeout_seconds))


class Memory(NamedTuple):
    """Bytes for a rank's tables, of its GPU (of which the planner reserves some) and of its host. None: torchrec's guess."""

    device: int | None = None
    host: int | None = None


def memory_of(device: torch.device) -> Memory:
    """The memory of a GPU, and the rank's share of the host's. Ranks are taken to be alike: the planner asks rank 0."""
    if device.type != "cuda":
        return Memory()
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")  # a container's, which may be less
    if limit.is_file() and limit.read_text().strip().isdigit():
        host = min(host, int(limit.read_text()))
    return Memory(torch.cuda.get_device_properties(device).total_memory, int(HOST_SHARE * host) // local_world_size())


def local_world_size() -> int:
    """Ranks on this host, as Ray and torchrun say; else all of them."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world_size()))


class ShardedTables:
    """The fused tables of a model after sharding: their optimizers, and their shards as (table, rows, columns, tensor).

    On a GPU some may lie in the host's memory with a cache of their rows on the GPU (`cached`): `weights` writes the cache back
    first, and whoever writes rows calls `forget_cached_rows` afterwards. No test here runs that: it takes a GPU.
    """

    def __init__(self, embeddings: Embeddings) -> None:
        self._embeddings = embeddings
        self._learning_rate: float | None = None  # that the kernels were told last

    def _modules(self) -> list[tuple[str, Any]]:
        named = [("tables", self._embeddings.tables), ("weighted_tables", self._embeddings.weighted_tables)]
        return [(name, module) for name, module in named if module is not None]

    def optimizers(self) -> list[KeyedOptimizer]:
        """The fused optimizers of the tables that this rank holds."""
        return [module.fused_optimizer for _, module in self._modules()]

    def set_learning_rate(self, learning_rate: float) -> None:
        """The rate of the next backward pass. The kernel sees it only through `step()`, which updates nothing else."""
        if learning_rate == self._learning_rate:
            return
        self._learning_rate = learning_rate
        for optimizer in self.optimizers():
            for group in optimizer.param_groups:
                group["lr"] = learning_rate
            optimizer.step()

    def set_step(self, step: int) -> None:
        """How many steps Adam has made, for its correction of the bias. fbgemm would count look-ups, those of a validation
        included, and begin anew after a resume. The other optimizers do not ask.
        """
        for _, module in self._modules():
            for lookup in module._lookups:
                for kernel in lookup._emb_modules:
                    kernel.emb_module.iter_cpu.fill_(step)
                    if step == 0:  # where that is 0 fbgemm takes this
                        kernel.emb_module.iter.zero_()

    def cached(self) -> list[str]:
        """The tables in the host's memory, whose rows a GPU caches."""
        kernel = EmbeddingComputeKernel.FUSED_UVM_CACHING.value
        plans = [module.module_sharding_plan for _, module in self._modules()]
        return [table_name(name) for plan in plans for name, each in plan.items() if each.compute_kernel == kernel]

    def forget_cached_rows(self) -> None:
        """Empties the caches: rows were written into the tables themselves. Without caches it does nothing."""
        for _, module in self._modules():
            for lookup in module._lookups:
                lookup.purge()

    def weights(self) -> dict[str, Any]:
        """{table: ShardedTensor}, every table, on every rank; cached rows are written back first."""
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
        self.forget_cached_rows()


def shard(
    embeddings: Embeddings,
    optimizer_class: type[torch.optim.Optimizer],
    optimizer_options: Mapping[str, Any],
    device: torch.device,
    batch_size: int,
    memory: Memory | None = None,
) -> ShardedTables:
    """Replaces the collections of `embeddings` (built on `meta`) by sharded ones with a fused optimizer, in place.

    The planner places the tables; `Table.sharding` fixes how each is cut. Rows are not initialised yet.

    Args:
        memory: for the tables of this rank; None: what `memory_of` finds.
    """
    named = {name: getattr(embeddings, name) for name in ("tables", "weighted_tables")}
    collections = {name: collection for name, collection in named.items() if collection is not None}
    for collection in collections.values():
        fuse(optimizer_class, optimizer_options, collection)
    sharder = EmbeddingBagCollectionSharder()
    tables = list(embeddings.specs.values())
    topology = topology_of(device.type, memory or memory_of(device))
    environment = ShardingEnv.from_process_group(_within_host or dist.group.WORLD)
    # on a GPU one plan for all, since they share its memory
    for group in [collections] if device.type == "cuda" else [{name: each} for name, each in collections.items()]:
        plans = plan_tables(group, tables, sharder, topology, batch_size, embeddings.ids_a_row)
        for name, collection in group.items():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                setattr(embeddings, name, sharder.shard(collection, plans[name], environment, device=device))
    if _within_host is not None or world_size() == 1:
        found = {name: _layout(getattr(embeddings, name), _within_host) for name in collections}
        embeddings.layouts = {name: layout for name, layout in found.items() if layout is not None}
    return ShardedTables(embeddings)


def _layout(module: Any, group: shared_memory.SharedMemoryGroup | None) -> Layout | None:
    """Where the columns of a sharded collection lie; None where a table is cut (torchrec's own exchanges know the others)."""
    shardings = module._embedding_shardings
    if len(shardings) != 1 or type(shardings[0]) is not TwPooledEmbeddingSharding:
        return None
    [sharding] = shardings
    return Layout(group, tuple(map(tuple, sharding.feature_names_per_rank())), tuple(sharding.embedding_dims()))


def fuse(optimizer_class: type[torch.optim.Optimizer], options: Mapping[str, Any], collection: EmbeddingBagCollection) -> None:
    """Names the optimizer that the tables' backward pass is to apply, where torchrec's planner and sharder look for it.

    torch's `_apply_optimizer_in_backward` writes the same down, beside optimizers and hooks for parameters that are replaced
    anyway, and its package compiles TorchScript for half a second when it is imported.
    """
    for parameter in collection.parameters():
        parameter._optimizer_classes, parameter._optimizer_kwargs = [optimizer_class], [dict(options)]  # type: ignore[attr-defined]


def topology_of(device_type: str, memory: Memory) -> Topology:
    """The ranks as the planner sees them, each with that memory."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Topology(
            world_size=world_size(),
            compute_device=device_type,
            hbm_cap=memory.device,
            ddr_cap=memory.host,
            local_world_size=min(local_world_size(), world_size()) if device_type == "cuda" else None,
        )


def plan_tables(
    collections: Mapping[str, EmbeddingBagCollection],
    tables: Sequence[Table],
    sharder: EmbeddingBagCollectionSharder,
    topology: Topology,
    batch_size: int,
    ids_a_row: Mapping[str, float],
) -> dict[str, Any]:
    """{collection: torchrec's plan}: which rank holds what, on a GPU in its own memory, or, where that is full, in the host's.

    Ranks get an even share of the look-ups, by `ids_a_row` of each feature (1 where it is not said).

    Raises ValueError for tables that do not fit.
    """
    held = {table_name(config.name) for each in collections.values() for config in each.embedding_bag_configs()}
    tables = [table for table in tables if table.name in held]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        planner = EmbeddingShardingPlanner(
            topology=topology,
            constraints={
                module_name(table.name): _constraint(table, topology.compute_device, ids_a_row) for table in tables
            },
            batch_size=max(1, batch_size // topology.world_size),
        )
        try:
            plan = planner.collective_plan(nn.ModuleDict(collections), [sharder], dist.group.WORLD)
        except PlannerError as error:
            sizes = ", ".join(f"{t.name} {t.num_embeddings:,} x {t.dim}" for t in tables)
            raise ValueError(
                f"The tables do not fit on {topology.world_size} workers ({sizes}). torchrec's planner says: {error}"
            ) from error
    return {name: plan.plan[name] for name in collections}


def _constraint(table: Table, device_type: str, ids_a_row: Mapping[str, float]) -> ParameterConstraints:
    sharding = ShardingType.TABLE_WISE.value
    if table.sharding == "column_wise":
        sharding = ShardingType.COLUMN_WISE.value
    elif table.sharding == "row_wise":
        sharding = ShardingType.ROW_WISE.value
    kernels = [EmbeddingComputeKernel.FUSED.value]
    if device_type == "cuda":  # where the GPU is full: in the host's memory, a fifth of the rows cached, by torchrec's default
        kernels.append(EmbeddingComputeKernel.FUSED_UVM_CACHING.value)
    return ParameterConstraints(
        sharding_types=[sharding],
        compute_kernels=kernels,
        # The look-up on a CPU refuses rows that are none; the check before it would make all but -1 row 0, and warn. It would
        # look at the offsets, too, which here are sums of the encoder's own lengths.
        bounds_check_mode=BoundsCheckMode.NONE if device_type == "cpu" else None,
        pooling_factors=[max(ids_a_row.get(feature, 1.0), LEAST_IDS_A_ROW) for feature in table.features],
        min_partition=table.dim // table.num_column_shards if table.sharding == "column_wise" else None,
    )
