"""Kills, stops, drains and adds what trains, and says whether anything was lost, or seen twice.

    .venv/bin/python pipelines/resilience/trials.py [--seeds 0 1 2] [--only ranks|ray] [--out RESULTS.md]

Two sorts of trials, each held against a run to which nothing happened:

ranks: processes of this machine train two epochs; a random one gets SIGKILL at a random moment of a random step; ranks
    of a second number (every pair of 1, 2 and 4) go on from the newest valid checkpoint. See tests/trials.py; the tests run six.
    About ten seconds each on 2 cores.
ray: `mtrec train` on Ray workers; a worker, a node or the command itself dies, hangs, is announced to go, or a node joins. See
    tests/ray_trials.py; the tests run two, in one. Half a minute to two minutes each.
"""

import argparse
import itertools
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent
TESTS = str(HERE.parents[1] / "tests")
sys.path.insert(0, TESTS)
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [TESTS, os.environ.get("PYTHONPATH")]))  # for the ranks
os.environ.setdefault("OMP_NUM_THREADS", "1")

RANKS, RAY = "## Ranks: SIGKILL and resume", "## Ray: workers, nodes and the command"
RANKS_TEXT = (
    "Losses: largest relative difference to the run without a kill in the 20 steps after resuming (at most 1e-5; 0 on the same "
    "number of ranks). Metrics: of the last validation (at most 1e-3). Bit for bit: all final weights and optimizer states (must "
    "be so on the same number of ranks). Every trial also checks that each row was trained on exactly once an epoch, in the same "
    "global batches, and that the restored state, gathered, is to the bit what was saved."
)
RAY_TEXT = (
    "The same is checked, by a witness in the workers that notes the row ids of every batch and gathers the state before the "
    "first step; and that the user reads one line about what happened (its first words stand in the table)."
)


def ranks(folder: Path, seeds: list[int]) -> Iterator[str]:
    """The lines of the first table; the last cell of a trial that failed says why."""
    from logs import write_log
    from trials import ROWS, Trial, conduct, prepared

    yield "| ranks | seed | SIGKILL to rank, at step | resumed from | losses, 20 steps | metrics | bit for bit | result |"
    yield "|---|---|---|---|---|---|---|---|"
    write_log(folder / f"log-{ROWS}" / "train", rows=ROWS)
    write_log(folder / f"log-{ROWS}" / "validation", rows=1_000, seed=1)
    base = prepared(folder)
    for before, after in itertools.product((1, 2, 4), repeat=2):
        for seed in seeds:
            found = conduct(base, Trial(before, after, seed))
            yield (
                f"| {before} -> {after} | {seed} | {found.kill.rank}, {found.kill.step + 1} | {found.resumed_step} "
                f"| {found.loss_difference:.1e} | {found.metric_difference:.1e} | {'yes' if found.bit_equal else 'no'} "
                f"| {'; '.join(found.failures) or 'as it should'} |"
            )


def ray(folder: Path) -> Iterator[str]:
    """The lines of the second table."""
    from ray_trials import TRIALS, conduct

    yield "| what happened | workers | at step | from | losses, 20 steps | metrics | bit for bit | the user read | result |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for number, (name, trial) in enumerate(TRIALS.items()):
        try:
            found = conduct(trial, folder / f"trial-{number}")
        except (AssertionError, subprocess.TimeoutExpired) as error:  # the command itself failed, or never ended
            print(error, file=sys.stderr)
            yield f"| {name} | | | | | | | | {str(error).strip().splitlines()[-1]} |"
            continue
        said = found.said.replace(f"{folder}/", "")
        yield (
            f"| {name} | {' -> '.join(map(str, found.world_sizes))} | {', '.join(map(str, found.died_at_steps))} "
            f"| {', '.join(map(str, found.resumed_steps))} "
            f"| {found.loss_difference:.1e} | {found.metric_difference:.1e} | {'yes' if found.bit_equal else 'no'} "
            f"| {said[:100]}{' ...' if len(said) > 100 else ''} | {'; '.join(found.failures) or 'as it should'} |"
        )


def table(heading: str, text: str, lines: Iterator[str]) -> tuple[str, int]:
    """(the section, how many of its trials failed); prints the lines as they come."""
    print(heading, flush=True)
    found, began = [], time.monotonic()
    for line in lines:
        print(line, flush=True)
        found.append(line)
    failed = sum(not line.endswith("| as it should |") for line in found[2:])
    last = f"{len(found) - 2} trials, {failed} failed, {time.monotonic() - began:.0f} s. {text}"
    return "\n".join([heading, "", *found, "", last, ""]), failed


def kept(out: Path, heading: str) -> str:
    """A section of the results as they were."""
    text = out.read_text() if out.exists() else ""
    start = text.find(heading)
    end = text.find("\n## ", start + 1)
    return "" if start < 0 else text[start : end + 1 if end >= 0 else None]


def main() -> int:
    """Runs the trials; the exit code is the number of those that failed."""
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments.add_argument("--only", choices=("ranks", "ray"), help="the other results stay as they are")
    arguments.add_argument("--out", type=Path, default=HERE / "RESULTS.md")
    chosen = arguments.parse_args()
    logging.getLogger("mtrec.checkpoint").setLevel(logging.ERROR)  # half-written checkpoints are what this is about
    sections, failed = [], 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        made = ((RANKS, RANKS_TEXT, ranks(folder / "ranks", chosen.seeds)), (RAY, RAY_TEXT, ray(folder / "ray")))
        for which, (heading, text, lines) in zip(("ranks", "ray"), made, strict=True):
            if chosen.only not in (None, which):
                sections.append(kept(chosen.out, heading))
                continue
            (folder / which).mkdir()
            section, bad = table(heading, text, lines)
            sections.append(section)
            failed += bad
    head = "# What dies, and what is lost\n\nMade by `trials.py`.\n"
    chosen.out.write_text("\n".join([head, *filter(None, sections)]))
    return failed


if __name__ == "__main__":
    sys.exit(main())
