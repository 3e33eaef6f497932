"""Sync batch norm on several ranks equals batch norm of the whole batch in one process, in float64.

The tests start this file as a script, once for each of three ranks that talk over gloo; what each rank computed comes
back in a file, and is compared here.
"""

import copy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from normlab.errors import InputError
from normlab.kernels import autograd, cpu, launch
from normlab.nn.sync import SyncBatchNorm1d, SyncBatchNorm2d, SyncBatchNorm3d, moments_over_ranks
from ranks import run_ranks

RANKS = 3
CHANNELS = 3
MOMENTUM, EPS = 0.3, 1e-3
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 3e-3, torch.bfloat16: 2e-2}


class Case(NamedTuple):
    """Steps over batches of `(N, CHANNELS, *space)`: `parts[step][rank]` images for each rank."""

    parts: Sequence[tuple[int, ...]] = ((5, 1, 3), (2, 4, 2))
    space: tuple[int, ...] = (4, 5)
    dtype: torch.dtype = torch.float32
    layout: str = "contiguous"
    mean: float = 1.0
    deviation: float = 3.0
    poison: tuple[int, int, float] | None = None  # step, image of the whole batch, value
    how: str = "plain"
    affine: bool = True


CASES = {
    "maps": Case(),
    "no space": Case(space=()),
    "sequences": Case(space=(4,)),
    "volumes": Case(space=(2, 3, 2)),
    "an empty rank": Case([(4, 0, 5), (0, 3, 3)]),
    "all ranks but one empty": Case([(0, 4, 0), (2, 0, 0)]),
    "one image a rank": Case([(1, 1, 1)] * 3),
    "1×1 maps": Case([(1, 1, 0), (1, 2, 1)], space=(1, 1)),
    "one value in all": Case([(2, 1, 1), (0, 1, 0)], space=(1, 1)),
    "one value in all, bfloat16": Case([(0, 1, 0), (1, 0, 0)], space=(1, 1), dtype=torch.bfloat16),
    "few values, bfloat16": Case([(1, 1, 0), (1, 0, 1)], space=(1, 1), dtype=torch.bfloat16),
    "empty on all ranks": Case([(2, 2, 2), (0, 0, 0), (1, 3, 1)]),
    "permuted": Case(layout="permuted"),
    "channels last": Case(layout="channels last"),
    "channels last, an empty rank": Case([(4, 0, 5)], layout="channels last"),
    "strided": Case(layout="strided"),
    "float64": Case(dtype=torch.float64),
    "float16": Case(dtype=torch.float16),
    "bfloat16": Case(dtype=torch.bfloat16),
    "mean 1000": Case([(9, 4, 7), (5, 0, 5)], mean=1000, deviation=0.1),
    "without affine": Case(affine=False),
    "a rank has an inf": Case([(3, 2, 2)] * 3, poison=(1, 4, float("inf"))),
    "a rank has a NaN": Case([(3, 2, 2)] * 3, poison=(1, 0, float("nan"))),
    "checkpoint": Case(how="checkpoint"),
    "reentrant checkpoint": Case(how="reentrant checkpoint"),
    "compiled": Case([(3, 2, 2)], how="compiled"),
}
LAYOUTS = {
    "contiguous": lambda x: x.contiguous(),
    "channels last": lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1),
    "permuted": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
    "strided": lambda x: x.repeat_interleave(2, -1)[..., ::2],
}


def batches(case: Case) -> list[tuple[Tensor, Tensor]]:
    """The whole batches, and the gradients of their outputs."""
    generator = torch.Generator().manual_seed(0)
    steps = []
    for step, parts in enumerate(case.parts):
        shape = (sum(parts), CHANNELS, *case.space)
        x = torch.randn(shape, generator=generator) * case.deviation + case.mean
        if case.poison is not None and case.poison[0] == step:
            x[case.poison[1], 0] = case.poison[2]
        steps.append((x.to(case.dtype), torch.randn(shape, generator=generator).to(case.dtype)))
    return steps


def parameters(case: Case) -> list[Tensor]:
    return [torch.tensor([1.5, -0.5, 2.0]), torch.tensor([0.1, 0.2, -0.3])] if case.affine else []


# --- a rank -----------------------------------------------------------------------------------------------------------


def build(case: Case, group=None) -> SyncBatchNorm2d:
    kind = {0: SyncBatchNorm1d, 1: SyncBatchNorm1d, 2: SyncBatchNorm2d, 3: SyncBatchNorm3d}[len(case.space)]
    dtype = torch.float64 if case.dtype == torch.float64 else None
    layer = kind(CHANNELS, EPS, MOMENTUM, case.affine, dtype=dtype, process_group=group)
    with torch.no_grad():
        for parameter, value in zip(layer.parameters(), parameters(case), strict=True):
            parameter.copy_(value)
    return layer


def train(layer: SyncBatchNorm2d, case: Case, rank: int) -> list[list[Tensor]]:
    """For each step the output, the gradients of the input and of the parameters, and the buffers."""
    calls = {
        "plain": layer,
        "checkpoint": lambda x: checkpoint(layer, x, use_reentrant=False),
        "reentrant checkpoint": lambda x: checkpoint(layer, x, use_reentrant=True),
    }
    call = torch.compile(layer, fullgraph=True, backend="aot_eager") if case.how == "compiled" else calls[case.how]
    steps = []
    for (x, grad), parts in zip(batches(case), case.parts, strict=True):
        layer.zero_grad()
        own = LAYOUTS[case.layout](x.split(parts)[rank]).detach().requires_grad_()
        y = call(own)
        y.backward(grad.split(parts)[rank])
        gradients = [parameter.grad for parameter in layer.parameters()]
        steps.append([y.detach(), own.grad, *gradients, *(getattr(layer, name).clone() for name in STATISTICS)])
    return steps


def train_distributed_data_parallel(rank: int) -> list[Tensor]:
    """The gradients of the mean loss of a net of two sync batch norms, on uneven parts of a batch."""
    x, net, parts = *whole_net(), (4, 0, 2)
    parallel = DistributedDataParallel(net)
    loss = parallel(x.split(parts)[rank]).pow(2).sum() * RANKS / len(x)
    loss.backward()
    return [parameter.grad for parameter in net.parameters()] + list(net.buffers())


def whole_net() -> tuple[Tensor, nn.Module]:
    torch.manual_seed(0)
    x = torch.randn(6, 2, 5, 5)
    net = nn.Sequential(nn.Conv2d(2, 4, 3), SyncBatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 3), SyncBatchNorm2d(3))
    return x, net


def work(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    results = {name: train(build(case), case, rank) for name, case in CASES.items()}
    results["data parallel"] = train_distributed_data_parallel(rank)

    pair, alone = dist.new_group([0, 1]), [dist.new_group([other]) for other in range(RANKS)][rank]
    case = Case([(5, 2), (1, 4)])
    if rank < 2:
        results["two ranks"] = train(copy.deepcopy(build(case, pair)), case, rank)
    case = Case([(4,)])
    results["one rank"] = train(build(case, alone), case, 0)

    layer = build(Case()).eval()
    results["evaluation"] = layer(torch.ones(rank, CHANNELS, 2, 2))  # nothing is exchanged, or shapes would clash
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


# --- the tests --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    """What each rank computed."""
    return run_ranks(__file__, RANKS, tmp_path_factory.mktemp("ranks"))


def whole_batch(case: Case) -> list[list[Tensor]]:
    """What `train` of the whole batch in one process gives, from the formula, in float64."""
    mean, var, seen = torch.zeros(CHANNELS).double(), torch.ones(CHANNELS).double(), 0
    steps = []
    for x, grad in batches(case):
        x = x.double().requires_grad_()
        weights = [value.double().requires_grad_() for value in parameters(case)]
        channels = []
        for c in range(CHANNELS):
            values = x[:, c]
            m = values.sum() / values.numel()
            v = ((values - m) ** 2).sum() / values.numel()
            if values.numel() and x.isfinite().all():
                mean[c] += MOMENTUM * (m.detach() - mean[c])
            if values.numel() > 1 and x.isfinite().all():
                n = values.numel()
                var[c] += MOMENTUM * (v.detach() * n / (n - 1) - var[c])
            x_hat = (values - m) / (v + EPS).sqrt()
            channels.append(weights[0][c] * x_hat + weights[1][c] if weights else x_hat)
        seen += int(len(x) > 0 and bool(x.isfinite().all()))
        y = torch.stack(channels, 1)
        y.backward(grad.double())
        gradients = [weight.grad for weight in weights]
        steps.append([y.detach(), x.grad, *gradients, mean.clone(), var.clone(), torch.tensor(seen)])
    return steps


def assert_equal_whole(case: Case, of_ranks: list[list[list[Tensor]]]) -> None:
    for step, expected in enumerate(whole_batch(case)):
        actual = [steps[step] for steps in of_ranks]
        for i, whole in enumerate(expected):
            values = [one[i] for one in actual]
            if i < 2:  # outputs and input gradients: the parts of the batch
                assert all(value.dtype == case.dtype for value in values)
                value, tolerance = torch.cat(values), TOLERANCE[case.dtype]
            elif i < len(expected) - len(STATISTICS):  # parameter gradients add up
                value, tolerance = torch.stack(values).sum(0), TOLERANCE[case.dtype]
            else:  # buffers are the same on every rank
                assert all(torch.equal(one, values[0]) for one in values)
                value, tolerance = values[0], 1e-5
            assert torch.equal(value.isfinite(), whole.isfinite())
            error = (value - whole)[whole.isfinite()].abs()
            large = 1 + whole[whole.isfinite()].abs().amax() if error.numel() else 1
            # float32 holds a mean of 1000 to 3e-5, which is 3e-4 deviations of 0.1.
            tolerance = max(tolerance, 1e-6 * case.mean / case.deviation)
            assert not error.numel() or error.max() <= tolerance * large, (step, i)


@pytest.mark.parametrize("name", CASES)
def test_three_ranks_are_one_batch(ranks, name):
    """Outputs, input gradients, sums of parameter gradients, and buffers, over several steps."""
    assert_equal_whole(CASES[name], [rank[name] for rank in ranks])


def test_a_group_of_two_ranks_is_one_batch(ranks):
    """The third rank is no part of it; the layer was copied, group and all."""
    assert_equal_whole(Case([(5, 2), (1, 4)]), [rank["two ranks"] for rank in ranks[:2]])


def test_a_group_of_one_rank_is_batch_norm(ranks):
    for rank in ranks:
        assert_equal_whole(Case([(4,)]), [rank["one rank"]])


def test_evaluation_exchanges_nothing(ranks):
    assert [rank["evaluation"].shape[0] for rank in ranks] == [0, 1, 2]


@pytest.mark.skipif(cpu.kernels is None, reason=cpu.PATH)
def test_an_input_that_wants_no_gradient_exchanges_none():
    """As with an empty batch, which goes another way: else ranks would wait for one another for ever."""
    x, weight = torch.randn(4, CHANNELS, 2, 2), torch.ones(CHANNELS, requires_grad=True)
    moments = *launch.channel_moments(x), torch.tensor(16.0)
    y = autograd.batch_norm_over_ranks(x, moments, weight, None, EPS, lambda _: pytest.fail("exchanged"))
    y.square().sum().backward()
    assert weight.grad.isfinite().all()


def test_distributed_data_parallel_trains_on_the_mean_gradient(ranks):
    """A net of two such layers on uneven parts, one of them empty, has the gradients of the whole batch."""
    x, net = whole_net()
    net(x).pow(2).sum().div(len(x)).backward()
    expected = [parameter.grad for parameter in net.parameters()] + list(net.buffers())
    for rank in ranks:
        for value, whole in zip(rank["data parallel"], expected, strict=True):
            torch.testing.assert_close(value, whole, rtol=1e-4, atol=1e-5)


# --- one process ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.how == "plain"])
def test_one_process_is_batch_norm(name):
    case = CASES[name]
    case = case._replace(parts=[(sum(parts),) for parts in case.parts])
    assert_equal_whole(case, [train(build(case), case, 0)])


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_a_batch_norms_state_loads(dims):
    torchs = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dims - 1](4, momentum=0.2)
    ours = (SyncBatchNorm1d, SyncBatchNorm2d, SyncBatchNorm3d)[dims - 1](4, momentum=0.2)
    ours.load_state_dict(torchs.state_dict())
    x = torch.randn(5, 4, *[3] * dims)
    torch.testing.assert_close(ours(x), torchs(x))
    torch.testing.assert_close(dict(ours.named_buffers()), dict(torchs.named_buffers()))
    torch.testing.assert_close(ours.eval()(x), torchs.eval()(x))


def test_moments_of_one_process():
    mean, var, count = moments_over_ranks(torch.tensor([[[1.0, 3.0]], [[5.0, 7.0]]]))
    assert (mean.tolist(), var.tolist(), count.item()) == ([4.0], [5.0], 4.0)


@pytest.mark.parametrize(
    ("kind", "shape", "accepted"),
    [
        (SyncBatchNorm2d, (2, 4, 3, 3), r"SyncBatchNorm2d\(3\): expected input \(N, 3, H, W\), got \(2, 4, 3, 3\)"),
        (SyncBatchNorm2d, (2, 3, 3), r"expected input \(N, 3, H, W\), got \(2, 3, 3\)"),
        (SyncBatchNorm1d, (2, 3, 3, 3), r"expected input \(N, 3\) or \(N, 3, L\), got \(2, 3, 3, 3\)"),
        (SyncBatchNorm3d, (2, 3, 3, 3), r"expected input \(N, 3, D, H, W\), got \(2, 3, 3, 3\)"),
    ],
)
def test_shapes_that_do_not_fit(kind, shape, accepted):
    with pytest.raises(InputError, match=accepted):
        kind(CHANNELS)(torch.randn(shape))


@pytest.mark.parametrize("options", [{"num_features": 0}, {"momentum": 0}, {"momentum": 1.5}])
def test_arguments_out_of_range(options):
    with pytest.raises(InputError, match=f"{next(iter(options))}="):
        SyncBatchNorm2d(**{"num_features": 3, **options})


if __name__ == "__main__":
    work(int(sys.argv[1]), Path(sys.argv[2]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_value_a_channel_has_no_gradient(dtype):
    """In half precision too: what cancels is multiplied by 1/√eps before it does, and would be 1.4 if rounded then."""
    layer, x = SyncBatchNorm2d(8), (30 * torch.randn(1, 8, 1, 1)).to(dtype).requires_grad_()
    layer(x).backward(torch.randn(1, 8, 1, 1).to(dtype))
    assert x.grad is not None
    assert x.grad.abs().max() < 1e-4
