"""Which modules of a model are meant: by a pattern of their names, a class or a function."""

from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from typing import TypeAlias

from torch import nn

from .errors import check

Choice: TypeAlias = str | type[nn.Module] | Callable[[str, nn.Module], bool]

# What DataParallel, torch.compile, FSDP and activation checkpoints put between the parts of a name.
WRAPPERS = frozenset({"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})


def plain_name(name: str, keep: Iterable[str] = ()) -> str:
    """The name without what wrappers add, but for what to `keep`: `layer4.0` for `module.layer4.0`."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS or part in keep)


def is_meant(module: nn.Module, names: Iterable[str], only: Choice | Iterable[Choice]) -> bool:
    """Whether a choice, by name's pattern (`layer4.*`), class or function of name and module, is met at any name.

    Functions and patterns see names as `plain_name` has them. What a pattern itself has of a wrapper, such as the
    first part of `module.layer4.*`, is kept for it.

    Raises:
        InputError: it is none of these.
    """
    names = list(names)
    if isinstance(only, str):
        return any(fnmatchcase(plain_name(name, keep=only.split(".")), only) for name in names)
    if isinstance(only, type):
        return isinstance(module, only)
    if callable(only):
        return any(only(plain_name(name), module) for name in names)
    check(isinstance(only, Iterable), "only", only, "a pattern of names, a class, a function, or several of them")
    return any(is_meant(module, names, one) for one in only)
