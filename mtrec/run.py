"""A run: the folder with everything that a trained model is. How one is prepared: `mtrec/prepare.py`.

experiment.yaml   the experiment, every default and every `auto` written out
run.json          versions, data fingerprints, when and how it was made
encoder/          vocabularies and statistics;  labels.json, labels.npz: base rates;  sample.parquet: some training rows
checkpoints/      step-00000300/ ...;  log.jsonl, tensorboard/: what happened;  metrics.json: the last validation
"""

import dataclasses
import datetime
import functools
import json
import platform
import re
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from mtrec import checkpoint
from mtrec import labels as label_fit
from mtrec.atomic import is_unfinished
from mtrec.checkpoint import Checkpoint
from mtrec.config import parse_experiment, to_yaml
from mtrec.experiment import Experiment
from mtrec.features import Encoder
from mtrec.labels import LabelStatistics
from mtrec.mirror import Mirror
from mtrec.sources import resolve_auto
from mtrec.written import as_written
from mtrec.yaml_tree import naming, read_yaml

SAMPLE_FILE = "sample.parquet"  # training rows kept in the run; see mtrec/predictions.py
RUN_FILES = ("experiment.yaml", "encoder/encoder.json", "labels.json", "labels.npz", SAMPLE_FILE)
STREAMED = ("torch", "torchrec", "fbgemm-gpu-cpu", "fbgemm-gpu", "pyarrow", "ray", "mtrec")


@dataclasses.dataclass(frozen=True)
class Run:
    """A run's folder. What is read from it is read once."""

    folder: Path

    @functools.cached_property
    def experiment(self) -> Experiment:
        """As it was prepared. Modules that lie beside it can be imported from now on."""
        for folder in [str(self.folder / "code"), *self.info.get("module_folders", [])]:
            if folder not in sys.path:  # so that `kind: my_module:MyClass` is found by workers, and when the run is scored
                sys.path.append(folder)
        path = self.folder / "experiment.yaml"
        tree = read_yaml(path.read_text(encoding="utf-8"), str(path))
        with naming(str(path)):
            return parse_experiment(tree)

    @functools.cached_property
    def info(self) -> dict[str, Any]:
        """run.json: what was prepared from what, and by which versions."""
        path = self.folder / "run.json"
        with as_written(path, "JSON"):
            found: dict[str, Any] = json.loads(path.read_text())
        return found

    @functools.cached_property
    def encoder(self) -> Encoder:
        """The fitted features."""
        return Encoder.load(self.folder / "encoder")

    @functools.cached_property
    def labels(self) -> dict[str, LabelStatistics]:
        """{task: what its labels are like in the training data}."""
        return label_fit.load(self.folder)

    @property
    def checkpoints(self) -> Path:
        """The folder of its checkpoints."""
        return self.folder / "checkpoints"

    def mirror(self) -> Mirror | None:
        """The copies of this run on `training.checkpoint_storage`, if it is set."""
        uri = self.experiment.training.checkpoint_storage
        return None if uri is None else Mirror(uri, self.folder)

    def best(self) -> Checkpoint:
        """The valid checkpoint with the best metric. Raises ValueError where the run has none."""
        found = checkpoint.best(checkpoint.find(self.checkpoints))
        if found is None:
            why = checkpoint.told(checkpoint.damaged(self.checkpoints)) or "the run ended before its first one."
            raise ValueError(f"{self.folder} holds no valid checkpoint: {why}")
        return found


def open_run(folder: str | Path) -> Run:
    """A prepared run. Raises ValueError where the folder is none."""
    run = Run(Path(folder).absolute())
    if not (run.folder / "run.json").is_file():
        raise ValueError(f"{folder} is not a run: it has no run.json. `mtrec train` makes runs; it prints where.")
    missing = [name for name in RUN_FILES if not (run.folder / name).is_file()]
    if missing:
        raise ValueError(f"{folder} is no whole run any more: {', '.join(missing)} is missing. Put it back from a copy.")
    return run


def check_mirror(experiment: Experiment, folder: Path) -> None:
    """Raises ValueError where `training.checkpoint_storage` holds another run than this folder."""
    uri, own = experiment.training.checkpoint_storage, folder / "run.json"
    far = None if uri is None else Mirror(uri, folder).read("run.json")
    if far is not None and not (own.exists() and far == own.read_bytes()):
        raise ValueError(
            f"`training.checkpoint_storage` {uri} holds another run, made {json.loads(far)['made']}. "
            "Each run needs a URI of its own; to continue that run, use --resume with an --output that does not exist yet."
        )


def copy_to_mirror(run: Run) -> None:
    """Copies to `training.checkpoint_storage` what a resume needs, and checkpoints whose copy was cut short."""
    mirror = run.mirror()
    if mirror is None:
        return
    check_mirror(run.experiment, run.folder)
    apart = {"checkpoints", "tensorboard", "ray", "run.json"}
    there = [path for path in sorted(run.folder.rglob("*")) if path.is_file() and not is_unfinished(path.name)]
    files = [path.relative_to(run.folder) for path in there]
    names = [str(path) for path in files if path.parts[0] not in apart and path.suffix not in (".lock", ".jsonl")]
    mirror.put(*names, "run.json")
    checkpoint.copy_missing(run.checkpoints, mirror)


def fetch_from_mirror(folder: Path, experiment: Experiment) -> list[str]:
    """Brings a run, or those of its checkpoints that lack, from `training.checkpoint_storage`; what was brought."""
    uri = experiment.training.checkpoint_storage
    if uri is None:
        return []
    mirror, fetched = Mirror(uri, folder), []
    if not (folder / "run.json").exists():
        if mirror.read("run.json") is None:
            return []
        for name in mirror.names(""):
            if name not in ("checkpoints", "run.json"):
                mirror.get(name, folder / name)
        mirror.get("run.json", folder / "run.json")  # last: a folder with it is a whole run
        fetched.append("run.json")
    elif mirror.read("run.json") != (folder / "run.json").read_bytes():
        return []  # `check_mirror` says what is wrong, if something is
    (folder / "checkpoints").mkdir(exist_ok=True)
    return [*fetched, *checkpoint.fetch(folder / "checkpoints", mirror)]


def versions() -> dict[str, str]:
    """What this run was made with."""
    found = {"python": platform.python_version()}
    for name in STREAMED:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue  # the run is made without it
    return found


def check_resumable(run: Run, experiment: Experiment) -> None:
    """Raises ValueError naming the first key in which an experiment differs from the run's beyond what a resume may change."""
    if experiment.model.embedding_dim == "auto":
        model = experiment.model.model_copy(update={"embedding_dim": run.experiment.model.embedding_dim})
        experiment = experiment.model_copy(update={"model": model})
    given = resolve_auto(experiment, run.info["train"]["rows"])
    first, second = (yaml.safe_load(to_yaml(each)) for each in (run.experiment, given))
    for tree in (first, second):
        for key in ("name", "output", "training", "evaluation", "scoring"):
            tree.pop(key, None)
    path = _difference(first, second, "")
    if path:
        raise ValueError(
            f"--resume: `{path}` differs from that of {run.folder}. A resumed run keeps its experiment (training.* may change); "
            "for another experiment start a new run, with --warm-start to begin from this one's weights."
        )
    _check_compared_alike(run, experiment)


def _check_compared_alike(run: Run, given: Experiment) -> None:
    """The best checkpoint is chosen, and training stops early, by values of one metric, measured in one way."""
    before = run.experiment
    wish = before.training.best_metric
    metrics = {path.rpartition("/")[2].removesuffix("_given") for path in ([wish] if isinstance(wish, str) else wish or ["/auc"])}
    keys: dict[str, tuple[object, object]] = {"training.best_metric": (wish, given.training.best_metric)}
    if "gauc" in metrics:
        keys["evaluation.group_by"] = before.evaluation.group_by, given.evaluation.group_by
    if metrics & {"auc", "ece"}:
        keys["evaluation.bins"] = before.evaluation.bins, given.evaluation.bins
    for key, (old, new) in keys.items():
        if old != new and before.data.validation is not None:
            raise ValueError(
                f"`{key}` should stay what it was, {_value(old)}: the checkpoints of {run.folder} are compared by it. "
                f"Found {_value(new)}. Set it back, or start a new run, with --warm-start to keep the weights."
            )


def _value(value: object) -> str:
    return "the default" if value is None else str(value)


def _difference(first: Any, second: Any, place: str) -> str | None:
    if isinstance(first, dict) and isinstance(second, dict):
        for key in dict.fromkeys([*first, *second]):
            path = _difference(first.get(key), second.get(key), f"{place}.{key}" if place else str(key))
            if path:
                return path
        return None
    return place if first != second else None


def default_folder(experiment: Experiment, resume: bool) -> Path:
    """runs/<name>-<time>; to resume, the newest of these."""
    if experiment.output is not None:
        return Path(experiment.output)
    return dated_folder(experiment.name, "run.json", "run", resume)


def dated_folder(name: str, file: str, what: str, resume: bool) -> Path:
    """runs/NAME-20261129-120000, of now; to resume, the newest of those that hold `file`. ValueError where there is none.

    Only the name with a time counts: `mmoe-long-20261129-120000` is not one of `mmoe`.
    """
    if not resume:
        return Path("runs") / f"{name}-{datetime.datetime.now():%Y%m%d-%H%M%S}"
    dated = re.compile(re.escape(name) + r"-\d{8}-\d{6}")
    found = sorted(path.parent for path in Path("runs").glob(f"*/{file}") if dated.fullmatch(path.parent.name))
    if not found:
        raise ValueError(f"--resume: there is no {what} runs/{name}-DATE-TIME. Name its folder with --output.")
    return found[-1]
