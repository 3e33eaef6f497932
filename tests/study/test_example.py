"""The study of examples/study_monai.toml, cut short."""

from dataclasses import replace
from pathlib import Path

import pytest

from normlab.study.plan import Plan
from normlab.study.trial import run_trial

ROOT = Path(__file__).parents[2]
FILE = ROOT / "examples" / "study_monai.toml"


def test_it_is_of_60_runs():
    plan = Plan.read(FILE)
    assert len(plan.trials()) == 60
    assert (len(plan.norms), plan.batch_sizes, len(plan.seeds)) == (5, [1, 2], 6)


@pytest.mark.parametrize("norm", ["batch", "running"])
def test_a_run_of_it_learns(norm, monkeypatch):
    pytest.importorskip("monai")
    monkeypatch.chdir(ROOT)  # the plan names its functions from there
    plan = replace(Plan.read(FILE), norms=[norm], batch_sizes=[2], seeds=[0], images=16, epochs=3)
    record = run_trial(*plan.trials())
    assert record.status == "finished"
    assert record.metric == "dice"
    values = record.by_epoch("dice")
    assert 0.3 < values[-1] < 1
    assert values[-1] > values[0]


def test_its_images_are_standardised_or_raw(monkeypatch):
    pytest.importorskip("monai")
    monkeypatch.syspath_prepend(ROOT / "examples")
    import study_monai

    image = study_monai.make_data()[0][0]["image"]
    assert image.shape == (1, 48, 48)
    assert abs(image.mean()) < 1e-5
    assert abs(image.std() - 1) < 1e-5
    raw = study_monai.make_raw_data()[0][0]["image"]
    assert abs(raw.std() - 1) > 0.01 or abs(raw.mean()) > 0.01
