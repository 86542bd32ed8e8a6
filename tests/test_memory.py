"""Where tables lie: on the GPU while they fit, else in the host's memory; and what their caches are told. Without a GPU."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torchrec
from runs import small_run
from torchrec.distributed.embedding_lookup import GroupedPooledEmbeddingsLookup
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.planner import Topology
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

import mtrec.checkpoint
import mtrec.predictions
from mtrec import parallel
from mtrec.ahead import copy_ahead, tensors_of
from mtrec.batch import Batch
from mtrec.checkpoint import find
from mtrec.embeddings import Embeddings
from mtrec.features import Table
from mtrec.parallel import Memory, fuse, memory_of, plan_tables, topology_of
from mtrec.train import train

CPU = torch.device("cpu")
MEGABYTE = 1 << 20
ROWS = 16_384  # of 16 float32 and one number of row-wise Adagrad: 1.06 MB


def table(name: str, sizes: int, **options: Any) -> Table:
    return Table(
        **{
            "name": name,
            "num_embeddings": sizes * ROWS,
            "dim": 16,
            "features": (f"of_{name}",),
            "pooling": "sum",
            "weighted": False,
            "sharding": "table_wise",
            "num_column_shards": 1,
            "init_std": 0.01,
            "vocabulary_size": 0,
            "encoding": "hash",
        }
        | options
    )


def planned(tables: Sequence[Table], topology: Topology, ids_a_row: Mapping[str, float]) -> dict[str, Any]:
    """{table: the planner's choice}, of all collections in one plan."""
    embeddings = Embeddings(tables, 0, torch.device("meta"))
    named = {"tables": embeddings.tables, "weighted_tables": embeddings.weighted_tables}
    collections = {name: each for name, each in named.items() if each is not None}
    for each in collections.values():
        fuse(torchrec.optim.RowWiseAdagrad, {"lr": 0.1}, each)
    with parallel.process_group(CPU):
        plans = plan_tables(collections, tables, EmbeddingBagCollectionSharder(), topology, batch_size=64, ids_a_row=ids_a_row)
    return {name.removeprefix("table_"): each for plan in plans.values() for name, each in plan.items()}


def kernels(tables: Sequence[Table], topology: Topology) -> dict[str, str]:
    """{table: the kernel that the planner chose}."""
    return {name: each.compute_kernel for name, each in planned(tables, topology, {}).items()}


def gpu(device: float, host: float, ranks: int = 1) -> Topology:
    """GPUs of so many megabytes each on one host, of so many for each of them."""
    caps = {"hbm_cap": int(device * MEGABYTE), "ddr_cap": int(host * MEGABYTE)}
    return Topology(world_size=ranks, compute_device="cuda", local_world_size=ranks, **caps)


def test_the_fused_optimizer_is_named_as_torchs_own_function_names_it() -> None:
    named, oracle = (Embeddings([table("a", 1)], 0, CPU).tables for _ in range(2))
    assert named is not None
    assert oracle is not None
    fuse(torchrec.optim.RowWiseAdagrad, {"lr": 0.1, "eps": 1e-6}, named)
    apply_optimizer_in_backward(torchrec.optim.RowWiseAdagrad, oracle.parameters(), {"lr": 0.1, "eps": 1e-6})
    for found, expected in zip(named.parameters(), oracle.parameters(), strict=True):
        for attribute in ("_optimizer_classes", "_optimizer_kwargs"):
            assert getattr(found, attribute) == getattr(expected, attribute)


def test_tables_that_fit_lie_on_the_gpu() -> None:
    found = kernels([table("a", 1), table("b", 4), table("c", 2)], gpu(device=16, host=64))
    assert found == {"a": "fused", "b": "fused", "c": "fused"}


def test_what_does_not_fit_lies_in_the_hosts_memory() -> None:
    tables = [table("a", 1), table("b", 8), table("c", 2), table("d", 8, weighted=True)]
    topology = gpu(device=20, host=64)  # 17 after torchrec's reservation; both kinds of tables share it
    found = kernels(tables, topology)
    assert found["a"] == found["c"] == "fused"
    assert sorted([found["b"], found["d"]]) == ["fused", "fused_uvm_caching"]
    assert set(kernels([table("a", 20), table("b", 20)], topology).values()) == {"fused_uvm_caching"}


@pytest.mark.parametrize("options", [{"sharding": "row_wise"}, {"sharding": "column_wise", "num_column_shards": 2}], ids=str)
def test_tables_cut_between_gpus_too(options: dict[str, Any]) -> None:
    tables = [table("a", 16, **options)]
    assert kernels(tables, gpu(device=16, host=64, ranks=2)) == {"a": "fused"}
    assert kernels(tables, gpu(device=8, host=64, ranks=2)) == {"a": "fused_uvm_caching"}


def test_tables_larger_than_both_are_refused() -> None:
    with pytest.raises(ValueError, match=r"The tables do not fit on 1 workers \(a 1,048,576 x 16\)"):
        kernels([table("a", 64)], gpu(device=16, host=32))


def test_a_cpu_is_planned_as_ever() -> None:
    assert memory_of(CPU) == Memory(None, None)
    topology = topology_of("cpu", memory_of(CPU))
    plain = Topology(world_size=1, compute_device="cpu")
    assert [str(device) for device in topology.devices] == [str(device) for device in plain.devices]
    assert topology.local_world_size == plain.local_world_size
    assert kernels([table("a", 1), table("b", 64)], topology) == {"a": "fused", "b": "fused"}


def test_ranks_share_the_look_ups_not_the_tables() -> None:
    topology = Topology(world_size=2, compute_device="cpu", local_world_size=2)
    tables = [table(name, 1) for name in "abcdefg"]

    true = {"of_d": 6.0}

    def look_ups(told: dict[str, float]) -> list[float]:
        """Of both ranks, where the planner is told this."""
        found = planned(tables, topology, told)
        return [sum(true.get(f"of_{name}", 1.0) for name, each in found.items() if each.ranks == [rank]) for rank in (0, 1)]

    one, other = look_ups(true)
    assert abs(one - other) <= 2.0
    one, other = look_ups({})  # by the number of tables: d with two others or three
    assert abs(one - other) >= 4.0
    assert len(planned(tables, topology, {"of_d": 0.0})) == 7  # of a list that was always empty, too


def test_caches_are_written_back_before_rows_are_read_and_emptied_after_rows_were_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []

    def recorded(place: Any, name: str) -> None:
        old = getattr(place, name)

        def new(*arguments: Any, **options: Any) -> Any:
            done.append(name)
            return old(*arguments, **options)

        monkeypatch.setattr(place, name, new)

    run = small_run(tmp_path, "training.epochs=2", "training.checkpoint_async=false", "training.reset_tables=every_epoch")
    for place, name in ((GroupedPooledEmbeddingsLookup, "purge"), (GroupedPooledEmbeddingsLookup, "flush")):
        recorded(place, name)
    recorded(mtrec.checkpoint, "load")
    recorded(mtrec.checkpoint, "save")
    recorded(mtrec.train, "train_step")
    list(train(run, device=CPU))
    first, second = (index for index, name in enumerate(done) if name == "save")
    epoch = ["train_step"] * 32 + ["flush", "save"]
    assert done[first - 33 : first + 1] == done[second - 33 : second + 1] == epoch
    assert done[first + 1 : second - 33] == ["flush", "purge"]  # the tables begin anew
    done.clear()
    list(train(run, device=CPU, resume_from=find(run.checkpoints)[1]))
    assert [name for name in done[done.index("load") :] if name != "train_step"][:2] == ["load", "purge"]
    done.clear()
    with parallel.process_group(CPU):
        mtrec.predictions.load_model(run, find(run.checkpoints)[0], CPU)
    assert done[-2:] == ["load", "purge"]


def test_all_of_a_batch_goes_ahead() -> None:
    sparse = KeyedJaggedTensor(keys=["a", "b"], values=torch.arange(3), lengths=torch.tensor([1, 0, 1, 1]), stride=2)
    weighted = KeyedJaggedTensor(
        keys=["c"], values=torch.arange(2), lengths=torch.tensor([1, 1]), weights=torch.rand(2), stride=2
    )
    batch = Batch(torch.rand(2, 3), sparse, weighted, {"x": torch.rand(2), "y": torch.rand(2)}, torch.rand(2), (2,))
    assert len(tensors_of(batch)) == 9
    assert copy_ahead(batch, CPU) is batch
    there = tensors_of(copy_ahead(batch, torch.device("meta")))
    wanted = [(each.shape, each.dtype, "meta") for each in tensors_of(batch)]
    assert [(each.shape, each.dtype, each.device.type) for each in there] == wanted
