import os
import shutil
from importlib.util import find_spec

import pytest


@pytest.fixture(scope="module")
def browser():
    """A real one, without a window."""
    program = os.environ.get("NORMLAB_CHROMIUM") or shutil.which("chromium")
    missing = None if program else "no browser: install chromium or name one in NORMLAB_CHROMIUM"
    if find_spec("playwright") is None:
        missing = "no playwright: install normlab[dev]"
    if missing:
        pytest.fail(missing) if os.environ.get("CI") else pytest.skip(missing)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()
