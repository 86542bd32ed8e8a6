"""How a run is prepared before any worker starts: what can be checked is checked, then the encoder and the labels are fitted.

What a run is: `mtrec/run.py`.
"""

import datetime
import importlib.util
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from mtrec import labels as label_fit
from mtrec.architectures.products import emulates_bf16
from mtrec.atomic import write_atomically
from mtrec.batch import Label
from mtrec.config import to_yaml
from mtrec.dataset import Dataset
from mtrec.experiment import Experiment
from mtrec.features import BadRowsError, Encoder, Feature, id_columns
from mtrec.features.tables import plan_tables
from mtrec.feed import bad_row, bad_rows, check_encodes, label_looks, usable_rows, without_bad_rows
from mtrec.formula import ranking_formula
from mtrec.gradients import check_place
from mtrec.kinds import own_modules
from mtrec.labels import LabelFit, LabelStatistics, check_trained, labels_of
from mtrec.model import check_buffers, task_specs
from mtrec.run import SAMPLE_FILE, Run, versions
from mtrec.sources import SMALL_DIM, evaluation_columns, feature_columns, feature_list, label_columns, open_source, resolve_auto
from mtrec.tasks import Objectives, TaskSpec

FIT_ROWS = 65_536
SAMPLE_ROWS = 4_096  # training rows kept in the run; see mtrec/predictions.py


def prepare(experiment: Experiment, folder: Path, previous: Run | None = None) -> Run:
    """Makes a run's folder: checks the data, fits encoder and label statistics in one streaming pass, writes them.

    `previous` (warm start) is the run whose vocabularies are grown. Raises ValueError naming the YAML path, the file or the
    column before anything is written.
    """
    train = open_source(experiment, experiment.data.train, "data.train")
    if previous is not None:
        previous.best()  # raises where there is nothing to start from
        if experiment.model.embedding_dim == "auto":  # more rows than yesterday must not mean another dimension
            model = experiment.model.model_copy(update={"embedding_dim": previous.experiment.model.embedding_dim})
            experiment = experiment.model_copy(update={"model": model})
    experiment = resolve_auto(experiment, train.num_rows)
    sources, validation = [train], experiment.data.validation
    if validation is not None:
        sources.append(open_source(experiment, validation, "data.validation", evaluation_columns(experiment)))
    specs = task_specs(experiment)
    objectives = Objectives(specs)
    ranking_formula(experiment)
    check_place(experiment)
    check_buffers(experiment)
    if experiment.data.on_bad_rows == "error":
        for source in sources:
            check_footers(source, specs, experiment)
    encoder, statistics = _fitted(experiment, train, objectives, previous)
    for source in sources[1:]:
        check_encodes(encoder, source)
    check_trained(statistics, experiment, "training")
    folder.mkdir(parents=True, exist_ok=True)
    encoder.save(folder / "encoder")
    label_fit.save(statistics, folder)
    sample = train.sample(SAMPLE_ROWS, feature_columns(feature_list(experiment))[0])
    pq.write_table(usable_rows(sample, encoder) if experiment.data.on_bad_rows == "skip" else sample, folder / SAMPLE_FILE)
    (folder / "checkpoints").mkdir(exist_ok=True)
    write_atomically(folder / "experiment.yaml", to_yaml(experiment))
    info = {
        "made": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": versions(),
        "train": {
            "rows": train.num_rows,
            "kept": max(each.rows for each in statistics.values()),
            "files": len(train.files),
            "fingerprint": train.fingerprint,
        },
        "validation": None if validation is None else {
            "source": validation.model_dump(mode="json"),
            "rows": sources[1].num_rows,
            "files": len(sources[1].files),
            "fingerprint": sources[1].fingerprint,
        },
        "notes": [note for source in sources for note in source.notes],
        "warm_start": str(previous.folder) if previous else None,
        "warm_start_encoder": previous.encoder.fingerprint() if previous else None,
        "module_folders": module_folders(experiment),
    }
    write_atomically(folder / "run.json", json.dumps(info, indent=1))  # last: a folder with it is a whole run
    return Run(folder.absolute())


def _fitted(
    experiment: Experiment, train: Dataset, objectives: Objectives, previous: Run | None
) -> tuple[Encoder, dict[str, LabelStatistics]]:
    """The encoder and the statistics of the labels, from one pass over the training rows."""
    features, labels = feature_list(experiment), labels_of(experiment, objectives.specs)
    weight = experiment.data.sample_weight
    fit = LabelFit(labels, objectives, weight)
    read = list(dict.fromkeys([*feature_columns(features)[0], *label_columns(experiment)]))
    bad = bad_rows(experiment.data, train.num_rows)
    batches = train.with_dictionaries(id_columns(features)).batches(read, train.rows_at_once(FIT_ROWS))
    assert isinstance(experiment.model.embedding_dim, int)
    try:
        encoder = Encoder.fit(
            features,
            fit.watch(without_bad_rows(batches, labels, weight, features, bad)),
            schema=train.schema,
            embedding_dim=experiment.model.embedding_dim,
            previous=previous.encoder if previous else None,
        )
    except BadRowsError as error:
        raise ValueError(row_not_fitted(experiment, train, features, labels) or str(error)) from error
    if bad is not None:
        bad.check(bad.skipped, bad.skipped.total() + bad.kept, "They are rows of `data.train`.")
    return encoder, fit.statistics()


def row_not_fitted(
    experiment: Experiment, data: Dataset, features: Sequence[Feature], labels: Mapping[str, Label]
) -> str | None:
    """The place of the first row that cannot be fitted, looked for only once one was met."""
    looks = label_looks(labels, experiment.data.sample_weight).values()
    needed = [*feature_columns(features)[0], *label_columns(experiment)]
    columns = [column for column in dict.fromkeys(needed) if column in data.schema.names]
    dim = experiment.model.embedding_dim
    assert isinstance(dim, int)

    def look(batch: pa.RecordBatch) -> None:
        for each in looks:
            each(batch)
        Encoder.fit(features, [batch], schema=data.schema, embedding_dim=dim)

    return bad_row(data, columns, look)


def module_folders(experiment: Experiment) -> list[str]:
    """The folders of the user's own modules that kinds name by import path; installed ones need none."""
    found = set()
    for name in own_modules(experiment.model_dump(mode="json")):
        spec = importlib.util.find_spec(name)
        places = [] if spec is None else [*(spec.submodule_search_locations or []), *([spec.origin] if spec.origin else [])]
        if places and "site-packages" not in places[0]:
            found.add(str(Path(places[0]).parent))
    return sorted(found)


def slow_precision(experiment: Experiment, device: str) -> str | None:
    """A line for the user where fp32 would be faster than the precision asked for; else None."""
    if experiment.training.precision == "bf16" and device == "cpu" and emulates_bf16():
        return "`training.precision: bf16`: this machine's CPU has no instructions for bf16; fp32 is faster on it"
    return None


def check_device(experiment: Experiment, device: str) -> None:
    """What the device lacks: some dimensions of tables, and on the CPU sharding by rows and fused Adam.

    Raises ValueError naming the path, also where features do not agree on their tables.
    """
    dim = experiment.model.embedding_dim
    plan_tables(feature_list(experiment), SMALL_DIM if dim == "auto" else dim)
    for name, kind in experiment.features.items():
        sharding = kind.options.get("sharding")
        if sharding == "row_wise" and device == "cpu":
            raise ValueError(
                f"`features.{name}.sharding` should be table_wise, column_wise or data_parallel on the CPU: gloo cannot exchange "
                "rows of row-wise tables. Found row_wise."
            )
    if experiment.optimizer.tables.kind == "adam" and device == "cpu":
        raise ValueError(
            "`optimizer.tables.kind` should be rowwise_adagrad, adagrad or sgd on the CPU: "
            "fbgemm has no fused Adam there. Found adam."
        )


def check_footers(data: Dataset, specs: Mapping[str, TaskSpec], experiment: Experiment) -> None:
    """Labels outside their range, found from the minimum and maximum in the files' footers where there are any."""
    for name, spec in specs.items():
        column = experiment.label_column(name)
        low, high, integer = spec.task.label_range
        found = data.minmax(column)
        if found is None:
            continue
        least, most = (float(end) * spec.task.label_scale for end in found)
        if (low is not None and least < low) or (high is not None and most > high):
            wish = (
                "0 or 1" if (low, high, integer) == (0, 1, True) else f"at least {low}" if high is None else f"in [{low}, {high}]"
            )
            bad = least if low is not None and least < low else most
            raise ValueError(
                f"`tasks.{name}.label`: column '{column}' should be {wish}. Found {bad:g} in the footers of the "
                f"files of `{data.place}`. Null means unobserved."
            )
