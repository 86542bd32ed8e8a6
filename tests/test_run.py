"""Which folder a run has by default, and what a resumed run may change."""

from pathlib import Path

import pytest
from runs import small_run

from mtrec.config import apply_overrides, parse_experiment
from mtrec.run import check_resumable, dated_folder


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


@pytest.mark.parametrize(
    ("metric", "changes", "key"),
    [
        ("null", ("training.best_metric=click/auc",), "training.best_metric"),
        ("click/auc", ("training.best_metric=dwell/xauc",), "training.best_metric"),
        ("click/auc", ("evaluation.bins=100",), "evaluation.bins"),
        ("null", ("evaluation.bins=100",), "evaluation.bins"),
        ("click/gauc", ("evaluation.group_by=item_id",), "evaluation.group_by"),
        ("click/log_loss", ("evaluation.group_by=item_id", "evaluation.bins=100", "training.epochs=3"), None),
        ("click/auc", ("evaluation.batch_size=99", "training.early_stopping={patience: 2}"), None),
    ],
)
def test_a_resumed_run_chooses_its_best_by_the_same_metric(
    tmp_path: Path, metric: str, changes: tuple[str, ...], key: str | None
) -> None:
    run = small_run(tmp_path, f"training.best_metric={metric}", "evaluation.group_by=user_id", rows=600)
    given = parse_experiment(apply_overrides(run.experiment.model_dump(mode="json"), changes))
    if key is None:
        check_resumable(run, given)
        return
    with pytest.raises(ValueError, match=rf"^`{key}` should stay what it was, .*--warm-start") as found:
        check_resumable(run, given)
    assert f"Found {changes[0].partition('=')[2]}." in str(found.value)
