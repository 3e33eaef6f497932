"""What `import normlab` offers, and that it does so without torch until it is asked for."""

import subprocess
import sys


def test_names_and_rooms_are_imported_when_asked_for():
    code = (
        "import sys, normlab; assert 'torch' not in sys.modules;"
        "[getattr(normlab, name) for name in dir(normlab)];"
        "normlab.observe.ActivationStats; normlab.nn.RunningBatchNorm2d; normlab.convert"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_other_names_are_errors():
    code = "import normlab; normlab.covnert"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "AttributeError: module 'normlab' has no attribute 'covnert'" in run.stderr
