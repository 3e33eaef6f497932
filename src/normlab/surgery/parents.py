"""Which modules read the statistics of norms that they hold, instead of calling them: by their code."""

from collections.abc import Callable, Iterable, Iterator
from types import CodeType
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from .modules import Found, known_by

READ = {"running_mean", "running_var"}


def reader_of_statistics(model: nn.Module) -> Callable[..., str | None]:
    """A function of a norm that names the class and method which reads statistics, of the modules that hold it.

    With `in_forward` only what `forward` runs counts: the method itself and those of the same object that it calls.
    The code is read, not run. It says that some statistics are read, not whose. Containers of torch's, such as a
    Sequential, have no such code: what holds them is looked at.
    """
    above: dict[nn.Module, list[nn.Module]] = {}
    for module in model.modules():
        for child in module.children():
            above.setdefault(child, []).append(module)

    def reader(found: Found, in_forward: bool = False) -> str | None:
        waiting = [place.holder for place in found.places if isinstance(place.holder, nn.Module)]
        while waiting:
            holder = waiting.pop()
            own = _code(holder.__dict__.get("forward"))  # put on the instance
            if own is not None and READ & set(_names(own)):
                return f"{type(holder).__name__}.forward"
            if type(holder).__module__.startswith("torch.nn.modules"):
                waiting += above.get(holder, [])
            elif known_by(holder) is None:
                method = _reading_method(type(holder), in_forward)
                if method is not None:
                    return f"{type(holder).__name__}.{method}"
        return None

    return reader


def reading_hook(norm: nn.Module, targets: Iterable[type[nn.Module]]) -> str | None:
    """The name of a hook on a norm that reads statistics, where norms of the target classes have none."""
    if any(issubclass(target, _NormBase) for target in targets):
        return None
    for hook in (*norm._forward_hooks.values(), *norm._forward_pre_hooks.values()):
        code = _code(hook)
        if code is not None and READ & set(_names(code)):
            return getattr(hook, "__qualname__", repr(hook))
    return None


_READING: dict[tuple[type, bool], str | None] = {}


def _reading_method(kind: type, in_forward: bool) -> str | None:
    if (kind, in_forward) not in _READING:
        methods = dict(_methods(kind))
        names = _reached("forward", methods) if in_forward else [name for name in methods if name != "__init__"]
        reads = (name for name in names if READ & set(_names(methods[name])))
        _READING[kind, in_forward] = next(reads, None)
    return _READING[kind, in_forward]


def _methods(kind: type) -> Iterator[tuple[str, CodeType]]:
    """The methods of a class and its bases, but for those of `torch.nn.Module` and containers."""
    for base in reversed(kind.__mro__):
        if base.__module__.startswith("torch.nn.modules"):
            continue
        for name, value in vars(base).items():
            if (code := _code(value)) is not None:
                yield name, code


def _code(function: Any) -> CodeType | None:
    """The code of a function or method; None of anything else."""
    code = getattr(getattr(function, "__func__", function), "__code__", None)
    return code if isinstance(code, CodeType) else None


def _reached(name: str, methods: dict[str, CodeType]) -> list[str]:
    found, waiting = [], [name]
    while waiting:
        one = waiting.pop()
        if one in methods and one not in found:
            found.append(one)
            waiting += [other for other in _names(methods[one]) if other in methods]
    return found


def _names(code: CodeType) -> list[str]:
    """Attributes and globals that a function names, with the functions inside it."""
    inner = [name for constant in code.co_consts if isinstance(constant, CodeType) for name in _names(constant)]
    return [*code.co_names, *inner]
