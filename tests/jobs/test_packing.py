"""What a job takes with it: its experiment with the files pinned, own modules, whole paths; what is refused before it is sent."""

import json
import re
import shutil
import types
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml
from logs import experiment_tree, write_log
from runs import small_run

from mtrec.cli import app
from mtrec.compare.plan import load_plan
from mtrec.config import parse_experiment
from mtrec.jobs import arguments, packing
from mtrec.jobs.preflight import check_on_worker, continued
from mtrec.jobs.submit import SUBMITTED, Job, active_job, job_variables


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
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.rtld.nns=4:glibc.malloc.hugetlb=0")
    sent = job_variables()
    assert sent.items() >= {"MIMALLOC_PURGE_DELAY": "10", "MALLOC_ARENA_MAX": "1", "COLUMNS": "130"}.items()
    assert sent["GLIBC_TUNABLES"] == "glibc.malloc.hugetlb=0:${GLIBC_TUNABLES}"  # the others are the cluster's own


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
