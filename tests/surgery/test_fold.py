"""A folded model is the model, with fewer layers; what cannot be folded is left and named."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from normlab.errors import InputError
from normlab.nn import BatchNorm2d, FrozenBatchNorm2d, GroupNorm, RunningBatchNorm2d
from normlab.surgery import fold
from surgery.test_convert import output, trained

X = torch.randn(4, 3, 9, 9, generator=torch.Generator().manual_seed(1))


def settled(model):
    """With statistics, γ and β that are not those of the beginning."""
    torch.manual_seed(0)
    for module in model.modules():
        if getattr(module, "running_mean", None) is not None:
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 3)
            if module.weight is not None:
                nn.init.normal_(module.weight)
                nn.init.normal_(module.bias)
    return model.eval()


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, BatchNorm2d, RunningBatchNorm2d, FrozenBatchNorm2d])
@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(3, 8, 3),
        nn.Conv2d(3, 6, 3, stride=2, padding=1, groups=3, bias=False),
        nn.ConvTranspose2d(3, 8, 3, stride=2),
        nn.ConvTranspose2d(3, 6, 2, groups=3, bias=False),
    ],
    ids=str,
)
def test_convolutions(layer, norm):
    model = settled(nn.Sequential(layer, norm(layer.out_channels), nn.ReLU()))
    folded, report = fold(model, X)
    assert isinstance(folded[1], nn.Identity)
    assert report.rows[0].note == "in 0"
    torch.testing.assert_close(output(folded, X), output(model, X), rtol=1e-5, atol=1e-5)
    assert report.change < 1e-5
    assert isinstance(model[1], norm)


def test_linear_layers_and_other_dimensions():
    model = settled(nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 2, bias=False), nn.BatchNorm1d(2)))
    x = torch.randn(6, 5)
    folded, report = fold(model, x)
    assert len(report.touched) == 2
    torch.testing.assert_close(output(folded, x), output(model, x), rtol=1e-5, atol=1e-5)
    for dims, (conv, norm) in {1: (nn.Conv1d, nn.BatchNorm1d), 3: (nn.Conv3d, nn.BatchNorm3d)}.items():
        model, x = settled(nn.Sequential(conv(2, 4, 3), norm(4))), torch.randn(2, 2, *[5] * dims)
        folded, report = fold(model, x)
        assert len(report.touched) == 1
        torch.testing.assert_close(output(folded, x), output(model, x), rtol=1e-5, atol=1e-5)


def test_an_activation_of_the_norm_is_left():
    for name, kind in (("relu", nn.ReLU), ("leaky_relu", nn.LeakyReLU)):
        model = settled(nn.Sequential(nn.Conv2d(3, 8, 3), BatchNorm2d(8, activation=name)))
        folded, _ = fold(model, X)
        assert isinstance(folded[1], kind)
        torch.testing.assert_close(output(folded, X), output(model, X), rtol=1e-5, atol=1e-5)


class Residual(nn.Module):
    """Several ways in which what follows what is not what the order of the modules says."""

    def __init__(self):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.conv2, self.norm2 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.norm3, self.conv3 = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)
        self.conv4, self.norm4 = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.conv5, self.norm5 = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.conv6, self.norm6 = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.conv7, self.norm7 = nn.Conv2d(4, 4, 1), BatchNorm2d(4, activation="relu")
        self.unused = nn.BatchNorm2d(4)

    def forward(self, x):
        x = F.relu(self.norm1(self.conv1(x)))
        y = self.conv2(x)
        x = F.relu(self.norm2(y) + y)  # used twice
        x = self.conv3(F.relu(self.norm3(x)))  # norm before convolution
        x = self.norm4(F.relu(self.conv4(x)))  # something between
        x = self.norm5(self.conv5(self.conv5(x)))  # run twice
        if x.shape[1] == 4 and x.sum().isfinite():  # a look at its shape is no use of it
            z = self.conv6(x)
            assert z.dim() == 4
            x = self.norm6(z)
        return self.norm7(self.conv7(x), residual=x), y


def test_what_follows_what_is_seen_and_not_guessed():
    model = settled(Residual())
    folded, report = fold(model, X)
    notes = {row.name: row.note for row in report}
    assert [row.name for row in report.touched] == ["norm1", "norm6"]
    assert "used elsewhere too" in notes["norm2"]
    assert "does not come from" in notes["norm3"]
    assert "does not come from" in notes["norm4"]
    assert "run several times" in notes["norm5"]
    assert "residual" in notes["norm7"]
    assert "not run" in notes["unused"]
    for one, other in zip(folded(X), model(X), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_norms_that_depend_on_their_input_are_left():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), GroupNorm(8), nn.Conv2d(8, 4, 1), nn.BatchNorm2d(4, track_running_stats=False)
    )
    _, report = fold(model, X)
    assert [row.became for row in report] == [None, None]
    assert all("no running statistics" in row.note for row in report)


def test_weights_that_others_use_too_are_left():
    model = settled(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1)))
    model[2].weight = model[0].weight
    assert "another layer" in fold(model, X)[1].rows[0].note
    model = settled(nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 3, 1)), nn.BatchNorm2d(3)))
    assert "parametrized" in fold(model, X)[1].rows[0].note


def test_hooks_between_them_are_not_deceived():
    model = settled(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)))
    model[0].register_forward_hook(lambda *_: None)
    assert "hooks" in fold(model, X)[1].rows[0].note


def test_the_output_of_the_layer_is_the_models_too():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

        def forward(self, x):
            y = self.conv(x)
            return {"features": y, "out": self.norm(y)}

    assert "the model's output" in fold(settled(Both()), X)[1].rows[0].note


def test_half_precision():
    model = settled(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))).bfloat16()
    folded, report = fold(model, X.bfloat16())
    assert len(report.touched) == 1
    assert folded[0].weight.dtype == torch.bfloat16


def test_inputs_are_needed():
    with pytest.raises(InputError, match="inputs"):
        fold(nn.Sequential(nn.BatchNorm2d(3)))


def test_a_trained_model_of_the_lesson():
    model = trained()
    folded, report = fold(model, torch.randn(4, 3, 6, 6))
    assert {row.name for row in report.touched} == {"norm1", "head.2"}
    x = torch.randn(5, 3, 6, 6)
    torch.testing.assert_close(output(folded, x), output(model, x), rtol=1e-4, atol=1e-5)


def test_values_taken_by_an_attribute_are_a_use_and_a_shape_is_none():
    class Looking(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
            self.conv2, self.norm2 = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

        def forward(self, x):
            y = self.conv(x)
            z = self.conv2(x)
            return self.norm(y) + y.mT.mean() + self.norm2(z).view(z.shape).to(z.dtype)

    report = fold(settled(Looking()), X)[1]
    assert [row.name for row in report.touched] == ["norm2"]
    assert "used elsewhere too: by mT" in report.rows[0].note


class Sequel(nn.Module):
    """A convolution, its norm, and something after them."""

    def __init__(self, sequel):
        super().__init__()
        self.conv, self.norm, self.sequel = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), sequel

    def forward(self, x):
        return self.sequel(self, self.norm(self.conv(x.mul_(2))))


def test_a_model_that_draws_random_numbers_and_writes_into_its_input():
    x, state = X.clone(), torch.get_rng_state()
    model = settled(Sequel(lambda _, y: y + torch.randn_like(y)))
    torch.set_rng_state(state)
    assert len(fold(model, x)[1].touched) == 1
    assert torch.equal(x, X)
    assert torch.equal(torch.get_rng_state(), state)


def test_rounding_that_is_magnified_is_no_error():
    _, report = fold(settled(Sequel(lambda _, y: (y * 1e5).sin())), X)
    assert report.change > 1e-5
    assert len(report.touched) == 1


@pytest.mark.parametrize("factor", [1.001, float("nan")])
def test_a_norm_without_which_the_model_is_another_is_left(factor):
    model = settled(Sequel(lambda own, y: y if isinstance(own.norm, nn.BatchNorm2d) else y * factor))
    folded, report = fold(model, X.clone())
    assert report.rows[0].became is None
    assert "the model's output is another" in report.rows[0].note
    assert report.change == 0
    assert torch.equal(output(folded, X.clone()), output(model, X.clone()))


class UnderAutocast(nn.Sequential):
    """Runs in bfloat16 with parameters in float32."""

    def forward(self, input):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return super().forward(input).float()


def test_a_model_that_runs_under_autocast_of_its_own_is_folded():
    model = settled(UnderAutocast(nn.Conv2d(3, 4, 3), BatchNorm2d(4, activation="relu"), nn.Conv2d(4, 2, 3)))
    folded, report = fold(model, X)
    assert [row.became for row in report] == ["torch ReLU"]
    expected = output(nn.Sequential(*model), X)  # in float32
    assert (output(folded, X) - expected).abs().max() <= 0.02 * expected.abs().max()
    assert 0 < report.change < 0.02


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_norms_after_padding_of_every_mode_are_folded(mode):
    model = settled(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, padding_mode=mode), nn.BatchNorm2d(4)))
    folded, report = fold(model, X)
    assert [row.became for row in report] == ["torch Identity"]
    torch.testing.assert_close(output(folded, X), output(model, X))


def test_nothing_is_folded_on_inputs_without_values():
    (row,) = fold(settled(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))), X[:0]).report
    assert row.became is None
    assert "nothing could be compared" in row.note
