"""The ranking formula against Python's own arithmetic, and everything that must not get in."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from logs import experiment_tree

from mtrec.config import parse_experiment
from mtrec.formula import MAX_LENGTH, parse_formula, ranking_formula

NAMES = ["p_click", "p_conversion", "dwell_seconds"]
SAFE = {"log1p": math.log1p, "exp": math.exp, "sqrt": math.sqrt, "abs": abs, "min": min, "max": max}


def value(text: str, *numbers: float) -> float:
    formula = parse_formula(text, NAMES, "--formula")
    return float(formula(dict(zip(NAMES, [np.array([n]) for n in numbers], strict=True)))[0])


@pytest.mark.parametrize(
    "text",
    [
        "p_click * p_conversion**0.5 * log1p(dwell_seconds)",
        "-p_click - -2 * (p_conversion / 3 + 1e-3) ** 2 ** 0.5",
        "max(p_click, p_conversion, 0.3) + min(p_click, 0.1) - abs(-dwell_seconds) + sqrt(exp(p_click))",
    ],
)
def test_as_python_computes_it(text: str) -> None:
    for numbers in [(0.2, 0.03, 17.0), (0.9, 0.5, 0.0)]:
        assert value(text, *numbers) == pytest.approx(eval(text, dict(SAFE), dict(zip(NAMES, numbers, strict=True))), rel=1e-14)


def _expressions() -> st.SearchStrategy[str]:
    leaves = st.one_of(st.sampled_from(NAMES), st.floats(0.1, 9).map(repr), st.integers(1, 9).map(str))
    return st.recursive(
        leaves,
        lambda below: st.one_of(
            st.tuples(below, st.sampled_from("+-*"), below).map(lambda t: f"({t[0]} {t[1]} {t[2]})"),
            below.map(lambda inner: f"abs(-{inner})"),
            st.tuples(below, below).map(lambda t: f"max({t[0]}, {t[1]})"),
        ),
        max_leaves=8,
    )


@settings(max_examples=100, deadline=None)
@given(text=_expressions(), numbers=st.tuples(*[st.floats(0, 10)] * 3))
def test_random_expressions_as_python_computes_them(text: str, numbers: tuple[float, float, float]) -> None:
    text = f"p_click + {text}"
    expected = eval(text, dict(SAFE), dict(zip(NAMES, numbers, strict=True)))
    assert value(text, *numbers) == pytest.approx(expected, rel=1e-12, abs=1e-12)


def test_clip_and_what_is_undefined() -> None:
    assert [value("clip(dwell_seconds, 1, p_click * 10)", 0.5, 0, x) for x in (0.0, 3.0, 9.0)] == [1.0, 3.0, 5.0]
    assert value("log(p_click)", 0.0, 0, 0) == -math.inf
    assert math.isnan(value("(p_click - 1) ** 0.5", 0.5, 0, 0))
    assert value("p_click / p_conversion", 1.0, 0.0, 0) == math.inf


def test_the_names_that_it_reads() -> None:
    assert parse_formula(" dwell_seconds*p_click + p_click ", NAMES, "x").names == ("dwell_seconds", "p_click")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("p_clck * 2", r"`--formula` should use the predictions p_click, .* Found 'p_clck'. Did you mean 'p_click'\?"),
        ("lg(p_click)", r"should use the functions log, .* Found 'lg'. Did you mean 'log'\?"),
        ("log * p_click", "the name of a function without its brackets"),
        ("log(p_click, 2)", "log should have 1 value. Found 2"),
        ("max(p_click)", "max should have 2 or more values. Found 1"),
        ("clip(p_click, 1)", "clip should have 3 values"),
        ("1 + 2", "should use at least one of p_click"),
        ("p_click +", "should be an expression such as .* not readable"),
        ("", "should be an expression"),
        ("p_click * 1e999", "finite numbers"),
        ("p_click * 9" + "9" * 400, "finite numbers"),
        ("p_click" + " + 1" * MAX_LENGTH, "at most 1,000 characters"),
        ("-" * 400 + "p_click", "nest at most 50 deep"),
        ("(" * 300 + "p_click" + ")" * 300, "not readable"),
        *[
            (text, "should hold numbers, predictions")
            for text in (
                "__import__('os').system('true')",
                "p_click.__class__",
                "p_click[0]",
                "[x for x in p_click]",
                "lambda: p_click",
                "p_click if p_click else 0",
                "p_click > 0.5",
                "p_click and 1",
                "~p_click",
                "p_click // 2",
                "p_click % 2",
                "p_click @ p_click",
                "'a' * p_click",
                "True * p_click",
                "1j * p_click",
                "(p_click := 3)",
                "log(x=p_click)",
                "log(*p_click)",
                "f'{p_click}'",
                "p_click, 1",
                "log(log)(p_click)",
            )
        ],
    ],
)
def test_what_is_refused(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        parse_formula(text, NAMES, "--formula")


def test_a_prediction_of_any_name_can_be_scored_by() -> None:
    names = ["p_add-to-cart", "class", "p_a b"]
    for name in names:
        assert parse_formula(name, names, "--formula").names == (name,)
    formula = parse_formula("`p_add-to-cart` * `class` + 2 * `class`", names, "--formula")
    assert formula.names == ("p_add-to-cart", "class")
    assert formula({"p_add-to-cart": [0.5, 1.0], "class": [4.0, 2.0]}).tolist() == [10.0, 6.0]
    with pytest.raises(ValueError, match=r"`--formula` should use the predictions .* Found 'p_add-to-car'\. Did you mean"):
        parse_formula("2 * `p_add-to-car`", names, "--formula")


def test_the_first_task_may_have_any_name_but_that_of_the_formula(tmp_path: Path) -> None:
    tree: dict[str, Any] = experiment_tree(tmp_path)
    tree["tasks"] = {"add-to-cart": {"kind": "binary", "label": "click"}}
    assert ranking_formula(parse_experiment(tree)).names == ("p_add-to-cart",)
    tree["tasks"] = {"score": {"kind": "regression", "label": "price"}}
    with pytest.raises(ValueError, match=r"`tasks\.score` should have another name: 'score' is the column of the"):
        ranking_formula(parse_experiment(tree))
