"""What `mtrec tune` does."""

import functools
import json
from pathlib import Path

from mtrec import terminal
from mtrec.atomic import check_file, check_folder
from mtrec.experiment import Experiment
from mtrec.run import dated_folder
from mtrec.tune.plan import load_plan
from mtrec.tune.table import show_results
from mtrec.tune.whole import PLAN, REPORT, read_plan, tune, write_all


def launch_search(
    experiment: Experiment,
    space: Path,
    trials: int,
    *,
    workers: int,
    parallel: int | None,
    resume: bool,
    output: Path | None,
) -> Path:
    """Makes the trials of a search on Ray (those that are missing), prints the table; returns its folder.

    Raises ValueError for a mistake in experiment, space or arguments, before anything runs.
    """
    check_folder(output, "--output")
    plan = load_plan(experiment, space, trials)
    folder = (output or dated_folder(f"{experiment.name}-tune", PLAN, "search", resume)).absolute()
    to = terminal.console()
    say = functools.partial(terminal.say, to)

    from mtrec.jobs.tune import search_on_ray

    say(f"search {folder}")
    search = functools.partial(search_on_ray, workers=workers, parallel=parallel, say=say)
    show_results(tune(plan, folder, resume=resume, search=search, say=say), to)
    say(f"best: {folder / 'best.yaml'}\nreport: {folder / REPORT}")
    return folder


def is_search(folder: Path) -> bool:
    """Whether a folder is that of a search."""
    return (folder / PLAN).is_file()


def write_search_report(folder: Path, output: Path | None = None) -> Path:
    """tune.html and the other files of a search, again from what its trials left; returns where the page was written."""
    check_file(output, "--output")
    facts = json.loads((folder / PLAN).read_text())
    write_all(read_plan(facts), folder, facts)
    target = output or folder / REPORT
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text((folder / REPORT).read_text(encoding="utf-8"), encoding="utf-8")
    return target
