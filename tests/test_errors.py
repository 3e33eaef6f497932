"""Error messages name the argument, its value and what is accepted."""

import pytest

from normlab.errors import InputError, check, unknown


def test_an_input_error_is_a_value_error():
    assert issubclass(InputError, ValueError)


@pytest.mark.parametrize(
    ("value", "hint"),
    [
        ("runing", " Did you mean 'running'?"),
        ("BATCH", " Did you mean 'batch'?"),
        ("xyz", ""),
        (7, ""),
        (None, ""),
    ],
)
def test_unknown_offers_the_nearest(value, hint):
    error = unknown("norm", value, ("batch", "running"))
    assert isinstance(error, InputError)
    assert str(error) == f"norm={value!r} is unknown.{hint} Accepted: batch, running."


def test_unknown_reads_any_iterable_once():
    assert str(unknown("norm", "a", iter(["aa"]))) == "norm='a' is unknown. Did you mean 'aa'? Accepted: aa."


def test_check_passes():
    assert check(True, "bs", 2, "1 or more") is None


def test_check_raises():
    with pytest.raises(InputError) as error:
        check(False, "bs", 0, "1 or more")
    assert str(error.value) == "bs=0 is not usable. Accepted: 1 or more."
