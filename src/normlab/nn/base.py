"""What every norm with running statistics does alike: what it accepts, and how its buffers are kept."""

from collections.abc import Callable
from contextlib import nullcontext
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.nn.modules.batchnorm import _NormBase

from ..errors import InputError, check
from ..kernels import launch, library, policy
from ..kernels.autograd import Statistics
from . import functional as F
from .call import call, for_script, refuse, refuse_shape

# Of `torch.jit.trace`, to which a comparison of sizes would be a constant.
_traced = torch._C._get_tracing_state


def is_tracing() -> bool:
    """Whether `torch.jit.trace` looks on."""
    return _traced() is not None


def remember(*updates: tuple[Tensor, Tensor]) -> None:
    """Write new statistics `(buffer, value)` into their buffers: all of them, or none.

    None of them if any value is infinite or NaN: such a batch would spoil the buffers for good. None either while a
    checkpoint runs the forward pass a second time: the statistics of this batch are in already.
    """
    if recomputing():
        return
    values = [value.detach().to(buffer.dtype) for buffer, value in updates]
    finite = torch.cat([value.flatten() for value in values if value.is_floating_point()]).isfinite().all()
    for (buffer, _), value in zip(updates, values, strict=True):
        # Through a view: a compiler loses what is written to a float64 tensor without dimensions.
        buffer.unsqueeze(0).copy_(torch.where(finite, value, buffer))


def is_fresh(state: dict[str, Any], prefix: str = "") -> bool:
    """Whether the statistics in a state were never updated: means 0, variances 1, and no batch counted.

    A count of 0 alone says nothing: old checkpoints of torch have none, and torch then counts from 0.
    """
    mean, var, batches = (state.get(prefix + name) for name in ("running_mean", "running_var", "num_batches_tracked"))
    there = [part for part in (mean, var, batches) if part is not None]
    if var is None or any(part.is_meta or isinstance(part, FakeTensor) for part in there):
        return False
    return not any(part is not None and part.any() for part in (mean, batches)) and bool((var == 1).all())


def settle(*constants: Tensor) -> tuple[Tensor, ...]:
    """The same tensors, for a backward pass that needs what was computed from buffers before they were written.

    A compiler may compute such a tensor a second time in the backward pass, from buffers that hold other values by
    then; it does not see into the operator that they go through here.
    """
    return tuple(_settle(constant) for constant in constants) if torch.compiler.is_compiling() else constants


@torch.library.custom_op("normlab::settle", mutates_args=())
def _settle(constant: Tensor) -> Tensor:
    return constant.clone()


@_settle.register_fake
def _(constant: Tensor) -> Tensor:
    return torch.empty_like(constant)


def recomputing() -> bool:
    """Whether this forward pass runs inside a backward pass, as an activation checkpoint does.

    Compiled code is not told: a checkpoint around a compiled layer enters its batch twice.
    """
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


class NoState(NamedTuple):
    """The buffers of a norm of each image by itself."""


class Parts(NamedTuple):
    """What a norm hands to the kernels.

    Attributes:
        weight: γ, (C,), or None for 1.
        bias: β, (C,), or None for 0.
        state: the buffers, by name.
    """

    weight: Tensor | None
    bias: Tensor | None
    state: Any


class OnKernels(nn.Module):
    """A norm that the kernels can compute: it remembers that they take its parameters and buffers.

    To look at each of these takes longer than the kernels do on a small tensor. Theirs on a CPU look again, and raise.
    """

    __jit_ignored_attributes__ = ("_known", "_scripted")  # TorchScript has no type for them
    weight: nn.Parameter | None
    bias: nn.Parameter | None
    _scripted: Any = None  # `forward` for TorchScript, of those that have one
    _known: tuple[tuple[Tensor | None, ...], Parts] | None = None  # what was looked at, on a CPU
    _checks_memory = False  # whether `_normalize` does, where it leaves the kernels; else it is done before
    _state_type: Any = NoState  # the buffers that the kernels need, first of the module's

    @for_script
    def forward(self, input: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """The norm of `input`, (N, C, *space).

        Args:
            input: as the class says.
            mask: (N, *space), bool, where the values are that count: statistics are theirs alone. None for all.

        Raises:
            InputError: the input or the mask is of another shape.
        """
        return call(self, input, mask)

    def _normalize(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """What `forward` computes, of a plain tensor; with `mask`, (N, 1, *space), if there is one."""
        raise NotImplementedError

    def __prepare_scriptable__(self) -> "OnKernels":
        kind = type(self).__name__
        if self._scripted is None:
            raise InputError(f"{kind} has no form for torch.jit.script. Use torch.jit.trace or torch.export.")
        return self

    def _parts_for_kernels(self, x: Tensor, use: Callable[[Tensor], bool], residual: Tensor | None = None) -> Any:
        """Its `Parts`, if the kernels are to compute the norm of `x`; else None.

        Args:
            x: the input.
            use: whether they are quicker, one of `policy`: for what they are used.
            residual: what is added to the norm.
        """
        if not use(x) or (residual is not None and not policy.takes_residual(x, residual)):
            return None
        remembers = x.is_cpu and not torch.compiler.is_compiling()
        if remembers and self._known is not None:
            own, parts = self._known
            now = (*self._parameters.values(), *self._buffers.values())
            if len(now) == len(own) and all(map(is_, now, own)):
                for part in own[: len(self._parameters)]:  # another tensor may have been put into its `data`
                    if part is not None and not (part.dtype is torch.float32 and part.is_contiguous()):
                        return None
                return parts if policy.in_memory(x) else None
        own = self.weight, self.bias, *self._buffers.values()
        names = self._state_type._fields
        if tuple(self._buffers)[: len(names)] != names or not policy.takes(x, *own):
            return None
        parts = Parts(self.weight, self.bias, self._state_type._make(own[2 : 2 + len(names)]))
        if remembers and library.COMPILED and {"weight", "bias"} <= self._parameters.keys():  # else they are computed
            self._known = (*self._parameters.values(), *self._buffers.values()), parts
        return parts

    def _check_memory(self, x: Tensor, residual: Tensor | None = None) -> None:
        """Raises a RuntimeError if storage that torch's operators are to read was freed."""
        own = (*self._parameters.items(), *self._buffers.items())
        launch.check_memory((("input", x), ("residual", residual), *own))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "OnKernels":
        self._known = None  # parameters may become others and stay the same objects
        return super()._apply(fn, recurse)


class PreciseStatistics(OnKernels):
    """A module whose buffers stay in float32 at least, also when it is cast to half precision."""

    _state_type = Statistics

    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None
    track_running_stats: bool
    momentum: float | None

    def _keep(self, *updates: tuple[Tensor, Tensor]) -> None:
        """Write statistics, see `remember`, unless `track_running_stats` is off, as it may be for a while."""
        if self.track_running_stats:
            remember(*updates)

    def _kept_already(self) -> bool:
        """Whether this pass is a checkpoint's second one, so that the statistics have its batch in them."""
        return self.track_running_stats and recomputing()

    def _share(self) -> float | Tensor:
        """The weight of a new batch in averages: `momentum`, or for None that which makes them means of all batches."""
        if self.momentum is None and self.num_batches_tracked is not None:
            return (self.num_batches_tracked + 1).reciprocal()
        return 0.0 if self.momentum is None else self.momentum

    def _average(self, mean: Tensor, var: Tensor, count: Tensor) -> None:
        """Move the running statistics towards `mean` and the unbiased variance of `count` values a channel, 0-d."""
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        unbiased = var * (count / (count - 1).clamp(min=1))
        share = self._share()
        self._keep(
            (self.running_mean, self.running_mean + share * (count > 0) * (mean - self.running_mean)),
            (self.running_var, self.running_var + share * (count > 1) * (unbiased - self.running_var)),
            (self.num_batches_tracked, self.num_batches_tracked + (count > 0)),
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PreciseStatistics":
        statistics = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)
        for name, before in statistics.items():
            after = self._buffers[name]
            if after is not None and after.dtype in (torch.float16, torch.bfloat16):
                self._buffers[name] = before.to(after.device, torch.float32)
        return self

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args, **kwargs)
        like = self.running_var
        if local_metadata.get("assign_to_params_buffers") and like is not None:
            dtype = torch.promote_types(like.dtype, torch.float32)
            for name, part in self._buffers.items():
                if part is not None:
                    self._buffers[name] = part.to(like.device, dtype if part.is_floating_point() else part.dtype)


class RunningStatistics(PreciseStatistics, _NormBase):
    """The template of a norm of (N, C, *space) with running statistics.

    It has torch's `running_mean`, `running_var` and `num_batches_tracked`. A norm writes its formula, `in_training`,
    and `in_evaluation` if that is not by mean and variance alone. It declares what else it remembers in `first_state`,
    and what else it learns in `first_parameters`. Options that these two read are set before the base is constructed.

    The base checks the shape of an input, knows the modes, resets, copies, loads and casts. Statistics stay in float32
    at least, also when the module is cast to half precision. With `track_running_stats` switched off a batch in
    training changes no statistics, and the output is that of training all the same.

    An activation checkpoint runs a layer again with the statistics as its last call left them. So a layer that was
    called several times before the backward pass, in a checkpoint each time, has another gradient than without.

    Args:
        num_features: C.
        eps: added to the variance.
        momentum: weight of a new batch in the running statistics, above 0, to 1; or None, where it `averages`, for
            the mean of all batches.
        affine: learn γ and β.
        track_running_stats: keep statistics. Without, evaluation is as training; most norms need theirs.
        device: the device of parameters and statistics.
        dtype: the type of the parameters.
        bias: learn β.

    Raises:
        InputError: an argument or the shape of an input is out of range.
    """

    __jit_ignored_attributes__ = ("_known", "_scripted", "_of_last_batch")  # TorchScript has no type for them
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    accepted_dims: tuple[int, ...] = (4,)  # of a tensor
    averages = False  # whether `momentum` is what it is in torch's batch norm
    needs_statistics = True
    of_gradients: tuple[str, ...] = ()  # buffers that are averages of gradients
    _of_last_batch: Any = None  # see `once`

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
    ):
        check(num_features >= 1, "num_features", num_features, "a whole number from 1")
        if not (momentum is None and self.averages):
            usable = momentum is not None and 0 < momentum <= 1
            check(usable, "momentum", momentum, "a number above 0, to 1")
        if self.needs_statistics:
            tracks = "True: this norm needs its statistics. Switch it off for a while later, by the attribute"
            check(track_running_stats, "track_running_stats", track_running_stats, tracks)
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, bias=bias)
        with nullcontext() if device is None else torch.device(device):
            for name, (size, start) in self.first_parameters().items():
                self.register_parameter(name, nn.Parameter(torch.full((size,), start)))
            for name, value in self.first_state().items() if track_running_stats else ():
                self.register_buffer(name, value)
        if dtype is not None:
            self.to(dtype)

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        own = cls.__dict__
        if "in_evaluation" in own and "_scripted" not in own:
            setattr(cls, "_scripted", None)  # noqa: B010 - the base's would compute something else

    def first_state(self) -> dict[str, Tensor]:
        """The buffers beside torch's, as they are before any batch."""
        return {}

    def settled_state(self) -> dict[str, Tensor]:
        """What of `first_state` is different once the state of a trained batch norm was loaded."""
        return {}

    def first_parameters(self) -> dict[str, tuple[int, float]]:
        """What is learned beside γ and β: how many numbers, and the value of each at first."""
        return {}

    def in_training(self, x: Tensor, mask: Tensor | None, *residual: Tensor | None) -> Tensor:
        """The norm of a batch by its own statistics, which enter the running ones.

        Args:
            x: (N, C, *space), not empty.
            mask: (N, 1, *space), True where a value counts; None for all.
            residual: what to add, of a norm whose `forward` takes one.
        """
        raise NotImplementedError

    def in_evaluation(self, x: Tensor, mask: Tensor | None, *residual: Tensor | None) -> Tensor:
        """The norm of a batch by the running statistics. The batch may be empty; see `in_training`."""
        mean, var = F.unless_none((self.running_mean, self.running_var), x)
        return F.normalize(x, mean, var, self.weight, self.bias, self.eps)

    def _normalize(self, x: Tensor, mask: Tensor | None, *residual: Tensor | None) -> Tensor:
        self._check_input_dim(x)
        if self._by_running_ones(x):
            return self.in_evaluation(x, mask, *residual)
        return self.in_training(x, mask, *residual)

    def _by_running_ones(self, x: Tensor) -> bool:
        """Whether a batch is normalised by the running statistics: an empty one has none of its own."""
        return x.numel() == 0 or not (self.training or self.running_var is None)

    def once(self, compute: Callable[[], Any]) -> Any:
        """What `compute` returns, or in a checkpoint's second pass over a batch, what it returned in the first."""
        if self._of_last_batch is None or not recomputing():
            self._of_last_batch = compute()
        return self._of_last_batch

    def _own(self, *buffers: Tensor) -> tuple[Tensor, ...]:
        """Buffers that a backward pass writes, or copies of them while nothing is to be tracked."""
        return buffers if self.track_running_stats else tuple(buffer.clone() for buffer in buffers)

    def remember_moments(self, mean: Tensor, var: Tensor, n: int | Tensor) -> None:
        """Moves the running statistics towards the mean and biased variance of `n` values a channel; see `averaged`."""
        kept = self.running_mean, self.running_var
        if kept[1] is None:
            return
        values = averaged(kept, (mean.detach().flatten(), var.detach().flatten()), n, self._share())
        updates = [(buffer, value) for buffer, value in zip(kept, values, strict=True) if buffer is not None]
        self._keep(*updates, (self.num_batches_tracked, self.num_batches_tracked + (n > 0)))

    def rescale_gradients(self, factor: float) -> None:
        """Call it when all gradients are `factor` times as large from now on, as when a loss scale changes."""
        for name in self.of_gradients:
            self.get_buffer(name).mul_(factor)

    def reset_running_stats(self) -> None:
        """Forget every batch."""
        super().reset_running_stats()
        with torch.device("cpu"):
            for name, value in self.first_state().items():
                if name in self._buffers:  # torch's constructor resets before it is there
                    self.get_buffer(name).copy_(value)

    def reset_parameters(self) -> None:
        """Forget every batch, and set what is learned to what it was at first."""
        super().reset_parameters()
        for name, (_, start) in self.first_parameters().items():
            if name in self._parameters:  # torch's constructor resets before it is there
                nn.init.constant_(self.get_parameter(name), start)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        if prefix + "running_mean" in state_dict:  # a batch norm's state lacks the rest
            settled = {} if is_fresh(state_dict, prefix) else self.settled_state()
            for name, value in (self.first_state() | settled).items():
                state_dict.setdefault(prefix + name, value)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        # A copy has no pass to run again.
        return {name: value for name, value in super().__getstate__().items() if name != "_of_last_batch"}

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() not in self.accepted_dims or not (is_tracing() or input.shape[1] == self.num_features):
            refuse_shape(self, input, self.num_features, self.accepted_dims)
        if self.needs_statistics and self._buffers.get("running_mean", input) is None:
            cure = " Only those of a batch norm may be missing: convert it to one."
            refuse(self, "its running statistics", "running_mean=None", cure)

    def _scripted(self, input: Tensor) -> Tensor:
        if self.training:
            raise RuntimeError("This norm is scripted for evaluation: call eval() before.")
        mean, var = self.running_mean, self.running_var
        return nn.functional.batch_norm(input, mean, var, self.weight, self.bias, False, 0.0, self.eps)


def averaged(kept: tuple[Any, Tensor], new: tuple[Tensor, Tensor], n: Any, share: Any) -> tuple[Any, Tensor]:
    """A running mean and variance in which a batch of `n` values a channel has the weight `share`.

    The variance of the batch is biased, the running one is not. One value says nothing of the variance, which then
    stays; none says nothing at all.

    Args:
        kept: μ and σ², (C,); the mean may be None.
        new: those of the batch.
        n: an int or a 0-d tensor.
        share: a number or a 0-d tensor.
    """
    of_mean, of_var = share * (n > 0), share * (n > 1)
    mean = None if kept[0] is None else (1 - of_mean) * kept[0] + of_mean * new[0]
    return mean, (1 - of_var) * kept[1] + of_var * n / F.at_least_one(n - 1) * new[1]
