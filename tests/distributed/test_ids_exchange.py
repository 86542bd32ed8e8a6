"""Ids on their way to the ranks that hold their rows, against the same ids put together by hand; and against torchrec's way."""

import contextlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ranks import run_ranks
from runs import small_run, trained
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from mtrec import embeddings, parallel
from mtrec.features import encoder
from mtrec.feed import feed
from mtrec.ids_exchange import IdsExchange
from mtrec.labels import labels_of
from mtrec.model import MultiTaskModel
from mtrec.pooled_exchange import Layout
from mtrec.shared_memory import MAX_PENDING
from mtrec.sources import open_source
from mtrec.step import build_state
from mtrec.train import Progress, make_reader

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


def losses(folder: str, way: str = "ours") -> tuple[Tensor, int]:
    """Of a training in this process, and how many exchanges of ids were ours."""
    asked, arrived = 0, IdsExchange.arrived

    def noted(exchange: IdsExchange) -> tuple[KeyedJaggedTensor, list[int]]:
        nonlocal asked
        asked += 1
        return arrived(exchange)

    IdsExchange.arrived = noted  # in this process, which ends with the function
    if way == "torchrec's":
        parallel._layout = lambda module, group: None
    if way == "of int64":
        encoder.row_type = lambda num_embeddings: np.int64
    return trained(folder)["losses"], asked


WEIGHTED = ("features.item_id.weights=price", "features.item_id.pooling=sum")  # a second group of tables


@pytest.mark.parametrize(
    ("features", "groups"),
    [
        ((), 1),
        (WEIGHTED, 2),
        ((*WEIGHTED, "features.item_id.sharding=column_wise", "features.item_id.num_column_shards=2"), 1),  # the other is cut
        ((*WEIGHTED, "features.tags.sharding=data_parallel"), 2),
    ],
    ids=["one group", "two groups", "one cut", "one replicated"],
)
@pytest.mark.parametrize("ranks", [1, 2])
def test_training_has_torchrecs_losses_to_the_bit(
    tmp_path: Path, ranks: int, features: tuple[str, ...], groups: int
) -> None:
    options = ("training.log_every=1", "training.max_steps=12", *features)
    runs = {way: small_run(tmp_path, *options) for way in ("ours", "torchrec's", "of int64")}
    found = {way: run_ranks(ranks, losses, str(run.folder), way, folder=run.folder / "ranks")[0] for way, run in runs.items()}
    (ours, asked), (theirs, none), (of_int64, _) = found.values()
    assert len(ours) == 12
    assert torch.equal(ours, theirs)
    assert torch.equal(ours, of_int64)
    assert (asked >= 12 * groups, none) == (True, 0)


UNLIKE_PLANS = {  # what ranks 0 and 1 think that both hold
    "ours": ((("a",), ("b",)), (("a",), ("b",))),
    "another plan": ((("a",), ("b",)), (("a", "b"), ())),
    "another order": ((("a", "b"), ()), (("b", "a"), ())),
}


def unlike_calls(what: str) -> str:
    """What rank 0 says when rank 1 makes another call."""
    with parallel.process_group(CPU, timeout_seconds=30):
        group = parallel._within_host
        assert group is not None
        first = parallel.rank() == 0
        dtype = torch.int64 if what == "another type" and not first else torch.int32
        ids = ids_of({"a": ([20, 1], list(range(21)), []), "b": ([2, 0], [3, 4], [])}, 2, dtype, weighted=False)
        said = ""
        if first or what != "a sum":
            held = UNLIKE_PLANS.get(what, UNLIKE_PLANS["ours"])[parallel.rank()]
            try:
                IdsExchange(ids, Layout(group, held, (1, 1))).arrived()
            except RuntimeError as error:
                said = str(error)
        else:
            with contextlib.suppress(RuntimeError):  # it finds it out, too
                group.allreduce([torch.zeros(4)]).wait()
        parallel.barrier()
        return said


@pytest.mark.parametrize("what", ["another plan", "another order", "another type", "a sum"])
def test_ranks_that_do_not_make_the_same_calls_are_told(tmp_path: Path, what: str) -> None:
    said, _ = run_ranks(2, unlike_calls, what, folder=tmp_path)
    assert "the ranks do not make the same calls in the same order" in said


def test_of_a_batch_that_was_not_begun_tables_that_are_cut_go_through_their_module(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU such a batch was copied on the stream that computes: nothing may be read beside it."""
    run = small_run(tmp_path, *WEIGHTED, "features.item_id.sharding=column_wise", "features.item_id.num_column_shards=2")
    with parallel.process_group(CPU):
        model = MultiTaskModel(run.experiment, run.encoder, run.labels, CPU)
        build_state(run.experiment, model, run.labels, batch_size=128, total_steps=1, device=CPU)
        assert set(model.embeddings.layouts) == {"tables"}
        data = open_source(run.experiment, run.experiment.data.train, "data.train")
        fed = feed(make_reader(run, data, Progress()), run.encoder, labels_of(run.experiment, model.specs))
        batch = next(fed).batch
        fed.close()
        model.embeddings.begin(batch)
        begun = model.embeddings(batch)
        monkeypatch.setattr(embeddings, "beside", None)  # nobody calls it
        assert torch.equal(model.embeddings(batch), begun)
