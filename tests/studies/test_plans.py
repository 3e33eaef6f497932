"""The studies that are plans: what is kept of each are the runs of its plan, all of them and no others."""

from pathlib import Path

import pytest

from normlab.study.plan import Plan, Trial
from normlab.study.store import RunStore

STUDIES = Path(__file__).parents[2] / "studies"
PLANS = sorted(STUDIES.rglob("plan.toml"))


@pytest.mark.parametrize("path", PLANS, ids=lambda path: str(path.parent.relative_to(STUDIES)))
def test_the_kept_runs_are_those_of_the_plan(path):
    plan = Plan.read(path)
    records = RunStore(path.parent / "runs.jsonl").read()
    assert {record.key for record in records} == {trial.key for trial in plan.trials()}
    assert len(records) == len(plan.trials()) > 0
    for record in records:
        assert Trial.from_dict(record.settings).key == record.key
        assert Trial.from_dict(record.settings).to_dict() == record.settings
    assert path.read_text() == plan.to_toml(), "as `normlab study run` writes it"
