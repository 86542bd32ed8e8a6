"""Ids on their way to the ranks that hold their rows, against the same ids put together by hand; and against torchrec's way."""

from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from runs import small_run, trained
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from mtrec import parallel
from mtrec.ids_exchange import IdsExchange
from mtrec.pooled_exchange import Layout
from mtrec.shared_memory import MAX_PENDING

CPU = torch.device("cpu")
ROWS = [3, 0, 2]  # a rank without rows
HELD = (("d", "a"), ("b", "c"), ())  # one without tables
GIVEN = ("a", "b", "c", "d")
Key = tuple[list[int], list[int], list[float]]  # ids a row, ids, a weight each


def drawn(rank: int, batch: int) -> dict[str, Key]:
    generator = torch.Generator().manual_seed(100 * rank + batch)
    found = {}
    for key in GIVEN:
        lengths = torch.randint(0, 3, (ROWS[rank],), generator=generator).tolist()
        ids = torch.randint(0, 1000, (sum(lengths),), generator=generator)
        found[key] = lengths, ids.tolist(), torch.rand(len(ids), generator=generator).tolist()
    return found


def ids_of(parts: dict[str, Key], rows: int, dtype: torch.dtype, weighted: bool) -> KeyedJaggedTensor:
    lengths, ids, weights = ([each for key in parts for each in parts[key][part]] for part in range(3))
    return KeyedJaggedTensor(
        keys=list(parts),
        values=torch.tensor(ids, dtype=dtype),
        lengths=torch.tensor(lengths, dtype=torch.int32),
        weights=torch.tensor(weights) if weighted else None,
        stride=rows,
    )


def told(ids: KeyedJaggedTensor) -> tuple[list[str], Tensor, Tensor, Tensor | None, int]:
    return ids.keys(), ids.values(), ids.lengths(), ids.weights_or_none(), ids.stride()


def arrived(dtype: torch.dtype, weighted: bool, batches: int) -> list[Any]:
    """What this rank gets of each batch; the next one is always under way already."""
    with parallel.process_group(CPU):
        assert parallel._within_host is not None
        rank, found, before = parallel.rank(), [], None
        for batch in range(batches):
            ids = ids_of(drawn(rank, batch), ROWS[rank], dtype, weighted)
            exchange = IdsExchange(ids, Layout(parallel._within_host, HELD, (1,) * len(GIVEN)))
            if before is not None:
                found.append(before.arrived())
            before = exchange
        assert before is not None
        found.append(before.arrived())
        again = before.arrived()
        assert again[0] is found[-1][0]
        buffers = len(parallel._within_host._buffers)
    return [[(*told(ids), rows) for ids, rows in found], buffers]


@pytest.mark.parametrize(("dtype", "weighted"), [(torch.int32, False), (torch.int64, True)])
def test_every_rank_gets_all_rows_of_what_it_holds(tmp_path: Path, dtype: torch.dtype, weighted: bool) -> None:
    batches = 2 * MAX_PENDING
    ranks = run_ranks(3, arrived, dtype, weighted, batches, folder=tmp_path)
    for keys, (found, buffers) in zip(HELD, ranks, strict=True):
        assert buffers < 10  # what all have read is written to again
        for batch, (found_keys, values, lengths, weights, stride, rows) in enumerate(found):
            parts = [drawn(rank, batch) for rank in range(3)]
            joined: dict[str, Any] = {
                key: tuple([each for part in parts for each in part[key][which]] for which in range(3)) for key in keys
            }
            expected = ids_of(joined, sum(ROWS), dtype, weighted)
            assert (found_keys, stride, rows) == (list(keys), sum(ROWS), ROWS)
            assert values.dtype == dtype
            assert torch.equal(values, expected.values())
            assert torch.equal(lengths, expected.lengths())
            assert torch.equal(weights, expected.weights()) if weighted else weights is None


def test_alone_they_are_put_in_order() -> None:
    ids = ids_of(drawn(0, 0), ROWS[0], torch.int32, weighted=True)
    found, rows = IdsExchange(ids, Layout(None, (("c", "a", "d", "b"),), (1,) * 4)).arrived()
    assert (found.keys(), rows) == (["c", "a", "d", "b"], [3])
    for key in GIVEN:
        assert torch.equal(found[key].values(), ids[key].values())
        assert torch.equal(found[key].lengths(), ids[key].lengths())
        assert torch.equal(found[key].weights(), ids[key].weights())
    same, _ = IdsExchange(ids, Layout(None, (GIVEN,), (1,) * 4)).arrived()
    assert same is ids


def through_torchrec(folder: str) -> Tensor:
    parallel._layout = lambda module, group: None  # in this process, which ends with the function
    losses: Tensor = trained(folder)["losses"]
    return losses


def losses(folder: str) -> Tensor:
    found: Tensor = trained(folder)["losses"]
    return found


@pytest.mark.parametrize("features", [(), ("features.item_id.weights=price", "features.item_id.pooling=sum")])
@pytest.mark.parametrize("ranks", [1, 2])
def test_training_has_torchrecs_losses_to_the_bit(tmp_path: Path, ranks: int, features: tuple[str, ...]) -> None:
    found = []
    for function in (losses, through_torchrec):
        run = small_run(tmp_path, "training.log_every=1", *features)
        found.append(run_ranks(ranks, function, str(run.folder), folder=run.folder / "ranks")[0])
    assert len(found[0]) > 10
    assert torch.equal(*found)
