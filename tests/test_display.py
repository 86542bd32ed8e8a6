"""What commands print: whole lines for files and programs, one table a task."""

import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rich.table import Table
from runs import small_run

from mtrec.display import TrainDisplay, show_metrics
from mtrec.display_scoring import ScoreDisplay
from mtrec.terminal import console, say


def _printed(metrics: dict[str, Any], title: str, width: int = 200) -> list[str]:
    out, to = io.StringIO(), console()
    to.file, to.width = out, width
    show_metrics(metrics, title, to)
    return [line.rstrip() for line in out.getvalue().splitlines()]


def _metrics(rows: int, auc: float) -> dict[str, Any]:
    return {"tasks": {"click": {"rows": rows, "auc": auc}, "conversion": {"rows": rows, "auc_given": auc, "rows_given": 3}}}


def test_tables_are_not_cut_where_no_terminal_reads_them(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    table = Table(*(f"column_{number}" for number in range(30)))
    table.add_row(*("a value" for _ in range(30)))
    console().print(table)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5  # two edges, the names, a line, the row
    assert "column_29" in lines[1]


def test_a_reader_that_goes_away_ends_the_display_and_not_the_work() -> None:
    work = "import sys\nfrom mtrec.terminal import console\nto = console()\nto.print('a line')\nsys.stdout.flush()\n"
    work += "sys.stdin.read()\nfor _ in range(3):\n    to.print('more')\n    print('more', flush=True)\n"
    work += "print('done', file=sys.stderr)"
    pipe = subprocess.PIPE
    process = subprocess.Popen([sys.executable, "-c", work], stdin=pipe, stdout=pipe, stderr=pipe, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "a line\n"
    process.stdout.close()
    process.stdout = None
    assert process.communicate(timeout=60)[1] == "done\n"
    assert process.returncode == 0


def test_an_error_gives_the_terminal_back(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    out = io.StringIO()
    monkeypatch.setattr("mtrec.display.console", lambda: Console(file=out, force_terminal=True, width=80))
    run = small_run(tmp_path, rows=1_000)
    hidden, shown = "\x1b[?25l", "\x1b[?25h"

    def failing() -> None:
        with TrainDisplay(run.folder) as display:
            display.start(run, None)
            assert hidden in out.getvalue()
            raise ValueError("a mistake")

    with pytest.raises(ValueError, match="a mistake"):
        failing()
    assert out.getvalue().rindex(shown) > out.getvalue().rindex(hidden)


@pytest.mark.parametrize("columns", ["0", "²", "wide", ""])
def test_columns_that_are_no_number_of_columns_cut_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], columns: str
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    console().print("word " * 60)
    assert capsys.readouterr().out == "word " * 60 + "\n"


def test_columns_of_the_environment_are_kept_to(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    console().print("word " * 20)
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 40


def test_metrics_by_a_column_are_rows_of_one_table_a_task() -> None:
    metrics = {**_metrics(10, 0.75), "by": {"tab": {"0": _metrics(6, 0.5), "[1]": _metrics(4, 0.625)}}}
    lines = _printed(metrics, "run on data/[ab]*.parquet")
    assert [line.split() for line in lines[:5]] == [
        ["run", "on", "data/[ab]*.parquet:", "click"],
        ["rows", "AUC"],
        ["all", "10", "0.7500"],
        ["tab", "=", "0", "6", "0.5000"],
        ["tab", "=", "[1]", "4", "0.6250"],
    ]
    assert sum("conversion" in line for line in lines) == 1
    assert [line.split()[-1] for line in lines if "(given)" in line] == ["0.7500", "0.5000", "0.6250"]


def test_without_groups_there_is_no_column_for_them() -> None:
    assert [line.split() for line in _printed(_metrics(10, 0.75), "validation")[1:3]] == [["rows", "AUC"], ["10", "0.7500"]]


def test_a_group_without_observed_rows_of_a_task_has_a_row_of_dashes() -> None:
    none = {"tasks": {"click": {"rows": 0, "auc": None}, "conversion": {"rows": 0, "auc_given": None, "rows_given": 0}}}
    lines = [line.split() for line in _printed({**_metrics(10, 0.75), "by": {"tab": {"0": none}}}, "x")]
    assert next(line for line in lines if line[:3] == ["tab", "=", "0"]) == ["tab", "=", "0", "0", "-"]
    assert ["tab", "=", "0", "0", "(given)", "-"] in lines


def test_long_groups_are_folded_and_numbers_are_whole() -> None:
    by = {f"a_long_name_of_a_segment_of_the_users_{letter}": _metrics(123_456, 0.5) for letter in "ab"}
    lines = _printed({**_metrics(246_912, 0.75), "by": {"segment": by}}, "x", width=40)
    text = "".join(line.split()[0] for line in lines if "_" in line)
    assert all(name in text for name in by)
    assert sum("123,456  0.5000" in line for line in lines) >= 2


def test_group_names_are_printed_as_they_are() -> None:
    by = {name: _metrics(1, 0.5) for name in ("[b]", "[/a]", "end\\", "a:x:b", ":100:")}
    text = "\n".join(_printed({**_metrics(10, 0.75), "by": {"tab": by}}, "x"))
    assert all(f"tab = {name} " in text for name in by)


@pytest.mark.parametrize("variable", [("FORCE_COLOR", "1"), ("TTY_COMPATIBLE", "1"), ("COLUMNS", "")])
def test_whatever_makes_rich_take_a_pipe_for_a_terminal(
    variable: tuple[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.setenv(*variable)
    console().print("word " * 100)
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_names_with_brackets_are_not_markup(capsys: pytest.CaptureFixture[str]) -> None:
    say(console(), "runs/[bold]x[/] is drifting", word="warning", style="yellow")
    assert capsys.readouterr().out == "warning: runs/[bold]x[/] is drifting\n"


def test_scoring_says_that_rows_are_those_to_look_through(capsys: pytest.CaptureFixture[str]) -> None:
    facts = {"files": 2, "rows": 1000, "rows_left": 0, "finished": 0, "failed": {"x": "x: [red] is no file"}}
    names = {"run": "runs/[a]", "checkpoint": "step-10", "formula": "p_click"}
    ScoreDisplay().start({**facts, **names, "where": "tab = 1"})
    assert capsys.readouterr().out.splitlines() == [
        "2 files, 1,000 rows to look through for those with tab = 1; runs/[a], step-10; score = p_click",
        "not scored: x: [red] is no file",
    ]
    ScoreDisplay().start({**facts, **names, "failed": {}, "where": None})
    assert capsys.readouterr().out == "2 files, 1,000 rows; runs/[a], step-10; score = p_click\n"
