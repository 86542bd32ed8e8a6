"""Checkpoints on an object store (an S3 server on localhost): a run goes on from there when its folder is gone."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.fs
import pytest
import torch
import yaml
from logs import experiment_tree, write_log
from runs import small_run
from typer.testing import CliRunner

from mtrec import parallel
from mtrec.checkpoint import Saver, find, read
from mtrec.cli import app
from mtrec.mirror import StorageError
from mtrec.run import Run, copy_to_mirror


@pytest.fixture(scope="module")
def store() -> Iterator[tuple[str, Any]]:
    """(options of an S3 URI, its filesystem); the bucket is `runs`."""
    server_module = pytest.importorskip("moto.server", reason="moto[server] is not installed")
    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    _, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patched:
        for name, value in {"ACCESS_KEY_ID": "test", "SECRET_ACCESS_KEY": "test", "DEFAULT_REGION": "us-east-1"}.items():
            patched.setenv(f"AWS_{name}", value)
        options = f"endpoint_override=127.0.0.1:{port}&scheme=http&region=us-east-1"
        filesystem, _ = pyarrow.fs.FileSystem.from_uri(f"s3://runs?{options}&allow_bucket_creation=true")
        filesystem.create_dir("runs")
        yield options, filesystem
    server.stop()


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    """`mtrec train` of 13 steps, with a checkpoint every 4."""
    log = write_log(tmp_path / "log", rows=1_600)
    tree = experiment_tree(log)
    tree["training"] = {"log_every": 1, "checkpoint_every": 4}
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(tree))
    return ["train", str(tmp_path / "small.yaml"), "--local"]


def done(*arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == 0, (result.output, result.exception)
    return " ".join(result.output.split())


def refused(*arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments))
    assert isinstance(result.exception, ValueError), result.output
    return str(result.exception)


def test_a_run_whose_folder_is_gone_goes_on_from_the_store(tmp_path: Path, command: list[str], store: tuple[str, Any]) -> None:
    options, files = store
    there = ["--set", f"training.checkpoint_storage=s3://runs/a?{options}"]
    run = Run(tmp_path / "run")
    done(*command, *there, "--output", str(run.folder), "--set", "training.keep_last=3")
    expected = read(find(run.checkpoints)[0].folder)
    names = ["step-00000008", "step-00000012", "step-00000013"]
    assert [info.base_name for info in files.get_file_info(pyarrow.fs.FileSelector("runs/a/checkpoints"))] == names
    files.delete_file("runs/a/checkpoints/step-00000013/manifest.json")  # as if its upload had not ended
    damaged = max(files.get_file_info(pyarrow.fs.FileSelector("runs/a/checkpoints/step-00000012")), key=lambda info: info.size)
    with files.open_output_stream(damaged.path) as out:
        out.write(b"half of it")
    shutil.rmtree(run.folder)

    said = done(*command, *there, "--output", str(run.folder), "--resume")
    assert "run.json, step-00000008 run" in said  # what was fetched
    assert "continues from step 8" in said
    found = read(find(run.checkpoints)[0].folder)
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[key], value) for key, value in expected.items())


def test_a_copy_that_was_cut_short_is_made_when_the_run_goes_on(
    tmp_path: Path, command: list[str], store: tuple[str, Any]
) -> None:
    options, files = store
    there = ["--set", f"training.checkpoint_storage=s3://runs/d?{options}", "--set", "training.keep_last=2"]
    run = Run(tmp_path / "run")
    done(*command, *there, "--output", str(run.folder))
    last = "runs/d/checkpoints/step-00000013"
    files.delete_file(f"{last}/manifest.json")
    files.delete_file(f"{last}/state.json")
    done(*command, *there, "--output", str(run.folder), "--resume")
    assert all(copied(files, last, run.checkpoints / "step-00000013"))

    files.delete_file(f"{last}/manifest.json")
    files.delete_file(f"{last}/state.json")
    with parallel.process_group(torch.device("cpu")):  # a validation that comes later does not make half a copy look whole
        Saver(run.checkpoints, 2, 0, False, mirror=run.mirror()).add_validation(13, {"metric": 0.5})
    assert all(copied(files, last, run.checkpoints / "step-00000013"))


def copied(files: Any, far: str, here: Path) -> list[bool]:
    """For each file of a checkpoint whether it lies in the store, byte for byte."""
    found = []
    for path in sorted(here.iterdir()):
        with files.open_input_stream(f"{far}/{path.name}") as file:
            found.append(file.read() == path.read_bytes())
    assert len(found) > 3
    return found


def test_a_uri_holds_one_run(tmp_path: Path, command: list[str], store: tuple[str, Any]) -> None:
    there = ["--set", f"training.checkpoint_storage=s3://runs/b?{store[0]}", "--set", "training.max_steps=1"]
    done(*command, *there, "--output", str(tmp_path / "first"))
    said = refused(*command, *there, "--output", str(tmp_path / "second"))
    assert "`training.checkpoint_storage` s3://runs/b" in said
    assert "holds another run, made " in said
    assert not (tmp_path / "second" / "run.json").exists()


def test_a_store_that_fails_is_named(tmp_path: Path, command: list[str], store: tuple[str, Any]) -> None:
    for uri, words in {
        f"s3://none/c?{store[0]}": "s3://none/c",
        "s4://runs/c": "`training.checkpoint_storage` should be a URI such as s3://bucket/runs/mine",
    }.items():
        said = refused(*command, "--output", str(tmp_path / "run"), "--set", f"training.checkpoint_storage={uri}")
        assert words in said
        assert "`training.checkpoint_storage`" in said
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
    assert issubclass(StorageError, ValueError)


def test_what_a_killed_writer_left_is_not_copied(tmp_path: Path) -> None:
    there = tmp_path / "store"
    run = small_run(tmp_path, f"training.checkpoint_storage={there.as_uri()}", rows=400)
    (run.folder / ".run.json.4711").write_text("{")
    (run.folder / "encoder" / ".encoder.json.4711").write_text("{")
    copy_to_mirror(run)
    copied = {path.relative_to(there).as_posix() for path in there.rglob("*") if path.is_file()}
    assert {"run.json", "encoder/encoder.json"} <= copied
    assert not [name for name in copied if "4711" in name]
