"""An exception or Ctrl-C at any point of any verb leaves the model as it was: tried at every call of a module."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode

from normlab import convert, diagnose, fold, freeze, recalibrate, sync, unfreeze, unsync
from normlab.errors import InputError
from normlab.nn import BatchNorm2d, FrozenBatchNorm2d, RunningBatchNorm2d, SyncBatchNorm2d
from surgery.laws import HOOKS, Photo, looks
from surgery.trees import OURS, Beside, Branches, FrozenStatistics, Residual, Twice, everything, watching

POINTS = 12  # at which each verb fails, spread over its run
BATCHES = [torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]


class Stopped(Exception):
    """Raised by a test, and by nothing else."""


def net() -> nn.Module:
    """Every way to hold a norm, modes and gradient switches of all kinds, hooks, dropout."""
    torch.manual_seed(0)
    conv = partial(nn.Conv2d, 3, 3, 3, padding=1)
    shared = nn.Sequential(conv(), nn.BatchNorm2d(3, momentum=0.03))
    model = nn.Sequential(
        conv(), nn.BatchNorm2d(3), nn.ReLU(inplace=True),
        Residual(nn.Sequential(conv(bias=False), BatchNorm2d(3, activation="relu"))),
        Twice(shared), conv(), RunningBatchNorm2d(3), nn.Dropout(0.1),
        Branches([nn.Sequential(conv(), SyncBatchNorm2d(3)), nn.Sequential(conv(), FrozenBatchNorm2d(3))], named=True),
        Beside([nn.Sequential(conv(), nn.BatchNorm2d(3)), shared], "list", registers=True),
        Beside([nn.BatchNorm2d(3)], "dict", registers=False),
        conv(), FrozenStatistics(3), nn.GroupNorm(1, 3),
        nn.Flatten(), nn.Linear(75, 4), nn.BatchNorm1d(4),
    )  # fmt: skip
    for x in BATCHES:
        model(x)
    for index, module in enumerate(everything(model).values()):
        module.training = index % 3 != 0
    for index, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(index % 4 != 0)
    model[1].register_forward_hook(watching)
    model[3].inner[1].register_forward_pre_hook(watching)
    return model


VERBS: dict[str, Callable[..., Any]] = {
    "convert": convert,
    "convert to group": partial(convert, to="group"),
    "convert, measured": partial(convert, to="running", batches=BATCHES),
    "convert, fitted": partial(convert, to="instance", batches=BATCHES, fit=True),
    "freeze": freeze,
    "unfreeze": unfreeze,
    "sync": sync,
    "unsync": unsync,
    "fold": lambda model, inplace: fold(model, BATCHES[0], inplace=inplace),
    "recalibrate": lambda model, inplace: recalibrate(model, BATCHES),
    "diagnose": lambda model, inplace: diagnose(model, BATCHES),
}
RUN_THE_MODEL = ("convert, measured", "convert, fitted", "fold", "recalibrate", "diagnose")


class Failing(TorchFunctionMode):
    """Raises at the call of so many modules, or at so many of torch's functions inside modules."""

    def __init__(self, error: type[BaseException], at: int, functions: bool):
        super().__init__()
        self._error, self._at, self._functions = error, at, functions
        self.calls = self._depth = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._functions and self._depth:
            self._count()
        return func(*args, **(kwargs or {}))

    def _count(self) -> None:
        self.calls += 1
        if self.calls == self._at:
            raise self._error

    def _begins(self, *_: Any) -> None:
        self._depth += 1
        if not self._functions:
            self._count()

    def _ends(self, *_: Any) -> None:
        self._depth -= 1

    @contextmanager
    def inside(self) -> Iterator["Failing"]:
        handles = register_module_forward_pre_hook(self._begins), register_module_forward_hook(self._ends)
        try:
            with self:
                yield self
        finally:
            for handle in handles:
                handle.remove()


def fails(verb: str, model: nn.Module, inplace: bool, error: type[BaseException], at: int, functions: bool) -> int:
    """Runs a verb that is to fail at a call; how many calls there were."""
    with Failing(error, at, functions).inside() as failing:
        if at == 0:
            VERBS[verb](model, inplace=inplace)
        else:
            with pytest.raises(error):
                VERBS[verb](model, inplace=inplace)
    return failing.calls


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("error", [Stopped, KeyboardInterrupt])
@pytest.mark.parametrize("verb", RUN_THE_MODEL)
def test_a_failure_at_any_call_of_a_module_leaves_the_model_as_it_was(verb, error, inplace):
    calls = fails(verb, net(), inplace, error, 0, functions=False)
    assert calls > 20
    model = net()
    photo = Photo(model)
    for at in range(1, calls + 1, max(1, calls // POINTS)):
        fails(verb, model, inplace, error, at, functions=False)
        photo.check_same(f"{verb}, {at}")


@pytest.mark.parametrize("verb", RUN_THE_MODEL)
def test_so_does_one_at_a_function_inside_a_module(verb):
    calls = fails(verb, net(), True, KeyboardInterrupt, 0, functions=True)
    model = net()
    photo = Photo(model)
    for at in range(1, calls + 1, max(1, calls // POINTS)):
        fails(verb, model, True, KeyboardInterrupt, at, functions=True)
        photo.check_same(f"{verb}, {at}")


def stopping(number: int) -> Iterator[Tensor]:
    yield from BATCHES[:number]
    raise Stopped


@pytest.mark.parametrize("number", [0, 1, 2])
@pytest.mark.parametrize("inplace", [False, True])
def test_so_do_batches_that_end_in_an_exception(number, inplace):
    model = net()
    photo = Photo(model)
    for verb in (
        partial(convert, batches=stopping(number), inplace=inplace),
        partial(convert, to="instance", batches=stopping(number), fit=True, inplace=inplace),
        partial(recalibrate, batches=stopping(number)),
        partial(diagnose, batches=stopping(number)),
    ):
        with pytest.raises(Stopped):
            verb(model)
        photo.check_same(str(verb))


@pytest.mark.parametrize("inplace", [False, True])
def test_so_does_a_refusal(inplace):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    groups = [list(group["params"]) for group in optimizer.param_groups]
    photo = Photo(model)
    for verb in (
        partial(convert, to="no such norm"),
        partial(convert, only="no such name"),
        partial(convert, batches=[]),
        partial(convert, batches=[torch.full((2, 3, 5, 5), torch.nan)], skip="no such name"),
        partial(freeze, only="no such name"),
        partial(sync, skip="no such name"),
    ):
        with pytest.raises(InputError):
            verb(model, inplace=inplace)
        photo.check_same(str(verb))
    assert [list(map(id, group["params"])) for group in optimizer.param_groups] == [list(map(id, g)) for g in groups]


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("error", [Stopped, KeyboardInterrupt])
def test_the_optimizer_is_as_it_was_after_a_failure(error, inplace):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    before = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    calls = 0

    def forward(model: nn.Module, batch: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls > len(BATCHES) + 1:  # when the new norms are in their places
            raise error
        return model(batch)

    options = {"optimizer": optimizer} if inplace else {}
    with pytest.raises(error):
        convert(model, "evonorm_s0", batches=BATCHES, forward=forward, inplace=inplace, **options)
    assert [id(parameter) for group in optimizer.param_groups for parameter in group["params"]] == before


# --- after success ----------------------------------------------------------------------------------------------------

ARGUMENTS = {
    "": {}, "measured": {"batches": BATCHES}, "fitted": {"batches": BATCHES, "fit": True},
    "only": {"only": "1"}, "skip": {"skip": nn.BatchNorm2d},
}  # fmt: skip


def check_left_as_it_was(photo: Photo, model: nn.Module, modes: bool = True) -> None:
    """Modes, gradient switches and hooks, at every place; of new norms the switches of what they share."""
    now = everything(model)
    for path, was in photo.looks.items():
        if path in now:
            found = looks(now[path])
            assert not modes or found["training"] == was["training"], path
            assert all(found["learns"].get(name, learns) == learns for name, learns in was["learns"].items()), path
            if not isinstance(now[path], nn.Identity):
                assert [found.get(key) for key in HOOKS] == [was.get(key) for key in HOOKS], path


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("arguments", ARGUMENTS)
@pytest.mark.parametrize("to", [*OURS, "torch"])
def test_convert_leaves_modes_switches_hooks_and_random_numbers(to, arguments, inplace):
    model = net()
    photo = Photo(model)
    operation = convert(model, to, inplace=inplace, **ARGUMENTS[arguments])
    assert photo.numbers == Photo(model).numbers
    check_left_as_it_was(photo, operation.model)
    operation.undo()
    photo.check_like(operation.model, "undone")
    photo.check_same("the model")


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("verb", [verb for verb in VERBS if not verb.startswith("convert")])
def test_so_does_every_other_verb(verb, inplace):
    model = net()
    photo = Photo(model)
    result = VERBS[verb](model, inplace=inplace)
    assert photo.numbers == Photo(model).numbers
    if verb == "diagnose":
        photo.check_same(verb)
        return
    learns = verb in ("freeze", "unfreeze")  # what they are for
    if not learns:
        check_left_as_it_was(photo, result.model, modes=verb != "fold")
    result.undo()
    photo.check_like(result.model, "undone")
    photo.check_same("the model")
