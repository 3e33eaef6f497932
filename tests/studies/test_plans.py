"""The studies that are plans: what is kept of each are runs of its plan."""

from pathlib import Path

import pytest

from normlab.study.plan import Plan, Trial
from normlab.study.store import RunStore

STUDIES = Path(__file__).parents[2] / "studies"
PLANS = sorted(STUDIES.rglob("plan.toml"))
WHOLE = ("finetune", "flagship")  # every run of whose plans was made


@pytest.mark.parametrize("path", PLANS, ids=lambda path: str(path.parent.relative_to(STUDIES)))
def test_the_kept_runs_are_those_of_the_plan(path):
    plan = Plan.read(path)
    records = RunStore(path.parent / "runs.jsonl").read()
    kept, planned = [record.key for record in records], {trial.key for trial in plan.trials()}
    assert len(kept) == len(set(kept)) > 0
    assert planned.issuperset(kept)
    if path.parts[-3] in WHOLE:
        assert planned == set(kept)
    for record in records:
        assert Trial.from_dict(record.settings).key == record.key
        assert Trial.from_dict(record.settings).to_dict() == record.settings
    assert path.read_text() == plan.to_toml(), "as `normlab study run` writes it"
