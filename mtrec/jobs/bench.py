"""The part of `mtrec bench` that puts Ray Data beside our reader.

`python -m mtrec.jobs.bench SPEC OUT`, launched as `mtrec.bench.stages` is.
"""

import json
import sys
import time
from pathlib import Path

from mtrec.bench.stages import Found
from mtrec.features.arrays import is_list
from mtrec.jobs.connection import connect
from mtrec.run import open_run
from mtrec.sources import label_columns, open_source


def ray_data(spec: Found) -> Found:
    """Rows/s of Ray Data's `iter_torch_batches` over the columns that training reads, but for lists, which make no tensor.

    Ray's workers are started and warm when the clock starts: all has been read through them before.
    """
    connect()
    import ray

    ray.data.DataContext.get_current().enable_progress_bars = False
    run = open_run(spec["run"])
    data = open_source(run.experiment, run.experiment.data.train, "data.train")
    columns = dict.fromkeys([*run.encoder.columns, *label_columns(run.experiment)])
    wanted = [name for name in columns if not is_list(data.schema.field(name).type)]

    def iterate(paths: list[str]) -> int:
        batches = ray.data.read_parquet(paths, columns=wanted).iter_torch_batches(batch_size=spec["batch_size"])
        return sum(len(next(iter(batch.values()))) for batch in batches)

    paths = [file.path for file in data.files]
    iterate(paths)
    started = time.perf_counter()
    rows = iterate(paths)
    return {"rows_per_second": rows / (time.perf_counter() - started)}


def main() -> None:
    """Measures, and writes what was found."""
    Path(sys.argv[2] + "0").write_text(json.dumps(ray_data(json.loads(sys.argv[1]))))


if __name__ == "__main__":
    main()
