"""What reading and encoding an id costs, by how files hold it and what its table does with it.

python pipelines/benchmark/ids.py [--work runs/bench-ids] [--rounds 5]

524,288 rows with eight columns of ids (Zipf 1.2; 1,000 to 500,000 different ones), from Parquet to ready batches of 4,096 rows,
and the fit before it; in every round each way is launched once, in a process of its own, in turning order. CPU time a value,
medians; ratios are taken within a round. Text is also read as plain text, as all of it was before it was read by its
dictionaries. Writes pipelines/benchmark/results/ids-cpu.json.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

HERE = Path(__file__).parent
ROWS, FILES, ROW_GROUP = 524_288, 4, 65_536
DIFFERENT = (1_000, 5_000, 20_000, 50_000, 100_000, 200_000, 300_000, 500_000)
NAMES = [f"id_{number}" for number in range(len(DIFFERENT))]
SPREAD = 1_234_567_891_011  # makes neighbours strangers

# way: the log that it reads, options of its features
WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "numbers, identity": ("numbers", {"encoding": "identity", "num_embeddings": 500_002}),
    "numbers, hash": ("numbers", {"encoding": "hash", "num_embeddings": 500_002}),
    "numbers, vocabulary": ("numbers", {"min_count": 1}),
    "numbers of 64 bits, vocabulary": ("large numbers", {"min_count": 1}),
    "text, vocabulary": ("text", {"min_count": 1}),
    "text, vocabulary, read as plain text": ("text", {"min_count": 1}),
    "text, hash": ("text", {"encoding": "hash", "num_embeddings": 500_002}),
    "text, hash, read as plain text": ("text", {"encoding": "hash", "num_embeddings": 500_002}),
    "text that hardly repeats, vocabulary": ("rare text", {"min_count": 1}),
}
FIRST = next(iter(WAYS))


def write_logs(work: Path) -> None:
    """Each of the four logs, where it is not there."""
    rng = np.random.default_rng(0)
    ids = {name: rng.zipf(1.2, ROWS) % different for name, different in zip(NAMES, DIFFERENT, strict=True)}
    once = {name: rng.permutation(ROWS) for name in NAMES}
    logs = {
        "numbers": ids,
        "large numbers": {name: each * SPREAD for name, each in ids.items()},
        "text": {name: pa.array([f"item_{value:09d}" for value in each]) for name, each in ids.items()},
        "rare text": {name: pa.array([f"{value * SPREAD:032x}" for value in each.tolist()]) for name, each in once.items()},
    }
    for log, columns in logs.items():
        folder, table, size = work / log, pa.table(columns), ROWS // FILES
        if len(list(folder.glob("*.parquet"))) == FILES:
            continue
        folder.mkdir(parents=True, exist_ok=True)
        for number in range(FILES):
            part = table.slice(number * size, size)
            pq.write_table(part, folder / f"{number}.parquet", row_group_size=ROW_GROUP, compression="zstd")


def measure(way: str, work: Path) -> dict[str, float]:
    """Nanoseconds of CPU time a value: of the fit, and of reading and encoding."""
    from mtrec.dataset import Dataset, Source, open_dataset
    from mtrec.features import Categorical, Encoder
    from mtrec.feed import feed
    from mtrec.reader import Reader

    if way.endswith("plain text"):
        Dataset.with_dictionaries = lambda self: self  # type: ignore[method-assign]
    log, options = WAYS[way]
    data = open_dataset(Source(str(work / log)), NAMES, place="data.train").with_dictionaries()
    features = [Categorical(name, **options) for name in NAMES]
    started = time.process_time()
    encoder = Encoder.fit(features, data.batches(NAMES, ROW_GROUP), schema=data.schema, embedding_dim=16)
    fitted = time.process_time()
    rows = 0
    for fed in feed(Reader(data, NAMES, batch_size=4096), encoder, {}, None):
        rows += fed.batch.num_rows
    assert rows == ROWS
    per_value = 1e9 / (ROWS * len(NAMES))
    return {"fit": (fitted - started) * per_value, "read_and_encode": (time.process_time() - fitted) * per_value}


def main() -> None:
    """Reads the arguments, measures, writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/bench-ids"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--way", choices=list(WAYS), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.way is not None:
        print(json.dumps(measure(arguments.way, arguments.work)))
        return
    from mtrec.bench.launches import processor
    from mtrec.run import versions

    write_logs(arguments.work)
    found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for number in range(arguments.rounds):
        for way in list(WAYS) if number % 2 == 0 else list(WAYS)[::-1]:
            command = [sys.executable, __file__, "--work", str(arguments.work), "--way", way]
            found[way].append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
            print(f"round {number + 1}, {way}: {found[way][-1]}", flush=True)
    ways = {}
    for way, launches in found.items():
        ways[way] = {}
        for what in launches[0]:
            values = [each[what] for each in launches]
            ratios = [mine / base[what] for mine, base in zip(values, found[FIRST], strict=True)]
            ways[way][what] = {
                "ns_a_value": {"median": statistics.median(values), "low": min(values), "high": max(values)},
                f"times_{FIRST}": {"median": statistics.median(ratios), "low": min(ratios), "high": max(ratios)},
            }
    about = {**processor(), "versions": versions(), "rows": ROWS, "columns": len(NAMES), "rounds": arguments.rounds}
    result = {"about": about, "ways": ways}
    (HERE / "results" / "ids-cpu.json").write_text(json.dumps(result, indent=1) + "\n")
    print("\n| CPU time a value | fit | reading and encoding |\n|---|---|---|")
    for way, each in ways.items():
        cells = [f"{each[what]['ns_a_value'][key]:.0f}" for what in each for key in ("median", "low", "high")]
        print(f"| {way} | {cells[0]} ns ({cells[1]} to {cells[2]}) | {cells[3]} ns ({cells[4]} to {cells[5]}) |")


if __name__ == "__main__":
    main()
