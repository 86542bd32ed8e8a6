"""The log of a run, where a full disk or a kill cut its last line short."""

import json
import logging
from pathlib import Path

import pytest
from runs import small_run
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer.record_writer import RecordWriter

from mtrec.display import TrainDisplay
from mtrec.events import Ended, Saved, Validation
from mtrec.recorder import BLOCK_BYTES, Recorder


@pytest.mark.parametrize("lines", [0, 1, 3])
@pytest.mark.parametrize("cut", ["", '{"event": "step", "st', "x" * (BLOCK_BYTES + 5)])
def test_a_line_that_was_cut_short_is_not_glued_to_the_next(tmp_path: Path, lines: int, cut: str) -> None:
    whole = "".join(json.dumps({"event": "saved", "step": step, "folder": "f" * 40_000}) + "\n" for step in range(lines))
    (tmp_path / "log.jsonl").write_text(whole + cut)
    recorder = Recorder(tmp_path)
    recorder(Saved(7, "step-7"))
    recorder(Ended(7, "finished", None, None, {}))
    recorder.close()
    found = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [each["step"] for each in found] == [*range(lines), 7, 7]


def test_a_display_follows_a_log_whose_last_line_was_cut_short(tmp_path: Path) -> None:
    run = small_run(tmp_path, rows=1_000)
    log = run.folder / "log.jsonl"
    log.write_text(json.dumps({"event": "saved", "step": 1, "folder": "x"}) + '\n{"event": "step", "st')
    display = TrainDisplay(run.folder)
    display.start(run, None)
    recorder = Recorder(run.folder)
    display.poll()
    recorder(Ended(7, "finished", None, None, {}))
    display.poll()
    recorder.close()
    assert display.ended == "finished"
    display.close()


def validated(step: int, auc: float = 0.75) -> Validation:
    return Validation(step, 0, {"rows": 9, "tasks": {"click": {"auc": auc, "gauc": None}}}, auc, 0.5)


def test_tensorboard_shows_what_was_recorded(tmp_path: Path) -> None:
    for steps in ((4, 8), (12,)):  # a run that was resumed
        recorder = Recorder(tmp_path)
        for step in steps:
            recorder(validated(step, step / 16))
        recorder.close()
    found = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert found.Tags()["scalars"] == ["validation/click/auc"]
    assert [(each.step, each.value) for each in found.Scalars("validation/click/auc")] == [(4, 0.25), (8, 0.5), (12, 0.75)]


@pytest.mark.parametrize("when", ["at the start", "later"])
def test_a_board_that_cannot_be_written_is_let_go(tmp_path: Path, when: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "mtrec")
    if when == "at the start":
        (tmp_path / "tensorboard").touch()
    with Path("/dev/full").open("wb") as full:
        recorder = Recorder(tmp_path)
        if when == "later":
            recorder._board._records = RecordWriter(full)
        for step in (4, 8):
            recorder(validated(step))
        recorder.close()
    assert [record.getMessage()[:47] for record in caplog.records] == [f"TensorBoard's file in {tmp_path}"[:47]]
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 2
