"""What reading and encoding a value costs, by how files hold it and what its feature does with it.

python pipelines/benchmark/features.py [--work runs/bench-features] [--rounds 5]

524,288 rows with eight columns of ids (Zipf 1.2; 1,000 to 500,000 different ones), eight of numbers, or a vector, from Parquet to
ready batches of 4,096 rows (the second epoch), and the fit before it; in every round each way is launched once, in a process of
its own, in turning order. CPU time a value, medians. Text is also read as plain text, as all of it was before it was read by its
dictionaries. Writes pipelines/benchmark/results/features-cpu.json.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mtrec.allocator import keep_freed_memory, kept
from mtrec.bench.launches import processor
from mtrec.dataset import Dataset, Source, open_dataset
from mtrec.features import Bucketized, Categorical, Dense, Encoder
from mtrec.feed import feed
from mtrec.prepare import FIT_ROWS
from mtrec.reader import Reader
from mtrec.run import versions

HERE = Path(__file__).parent
ROWS, FILES, ROW_GROUP = 524_288, 4, 65_536
DIFFERENT = (1_000, 5_000, 20_000, 50_000, 100_000, 200_000, 300_000, 500_000)
NAMES = [f"x_{number}" for number in range(len(DIFFERENT))]
SPREAD = 1_234_567_891_011  # makes neighbours strangers
WIDTH = 64  # of a vector

AS_IT_IS, HASHED = {"encoding": "identity", "num_embeddings": 500_002}, {"encoding": "hash", "num_embeddings": 500_002}
KNOWN = {"min_count": 1}

# way: the log that it reads, its features
WAYS: dict[str, tuple[str, Callable[..., Any], dict[str, Any]]] = {
    "numbers, identity": ("ids", Categorical, AS_IT_IS),
    "numbers, hash": ("ids", Categorical, HASHED),
    "numbers, vocabulary": ("ids", Categorical, KNOWN),
    "numbers of 64 bits, vocabulary": ("large ids", Categorical, KNOWN),
    "text, vocabulary": ("text", Categorical, KNOWN),
    "text, vocabulary, read as plain text": ("text", Categorical, KNOWN),
    "text, hash": ("text", Categorical, HASHED),
    "text, hash, read as plain text": ("text", Categorical, HASHED),
    "text that hardly repeats, vocabulary": ("rare text", Categorical, KNOWN),
    "float32, standardize": ("floats", Dense, {}),
    "float32 with nulls, standardize": ("floats with nulls", Dense, {}),
    "float32, log1p": ("floats", Dense, {"transform": "log1p"}),
    "float32, quantile": ("floats", Dense, {"scale": "quantile"}),
    "float32, buckets": ("floats", Bucketized, {}),
    f"a number of a vector of {WIDTH}, standardize": ("vectors", Dense, {"width": WIDTH}),
    f"a number of a vector of {WIDTH}, as it is": ("vectors", Dense, {"width": WIDTH, "scale": "none"}),
}


def _ids(rng: np.random.Generator) -> dict[str, np.ndarray]:
    return {name: rng.zipf(1.2, ROWS) % different for name, different in zip(NAMES, DIFFERENT, strict=True)}


def _floats(rng: np.random.Generator) -> dict[str, np.ndarray]:
    return {name: rng.lognormal(size=ROWS).astype(np.float32) for name in NAMES}


def _vectors(rng: np.random.Generator) -> dict[str, pa.Array]:
    numbers = pa.array(rng.normal(size=ROWS * WIDTH).astype(np.float32))
    return {NAMES[0]: pa.ListArray.from_arrays(np.arange(0, ROWS * WIDTH + 1, WIDTH, dtype=np.int32), numbers)}


LOGS: dict[str, Callable[[np.random.Generator], dict[str, Any]]] = {
    "ids": _ids,
    "large ids": lambda rng: {name: each * SPREAD for name, each in _ids(rng).items()},
    "text": lambda rng: {name: pa.array([f"item_{value:09d}" for value in each]) for name, each in _ids(rng).items()},
    "rare text": lambda rng: {
        name: pa.array([f"{value * SPREAD:032x}" for value in rng.permutation(ROWS).tolist()]) for name in NAMES
    },
    "floats": _floats,
    "floats with nulls": lambda rng: {
        name: pa.array(each, mask=rng.random(ROWS) < 0.05) for name, each in _floats(rng).items()
    },
    "vectors": _vectors,
}


def write_logs(work: Path) -> None:
    """Each log, where it is not there."""
    for log, columns in LOGS.items():
        folder, size = work / log, ROWS // FILES
        if len(list(folder.glob("*.parquet"))) == FILES:
            continue
        folder.mkdir(parents=True, exist_ok=True)
        table = pa.table(columns(np.random.default_rng(0)))
        for number in range(FILES):
            part = table.slice(number * size, size)
            pq.write_table(part, folder / f"{number}.parquet", row_group_size=ROW_GROUP, compression="zstd")


def measure(way: str, work: Path) -> dict[str, float]:
    """Nanoseconds of CPU time a value: of the fit, and of reading and encoding."""
    if way.endswith("plain text"):
        Dataset.with_dictionaries = lambda self, columns: self  # type: ignore[method-assign]
    keep_freed_memory()
    log, kind, options = WAYS[way]
    names = NAMES[:1] if log == "vectors" else NAMES
    data = open_dataset(Source(str(work / log)), names, place="data.train").with_dictionaries(names)
    started = time.process_time()
    batches = data.batches(names, data.rows_at_once(FIT_ROWS))
    encoder = Encoder.fit([kind(name, **options) for name in names], batches, schema=data.schema, embedding_dim=16)
    fitted = time.process_time()
    for _ in feed(Reader(data, names, batch_size=4096), encoder, {}, None):  # touches the memory for the first time
        pass
    began, rows = time.process_time(), 0
    for fed in feed(Reader(data, names, batch_size=4096, epoch=1), encoder, {}, None):
        rows += fed.batch.num_rows
    read = time.process_time()
    assert rows == ROWS
    per_value = 1e9 / (ROWS * (WIDTH if log == "vectors" else len(names)))
    return {"fit": (fitted - started) * per_value, "read_and_encode": (read - began) * per_value}


def main() -> None:
    """Reads the arguments, measures, writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/bench-features"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--way", choices=list(WAYS), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.way is not None:
        print(json.dumps(measure(arguments.way, arguments.work)))
        return
    write_logs(arguments.work)
    found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for number in range(arguments.rounds):
        for way in list(WAYS) if number % 2 == 0 else list(WAYS)[::-1]:
            command = [sys.executable, __file__, "--work", str(arguments.work), "--way", way]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env={**os.environ, **kept(os.environ)})
            found[way].append(json.loads(done.stdout))
            print(f"round {number + 1}, {way}: {found[way][-1]}", flush=True)
    ways = {}
    for way, launches in found.items():
        of_way = {what: [each[what] for each in launches] for what in launches[0]}
        ways[way] = {
            what: {"ns_a_value": {"median": statistics.median(values), "low": min(values), "high": max(values)}}
            for what, values in of_way.items()
        }
    about = {**processor(), "versions": versions(), "rows": ROWS, "rounds": arguments.rounds}
    result = {"about": about, "ways": ways}
    (HERE / "results" / "features-cpu.json").write_text(json.dumps(result, indent=1) + "\n")
    print("\n| CPU time a value | fit | reading and encoding |\n|---|---|---|")
    for way, each in ways.items():
        cells = [f"{each[what]['ns_a_value'][key]:.0f}" for what in each for key in ("median", "low", "high")]
        print(f"| {way} | {cells[0]} ns ({cells[1]} to {cells[2]}) | {cells[3]} ns ({cells[4]} to {cells[5]}) |")


if __name__ == "__main__":
    main()
