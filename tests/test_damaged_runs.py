"""A run of which files are gone or damaged, and folders that cannot be written: told in one line, without a stack trace."""

import json
import logging
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import yaml
from logs import experiment_tree, write_log
from typer.testing import CliRunner

from mtrec import cli
from mtrec.checkpoint import CheckpointError
from mtrec.compare.runs import train_here
from mtrec.run import RUN_FILES, open_run

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def mtrec(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Iterator[Command]:
    """Runs the command in this process: (exit code, stdout, stderr)."""
    log = logging.getLogger("mtrec")
    before = log.handlers[:], log.propagate

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["mtrec", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "200")
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capfd.readouterr()
        assert "Traceback" not in out + err
        return int(ended.value.code or 0), out, err

    yield run
    log.handlers, log.propagate = before


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with small.yaml and its run, which has two checkpoints."""
    folder = tmp_path_factory.mktemp("sound")
    tree = experiment_tree(write_log(folder / "train", rows=1_000), write_log(folder / "validation", rows=300, seed=1))
    tree["training"] = {"epochs": 2, "keep_last": 2}
    (folder / "small.yaml").write_text(yaml.safe_dump(tree))
    arguments = ["train", str(folder / "small.yaml"), "--local", "--output", str(folder / "run")]
    result = CliRunner().invoke(cli.app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return folder


@pytest.fixture
def run(sound: Path, tmp_path: Path) -> Path:
    """A copy of the run."""
    return Path(shutil.copytree(sound / "run", tmp_path / "run"))


def checkpoints(run: Path) -> list[Path]:
    return sorted((run / "checkpoints").glob("step-*"))


def damage(run: Path) -> None:
    for folder in checkpoints(run):
        next(folder.glob("__0_*")).unlink()


def test_inspect_shows_the_damaged_beside_the_sound(mtrec: Command, run: Path) -> None:
    old, new = checkpoints(run)
    next(new.glob("__0_*")).unlink()
    code, out, err = mtrec("inspect", run)
    assert code == 0
    assert "is missing" in out + err
    assert old.name in out
    damage(Path(shutil.copytree(run, run.parent / "worse", ignore=shutil.ignore_patterns(new.name))))
    code, out, err = mtrec("inspect", run.parent / "worse")
    assert code == 0
    assert "is missing" in out + err


def test_a_resume_without_a_sound_checkpoint_is_refused(mtrec: Command, sound: Path, run: Path) -> None:
    damage(run)
    before = (run / "log.jsonl").read_text()
    code, _, err = mtrec("train", sound / "small.yaml", "--local", "--resume", "--output", run, "--set", "training.epochs=3")
    assert code == 1
    assert f"error: No checkpoint in {run / 'checkpoints'} can be trusted: " in err
    assert f"{checkpoints(run)[0].name}: __0_0.distcp is missing" in err
    assert "with another --output" in err
    assert (run / "log.jsonl").read_text() == before


def test_a_resume_without_any_checkpoint_begins_at_the_start(mtrec: Command, sound: Path, run: Path) -> None:
    for folder in checkpoints(run):
        (folder / "manifest.json").unlink()  # it was being written when the run died
    code, out, _ = mtrec("train", sound / "small.yaml", "--local", "--resume", "--output", run)
    assert code == 0
    assert "ended at step 16" in out


def test_a_resume_of_no_run_says_that_a_new_one_begins(mtrec: Command, sound: Path, tmp_path: Path) -> None:
    code, out, _ = mtrec("train", sound / "small.yaml", "--local", "--resume", "--output", tmp_path / "new")
    assert code == 0
    assert f"there is no run in {tmp_path / 'new'} yet; a new one begins" in out


def test_scoring_says_what_is_wrong_with_the_only_checkpoints(mtrec: Command, sound: Path, run: Path) -> None:
    damage(run)
    code, _, err = mtrec("score", run, sound / "validation", run.parent / "out", "--local")
    assert code == 1
    assert "warning: Checkpoint " in err
    assert f"holds no valid checkpoint: {checkpoints(run)[1].name}: __0_0.distcp is missing." in err


def test_a_condition_that_no_row_fulfils_is_told(mtrec: Command, sound: Path, run: Path) -> None:
    code, out, _ = mtrec("score", run, sound / "validation", run.parent / "out", "--local", "--where", "price > 1e9")
    assert code == 0  # a day without such rows
    assert "warning: no row of the input fulfils --where price > 1e9" in out


def test_a_checkpoint_of_another_format_is_not_read(mtrec: Command, sound: Path, run: Path) -> None:
    for folder in checkpoints(run):
        manifest = json.loads((folder / "manifest.json").read_text())
        (folder / "manifest.json").write_text(json.dumps({**manifest, "format": 99}))
    code, _, err = mtrec("evaluate", run, "--data", sound / "validation")
    assert code == 1
    assert "it has the format 99, of another mtrec; this one reads 1." in err


@pytest.mark.parametrize("name", RUN_FILES)
@pytest.mark.parametrize("command", ["inspect", "evaluate", "train", "report"])
def test_a_missing_file_of_a_run_is_named(mtrec: Command, sound: Path, run: Path, name: str, command: str) -> None:
    (run / name).unlink()
    more = {
        "evaluate": ["evaluate", run, "--data", sound / "validation"],
        "train": ["train", sound / "small.yaml", "--local", "--resume", "--output", run],
    }
    code, _, err = mtrec(*more.get(command, [command, run]))
    assert code == 1
    assert err.splitlines()[-1] == f"error: {run} is no whole run any more: {name} is missing. Put it back from a copy."


def test_a_missing_vocabulary_and_a_broken_run_json_are_named(mtrec: Command, sound: Path, run: Path) -> None:
    path = next((run / "encoder").glob("vocabulary_*"))
    path.rename(run / "elsewhere")
    code, _, err = mtrec("evaluate", run, "--data", sound / "validation")
    assert code == 1
    assert "error: " in err
    assert path.name in err
    (run / "elsewhere").rename(path)
    (run / "run.json").write_text("{\n nothing")
    code, _, err = mtrec("inspect", run)
    assert code == 1
    assert f"error: {run / 'run.json'} should be JSON, as mtrec wrote it." in err


@pytest.mark.parametrize("content", [b"", b"{]"], ids=["empty", "garbled"])
@pytest.mark.parametrize("name", [*(name for name in RUN_FILES if name != "experiment.yaml"), "encoder/vocabulary_tags.parquet"])
def test_a_damaged_file_of_a_run_is_named(mtrec: Command, sound: Path, run: Path, name: str, content: bytes) -> None:
    (run / name).write_bytes(content)
    code, _, err = mtrec("score", run, sound / "validation", run.parent / "out", "--local")
    assert code == 1
    assert f"error: {run / name} should be " in err
    assert err.rstrip().endswith("Put it back from a copy.")


def test_a_damaged_line_of_the_log_is_named(mtrec: Command, run: Path) -> None:
    first, second, *others = (run / "log.jsonl").read_text().splitlines(keepends=True)
    (run / "log.jsonl").write_text("".join([first, second[:9] + "\n", *others]))
    code, _, err = mtrec("report", run)
    assert code == 1
    assert f"error: {run / 'log.jsonl'}, line 2, should be JSON, as mtrec wrote it." in err


def test_an_output_that_cannot_be_made_is_named(mtrec: Command, sound: Path) -> None:
    for output in (sound / "small.yaml" / "run", Path("/proc/mtrec/run")):
        code, _, err = mtrec("train", sound / "small.yaml", "--local", "--output", output)
        assert code == 1
        assert err.startswith("error: ")
        assert str(output.parent) in err


def test_a_name_that_is_no_folder_is_refused(mtrec: Command, sound: Path) -> None:
    code, _, err = mtrec("check", sound / "small.yaml", "--set", "name=a/b")
    assert code == 1
    place = f"error: {sound / 'small.yaml'} with --set: `name`"
    assert f"{place}: should be usable as the name of a folder, without '/'. Found 'a/b'." in err


def test_a_run_s_page_names_the_damaged_checkpoints(mtrec: Command, run: Path) -> None:
    damage(run)
    code, _, _ = mtrec("report", run)
    assert code == 0
    text = (run / "report.html").read_text()
    assert "no checkpoint that can be trusted." in text
    assert all(f"{each.name}: __0_" in text for each in checkpoints(run))


def test_a_comparison_s_run_does_not_begin_anew_in_the_same_log(run: Path) -> None:
    damage(run)
    log = (run / "log.jsonl").read_bytes()
    with pytest.raises(CheckpointError, match=r"can be trusted: step-.* once this run's folder is removed"):
        train_here(open_run(run), torch.device("cpu"))
    assert (run / "log.jsonl").read_bytes() == log
