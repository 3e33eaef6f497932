"""Trials and grids."""

from dataclasses import fields

import pytest

from normlab.errors import InputError
from normlab.study.plan import Plan, Shared, Trial, grid


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"batch_size": 0}, "batch_size=0"),
        ({"lr": 0.0}, "lr=0.0"),
        ({"lr": float("nan")}, "lr=nan"),
        ({"lr": float("inf")}, "lr=inf"),
        ({"seed": -1}, "seed=-1"),
        ({"epochs": 0}, "epochs=0"),
        ({"images": 0}, "images=0"),
        ({"clip": 0.0}, "clip=0.0"),
        ({"schedule": "onecycle"}, "Did you mean 'one-cycle'"),
        ({"norm": 5}, "norm=5"),
        ({"data": None}, "data=None"),
        ({"model": ["convnet"]}, "model="),
        ({"batch_size": "2"}, "batch_size='2'"),
        ({"batch_size": 2.0}, "batch_size=2.0"),
        ({"lr": "0.1"}, "lr='0.1'"),
        ({"seed": None}, "seed=None"),
        ({"epochs": 1.5}, "epochs=1.5"),
        ({"images": "all"}, "images='all'"),
        ({"clip": True}, "clip=True"),
        ({"task": 5}, "task=5"),
    ],
)
def test_settings_out_of_range_are_refused_by_name(wrong, named):
    with pytest.raises(InputError, match=named):
        Trial(**wrong)


def test_equal_settings_have_equal_keys_and_others_do_not():
    assert Trial().key == Trial().key
    others = [Trial(), Trial(norm="batch"), Trial(lr=0.1), Trial(images=100), Trial(clip=1.0), Trial(seed=1)]
    assert len({trial.key for trial in others}) == len(others)


def test_a_grid_has_every_combination_once():
    trials = grid(["batch", "group"], [2, 32], [0.1, 0.4, 0.1], [0, 1], Trial(epochs=3))
    assert len(trials) == len(set(trials)) == 2 * 2 * 2 * 2
    assert {trial.epochs for trial in trials} == {3}


@pytest.mark.parametrize(
    ("lists", "message"),
    [
        (("batch", [2], [0.1], [0]), r"norms='batch' is not usable. Accepted: a list. Write norms=\['batch'\]"),
        ((["batch"], 2, [0.1], [0]), r"batch_sizes=2 .* Write batch_sizes=\[2\]"),
        ((["batch"], [2], 0.1, [0]), r"lrs=0.1 .* Write lrs=\[0.1\]"),
        ((["batch"], [2], [0.1], []), r"seeds=\[\] is not usable. Accepted: one value or more"),
    ],
)
def test_a_grid_is_of_lists(lists, message):
    with pytest.raises(InputError, match=message):
        grid(*lists, Trial())


def test_a_record_gives_its_trial_back():
    trial = Trial(norm="group", clip=0.5)
    assert Trial.from_dict({**vars(trial), "of another version": 1}) == trial
    assert Trial.from_dict(trial.to_dict()) == trial


def test_a_task_is_a_setting_like_others_where_there_is_one():
    trial = Trial(task="segment: tumours")
    assert trial.key != Trial().key
    assert Trial.from_dict(trial.to_dict()) == trial
    assert "task" not in Trial().to_dict()


def test_the_settings_are_in_the_order_of_the_table():
    names = ["norm", "batch_size", "lr", "seed", "optimizer", "schedule", "clip", "epochs", "data", "model", "images"]
    assert [field.name for field in fields(Trial)][: len(names)] == names


def test_a_grid_takes_its_shared_settings_with_or_without_a_trial():
    lists = (["batch"], [2], [0.1], [0])
    assert grid(*lists, Shared(epochs=3)) == grid(*lists, Trial(epochs=3, norm="group"))
    assert {trial.schedule for trial in grid(*lists, Trial(schedule="linear"))} == {"linear"}


def test_keys_of_settings_from_before_there_were_others_stay():
    assert Trial(norm="running", batch_size=2, lr=0.4, seed=0).key == "9abc71f243a7"
    assert "optimizer" not in Trial().to_dict()
    assert Trial.from_dict(Trial(metrics=("dice",), optimizer="adamw").to_dict()).metrics == ("dice",)


def test_a_plan_is_the_same_from_python_from_a_file_and_back(tmp_path):
    plan = Plan(
        norms=["batch"],
        batch_sizes=[1, 2],
        lrs=[1e-5, 3.0],
        seeds=[0],
        metrics=("dice",),
        model='a "b":c\\d',
        clips=[None, 1.0],
    )
    file = tmp_path / "plan.toml"
    file.write_text(plan.to_toml())
    assert Plan.read(file) == plan
    assert [trial.key for trial in Plan.read(file).trials()] == [trial.key for trial in plan.trials()]


def test_a_plan_of_chosen_settings(tmp_path):
    chosen = [
        {"norm": "batch", "batch_size": 2, "lr": 0.1},
        {"norm": "running", "batch_size": 2, "lr": 0.4, "clip": 1.0},
    ]
    plan = Plan(settings=chosen, seeds=[1, 2], epochs=3)
    assert [(one.norm, one.lr, one.clip, one.seed) for one in plan.trials()] == [
        ("batch", 0.1, None, 1), ("batch", 0.1, None, 2), ("running", 0.4, 1.0, 1), ("running", 0.4, 1.0, 2),
    ]  # fmt: skip
    assert {trial.epochs for trial in plan.trials()} == {3}
    file = tmp_path / "plan.toml"
    file.write_text(plan.to_toml())
    assert Plan.read(file).trials() == plan.trials()
    assert file.read_text().count("\n") == 7  # two settings in two lines


def test_a_setting_may_have_seeds_of_its_own(tmp_path):
    chosen = [{"norm": "batch"}, {"norm": "running", "seeds": [0, 1, 2]}]
    plan = Plan(settings=chosen, seeds=[0])
    assert [(one.norm, one.seed) for one in plan.trials()] == [
        ("batch", 0), ("running", 0), ("running", 1), ("running", 2),
    ]  # fmt: skip
    file = tmp_path / "plan.toml"
    file.write_text(plan.to_toml())
    assert Plan.read(file).trials() == plan.trials()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("norm = ['batch']", r"key='norm' is unknown. Did you mean 'norms'"),
        ("norms = 'batch'", r"norms='batch' .* Write norms=\['batch'\]"),
        ("norms = []", "norms"),
        ("norms = [", "is no TOML"),
        ("batch_sizes = [2.5]", "batch_size=2.5"),
        ("lrs = [nan]", "lr=nan"),
        ("epochs = 'two'", "epochs='two'"),
        ("metrics = 'dice'", "metrics='dice'"),
        ("x = " + "[" * 5000, "is no TOML"),
        ("[[settings]]\nlrs = 0.1", r"settings: key='lrs' is unknown. Did you mean 'lr'"),
        ("[[settings]]\nseed = 1", r"settings: key='seed' is unknown"),
        ("[[settings]]\nseeds = 1", r"seeds=1 is not usable. Accepted: a list. Write seeds=\[1\]"),
        ("[[settings]]\nseeds = []", r"seeds=\[\] is not usable. Accepted: one value or more"),
        ("[[settings]]\nseeds = ['a']", "seed='a'"),
        ("settings = 5", "settings=5 is not usable. Accepted: a list"),
        ("settings = [5]", "settings=5 is not usable. Accepted: a list of tables"),
        ("settings = [['norm']]", "Accepted: a list of tables"),
        ("[settings]\nnorm = 'batch'", "settings={'norm': 'batch'} is not usable. Accepted: a list"),
    ],
)
def test_a_file_that_is_no_plan_is_refused(tmp_path, text, said):
    file = tmp_path / "plan.toml"
    file.write_text(text)
    with pytest.raises(InputError, match=said):
        Plan.read(file)
    with pytest.raises(InputError, match="cannot be read"):
        Plan.read(tmp_path / "missing.toml")
