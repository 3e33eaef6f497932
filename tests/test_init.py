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


def test_state_and_report_of_a_study_need_no_torch():
    """It takes longer to import than they take for thousands of runs."""
    code = "import sys, normlab.cli, normlab.study.results, normlab.study.status; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_other_names_are_errors():
    code = "import normlab; normlab.covnert"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "AttributeError: module 'normlab' has no attribute 'covnert'" in run.stderr
