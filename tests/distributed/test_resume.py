"""Six of the trials of pipelines/resilience/trials.py: a rank is killed, others go on, nothing is lost and nothing seen twice."""


import pytest
from logs import write_log
from trials import ROWS, Kill, Trial, conduct, prepared

from mtrec.run import Run


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("resume")
    write_log(folder / f"log-{ROWS}" / "train", rows=ROWS)
    write_log(folder / f"log-{ROWS}" / "validation", rows=1_000, seed=1)
    return prepared(folder)


@pytest.mark.parametrize("pair", [(1, 1), (1, 2), (2, 1), (2, 2), (2, 4)], ids=str)
def test_a_killed_run_resumes_as_if_nothing_had_happened(base: Run, pair: tuple[int, int]) -> None:
    outcome = conduct(base, Trial(*pair, seed=0))
    assert not outcome.failures, outcome
    assert outcome.resumed_step > 0, "the kill should leave a checkpoint to go on from"


def test_a_rank_killed_while_it_writes_a_checkpoint_costs_that_checkpoint_alone(base: Run) -> None:
    outcome = conduct(base, Trial(2, 2, seed=0), Kill(rank=1, step=15, in_checkpoint=True))
    assert not outcome.failures, outcome
    assert outcome.resumed_step == 10
    assert outcome.died_at_step == 15
