"""Memory that a kernel forgets to write, or reads before, is seen."""

import pytest
import torch


@pytest.fixture(autouse=True, scope="module")
def uninitialised_memory_is_nan():
    """What `torch.empty` and its like give, in Python and C++, is NaN, or of integers the largest."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
