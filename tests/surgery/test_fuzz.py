"""Random module trees: every verb keeps its laws on all of them (`laws.py`). By hand, more of them: `fuzz.py`."""

import pytest

from surgery.laws import VERBS, obey

TREES = 2_000
CHUNKS = 20


@pytest.mark.filterwarnings("ignore")  # of torch, about what the trees do
@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_surgery_of_random_trees_keeps_its_laws(chunk):
    for seed in range(chunk, TREES, CHUNKS):
        obey(seed)


def test_every_verb_is_drawn():
    from surgery.laws import Case

    assert {Case(seed).verb for seed in range(100)} == set(VERBS)
