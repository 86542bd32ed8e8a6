"""The model of a checkpoint, ready to predict in one process; its predictions as columns; the golden rows.

Golden rows: `prepare` keeps a sample of the training rows in the run (sample.parquet). With every checkpoint, the ranks
that train predict it with the weights they hold, and rank 0 lays the predictions (predictions.parquet) into the
checkpoint. So whoever loads a checkpoint later, on another machine, can see that it predicts what it did in training; and
how predictions were distributed then. It costs a forward pass of some thousand rows for each checkpoint.

Legend: B rows of a batch, N rows of the sample.
"""

import dataclasses
import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from mtrec import checkpoint, parallel
from mtrec.batch import Batch, make_batch
from mtrec.checkpoint import Checkpoint
from mtrec.experiment import Experiment
from mtrec.model import MultiTaskModel
from mtrec.run import SAMPLE_FILE, Run
from mtrec.step import build_state
from mtrec.written import as_written

Floats = NDArray[np.float64]

PREDICTIONS_FILE = "predictions.parquet"
GOLDEN_ROWS = 256  # of the sample, evenly spread: compared one by one


def load_model(run: Run, found: Checkpoint, device: torch.device) -> MultiTaskModel:
    """The model of a checkpoint, in this process alone (inside `parallel.process_group`): all tables, no optimizer state."""
    experiment = run.experiment
    assert isinstance(experiment.data.batch_size, int)
    model = MultiTaskModel(experiment, run.encoder, run.labels, device)
    # How tables are cut and stepped does not matter here: one shard each, and the one optimizer that keeps no state.
    whole = {
        name: dataclasses.replace(table, sharding="table_wise") if table.sharding == "row_wise" else table
        for name, table in model.embeddings.specs.items()
    }
    model.embeddings.specs = whole
    stateless = experiment.optimizer.tables.model_copy(update={"kind": "sgd"})
    optimizer = experiment.optimizer.model_copy(update={"tables": stateless})
    state = build_state(
        experiment.model_copy(update={"optimizer": optimizer}),
        model,
        run.labels,
        batch_size=experiment.data.batch_size,
        total_steps=1,
        device=device,
    )
    wanted = {key: value for key, value in state.tensors().items() if key.startswith(("tables.", "dense."))}
    checkpoint.load(found.folder, wanted)
    state.tables.forget_cached_rows()
    model.eval()
    return model


def predict(model: MultiTaskModel, batch: Batch, device: torch.device, bf16: bool) -> dict[str, Floats]:
    """{column: (B,) float64} of `Objectives.predictions`, as `evaluate` computes them; every rank calls it alike."""
    with torch.no_grad():
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16):
            logits = model(batch.to(device))
        logits = {name: each.double() for name, each in logits.items()}  # a float32 sigmoid is 1 from a logit of 17 on
        return {name: column.cpu().numpy() for name, column in model.objectives.predictions(logits).items()}


class TrainingSample:
    """The sample of training rows that the run keeps.

    Raises ValueError where the run has none.
    """

    def __init__(self, run: Run) -> None:
        path = run.folder / SAMPLE_FILE
        if not path.is_file():
            raise ValueError(f"{run.folder} holds no {SAMPLE_FILE}: it was prepared by an earlier mtrec. Train it again.")
        with as_written(path, "Parquet"):
            table = pq.ParquetFile(path).read().combine_chunks()  # read_table would import pyarrow.dataset
        batches = table.to_batches()
        self.rows = batches[0] if batches else pa.RecordBatch.from_pylist([], table.schema)
        self._encoder, self._experiment = run.encoder, run.experiment

    def predict(self, model: MultiTaskModel, device: torch.device) -> pa.Table | None:
        """(N,) float64 columns on rank 0, None elsewhere. Each rank predicts its part; the model is left as it was."""
        count, rank, world = self.rows.num_rows, parallel.rank(), parallel.world_size()
        start, stop = count * rank // world, count * (rank + 1) // world
        part = make_batch(self.rows.slice(start, stop - start), self._encoder, {}, None)
        was_training = model.training
        model.eval()
        columns = predict(model, part, device, uses_bf16(self._experiment))
        model.train(was_training)
        parts = parallel.gather_objects(columns)
        if parts is None:
            return None
        return pa.table({name: np.concatenate([each[name] for each in parts]) for name in columns})

    def files(self, model: MultiTaskModel, device: torch.device) -> dict[str, bytes]:
        """What goes into a checkpoint beside the weights, {} on other ranks than 0."""
        table = self.predict(model, device)
        if table is None:
            return {}
        sink = io.BytesIO()
        pq.write_table(table, sink, use_dictionary=False, compression="zstd")
        return {PREDICTIONS_FILE: sink.getvalue()}


def uses_bf16(experiment: Experiment) -> bool:
    """Whether the dense part was trained, and is scored, in bf16."""
    return experiment.training.precision == "bf16"


def training_predictions(found: Checkpoint) -> dict[str, Floats]:
    """{column: (N,)} of the training sample when the checkpoint was written. Raises ValueError where it has none."""
    path = found.folder / PREDICTIONS_FILE
    if not path.is_file():
        raise ValueError(f"{found.folder} holds no {PREDICTIONS_FILE}: it was written by an earlier mtrec. Train again.")
    table = pq.ParquetFile(path).read()
    return {name: table[name].to_numpy() for name in table.column_names}


def golden_rows(sample: pa.RecordBatch) -> NDArray[np.int64]:
    """Which rows of the sample are golden: `GOLDEN_ROWS`, evenly spread, or all where there are fewer."""
    count = min(GOLDEN_ROWS, sample.num_rows)
    return np.asarray(np.arange(count, dtype=np.int64) * sample.num_rows // max(1, count))


def largest_difference(found: dict[str, Floats], expected: dict[str, Floats]) -> tuple[str, float]:
    """(column, difference) where two predictions of the same rows differ most: |a - b| / max(1, |b|), infinite where one is NaN.

    >>> largest_difference({"p": np.array([0.5]), "s": np.array([202.0])}, {"p": np.array([0.4]), "s": np.array([200.0])})
    ('p', 0.09999999999999998)
    >>> largest_difference({"p": np.array([np.nan]), "s": np.array([2.0])}, {"p": np.array([0.4]), "s": np.array([2.5])})
    ('p', inf)
    """
    worst = ("", 0.0)
    for name, values in expected.items():
        difference = np.nan_to_num(np.abs(found[name] - values) / np.maximum(1.0, np.abs(values)), nan=np.inf)
        if len(difference) and float(difference.max()) > worst[1]:
            worst = (name, float(difference.max()))
    return worst
