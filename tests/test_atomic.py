"""Files with their old content or the new one, and what is refused as a place to write to."""

import os
import re
import time
from pathlib import Path

import pytest

from mtrec.atomic import ABANDONED_SECONDS, check_file, check_folder, write_atomically


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_nothing_is_left_beside_a_file_that_could_not_get_its_place(tmp_path: Path) -> None:
    (tmp_path / "report.html").mkdir()
    with pytest.raises(OSError, match="directory"):
        write_atomically(tmp_path / "report.html", "x")
    assert names(tmp_path) == ["report.html"]


def test_the_next_writer_takes_away_what_a_killed_one_left(tmp_path: Path) -> None:
    mine = [".metrics.json.123", ".metrics.json.swp", ".other.json.123", ".metrics.json.456"]
    for name in mine:
        (tmp_path / name).write_text("half")
    for name in mine[:3]:
        long_ago = time.time() - 2 * ABANDONED_SECONDS
        os.utime(tmp_path / name, (long_ago, long_ago))
    write_atomically(tmp_path / "metrics.json", "new")
    assert (tmp_path / "metrics.json").read_text() == "new"
    assert names(tmp_path) == sorted([*mine[1:], "metrics.json"])  # 456 may be at work, the others are not of this file


def test_a_file_can_be_written_where_its_folder_can_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    check_file(None, "--json")
    check_file(tmp_path / "file", "--json")
    check_file(tmp_path / "a" / "b" / "new.json", "--json")
    check_file(Path("/dev/stdout"), "--json")
    for path, message in {
        tmp_path: "Found the folder",
        tmp_path / "file" / "new.json": f"'{tmp_path}/file' is a file",
        Path("s3://bucket/new.json"): "Found 's3://bucket/new.json'",
    }.items():
        with pytest.raises(ValueError, match=re.escape("`--json` should be a file") + ".*" + re.escape(message)):
            check_file(path, "--json")


@pytest.mark.parametrize("uri", ["file:///tmp/x", "s3://bucket/runs/x", "gs://bucket"])
def test_a_uri_is_no_folder(uri: str) -> None:
    check_folder(None, "--output")
    check_folder(Path("runs/a:b/c"), "--output")
    with pytest.raises(ValueError, match=f"`--output` should be a local or mounted folder. Found '{uri}'.*checkpoint_storage"):
        check_folder(Path(uri), "--output")
