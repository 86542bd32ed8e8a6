"""Time spent: heavy-tailed, with many zeros. B rows, C logits (the loss says how many), N labels of a sample."""

from typing import Annotated, Any, Literal

from torch import Tensor

from mtrec.kinds import KindOf, PositiveFloat, check_options, resolve
from mtrec.tasks.dwell_losses import DWELL_LOSSES, DwellLoss
from mtrec.tasks.task import Family, LabelRange

SECONDS_PER_UNIT = {"seconds": 1.0, "milliseconds": 0.001, "minutes": 60.0}


class Dwell:
    """Seconds spent, >= 0; predicts `<name>_seconds` whatever the unit of the column.

    Options:
        unit: of the column.
        loss: a name, or a mapping with `kind` and that loss's options, such as `{kind: tweedie, power: 1.4}`; see
            `mtrec.tasks.DWELL_LOSSES`, or give an import path.
        cap_seconds: longer labels count as this long in the loss, so the prediction is E[min(T, cap)]; the metrics keep
            the label as it is.

    Raises ValueError, naming `tasks.<name>.loss`, for an unknown loss or option.

    >>> import torch
    >>> task = Dwell("dwell", unit="milliseconds", loss={"kind": "tweedie", "power": 1.4})
    >>> task.label_scale, task.num_logits, task.prediction_names()
    (0.001, 1, ('dwell_seconds',))
    >>> task.predict(torch.tensor([[0.0]])).item()
    1.0
    >>> Dwell("dwell", loss="tweedy")
    Traceback (most recent call last):
    ValueError: `tasks.dwell.loss` should be one of huber, log_mse, logsun, poisson, tweedie, weighted_logistic, ziln, \
or an import path module:Class. Found 'tweedy'. Did you mean 'tweedie'?
    """

    family: Family = "dwell"
    label_range = LabelRange(0.0, None, False)

    def __init__(
        self,
        name: str,
        *,
        unit: Literal["seconds", "milliseconds", "minutes"] = "seconds",
        loss: Annotated[str | dict[str, Any], KindOf(DWELL_LOSSES)] = "logsun",
        cap_seconds: PositiveFloat | None = None,
    ) -> None:
        self.name = name
        self.label_scale = SECONDS_PER_UNIT[unit]
        self.cap_seconds = cap_seconds
        self.dwell_loss = build_loss(loss, f"tasks.{name}.loss")
        self.num_logits = self.dwell_loss.num_logits

    def loss(self, logits_BC: Tensor, labels_B: Tensor) -> Tensor:
        """(B,): the dwell loss; labels are in seconds, and those above `cap_seconds` count as `cap_seconds`."""
        seconds_B = labels_B.float()
        if self.cap_seconds is not None:
            seconds_B = seconds_B.clamp(max=self.cap_seconds)
        return self.dwell_loss.loss(logits_BC, seconds_B)

    def predict(self, logits_BC: Tensor) -> Tensor:
        """(B,): seconds, as the dwell loss reads them from its logits."""
        return self.dwell_loss.seconds(logits_BC)

    def log_prediction(self, logits_BC: Tensor) -> Tensor | None:
        """(B,): log1p seconds; None where the dwell loss has no log-scale output."""
        return self.dwell_loss.log1p_seconds(logits_BC)

    def initial_bias(self, mean: float, sample_N: Tensor) -> Tensor:
        """(C,) float32: the dwell loss's; `cap_seconds` caps the sample, and the mean at the capped sample's."""
        sample_N = sample_N.double()
        if self.cap_seconds is not None:
            mean = min(mean, float(sample_N.clamp(max=self.cap_seconds).mean()))
            sample_N = sample_N.clamp(max=self.cap_seconds)
        return self.dwell_loss.initial_bias(mean, sample_N).float()

    def prediction_names(self) -> tuple[str, ...]:
        """`<name>_seconds`."""
        return (f"{self.name}_seconds",)


def build_loss(loss: str | dict[str, Any], place: str) -> DwellLoss:
    """A dwell loss from its name, or from `{kind: name, option: value}`; `place` is its path in the experiment.

    Raises ValueError naming `place` for an unknown kind, an unknown or wrong option, or a mapping without `kind`.

    >>> build_loss("ziln", "tasks.dwell.loss").num_logits
    3
    """
    options = {"kind": loss} if isinstance(loss, str) else dict(loss)
    kind = options.pop("kind", None)
    if not isinstance(kind, str):
        raise ValueError(f"`{place}.kind` should be one of {', '.join(sorted(DWELL_LOSSES))}. Found {kind!r}.")
    cls = resolve(kind, DWELL_LOSSES, place if isinstance(loss, str) else f"{place}.kind")
    built = cls(**check_options(cls, options, place))
    if not isinstance(built, DwellLoss):
        raise ValueError(f"`{place}` should have the members of mtrec.tasks.DwellLoss. Found {cls.__name__}.")
    return built
