"""The bench of real tasks, cut short."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from normlab.errors import InputError
from normlab.study.named import find_named
from normlab.study.plan import Plan
from normlab.study.tasks import make_metrics, make_model
from normlab.study.trial import run_trial

pytest.importorskip("monai")

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "studies" / "proof"
PLANS = sorted((FOLDER / "plans").glob("*.toml"))


@pytest.fixture(autouse=True)
def at_root(monkeypatch):
    """Plans name their functions from there."""
    monkeypatch.chdir(ROOT)


def module(name):
    """The module of a family of tasks, as a plan loads it."""
    return sys.modules[find_named("model", f"studies/proof/{name}.py:make_model").__module__]


@pytest.mark.parametrize("path", PLANS, ids=lambda path: path.stem)
def test_a_plan_names_what_is_there(path):
    plan = Plan.read(path)
    assert {"batch", "group", "instance", "running"} <= set(plan.norms)
    assert {1, 2} < set(plan.batch_sizes)
    assert plan.schedules == ["polynomial"]
    trial = plan.trials()[0]
    assert len(make_metrics(trial)) == 2
    for name in (trial.data, trial.loss):
        assert callable(find_named("data", name))
    make_model(trial)


def trial_of(plan, norm="batch", **settings):
    """One run of a plan."""
    plan = Plan.read(FOLDER / "plans" / f"{plan}.toml")
    one = replace(plan, norms=[norm], batch_sizes=[2], lrs=plan.lrs[:1], seeds=[0], **settings)
    (trial,) = one.trials()
    return trial


def test_a_run_on_digits_learns():
    assert_learns(trial_of("digits-raw-adamw", "group", images=32, epochs=3), 0.4)


def test_a_seed_draws_scenes_of_its_own_and_all_are_judged_on_the_same():
    make = module("digits").make_scenes
    (one, judged), (other, judged_too) = (make(seed, 4, 3, raw=True) for seed in (0, 1))
    assert len(one) == 4
    assert len(judged) == 6
    assert torch.equal(one.tensors[0], make(0, 4, 3, raw=True)[0].tensors[0])
    assert not torch.equal(one.tensors[0], other.tensors[0])
    assert all(map(torch.equal, judged.tensors, judged_too.tensors))
    assert judged.tensors[1][:, 1].flatten(1).unique(dim=1).tolist() == [[0]] * 3 + [[1]] * 3


def test_standardised_scenes_have_lost_gain_and_offset():
    images = module("digits").make_scenes(0, 4, 3, raw=False)[0].tensors[0]
    assert torch.allclose(images.mean((1, 2, 3)), torch.zeros(4), atol=1e-5)
    assert torch.allclose(images.std((1, 2, 3)), torch.ones(4), atol=1e-5)
    raw = module("digits").make_scenes(0, 4, 3, raw=True)[0].tensors[0]
    assert raw.std((1, 2, 3)).std() > 0.05


def test_round_digits_alone_are_the_object():
    draw = module("digits").draw
    ones, which = torch.ones(10, 28, 28), torch.arange(10)
    scenes, objects = draw(ones, which, 4, 0, wanted=(), many=6)
    assert scenes.any()
    assert not objects.any()
    of_all = draw(ones, which, 4, 0, wanted=range(10), many=6)[1]
    of_round = draw(ones, which, 4, 0, wanted=module("digits").ROUND, many=6)[1]
    assert torch.equal(of_all, scenes > 0)
    assert 0 < of_round.sum() < of_all.sum()
    assert (of_all | ~of_round).all()


def test_dice_of_each_site():
    segmentation = sys.modules[module("digits").dice_here.__module__]
    objects = torch.zeros(2, 4, 4, dtype=torch.bool)
    objects[:, :2] = True
    label = segmentation.samples(torch.zeros(2, 4, 4), objects, torch.tensor([False, True])).tensors[1]
    output = torch.where(objects, 1.0, -1.0)[:, None].clone()
    output[1] = 1.0  # found everywhere: twice as much as is there
    assert segmentation.dice_here(output, label).nan_to_num(-1).tolist() == [1, -1]
    assert segmentation.dice_elsewhere(output, label).nan_to_num(-1).tolist() == [-1, pytest.approx(2 / 3)]
    assert segmentation.loss(output[:1], label[:1]) < segmentation.loss(output[1:], label[1:])


@pytest.mark.parametrize("name", ["make_unet", "make_segresnet", "make_dynunet"])
@pytest.mark.parametrize("dims", [2, 3])
def test_the_networks_keep_the_size_and_have_the_norm(name, dims):
    segmentation = sys.modules[module("digits").loss.__module__]
    net = getattr(segmentation, name)(dims, "running")
    assert sum("Running" in type(layer).__name__ for layer in net.modules()) > 3
    assert net(torch.randn(1, 1, *[16] * dims)).shape == (1, 1, *[16] * dims)


def loaded(name):
    """What the module of a family loads from its packages, or a skipped test."""
    try:
        return module(name).load()
    except InputError as error:
        pytest.skip(f"the data of {name} cannot be fetched: {error}")


def assert_learns(trial, low):
    record = run_trial(trial)
    here = record.by_epoch("dice_here")
    assert low < here[-1] < 1
    assert here[-1] > here[0]


def made_up_frames(n, height, width):
    """Bright squares on a noisy ground, and where they are."""
    random = torch.Generator().manual_seed(n)
    objects = torch.zeros(n, height, width, dtype=torch.bool)
    for top in range(4, height - 8, 24):
        objects[:, top : top + 8, 8:16] = True
        objects[:, top : top + 10, -20:-8] = True
    return 300 * objects + 20 * torch.randn(n, height, width, generator=random) + 500, objects


def test_tiles_of_nuclei_are_split_by_time_and_site():
    make = module("nuclei").make_tiles
    frames, nuclei = made_up_frames(10, 130, 200)
    frames += 1000.0 * torch.arange(10)[:, None, None]
    image, image_nuclei = (part[0] for part in made_up_frames(1, 64, 64))
    train, valid = make(frames, nuclei, image, image_nuclei, raw=True)
    assert (len(train), len(valid)) == (6 * 4, 3 * 4 + 1)  # two of three tiles of a row have nuclei
    assert valid.tensors[1][:, 1].flatten(1).amax(1).tolist() == [0] * 12 + [1]
    assert train.tensors[0].mean() == pytest.approx(0, abs=1e-4)
    assert valid.tensors[0][:12].min() > train.tensors[0].max(), "frames that judge are later ones"
    train, valid = make(frames, nuclei, image, image_nuclei, raw=False)
    assert torch.allclose(valid.tensors[0].mean((1, 2, 3)), torch.zeros(13), atol=1e-3)
    assert torch.equal(valid.tensors[1][-1, 0], image_nuclei.long())


def test_a_run_on_nuclei_learns():
    pytest.importorskip("tifffile")
    frames, nuclei, image, _ = loaded("nuclei")
    assert frames.shape == nuclei.shape == (10, 210, 576)
    assert image.shape == (512, 512)
    assert 0.05 < nuclei.float().mean() < 0.1
    assert_learns(trial_of("nuclei-standardised-adamw", "group", images=32, epochs=3), 0.3)


def test_patches_of_the_brain_are_split_by_side_and_site():
    make = module("brain").make_patches
    random = torch.Generator().manual_seed(0)
    brain = torch.zeros(80, 44, 44, dtype=torch.bool)
    brain[8:72, 10:34, 10:34] = True
    head = 100 * brain + 10 * torch.randn(brain.shape, generator=random) + 50
    head[40:] += 1000
    macaque = 200.0 * brain[:32, :32, :32]
    train, valid = make(head, brain, macaque, raw=True)
    assert (len(train), len(valid)) == (2**2, 2)
    assert train.tensors[0].shape[1:] == (1, 32, 32, 32)
    assert valid.tensors[1][:, 1].flatten(1).amax(1).tolist() == [0, 1]
    assert valid.tensors[0][0].min() > train.tensors[0].max(), "the right half judges"
    assert torch.equal(valid.tensors[1][1, 0], brain[:32, :32, :32].long())
    train, _ = make(head, brain, macaque, raw=False)
    assert torch.allclose(train.tensors[0].std((1, 2, 3, 4)), torch.ones(4), atol=1e-3)


def test_a_run_on_the_brain_learns():
    pytest.importorskip("nibabel")
    head, brain, macaque = loaded("brain")
    assert head.shape == brain.shape == (91, 109, 91)
    assert macaque.shape == (84, 103, 64)
    assert 0.2 < brain.float().mean() < 0.3
    assert_learns(trial_of("brain-standardised-adamw", images=24, epochs=3), 0.3)


def boxed(*boxes, site=1):
    """A label of `trees` with these boxes."""
    label = torch.zeros(1, module("trees").MOST, 5)
    label[0, : len(boxes), :4] = torch.tensor(boxes, dtype=torch.float)
    label[0, : len(boxes), 4] = site
    return label


BOXES = (20.0, 24.0, 60.0, 70.0), (100.0, 110.0, 140.0, 140.0)


def output_of(boxes, score=6.0):
    """What a detector gives that sees these boxes and no others."""
    output = torch.full((1, 5, 32, 32), -score)
    for left, top, right, bottom in boxes:
        column, row = int((left + right) / 16), int((top + bottom) / 16)
        x, y = 8 * column + 4, 8 * row + 4
        sides = torch.tensor([x - left, y - top, right - x, bottom - y]) / 8
        output[0, :, row, column] = torch.cat([torch.tensor([score]), sides.log()])
    return output


def test_the_detector_draws_the_boxes_of_its_output():
    boxes, scores = module("trees").detect(output_of(BOXES))
    assert torch.allclose(boxes[0, :2].sort(0).values, torch.tensor(BOXES), atol=1e-3)
    assert (scores[0, :2] > 0.99).all()
    assert (scores[0, 2:] < 0.01).all()


def test_average_precision_is_of_one_site():
    pytest.importorskip("pycocotools")
    trees = module("trees")
    here, elsewhere = trees.AveragePrecision(), trees.AveragePrecisionElsewhere()
    for metric in (here, elsewhere):
        metric.update(output_of(BOXES), boxed(*BOXES))
    assert here.compute() == pytest.approx(1)
    assert elsewhere.compute() != elsewhere.compute(), "NaN"
    here.update(output_of(BOXES[:1]), boxed(*BOXES))  # one of two is missed: three of four are found
    assert here.compute() == pytest.approx(0.75, abs=0.01)
    here.reset()
    here.update(output_of([(20.0, 24.0, 40.0, 44.0)]), boxed(BOXES[0]))  # overlap 0.22
    assert here.compute() == 0
    here.reset()
    here.update(output_of([]), boxed(*BOXES))
    assert here.compute() == 0


def test_the_loss_of_the_detector_is_least_for_the_true_boxes():
    trees = module("trees")
    label = boxed(*BOXES)
    true, missed = trees.loss(output_of(BOXES), label), trees.loss(output_of(BOXES[:1]), label)
    wide = trees.loss(output_of([(10.0, 14.0, 70.0, 80.0), BOXES[1]]), label)
    assert true < missed
    assert true < wide
    assert trees.overlap(*(torch.tensor(box) for box in ([0.0, 0, 2, 2], [1.0, 0, 3, 2]))) == pytest.approx(1 / 3)
    assert trees.loss(output_of([]), torch.zeros_like(label)).isfinite(), "an image without a tree"


def test_tiles_of_photographs_keep_their_boxes():
    make = module("trees").make_tiles
    drawn = torch.tensor([[10.0, 20, 50, 70], [1900.0, 30, 1940, 80], [1778.0, 100, 1798, 140]])
    photos = [(torch.rand(3, 256, 2299), drawn), (torch.rand(3, 256, 256), torch.tensor([[200.0, 190, 230, 260]]))]
    train, valid = make(photos, raw=True)
    images, labels = train.tensors
    assert len(train) == 4  # of seven tiles two have trees, and each its mirror image
    assert labels[0, 0].tolist() == [10, 20, 50, 70, 1]
    assert labels[1, 0].tolist() == [242, 100, 256, 140, 1], "cut at the edge"
    assert labels[2, 0].tolist() == [206, 20, 246, 70, 1]
    assert torch.equal(images[2], images[0].flip(-1))
    assert torch.equal(images[0], 4 * photos[0][0][..., :256] - 2)
    assert labels[..., 4].sum() == 4
    assert valid.tensors[1][:, 0].tolist() == [[108, 30, 148, 80, 1], [200, 190, 230, 256, 2]]
    assert (valid.tensors[1][:, 1] == 0).all(), "a third of a crown is none"
    standardised = make(photos, raw=False)[0].tensors[0]
    assert torch.allclose(standardised.std((1, 2, 3)), torch.ones(4), atol=1e-3)


def test_a_run_on_trees_learns():
    pytest.importorskip("pycocotools")
    photos = loaded("trees")
    assert [len(boxes) for _, boxes in photos] == [574, 279, 61, 37]
    record = run_trial(trial_of("trees-standardised-adamw", "group", images=16, epochs=2))
    losses = [epoch["train"]["loss"] for epoch in record.epochs]
    assert losses[1] < losses[0]
    assert record.metric == "AveragePrecision"
    assert 0 <= record.by_epoch("AveragePrecision")[-1] < 1


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """The module that fetches, with a cache folder of its own."""
    monkeypatch.setenv("NORMLAB_CACHE", str(tmp_path))
    return sys.modules[find_named("data", "studies/proof/packages.py:fetch").__module__]


def writes(text):
    """A command that brings a file a.whl with this text, and counts how often it was run."""
    code = f"open('a.whl', 'w').write({text!r}); open('../../count', 'a').write('x')"
    return [sys.executable, "-c", code]


SUM = "9834876dcfb05cb167a5c24953eba58c4ac89b1adf57f28f2f9d09af107ee8f0"  # of aaa


def test_a_package_is_fetched_once_and_checked(packages, tmp_path):
    for _ in range(2):
        assert packages.fetch("a.whl", SUM, writes("aaa")).read_text() == "aaa"
    assert (tmp_path / "count").read_text() == "x"
    (tmp_path / "packages" / "a.whl").write_text("damaged")
    assert packages.fetch("a.whl", SUM, writes("aaa")).read_text() == "aaa"


def test_another_file_is_refused(packages, tmp_path):
    with pytest.raises(InputError, match=r"expected a\.whl with SHA-256 9834.*got \['a\.whl'\]"):
        packages.fetch("a.whl", SUM, writes("bbb"))
    assert not (tmp_path / "packages" / "a.whl").exists()


def test_a_command_that_fails_is_told(packages):
    with pytest.raises(InputError, match="failed:\nno such package"):
        packages.fetch("a.whl", SUM, [sys.executable, "-c", "raise SystemExit('no such package')"])
    with pytest.raises(InputError, match="no-such-command cannot be run"):
        packages.fetch("a.whl", SUM, ["no-such-command"])
