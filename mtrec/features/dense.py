"""Numbers, scaled into columns of `dense_BF`.

Shapes: B rows, F columns of all dense features, W columns of this one.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pyarrow import types

from mtrec.features.arrays import Mask, Vectors, floats, is_list, is_number, vectors
from mtrec.features.counting import Moments, Sample
from mtrec.features.profile import FeatureProfile
from mtrec.features.tables import Family
from mtrec.kinds import PositiveFloat, PositiveInt

_RANKS = np.linspace(0.0, 1.0, 257)  # of the points between which `scale: quantile` interpolates
_SAMPLE = 1 << 16
_BLOCK = 1 << 14  # numbers of vectors
Float64s = npt.NDArray[np.float64]
UNBOUNDED = (-np.inf, np.inf)
_FLOAT32_MAX = float(np.finfo(np.float32).max)
_SMALLEST = 1e-300  # of a spread by which can be divided


class Dense:
    """A number a row, or a vector (fixed-size list, such as a pretrained item vector), scaled for the network.

    A value goes through: sentinels are missing -> `clip` -> `transform` -> `scale` -> `clip_sd`. Null, NaN, infinities
    and `missing_values` are missing: replaced by the scaled mean of the training data (0 with `standardize`; 0.5, the
    median's rank, with `quantile`), which the indicator column tells from a true mean.

    Args:
        name: the feature's name.
        column: input column (default: the name); integers, floats, decimals, bools.
        transform: `log1p` is sign(x) log(1 + |x|), so that a negative value is no error.
        scale: `standardize` to mean 0 and standard deviation 1; `minmax` to [0, 1]; `quantile` to the rank in the
            training data, in [0, 1] (linear between 257 points); `none`.
        clip: least and largest value, in the column's own unit.
        clip_sd: with `standardize`, values beyond so many standard deviations are set to them; null: off.
        missing_indicator: a further column with 1 where the value is missing; `auto`: if the training data have such
            rows.
        missing_values: numbers that stand for a missing value as null, NaN and infinities do, such as -1.
        width: numbers a row of a list column whose type does not say it.
        optional: the column may be missing from a file; all of its values are missing then.

    >>> Dense("price", transform="log1p", missing_values=(-1,)).columns
    ('price',)
    """

    family: ClassVar[Family] = "dense"
    fitted_by: ClassVar[tuple[str, ...]] = (
        "transform",
        "scale",
        "clip",
        "clip_sd",
        "missing_indicator",
        "missing_values",
        "width",
    )

    def __init__(
        self,
        name: str,
        *,
        column: str | None = None,
        transform: Literal["none", "log1p"] = "none",
        scale: Literal["none", "standardize", "minmax", "quantile"] = "standardize",
        clip: tuple[float, float] | None = None,
        clip_sd: PositiveFloat | None = 5.0,
        missing_indicator: bool | Literal["auto"] = "auto",
        missing_values: tuple[float, ...] = (),
        width: PositiveInt | None = None,
        optional: bool = False,
    ) -> None:
        if clip is not None and not clip[0] < clip[1]:
            raise ValueError(f"`features.{name}.clip` should be [least, largest]. Found {list(clip)}.")
        self.name = name
        self.column = column or name
        self.transform = transform
        self.scale = scale
        self.clip = clip
        self.clip_sd = clip_sd
        self.missing_indicator = missing_indicator
        self.missing_values = tuple(missing_values)
        self.width = width
        self.optional = optional

    @property
    def columns(self) -> tuple[str, ...]:
        """Input columns."""
        return (self.column,)

    def check_type(self, type_: pa.DataType) -> None:
        """Raises ValueError naming `features.NAME.column` where a column of this type holds no numbers.

        >>> Dense("age").check_type(pa.string())
        Traceback (most recent call last):
            ...
        ValueError: `features.age.column` should hold numbers. Found column 'age' of type string.
        """
        if types.is_null(type_):
            return
        found = f"Found column '{self.column}' of type {type_}."
        if is_list(type_):
            size = type_.list_size if types.is_fixed_size_list(type_) else None
            if size is None and self.width is None:
                raise ValueError(
                    f"`features.{self.name}.column` should hold one number a row, or fixed-size lists (for other lists "
                    f"of one length say it in `features.{self.name}.width`). {found}"
                )
            if size is not None and self.width not in (None, size):
                raise ValueError(
                    f"`features.{self.name}.width` should be the size {size} of the column's lists. Found {self.width}."
                )
        elif self.width is not None:
            raise ValueError(f"`features.{self.name}.width` should stand on a list column. {found}")
        if not is_number(type_.value_type if is_list(type_) else type_):
            raise ValueError(f"`features.{self.name}.column` should hold numbers. {found}")

    def start(self, type_: pa.DataType) -> "DenseFit":
        """A fit for a column of this type (of the training data)."""
        return DenseFit(self, type_.list_size if types.is_fixed_size_list(type_) else self.width)

    def restore(self, state: dict[str, Any]) -> "DenseEncoding":
        """The fitted feature that a fit's `state` describes."""
        return DenseEncoding(self, state)


class DenseFit:
    """Moments and quantiles of a dense feature in the training data; W columns for a vector."""

    def __init__(self, feature: Dense, width: int | None) -> None:
        self._feature, self._width = feature, width
        self._columns = columns = width or 1
        self._moments = Moments(columns)
        self._raw = Sample(_SAMPLE)
        self._scaled = Sample(max(_SAMPLE // columns, 4096), columns) if feature.scale == "quantile" else None
        self._rows = self._missing_rows = 0

    def update(self, array: Any) -> None:
        """Adds a column of a batch."""
        for raw_bW, missing_bW in _blocks(array, self._feature, self._width):
            scaled_bW = _transformed(raw_bW, self._feature)
            self._moments.update(scaled_bW, None if missing_bW is None else ~missing_bW)
            if missing_bW is not None:
                raw_bW, scaled_bW = (np.where(missing_bW, np.nan, values_bW) for values_bW in (raw_bW, scaled_bW))
                self._missing_rows += int(missing_bW.any(axis=1).sum())
            if self._scaled is not None:
                self._scaled.update(scaled_bW, self._rows)
            self._raw.update(raw_bW.ravel(), self._rows * self._columns)
            self._rows += len(raw_bW)

    def finish(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """(state to encode with, statistics of the values after clip and transform).

        ValueError where the values are so large that they, or their spread, are no numbers as the model takes them.
        """
        feature, moments = self._feature, self._moments
        self._check_size()
        raw = _known(self._raw)
        mean_W, sd_W = moments.mean_W, moments.sd_W
        low_W, high_W = (np.where(moments.count_W > 0, each, 0.0) for each in (moments.low_W, moments.high_W))
        state: dict[str, Any] = {
            "width": self._width,
            "indicator": self._missing_rows > 0 if feature.missing_indicator == "auto" else feature.missing_indicator,
            "fill": np.zeros(self._columns).tolist(),
            # halved: between the largest doubles there are more than a double holds
            "deciles": np.unique(2 * np.quantile(raw / 2, np.arange(1, 10) / 10)).tolist() if len(raw) else [],
        }
        if feature.scale == "standardize":
            # a constant column must not blow up the rounding of its mean
            constant = sd_W <= np.maximum(1e-12 * np.abs(mean_W), _SMALLEST)
            state |= {
                "shift": mean_W.tolist(),
                "factor": np.where(constant, 1.0, 1.0 / np.where(constant, 1.0, sd_W)).tolist(),
            }
        elif feature.scale == "minmax":
            span_W = high_W - low_W
            state |= {
                "shift": low_W.tolist(),
                "factor": np.divide(1.0, span_W, out=np.zeros_like(span_W), where=span_W > _SMALLEST).tolist(),
            }
            state["fill"] = ((mean_W - low_W) * np.array(state["factor"])).tolist()
        elif self._scaled is not None:
            state["points"] = [_rank_points(sample[~np.isnan(sample)]) for sample in self._scaled.values().T]
            state["fill"] = [0.5] * self._columns
        else:
            state["fill"] = mean_W.tolist()
        statistics = {
            "rows": self._rows,
            "null_share": self._missing_rows / max(1, self._rows),
            "mean": float(mean_W.mean()),
            "sd": float(sd_W.mean()),
            "min": float(low_W.min()),
            "max": float(high_W.max()),
        }
        return state, statistics

    def _check_size(self) -> None:
        place, column = f"features.{self._feature.name}", self._feature.column
        moments = self._moments
        for index in np.flatnonzero(moments.count_W):
            low, high = moments.low_W.item(index), moments.high_W.item(index)
            if self._feature.scale == "none" and max(-low, high) > _FLOAT32_MAX:
                wish = f"numbers that a float32 holds (up to {_FLOAT32_MAX:.2g}) with `scale: none`"
            elif not np.isfinite([moments.mean_W[index], moments.sd_W[index], high - low]).all():
                wish = "numbers whose squares a double holds (up to some 1e150)"
            else:
                continue
            raise ValueError(
                f"`{place}.column` should hold {wish}. Found {low!r} to {high!r} in column '{column}': name what "
                f"stands for a missing value in `{place}.missing_values`, or give `{place}.clip`."
            )

    def profile(self, encoding: "DenseEncoding") -> FeatureProfile:
        """The training data's profile in the bins of `encoding`, from the sample."""
        known = int(self._moments.count_W.sum())
        return encoding.profile(_known(self._raw), known, self._rows * self._columns - known)


class DenseEncoding:
    """A fitted dense feature. `names` are its columns of `dense_BF`."""

    def __init__(self, feature: Dense, state: dict[str, Any]) -> None:
        self.feature = feature
        self.state = state
        self._width: int | None = state["width"]
        self._fill_W = np.array(state["fill"])
        self._shift_W, self._factor_W = np.array(state.get("shift", 0.0)), np.array(state.get("factor", 1.0))
        self._bounds = UNBOUNDED
        if feature.scale == "minmax":
            self._bounds = (0.0, 1.0)
        elif feature.scale == "standardize" and feature.clip_sd is not None:
            self._bounds = (-feature.clip_sd, feature.clip_sd)
        plain = feature.transform == "none" and feature.clip is None and not feature.missing_values
        self._plain = plain and feature.scale != "quantile"
        self._points = [np.array(points) for points in state.get("points", [])]
        self._deciles = np.array(state["deciles"])
        base = [feature.name] if self._width is None else [f"{feature.name}_{index}" for index in range(self._width)]
        self.names: tuple[str, ...] = (*base, f"{feature.name}_missing") if state["indicator"] else tuple(base)

    @property
    def bins(self) -> tuple[str, ...]:
        """Labels of the profile's bins."""
        edges = self._deciles.tolist()
        return ("null", *(f"<{edge!r}" for edge in edges), f">={edges[-1]!r}" if edges else "any")

    def encode(self, array: Any, out_BW: npt.NDArray[np.float32]) -> int:
        """Writes the columns into `out_BW` (W = len(names)); returns the number of rows with a missing value.

        ValueError where the type of the column cannot be the fitted one's, BadRowsError for a vector of another width.
        """
        if not types.is_null(array.type) and is_list(array.type) != (self._width is not None):
            self.feature.check_type(array.type)
            wish = f"lists of {self._width} numbers" if self._width is not None else "one number a row"
            raise ValueError(
                f"`features.{self.feature.name}.column` should hold {wish}, as in the training data. "
                f"Found column '{self.feature.column}' of type {array.type}."
            )
        sentinels = _as_stored(self.feature.missing_values, array.type)
        if self._width is None:
            stored_B = array.to_numpy() if types.is_floating(array.type) and not array.null_count else None
            return self._encode_rows(stored_B, lambda: floats(array)[:, None], sentinels, out_BW)
        parts, step = _taken_apart(array, self.feature, self._width), _block_rows(self._width)
        stored_BW, missing_rows = parts.as_stored() if self._plain else None, 0
        for start in range(0, len(array), step):
            stored_bW = None if stored_BW is None else stored_BW[start : start + step]
            values = functools.partial(parts.rows, start, start + step)
            missing_rows += self._encode_rows(stored_bW, values, sentinels, out_BW[start : start + step])
        return missing_rows

    def _encode_rows(
        self,
        stored: npt.NDArray[Any] | None,
        values: Callable[[], npt.NDArray[np.float64]],
        sentinels: Sequence[float],
        out_BW: npt.NDArray[np.float32],
    ) -> int:
        """`encode` of some rows: as they lie in the column, (B,) or (B, W) floats, where none is null; else of `values()`."""
        columns, missing_BW = self._width or 1, None
        if stored is None or not self._encode_plain(stored, out_BW[:, 0] if stored.ndim == 1 else out_BW[:, :columns]):
            raw_BW, missing_BW = _missing(values(), sentinels)
            scaled_BW = self._scaled(_transformed(raw_BW, self.feature))
            out_BW[:, :columns] = scaled_BW if missing_BW is None else np.where(missing_BW, self._fill_W, scaled_BW)
        missing_B = None if missing_BW is None else missing_BW.any(axis=1)
        if self.state["indicator"]:
            out_BW[:, -1] = 0.0 if missing_B is None else missing_B
        return 0 if missing_B is None else int(np.count_nonzero(missing_B))

    def count(self, array: Any) -> FeatureProfile:
        """The profile of one column of a batch."""
        blocks = list(_blocks(array, self.feature, self._width))
        parts = [raw_bW.ravel() if missing_bW is None else raw_bW[~missing_bW] for raw_bW, missing_bW in blocks]
        known = np.concatenate([np.zeros(0), *parts])
        return self.profile(known, len(known), sum(raw_bW.size for raw_bW, _ in blocks) - len(known))

    def profile(self, sample: npt.NDArray[np.float64], values: int, missing: int) -> FeatureProfile:
        """A profile of `values` known values, spread as `sample` is, and `missing` ones."""
        counts = np.bincount(np.searchsorted(self._deciles, sample, side="right"), minlength=len(self._deciles) + 1)
        if len(sample) not in (0, values):
            counts = np.rint(counts * (values / len(sample))).astype(np.int64)
        return FeatureProfile(self.feature.name, self.bins, np.concatenate([[missing], counts]).astype(np.int64))

    def _encode_plain(self, values: npt.NDArray[Any], out: npt.NDArray[np.float32]) -> bool:
        """Writes what `_scaled` would give of (B,) or (B, W) floats, in a third of the time, where all are finite; else False.

        Scaling keeps the order, so that the least and the largest value say whether any is to be clipped.
        """
        if not self._plain or not len(values):
            return False
        shift: Any
        factor: Any
        if values.ndim == 1:
            shift, factor = self._shift_W.item(0), self._factor_W.item(0)
            low, high = ((float(edge.reduce(values)) - shift) * factor for edge in (np.minimum, np.maximum))
        else:
            shift, factor = self._shift_W, self._factor_W
            with np.errstate(over="ignore", invalid="ignore"):
                low = ((np.minimum.reduce(values).astype(np.float64) - shift) * factor).min().item()
                high = ((np.maximum.reduce(values).astype(np.float64) - shift) * factor).max().item()
        if not (low >= -_FLOAT32_MAX and high <= _FLOAT32_MAX):  # nor where there is a NaN, which both hand on
            return False
        scaled = values.astype(np.float64)  # first, and narrowed last: operators that convert do so block by block
        scaled -= shift
        scaled *= factor
        out[...] = scaled
        if low < self._bounds[0] or high > self._bounds[1]:
            np.clip(out, *self._bounds, out=out)  # np.minimum with a number takes more than twice as long
        return True

    def _scaled(self, values_BW: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        feature = self.feature
        if feature.scale == "quantile":
            columns = [np.interp(values_BW[:, i], points[0], points[1]) for i, points in enumerate(self._points)]
            return np.stack(columns, axis=1)
        if feature.scale == "none":
            return values_BW
        scaled_BW: npt.NDArray[np.float64] = values_BW - self._shift_W
        scaled_BW *= self._factor_W
        if self._bounds != UNBOUNDED:
            np.clip(scaled_BW, *self._bounds, out=scaled_BW)
        return scaled_BW


def _block_rows(width: int) -> int:
    """How many vectors are worked on at once: so many that their doubles stay in the cache."""
    return max(1, _BLOCK // width)


def _taken_apart(array: Any, feature: Dense, width: int) -> Vectors:
    return vectors(array, width, f"`features.{feature.name}.column`", feature.column)


def _blocks(array: Any, feature: Dense, width: int | None) -> Iterator[tuple[Float64s, Mask | None]]:
    """((b, W) numbers with 0 for what is missing, mask of the missing or None where nothing is); vectors in blocks of rows."""
    sentinels = _as_stored(feature.missing_values, array.type)
    if width is None:
        yield _missing(floats(array)[:, None], sentinels)
        return
    parts, step = _taken_apart(array, feature, width), _block_rows(width)
    for start in range(0, len(array), step):
        yield _missing(parts.rows(start, start + step), sentinels)


def _missing(raw_BW: Float64s, sentinels: Sequence[float]) -> tuple[Float64s, Mask | None]:
    known_BW = np.isfinite(raw_BW)
    for sentinel in sentinels:
        known_BW &= raw_BW != sentinel
    return (raw_BW, None) if known_BW.all() else (np.where(known_BW, raw_BW, 0.0), ~known_BW)


def _as_stored(sentinels: Sequence[float], type_: pa.DataType) -> list[float]:
    """The numbers as they are given, and as a column of such floats holds them: a float32 has no -0.1."""
    if not sentinels:
        return []
    value = type_.value_type if is_list(type_) else type_
    narrow = {pa.float16(): "f2", pa.float32(): "f4"}.get(value)
    with np.errstate(over="ignore"):
        return [*sentinels, *(np.array(sentinels).astype(narrow).tolist() if narrow else ())]


def _transformed(raw_BW: npt.NDArray[np.float64], feature: Dense) -> npt.NDArray[np.float64]:
    if feature.clip is not None:
        raw_BW = np.clip(raw_BW, *feature.clip)
    if feature.transform == "log1p":
        raw_BW = np.copysign(np.log1p(np.abs(raw_BW)), raw_BW)
    return raw_BW


def _known(sample: Sample) -> npt.NDArray[np.float64]:
    values: npt.NDArray[np.float64] = sample.values()
    return values[~np.isnan(values)]


def _rank_points(sample: npt.NDArray[np.float64]) -> list[list[float]]:
    """[values, mean ranks] to interpolate between; ascending, each value once."""
    if not len(sample):
        return [[0.0], [0.5]]
    values, first, counts = np.unique(np.quantile(sample, _RANKS), return_index=True, return_counts=True)
    return [values.tolist(), ((first + (counts - 1) / 2) / (len(_RANKS) - 1)).tolist()]
