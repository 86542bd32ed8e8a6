"""Which folder a run has by default."""

from pathlib import Path

import pytest

from mtrec.run import dated_folder


def test_the_newest_folder_of_a_name_is_resumed_not_one_of_a_longer_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("ctr-20261128-120000", "ctr-20261129-090000", "ctr-v2-20261130-120000", "ctr-tune-20261130-120000", "ctr[1]-x"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "run.json").touch()
    (tmp_path / "runs" / "ctr-20261130-000000").mkdir()  # without a run.json
    assert dated_folder("ctr", "run.json", "run", True) == Path("runs/ctr-20261129-090000")
    assert dated_folder("ctr-v2", "run.json", "run", True) == Path("runs/ctr-v2-20261130-120000")
    for name in ("ctr[1]", "ct", "ctr-2026"):
        with pytest.raises(ValueError, match="--resume: there is no run runs/"):
            dated_folder(name, "run.json", "run", True)
    assert dated_folder("ctr", "run.json", "run", False).parent == Path("runs")
