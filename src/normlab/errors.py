"""Error messages shared by every room: each names the argument, its value and what is accepted."""

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """A value given by the user that cannot be used; the command line prints it without a traceback."""


def unknown(argument: str, value: object, accepted: Iterable[str]) -> InputError:
    """The error for a name that is not among `accepted`, with the nearest match."""
    names = list(accepted)
    lower = {name.lower(): name for name in names}
    near = difflib.get_close_matches(str(value).lower(), lower, n=1, cutoff=0.5)
    hint = f" Did you mean {lower[near[0]]!r}?" if near else ""
    return InputError(f"{argument}={value!r} is unknown.{hint} Accepted: {', '.join(names)}.")


def check(condition: bool, argument: str, value: object, accepted: str) -> None:
    """Raise an InputError that names `argument`, its `value` and what is `accepted` unless `condition` holds."""
    if not condition:
        raise InputError(f"{argument}={value!r} is not usable. Accepted: {accepted}.")
