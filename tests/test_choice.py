"""Which modules a choice means, also behind the prefixes of wrappers."""

import pytest
from torch import nn

from normlab.choice import is_meant, plain_name
from normlab.errors import InputError

NORM = nn.BatchNorm2d(2)
PREFIXES = ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "_fsdp_wrapped_module."]


@pytest.mark.parametrize("prefix", PREFIXES)
def test_a_wrapped_model_is_chosen_from_by_the_names_it_has_unwrapped(prefix):
    name = f"{prefix}layer4.0.bn"
    assert plain_name(name) == "layer4.0.bn"
    assert is_meant(NORM, [name], "layer4.*")
    assert is_meant(NORM, [name], lambda name, module: name.startswith("layer4"))
    assert not is_meant(NORM, [name], "layer3.*")
    assert not is_meant(NORM, [name], "[!l]*"), "a pattern of what is left out"
    assert not is_meant(NORM, [name], lambda name, module: not name.startswith("layer4"))


def test_a_part_that_is_wrapped_inside_is_chosen_by_its_plain_name():
    assert is_meant(NORM, ["features.module.0"], "features.0")


def test_a_pattern_with_the_prefix_means_the_whole_name():
    assert is_meant(NORM, ["module.layer4.0"], "module.layer4.*")
    assert is_meant(NORM, ["_orig_mod.module.layer4.0"], "module.layer4.*")
    assert not is_meant(NORM, ["layer4.0"], "module.*"), "a child that is called module, and this one is not in it"


def test_what_is_no_choice_is_refused():
    with pytest.raises(InputError, match="only=3 is not usable"):
        is_meant(NORM, ["0"], 3)  # pyright: ignore[reportArgumentType]
