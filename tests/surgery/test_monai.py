"""Surgery on every network of MONAI, in two and three dimensions, as studies/monai/check.py measures it.

The study has the whole table, with ONNX Runtime; here are all networks without it, and four with it.
"""

import sys
from pathlib import Path

import pytest

pytest.importorskip("monai")
pytest.importorskip("einops")
pytest.importorskip("onnxruntime")
sys.path.append(str(Path(__file__).parents[2] / "studies" / "monai"))

from check import STORE, below_the_bar, built, check, check_fold, check_onnx
from networks import MISSING, NETWORKS, WITHOUT_BATCH_NORM, public

ALL = [(name, dims) for name, network in NETWORKS.items() for dims in network.dims]
# Left to the study: HoVerNet takes no images but of 256 × 256, and the others are large, or as small ones the same as
# another in all but the name.
SAME = ("EfficientNetEncoder", "ResNetEncoder", "SENet154", "SEResNet101", "SEResNet152", "SEResNext101")
LEFT = {("HoVerNet", 2), ("VNet", 3), *((name, 3) for name in SAME)}
EXPORTED = [("AttentionUnet", 2), ("DenseNet", 2), ("EfficientNet", 2), ("UNet", 3)]


def test_no_network_is_forgotten():
    assert public() == set(NETWORKS) | set(MISSING)
    assert not set(NETWORKS) & set(MISSING)


@pytest.mark.parametrize(("name", "dims"), [one for one in ALL if one not in LEFT])
def test_there_and_back_is_the_same_and_folding_is_exact(name, dims):
    """From torch's batch norm to `running` the outputs differ by another kernel's rounding, up to 1e-5.

    The state dict is the same bit by bit, and so are the outputs from our `batch` to `running` and back, and after
    `undo`. The folded network differs by rounding, up to 1e-5. No norm lacks its line in a report.
    """
    record = check(name, dims, onnx=False)
    assert not below_the_bar(record), record
    assert (record["batch_norms"] == 0) == (name in WITHOUT_BATCH_NORM)


@pytest.mark.parametrize(("name", "dims"), EXPORTED)
def test_onnx_runtime_agrees_on_the_folded_network(name, dims):
    model, inputs = built(name, dims)
    folded, record = check_fold(model, inputs)
    assert record["folded"] > 0
    assert check_onnx(folded, inputs)["onnx_difference"] < 1e-5


def test_the_study_has_every_network():
    kept = {tuple(record["settings"].values()): record for record in STORE.read(dict)}
    assert set(kept) == set(ALL)
    for record in kept.values():
        assert record["status"] == "ok"
        assert (record["onnx_difference"] is None) == ("no_onnx" in record)
