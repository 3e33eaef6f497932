"""Images that differ in brightness and contrast: the candidates are measured, and the best is named."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import normlab


def images_of(gain: float, offset: float, count: int = 16):
    """Batches of two images with a gain and an offset each, and the images without, as targets."""
    generator = torch.Generator().manual_seed(0)
    plain = torch.randn(2 * count, 4, 12, 12, generator=generator)
    plain = (plain - plain.mean((2, 3), keepdim=True)) / plain.std((2, 3), keepdim=True)
    gains = 1 + gain * (2 * torch.rand(2 * count, 1, 1, 1, generator=generator) - 1)
    offsets = offset * (2 * torch.rand(2 * count, 1, 1, 1, generator=generator) - 1)
    return list(zip((gains * plain + offsets).split(2), plain.split(2), strict=True))


def seen() -> nn.Module:
    """A norm that lets its input through, with statistics that had their time."""
    norm = nn.BatchNorm2d(4)
    assert norm.num_batches_tracked is not None
    norm.num_batches_tracked.fill_(1000)
    return nn.Sequential(norm)


def test_the_best_of_the_candidates_is_named_with_their_losses():
    model, batches = seen(), images_of(gain=0.4, offset=1.0)
    before = copy.deepcopy(model.state_dict())
    found = normlab.diagnose(model, batches, loss=F.mse_loss)
    (finding,) = [one for one in found.findings if one.fault == "images differ in contrast"]
    as_it_is = torch.stack([F.mse_loss(x, target) for x, target in batches]).mean().item()
    assert f"as it is, or frozen: {as_it_is:.3g};" in finding.verdict
    mended = normlab.convert(model, "group", batches=batches, fit=True).model.eval()
    fitted = torch.stack([F.mse_loss(mended(x), target) for x, target in batches]).mean().item()
    assert f"group norm fitted: {fitted:.3g};" in finding.verdict
    assert fitted < 0.1 * as_it_is
    assert "group" in finding.command
    assert "fit=True" in finding.command
    assert all("recalibrate" not in one.command for one in found.findings)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_images_that_do_not_differ_are_left_in_peace():
    found = normlab.diagnose(seen(), images_of(gain=0.05, offset=0.05), loss=F.mse_loss)
    assert found.healthy, str(found)
    assert found.notes == []


def test_without_a_loss_it_says_that_one_is_needed():
    found = normlab.diagnose(seen(), [x for x, _ in images_of(gain=0.4, offset=1.0)])
    assert "images differ in contrast" not in [finding.fault for finding in found.findings]
    (note,) = found.notes
    assert "Give loss=" in note
    assert note[:40] in str(found)


def test_the_share_between_images_is_that_of_their_means_and_deviations():
    batches = [x for x, _ in images_of(gain=0.4, offset=1.0)]
    x = torch.cat(batches).double().flatten(2)
    between = x.mean(2).var(0, correction=0) + x.std(2, correction=0).var(0, correction=0)
    shares = between / x.transpose(0, 1).flatten(1).var(1, correction=0)
    assert normlab.diagnose(seen(), batches).layers[0].contrast == pytest.approx(shares.mean().item())


def test_images_that_differ_in_contrast_alone_are_seen_behind_filters_that_take_the_mean_away():
    """An edge filter leaves nothing of an image's brightness, and all of its contrast."""
    edges = nn.Conv2d(1, 2, 3, bias=False)
    with torch.no_grad():
        edges.weight.sub_(edges.weight.mean((1, 2, 3), keepdim=True))
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(32, 1, 24, 24, generator=generator)
    gains = torch.linspace(0.3, 1.7, 32).reshape(-1, 1, 1, 1)
    assert normlab.diagnose(nn.Sequential(edges, nn.BatchNorm2d(2)), images.split(4)).notes == []
    (note,) = normlab.diagnose(nn.Sequential(edges, nn.BatchNorm2d(2)), (gains * images).split(4)).notes
    assert "Images differ in brightness or contrast: at 1" in note


def test_what_images_show_is_not_taken_for_contrast():
    """Far from the image a channel says what is in it: of one image all, of the next nothing."""

    class Detector(nn.Module):
        def __init__(self):
            super().__init__()
            self.last, self.first = nn.BatchNorm2d(1), nn.BatchNorm2d(1)  # not in the order in which they run

        def forward(self, x):
            bright = (self.first(x).amax((2, 3), keepdim=True) > 3).float()
            return self.last(bright + 0.1 * x)

    x = torch.randn(32, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    found = normlab.diagnose(Detector(), x.split(4))
    assert found.notes == []
    assert [layer.contrast is None for layer in found.layers] == [True, False]


def test_a_loss_below_0_is_judged_by_how_far_it_falls():
    """Minus a score, as nnU-Net has it: what is no better is no remedy."""

    def score(output, target):
        return -1 - 1e-3 * output.sigmoid().mean()

    found = normlab.diagnose(seen(), images_of(gain=0.4, offset=1.0), loss=score)
    assert "images differ in contrast" not in [finding.fault for finding in found.findings]

    def similarity(output, target):
        return -F.cosine_similarity(output.flatten(1), target.flatten(1)).mean()

    model, batches = seen(), images_of(gain=0.4, offset=1.0)
    found = normlab.diagnose(model, batches, loss=similarity)
    (finding,) = [one for one in found.findings if one.fault == "images differ in contrast"]
    before = torch.stack([similarity(x, target) for x, target in batches]).mean().item()
    fitted = normlab.convert(model, "group", batches=batches, fit=True).model.eval()
    after = torch.stack([similarity(fitted(x), target) for x, target in batches]).mean().item()
    assert before < 0
    assert finding.effect >= (before - after) / -before - 1e-3 > 0.1


def test_norms_that_others_pass_by_are_named():
    running = normlab.diagnose(nn.Sequential(normlab.nn.RunningBatchNorm2d(4)), [torch.randn(4, 4, 3, 3)])
    assert any("update_bn" in note and "is_norm" in note for note in running.notes)
    assert normlab.diagnose(nn.Sequential(nn.BatchNorm2d(4)), 2 * [torch.randn(4, 4, 3, 3)]).notes == []
