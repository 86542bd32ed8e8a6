"""What one launched process measures. `python -m mtrec.bench.stages SPEC OUT` runs a stage and writes a JSON object to OUT.

SPEC is a JSON object: `stage`, the run prepared for it, and its sizes; with more than one worker the environment says which
rank this is (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT). Rank 0 writes, of `SUMMED` stages every rank. A stage's main number is
`rows_per_second`.
"""

import collections
import itertools
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any
from unittest import mock

import pyarrow.parquet as pq
import torch

from mtrec import parallel
from mtrec.ahead import copy_ahead
from mtrec.allocator import keep_freed_memory
from mtrec.batch import Batch, Label
from mtrec.bench import floor
from mtrec.dataset import Dataset
from mtrec.events import Saved, Step
from mtrec.feed import Fed, feed
from mtrec.labels import labels_of
from mtrec.model import MultiTaskModel
from mtrec.reader import Reader
from mtrec.run import Run, open_run
from mtrec.sources import label_columns, open_source
from mtrec.step import TrainState, build_state, train_step
from mtrec.train import Progress, be_deterministic, make_reader, train

Found = dict[str, Any]
SUMMED = ("encode", "score")  # stages of which every process measures, and writes, its share


def _data(run: Run) -> Dataset:
    return open_source(run.experiment, run.experiment.data.train, "data.train")


def _specs(run: Run) -> Any:
    return MultiTaskModel(run.experiment, run.encoder, run.labels, torch.device("meta")).specs


def _batches_of(run: Run, data: Dataset, labels: dict[str, Label]) -> Iterator[Batch]:
    for _, batch in feed(make_reader(run, data, Progress()), run.encoder, labels, None):
        yield batch


def _in_memory(run: Run, device: torch.device, steps: int) -> list[Batch]:
    """As many batches as there are steps, of the whole ones of an epoch: rows that are looked up again are in the cache, which
    those that training from Parquet reads are not.
    """
    data, labels = _data(run), labels_of(run.experiment, _specs(run))
    count = max(1, min(steps, data.num_rows // _batch_size(run)))
    return [copy_ahead(batch, device) for batch in itertools.islice(_batches_of(run, data, labels), count)]


def device_of(spec: Found) -> torch.device:
    """Of this rank: each has a GPU of its own."""
    if spec["device"] != "cuda":
        return torch.device(spec["device"])
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device


def _batch_size(run: Run) -> int:
    size = run.experiment.data.batch_size
    assert isinstance(size, int)
    return size


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _whole_pass(rows_of: Callable[[], Iterable[int]]) -> Found:
    """Rows/s of a pass over all rows, by the clock and by this process's CPU time. A whole one went before it, which touched the
    memory for the first time: a page of 2 MiB then takes some 3 ms, and windows need the last of them late in a pass.
    """
    for _ in rows_of():
        pass
    parallel.barrier()
    rows, started, cpu_started = 0, time.perf_counter(), time.process_time()
    for each in rows_of():
        rows += each
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu_started
    return {"rows_per_second": rows / seconds, "rows_per_cpu_second": rows / cpu}


def decode(run: Run, spec: Found) -> Found:
    """Raw decoding: pyarrow row group after row group, the columns that training reads, one thread, nothing else."""
    columns = list(dict.fromkeys([*run.encoder.columns, *label_columns(run.experiment)]))
    data = _data(run)

    def rows() -> Generator[int]:
        for file in data.files:
            parquet = pq.ParquetFile(file.path)
            for group in range(parquet.num_row_groups):
                yield parquet.read_row_group(group, columns=columns, use_threads=False).num_rows

    return _whole_pass(rows)


def read(run: Run, spec: Found) -> Found:
    """The reader alone: shuffled streams cut into global batches, not encoded."""
    keep_freed_memory()
    data = _data(run)

    def rows() -> Generator[int]:
        for piece in make_reader(run, data, Progress()):
            yield piece.record_batch.num_rows

    return _whole_pass(rows)


def encode(run: Run, spec: Found) -> Found:
    """Reading and encoding to ready batches, as training does."""
    keep_freed_memory()
    data, labels = _data(run), labels_of(run.experiment, _specs(run))

    def rows() -> Generator[int]:
        for batch in _batches_of(run, data, labels):
            yield batch.num_rows

    with parallel.process_group(torch.device("cpu")):  # of several workers each reads its streams
        return _whole_pass(rows)


def yardstick(run: Run, spec: Found) -> Found:
    """The bare loop of yardstick.py, fp32, data in memory, all cores in one process."""
    from mtrec.bench.yardstick import BareModel, inputs, train_bare

    device = device_of(spec)
    torch.set_num_threads(spec["threads"])
    with parallel.process_group(torch.device("cpu")):
        batches = [inputs(batch) for batch in _in_memory(run, device, spec["warmup"] + spec["steps"])]
    model = BareModel(run.encoder.tables, run.encoder.num_dense, run.experiment, device)
    train_bare(model, batches, spec["warmup"])
    seconds = train_bare(model, batches[-spec["steps"] :], spec["steps"])
    return {"rows_per_second": spec["steps"] * _batch_size(run) / seconds}


class Phases:
    """Adds up the time of each phase of a step; `mark` is for `TrainState.mark`. On a GPU each mark waits for the device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = collections.defaultdict(float)
        self.at = time.perf_counter()

    def mark(self, phase: str) -> None:
        """Adds the seconds since the last mark (at first, since this was made) to `phase`, which ends here."""
        _synchronize(self.device)
        now = time.perf_counter()
        self.seconds[phase] += now - self.at
        self.at = now


def _fresh_state(run: Run, steps: int, device: torch.device) -> TrainState:
    model = MultiTaskModel(run.experiment, run.encoder, run.labels, device)
    return build_state(
        run.experiment, model, run.labels, batch_size=_batch_size(run), total_steps=steps, device=device
    )


def compute(run: Run, spec: Found) -> Found:
    """`train_step` on batches that lie in memory, and what share of a step each phase takes."""
    device = device_of(spec)
    torch.set_num_threads(run.experiment.training.threads_per_worker)
    keep_freed_memory()
    if run.experiment.training.deterministic and device.type == "cpu":
        be_deterministic()
    with parallel.process_group(device, share_memory=run.experiment.training.exchange == "auto"):
        split = min(spec["steps"], 50)  # steps whose phases are timed
        batches = _in_memory(run, device, spec["warmup"] + spec["steps"] + split + 1)
        state = _fresh_state(run, spec["warmup"] + 2 * spec["steps"], device)
        endless = itertools.pairwise(itertools.cycle(batches))
        for batch, upcoming in itertools.islice(endless, spec["warmup"]):
            train_step(state, batch, upcoming=upcoming)
        _synchronize(device)
        parallel.barrier()
        started, cpu_started, times = time.perf_counter(), time.process_time(), []
        for batch, upcoming in itertools.islice(endless, spec["steps"]):
            before = time.perf_counter()
            train_step(state, batch, upcoming=upcoming)
            times.append(time.perf_counter() - before)
        _synchronize(device)
        seconds, cpu = time.perf_counter() - started, time.process_time() - cpu_started
        phases = Phases(device)
        state.mark = phases.mark
        for batch, upcoming in itertools.islice(endless, split):
            train_step(state, batch, upcoming=upcoming)
            phases.mark("between")
        total = sum(phases.seconds.values())
        return {
            "rows_per_second": spec["steps"] * _batch_size(run) / seconds,
            "median_step_ms": 1e3 * statistics.median(times),
            "cpu_ms_per_step": 1e3 * cpu / spec["steps"],
            "phases": {phase: each / total for phase, each in phases.seconds.items()},
        }


def whole(run: Run, spec: Found) -> Found:
    """`train()` itself, from Parquet to weights, checkpoints on and validation off: from step `warmup` to the last one."""
    device = device_of(spec)
    if int(os.environ.get("RANK", "0")) == 0:
        shutil.rmtree(run.checkpoints, ignore_errors=True)
    marks: dict[int, tuple[float, float]] = {}
    waits, saved = [], 0
    events = train(run, device=device)
    while (event := next(events, None)) is not None:
        if isinstance(event, Step):
            _synchronize(device)
            marks[event.step] = time.perf_counter(), time.process_time()
            if event.step > spec["warmup"]:
                waits.append(event.data_wait)
        if isinstance(event, Saved):
            saved += 1
    first, last = spec["warmup"], spec["warmup"] + spec["steps"]
    seconds, cpu = (end - start for start, end in zip(marks[first], marks[last], strict=True))
    return {
        "rows_per_second": spec["steps"] * _batch_size(run) / seconds,
        "cpu_ms_per_step": 1e3 * cpu / spec["steps"],
        "data_wait": statistics.fmean(waits),
        "checkpoints": saved,
        "peak_bytes": peak_bytes(),
        "peak_gpu_bytes": torch.cuda.max_memory_allocated() if device.type == "cuda" else 0,
    }


def whole_from_memory(run: Run, spec: Found) -> Found:
    """`whole` with batches that are read before the first step, those of an epoch at most: the same workers, fed from memory."""
    held: list[Fed] = []

    def from_memory(reader: Reader, *arguments: Any, **options: Any) -> Generator[Fed]:
        if not held:
            with closing(feed(reader, *arguments, **options)) as read:
                held.extend(itertools.islice(read, spec["warmup"] + spec["steps"]))
        yield from itertools.islice(itertools.cycle(held), reader.num_batches - reader.start_batch)

    with mock.patch("mtrec.train.feed", from_memory):
        return whole(run, spec)


def score(run: Run, spec: Found) -> Found:
    """Parquet to Parquet: this process's share of the files, through what `mtrec score` runs in each of its workers. The first
    file is scored once before, untimed, so that the memory has been touched; the peak is of that.
    """
    from mtrec.dataset import Source
    from mtrec.scored_files import Asked, score_files, score_here

    torch.set_num_threads(1)
    files = [file.path for file in _data(run).files][spec["part"] :: spec["parts"]][: spec["files"]]

    def seconds(files: list[str]) -> float:
        """From when the model is ready to when the last file is in its place."""
        marks: list[float] = []

        def timed(work: Any, pieces: Any) -> Any:
            for event in score_here(work, pieces):
                marks.append(time.perf_counter())
                yield event

        with tempfile.TemporaryDirectory(dir=spec["work"]) as folder:
            manifest = score_files(Asked(str(run.folder), Source(files), f"{folder}/out"), timed)
        if not manifest["complete"]:
            raise RuntimeError(f"Not all was scored: {manifest['failed']}")
        return marks[-1] - marks[0]

    seconds(files[:1])
    peak = peak_bytes()  # the process then loads a second model
    return {"rows_per_second": sum(pq.read_metadata(path).num_rows for path in files) / seconds(files), "peak_bytes": peak}


def ceilings(run: Run, spec: Found) -> Found:
    """Measured rates of matrix products and of gathering, for one process with one thread (or the GPU)."""
    device = device_of(spec)
    torch.set_num_threads(1)
    return {
        "fp32_flops": floor.matmul_flops(torch.float32, device),
        "bf16_flops": floor.matmul_flops(torch.bfloat16, device),
        "gather_bytes": floor.gather_bytes(device),
    }


def peak_bytes() -> int:
    """The largest resident memory of this process so far (Linux)."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) * 1024


STAGES: dict[str, Callable[[Run, Found], Found]] = {
    "decode": decode,
    "read": read,
    "encode": encode,
    "yardstick": yardstick,
    "compute": compute,
    "train": whole,
    "train_from_memory": whole_from_memory,
    "score": score,
    "ceilings": ceilings,
}


def main() -> None:
    """Runs the stage that the first argument describes."""
    spec = json.loads(sys.argv[1])
    found = STAGES[spec["stage"]](open_run(spec["run"]), spec)
    if spec["stage"] in SUMMED or int(os.environ.get("RANK", "0")) == 0:
        Path(f"{sys.argv[2]}{spec['part']}").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
