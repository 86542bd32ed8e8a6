"""Kinds of features: their options, from YAML too, and a kind from outside of the package."""

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from encoders import fitted

from mtrec.features import FEATURES, Bucketized, Categorical, Dense
from mtrec.kinds import check_options


def test_construction_errors_name_the_place() -> None:
    with pytest.raises(ValueError, match=r"`features.x.clip` should be \[least, largest\]"):
        Dense("x", clip=(2.0, 1.0))
    with pytest.raises(ValueError, match=r"`features.x.boundaries` should be finite"):
        Bucketized("x", boundaries=(1.0, 1.0))


def test_options_come_through_yaml_types() -> None:
    options = check_options(Dense, {"clip": [0, 5], "missing_values": [-1], "missing_indicator": "auto"}, "features.x")
    assert Dense("x", **options).clip == (0.0, 5.0)
    options = check_options(Categorical, {"num_embeddings": "auto", "sharding": "row_wise"}, "features.x")
    assert Categorical("x", **options).num_embeddings == "auto"
    with pytest.raises(ValueError, match=r"features.x.num_embeddings"):
        check_options(Categorical, {"num_embeddings": 0}, "features.x")
    assert set(FEATURES) == {"categorical", "dense", "bucketized"}


class Times:
    """What an encoding of a dense kind is asked for, and nothing more."""

    def __init__(self, plain: Any, times: int) -> None:
        self.names, self._plain, self._times = plain.names, plain, times

    def encode(self, array: pa.Array, out_BW: np.ndarray) -> int:
        missing = self._plain.encode(array, out_BW)
        out_BW *= self._times
        return missing

    def count(self, array: pa.Array) -> Any:
        return self._plain.count(array)


class Double:
    """A kind from outside: twice the number."""

    family = "dense"
    fitted_by = ("times",)

    def __init__(self, name: str, *, times: int = 2) -> None:
        self.name, self.times, self.optional = name, times, False

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.name,)

    def check_type(self, type_: pa.DataType) -> None:
        if not pa.types.is_floating(type_):
            raise ValueError(f"`features.{self.name}.column` should hold floats. Found {type_}.")

    def start(self, type_: pa.DataType) -> Any:
        fit = Dense(self.name, scale="none", missing_indicator=False).start(type_)
        plain = fit.profile
        fit.profile = lambda encoding: plain(encoding._plain)
        return fit

    def restore(self, state: dict[str, Any]) -> Any:
        return Times(Dense(self.name, scale="none").restore(state), self.times)


def test_a_kind_from_outside_the_package() -> None:
    encoder = fitted([Double("y", times=3), Dense("z", scale="none")], {"y": pa.array([1.0]), "z": pa.array([1])})
    assert encoder.encode(pa.record_batch({"y": pa.array([2.0]), "z": pa.array([2.0])})).dense_BF.tolist() == [
        [6.0, 2.0]
    ]
