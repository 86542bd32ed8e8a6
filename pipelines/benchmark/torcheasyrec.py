"""Parquet to weights beside TorchEasyRec on the reference workload: the same rows, tables, layers and batches on the same cores.

python pipelines/benchmark/torcheasyrec.py CHECKOUT [--work runs/bench] [--rounds 5] [--steps 150] [--python PYTHON]

CHECKOUT is a clone of TorchEasyRec, which is on no package index; nothing is written to it, its package is copied to the work
folder. Without --python an environment is made there: the packages of this one, torch and torchrec among them, under those of
`NEEDED` from the package index (TorchEasyRec asks protobuf for what it no longer has since 5.26, and newer TensorBoards want a
newer one). What else it imports is replaced by stubs where it is not installed (`mtrec/bench/peers/torcheasyrec.py`): pyfg,
graphlearn and common_io, whose versions that it wants the index lacks, odps, alibabacloud_credentials, confluent_kafka. Training
on encoded Parquet calls none of them, and a stub that is used raises.

Every round launches each way once, in turning order: TorchEasyRec in one process with two threads and in two with one each,
both also with glibc told to keep freed memory, in pages of 2 MiB; all in fp32 and in bf16 (its own `mixed_precision:
"BF16"`: autocast, which works on a CPU as it is); and `mtrec bench`'s Parquet to weights on two workers. Timed is the steady
state without validation, in rank 0: from the end of step `warmup` to that of the last one. Ratios are taken within a round,
their medians count. `its best` is the layout whose median is the highest.

TorchEasyRec does what it does by itself: `train_and_evaluate` with its data loader, sharding planner and train pipeline, whose
`progress` is called as it is between two looks at the clock. Its config is written here, of what is fastest for it: no processes
that read beside the ranks (`num_workers: 0`; with one or two for each rank it was slower on two cores; --readers tries it), no
shuffle (mtrec shuffles), no checkpoint within the timed steps without --checkpoint (mtrec writes one: half a second, which is
much of few steps), no TensorBoard, no metrics, fused Adam. Otherwise than in mtrec are: Adam at a constant rate (AdamW,
cosine, a clipped norm); conversion, learned by its tower alone (p(click) x p(conversion | click)); dwell, by the squared error of
log(1 + seconds) of clicked rows; numbers, which are not standardized.

It cannot read the log's labels (int8; nulls become NaN), so it has a copy, written once and not timed: flags as int32, log(1 +
seconds) in place of seconds, 0 in place of null. All else is as in the log: zstd, row groups, dictionaries.

Prints a table and writes pipelines/benchmark/results/torcheasyrec-cpu.json, anew after every round; the one that is there is of
`--steps 280 --only bf16`.
"""

import argparse
import dataclasses
import json
import math
import os
import shutil
import socket
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from rich.table import Table

import mtrec.bench
from mtrec.allocator import KEPT_AT_THE_END, LARGEST_KEPT, TUNABLES, huge_pages
from mtrec.atomic import write_atomically
from mtrec.bench.environment import IDS, LABELS, LISTS, NUMBERS, interpreter
from mtrec.bench.launches import Asked, Measurement, about, launch, prepare_variants, spread
from mtrec.run import Run, open_run
from mtrec.terminal import console, say

HERE = Path(__file__).parent
RESULT = HERE / "results" / "torcheasyrec-cpu.json"
NEEDED = (
    *("psutil==7.2.2", "safetensors==0.8.0", "anytree==2.13.0"),
    *("protobuf==4.25.8", "grpcio-tools==1.62.3", "tensorboard==2.19.0"),
)
GLIBC = {
    "MALLOC_MMAP_THRESHOLD_": str(LARGEST_KEPT),
    "MALLOC_TRIM_THRESHOLD_": str(KEPT_AT_THE_END),
    TUNABLES: huge_pages({}),
}
BATCH_SIZE = 4096
PRECISIONS = ("bf16", "fp32")
SAME, BEST = "2 processes x 1 thread", "its best"
WANTED = {SAME: 1.3, BEST: 1.2}  # times TorchEasyRec, in bf16


@dataclasses.dataclass(frozen=True)
class Layout:
    """How TorchEasyRec is started.

    Attributes:
        processes, threads: ranks, and threads of each.
        readers: `num_workers` of its data loaders: processes that read and parse for a rank; 0: the rank does it.
        environment: further variables.
    """

    processes: int
    threads: int
    readers: int
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)


LAYOUTS = {
    "1 process x 2 threads": Layout(1, 2, 0),
    "1 process x 2 threads, malloc": Layout(1, 2, 0, GLIBC),
    SAME: Layout(2, 1, 0),
    f"{SAME}, malloc": Layout(2, 1, 0, GLIBC),
}


def make_environment(folder: Path) -> Path:
    """The interpreter of an environment with this one's packages and those of `NEEDED`; made where it is not there."""
    python, stamp = interpreter(folder), folder / "installed.txt"
    stated = "\n".join([sys.version, sysconfig.get_path("purelib"), *NEEDED, ""])
    if not (stamp.is_file() and stamp.read_text() == stated):
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        ask = [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
        own = Path(subprocess.run(ask, check=True, stdout=subprocess.PIPE, text=True).stdout.strip())
        (own / "beside.pth").write_text(sysconfig.get_path("purelib") + "\n")
        subprocess.run([str(python), "-m", "pip", "install", "-qq", "--no-deps", *NEEDED], check=True)
        write_atomically(stamp, stated)
    return python


def commit_of(checkout: Path) -> str:
    """The commit that a clone is at, `+` behind it where files were changed. CalledProcessError where it is no clone."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(checkout), *arguments]
        return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()

    return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")


def copy_package(checkout: Path, folder: Path, python: Path) -> None:
    """Its package with the modules made from its .proto files, as its scripts/gen_proto.sh makes them."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(checkout / "tzrec", folder / "tzrec", ignore=shutil.ignore_patterns("__pycache__", "*_pb2.py*"))
    protos = [str(path.relative_to(folder)) for path in sorted((folder / "tzrec" / "protos").rglob("*.proto"))]
    subprocess.run([str(python), "-m", "grpc_tools.protoc", "-I", ".", "--python_out=.", *protos], cwd=folder, check=True)


def copy_log(source: Path, folder: Path) -> None:
    """The log with labels as TorchEasyRec reads them; what is there is used again."""
    if folder.exists():
        return
    unfinished = folder.with_name(folder.name + "-unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    for path in sorted(source.glob("*.parquet")):
        with pq.ParquetFile(path) as parquet:
            chunks = [parquet.metadata.row_group(0).column(number) for number in range(parquet.metadata.num_columns)]
            repeating = [chunk.path_in_schema for chunk in chunks if chunk.has_dictionary_page]
            tables = (with_labels(parquet.read_row_group(group)) for group in range(parquet.num_row_groups))
            first = next(tables)
            with pq.ParquetWriter(unfinished / path.name, first.schema, compression="zstd", use_dictionary=repeating) as writer:
                for table in (first, *tables):
                    writer.write_table(table, row_group_size=table.num_rows)
    unfinished.rename(folder)


def with_labels(table: pa.Table) -> pa.Table:
    """Flags as int32, seconds as log(1 + seconds), 0 in place of null."""
    for name in LABELS:
        column = table[name]
        seconds = pa.types.is_floating(column.type)
        made = (pc.log1p(column) if seconds else column.cast(pa.int32())).fill_null(0)
        table = table.set_column(table.schema.get_field_index(name), name, made)
    return table


def config_of(run: Run, files: str, output: Path, layout: Layout, precision: str, steps: int, every: int) -> str:
    """TorchEasyRec's pipeline config (protobuf's text) of the run's tables and layers; a checkpoint `every` so many steps."""
    experiment, options = run.experiment, run.experiment.model.architecture.options
    dim, tower = experiment.model.embedding_dim, list(experiment.model.tower_layers)
    sizes = {feature: table.num_embeddings for table in run.encoder.tables for feature in table.features}
    pooling = dict.fromkeys(IDS, "sum")  # of one id each: its way to the mean costs it more
    pooling |= {feature: table.pooling for table in run.encoder.tables for feature in table.features if feature in LISTS}
    features = [
        f'feature_configs {{ id_feature {{ feature_name: "{name}" expression: "user:{name}" num_buckets: {sizes[name]} '
        f'embedding_dim: {dim} pooling: "{pooling[name]}" }} }}'
        for name in (*IDS, *LISTS)
    ]
    features += [
        f'feature_configs {{ raw_feature {{ feature_name: "{name}" expression: "user:{name}" }} }}' for name in NUMBERS
    ]
    click, conversion, dwell = LABELS
    clicked = f'task_space_indicator_label: "{click}" in_task_space_weight: 1 out_task_space_weight: 0'
    losses = {click: "binary_cross_entropy {}", conversion: "binary_cross_entropy {}", dwell: "l2_loss {}"}
    towers = [
        f'task_towers {{ tower_name: "{label}" label_name: "{label}" mlp {{ hidden_units: {tower} }} '
        f"losses {{ {loss} }} {clicked if label == dwell else ''} }}"
        for label, loss in losses.items()
    ]
    return "\n".join(
        [
            f'train_input_path: "{files}"',
            f'model_dir: "{output}"',
            "train_config {",
            f"sparse_optimizer {{ rowwise_adagrad_optimizer {{ lr: {experiment.optimizer.tables.learning_rate} }} "
            "constant_learning_rate {} }",
            f"dense_optimizer {{ adam_optimizer {{ lr: {0.001 * math.sqrt(BATCH_SIZE / 512)} fused: true }} "
            "constant_learning_rate {} }",
            f"num_steps: {steps} save_checkpoints_steps: {every} log_step_count_steps: {steps} use_tensorboard: false",
            'mixed_precision: "BF16"' if precision == "bf16" else "",
            "}",
            f"data_config {{ batch_size: {BATCH_SIZE // layout.processes} dataset_type: ParquetDataset fg_mode: FG_NONE",
            f"num_workers: {layout.readers} pin_memory: false",
            *[f'label_fields: "{label}"' for label in LABELS],
            "}",
            *features,
            'model_config { feature_groups { group_name: "all" group_type: DEEP',
            *[f'feature_names: "{name}"' for name in (*IDS, *LISTS, *NUMBERS)],
            f"}} mmoe {{ expert_mlp {{ hidden_units: {options['expert_layers']} }} num_expert: {options['num_experts']}",
            *towers,
            "} }",
            "",
        ]
    )


def first_failure(processes: Sequence["subprocess.Popen[bytes]"]) -> int | None:
    """Waits for all ranks, or for the first one that fails, whose number it returns; none of them is left running."""
    try:
        while True:
            codes = [process.poll() for process in processes]
            for rank, code in enumerate(codes):
                if code:
                    return rank
            if None not in codes:
                return None
            time.sleep(0.2)
    finally:
        for process in processes:
            process.kill()
            process.wait()


def launch_peer(python: Path, source: Path, config: str, folder: Path, layout: Layout, asked: Asked) -> dict[str, Any]:
    """Starts the ranks, as torchrun does, and returns what rank 0 found."""
    (folder / "pipeline.config").write_text(config)
    spec = {
        "source": str(source),
        "config": str(folder / "pipeline.config"),
        "batch_size": BATCH_SIZE,
        "warmup": asked.warmup,
        "steps": asked.steps,
    }
    command = [str(python), "-m", "peers.torcheasyrec", json.dumps(spec), str(folder / "found")]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(layout.processes):
        environment = {
            **os.environ,
            **layout.environment,
            "PYTHONPATH": str(Path(mtrec.bench.__file__).parent),
            "OMP_NUM_THREADS": str(layout.threads),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "WORLD_SIZE": str(layout.processes),
            "LOCAL_WORLD_SIZE": str(layout.processes),
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
        }
        with (folder / f"said{rank}").open("w") as said:
            processes.append(subprocess.Popen(command, env=environment, stdout=said, stderr=subprocess.STDOUT))
    failed = first_failure(processes)
    if failed is not None:
        raise RuntimeError(f"TorchEasyRec failed:\n{(folder / f'said{failed}').read_text()}")
    found: dict[str, Any] = json.loads((folder / "found").read_text())
    return found


def ours(precision: str) -> str:
    """What mtrec's launch is called."""
    return f"mtrec {precision}, 2 workers"


def theirs(precision: str, layout: str) -> str:
    """What TorchEasyRec's launch is called."""
    return f"TorchEasyRec {precision}, {layout}"


def ratios(rounds: Sequence[Mapping[str, Mapping[str, Any]]]) -> dict[str, Any]:
    """{mtrec / TorchEasyRec: of each round, in the same precision}, of what was launched."""

    def speeds(name: str) -> list[float]:
        return [each[name]["rows_per_second"] for each in rounds]

    found: dict[str, Any] = {}
    for precision in PRECISIONS:
        others = {layout: theirs(precision, layout) for layout in LAYOUTS if theirs(precision, layout) in rounds[0]}
        if not others or ours(precision) not in rounds[0]:
            continue
        best = max(others, key=lambda layout: statistics.median(speeds(others[layout])))
        for layout, name in {**others, BEST: others[best]}.items():
            pairs = zip(speeds(ours(precision)), speeds(name), strict=True)
            each = spread([mine / other for mine, other in pairs])
            if precision == "bf16" and layout in WANTED:
                each["wanted"] = WANTED[layout]
            found[f"{ours(precision)} / {theirs(precision, layout)}"] = each | ({"best": best} if layout == BEST else {})
    return found


def show(found: Mapping[str, Any]) -> None:
    """Prints what was found."""
    to, facts = console(), found["about"]
    say(to, f"medians of {facts['rounds']} interleaved rounds (lowest to highest)", word=facts["processor"], style="bold")
    for title, key, digits in (("Parquet to weights, rows/s", "rows_per_second", 0), ("ratio, within a round", "ratios", 2)):
        table = Table(box=None, pad_edge=False, header_style="bold")
        for name in (title, "median", "lowest to highest", "wanted"):
            table.add_column(name, justify="left" if name == title else "right")
        for name, each in found[key].items():
            cells = [f"{each[which]:,.{digits}f}" for which in ("median", "low", "high")]
            best = f" ({each['best']})" if "best" in each else ""
            table.add_row(name + best, cells[0], f"{cells[1]} to {cells[2]}", str(each.get("wanted", "")))
        to.print(table)


def main() -> None:
    """Reads the arguments, makes what is needed, measures, writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path, help="a clone of TorchEasyRec")
    parser.add_argument("--python", type=Path, help="of an environment that has what TorchEasyRec needs")
    parser.add_argument("--work", type=Path, default=Path("runs/bench"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--rows", type=int, default=2_000_000)
    parser.add_argument("--only", nargs="+", default=[""], help="parts of names: launch what has one of them")
    parser.add_argument("--readers", type=int, help="processes that read for each rank of TorchEasyRec, in all layouts")
    parser.add_argument("--checkpoint", action="store_true", help="TorchEasyRec writes one within the timed steps, too")
    parser.add_argument("--output", type=Path, default=RESULT)
    arguments = parser.parse_args()
    asked = Asked(
        HERE / "reference.yaml", arguments.work.absolute(), rounds=arguments.rounds, steps=arguments.steps, rows=arguments.rows
    )
    if (asked.warmup + asked.steps) * BATCH_SIZE > asked.rows:
        parser.error(f"--steps and {asked.warmup} more take more than one pass over {asked.rows:,} rows")
    try:
        commit = commit_of(arguments.checkout)
    except (OSError, subprocess.CalledProcessError) as error:
        parser.error(f"CHECKOUT should be a git clone of TorchEasyRec. Found '{arguments.checkout}' ({error})")
    if not (arguments.checkout / "tzrec" / "protos").is_dir():
        parser.error(f"CHECKOUT should be a clone of TorchEasyRec. Found no folder tzrec/protos in '{arguments.checkout}'")
    own = {ours(precision): Measurement(ours(precision), "train", precision, 2) for precision in PRECISIONS}
    runs = prepare_variants(asked, list(own.values()))
    made = asked.work / "torcheasyrec"
    python = (arguments.python or make_environment(made / "environment")).absolute()
    copy_package(arguments.checkout, made / "source", python)
    log = made / f"log-{asked.rows}"
    copy_log(asked.work / f"log-{asked.rows}" / "train", log)
    layouts = {
        name: layout if arguments.readers is None else dataclasses.replace(layout, readers=arguments.readers)
        for name, layout in LAYOUTS.items()
    }
    other = {theirs(precision, name): (precision, layouts[name]) for precision in PRECISIONS for name in LAYOUTS}
    names = [name for name in (*own, *other) if any(part in name for part in arguments.only)]
    rounds: list[dict[str, dict[str, Any]]] = []
    for number in range(asked.rounds):
        found = {}
        for name in names if number % 2 == 0 else names[::-1]:
            if name in own:
                found[name] = launch(own[name], runs[own[name].variant], asked)
            else:
                precision, layout = other[name]
                with tempfile.TemporaryDirectory(dir=made) as folder:
                    place, steps = Path(folder), asked.warmup + asked.steps
                    run, files, every = open_run(runs[precision]), f"{log}/*.parquet", steps // 2 if arguments.checkpoint else 0
                    config = config_of(run, files, place / "model", layout, precision, steps, every)
                    found[name] = launch_peer(python, made / "source", config, place, layout, asked)
            print(f"round {number + 1}, {name}: {found[name]['rows_per_second']:,.0f} rows/s", flush=True)
        rounds.append(found)
        facts = {"torcheasyrec": commit, "only": arguments.only, "checkpoint": arguments.checkpoint, "rounds": len(rounds)}
        result = {
            "about": {**about(asked), **facts},
            "layouts": {name: dataclasses.asdict(layout) for name, layout in layouts.items()},
            "rows_per_second": {name: spread([each[name]["rows_per_second"] for each in rounds]) for name in names},
            "ratios": ratios(rounds),
            "rounds": rounds,
        }
        write_atomically(arguments.output, json.dumps(result, indent=1) + "\n")
    show(result)


if __name__ == "__main__":
    main()
