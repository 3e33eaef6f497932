"""The page of which norm says what the stored runs say."""

import sys
from pathlib import Path

from normlab.study.named import find_named

ROOT = Path(__file__).parents[2]


def test_the_tables_are_those_of_the_runs(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(ROOT / "studies"), *sys.path])
    page = (ROOT / "docs" / "which_norm.md").read_text(encoding="utf-8")
    tables = find_named("tables", f"{ROOT / 'studies' / 'which_norm.py'}:tables")()
    assert len(tables) == 5
    for lines in tables.values():
        assert lines in page, "run python studies/which_norm.py"
