"""Which modules of a model are meant: by a pattern of their names, a class or a function."""

from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from typing import TypeAlias

from torch import nn

from .errors import check

Choice: TypeAlias = str | type[nn.Module] | Callable[[str, nn.Module], bool]


def is_meant(module: nn.Module, names: Iterable[str], only: Choice | Iterable[Choice]) -> bool:
    """Whether a choice, by name's pattern (`layer4.*`), class or function of name and module, is met at any name.

    Raises:
        InputError: it is none of these.
    """
    names = list(names)
    if isinstance(only, str):
        return any(fnmatchcase(name, only) for name in names)
    if isinstance(only, type):
        return isinstance(module, only)
    if callable(only):
        return any(only(name, module) for name in names)
    check(isinstance(only, Iterable), "only", only, "a pattern of names, a class, a function, or several of them")
    return any(is_meant(module, names, one) for one in only)
