"""The parts of `mtrec bench` that need Ray: an empty trainer (time and memory of an idle worker), and Ray Data beside our reader.

`python -m mtrec.jobs.bench SPEC OUT`, launched as `mtrec.bench.stages` is.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

from mtrec.bench.stages import Found, peak_bytes
from mtrec.jobs.train import connect
from mtrec.run import label_columns, open_run


def empty_trainer(spec: Found) -> Found:
    """Seconds from here until a Ray Train worker has imported torchrec, and the memory that it holds then."""
    connect()
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    started = time.time()
    note = Path(spec["work"]) / "idle.json"

    def idle(config: dict[str, Any]) -> None:
        import torchrec  # noqa: F401

        Path(config["note"]).write_text(json.dumps({"at": time.time(), "bytes": peak_bytes()}))

    TorchTrainer(
        idle,
        train_loop_config={"note": str(note)},
        scaling_config=ScalingConfig(num_workers=1),
        run_config=RunConfig(name="idle", storage_path=str(Path(spec["work"]) / "ray")),
    ).fit()
    found = json.loads(note.read_text())
    return {"seconds": found["at"] - started, "idle_bytes": found["bytes"]}


def ray_data(spec: Found) -> Found:
    """Rows/s of Ray Data's `iter_torch_batches` over the columns that training reads, but for lists, which make no tensor."""
    connect()
    import pyarrow.parquet as pq
    import ray

    ray.data.DataContext.get_current().enable_progress_bars = False
    run = open_run(spec["run"])
    columns = list(dict.fromkeys([*run.encoder.columns, *label_columns(run.experiment)]))
    path = run.experiment.data.train.path
    flat = [field.name for field in pq.ParquetDataset(path).schema if not str(field.type).startswith("list")]
    data = ray.data.read_parquet(path, columns=[name for name in columns if name in flat])
    rows, started = 0, 0.0
    for batch in data.iter_torch_batches(batch_size=spec["batch_size"]):
        size = len(next(iter(batch.values())))
        if not started:  # the first batch waits for the workers to start
            started = time.perf_counter()
            continue
        rows += size
    return {"rows_per_second": rows / (time.perf_counter() - started)}


STAGES = {"empty_trainer": empty_trainer, "ray_data": ray_data}


def main() -> None:
    """Runs the stage that the first argument describes."""
    spec = json.loads(sys.argv[1])
    Path(sys.argv[2] + "0").write_text(json.dumps(STAGES[spec["stage"]](spec)))


if __name__ == "__main__":
    main()
