"""The first step of a submitted job, before any worker starts: the cluster looked at from inside.

`python -m mtrec.jobs.preflight` runs in the unpacked package of a submission and reads its `job.json`. It checks what only the
cluster can tell: mtrec's version, that every node sees the folders, the data with the mounts and credentials of a worker. It
ends with exit code 1 and one message, or leaves `submitted.yaml` in the run's folder for `mtrec train`.
"""

import json
import os
import platform
import shutil
import sys
import uuid
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from mtrec.atomic import write_atomically
from mtrec.check import check_experiment
from mtrec.config import parse_experiment, to_yaml
from mtrec.experiment import Experiment
from mtrec.jobs.cluster import check_workers
from mtrec.jobs.packing import SOURCES, pin, user_modules
from mtrec.jobs.resources import tell_wait, whole_cluster
from mtrec.run import check_resumable, open_run

JOB_FILE = "job.json"
SUBMITTED_YAML, SUBMISSION_FILE = "submitted.yaml", "submission.json"  # in the run's folder
BASE_YAML, COMPARISON_YAML = "submitted-base.yaml", "submitted-comparison.yaml"  # in the comparison's folder
CODE = "code"  # in the run's folder: the user's modules, so that the run can be scored from anywhere
SAMPLE_ROWS = 20_000


def run_first_step() -> None:
    """Runs the checks of the job in the current folder; a mistake ends the process with one message and exit code 1."""
    job = json.loads(Path(JOB_FILE).read_text(encoding="utf-8"))
    try:
        check_job(job)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(1)


def check_job(job: dict[str, Any]) -> None:
    """Checks a job against the cluster that this process is part of. Raises ValueError in words."""
    if not job["with_code"] and (here := metadata.version("mtrec")) != job["mtrec"]:
        raise ValueError(
            f"The cluster has mtrec {here}, the submitting machine {job['mtrec']}. Install the same on both "
            "(deploy/README.md), or submit with --with-code."
        )
    cluster = whole_cluster()
    import ray

    try:
        check_workers(job["least_workers"], cluster.cpus, cluster.gpus, "The cluster")
        check_storage(None if "://" in job["output"] else Path(job["output"]), job["needed"])
        if job["command"] == "train":
            _check_training(job, "cuda" if cluster.gpus else "cpu")
        elif job["command"] == "compare":
            _check_comparison(job, "cuda" if cluster.gpus else "cpu")
    finally:
        ray.shutdown()


def check_storage(output: Path | None, needed: Sequence[str]) -> None:
    """Writes a file into the output folder and looks for it, and for `needed`, from every node.

    Raises ValueError naming the folder and the node that does not see it. None: the output is no folder (an object store).
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    probe = None if output is None else _write_probe(output)
    try:
        look = ray.remote(num_cpus=0)(missing_of)
        paths = [*([] if probe is None else [str(probe)]), *needed]
        asked = [
            look.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote(paths)
            for node in ray.nodes()
            if node["Alive"]
        ]
        for node, missing in ray.get(asked):
            if probe is not None and str(probe) in missing:
                raise ValueError(
                    f"The folder {output} is not on storage that all nodes see: node {node} does not find what was just "
                    f"written there from {platform.node()}. Choose a folder on the shared storage of the cluster."
                )
            if missing:
                raise ValueError(f"Node {node} does not see {missing[0]}. Put it on storage that all nodes of the cluster share.")
    finally:
        if probe is not None:
            probe.unlink()


def _write_probe(output: Path) -> Path:
    probe = output / f".probe-{uuid.uuid4().hex}"
    try:
        output.mkdir(parents=True, exist_ok=True)
        probe.write_text(platform.node())
    except OSError as error:
        raise ValueError(
            f"The folder {output} cannot be written on the node that runs the job ({platform.node()}): {error.strerror}. "
            "It should be on storage that all nodes of the cluster share."
        ) from None
    return probe


def missing_of(paths: list[str]) -> tuple[str, list[str]]:
    """(name of the node that runs this, those of the paths that it does not see)."""
    return platform.node(), [path for path in paths if not os.path.exists(path)]


def _check_training(job: dict[str, Any], device: str) -> None:
    folder = Path(job["output"])
    if (folder / "run.json").is_file():
        experiment = continued(job, folder)
        print(f"run {folder} exists with this experiment: it is continued", flush=True)
    else:
        experiment = _checked(job, device)
        write_atomically(folder / SUBMISSION_FILE, json.dumps({"same_run": job["same_run"], "sources": job["sources"]}, indent=1))
        for name in user_modules(job["experiment"], [Path.cwd()]):
            (folder / CODE / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(name, folder / CODE / name)
    write_atomically(folder / SUBMITTED_YAML, to_yaml(experiment))


def _check_comparison(job: dict[str, Any], device: str) -> None:
    folder = Path(job["output"])
    submission = folder / SUBMISSION_FILE
    if submission.is_file():
        if json.loads(submission.read_text())["same_run"] != job["same_run"]:
            raise ValueError(
                f"The folder {folder} holds another comparison, or one of another base. Submit with another --output."
            )
        print(f"comparison {folder} exists: the runs that are missing are made", flush=True)
        return
    base = _checked(job, device)
    write_atomically(folder / BASE_YAML, to_yaml(base))
    write_atomically(folder / COMPARISON_YAML, yaml.safe_dump(job["comparison"], sort_keys=False))
    write_atomically(submission, json.dumps({"same_run": job["same_run"], "sources": job["sources"]}, indent=1))


def continued(job: dict[str, Any], folder: Path) -> Experiment:
    """The experiment with the input files that the run was made from, where it names the same sources as then."""
    run = open_run(folder)
    experiment = parse_experiment(job["experiment"])
    submission = folder / SUBMISSION_FILE
    then = json.loads(submission.read_text())["sources"] if submission.is_file() else None
    if then == job["sources"]:
        pinned = {name: getattr(run.experiment.data, name) for name in SOURCES}
        experiment = experiment.model_copy(update={"data": experiment.data.model_copy(update=pinned)})
    try:
        check_resumable(run, experiment)
    except ValueError as error:
        raise ValueError(
            f"The run {folder} exists, and is one of another experiment. {error} Submit with another --output."
        ) from None
    return experiment


def _checked(job: dict[str, Any], device: str) -> Experiment:
    """The experiment, pinned and checked by a worker: its mounts and credentials count, not those of the head."""
    import ray

    print("checking the experiment and its data on a worker ...", flush=True)
    tell_wait({"CPU": 1}, lambda line: print(line, flush=True))
    check = ray.remote(num_cpus=1, scheduling_strategy="SPREAD", max_retries=0)(check_on_worker)
    try:
        answer = ray.get(check.remote(job["experiment"], device))
    except ray.exceptions.RayTaskError as error:
        raise ValueError(f"The check on a worker failed: {type(error.cause).__name__}: {error.cause}") from None
    except ray.exceptions.RayError as error:
        raise ValueError(f"The check on a worker died: {str(error).splitlines()[0]}") from None
    if "error" in answer:
        raise ValueError(answer["error"])
    for line in [] if job["checked"] else answer["lines"]:  # else the submitting machine has shown the same
        print(line, flush=True)
    return parse_experiment(answer["experiment"])


def check_on_worker(tree: dict[str, Any], device: str) -> dict[str, Any]:
    """{experiment, lines} of an experiment that passes `mtrec check` on this node, every source pinned; else {error}."""
    place = f" (checked on node {platform.node()})"
    try:
        experiment, lines, unread = pin(parse_experiment(tree))
        if unread:
            return {"error": f"{next(iter(unread.values()))}{place} Is the storage mounted on the worker nodes?"}
        report = check_experiment(experiment, SAMPLE_ROWS, device)
    except ValueError as error:
        return {"error": f"{error}{place}"}
    warnings = [f"warning: {line}" for line in report["warnings"]]
    return {"experiment": experiment.model_dump(mode="json"), "lines": [*lines, *report["facts"], *warnings]}


if __name__ == "__main__":
    # by its real name: a function of __main__ would be sent to the workers by value, with all that it refers to
    from mtrec.jobs.preflight import run_first_step as first_step

    first_step()
