"""Error messages shared by every room: each names the argument, its value and what is accepted."""

import difflib
from collections.abc import Iterable
from numbers import Integral, Real
from typing import TypeGuard


class InputError(ValueError):
    """A value given by the user that cannot be used; the command line prints it without a traceback."""


def unknown(argument: str, value: object, accepted: Iterable[str]) -> InputError:
    """The error for a name that is not among `accepted`, with the nearest match."""
    names = list(accepted)
    lower = {name.lower(): name for name in names}
    near = difflib.get_close_matches(str(value).lower(), lower, n=1, cutoff=0.5)
    hint = f" Did you mean {lower[near[0]]!r}?" if near else ""
    return InputError(f"{argument}={value!r} is unknown.{hint} Accepted: {', '.join(names)}.")


def check(condition: bool, argument: str, value: object, accepted: str, cure: str = "") -> None:
    """Raise an InputError that names `argument`, its `value`, what is `accepted` and the `cure`, unless `condition`."""
    if not condition:
        raise InputError(f"{argument}={value!r} is not usable. Accepted: {accepted}.{cure and ' '}{cure}")


def check_no_class(argument: str, value: object, arguments: str = "") -> None:
    """Raise an InputError that says how to make an instance, with these `arguments`, if `value` is a class."""
    if isinstance(value, type):
        name = value.__name__
        raise InputError(f"{argument}: expected an instance, got the class {name}. Write {name}({arguments}).")


def is_whole(value: object, least: int = 0) -> bool:
    """Whether it is a whole number, at least so large; True and False are none."""
    whole = type(value) is int or (isinstance(value, Integral) and not isinstance(value, bool))
    return whole and int(value) >= least  # pyright: ignore[reportArgumentType]


def is_real(value: object) -> TypeGuard[float]:
    """Whether it is a number; True and False are none."""
    return isinstance(value, Real) and not isinstance(value, bool)
