"""The command: names that others rely on, how fast it answers, and one whole round from log to evaluation."""

import gc
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from logs import experiment_tree, write_log
from typer.main import get_command
from typer.testing import CliRunner

import mtrec.cli
from mtrec.cli import app, main
from mtrec.config import parse_experiment
from mtrec.display import show_run
from mtrec.events import Failed
from mtrec.launch import launch
from mtrec.yaml_tree import read_yaml

NAMES = {
    "train": {"experiment", "--output", "--workers", "--set", "--resume", "--warm-start", "--local"},
    "check": {"experiment", "--set"},
    "evaluate": {"run", "--data", "--by", "--json"},
    "synth": {"out", "--rows", "--seed"},
    "schema": {"--of"},
}


@pytest.mark.parametrize("command", list(NAMES))
def test_the_names_that_others_rely_on(command: str) -> None:
    found = get_command(app).commands[command]  # type: ignore[attr-defined]
    names = {option for parameter in found.params for option in (*parameter.opts, *parameter.secondary_opts)}
    assert names >= NAMES[command]


@pytest.mark.parametrize(("option", "answer"), [("--help", "evaluate"), ("--version", f"mtrec {version('mtrec')}")])
def test_help_and_version_answer_without_torch(option: str, answer: str) -> None:
    code = (
        f"import sys\nsys.argv = ['mtrec', '{option}']\nfrom mtrec.cli import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'torchrec', 'ray', 'pyarrow', 'pydantic', 'numpy'} & sys.modules.keys()\n"
        "assert not heavy, heavy"
    )
    started = time.monotonic()
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert answer in result.stdout
    assert time.monotonic() - started < 5.0  # a hang, not a benchmark: 0.2 s on an idle machine


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--preset", "reference", "--conflict", "0.5"], r"^--preset reference has no --conflict\. Leave that out"),
        (["--preset", "reference", "--days", "2", "--drift", "0"], r"has no --days, --drift\."),
        (["--drift", "0.1"], r"^--drift should stand beside --days\."),
    ],
)
def test_options_of_synth_that_would_do_nothing_are_refused(tmp_path: Path, options: list[str], message: str) -> None:
    found = CliRunner().invoke(app, ["synth", str(tmp_path / "log"), "--rows", "2000", *options])
    assert isinstance(found.exception, ValueError)
    assert re.search(message, str(found.exception))
    assert not (tmp_path / "log").exists()


def test_from_log_to_evaluation(tmp_path: Path) -> None:
    write_log(tmp_path / "train", rows=2_000)
    write_log(tmp_path / "validation", rows=800, seed=1)
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(experiment_tree(tmp_path / "train", tmp_path / "validation")))
    run, metrics = tmp_path / "run", tmp_path / "metrics.json"

    def mtrec(*arguments: str) -> str:
        result = CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.output

    output = mtrec("train", str(path), "--local", "--output", str(run), "--set", "training.epochs=2")
    assert "ended at step 32" in output
    validation = str(tmp_path / "validation")
    mtrec("evaluate", str(run), "--data", validation, "--by", "item_id", "--json", str(metrics))
    found = json.loads(metrics.read_text())
    during = json.loads((run / "metrics.json").read_text())
    assert found["rows"] == 800
    assert {"click", "conversion", "dwell"} == set(found["tasks"])
    for task, values in during["tasks"].items():
        for name, value in values.items():
            assert found["tasks"][task][name] == (None if value is None else pytest.approx(value, abs=1e-6)), (task, name)
    segments = found["by"]["item_id"]
    assert sum(segment["rows"] for segment in segments.values()) == 800
    shown = mtrec("inspect", str(run))
    assert "known ids" in shown
    assert "rows trained: those that a gradient reached, the rows for null and for unseen ids among them" in shown

    again = CliRunner().invoke(app, ["train", str(path), "--local", "--output", str(run)])
    assert "holds a run already. Add --resume" in str(again.exception)
    other = CliRunner().invoke(app, ["train", str(path), "--local", "--output", str(run), "--resume", "--set", "seed=77"])
    assert "--resume: `seed` differs" in str(other.exception)


@pytest.mark.parametrize(
    "arguments",
    [
        ["evaluate", "run", "--data", "log", "--json", "folder"],
        ["train", "e.yaml", "--local", "--json", "folder"],
        ["report", "run", "--output", "folder"],
        ["bench", "--json", "folder"],
        ["bench", "--html", "folder"],
        ["train", "e.yaml", "--local", "--output", "s3://bucket/run"],
        ["train", "e.yaml", "--local", "--warm-start", "s3://bucket/run"],
        ["train", "e.yaml", "--local", "--set", "output=s3://bucket/run"],
        ["compare", "c.yaml", "--output", "file:///tmp/x"],
        ["tune", "e.yaml", "--space", "s.yaml", "--trials", "1", "--output", "file:///tmp/x"],
        ["evaluate", "s3://bucket/run", "--data", "log"],
        ["score", "s3://bucket/run", "log", "out", "--local"],
        ["inspect", "s3://bucket/run"],
        ["report", "s3://bucket/run"],
    ],
)
def test_a_place_that_cannot_be_written_or_read_is_refused_before_the_work(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "e.yaml").write_text(yaml.safe_dump(experiment_tree(tmp_path / "log")))
    result = CliRunner().invoke(app, arguments)
    assert isinstance(result.exception, ValueError), result.output
    found = str(result.exception)
    wanted = r"`[\w-]+` should be a (file\. Found the folder 'folder'|local or mounted folder\. Found '\w+://)"
    assert re.search(wanted, found), found
    assert sorted(path.name for path in tmp_path.iterdir()) == ["e.yaml", "folder"]


def test_metrics_that_are_asked_for_are_written_or_said_to_be_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log, run = write_log(tmp_path / "log", rows=600), tmp_path / "run"
    (tmp_path / "e.yaml").write_text(yaml.safe_dump(experiment_tree(log)))
    metrics = tmp_path / "metrics.json"
    arguments = ["train", str(tmp_path / "e.yaml"), "--local", "--output", str(run), "--json", str(metrics)]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    assert f"--json {metrics} is not written: there are no metrics (there is no `data.validation`)" in result.output

    def no_room(path: Path, text: str) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(Path, "write_text", no_room)
    result = CliRunner().invoke(app, ["evaluate", str(run), "--data", str(log), "--json", str(metrics)])
    assert str(result.exception) == "no space left"
    assert f"{run} on {log}" in result.output  # what was computed is shown all the same


def test_a_mistake_ends_with_one_line_and_exit_code_1(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "mtrec.cli", "check", str(tmp_path / "none.yaml")],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "NO_COLOR": "1"},
    )
    assert result.returncode == 1
    assert result.stderr.startswith("error: There is no experiment file")
    assert "Traceback" not in result.stderr


def test_work_that_could_not_be_done_ends_with_one_line_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(**options: object) -> None:
        raise Failed("4 processes died: take fewer --workers")

    monkeypatch.setattr(mtrec.cli, "app", fail)
    monkeypatch.setattr(mtrec.cli, "_warn_in_plain_words", lambda: None)  # its handler would outlive the test
    monkeypatch.setattr(sys, "argv", ["mtrec", "score"])
    with pytest.raises(SystemExit) as ended:
        mtrec.cli.main()
    assert ended.value.code == 1
    assert capsys.readouterr().err == "error: 4 processes died: take fewer --workers\n"


def test_no_more_workers_than_streams_by_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[int] = []

    def train_on_ray(folder: Path, workers: int, *, say: Callable[[str], None], **options: Any) -> None:
        asked.append(workers)
        say("0 of 8 are free")

    monkeypatch.setattr("mtrec.jobs.train.cluster_gpus", lambda: 16)
    monkeypatch.setattr("mtrec.jobs.train.train_on_ray", train_on_ray)
    launch(parse_experiment(experiment_tree(write_log(tmp_path / "log", rows=1_000))), output=tmp_path / "run")
    assert asked == [8]
    assert "0 of 8 are free\n" in capsys.readouterr().out


def test_inspect_leaves_out_the_known_ids_of_a_table_that_counts_none(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = {"rows": 100, "used": 98, "touched": 57, "dim": 8, "sharding": "auto", "bytes": 3_200}
    tables = [{"table": "tag", "encoding": "hash", **sizes}, {"table": "user", "encoding": "vocabulary", **sizes}]
    show_run({"run": "runs/mine", "info": {"made": "today", "versions": {}}, "checkpoints": [], "tables": tables})
    lines = capsys.readouterr().out.splitlines()
    assert next(line for line in lines if line.startswith("tag")).split()[1:4] == ["100", "-", "57"]
    assert next(line for line in lines if line.startswith("user")).split()[1:4] == ["100", "98", "57"]


def test_what_is_left_at_the_end_is_not_collected_once_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["mtrec", "--version"])
    monkeypatch.setattr("mtrec.cli._warn_in_plain_words", lambda: None)  # it changes the logging of the tests after this one
    before = gc.get_freeze_count()
    try:
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code in (0, None)
        assert gc.get_freeze_count() > before
    finally:
        gc.unfreeze()


ROOT = Path(__file__).parents[1]
README_BLOCKS = re.findall(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
README_TREES = [read_yaml(block, "README.md") for block in README_BLOCKS]
PIPELINE_TREES = [read_yaml(path.read_text(), str(path)) for path in ROOT.glob("pipelines/*/*.yaml")]


@pytest.mark.parametrize(
    ("kind", "has", "wrong"),
    [
        ("experiment", "features", {"features": {"age": {"kind": "dense", "transfrom": "log1p"}}}),
        ("comparison", "variants", {"variants": {"ple": {"sets": {}}}}),
        ("search", "parameters", {"parameters": {"seed": {"log_unifrom": [1, 2]}}}),
    ],
)
def test_the_printed_schema_accepts_our_files_and_refuses_a_typo(kind: str, has: str, wrong: dict[str, object]) -> None:
    result = CliRunner().invoke(app, ["schema", "--of", kind], catch_exceptions=False)
    found = json.loads(result.output)
    jsonschema.Draft202012Validator.check_schema(found)
    trees = [tree for tree in [*README_TREES, *PIPELINE_TREES] if has in tree]
    assert any(tree in README_TREES for tree in trees)
    for tree in trees:
        jsonschema.validate(tree, found)
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(tree | wrong, found)
