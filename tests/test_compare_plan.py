"""What a comparison is: its file, what is refused before anything runs, widths that are matched, draws of a search."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from small_comparisons import base_tree, comparison_file, write_logs
from typer.testing import CliRunner

from mtrec.cli import app
from mtrec.compare.plan import Search, dense_size, load_plan, matched, search_draws


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_logs(tmp_path_factory.mktemp("compare"))


def test_the_comparison_in_the_readme_makes_a_plan(log: Path, tmp_path: Path) -> None:
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    block = next(block for block in re.findall(r"```yaml\n(.*?)```", readme, re.DOTALL) if "variants:" in block)
    base = base_tree(log)
    del base["data"]["test"]
    (tmp_path / "experiment.yaml").write_text(yaml.safe_dump(base))
    path = tmp_path / "compare.yaml"
    path.write_text(block.replace("logs/test", str(log / "test")))
    plan = load_plan(path)
    assert list(plan.experiments) == ["mmoe", "ple", "narrow"]
    assert len(plan.seeds) * len(plan.experiments) + len(plan.again_seeds) == 20
    assert (plan.seeds[-1], plan.again_seeds[-1]) == (4, 1004)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"variants": {"ple": {"set": {"model.architecture.num_expert": 3}}}},
            r"`variants\.ple\.set`: `model\.architecture\.num_expert` is not a known key\. Did you mean 'num_experts'\?",
        ),
        (
            {"variants": {"ple": {"set": {"model.architecture.kind": "pel"}}}},
            r"`variants\.ple\.set`: `model\.architecture\.kind` should be one of .* Did you mean 'ple'\?",
        ),
        (
            {"variants": {"same": {"set": {"model.architecture.num_experts": 3}}}},
            r"`variants\.same\.set` should change something\. Found a variant equal to the base",
        ),
        ({"variants": {"same": {}}}, r"`variants\.same\.set` should change something"),
        (
            {"variants": {"a": {"set": {"model.tower_layers": [4]}}, "b": {"set": {"model.tower_layers": [4]}}}},
            r"`variants\.b\.set` .* equal to the variant 'a'",
        ),
        ({"variants": {"a": {"set": {"seed": 4}}}}, r"`variants\.a\.set` should leave `seed` as it is"),
        ({"variants": {"a": {"set": {"data": {"train": "x"}}}}}, r"`variants\.a\.set` should leave `data\.test` as it is"),
        ({"variants": {"a": {"set": {"data.sample_weight": "age"}}}}, r"`variants\.a\.set` should leave `data\.sample_weight`"),
        (
            {"variants": {"a": {"set": {"tasks.conversion": {"kind": "binary"}}}}},
            r"Variant 'a': `tasks\.conversion\.given` should be as the base's \(click\): .* Found None\.",
        ),
        (
            {"variants": {"a": {"set": {"tasks.dwell.unit": "minutes"}}}},
            r"Variant 'a': `tasks\.dwell\.unit` should scale its label as the base's \(1\.0\)",
        ),
        (
            {"variants": {"a": {"set": {"tasks.dwell": {"kind": "regression", "label": "dwell_seconds", "given": "click"}}}}},
            r"`tasks\.dwell\.kind` should predict the columns as the base's \(dwell_seconds\): .* Found dwell\.",
        ),
        (
            {"variants": {"a": {"set": {"tasks.dwell.loss": "tweedie"}}}, "primary": {"dwell": "r2_log1p_given"}},
            r"Variant 'a': `primary\.dwell`: r2_log1p is of losses with a log-scale output, which `tasks\.dwell\.loss` is",
        ),
        ({"variants": {"mmoe": {"set": {"model.tower_layers": [4]}}}}, r"`variants\.mmoe` should be a name of its own"),
        ({"variants": {"a/b": {"set": {"model.tower_layers": [4]}}}}, r"`variants\.a/b` should be a name"),
        ({"seeds": 1}, r"`seeds` should be at least 2 different numbers .* Found 1\."),
        ({"seeds": [3]}, r"`seeds` should be at least 2"),
        ({"seeds": [3, 3]}, r"`seeds` should be at least 2 different"),
        ({"primary": {"click": "auk"}}, r"`primary\.click` should be a metric of the task \(auc, .*Did you mean 'auc'\?"),
        ({"primary": {"clicks": "auc"}}, r"`primary` should name tasks \(click, .*Did you mean 'click'\?"),
        ({"segment": "nowhere"}, r"data\.test.*'nowhere'"),
        ({"variant": {}}, r"`variant` is not a known key\. Did you mean 'variants'\?"),
        ({"budget": {"steps": 5, "rows": 3}}, r"`budget` should be one of steps, seconds or rows\. Found steps, rows\."),
        ({"single_task": "shared_botom"}, r"`single_task` should name a variant .*Did you mean 'shared_bottom'\?"),
        ({"primary": {"click": "ece"}}, r"`primary\.click` should be a metric of the task \(auc, .*Found 'ece'\."),
        (
            {"primary": {"click": "gauc"}, "set": {"evaluation.group_by": None}},
            r"`primary\.click` should be a metric of the task \(auc, (?!gauc).*Found 'gauc'\.",
        ),
        ({"primary": {"dwell": "r2_log1p"}}, r"`primary\.dwell` should be r2_log1p_given: .* no log scale\. Found 'r2_log1p'\."),
        ({"segment": "tags"}, r"`segment` should name a column with one value a row\. Found 'tags' of type list<.*int64>\."),
        ({"name": "a/b"}, r"`name`: should be usable as the name of a folder, without '/'\. Found 'a/b'\."),
        (
            {"variants": {"young": {"set": {"data.train": {"path": "x", "where": "age < 40"}}}}, "budget": {"rows": 1_300}},
            r"Variant 'young': `data\.train\.where` should be the base's \(None\) where `budget\.rows` is set: .*"
            r"Found age < 40\. Use `budget\.steps` or `budget\.seconds`, or leave the budget out\.",
        ),
        (
            {"search": {"trials": 2, "space": {"data.train.where": ["age < 40", "age < 50"]}}, "budget": {"rows": 1_300}},
            r"`search\.space` \(variant mmoe\): `data\.train\.where` should be the base's \(None\)",
        ),
        ({"search": {"trials": 2, "space": {"seed": [1, 2]}}}, r"`search\.space` should leave `seed` as it is"),
        (
            {
                "search": {
                    "trials": 1,
                    "space": {"optimizer.dense.learning_rate": [1e-3, 1e-2], "model.architecture.expert_layers": [[16, 8], [4]]},
                }
            },
            r"`search\.space` \(variant mmoe\): `match: parameters` makes variants equally large before the search, .* Found "
            r"model\.architecture\.expert_layers, which changes it\. .* set `match: none`",
        ),
        (
            {"search": {"trials": 2, "space": {"model.dropout": [0.0, 0.1], "model.tower_layers": [[2], [3]]}}, "match": "flops"},
            r"`match: flops` .* Found model\.tower_layers, which changes it",
        ),
        (
            {"search": {"trials": 2, "space": {"model.interaction.rank": [2, 3], "model.architecture.kind": ["ple", "cgc"]}}},
            r"Found model\.architecture\.kind, model\.interaction\.rank, which changes it",
        ),
        ({"search": {"trials": 2, "space": {"model.embedding_dim": [2, 4]}}}, r"Found model\.embedding_dim, which changes it"),
        ({"search": {"trials": 2, "space": {"features.item_id.dim": [2, 4]}}}, r"Found features\.item_id\.dim, which changes it"),
        ({"set": {"data.test": None}}, r"`data\.test` of the base should name the files"),
        ({"set": {"data.test": "nowhere.parquet"}}, r"nowhere\.parquet"),
        (
            {"search": {"trials": 2, "space": {"optimizer.dense.lr": [1e-3, 1e-2]}}},
            r"`search\.space \(variant mmoe\)`: `optimizer\.dense\.lr` is not a known key",
        ),
    ],
)
def test_mistakes_are_told_before_anything_runs(log: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    before = sorted(tmp_path.iterdir())
    base = base_tree(log)
    with pytest.raises(ValueError, match=message) as caught:
        load_plan(comparison_file(tmp_path, base, **changes))
    assert str(caught.value).startswith(f"{tmp_path / 'comparison.yaml'}:")
    assert sorted(path.name for path in tmp_path.iterdir() if path not in before) == ["base.yaml", "comparison.yaml"]


def test_what_leaves_the_size_alone_is_searched_beside_matching(log: Path, tmp_path: Path) -> None:
    space = {"optimizer.dense.learning_rate": [1e-3, 1e-2], "data.batch_size": [64, 128], "model.dropout": [0.0, 0.1]}
    search = {"trials": 3, "space": {**space, "features.item_id.min_count": [1, 2]}}
    assert load_plan(comparison_file(tmp_path, base_tree(log), search=search)).comparison.match == "parameters"


def test_a_budget_of_rows_is_for_other_files_but_not_for_other_shares_of_them(log: Path, tmp_path: Path) -> None:
    few = {"few": {"set": {"data.train.path": str(log / "train" / "part-0.parquet")}}}
    load_plan(comparison_file(tmp_path, base_tree(log), variants=few, budget={"rows": 1_300}))
    base = base_tree(log)
    base["data"]["train"] = {"path": str(log / "train"), "where": "age < 40"}
    with pytest.raises(ValueError, match=r"Variant 'few': `data\.train\.path` should be the base's .*Found .*part-0\.parquet\."):
        load_plan(comparison_file(tmp_path, base, variants=few, budget={"rows": 1_300}))
    load_plan(comparison_file(tmp_path, base, variants=few, budget={"steps": 10}))


def test_test_rows_are_not_those_of_training_or_validation(log: Path, tmp_path: Path) -> None:
    def source(name: str, where: str | None = None) -> dict[str, Any]:
        return {"path": str(log / name), "where": where}

    (tmp_path / "link").symlink_to(log / "test")
    one_of_them = rf"`data\.test` should name other rows than `data\.train`\. Found '{log}/train/part-0\.parquet' in both: .*by"
    with pytest.raises(ValueError, match=rf"Variant 'mmoe' \(the base\): {one_of_them} `where`\.$"):
        load_plan(comparison_file(tmp_path, base_tree(log), set={"data.test": source("train/part-0.parquet")}))
    with pytest.raises(ValueError, match=r"`data\.validation`\. Found .* With `data\.validation: null` the last checkpoint is"):
        load_plan(comparison_file(tmp_path, base_tree(log), set={"data.test": source("validation")}))
    load_plan(comparison_file(tmp_path, base_tree(log), set={"data.test": source("validation"), "data.validation": None}))
    mine = {"mine": {"set": {"data.train": [str(log / "train"), str(tmp_path / "link" / "part-1.parquet")]}}}
    with pytest.raises(ValueError, match=rf"Variant 'mine': .* Found '{log}/test/part-1\.parquet' in both"):
        load_plan(comparison_file(tmp_path, base_tree(log), variants=mine))
    apart = {"data.train": source("train", "age < 40"), "data.test": source("train", "age >= 40")}
    load_plan(comparison_file(tmp_path, base_tree(log), set=apart))
    with pytest.raises(ValueError, match=r"`data\.test` should name other rows than `data\.train`"):
        load_plan(comparison_file(tmp_path, base_tree(log), set={**apart, "data.test": source("train", "age < 40")}))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    found = CliRunner().invoke(app, ["compare", str(tmp_path / "nothing.yaml")])
    assert isinstance(found.exception, ValueError)
    assert "There is no comparison file" in str(found.exception)


def test_a_file_that_is_a_list_is_told_the_keys_of_a_comparison(tmp_path: Path) -> None:
    (tmp_path / "list.yaml").write_text("[base, variants]")
    with pytest.raises(ValueError, match=r"list\.yaml: should be a YAML mapping with keys such as base, .*Found list\.$"):
        load_plan(tmp_path / "list.yaml")


def test_matching_reaches_the_target(log: Path, tmp_path: Path) -> None:
    plan = load_plan(comparison_file(tmp_path, base_tree(log)))
    for what, target in (("parameters", 20_000), ("flops", 60_000)):
        made, done = matched(plan.experiments["single_task"], 26, what, target)
        assert done["size"] == dense_size(made, 26)[what]
        assert abs(done["size"] - target) < 0.05 * target


def test_draws_cover_a_list_and_a_range() -> None:
    search = Search.model_validate({"trials": 4, "space": {"a": [1, 2, 3, 4], "b": {"uniform": [0, 1]}}})
    draws = search_draws(search)
    assert sorted(each["a"] for each in draws) == [1, 2, 3, 4]
    assert sorted(int(4 * each["b"]) for each in draws) == [0, 1, 2, 3]
    assert search_draws(search) == draws
