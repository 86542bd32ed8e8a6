"""The log of a run, where a full disk or a kill cut its last line short."""

import json
from pathlib import Path

import pytest
from runs import small_run

from mtrec.display import TrainDisplay
from mtrec.events import Ended, Saved
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
