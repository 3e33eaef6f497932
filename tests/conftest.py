"""Without a GPU the Triton kernels run in Triton's interpreter, which must know before Triton is imported.

At the end of the tests a line says what was skipped because something is not there.
"""

import os
import re
from collections import Counter

import pytest
import torch
from hypothesis import settings

# A busy machine is no fault of a test.
settings.register_profile("normlab", deadline=None)
settings.load_profile("normlab")

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# What a reason for skipping says, and what is missing then. A reason that meets none was a choice.
MISSING = {
    r"could not import '(\w+)": r"\1",
    r"no browser.*": "a browser",
    r"no playwright.*": "playwright",
    r"(needs a|no) GPU.*": "a GPU",
    r"(no compiled|composed operators \(|torch lacks).*": "compiled kernels",
    r"needs ([\w-]+) under NORMLAB_TEST_DATA": r"\1",
}


def what_is_missing(reason: str) -> str | None:
    """The name of what would have to be there for a test that was skipped for this reason."""
    for pattern, name in MISSING.items():
        found = re.search(pattern, reason)
        if found:
            return found.expand(name)
    return None


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter):
    reports = terminalreporter.stats.get("skipped", [])
    reasons = [str(report.longrepr[2]) for report in reports if isinstance(report.longrepr, tuple)]
    counts = Counter(name for name in map(what_is_missing, reasons) if name)
    if counts:
        parts = ", ".join(f"{name} ({count})" for name, count in sorted(counts.items()))
        terminalreporter.write_line(f"Skipped, tests or files of tests, for want of: {parts}.", yellow=True)
