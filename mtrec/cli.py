"""The command `mtrec`: thin. Every command imports what it needs when it runs, so that `--help` answers at once."""

import gc
import json
import logging
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from mtrec.allocator import keep_freed_memory
from mtrec.events import Failed

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # rich would take as long to be imported as all else of --help together
    help="Train, evaluate and compare multi-objective recommenders: torchrec tables, Ray workers, Parquet in and out.",
)
ExperimentFile = Annotated[Path, typer.Argument(help="YAML file of the experiment")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="K=V", help="override a key: --set training.epochs=2")
]
RunFolder = Annotated[Path, typer.Argument(help="folder of a run")]


def main() -> None:
    """Runs the command; a user's mistake, or a file that cannot be read or written, ends it with one message and exit code 1,
    without a stack trace.
    """
    keep_freed_memory()  # before libraries start threads
    _warn_in_plain_words()
    try:
        app(standalone_mode=True)
    except (ValueError, OSError, Failed) as error:
        if "--debug" in sys.argv:
            raise
        where = "" if isinstance(error, ValueError | Failed) else " (mtrec --debug ... shows where)"
        typer.secho(f"error: {error}{where}", fg=typer.colors.RED, err=True)
        _end(1)
    except SystemExit as ended:  # every other way: done, Ctrl-C, SIGTERM
        _end(ended.code)


def _warn_in_plain_words() -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("warning: %(message)s"))
    log = logging.getLogger("mtrec")
    log.addHandler(handler)
    log.propagate = False  # other libraries set up the root logger as they like


def _end(code: str | int | None) -> None:
    gc.freeze()  # or Python looks through all that torch and torchrec hold once more, for a second and more
    if "mtrec.jobs.connection" in sys.modules and isinstance(code, int):
        from mtrec.jobs.connection import leave

        leave(code)
    sys.exit(code)


def _show_version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        typer.echo(f"mtrec {version('mtrec')}")
        raise typer.Exit


@app.callback()
def _common(
    debug: Annotated[bool, typer.Option("--debug", help="show the stack trace of an error")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="show mtrec's version")
    ] = False,
) -> None:
    """Checks that the installed packages fit together before any of them is imported."""
    from mtrec.versions import check_versions

    check_versions()


@app.command()
def train(
    experiment: ExperimentFile,
    output: Annotated[Path | None, typer.Option(help="folder of the run; default runs/<name>-<time>")] = None,
    workers: Annotated[str, typer.Option(help="number of Ray workers; default: one a GPU, or 1")] = "auto",
    set_: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="continue a run from its newest checkpoint")] = False,
    warm_start: Annotated[
        Path | None, typer.Option(metavar="RUN", help="start from this run's weights and vocabularies")
    ] = None,
    local: Annotated[bool, typer.Option("--local", help="train in this process, without Ray")] = False,
    json_: Annotated[Path | None, typer.Option("--json", help="also write the last validation's metrics here")] = None,
) -> None:
    """Train an experiment. Exit code 75: stopped by Ctrl-C or SIGTERM, with a checkpoint; run it again with --resume."""
    from mtrec.config import load_experiment

    loaded = load_experiment(experiment, set_ or ())
    if not local:
        from mtrec.jobs.connection import check_cluster, cluster_address, connect_beside

        check_cluster()  # before anything is prepared
        if cluster_address() is None:
            connect_beside()  # before the imports that take longest

    from mtrec.launch import Stopped, launch
    from mtrec.stopping import EXIT_CODE
    from mtrec.yaml_tree import naming_keys

    try:
        with naming_keys(experiment, set_):
            launch(
                loaded,
                output=output,
                workers=workers,
                resume=resume,
                warm_start=warm_start,
                local=local,
                json_file=json_,
            )
    except Stopped as stopped:
        typer.secho(str(stopped), fg=typer.colors.YELLOW, err=True)
        raise typer.Exit(EXIT_CODE) from None


@app.command()
def check(
    experiment: ExperimentFile,
    set_: Overrides = None,
    sample_rows: Annotated[int, typer.Option(min=1, help="rows read for label, drift and leak checks")] = 100_000,
) -> None:
    """Check an experiment and its data in seconds, without a worker: columns, types, labels, tables, model size, drift, leaks."""
    from mtrec.check import check_experiment
    from mtrec.config import load_experiment
    from mtrec.display import show_check
    from mtrec.yaml_tree import naming_keys

    loaded = load_experiment(experiment, set_ or ())
    with naming_keys(experiment, set_):
        report = check_experiment(loaded, sample_rows)
    show_check(report)


@app.command()
def evaluate(
    run: RunFolder,
    data: Annotated[str, typer.Option(help="Parquet file, folder or glob")],
    by: Annotated[
        str | None, typer.Option(metavar="COLUMN", help="also give the metrics for each value of a column")
    ] = None,
    where: Annotated[str | None, typer.Option(help="only rows that fulfil this condition")] = None,
    json_: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="write the metrics here")] = None,
) -> None:
    """Evaluate a run's best checkpoint on labelled Parquet files."""
    from mtrec.atomic import check_file
    from mtrec.display import show_metrics
    from mtrec.launch import evaluate_run

    check_file(json_, "--json")
    metrics = evaluate_run(run, data, where=where, by=by)
    show_metrics(metrics, title=f"{run} on {data}")
    if json_ is not None:
        json_.parent.mkdir(parents=True, exist_ok=True)
        json_.write_text(json.dumps(metrics, indent=1) + "\n")


@app.command()
def score(
    run: RunFolder,
    input_: Annotated[str, typer.Argument(metavar="INPUT", help="Parquet file, folder, glob or URI")],
    output: Annotated[str, typer.Argument(help="folder (or URI) for one file for each input file")],
    columns: Annotated[
        str | None, typer.Option(metavar="A,B", help="input columns to keep; default: all but labels; none: no column")
    ] = None,
    workers: Annotated[str, typer.Option(help="number of Ray actors; default: one a GPU, or one a CPU")] = "auto",
    formula: Annotated[str | None, typer.Option(help="column `score`, such as 'p_click * log1p(dwell_seconds)'")] = None,
    top: Annotated[int | None, typer.Option(min=1, metavar="K", help="write only the K best rows of each group ...")] = None,
    by: Annotated[str | None, typer.Option(metavar="COLUMN", help="... of this column")] = None,
    where: Annotated[str | None, typer.Option(help="only rows that fulfil this condition")] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="replace what another job wrote, delete what it made of files now gone from INPUT")
    ] = False,
    allow_null_jump: Annotated[
        bool, typer.Option("--allow-null-jump", help="score although a feature has many more nulls than in training")
    ] = False,
    local: Annotated[bool, typer.Option("--local", help="score in this process, without Ray")] = False,
) -> None:
    """Score Parquet files with a run's best checkpoint; takes up what an earlier call left unfinished."""
    from mtrec.dataset import Source
    from mtrec.display_scoring import show_scoring
    from mtrec.launch import score_run
    from mtrec.scored_files import Asked

    names = () if columns in (None, "none") else tuple(dict.fromkeys(filter(None, map(str.strip, columns.split(",")))))
    kept = None if columns is None else names
    asked = Asked(
        str(run), Source(input_, where), output, kept, formula, top, by, overwrite=overwrite, allow_null_jump=allow_null_jump
    )
    manifest = score_run(asked, workers, local)
    show_scoring(manifest, output)
    if manifest["failed"]:
        raise typer.Exit(1)


@app.command()
def compare(
    comparison: Annotated[Path, typer.Argument(help="YAML file of the comparison")],
    workers: Annotated[int, typer.Option(min=1, help="workers a run")] = 1,
    parallel: Annotated[int | None, typer.Option(min=1, help="runs at a time; default: as many as fit")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="make only the runs that are missing")] = False,
    output: Annotated[Path | None, typer.Option(help="folder of the comparison; default runs/<name>-<time>")] = None,
) -> None:
    """Compare variants of an experiment over several seeds; says which difference is real, and writes report.html."""
    from mtrec.launch_compare import launch_comparison

    launch_comparison(comparison, workers=workers, parallel=parallel, resume=resume, output=output)


@app.command()
def tune(
    experiment: ExperimentFile,
    space: Annotated[Path, typer.Option(metavar="SPACE.yaml", help="YAML file: which paths may be what, and the objectives")],
    trials: Annotated[int, typer.Option(min=1, metavar="N", help="so many draws, and the experiment as written")],
    workers: Annotated[int, typer.Option(min=1, help="workers a trial")] = 1,
    parallel: Annotated[int | None, typer.Option(min=1, help="trials at a time; default: as many as fit")] = None,
    set_: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="make only the trials that are missing, or more of them")] = False,
    output: Annotated[Path | None, typer.Option(help="folder of the search; default runs/<name>-tune-<time>")] = None,
) -> None:
    """Search for better values of an experiment's keys (Optuna, ASHA); writes best.yaml and tune.html."""
    from mtrec.config import load_experiment
    from mtrec.launch_tune import launch_search
    from mtrec.yaml_tree import naming_keys

    made = load_experiment(experiment, set_ or ())
    with naming_keys(experiment, set_):
        launch_search(made, space, trials, workers=workers, parallel=parallel, resume=resume, output=output)


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="folder of a run, of a comparison or of a search")],
    output: Annotated[Path | None, typer.Option("--output", help="HTML file; default report.html in that folder")] = None,
) -> None:
    """Write the page of a run or, from what was saved, again that of a comparison or of a search."""
    from mtrec.launch_compare import write_report
    from mtrec.launch_tune import is_search, write_search_report

    typer.echo(f"report: {write_search_report(run, output) if is_search(run) else write_report(run, output)}")


@app.command()
def synth(
    out: Annotated[Path, typer.Argument(help="folder to write to")],
    rows: Annotated[int | None, typer.Option(help="training rows; default 500,000, reference 2,000,000")] = None,
    seed: Annotated[int, typer.Option()] = 7,
    files: Annotated[int, typer.Option(help="training files")] = 8,
    conflict: Annotated[
        float | None, typer.Option(help="0 to 1: how much click and conversion pull the shared factors apart; default 0")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace the log that is there")] = False,
    preset: Annotated[str, typer.Option(help="log, or reference: the workload of the benchmark")] = "log",
    days: Annotated[int | None, typer.Option(help="write a partition dt=... for each of so many days")] = None,
    drift: Annotated[float | None, typer.Option(help="with --days: share of ids replaced each day; default 0.05")] = None,
) -> None:
    """Write a synthetic log of impressions, with its true probabilities in columns of their own."""
    from mtrec.synthetic import write_log, write_reference

    of_log = {"--conflict": conflict, "--days": days, "--drift": drift}
    unused = [name for name, value in of_log.items() if value is not None]
    if preset == "reference" and unused:
        raise ValueError(f"--preset reference has no {', '.join(unused)}. Leave that out, or write a log of --preset log.")
    if preset == "reference":
        log = write_reference(out, rows=2_000_000 if rows is None else rows, seed=seed, files=files, overwrite=overwrite)
    elif preset == "log":
        if drift is not None and days is None:
            raise ValueError(f"--drift should stand beside --days. Found {drift:g} and no --days.")
        share = (0.05 if days else 0.0) if drift is None else drift
        log = write_log(
            out,
            rows=500_000 if rows is None else rows,
            seed=seed,
            files=files,
            conflict=conflict or 0.0,
            days=days,
            drift=share,
            overwrite=overwrite,
        )
    else:
        raise ValueError(f"--preset should be log or reference. Found '{preset}'.")
    typer.echo(
        f"{log.folder}: {log.rows:,} training and {log.validation_rows:,} validation rows in {len(log.files)} files "
        f"({log.num_bytes / 1e6:.1f} MB); clicks {log.click_rate:.1%}, conversions {log.conversion_rate:.1%} of the clicks, "
        f"mean dwell {log.mean_dwell_seconds:.1f} s a click"
    )


@app.command()
def bench(
    experiment: Annotated[
        Path | None, typer.Argument(help="experiment with the model to measure; default pipelines/benchmark/reference.yaml")
    ] = None,
    stage: Annotated[
        list[str] | None, typer.Option(help="read, encode, compute, train, score, startup or all; may be given several times")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(help="processes that train, encode and score, one thread each; default: 2, or one a GPU")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    rounds: Annotated[int, typer.Option(help="interleaved launches of every measurement")] = 5,
    steps: Annotated[
        int, typer.Option(help="timed training steps of a launch; default: nearly an epoch of the log, with one checkpoint")
    ] = 440,
    precision: Annotated[
        list[str] | None, typer.Option(help="bf16 or fp32; default: both, only fp32 on a CPU without instructions for bf16")
    ] = None,
    rows: Annotated[int, typer.Option(help="of the reference log, written once into --work")] = 2_000_000,
    work: Annotated[Path, typer.Option(help="folder for data and prepared runs")] = Path("runs/bench"),
    architectures: Annotated[bool, typer.Option("--architectures", help="also train PLE and shared-bottom")] = False,
    peers: Annotated[
        bool, typer.Option("--peers", help="also time torch-rechub and deepctr-torch, in an environment of their own in --work")
    ] = False,
    set_: Overrides = None,
    json_: Annotated[Path | None, typer.Option("--json", help="write all numbers here")] = None,
    html: Annotated[Path | None, typer.Option("--html", help="write the plot here")] = None,
) -> None:
    """Measure reading, encoding, computing, training and scoring here, beside a bare loop and the hardware's floor."""
    from mtrec.launch_bench import launch_bench

    launch_bench(
        stage or ["all"],
        experiment=experiment,
        work=work,
        workers=workers,
        device=device,
        rounds=rounds,
        steps=steps,
        rows=rows,
        architectures=architectures,
        overrides=set_ or (),
        json_file=json_,
        page_file=html,
        peers=peers,
        precisions=precision or (),
    )


@app.command()
def schema(
    of: Annotated[
        Literal["experiment", "comparison", "search"], typer.Option(help="which file: of train, of compare, or tune's --space")
    ] = "experiment",
) -> None:
    """Print the JSON Schema of a YAML file, for editors that complete and check."""
    if of == "comparison":
        from mtrec.compare.plan import json_schema
    elif of == "search":
        from mtrec.tune.plan import json_schema
    else:
        from mtrec.config import json_schema
    typer.echo(json.dumps(json_schema(), indent=1))


@app.command()
def inspect(run: RunFolder) -> None:
    """Show and verify what a run holds: checkpoints, tables, rows touched, versions."""
    from mtrec.display import show_run
    from mtrec.launch import inspect_run

    show_run(inspect_run(run))


ClusterAddress = Annotated[
    str | None,
    typer.Option(metavar="URL", help="dashboard of the cluster; default: RAY_API_SERVER_ADDRESS, RAY_ADDRESS, port 8265 here"),
]
JobName = Annotated[str, typer.Argument(metavar="JOB", help="id of a job, or the name or folder of its run")]


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def submit(
    context: typer.Context,
    command: Annotated[str, typer.Argument(metavar="COMMAND ...", help="train, score or compare, with its arguments")],
    address: ClusterAddress = None,
    no_wait: Annotated[bool, typer.Option("--no-wait", help="return once the job is sent")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="check, show what would be sent, send nothing")] = False,
    with_code: Annotated[bool, typer.Option("--with-code", help="send this mtrec along; its dependencies must be there")] = False,
) -> None:
    """Send a command to a Ray cluster as a job, follow its log, return its exit code.

    The same submission again follows the run while it is under way, and continues it afterwards.
    """
    import typer.main

    from mtrec.jobs import arguments
    from mtrec.jobs.submit import SUBMITTED, submit_job

    known = getattr(typer.main.get_command(app), "commands", {})
    if command not in SUBMITTED or command not in known:
        raise ValueError(f"`mtrec submit` should be followed by {', '.join(SUBMITTED)}. Found '{command}'.")
    values = arguments.parsed(known[command], context.args)
    job = SUBMITTED[command](values, lambda changed: arguments.written(known[command], changed), with_code)
    ask = typer.prompt if sys.stdin.isatty() else None
    raise typer.Exit(submit_job(job, address=address, wait=not no_wait, dry_run=dry_run, say=typer.echo, ask=ask))


jobs = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="The jobs of a Ray cluster: list, status, logs, stop.")
app.add_typer(jobs, name="jobs")


@jobs.command("list")
def list_jobs(address: ClusterAddress = None) -> None:
    """List the cluster's jobs, the newest first."""
    from mtrec.display import show_rows
    from mtrec.jobs.follow import list_jobs

    rows, note = list_jobs(address)
    if note:
        typer.echo(note)
    show_rows(rows, empty="no jobs")


@jobs.command()
def status(job: JobName, address: ClusterAddress = None) -> None:
    """Show where a job stands; of a failed one, why."""
    from mtrec.jobs.follow import job_status

    for name, value in job_status(address, job).items():
        typer.echo(f"{name}: {value}")


@jobs.command()
def logs(
    job: JobName,
    address: ClusterAddress = None,
    follow: Annotated[bool, typer.Option("--follow", help="until the job ends; returns its exit code")] = False,
) -> None:
    """Print a job's log."""
    from mtrec.jobs.follow import job_logs

    ask = typer.prompt if sys.stdin.isatty() else None
    raise typer.Exit(job_logs(address, job, wait=follow, say=typer.echo, ask=ask))


@jobs.command()
def stop(job: JobName, address: ClusterAddress = None) -> None:
    """Stop a job. Its run keeps its checkpoints; the same submission continues it."""
    from mtrec.jobs.follow import stop_job

    typer.echo(stop_job(address, job))


if __name__ == "__main__":
    main()
