"""README and docs/ are true: links lead somewhere, snippets run, every fault is explained."""

import re
import warnings
from dataclasses import replace
from pathlib import Path

import matplotlib
import pytest
import torch

from normlab import data
from normlab.health.faults import FAULTS

ROOT = Path(__file__).parents[1]
PAGES = [path for path in [*ROOT.glob("*.md"), *ROOT.glob("*/**/*.md")] if not {".venv", "build"} & set(path.parts)]
EXPLAINING = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def names(path):
    return str(path.relative_to(ROOT))


def anchors(path):
    headings = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=names)
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith(("http://", "https://", "mailto:")):
            continue
        target, _, anchor = link.partition("#")
        there = (page.parent / target) if target else page
        assert there.exists(), f"{link} leads nowhere"
        assert not anchor or anchor in anchors(there), f"{link}: no such heading"


@pytest.mark.parametrize("page", EXPLAINING, ids=names)
def test_snippets_run_in_their_order(page, tmp_path, monkeypatch):
    snippets = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    if any("monai" in snippet for snippet in snippets):
        pytest.importorskip("monai")
    whole = data.load_dataset("mnist")
    few = replace(whole, x_train=whole.x_train[:256], y_train=whole.y_train[:256])
    monkeypatch.setattr(data, "load_dataset", lambda name: few)  # an epoch of all images is not for a test
    monkeypatch.chdir(tmp_path)
    matplotlib.use("Agg")
    torch.manual_seed(0)
    known = {"__name__": "snippet"}
    for snippet in snippets:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            exec(compile(snippet, page.name, "exec"), known)


def test_every_fault_is_explained():
    rows = (ROOT / "docs/diagnosis.md").read_text().splitlines()
    explained = [row.split("|")[1].strip() for row in rows if row.startswith("| ")]
    assert [fault.name for fault in FAULTS] == [name for name in explained if name != "fault"]


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) < 130
