"""Error messages name the argument, its value and what is accepted."""

import numpy as np
import pytest

from normlab.errors import InputError, check, check_no_class, is_real, is_whole, unknown


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


def test_check_tells_the_cure():
    with pytest.raises(InputError, match=r"^norms='batch' is not usable. Accepted: a list. Write norms=\['batch'\]\.$"):
        check(False, "norms", "batch", "a list", "Write norms=['batch'].")


def test_a_class_is_no_instance():
    check_no_class("optimizer", dict())
    with pytest.raises(InputError, match=r"^made: expected an instance, got the class dict. Write dict\(a=1\)\.$"):
        check_no_class("made", dict, "a=1")


@pytest.mark.parametrize(
    ("value", "whole", "real"),
    [(1, True, True), (np.int64(1), True, True), (1.0, False, True), (np.float32(1), False, True), (True, False, False),
     ("1", False, False), (None, False, False), (0, False, True)],
)  # fmt: skip
def test_numbers_are_told_from_what_is_none(value, whole, real):
    assert is_whole(value, 1) is whole
    assert is_real(value) is real
