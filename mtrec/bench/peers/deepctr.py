"""deepctr-torch on the reference workload, as its examples/run_multitask_learning.py trains.

`fit` on arrays in memory, which it joins to one of float64, ids and padded lists among the numbers, and makes a TensorDataset of;
`MMOE` with gates of one layer, as the workload's; `compile("adagrad")`, which steps all rows of all tables, and an L2 penalty of
1e-5 over all of them, its default. The list is a `VarLenSparseFeat` with its default, the mean. No metrics: those of the example
cannot be had beside a regression.

Timed: an epoch of `fit`, from `on_epoch_begin` to `on_epoch_end`, over whole shuffled batches, after a `fit` on `warmup` batches.
Then `predict`, whole, over the same rows: it joins the arrays again in each call. Not timed: reading Parquet, which happens
before, and the joining of the arrays in `fit`.
"""

import sys
import time
import types

from .workload import Rows, Workload, answer, asked, read, speeds


def measure(work: Workload) -> tuple[float, float]:
    """Rows/s of training and of prediction."""
    # Importing it asks PyPI for a newer version, in a thread without a time limit, through a package that it does not declare.
    sys.modules["requests"] = types.ModuleType("requests")
    from deepctr_torch.callbacks import Callback  # type: ignore[import-not-found]
    from deepctr_torch.inputs import DenseFeat, SparseFeat, VarLenSparseFeat  # type: ignore[import-not-found]
    from deepctr_torch.models import MMOE  # type: ignore[import-not-found]

    class Clock(Callback):  # type: ignore[misc]
        """Seconds of the last epoch."""

        def on_epoch_begin(self, epoch: int, logs: object = None) -> None:
            self.started = time.perf_counter()

        def on_epoch_end(self, epoch: int, logs: object = None) -> None:
            self.seconds = time.perf_counter() - self.started

    rows = read(work)
    columns = [SparseFeat(name, vocabulary_size=size, embedding_dim=work.embedding_dim) for name, size in work.ids.items()]
    columns += [
        VarLenSparseFeat(SparseFeat(name, vocabulary_size=size, embedding_dim=work.embedding_dim), rows.longest(name), "mean")
        for name, size in work.sequences.items()
    ]
    columns += [DenseFeat(name, 1) for name in work.numbers]
    model = MMOE(
        columns,
        num_experts=work.num_experts,
        expert_dnn_hidden_units=work.expert_layers,
        gate_dnn_hidden_units=(),
        tower_dnn_hidden_units=work.tower_layers,
        task_types=["binary", "binary", "regression"],
        task_names=work.labels,
    )
    model.compile("adagrad", loss=["binary_crossentropy", "binary_crossentropy", "mse"])

    def train(part: Rows) -> float:
        clock = Clock()
        model.fit(part.features, part.labels, batch_size=work.batch_size, epochs=1, verbose=0, callbacks=[clock])
        return len(part.labels) / clock.seconds

    def predict(part: Rows) -> float:
        started = time.perf_counter()
        predicted = model.predict(part.features, work.batch_size)
        return len(predicted) / (time.perf_counter() - started)

    return speeds(work, rows, train, predict)


if __name__ == "__main__":
    answer(*measure(asked()))
