"""What commands print: whole lines for files and programs, one table a task."""

import io
from typing import Any

import pytest
from rich.console import Console
from rich.table import Table

from mtrec.display import show_metrics
from mtrec.display_scoring import ScoreDisplay
from mtrec.terminal import console, say


def _printed(metrics: dict[str, Any], title: str) -> list[str]:
    out = io.StringIO()
    show_metrics(metrics, title, Console(file=out, width=200))
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


def test_a_task_that_a_group_has_no_rows_of_is_left_out_of_its_rows() -> None:
    part = _metrics(6, 0.5)
    del part["tasks"]["conversion"]
    lines = _printed({**_metrics(10, 0.75), "by": {"tab": {"0": part}}}, "x")
    after = lines[next(place for place, line in enumerate(lines) if "conversion" in line) :]
    assert not any("tab = 0" in line for line in after)


def test_names_with_brackets_are_not_markup(capsys: pytest.CaptureFixture[str]) -> None:
    say(console(), "runs/[bold]x[/] is drifting", word="warning", style="yellow")
    assert capsys.readouterr().out == "warning: runs/[bold]x[/] is drifting\n"


def test_scoring_says_that_rows_are_counted_before_where(capsys: pytest.CaptureFixture[str]) -> None:
    facts = {"files": 2, "rows": 1000, "rows_left": 0, "finished": 0, "failed": {"x": "x: [red] is no file"}}
    names = {"run": "runs/[a]", "checkpoint": "step-10", "formula": "p_click"}
    ScoreDisplay().start({**facts, **names, "where": "tab = 1"})
    assert capsys.readouterr().out.splitlines() == [
        "2 files, 1,000 rows (scored: those with tab = 1); runs/[a], step-10; score = p_click",
        "not scored: x: [red] is no file",
    ]
    ScoreDisplay().start({**facts, **names, "failed": {}, "where": None})
    assert capsys.readouterr().out == "2 files, 1,000 rows; runs/[a], step-10; score = p_click\n"
