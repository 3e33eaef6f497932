"""Forward hooks on a list of modules, removed together."""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, overload

from torch import Tensor, nn

HookFunction = Callable[["Hook", nn.Module, Any, Tensor], Any]


class Hook:
    """Calls `f(hook, module, inputs, output)` after each forward of `module`, until `remove()`.

    The function keeps what it gathers as attributes of the hook, `hook.stats` for instance.
    """

    stats: Any

    def __init__(self, module: nn.Module, f: HookFunction):
        self._handle = module.register_forward_hook(partial(f, self))

    def remove(self) -> None:
        """Unhook; a second call does nothing."""
        self._handle.remove()


class Hooks:
    """A hook on each of several modules: a list of `Hook`, and a context manager that removes them.

    Args:
        modules: any iterable of modules, a `Sequential` for instance.
        f: see `Hook`.
    """

    def __init__(self, modules: Iterable[nn.Module], f: HookFunction):
        self.hooks = [Hook(module, f) for module in modules]

    def remove(self) -> None:
        """Remove all hooks."""
        for hook in self.hooks:
            hook.remove()

    def __enter__(self) -> "Hooks":
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    @overload
    def __getitem__(self, index: int) -> Hook: ...
    @overload
    def __getitem__(self, index: slice) -> list[Hook]: ...
    def __getitem__(self, index: int | slice) -> Hook | list[Hook]:
        return self.hooks[index]

    def __delitem__(self, index: int) -> None:
        self.hooks.pop(index).remove()

    def __iter__(self) -> Iterator[Hook]:
        return iter(self.hooks)

    def __len__(self) -> int:
        return len(self.hooks)

    def __repr__(self) -> str:
        return f"Hooks({len(self.hooks)} modules)"
