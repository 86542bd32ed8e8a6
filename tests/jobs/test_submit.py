"""Submission to a real cluster: two Ray nodes on this machine, with token authentication, spoken to over HTTP; which cluster a
command speaks to, and whether that fits.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pyarrow.dataset
import pyarrow.parquet
import pytest
import yaml
from sklearn.metrics import roc_auc_score

from mtrec.compare.runs import LABEL
from mtrec.jobs.cluster import Cluster as Described
from mtrec.jobs.cluster import check_versions, check_workers, choose_address, find_token, token_problem

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
