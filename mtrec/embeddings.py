"""Tables and dense features -> x_BD, the shared representation.

Legend: B rows on this rank, F dense features, D width of the shared representation.

Three groups of tables: `tables` (torchrec, sharded over the ranks by parallel.py, optimizer fused into the backward pass),
`weighted_tables` (the same, for features with a weight a value) and `replicated_tables` (`sharding: data_parallel`: plain
parameters on every rank, whose gradients are reduced with the dense part's and stepped by an optimizer of the dense kind;
torchrec's own data-parallel tables never move under a fused optimizer).
"""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import unquote

import torch
from torch import Tensor, nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

from mtrec.ahead import arrive, beside
from mtrec.batch import Batch
from mtrec.features import Table
from mtrec.ids_exchange import IdsExchange
from mtrec.pooled_exchange import Layout, Pooled, alone, side_by_side

INIT_BLOCK_ROWS = 65_536  # initial rows are drawn block by block, so that a shard draws only what it holds


class Embeddings(nn.Module):
    """All features of a batch, looked up, pooled and laid side by side.

    Args:
        tables: the encoder's tables; `features` of each are keys of the batch.
        num_dense: F, columns of `dense_BF`.
        device: where unsharded tables are made; `meta` before sharding.
        clip_value: the gradient of each pooled embedding is clipped to +- this: what the fused kernel's own option does
            with the gradients that come in, for tables of every sharding alike.
        ids_a_row: of each feature, by which the work is shared out over the ranks; 1 where it is not said.

    Output: x_BD, float32; D = `output_dim` = F + sum over features of the table's dimension. The order of columns (dense,
    then features in the order of `feature_names`) does not depend on how the tables are sharded.
    """

    def __init__(
        self,
        tables: Sequence[Table],
        num_dense: int,
        device: torch.device,
        clip_value: float | None = None,
        ids_a_row: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__()
        self.clip_value = clip_value
        self.ids_a_row = dict(ids_a_row or {})
        self.specs = {table.name: table for table in tables}
        groups: dict[str, list[Table]] = {"tables": [], "weighted_tables": [], "replicated_tables": []}
        for table in tables:
            if table.weighted and table.sharding == "data_parallel":
                raise ValueError(
                    f"Table '{table.name}' has a feature with `weights`, which `sharding: data_parallel` does not offer. "
                    "Use `sharding: table_wise`."
                )
            group = (
                "weighted_tables"
                if table.weighted
                else "replicated_tables"
                if table.sharding == "data_parallel"
                else "tables"
            )
            groups[group].append(table)
        self.tables = _collection(groups["tables"], device)
        self.weighted_tables = _collection(groups["weighted_tables"], device, is_weighted=True)
        self.replicated_tables = _collection(groups["replicated_tables"], device)
        self._means = [feature for table in tables if table.pooling == "mean" for feature in table.features]  # none has weights
        self.feature_names = [feature for group in groups.values() for table in group for feature in table.features]
        self.feature_dims = [table.dim for group in groups.values() for table in group for _ in table.features]
        self.num_dense = num_dense
        self.output_dim = num_dense + sum(self.feature_dims)
        self.layouts: dict[str, Layout] = {}  # {group of tables: who holds what}; the others take torchrec's exchanges
        self._begun: tuple[Batch, list[_Exchange | _ThroughTorchrec]] | None = None

    def begin(self, batch: Batch) -> None:
        """Starts to send the ids of a batch to the ranks that hold their rows, ahead of its `forward`; all ranks do, or none.

        They travel beside whatever is computed next; torchrec sends how many there are first, and with `proceed` the ids
        themselves. A batch on a GPU was copied there by `copy_ahead`, or the host has waited for its copy: the exchange does not
        wait for computations.
        """
        device = batch.dense_BF.device
        self._begun = (batch, self._exchanges(batch, device))

    def _exchanges(self, batch: Batch, device: torch.device) -> "list[_Exchange | _ThroughTorchrec]":
        return [
            _Exchange(module, ids, self.layouts[name])
            if name in self.layouts
            else _ThroughTorchrec(module, ids, device)
            for name, module, ids in self._sharded(batch)
        ]

    def proceed(self) -> None:
        """Sends the ids of the batch that was begun, if there is one."""
        for exchange in self._begun[1] if self._begun is not None else ():
            exchange.proceed()

    def _sharded(self, batch: Batch) -> list[tuple[str, Any, Any]]:
        groups = (("tables", self.tables, batch.sparse), ("weighted_tables", self.weighted_tables, batch.weighted))
        return [each for each in groups if each[1] is not None]

    def _look_up(self, batch: Batch) -> list[Pooled]:
        """The pooled embeddings of the sharded (or not yet sharded) tables."""
        if self._begun is not None and self._begun[0] is batch:
            exchanges, self._begun = self._begun[1], None
            return [exchange.pooled() for exchange in exchanges]
        return [  # on the stream on which the batch was copied
            _Exchange(module, ids, self.layouts[name]).pooled() if name in self.layouts else _pooled(module(ids))
            for name, module, ids in self._sharded(batch)
        ]

    def forward(self, batch: Batch) -> Tensor:
        """(B, D) pooled embeddings and dense columns side by side; of a batch without rows (0, D)."""
        groups = self._look_up(batch)
        if self.replicated_tables is not None:
            pooled = _pooled(self.replicated_tables(batch.sparse if batch.num_rows else self._one_row(batch)))
            groups.append(pooled if batch.num_rows else pooled._replace(values_AH=pooled.values_AH[:0], rows=[0]))
        x_BD = side_by_side(batch.dense_BF, groups, tuple(self.feature_names), self._shares(batch))
        if self.clip_value is not None and x_BD.requires_grad:
            limit = self.clip_value
            x_BD.register_hook(lambda gradient: gradient.clamp(-limit, limit))
        return x_BD

    def _shares(self, batch: Batch) -> dict[str, Tensor]:
        """{feature that is pooled to its mean: (B, 1), what one id counts: 1 / ids of the row}; of a row without ids it is 1.

        Features with one id in every row are left out.
        """
        names = [name for name in self._means if name not in batch.single]
        if not names:
            return {}
        keys = batch.sparse.keys()
        lengths_KB = batch.sparse.lengths().view(len(keys), -1)
        return {name: lengths_KB[keys.index(name)].clamp(min=1).float().reciprocal_()[:, None] for name in names}

    @staticmethod
    def _one_row(batch: Batch) -> KeyedJaggedTensor:
        """A batch of one row without ids: torchrec's unsharded collection cannot look up a batch of none."""
        lengths = batch.sparse.lengths().new_zeros(len(batch.sparse.keys()))
        return KeyedJaggedTensor(keys=batch.sparse.keys(), values=batch.sparse.values(), lengths=lengths, stride=1)


def _pooled(pooled: KeyedTensor) -> Pooled:
    values = pooled.values()
    return Pooled(values, [len(values)], alone(tuple(pooled.keys()), tuple(pooled.length_per_key())))


class _Exchange:
    """The ids of one batch on their way between ranks that know whose rows are where, and the pooled embeddings back."""

    def __init__(self, module: Any, ids: KeyedJaggedTensor, layout: Layout) -> None:
        self._lookup, self._layout = module._lookups[0], layout
        self._ids = IdsExchange(ids, layout)

    def proceed(self) -> None:
        """They are under way."""

    def pooled(self) -> Pooled:
        """Waits for the ids of all ranks; what this rank holds of them."""
        ids, rows = self._ids.arrived()
        return Pooled(self._lookup(ids), rows, self._layout)


class _ThroughTorchrec:
    """The same in the steps that a sharded collection takes, whatever its tables and ranks."""

    def __init__(self, module: Any, ids: KeyedJaggedTensor, device: torch.device) -> None:
        self._module, self._device = module, device
        self._context = module.create_context()
        with beside(device):
            self._lengths_sent = module.input_dist(self._context, ids)
        self._ids_sent: Any = None

    def proceed(self) -> None:
        if self._ids_sent is None:
            with beside(self._device):
                self._ids_sent = self._lengths_sent.wait()

    def pooled(self) -> Pooled:
        """Waits for the ids of all ranks; a collective, as its backward pass."""
        self.proceed()
        with beside(self._device):
            ids = self._ids_sent.wait()
        computing = arrive(self._device)
        if computing is not None:
            ids.record_stream(computing)
            self._context.record_stream(computing)
        return _pooled(self._module.compute_and_output_dist(self._context, ids))


def _as_it_is(table: Tensor) -> Tensor:
    """torchrec draws initial rows of its own; ours are drawn afterwards, by `write_initial_rows`."""
    return table


def _collection(tables: list[Table], device: torch.device, is_weighted: bool = False) -> EmbeddingBagCollection | None:
    """All are summed: one look-up for tables of whatever pooling. Means are divided where the columns come to their places."""
    if not tables:
        return None
    configs = [
        EmbeddingBagConfig(
            name=module_name(table.name),
            num_embeddings=table.num_embeddings,
            embedding_dim=table.dim,
            feature_names=list(table.features),
            pooling=PoolingType.SUM,
            init_fn=_as_it_is,
        )
        for table in tables
    ]
    return EmbeddingBagCollection(tables=configs, is_weighted=is_weighted, device=device)


def module_name(name: str) -> str:
    """A table's name inside torch: any text is allowed for a table, but a module is neither `items` nor `user.id`.

    >>> module_name("user.id"), table_name(module_name("user.id"))
    ('table_user%2Eid', 'user.id')
    """
    return "table_" + name.replace("%", "%25").replace(".", "%2E")


def table_name(module: str) -> str:
    """The table that `module_name` named so."""
    return unquote(module.removeprefix("table_"))


def write_initial_rows(
    part: Tensor, table: Table, seed: int, *, row: int = 0, column: int = 0, generation: int = 0
) -> None:
    """Writes the initial values N(0, init_std) of a part of a table, from `row` and `column` on: the same for every sharding.

    Drawn from a generator keyed by (seed, table's name, generation, block of rows); `generation` counts re-initialisations.
    `part` (rows, columns) is float32, on any device; it is written a block at a time.
    """
    rows, columns = part.shape
    for block in range(row // INIT_BLOCK_ROWS, -(-(row + rows) // INIT_BLOCK_ROWS)):
        first = block * INIT_BLOCK_ROWS
        count = min(INIT_BLOCK_ROWS, table.num_embeddings - first)
        generator = torch.Generator().manual_seed(_key(f"{seed}/{table.name}/{generation}/{block}"))
        drawn = torch.randn((count, table.dim), generator=generator).mul_(table.init_std)
        start, stop = max(row - first, 0), min(row + rows - first, count)
        part[first + start - row : first + stop - row].copy_(drawn[start:stop, column : column + columns])


def _key(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()) >> 1
