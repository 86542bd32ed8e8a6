"""Collectives through shared memory against gloo's: the same results, whatever the sizes, the order of waits and who dies."""

import os
import resource
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from runs import small_run, trained
from torch import Tensor

from mtrec import hang, parallel, shared_memory
from mtrec.model import MultiTaskModel
from mtrec.pooled_exchange import Layout, Pooled, side_by_side
from mtrec.run import Run
from mtrec.step import build_state
from mtrec.train import train

CPU = torch.device("cpu")
SECONDS = 60


def numbers(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 100
    return drawn.to(dtype)


def parts(group: Any, step: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, list[int], list[int]]:
    """An uneven exchange (some parts are empty): output, input and the sizes of their parts."""
    me, size = dist.get_rank(group), dist.get_world_size(group)
    sent = [(7 * me + 3 * peer + step) % 5 * (1 + step * 50) for peer in range(size)]
    received = [(7 * peer + 3 * me + step) % 5 * (1 + step * 50) for peer in range(size)]
    return torch.empty(sum(received), width, dtype=dtype), numbers(me + 100 * step, sum(sent), width, dtype=dtype), received, sent


def exchanged(group: Any) -> list[Tensor]:
    """Sums and exchanges of many sizes and types; two are always under way at once."""
    me, found, before = dist.get_rank(group), [], None
    for step in range(90):  # more than may be pending
        dtype = (torch.float32, torch.int64, torch.bfloat16, torch.float64)[step % 4]
        total = numbers(1000 * me + step, (step * 997) % 5000 + 1, dtype=dtype)
        summing = dist.all_reduce(total, group=group, async_op=True)
        output, source, received, sent = parts(group, step, 1 + step % 3, dtype)
        exchange = dist.all_to_all_single(output, source, received, sent, group=group, async_op=True)
        if before is not None:
            for work in before:
                assert work.wait()
                assert work.is_completed()
                work.wait()  # once more does nothing
        before = (exchange, summing) if step % 2 else (summing, exchange)
        found += [total, output]
    for work in before or ():
        work.wait()
    even = torch.empty(dist.get_world_size(group) * 3, 2)
    dist.all_to_all_single(even, numbers(me, len(even), 2), group=group)
    largest = numbers(me, 50)
    dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)  # not a sum: gloo's
    strided = numbers(me, 6, 4).t()
    reduced = strided.contiguous()
    dist.all_reduce(strided if group is not dist.group.WORLD else reduced, group=group)  # gloo takes no gaps
    return [*found, even, largest, reduced if group is dist.group.WORLD else strided]


def both_ways() -> dict[str, Any]:
    """Results of either way, and how many operations went through shared memory."""
    with parallel.process_group(CPU):
        group = shared_memory.connect(SECONDS)
        assert group is not None
        found = {"shared memory": exchanged(group), "operations": group._operation, "gloo": exchanged(dist.group.WORLD)}
        group.close()
        return found


@pytest.mark.parametrize("ranks", [2, 3])
def test_the_results_are_gloos(tmp_path: Path, ranks: int) -> None:
    for found in run_ranks(ranks, both_ways, folder=tmp_path):
        assert found["operations"] == 182  # all but the maximum: these are not gloo's results against gloo's
        for ours, theirs in zip(found["shared memory"], found["gloo"], strict=True):
            # gloo adds in another order from three ranks on, and rounds bf16 after each
            exact = ranks == 2 or not ours.is_floating_point()
            rtol, atol = (0.0, 0.0) if exact else (0.02, 2.0) if ours.dtype is torch.bfloat16 else (1e-5, 1e-3)
            torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol)


def sums_of_many_ranks() -> list[Tensor]:
    with parallel.process_group(CPU):
        group = shared_memory.connect(SECONDS)
        assert group is not None
        found = []
        for length in (5, shared_memory.DIRECT_BYTES):  # the second is too large to be read by so many: gloo's
            total = numbers(dist.get_rank(), length)
            dist.all_reduce(total, group=group)
            found.append(total)
        return found


def test_every_rank_has_the_same_sums_to_the_bit(tmp_path: Path) -> None:
    ranks = shared_memory.DIRECT_RANKS + 1
    first, *others = run_ranks(ranks, sums_of_many_ranks, folder=tmp_path)
    for length, total in zip((5, shared_memory.DIRECT_BYTES), first, strict=True):
        expected = torch.stack([numbers(rank, length) for rank in range(ranks)]).sum(0)
        torch.testing.assert_close(total, expected, rtol=1e-5, atol=1e-3)
    for other in others:
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(first, other, strict=True))


def never_waited_for() -> tuple[Tensor, int]:
    """Operations that nobody ends (a batch sent ahead when training stops) do not stop those after them."""
    with parallel.process_group(CPU):
        group = shared_memory.connect(SECONDS)
        assert group is not None
        for _ in range(3):
            dist.all_reduce(torch.ones(1000), group=group, async_op=True)
        total = torch.zeros(())
        for step in range(3 * shared_memory.MAX_PENDING):
            one = torch.full((10,), float(step))
            dist.all_reduce(one, group=group)
            total += one[0]
        return total, len(group._buffers)


def test_what_is_never_waited_for_stops_nothing_and_buffers_are_used_again(tmp_path: Path) -> None:
    for total, buffers in run_ranks(2, never_waited_for, folder=tmp_path):
        assert total == 2 * sum(range(3 * shared_memory.MAX_PENDING))
        assert buffers <= 6


def again_and_again_never_waited_for() -> tuple[float, int]:
    """More than may be pending, by ranks of which now one is ahead, now the other."""
    with parallel.process_group(CPU):
        group = shared_memory.connect(SECONDS)
        assert group is not None
        total = 0.0
        for step in range(6 * shared_memory.MAX_PENDING):
            if step % 7 == dist.get_rank():
                time.sleep(0.002)
            dist.all_reduce(torch.ones(100), group=group, async_op=True)
            dist.all_reduce(one := torch.ones(10), group=group)
            total += float(one[0])
        return total, len(group._buffers)


def test_ranks_that_forget_many_operations_do_not_wait_for_each_other_for_ever(tmp_path: Path) -> None:
    for total, buffers in run_ranks(2, again_and_again_never_waited_for, folder=tmp_path):
        assert total == 2 * 6 * shared_memory.MAX_PENDING
        assert buffers <= shared_memory.MAX_PENDING + 6


def last_one_before_the_end() -> Tensor:
    with parallel.process_group(CPU):
        group = shared_memory.connect(SECONDS)
        assert group is not None
        if dist.get_rank() == 1:
            time.sleep(0.3)  # the other has ended when this one reads
        for _ in range(3):
            total = torch.ones(3)
            dist.all_reduce(total, group=group, async_op=True).wait()
        group.close()
        return total


def test_a_rank_may_end_before_the_others_have_read_its_last_part(tmp_path: Path) -> None:
    for total in run_ranks(2, last_one_before_the_end, folder=tmp_path):
        assert total.tolist() == [2.0, 2.0, 2.0]


def among_many_files() -> list[float]:
    resource.setrlimit(resource.RLIMIT_NOFILE, (2048, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    held = [os.open(os.devnull, os.O_RDONLY) for _ in range(1100)]
    with parallel.process_group(CPU):
        assert parallel._within_host is not None
        total = torch.ones(2)
        for _ in range(3):
            parallel.all_reduce_sum(total)
    for each in held:
        os.close(each)
    return total.tolist()


def test_a_worker_may_have_many_files_open(tmp_path: Path) -> None:
    assert run_ranks(2, among_many_files, folder=tmp_path) == [[8.0, 8.0]] * 2  # numbers above those that select() takes


def beside_one_that_dies() -> str:
    rank = int(os.environ["RANK"])
    with parallel.process_group(CPU):
        group = shared_memory.connect(SECONDS)
        assert group is not None
        if rank == 1:
            group.close()
            return ""
        started = time.monotonic()
        try:
            dist.all_reduce(torch.ones(3), group=group)
        except RuntimeError as error:
            assert time.monotonic() - started < SECONDS / 2, "it waited in vain"
            return str(error)
    return "no error"


def test_a_rank_that_is_gone_is_named_at_once(tmp_path: Path) -> None:
    assert run_ranks(2, beside_one_that_dies, folder=tmp_path)[0] == "[shared memory] Connection closed by peer: rank 1"


def beside_one_that_sleeps() -> str:
    with parallel.process_group(CPU):
        group = shared_memory.connect(0.5)
        assert group is not None
        if int(os.environ["RANK"]) == 1:
            dist.barrier()
            return ""
        with pytest.raises(RuntimeError, match="rank 1") as met:
            dist.all_reduce(torch.ones(3), group=group)
        dist.barrier()
        assert hang.timed_out(met.value)
        return str(met.value)


def test_a_rank_that_does_not_answer_in_time_is_named(tmp_path: Path) -> None:
    assert run_ranks(2, beside_one_that_sleeps, folder=tmp_path)[0] == "[shared memory] Timed out waiting 500ms for rank 1"


def of_another_size() -> str:
    rank = int(os.environ["RANK"])
    with parallel.process_group(CPU):
        group = shared_memory.connect(SECONDS)
        assert group is not None
        try:
            dist.all_reduce(torch.ones(3 + rank), group=group)
        except RuntimeError as error:
            return str(error)
    return "no error"


def test_ranks_that_disagree_are_told(tmp_path: Path) -> None:
    first = run_ranks(2, of_another_size, folder=tmp_path)[0]
    assert first.startswith("Rank 1 sent 16 bytes in operation 0; rank 0 expected 12: the ranks do not make the same calls")


def where_one_cannot(how: str) -> bool:
    with parallel.process_group(CPU, share_memory=False):
        if int(os.environ["RANK"]) == 1:
            if how == "no memfd":
                del os.memfd_create
            else:  # as if the others' sockets were not to be seen from here
                shared_memory.socket.socket.connect = _refuse  # type: ignore[method-assign]
        return shared_memory.connect(SECONDS) is None


def _refuse(*_: Any) -> None:
    raise ConnectionRefusedError


@pytest.mark.parametrize("how", ["no memfd", "another host"])
def test_where_one_rank_cannot_all_of_them_take_gloo(tmp_path: Path, how: str) -> None:
    assert run_ranks(3, where_one_cannot, how, folder=tmp_path) == [True, True, True]


def losses(folder: str) -> tuple[Tensor, int]:
    """The losses of a training, and how many operations of it went through shared memory."""
    groups, connect = [], shared_memory.connect

    def noted(timeout_seconds: float) -> shared_memory.SharedMemoryGroup | None:
        groups.append(connect(timeout_seconds))
        return groups[-1]

    shared_memory.connect = noted  # in this process, which ends with the function
    return trained(folder)["losses"], sum(group._operation for group in groups if group is not None)


ROWS, WIDTHS = [2, 0, 3], [4, 3, 0]  # a rank without rows, one without tables
HELD, KEY_WIDTHS = (("a", "b"), ("c", "d"), ()), (1, 3, 1, 2)
WANTED = ("c", "a", "b", "d")  # the columns of rank 0 stay together, those of rank 1 do not
PERMUTED = [4, 0, 1, 2, 3, 5, 6]  # where the columns of WANTED lie, rank by rank
DENSE = 2
SCALED = ("b", "d", "c")  # of each rank's rows: as it is of features that have one id in every row of one rank's batch
SPANS = {"b": slice(2, 5), "c": slice(0, 1), "d": slice(5, 7)}  # in the order of WANTED


def pooled_side_by_side(scaled: bool) -> tuple[Tensor, Tensor]:
    """(columns of all ranks, gradient of the own ones)."""
    with parallel.process_group(CPU):
        assert parallel._within_host is not None
        me = dist.get_rank()
        layout = Layout(parallel._within_host, HELD, KEY_WIDTHS)
        pooled_AH = numbers(me, sum(ROWS), WIDTHS[me]).requires_grad_()
        factors = {SCALED[me]: numbers(70 + me, ROWS[me], 1)} if scaled else {}
        pooled = Pooled(pooled_AH, ROWS, layout)
        found_BD = side_by_side(numbers(90 + me, ROWS[me], DENSE), [pooled], WANTED, factors)
        (gradient_AH,) = torch.autograd.grad(found_BD, pooled_AH, numbers(50 + me, *found_BD.shape))
        return found_BD.detach(), gradient_AH


@pytest.mark.parametrize("scaled", [False, True])
def test_pooled_embeddings_and_their_gradients_come_to_their_places(tmp_path: Path, scaled: bool) -> None:
    found = run_ranks(3, pooled_side_by_side, scaled, folder=tmp_path)
    held = torch.cat([numbers(rank, sum(ROWS), width) for rank, width in enumerate(WIDTHS)], dim=1)[:, PERMUTED]
    gradient = torch.cat([numbers(50 + rank, rows, DENSE + sum(WIDTHS)) for rank, rows in enumerate(ROWS)])[:, DENSE:]
    if scaled:
        for rank, (own, own_gradient) in enumerate(zip(held.split(ROWS), gradient.split(ROWS), strict=True)):
            for columns in (own, own_gradient):
                columns[:, SPANS[SCALED[rank]]] *= numbers(70 + rank, ROWS[rank], 1)
    back = torch.empty_like(gradient)
    back[:, PERMUTED] = gradient
    for rank, ((columns, own), expected, expected_own) in enumerate(
        zip(found, held.split(ROWS), back.split(WIDTHS, dim=1), strict=True)
    ):
        assert torch.equal(columns, torch.cat([numbers(90 + rank, ROWS[rank], DENSE), expected], dim=1))
        assert torch.equal(own, expected_own)


def layouts_of(folder: str) -> set[str]:
    with parallel.process_group(CPU):
        run = Run(Path(folder))
        model = MultiTaskModel(run.experiment, run.encoder, run.labels, CPU)
        build_state(run.experiment, model, run.labels, batch_size=128, total_steps=1, device=CPU)
        return set(model.embeddings.layouts)


@pytest.mark.parametrize(("sharding", "expected"), [("table_wise", {"tables"}), ("column_wise", set())])
def test_only_whole_tables_take_the_way_through_shared_memory(tmp_path: Path, sharding: str, expected: set[str]) -> None:
    run = small_run(tmp_path, f"features.item_id.sharding={sharding}")
    assert run_ranks(2, layouts_of, str(run.folder), folder=tmp_path) == [expected] * 2


@pytest.mark.parametrize(
    "features",
    [
        ("features.user_id.sharding=table_wise",),
        ("features.user_id.sharding=column_wise",),
        ("features.item_id.weights=price", "features.item_id.pooling=sum"),  # two groups of tables, each with its exchange
    ],
)
def test_training_has_the_same_losses_to_the_bit_either_way(tmp_path: Path, features: tuple[str, ...]) -> None:
    found = {}
    for exchange in ("auto", "gloo"):
        options = (f"training.exchange={exchange}", "training.log_every=1", *features)
        run = small_run(tmp_path, *options)
        found[exchange] = run_ranks(2, losses, str(run.folder), folder=run.folder / "ranks")[0]
    (ours, operations), (theirs, none) = found["auto"], found["gloo"]
    assert len(ours) > 10
    assert torch.equal(ours, theirs)
    assert operations > len(ours)  # these are not gloo's losses against gloo's
    assert none == 0


def fails_amid_training(folder: str) -> tuple[str, float]:
    """What ended the training of this rank, and when by the host's clock: for rank 1, when it failed."""
    run, steps, failed = Run(Path(folder)), 0, None

    def at_every_step() -> bool:
        nonlocal steps, failed
        steps += 1
        if os.environ["RANK"] == "1" and steps == 5:
            failed = time.monotonic()
            raise RuntimeError("this rank has had enough")
        return False

    try:
        for _ in train(run, device=CPU, stop_requested=at_every_step):
            pass
    except RuntimeError as error:
        return str(error), failed or time.monotonic()
    return "no error", time.monotonic()


def test_a_rank_that_fails_amid_training_ends_the_others_at_once(tmp_path: Path) -> None:
    run = small_run(tmp_path)
    (first, ended), (second, failed) = run_ranks(2, fails_amid_training, str(run.folder), folder=tmp_path)
    assert "Connection closed by peer" in first
    assert second == "this rank has had enough"
    assert 0 < ended - failed < 20  # the timeout is 600 s
