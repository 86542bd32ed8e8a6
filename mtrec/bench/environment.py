"""The environment of `mtrec bench --peers`: a venv with torch-rechub and deepctr-torch beside the torch that runs here.

The versions are pinned below, those that mtrec has too as in deploy/constraints-cpu.txt. mtrec itself is not in it.
"""

import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from mtrec.atomic import write_atomically
from mtrec.experiment import Experiment
from mtrec.run import Run
from mtrec.sources import open_source
from mtrec.synthetic.reference import CARDINALITIES, NUM_DENSE

PEERS = {"torch-rechub": "rechub", "deepctr-torch": "deepctr"}  # name: module of mtrec/bench/peers
PINS = {
    "torch-rechub": "0.9.0",
    "deepctr-torch": "0.3.0",
    "pyarrow": "26.0.0",
    "numpy": "2.4.6",
    "pandas": "3.1.1",
    "python-dateutil": "2.9.0.post0",
    "six": "1.17.0",
    "scikit-learn": "1.9.1",
    "scipy": "1.17.1",
    "joblib": "1.6.0",
    "cloudpickle": "3.1.2",
    "narwhals": "2.28.0",
    "threadpoolctl": "3.8.0",
    "tqdm": "4.70.1",
}
PYTORCH_INDEX = "https://download.pytorch.org/whl"
WARMUP, STEPS = 3, 36  # batches: both peers read all their rows into memory, and want some 15 s for so many

IDS, LISTS = tuple(f"c{column}" for column in range(len(CARDINALITIES))), ("items",)
NUMBERS = tuple(f"d{column}" for column in range(NUM_DENSE))
LABELS = ("click", "conversion", "dwell_seconds")


def check_experiment(experiment: Experiment, path: Path, rows: int) -> None:
    """Raises ValueError where the peers cannot train what the experiment does, or not on so few rows."""
    kinds = {name: feature.kind for name, feature in experiment.features.items()}
    missing = [name for name in (*IDS, *LISTS) if kinds.get(name) != "categorical"]
    missing += [name for name in NUMBERS if kinds.get(name) != "dense"]
    labels = {experiment.label_column(task) for task in experiment.tasks}
    missing += [name for name in LABELS if name not in labels]
    remedy = "Leave --peers out, or take it from pipelines/benchmark/reference.yaml."
    if missing:
        more = f" and {len(missing) - 4} more" if len(missing) > 4 else ""
        raise ValueError(
            f"--peers trains on the columns of the reference workload. '{path}' has no features or labels "
            f"{', '.join(missing[:4])}{more}. {remedy}"
        )
    if (kind := experiment.model.architecture.kind) != "mmoe":
        raise ValueError(f"--peers trains an MMoE: `model.architecture` of '{path}' should be mmoe. Found {kind}. {remedy}")
    size = experiment.data.batch_size
    if isinstance(size, int) and rows < (WARMUP + 1) * size:
        raise ValueError(
            f"--peers needs {WARMUP + 1} batches of {size:,}: --rows of at least {(WARMUP + 1) * size:,}. Found {rows:,}."
        )


def workload(run: Run, warmup: int, steps: int, rows: int) -> dict[str, Any]:
    """What a peer is told, as `peers/workload.py` reads it: the run's files, its tables' sizes and its MMoE's."""
    experiment, options = run.experiment, run.experiment.model.architecture.options
    sizes = {feature: table.num_embeddings for table in run.encoder.tables for feature in table.features}
    batch_size = experiment.data.batch_size
    assert isinstance(batch_size, int)
    return {
        "files": [str(file.path) for file in open_source(experiment, experiment.data.train, "data.train").files],
        "ids": {name: sizes[name] for name in IDS},
        "lists": {name: sizes[name] for name in LISTS},
        "numbers": list(NUMBERS),
        "labels": list(LABELS),
        "embedding_dim": experiment.model.embedding_dim,
        "num_experts": options["num_experts"],
        "expert_layers": options["expert_layers"],
        "tower_layers": list(experiment.model.tower_layers),
        "batch_size": batch_size,
        "warmup": min(warmup, WARMUP),
        "steps": max(1, min(steps, STEPS, rows // batch_size - WARMUP)),
    }


def interpreter(folder: Path) -> Path:
    """The Python of the environment."""
    return folder / "bin" / "python"


def make_environment(folder: Path) -> None:
    """Makes the environment, once: what is there with the same versions is used again.

    Raises ValueError naming the package that pip could not install, and what to do.
    """
    version = metadata.version("torch")  # with its "+cpu", so that pip can never take the CUDA build for it
    torch, pins = f"torch=={version}", [f"{name}=={pin}" for name, pin in PINS.items()]
    stamp, stated = folder / "installed.txt", "\n".join([torch, *pins, ""])
    if stamp.is_file() and stamp.read_text() == stated:
        return
    shutil.rmtree(folder, ignore_errors=True)
    make = [sys.executable, "-m", "venv", str(folder)]
    made = subprocess.run(make, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if made.returncode:
        raise ValueError(f"`{' '.join(make)}` failed, which --peers needs:\n{made.stdout}")
    if local := version.partition("+")[2]:
        # PyPI has no builds like "+cpu"; PyTorch's own index is asked for torch alone.
        install(folder, [torch], ["--no-deps"], ["--no-deps", "--index-url", f"{PYTORCH_INDEX}/{local}"])
    install(folder, [torch], [])
    install(folder, pins, ["--no-deps"])
    write_atomically(stamp, stated)


def install(folder: Path, packages: Sequence[str], *ways: Sequence[str]) -> None:
    """Lets the environment's pip install packages by the first way (options of pip) that works."""
    command = [str(interpreter(folder)), "-m", "pip", "install", "--disable-pip-version-check", "--progress-bar", "off"]
    said = ""
    for options in ways:
        done = subprocess.run([*command, *options, *packages], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if not done.returncode:
            return
        said += done.stdout
    (folder / "pip.log").write_text(said)
    reasons = [line.removeprefix("ERROR: ") for line in said.splitlines() if line.startswith("ERROR: ")]
    raise ValueError(
        f"pip could not install what --peers needs: {(reasons or [', '.join(packages)])[-1]} ({folder}/pip.log)\n"
        "Run it again where a package index is within reach, or with PIP_FIND_LINKS set to a folder of wheels; "
        "or leave --peers out."
    )


def versions_of_peers() -> Mapping[str, str]:
    """{peer: its version}."""
    return {name: PINS[name] for name in PEERS}
