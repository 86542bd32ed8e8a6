"""`mtrec submit`: a command of this machine as a job of a Ray cluster. What is wrong is said here, before anything is sent.

The package of a job holds `job.json`, the user's modules and, with `--with-code`, mtrec itself. Its command runs
mtrec/jobs/preflight.py first and then the same `mtrec` command as on a laptop.
"""

import dataclasses
import getpass
import json
import os
import re
import shlex
import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from mtrec.allocator import TUNABLES, huge_pages, kept
from mtrec.atomic import check_folder
from mtrec.check import check_experiment
from mtrec.compare.plan import Plan, load_plan
from mtrec.config import load_experiment
from mtrec.experiment import Experiment
from mtrec.files import check_not_empty, find_files
from mtrec.jobs import packing
from mtrec.jobs.cluster import Cluster, check_versions, check_workers, choose_address, connect_client, describe
from mtrec.jobs.follow import ACTIVE, follow
from mtrec.jobs.preflight import BASE_YAML, CODE, COMPARISON_YAML, JOB_FILE, SAMPLE_ROWS, SUBMITTED_YAML, continued
from mtrec.kinds import counted
from mtrec.model import task_specs
from mtrec.run import open_run
from mtrec.tasks import Objectives
from mtrec.yaml_tree import naming_keys, read_yaml

FIRST_STEP = ("python", "-m", "mtrec.jobs.preflight")
# Width of the tables in the log; seconds for the last checkpoint between Ray's SIGTERM and its SIGKILL (3 by default).
JOB_VARIABLES = {"COLUMNS": "130", "RAY_JOB_STOP_WAIT_TIME_S": "120"}


@dataclasses.dataclass(frozen=True)
class Job:
    """What is sent. `same_run`, `same_job`: digests of the experiment without and with what a resume may change.

    `arguments`: of the mtrec command in the job; `files`: {path in the package: content}; `facts`: lines for the user.
    """

    command: str
    arguments: tuple[str, ...]
    name: str
    output: str
    least_workers: int | None
    same_run: str
    same_job: str
    files: Mapping[str, bytes]
    facts: tuple[str, ...]

    @property
    def entrypoint(self) -> str:
        """The shell command of the job."""
        return f"{shlex.join(FIRST_STEP)} && exec {shlex.join(['python', '-m', 'mtrec.cli', self.command, *self.arguments])}"

    @property
    def metadata(self) -> dict[str, str]:
        """What the cluster keeps with the job. A run is known by its folder: a submission id cannot be used twice."""
        return {
            "job_name": self.name,
            "mtrec_run": self.name,
            "mtrec_command": self.command,
            "mtrec_output": self.output,
            "mtrec_same_run": self.same_run,
            "mtrec_same_job": self.same_job,
            "mtrec_user": getpass.getuser(),
        }


def train_job(values: Mapping[str, Any], write: Callable[[Mapping[str, Any]], Sequence[str]], with_code: bool) -> Job:
    """The job of `mtrec train`, its experiment checked as far as this machine can.

    Args:
        values: the parameters of the command, as they were parsed.
        write: gives the arguments of the command for other values.
    """
    _check_not_local(values)
    experiment = load_experiment(values["experiment"], values["set_"] or (), absolute=False)
    output = _folder(values["output"] or experiment.output or Path("runs") / experiment.name)
    least, most = _workers(values["workers"])
    if most is not None and most > experiment.data.num_streams:
        raise ValueError(
            f"--workers {values['workers']}: at most data.num_streams ({experiment.data.num_streams}) workers can share the "
            "data. Set data.num_streams higher."
        )
    sources = packing.absolute_sources(experiment)
    with naming_keys(values["experiment"], values["set_"]):
        pinned, facts, unread = packing.pin(experiment)
        facts += _checked(pinned, list(unread))
    tree = packing.tree_of(pinned) | {"output": str(output)}
    core = {key: value for key, value in sources.items() if key not in packing.CHANGEABLE}
    inside = {**_absolute(values), "experiment": output / SUBMITTED_YAML, "output": output, "resume": True, "set_": None}
    job = {
        "needed": [str(inside["warm_start"])] if values["warm_start"] else [],
        "experiment": tree,
        "checked": not unread,
        "sources": {name: sources["data"][name] for name in packing.SOURCES},
    }
    if (output / "run.json").is_file():  # this machine sees the shared storage: another experiment is refused here
        continued(job, output)
        facts.append(f"run {output} exists with this experiment: it is continued")
    modules = packing.user_modules(tree, [Path.cwd(), Path(values["experiment"]).resolve().parent])
    return _job("train", write(inside), str(output), least, core, sources, job, modules, facts, with_code)


def score_job(values: Mapping[str, Any], write: Callable[[Mapping[str, Any]], Sequence[str]], with_code: bool) -> Job:
    """The job of `mtrec score`: its paths made absolute, what this machine sees of them checked."""
    _check_not_local(values)
    check_folder(values["run"], "RUN")
    check_not_empty([values["input_"], values["output"]], "INPUT and OUTPUT ")
    run, data, output = values["run"].expanduser().absolute(), _place(values["input_"]), _place(values["output"])
    facts, modules = list[str](), dict[str, bytes]()
    if run.exists():
        open_run(run).best()
        tree = read_yaml((run / "experiment.yaml").read_text(encoding="utf-8"), str(run))
        modules = packing.user_modules(tree, [run / CODE, Path.cwd()])
    try:
        facts.append(f"INPUT: {counted(len(find_files(data, 'INPUT')[0]), 'file')}")
    except (ValueError, OSError) as error:
        if "://" not in values["input_"] and not Path(values["input_"]).expanduser().is_absolute():
            raise ValueError(f"{error} A relative path must exist on this machine.") from None
        facts.append("INPUT: not readable on this machine; the job looks for it")
    arguments = write({**values, "run": run, "input_": data, "output": output})
    least, _ = _workers(values["workers"])
    core = {"command": "score", "arguments": list(arguments)}
    return _job("score", arguments, output, least, core, core, {"needed": [str(run)]}, modules, facts, with_code)


def compare_job(values: Mapping[str, Any], write: Callable[[Mapping[str, Any]], Sequence[str]], with_code: bool) -> Job:
    """The job of `mtrec compare`: the base experiment, with its input files pinned, and the comparison travel together."""
    given = values["comparison"]
    plan = load_plan(given)
    base = plan.experiments[plan.baseline]
    output = _folder(values["output"] or Path("runs") / plan.comparison.name)
    sources = packing.absolute_sources(base)
    pinned, facts, unread = packing.pin(base)
    facts += _checked(pinned, list(unread))
    tree = packing.tree_of(pinned)
    # `set` is in the base already
    comparison = {**plan.comparison.model_dump(mode="json", exclude_unset=True), "base": BASE_YAML, "set": {}}
    for name, variant in comparison["variants"].items():
        sources_of, more = _pinned_sources(plan, name)
        facts += more
        if sources_of:
            variant["set"] = {**_without(variant.get("set", {}), sources_of), **sources_of}
    job = {
        "needed": [],
        "experiment": tree,
        "checked": not unread,
        "sources": {name: sources["data"][name] for name in packing.SOURCES},
        "comparison": comparison,
    }
    inside = {**_absolute(values), "comparison": output / COMPARISON_YAML, "output": output, "resume": True}
    variants = [packing.tree_of(experiment) for experiment in plan.experiments.values()]
    kinds = {"kinds": variants, "search": comparison.get("search")}
    folders = [Path.cwd(), given.resolve().parent, (given.parent / plan.comparison.base).resolve().parent]
    modules = packing.user_modules(kinds, folders)
    core = {"base": sources, "comparison": comparison}
    return _job("compare", write(inside), str(output), values["workers"], core, core, job, modules, facts, with_code)


def _pinned_sources(plan: Plan, variant: str) -> tuple[dict[str, Any], list[str]]:
    """({"data.train": ..., the sources of which a variant has its own}, lines on them), with their input files pinned."""
    base = plan.experiments[plan.baseline].data
    experiment = plan.experiments[next(iter(plan.sweeps.get(variant, [variant])))]
    changed = [name for name in ("train", "validation") if getattr(experiment.data, name) != getattr(base, name)]
    if not changed:
        return {}, []
    pinned, lines, _ = packing.pin(experiment)
    tree = packing.tree_of(pinned)["data"]
    found = {f"data.{name}": tree[name] for name in changed}
    return found, [f"{variant}: {line}" for line in lines if line.partition(":")[0] in found]


def _without(changes: Mapping[str, Any], paths: Collection[str]) -> dict[str, Any]:
    """A variant's changes but for those of the paths and of parts of them (`data.train.where`)."""
    return {key: value for key, value in changes.items() if not any(f"{key}.".startswith(f"{path}.") for path in paths)}


def _check_not_local(values: Mapping[str, Any]) -> None:
    if values["local"]:
        raise ValueError("--local works in this process, without Ray. Leave it out to submit to a cluster.")


def _absolute(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value.expanduser().absolute() if isinstance(value, Path) else value for name, value in values.items()}


def _place(given: str) -> str:
    """A URI as it is, a path made absolute."""
    return given if "://" in given else str(Path(given).expanduser().absolute())


def _job(
    command: str,
    arguments: Sequence[str],
    output: str,
    least: int | None,
    core: Mapping[str, Any],
    whole: Mapping[str, Any],
    job: Mapping[str, Any],
    modules: Mapping[str, bytes],
    facts: Sequence[str],
    with_code: bool,
) -> Job:
    content = {
        "command": command,
        "output": output,
        "same_run": packing.digest(core),
        "least_workers": least,
        "mtrec": metadata.version("mtrec"),
        "with_code": with_code,
        **job,
    }
    files = {JOB_FILE: json.dumps(content, indent=1).encode(), **modules, **(packing.own_code() if with_code else {})}
    return Job(
        command=command,
        arguments=tuple(arguments),
        name=output.rstrip("/").rsplit("/", 1)[-1],
        output=output,
        least_workers=least,
        same_run=packing.digest(core),
        same_job=packing.digest({"arguments": list(arguments), "whole": whole}),
        files=files,
        facts=tuple(facts),
    )


def _folder(given: Any) -> Path:
    text = str(given)
    if re.match(r"[a-z][a-z0-9+.-]+:/", text):  # a Path has lost one slash of ://
        raise ValueError(f"The output should be a folder on storage that all nodes of the cluster mount. Found '{text}'.")
    return Path(text).expanduser().absolute()


def _workers(text: str) -> tuple[int | None, int | None]:
    """(least, most) of `2` or `1:4`; what is not that is refused by the command itself."""
    found = re.fullmatch(r"(\d+)(?::(\d+))?", text)
    if not found:
        return None, None
    return int(found[1]), int(found[2] or found[1])


def _checked(experiment: Experiment, unread: Sequence[str]) -> list[str]:
    """Lines of `mtrec check` where this machine can read all data, else what can be checked without any."""
    if not unread:
        # what the device lacks is the cluster's matter; on a GPU everything is offered
        report = check_experiment(experiment, SAMPLE_ROWS, "cuda")
        return [*report["facts"], *(f"warning: {line}" for line in report["warnings"])]
    Objectives(task_specs(experiment))
    return [f"{', '.join(unread)}: not readable on this machine; checked on a worker before the training starts"]


def submit_job(
    job: Job,
    *,
    address: str | None,
    wait: bool,
    dry_run: bool,
    say: Callable[[str], None],
    ask: Callable[[str], str] | None,
) -> int:
    """Sends a job to a cluster, follows its log to its end, and returns its exit code.

    A job of the same run that is active is followed instead of starting a second one beside it. Raises ValueError in words
    for what the cluster lacks. `ask` puts a question to the user (None: nobody is there); `say` prints a line.
    """
    address, note = choose_address(address)
    if note:
        say(note)
    for line in job.facts:
        say(line)
    if dry_run:
        _show(job, address, say)
        return 0
    client = connect_client(address)
    cluster = describe(client, address)
    for line in check_versions(cluster):
        say(line)
    check_workers(job.least_workers, cluster.cpus, cluster.gpus, f"The cluster at {address}")
    number = active_job(client, job)
    if number is not None:
        say(f"run {job.name} is under way already, as job {number}: nothing new is started")
    else:
        number = _send(client, job, cluster, say)
    if not wait:
        say(f"watch: mtrec jobs logs {number} --follow --address {address}")
        return 0
    return follow(client, number, address, say, ask)


def active_job(client: Any, job: Job) -> str | None:
    """The id of the job that is at work on this run now. Raises ValueError where that is another experiment."""
    for known in client.list_jobs():
        if known.submission_id is None or (known.metadata or {}).get("mtrec_output") != job.output:
            continue
        if known.status not in ACTIVE:
            continue
        if known.metadata["mtrec_same_job"] != job.same_job:
            raise ValueError(
                f"The run {job.name} ({job.output}) is under way as job {known.submission_id}, with another experiment or other "
                f"arguments. Choose another --output, or stop it: mtrec jobs stop {known.submission_id}"
            )
        return str(known.submission_id)
    return None


def job_variables() -> dict[str, str]:
    """A job's environment. What becomes of freed memory there, and the size of pages, is as it is here, where that is said;
    glibc's other tunables stay the cluster's, which come last and count (Ray puts them in the place of their name).
    """
    pages = huge_pages(os.environ)
    return JOB_VARIABLES | kept(os.environ) | {TUNABLES: f"{pages}:${{{TUNABLES}}}" if pages else f"${{{TUNABLES}}}"}


def _send(client: Any, job: Job, cluster: Cluster, say: Callable[[str], None]) -> str:
    """Submits under the first free id `mtrec-NAME-N`: of two who submit one run at once, one is refused the id and attaches."""
    stem = "mtrec-" + re.sub(r"[^A-Za-z0-9_-]+", "-", job.name)
    taken = {known.submission_id for known in client.list_jobs()}
    number = next(f"{stem}-{count}" for count in range(1, len(taken) + 2) if f"{stem}-{count}" not in taken)
    with tempfile.TemporaryDirectory() as folder:
        for name, content in job.files.items():
            path = Path(folder) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        try:
            sent: str = client.submit_job(
                entrypoint=job.entrypoint,
                submission_id=number,
                runtime_env={"working_dir": folder, "env_vars": job_variables()},
                metadata=job.metadata,
            )
        except RuntimeError as error:
            other = active_job(client, job)
            if other is not None:
                return other
            raise ValueError(f"The cluster at {cluster.address} refused the job: {_refusal(str(error))}") from None
    say(f"job {sent} on {cluster.address} ({cluster.nodes} nodes, {cluster.cpus} CPUs, {cluster.gpus} GPUs), run {job.output}")
    return sent


def _refusal(text: str) -> str:
    if "No available agent" in text:
        return "the dashboard agent of its head does not run; as a rule another process holds its port (52365)."
    lines = [line for line in text.strip().splitlines() if line.strip()]
    return lines[-1] if lines else text


def _show(job: Job, address: str, say: Callable[[str], None]) -> None:
    size = sum(len(content) for content in job.files.values())
    names = [name for name in job.files if not name.startswith("mtrec/")]
    own = len(job.files) - len(names)
    say(f"dry run: nothing was sent to {address}")
    say(f"command: {job.entrypoint}")
    say(f"package: {', '.join(names)}{f' and {own} files of mtrec' if own else ''} ({size / 1e3:,.0f} kB)")
    say(f"run: {job.name}, in {job.output}; workers: {job.least_workers or 'one a GPU, or 1'}")


SUBMITTED = {"train": train_job, "score": score_job, "compare": compare_job}
