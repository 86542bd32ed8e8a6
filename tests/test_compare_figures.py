"""The plots of a comparison: variants can be told apart, long names and single points be seen."""

from collections.abc import Sequence
from typing import Any

from mtrec.compare import figures


def _drawn(names: Sequence[str], segments: Sequence[str] = ()) -> dict[str, Any]:
    """What the figures of a comparison of these variants are drawn from; the first is the baseline, the last the A/A row."""
    row = {"task": "click", "metric": "auc", "value": 0.1, "low": -0.1, "high": 0.3}
    found = {"value": 0.7, "low": 0.6, "high": 0.8, "by_seed": {"0": 0.7}}
    curve = {"click": {"metric": "auc", "mean": [[1, 0.6, 0.1], [2, 0.7, 0.1]]}}
    return {
        "variants": {
            name: {"metrics": {"click": {"auc": found}}, "curves": {"validation": curve}, "again": name == names[-1]}
            for name in names
        },
        "baseline": names[0],
        "again": names[-1],
        "primary": {"click": "auc"},
        "differences": [{**row, "variant": name} for name in names[1:]],
        "segments": [{**row, "variant": name, "segment": each, "rows": 1_000} for name in names[1:-1] for each in segments],
    }


def test_no_two_of_many_variants_look_alike_and_none_like_the_baseline() -> None:
    results = _drawn(["base", *(f"variant-{index}" for index in range(20)), "base again"])
    looks = list(figures.styles(results).values())
    assert len(set(looks)) == 22
    assert [look.colour == looks[0].colour for look in looks] == [True] + [False] * 21
    labels = figures.legend(results)
    assert (labels["variant-0"], labels["variant-8 (square)"]) == (looks[1].colour, looks[1].colour)
    lines = [each for each in figures.learning_curves(results, "click")["data"] if each["mode"] == "lines+markers"]
    assert len({(each["line"]["color"], each["line"]["dash"], each["marker"]["symbol"]) for each in lines}) == 21


def test_long_names_are_all_on_their_axis_in_short() -> None:
    names = ["base", *(f"a-variant-whose-name-has-some-forty-letters-{index}" for index in range(12)), "base again"]
    segments = ["a<b", *(f"a segment with a very long name, number {index}" for index in range(5))]
    results = _drawn(names, segments)
    across, heat = figures.metric_intervals(results, "click", "auc"), figures.segments(results, "click")
    for axis, count in (
        (across["layout"]["yaxis"], 14),
        (figures.differences(results, "click", "auc")["layout"]["yaxis"], 13),
        (heat["layout"]["xaxis"], 12),
        (heat["layout"]["yaxis"], 6),
    ):
        assert len(set(axis["tickvals"])) == len(set(axis["ticktext"])) == count
        assert max(len(text.removesuffix(" (1,000)")) for text in axis["ticktext"]) <= 24
    assert across["data"][2]["y"] == [names[1]]  # hovering tells the whole name
    assert heat["layout"]["yaxis"]["ticktext"][0] == "a&lt;b (1,000)"
    few = figures.segments(_drawn(["base", "other", "again"], segments), "click")
    assert heat["layout"]["height"] > few["layout"]["height"] + 24 * 7
    assert (heat["layout"]["xaxis"]["tickangle"], few["layout"]["xaxis"]["tickangle"]) == (90, 0)


def test_experts_at_a_single_logged_step_can_be_seen() -> None:
    seeds = {"0": {"steps": [24], "shares": [[0.25, 0.75]]}}
    assert {each["mode"] for each in figures.expert_use({"click": seeds}, "mmoe")["data"]} == {"lines+markers"}
    many = {"0": {"steps": list(range(50)), "shares": [[0.25, 0.75]] * 50}}
    assert {each["mode"] for each in figures.expert_use({"click": many}, "mmoe")["data"]} == {"lines"}
    experts = figures.gate_heat({"click": {"0": {"steps": [24], "shares": [[0.1] * 10]}}}, "mmoe")["layout"]["xaxis"]
    assert experts["dtick"] == 1
    assert "nticks" not in experts
