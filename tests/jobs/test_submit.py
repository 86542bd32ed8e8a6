"""Submission to a real cluster: two Ray nodes on this machine, with token authentication, spoken to over HTTP."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import types
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.dataset
import pyarrow.parquet
import pytest
import typer.main
import yaml
from logs import experiment_tree, write_log
from runs import small_run
from sklearn.metrics import roc_auc_score

from mtrec.cli import app
from mtrec.compare.plan import load_plan
from mtrec.compare.runs import LABEL
from mtrec.config import parse_experiment
from mtrec.jobs import arguments, packing
from mtrec.jobs.cluster import Cluster as Described
from mtrec.jobs.cluster import check_versions, check_workers, choose_address, find_token, token_problem
from mtrec.jobs.preflight import check_on_worker, continued
from mtrec.jobs.submit import SUBMITTED, Job, active_job, job_variables

TOKEN = "0123456789abcdef0123456789abcdef"
BIN = Path(sys.executable).parent


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def environment(home: Path, **changes: str) -> dict[str, str]:
    """The environment of a user without any setting of Ray's but the tests' own (conftest.py)."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_") or name == "RAY_worker_niceness"}
    return kept | {"HOME": str(home), "OMP_NUM_THREADS": "1", "PATH": f"{BIN}:{os.environ['PATH']}"} | changes


class Cluster:
    """A head and a worker, each with its own ports and folder, as on two machines."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._nodes = folder, list[subprocess.Popen[bytes]]()
        self._gcs, self._dashboard, *self._others = free_ports(6)
        self.address = f"http://127.0.0.1:{self._dashboard}"

    def start(self) -> None:
        head = ["--head", f"--port={self._gcs}", f"--dashboard-port={self._dashboard}", "--dashboard-host=127.0.0.1"]
        self._start("head", [*head, "--disable-usage-stats"], self._others[:2])
        self._start("worker", [f"--address={self._wait(1)}:{self._gcs}"], self._others[2:])
        self._wait(2)

    def _start(self, name: str, options: list[str], ports: list[int]) -> None:
        temp = self._folder / name
        temp.mkdir()
        size = ["--num-cpus=1", "--num-gpus=0", "--object-store-memory=80000000", f"--temp-dir={temp}"]
        size += [f"--dashboard-agent-listen-port={ports[0]}", f"--metrics-export-port={ports[1]}"]
        env = environment(self._folder, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=TOKEN)
        with (self._folder / f"{name}.log").open("wb") as log:
            command = [str(BIN / "ray"), "start", "--block", *options, *size]
            self._nodes.append(subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True))

    def _wait(self, nodes: int) -> str:
        """Until so many nodes live; the head's address."""
        request = urllib.request.Request(f"{self.address}/api/v0/nodes?detail=1", headers={"Authorization": f"Bearer {TOKEN}"})
        deadline, problem = time.monotonic() + 90, OSError("not asked yet")
        while time.monotonic() < deadline and all(node.poll() is None for node in self._nodes):
            try:
                with urllib.request.urlopen(request, timeout=5) as answer:
                    found = json.load(answer)["data"]["result"]["result"]
                if sum(node["state"] == "ALIVE" for node in found) == nodes:
                    return str(next(node["node_ip"] for node in found if node["is_head_node"]))
            except OSError as error:
                problem = error  # not up yet
            time.sleep(0.5)
        raise AssertionError("\n".join([str(problem), *(path.read_text() for path in self._folder.glob("*.log"))]))

    def mtrec(
        self, *arguments: str, folder: Path, token: str | None = TOKEN, **changes: str
    ) -> "subprocess.CompletedProcess[str]":
        """Runs the command as a user in `folder` does, with a token file and without RAY_AUTH_MODE."""
        home = folder / "home"
        if token is not None:
            (home / ".ray").mkdir(parents=True, exist_ok=True)
            (home / ".ray" / "auth_token").write_text(token)
        elif home.exists():
            shutil.rmtree(home)
        command = [str(BIN / "mtrec"), *arguments]
        return subprocess.run(command, cwd=folder, env=environment(home, **changes), capture_output=True, text=True, timeout=300)

    def stop(self) -> None:
        """Ends at once whatever the two nodes started: all of it names this cluster's folder."""
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                command = (entry / "cmdline").read_bytes()
            except OSError:
                continue  # it has ended meanwhile
            if f"{self._folder}/".encode() in command:
                os.kill(int(entry.name), signal.SIGKILL)
        for node in self._nodes:
            node.kill()
            node.wait(timeout=60)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    tries = 2  # `ray start` gives up by itself after half a minute, which a busy machine may need
    while True:
        folder, tries = Path(tempfile.mkdtemp(prefix="mtrec-")), tries - 1  # short: Ray puts sockets below it
        started = Cluster(folder)
        try:
            started.start()
        except AssertionError:
            started.stop()
            shutil.rmtree(folder)
            if not tries:
                raise
        else:
            break
    try:
        yield started
    finally:
        started.stop()
        shutil.rmtree(folder)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder: an experiment with a module of its own, and data."""
    folder = tmp_path_factory.mktemp("user")
    write_log(folder / "data" / "train", rows=1_500)
    write_log(folder / "data" / "validation", rows=500, seed=1)
    tree: Any = experiment_tree(Path("data/train"), Path("data/validation"))
    tree["model"]["architecture"] = {"kind": "own_towers:Plain", "width": 6}
    tree["training"]["max_failures"] = 0
    (folder / "tiny.yaml").write_text(yaml.safe_dump(tree))
    (folder / "own_towers.py").write_text(
        "import own_helper\nimport torch\n\n\nclass Plain(torch.nn.Module):\n"
        "    def __init__(self, input_dim, tasks, *, width: int = 4):\n        super().__init__()\n"
        "        self.output_dim, self.tasks = own_helper.same(width), tuple(tasks)\n"
        "        self.layer = torch.nn.Linear(input_dim, width)\n\n"
        "    def forward(self, x_BD):\n        return {task: self.layer(x_BD).relu() for task in self.tasks}\n\n"
        "    def gates(self, x_BD):\n        return {}\n\n"
        "    def shared_parameters(self):\n        return list(self.layer.parameters())\n\n"
        "    def flops_per_row(self):\n        return 2 * self.layer.weight.numel()\n"
    )
    (folder / "own_helper.py").write_text("def same(value):\n    return value\n")
    return folder


@pytest.mark.slow
def test_train_and_score_over_http(cluster: Cluster, place: Path) -> None:
    at = ["--address", cluster.address]
    submit = ["submit", *at, "train", "tiny.yaml", "--workers", "2"]
    sent = cluster.mtrec(*submit, "--no-wait", folder=place)
    assert sent.returncode == 0, sent.stderr
    assert "job mtrec-tiny-1 on" in sent.stdout
    attached = cluster.mtrec(*submit, folder=place, RAY_ADDRESS="http://192.0.2.1:8265")
    assert attached.returncode == 0, attached.stdout + attached.stderr
    assert f"--address {cluster.address} is used; RAY_ADDRESS=http://192.0.2.1:8265 is ignored." in attached.stdout
    assert "under way already, as job mtrec-tiny-1" in attached.stdout
    run = place / "runs" / "tiny"
    assert "validation: click" in attached.stdout
    assert f"run folder: {run}" in attached.stdout
    assert json.loads((run / "metrics.json").read_text())["rows"] == 500
    pinned = yaml.safe_load((run / "experiment.yaml").read_text())["data"]["train"]["path"]
    assert pinned == [str(place / "data" / "train" / f"part-{index}.parquet") for index in range(3)]
    assert (run / "code" / "own_helper.py").is_file()

    scored = cluster.mtrec(
        "submit", *at, "score", "runs/tiny", "data/validation", "scores", "--columns", "row_id", "--workers", "2", folder=place
    )
    assert scored.returncode == 0, scored.stdout + scored.stderr
    table = pyarrow.dataset.dataset(sorted((place / "scores").glob("part-*.parquet"))).to_table()
    assert table["row_id"].to_pylist() == list(range(500))
    assert {"p_click", "p_conversion", "dwell_seconds"} <= set(table.column_names)


@pytest.mark.slow
def test_compare_over_http(cluster: Cluster, place: Path) -> None:
    comparison = {
        "base": "tiny.yaml",
        "set": {
            "data.test": "data/validation",
            "data.validation": None,
            "training.max_steps": 4,
            "evaluation.group_by": "user_id",
        },
        "seeds": 2,
        "variants": {"wide": {"set": {"model.architecture.width": 12}}},
    }
    (place / "sweep.yaml").write_text(yaml.safe_dump(comparison))
    done = cluster.mtrec("submit", "--address", cluster.address, "compare", "sweep.yaml", folder=place)
    assert done.returncode == 0, done.stdout + done.stderr
    folder = place / "runs" / "sweep"
    assert "job mtrec-sweep-1 on" in done.stdout
    assert f"report: {folder / 'report.html'}" in done.stdout
    found = json.loads((folder / "results.json").read_text())
    assert list(found["variants"]) == ["base", "wide", "base again"]
    assert found["test_rows"] == 500
    for name, seeds in (("base", [0, 1]), ("wide", [0, 1]), ("base again", [1000, 1001])):
        assert list(found["variants"][name]["runs"]) == [str(seed) for seed in seeds]
        assert all(run["steps"] == 4 for run in found["variants"][name]["runs"].values())
    compared = {(each["variant"], each["task"]) for each in found["differences"]}
    assert ("wide", "click") in compared
    for seed, auc in found["variants"]["wide"]["metrics"]["click"]["auc"]["by_seed"].items():
        table = pyarrow.parquet.read_table(folder / "runs" / "wide" / f"seed-{seed}" / "predictions.parquet")
        labels, predictions = table[f"{LABEL}click"].to_numpy(), table["p_click"].to_numpy()
        assert auc == pytest.approx(roc_auc_score(labels, predictions), abs=1e-6)
    assert (folder / "report.html").is_file()


@pytest.mark.slow
def test_what_only_the_cluster_can_tell(cluster: Cluster, place: Path) -> None:
    at = ["--address", cluster.address]
    missing = place / "elsewhere" / "train"
    failed = cluster.mtrec(
        "submit", *at, "train", "tiny.yaml", "--output", "runs/broken", "--set", f"data.train={missing}", folder=place
    )
    assert failed.returncode == 1
    assert "data.train: not readable on this machine" in failed.stdout
    assert "job mtrec-broken-1 failed (exit code 1): `data.train.path` should name a file or folder that exists." in failed.stdout
    assert "checked on node" in failed.stdout
    assert "Traceback" not in failed.stdout + failed.stderr
    status = cluster.mtrec("jobs", "status", "broken", *at, folder=place)
    assert "status: FAILED" in status.stdout
    assert "cause: `data.train.path`" in status.stdout
    listed = cluster.mtrec("jobs", "list", *at, folder=place)
    assert "mtrec-broken-1" in listed.stdout
    assert "FAILED" in listed.stdout
    logs = cluster.mtrec("jobs", "logs", "broken", *at, folder=place)
    assert "checking the experiment and its data on a worker" in logs.stdout
    stopped = cluster.mtrec("jobs", "stop", "broken", *at, folder=place)
    assert "has ended already: FAILED" in stopped.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "token", "message"),
    [
        ("jobs list", "f" * 32, "refuses the token of"),
        ("jobs list", None, "asks for a token, and there is none on this machine"),
        ("submit train tiny.yaml --workers 3", TOKEN, "--workers 3 needs 3 CPUs. The cluster at"),
        ("submit train tiny.yaml --set tasks.click.kind=binry", TOKEN, "binry"),
        ("jobs status nothing", TOKEN, "There is no job or run 'nothing' on this cluster"),
    ],
)
def test_what_is_wrong_is_said_in_words(cluster: Cluster, place: Path, command: str, token: str | None, message: str) -> None:
    done = cluster.mtrec(*command.split(), "--address", cluster.address, folder=place, token=token)
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_dead_address_is_said(place: Path) -> None:
    (port,) = free_ports(1)
    command = [str(BIN / "mtrec"), "jobs", "list", "--address", f"http://127.0.0.1:{port}"]
    done = subprocess.run(command, env=environment(place), capture_output=True, text=True)
    assert done.returncode == 1
    assert f"Cannot reach the Ray cluster at http://127.0.0.1:{port}" in done.stderr


def make_job(command: str, *typed: str) -> Job:
    known = typer.main.get_command(app).commands[command]  # type: ignore[attr-defined]
    return SUBMITTED[command](arguments.parsed(known, typed), lambda values: arguments.written(known, values), False)


def test_what_is_packed(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    monkeypatch.syspath_prepend(str(place))
    job = make_job("train", "tiny.yaml", "--workers", "1:2", "--set", "training.epochs=3", "--output", "runs/packed")
    assert set(job.files) == {"job.json", "own_towers.py", "own_helper.py"}
    content = json.loads(job.files["job.json"])
    assert content["experiment"]["training"]["epochs"] == 3
    assert len(content["experiment"]["data"]["train"]["path"]) == 3
    assert content["sources"]["train"]["path"] == [str(place / "data" / "train")]
    assert content["least_workers"] == 1
    folder = place / "runs" / "packed"
    assert job.entrypoint.endswith(
        f"&& exec python -m mtrec.cli train {folder}/submitted.yaml --output {folder} --workers 1:2 --resume"
    )
    more = make_job("train", "tiny.yaml", "--workers", "1:2", "--set", "training.epochs=4", "--output", "runs/packed")
    assert more.same_run == job.same_run
    assert more.same_job != job.same_job
    other = make_job("train", "tiny.yaml", "--set", "seed=9", "--output", "runs/packed")
    assert other.same_run != job.same_run


def test_a_run_under_way_is_not_started_twice(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    monkeypatch.syspath_prepend(str(place))
    job = make_job("train", "tiny.yaml", "--output", "runs/twice")
    jobs = [types.SimpleNamespace(submission_id="mtrec-twice-1", status="FAILED", metadata=job.metadata)]
    client = types.SimpleNamespace(list_jobs=lambda: jobs)
    assert active_job(client, job) is None
    jobs.append(types.SimpleNamespace(submission_id="mtrec-twice-2", status="RUNNING", metadata=job.metadata))
    jobs.append(types.SimpleNamespace(submission_id=None, status="RUNNING", metadata=None))
    assert active_job(client, job) == "mtrec-twice-2"
    other = make_job("train", "tiny.yaml", "--output", "runs/twice", "--set", "training.epochs=2")
    with pytest.raises(ValueError, match="is under way as job mtrec-twice-2, with another experiment"):
        active_job(client, other)


def test_paths_of_other_options_become_absolute(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    monkeypatch.syspath_prepend(str(place))
    job = make_job("train", "tiny.yaml", "--warm-start", "runs/old", "--json", "found.json", "--output", "runs/new")
    assert f"--warm-start {place}/runs/old" in job.entrypoint
    assert f"--json {place}/found.json" in job.entrypoint
    assert json.loads(job.files["job.json"])["needed"] == [f"{place}/runs/old"]


def test_a_job_keeps_freed_memory_as_its_submitter_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIMALLOC_PURGE_DELAY", "10")
    monkeypatch.delenv("MALLOC_ARENA_MAX", raising=False)
    assert job_variables().items() >= {"MIMALLOC_PURGE_DELAY": "10", "MALLOC_ARENA_MAX": "1", "COLUMNS": "130"}.items()


def test_with_code_sends_this_mtrec() -> None:
    code = packing.own_code()
    assert code["mtrec/jobs/preflight.py"] == (Path(packing.__file__).parent / "preflight.py").read_bytes()
    assert not [name for name in code if name.endswith(".pyc")]


def test_own_modules_are_packed_from_wherever_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("own_loss_here", "own_choice_there"):
        folder = tmp_path / name.rpartition("_")[2]
        folder.mkdir()
        (folder / f"{name}.py").write_text("class Mine: ...\n")
    monkeypatch.syspath_prepend(str(tmp_path / "there"))  # as loading an experiment in another folder leaves it
    tree = {
        "tasks": {"dwell": {"kind": "dwell", "loss": "own_loss_here:Mine"}},
        "search": {"space": {"model.architecture.kind": {"choice": ["mmoe", "own_choice_there:Mine"]}}},
        "features": {"user": {"kind": "mtrec.features:Categorical"}, "item": {"kind": "json:JSONDecoder"}},
    }
    assert packing.user_modules(tree, [tmp_path / "here"]).keys() == {"own_loss_here.py", "own_choice_there.py"}
    with pytest.raises(ValueError, match="The module 'own_nowhere' of a kind is neither beside the experiment nor installed"):
        packing.user_modules({"kind": "own_nowhere:Mine"}, [tmp_path])


def test_a_comparison_travels_with_its_base(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    monkeypatch.syspath_prepend(str(place))
    comparison = {
        "base": "tiny.yaml",
        "set": {"data.test": "data/validation", "data.validation": None},
        "seeds": 2,
        "variants": {"wide": {"set": {"model.architecture.width": 12}}},
    }
    (place / "compare.yaml").write_text(yaml.safe_dump(comparison))
    job = make_job("compare", "compare.yaml", "--parallel", "1")
    folder = place / "runs" / "compare"
    assert job.entrypoint.endswith(f"compare {folder}/submitted-comparison.yaml --parallel 1 --resume --output {folder}")
    assert set(job.files) == {"job.json", "own_towers.py", "own_helper.py"}
    content = json.loads(job.files["job.json"])
    assert content["experiment"]["data"]["test"]["path"][0] == str(place / "data" / "validation" / "part-0.parquet")
    assert content["comparison"]["variants"] == comparison["variants"]

    less = {"data.train": {"path": "data/train/part-0.parquet", "where": "age > 20"}, "model.architecture.width": 12}
    comparison["variants"] = {"less": {"set": less}}
    (place / "compare.yaml").write_text(yaml.safe_dump(comparison))
    sent = json.loads(make_job("compare", "compare.yaml").files["job.json"])["comparison"]["variants"]["less"]["set"]
    assert sent["model.architecture.width"] == 12
    assert sent["data.train"]["path"] == [str(place / "data" / "train" / "part-0.parquet")]  # not of the job's folder
    assert sent["data.train"]["where"] == "age > 20"
    assert "data.validation" not in sent
    (folder).mkdir(parents=True)
    (folder / "submitted-base.yaml").write_text(yaml.safe_dump(content["experiment"]))
    (folder / "submitted-comparison.yaml").write_text(yaml.safe_dump(content["comparison"]))
    sent = load_plan(folder / "submitted-comparison.yaml")
    assert sent.experiments["wide"].model.architecture.options == {"width": 12}
    assert sent.experiments[sent.baseline].data.test.path == content["experiment"]["data"]["test"]["path"]


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        (["--local"], "--local works in this process"),
        (["--set", "data.train=nowhere"], "A relative path must exist on this machine"),
        (["--workers", "9"], "at most data.num_streams"),
        (["--output", "s3://bucket/run"], "should be a folder on storage that all nodes"),
        (["--set", "model.architecture.kind=missing_module:X"], "missing_module"),
    ],
)
def test_what_is_refused_before_sending(place: Path, monkeypatch: pytest.MonkeyPatch, typed: list[str], message: str) -> None:
    monkeypatch.chdir(place)
    monkeypatch.syspath_prepend(str(place))
    with pytest.raises(ValueError, match=message):
        make_job("train", "tiny.yaml", *typed)


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        (("s3://bucket/run", "data", "out"), "`RUN` should be a local or mounted folder. Found 's3://bucket/run'"),
        (("runs/x", "", "out"), "INPUT and OUTPUT should name files or a folder. Found an empty path"),
        (("runs/x", "data", ""), "INPUT and OUTPUT should name files or a folder. Found an empty path"),
    ],
)
def test_scoring_of_no_place_is_refused_before_sending(typed: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        make_job("score", *typed)


def test_a_run_goes_on_with_the_files_it_was_made_from(tmp_path: Path) -> None:
    run = small_run(tmp_path)
    given = packing.absolute_sources(run.experiment)
    given["data"]["train"]["path"] = [str(tmp_path / "log-4000" / "train")]
    sources = {name: given["data"][name] for name in packing.SOURCES}
    (run.folder / "submission.json").write_text(json.dumps({"same_run": "x", "sources": sources}))
    write_log(tmp_path / "more", rows=500, files=1)
    shutil.copyfile(tmp_path / "more" / "part-0.parquet", tmp_path / "log-4000" / "train" / "part-9.parquet")
    pinned, _, _ = packing.pin(parse_experiment(given))
    tree = packing.tree_of(pinned)
    assert len(tree["data"]["train"]["path"]) == 4
    assert continued({"experiment": tree, "sources": sources}, run.folder).data == run.experiment.data
    tree["seed"] = 99
    with pytest.raises(ValueError, match="is one of another experiment"):
        continued({"experiment": tree, "sources": sources}, run.folder)


def test_pinning_keeps_partitions_and_windows(tmp_path: Path) -> None:
    for day in ("2026-01-01", "2026-01-02"):
        write_log(tmp_path / f"dt={day}", rows=200, files=1)
    tree: Any = experiment_tree(tmp_path)
    tree["data"]["train"] = {"path": f"{tmp_path}/dt=*", "window": ["2026-01-02", "2026-01-02"]}
    pinned, lines, unread = packing.pin(parse_experiment(tree))
    assert lines == ["data.train: 2 files pinned"]
    assert not unread
    assert pinned.data.train.window == ("2026-01-02", "2026-01-02")
    assert pinned.data.train.path == [f"{tmp_path}/dt={day}/part-0.parquet" for day in ("2026-01-01", "2026-01-02")]
    answer = check_on_worker(packing.tree_of(pinned), "cpu")
    assert any("200 training rows" in line for line in answer["lines"])


def test_the_address_that_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    assert choose_address(None) == ("http://127.0.0.1:8265", None)
    monkeypatch.setenv("RAY_ADDRESS", "http://a:1")
    assert choose_address(None) == ("http://a:1", "http://a:1 from RAY_ADDRESS is used.")
    assert choose_address("http://b:2/") == ("http://b:2", "--address http://b:2/ is used; RAY_ADDRESS=http://a:1 is ignored.")
    assert choose_address("http://a:1") == ("http://a:1", None)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    with pytest.raises(ValueError, match="RAY_ADDRESS should be the address of the cluster's dashboard"):
        choose_address(None)


def test_where_a_token_comes_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find_token({}) is None
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text(TOKEN)
    assert find_token({}) == str(tmp_path / ".ray" / "auth_token")
    assert find_token({"RAY_AUTH_TOKEN_PATH": "/x"}) == "/x"
    assert find_token({"RAY_AUTH_TOKEN": "t", "RAY_AUTH_TOKEN_PATH": "/x"}) == "RAY_AUTH_TOKEN"
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert "Unset RAY_AUTH_MODE" in token_problem("http://a:1", "Authentication required")


def described(ray_version: str, python_version: str) -> Described:
    return Described("http://a:1", ray_version, python_version, nodes=1, cpus=2, gpus=0)


def test_versions_of_the_cluster() -> None:
    import ray

    here = f"{sys.version_info.major}.{sys.version_info.minor}.0"
    assert check_versions(described(ray.__version__, here)) == []
    (line,) = check_versions(described("2.99.0", here))
    assert line.startswith("the cluster runs Ray 2.99.0, this machine ")
    with pytest.raises(ValueError, match=r"runs Ray 2\.9\.3; mtrec needs 2\.60 or newer"):
        check_versions(described("2.9.3", here))
    with pytest.raises(ValueError, match=r"runs Python 3\.9\.1; mtrec needs 3\.11 or newer"):
        check_versions(described(ray.__version__, "3.9.1"))


def test_workers_are_gpus_where_there_are_any() -> None:
    check_workers(None, 0, 0, "It")
    check_workers(2, 2, 0, "It")
    with pytest.raises(ValueError, match=r"--workers 2 needs 2 GPUs\. It has 64 CPUs and 1 GPUs"):
        check_workers(2, 64, 1, "It")
