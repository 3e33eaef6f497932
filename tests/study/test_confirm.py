"""The best settings of a study, with other seeds."""

import pytest

from normlab.errors import InputError
from normlab.study.confirm import confirm
from normlab.study.plan import Plan
from records import record, study

PLAN = Plan(norms=["batch", "running"], batch_sizes=[2, 32], lrs=[0.1, 1.0], seeds=[0, 1, 2])


def test_the_best_setting_of_each_norm_and_batch_size_that_trains():
    chosen = confirm(PLAN, study(), seeds=[3, 4])
    found = [(one["norm"], one["batch_size"], one["lr"]) for one in chosen.settings]
    assert found == [("running", 2, 0.1), ("batch", 32, 0.1), ("running", 32, 0.1)]  # batch at 2 does not train
    assert {trial.seed for trial in chosen.trials()} == {3, 4}
    assert len(confirm(PLAN, study(), seeds=[3], best=2).settings) == 5  # running at 2 and 1.0 diverges


def test_by_default_there_are_new_seeds_enough_to_tell_the_norms_apart():
    assert confirm(PLAN, study()).seeds == [3, 4, 5, 6, 7, 8]  # two norms at batch 32
    third = [record(0.9, norm="group", batch_size=32, lr=0.1, seed=seed) for seed in range(3)]
    plan = Plan(norms=["batch", "running", "group"], batch_sizes=[2, 32], lrs=[0.1, 1.0], seeds=[0, 1, 2])
    assert len(confirm(plan, [*study(), *third]).seeds) == 7


def test_runs_that_are_not_of_the_plan_do_not_choose():
    other = record(0.999, norm="batch", batch_size=32, lr=3.0)
    assert confirm(PLAN, [*study(), other], seeds=[3]) == confirm(PLAN, study(), seeds=[3])


def test_seeds_that_chose_do_not_judge():
    with pytest.raises(InputError, match=r"seeds=.* Accepted: others than 1, 2, which chose the settings"):
        confirm(PLAN, study(), seeds=[1, 2, 3])


def test_no_setting_that_trains_is_an_error():
    plan = Plan(norms=["batch"], batch_sizes=[2], lrs=[0.1], seeds=[0])
    with pytest.raises(InputError, match="no setting of the study trains"):
        confirm(plan, study(), seeds=[3])
