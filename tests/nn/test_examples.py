"""Every layer's docstring has an example, and it says the truth."""

import doctest

import pytest
import torch
from torch import nn

import normlab
import normlab.nn as norms

LAYERS = {name: thing for name in norms.__all__ if isinstance(thing := getattr(norms, name), type)}
LAYERS = {name: kind for name, kind in LAYERS.items() if issubclass(kind, nn.Module)}
VERBS = {name: getattr(normlab, name) for name in ("convert", "fold", "freeze", "recalibrate", "sync", "diagnose")}
FURTHER = {"build_norm": norms.build_norm, **VERBS}


@pytest.mark.parametrize("name", [*LAYERS, *FURTHER])
def test_its_example_runs(name):
    thing = {**LAYERS, **FURTHER}[name]
    torch.manual_seed(0)
    known = {**vars(norms), "normlab": normlab, "torch": torch, "nn": nn}
    examples = doctest.DocTestFinder(recurse=False).find(thing, name, globs=known)
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    said: list[str] = []
    for one in examples:
        runner.run(one, out=said.append)
    assert not runner.failures, "".join(said)
    has_one = runner.tries > 0 and "Example:" in (thing.__doc__ or "")
    assert has_one or name in VERBS, "no Example: in its docstring"
