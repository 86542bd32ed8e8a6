"""The experiment as a typed tree: its sections, what each key may hold, its default and what `mtrec schema` says of it.

Read it from the bottom: an `Experiment` is made of the sections above it. What a `kind:` accepts stands in the signature of its
class (see kinds.py), not here. config.py reads such a tree from a file.
"""

from typing import Annotated, Any, Literal

import pydantic
from annotated_types import Gt, Le, MinLen
from pydantic import AfterValidator, BeforeValidator, Field

from mtrec.files import check_not_empty
from mtrec.kinds import Fraction, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Probability, TwoOrMore, Widths


class Section(pydantic.BaseModel):
    """A part of the tree in which only declared keys are allowed."""

    model_config = pydantic.ConfigDict(extra="forbid", protected_namespaces=(), frozen=True)


class Kind(pydantic.BaseModel):
    """`{kind: mmoe, num_experts: 4}`: the kind of a thing and its options."""

    model_config = pydantic.ConfigDict(extra="allow", protected_namespaces=(), frozen=True)
    kind: str

    @property
    def options(self) -> dict[str, Any]:
        """What stands beside `kind`."""
        return dict(self.model_extra or {})


def _from_word(key: str, default: str | None = None) -> Any:
    """Lets the section be written as its one main value: `architecture: mmoe`, `train: data/train`; or without it."""

    def full(value: Any) -> Any:
        if isinstance(value, dict) and default is not None:
            return {key: default, **value}
        return {key: value} if isinstance(value, str | list) else value

    return full


class Source(Section):
    """Parquet files, and which of their rows."""

    path: str | list[str] = Field(description="file, folder, glob or a list of these; local or s3://, gs://, hdfs://")
    where: str | None = Field(
        None,
        description="condition on columns or Hive partitions, such as `dt <= 2026-01-14 and tab in [0, 1]`; rows that it drops "
        "leave their places in the batches empty",
    )
    window: tuple[str, str] | None = Field(None, description="first and last value of `window_column`, both included")
    window_column: str = Field("dt", description="as a rule the key of date partitions")

    @property
    def limits(self) -> tuple[object, ...]:
        """What leaves rows of the files out: `where`, `window` and, with it, `window_column`."""
        return self.where, self.window, None if self.window is None else self.window_column

    @pydantic.field_validator("path")
    @classmethod
    def _not_empty(cls, value: str | list[str]) -> str | list[str]:
        check_not_empty(value)  # or the current folder would be read
        return value

    @pydantic.field_validator("window", mode="before")
    @classmethod
    def _dates_as_text(cls, value: Any) -> Any:
        return [str(end) for end in value] if isinstance(value, list | tuple) else value


Share = Annotated[float, Gt(0.0), Le(1.0)]
AnySource = Annotated[Source, BeforeValidator(_from_word("path"), json_schema_input_type=str | list[str] | Source)]
AnyKind = Annotated[Kind, BeforeValidator(_from_word("kind"), json_schema_input_type=str | Kind)]
ArchitectureKind = Annotated[Kind, BeforeValidator(_from_word("kind", "mmoe"), json_schema_input_type=str | Kind)]
InteractionKind = Annotated[Kind, BeforeValidator(_from_word("kind", "dcn_v2"), json_schema_input_type=str | Kind)]


class Data(Section):
    """Where the rows come from and how they are cut into batches."""

    train: AnySource
    validation: AnySource | None = None
    test: AnySource | None = Field(None, description="read by `mtrec compare`, once, at the end; checked by `mtrec check`")
    batch_size: PositiveInt | Literal["auto"] = Field(
        "auto", description="rows of a global batch; auto: 512 below 1 M rows, else 4,096"
    )
    num_streams: PositiveInt = Field(8, description="logical streams; the largest number of workers")
    shuffle: bool = True
    shuffle_window: PositiveInt = Field(16_384, description="rows of a stream that are permuted together")
    prefetch: PositiveInt = Field(4, description="batches that the reading thread makes ahead, at least")
    sample_weight: str | None = Field(None, description="column with a non-negative weight a row; null counts as 1")
    on_bad_rows: Literal["error", "skip"] = Field(
        "error", description="labels out of range and the like: error names the row, skip leaves it out and counts it"
    )
    max_bad_fraction: Probability = Field(0.01, description="with skip: more bad rows than this share end the run")


class Task(Section):
    """One objective. Options of its kind stand beside these."""

    model_config = pydantic.ConfigDict(extra="allow", protected_namespaces=(), frozen=True)
    kind: str
    label: str | None = Field(None, description="column of the label (default: the task's name); null means unobserved")
    given: str | None = Field(None, description="the task without whose label 1 this one cannot happen")
    space: Literal["observed", "entire"] = Field(
        "observed", description="observed: rows where `given` is 1; entire: ESMM, all rows"
    )
    weight: PositiveFloat | Literal["auto"] = Field(
        "auto", description="auto: 1 / (2 x loss of predicting the base rate), in [0.2, 5]"
    )
    denominator: Literal["count", "expected"] = Field(
        "count", description="expected: the rate of the fit x rows, for rare tasks"
    )
    also_on: str | None = Field(None, description="give metrics also on the rows where this task's label is 1")
    auxiliary: bool = Field(False, description="left out of scoring, of the best metric and of early stopping")

    @property
    def options(self) -> dict[str, Any]:
        """What stands beside the keys of every task."""
        return dict(self.model_extra or {})


class Balancing(Kind):
    """How the tasks' losses are weighed against each other. Options of the kind, and those of every balancer, stand beside.

    A balancer sees losses that are multiplied with `tasks.*.weight` already, and what it returns is multiplied onto that: the
    weight (`auto`: every loss starts near 0.5) is the unit of a loss, the balancer what changes during training.
    """

    kind: str = "static"
    at: Literal["parameters", "batch_sum", "representation"] = Field(
        "parameters",
        description="where gradients are compared: shared dense parameters, x_BD summed over rows, x_BD row by row",
    )
    rows: Share = Field(1.0, description="share of each stream's rows that gradients are compared on, drawn anew each time")
    log_gradients: bool = Field(
        False, description="compare gradients every `every` steps for the log, also where the kind does not need it"
    )


class Model(Section):
    """From ids and numbers to the tasks' representations."""

    embedding_dim: PositiveInt | Literal["auto"] = Field(
        "auto", description="a multiple of 4; auto: 8 below 1 M training rows, else 16"
    )
    interaction: InteractionKind = Kind(kind="dcn_v2")
    architecture: ArchitectureKind = Kind(kind="mmoe")
    tower_layers: Widths = (32,)
    dropout: Fraction = Field(0.0, description="dropout on the shared representation, before the experts")


class TableOptimizer(Section):
    """The optimizer fused into the embedding tables."""

    kind: Literal["rowwise_adagrad", "adagrad", "sgd", "adam"] = Field("rowwise_adagrad", description="adam: on GPUs only")
    learning_rate: PositiveFloat = 0.1
    eps: PositiveFloat = 1e-8
    clip_value: PositiveFloat | None = Field(None, description="gradients of rows are clipped to +- this")
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: NonNegativeInt = 0


class DenseOptimizer(Section):
    """The optimizer of everything but the tables."""

    kind: Literal["adamw", "adam", "sgd"] = "adamw"
    learning_rate: PositiveFloat | Literal["auto"] = Field("auto", description="auto: 0.001 x sqrt(batch_size / 512)")
    weight_decay: NonNegativeFloat = 1e-2
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    eps: PositiveFloat = 1e-8
    clip_norm: PositiveFloat | None = Field(
        10.0, description="the global norm of the dense gradient is clipped to this"
    )
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    warmup_steps: NonNegativeInt | Literal["auto"] = Field(
        "auto", description="auto: a twentieth of the steps, at most 500"
    )


class Optimizer(Section):
    """How weights follow their gradients: embedding tables, and all else."""

    tables: TableOptimizer = TableOptimizer()
    dense: DenseOptimizer = DenseOptimizer()


class EarlyStopping(Section):
    """Stop when the best metric has not grown by `min_gain` in `patience` validations."""

    patience: PositiveInt = 3
    min_gain: NonNegativeFloat = 0.0


class Training(Section):
    """The training loop: length, precision, checkpoints, and what ends it."""

    epochs: PositiveInt = 1
    reset_tables: Literal["never", "every_epoch"] = Field(
        "never", description="every_epoch: tables start anew, the dense part stays"
    )
    precision: Literal["fp32", "bf16"] = Field("fp32", description="bf16: autocast of the dense part; tables stay fp32")
    validate_every: PositiveInt | None = Field(None, description="steps; default: at the end of each epoch")
    checkpoint_every: PositiveInt | None = Field(None, description="steps; default: with each validation")
    checkpoint_async: bool = True
    checkpoint_storage: str | None = Field(
        None, description="URI of the run's own, such as s3://bucket/runs/mine: checkpoints are copied there, --resume finds them"
    )
    keep_last: PositiveInt = 2
    keep_best: NonNegativeInt = 1
    best_metric: str | dict[str, float] | None = Field(
        None,
        description="`click/auc`, or {`click/auc`: 1, `dwell/xauc`: 0.5}; default: mean of AUC or XAUC over tasks",
    )
    early_stopping: EarlyStopping | None = None
    log_every: PositiveInt = 50
    max_steps: PositiveInt | None = Field(None, description="stop after so many steps (debugging, benchmarks)")
    deterministic: bool = Field(True, description="the same bits at every run, on the CPU; on a GPU last bits may differ")
    threads_per_worker: PositiveInt = Field(1, description="CPU threads a worker; one a worker is fastest")
    reading_threads: PositiveInt | Literal["auto"] = Field(
        "auto", description="threads beside these that read and encode; auto: 1, with a GPU up to 4 of its cores"
    )
    max_failures: NonNegativeInt = Field(3, description="how often Ray restarts workers that died")
    collective_timeout_seconds: PositiveInt = 600
    exchange: Literal["auto", "gloo"] = Field(
        "auto", description="auto: workers of one host exchange tensors on the CPU through shared memory; gloo: through TCP"
    )
    max_nonfinite_steps: PositiveInt = Field(
        20, description="so many steps without a finite gradient in a row end the run"
    )


class Evaluation(Section):
    """How metrics are computed."""

    group_by: str | None = Field(None, description="column of GAUC's groups, usually the user's id")
    batch_size: PositiveInt = 8_192
    memory_limit_mb: PositiveInt = Field(1_024, description="metrics spill sorted runs to disk beyond this")
    bins: TwoOrMore | None = Field(None, description="binned metrics in so many bins instead of exact ones")


class Scoring(Section):
    """What `mtrec score` writes beside the predictions."""

    formula: str | None = Field(
        None,
        description="column `score`, such as `p_click * log1p(dwell_seconds)`; default: the first task's prediction",
    )


AnyBalancing = Annotated[Balancing, BeforeValidator(_from_word("kind"), json_schema_input_type=str | Balancing)]


def _usable_as_folder(value: str) -> str:
    if "/" in value or "\0" in value:
        raise ValueError(f"should be usable as the name of a folder, without '/'. Found '{value}'.")
    return value


FolderName = Annotated[str, MinLen(1), AfterValidator(_usable_as_folder)]


class Experiment(Section):
    """Everything that a run depends on but the data itself and the number of workers."""

    name: FolderName = Field("experiment", description="of its runs' folders: no '/' in it")
    seed: NonNegativeInt = 0
    data: Data
    features: dict[str, AnyKind] = Field(min_length=1)
    tasks: dict[str, Task] = Field(min_length=1)
    model: Model = Model()
    balancing: AnyBalancing = Balancing()
    optimizer: Optimizer = Optimizer()
    training: Training = Training()
    evaluation: Evaluation = Evaluation()
    scoring: Scoring = Scoring()
    output: str | None = Field(None, description="folder of the run; default: runs/<name>-<date>-<time>")

    def label_column(self, task: str) -> str:
        """The column with the task's label."""
        return self.tasks[task].label or task
