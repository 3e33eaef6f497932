"""Hooks: called after each forward, removed together, also when something fails while they are on."""

import pytest
import torch
from torch import nn

from normlab.observe import Hook, Hooks


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))


def hooked(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) for module in model.modules())


def test_a_hook_hears_module_inputs_and_output_until_it_is_removed():
    calls = []
    module, x = nn.Linear(2, 3), torch.ones(4, 2)
    hook = Hook(module, lambda *heard: calls.append(heard))
    y = module(x)
    assert len(calls) == 1
    assert calls[0][0] is hook
    assert calls[0][1] is module
    assert calls[0][2][0] is x
    assert calls[0][3] is y
    hook.remove()
    hook.remove()
    module(x)
    assert len(calls) == 1
    assert hooked(module) == 0


def test_a_hook_keeps_what_its_function_gathers():
    def gather(hook, module, inputs, output):
        hook.stats = [*getattr(hook, "stats", []), tuple(output.shape)]

    model = net()
    hooks = Hooks(model, gather)
    model(torch.ones(4, 2))
    model(torch.ones(5, 2))
    assert [hook.stats for hook in hooks] == [[(4, 3), (5, 3)], [(4, 3), (5, 3)], [(4, 1), (5, 1)]]


def test_a_hook_may_replace_the_output():
    module = nn.Identity()
    Hook(module, lambda hook, module, inputs, output: output + 1)
    assert module(torch.zeros(())) == 1


def test_hooks_are_a_list():
    model, order = net(), []
    hooks = Hooks(model, lambda hook, *_: order.append(hook))
    model(torch.ones(1, 2))
    assert len(hooks) == 3
    assert list(hooks) == order == hooks[:] == [hooks[0], hooks[1], hooks[-1]]
    assert hooks[:-1] == order[:2]
    assert repr(hooks) == "Hooks(3 modules)"
    with pytest.raises(IndexError):
        hooks[3]


def test_a_deleted_hook_is_removed_from_its_module():
    model = net()
    hooks = Hooks(model, lambda *_: None)
    del hooks[0]
    assert len(hooks) == 2
    assert [len(module._forward_hooks) for module in model] == [0, 1, 1]


@pytest.mark.parametrize("modules", [list, iter, nn.ModuleList, lambda model: (m for m in model)])
def test_any_iterable_of_modules(modules):
    model = net()
    assert len(Hooks(modules(model), lambda *_: None)) == hooked(model) == 3


def test_the_context_removes_them():
    model = net()
    with Hooks(model, lambda *_: None) as hooks:
        assert hooked(model) == 3
        for hook in hooks[:-1]:
            hook.remove()
        assert hooked(model) == 1
    assert hooked(model) == 0


def fails(*_):
    raise ZeroDivisionError


def run(model: nn.Module, hooks: Hooks) -> None:
    with hooks:
        model(torch.ones(1, 2))
        fails()


@pytest.mark.parametrize("f", [fails, lambda *_: None])
def test_the_context_removes_them_after_a_failure_too_and_lets_it_through(f):
    model = net()
    with pytest.raises(ZeroDivisionError):
        run(model, Hooks(model, f))
    assert hooked(model) == 0
    model(torch.ones(1, 2))
