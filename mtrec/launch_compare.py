"""What `mtrec compare` and `mtrec report` do."""

import functools
import json
from pathlib import Path

from mtrec import terminal
from mtrec.atomic import check_file, check_folder, write_atomically
from mtrec.compare.plan import load_plan
from mtrec.compare.report import comparison_report, run_report
from mtrec.compare.results import compute, write
from mtrec.compare.table import show_results
from mtrec.compare.whole import PLAN, REPORT, compare, plan_of
from mtrec.run import dated_folder, open_run


def launch_comparison(path: Path, *, workers: int, parallel: int | None, resume: bool, output: Path | None) -> Path:
    """Makes the runs of a comparison on Ray (those that are missing), prints the table; returns its folder.

    Raises ValueError for a mistake in the comparison file, before anything runs.
    """
    check_folder(output, "--output")
    plan = load_plan(path)
    if plan.comparison.budget is not None and plan.comparison.budget.seconds is not None and workers > 1:
        raise ValueError("`budget.seconds` is for runs on one worker. Give steps or rows, or leave out --workers.")
    folder = (output or dated_folder(plan.comparison.name, PLAN, "comparison", resume)).absolute()
    to = terminal.console()
    say = functools.partial(terminal.say, to)

    from mtrec.jobs.compare import conduct_on_ray

    say(f"comparison {folder}")
    conduct_all = functools.partial(conduct_on_ray, workers=workers, parallel=parallel, say=say)
    found = compare(plan, folder, resume=resume, conduct_all=conduct_all, say=say)
    show_results(found, to)
    say(f"report: {folder / REPORT}")
    return folder


def write_report(folder: Path, output: Path | None = None) -> Path:
    """report.html of a run, or of a comparison from what its runs saved; returns where it was written."""
    check_folder(folder, "RUN")
    check_file(output, "--output")
    target = output or folder / REPORT
    if (folder / PLAN).is_file():
        facts = json.loads((folder / PLAN).read_text())
        found = compute(plan_of(facts), folder, facts)
        write(found, folder)
        text = comparison_report(found)
    else:
        text = run_report(open_run(folder))
    target.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(target, text)
    return target
