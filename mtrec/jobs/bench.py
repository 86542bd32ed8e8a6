"""The part of `mtrec bench` that puts Ray Data beside our reader.

`python -m mtrec.jobs.bench SPEC OUT`, launched as `mtrec.bench.stages` is.
"""

import json
import sys
import time
from pathlib import Path

from mtrec.bench.stages import Found
from mtrec.jobs.train import connect
from mtrec.run import label_columns, open_run


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


def main() -> None:
    """Measures, and writes what was found."""
    Path(sys.argv[2] + "0").write_text(json.dumps(ray_data(json.loads(sys.argv[1]))))


if __name__ == "__main__":
    main()
