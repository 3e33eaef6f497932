"""The data sets as tensors, and the refusal of every file that is not the original."""

import functools
import gzip
import hashlib
import http.server
import io
import os
import shutil
import struct
import tarfile
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from normlab.data import DATASETS, load_dataset
from normlab.data.datasets import CIFAR10_ARCHIVE, CIFAR10_FOLDER, PACKAGE, SOURCES, read_cifar, read_idx
from normlab.errors import InputError

MNIST = PACKAGE / "mnist"
TRAIN_IMAGES = "train-images-idx3-ubyte.gz"
TEST_DATA = Path(os.environ.get("NORMLAB_TEST_DATA") or Path(__file__).parents[3] / "shared" / "data")


@pytest.fixture(autouse=True)
def nowhere_else(monkeypatch, tmp_path):
    """No local copies but those a test gives, an empty cache, and no way to a real mirror."""
    monkeypatch.delenv("NORMLAB_DATA", raising=False)
    monkeypatch.setenv("NORMLAB_CACHE", str(tmp_path / "cache"))
    for name, source in SOURCES.items():
        monkeypatch.setitem(SOURCES, name, replace(source, mirrors=("http://127.0.0.1:9/",)))


@pytest.fixture(scope="module")
def mnist():
    return load_dataset("mnist")


def original(file: str, offset: int) -> np.ndarray:
    """The values of a file of MNIST, read in the plainest way."""
    return np.frombuffer(gzip.decompress((MNIST / file).read_bytes())[offset:], np.uint8)


def test_mnist_is_the_original(mnist):
    assert mnist.name == "mnist"
    assert mnist.classes == tuple("0123456789")
    images = torch.tensor(original(TRAIN_IMAGES, 16)).reshape(60_000, 1, 28, 28)
    labels = torch.tensor(original("train-labels-idx1-ubyte.gz", 8)).long()
    assert torch.equal(mnist.x_train, images[:50_000].float() / 255)
    assert torch.equal(mnist.x_valid, images[50_000:].float() / 255)
    assert torch.equal(mnist.y_train, labels[:50_000])
    assert torch.equal(mnist.y_valid, labels[50_000:])


def test_mnist_types_and_layout(mnist):
    for x, y in ((mnist.x_train, mnist.y_train), (mnist.x_valid, mnist.y_valid)):
        assert x.dtype == torch.float32
        assert y.dtype == torch.int64
        assert x.is_contiguous()
        assert y.is_contiguous()
        assert (x.min(), x.max()) == (0, 1)
        assert y.unique().tolist() == list(range(10))


def test_the_test_images_are_held_out_on_request(mnist):
    data = load_dataset("mnist", held_out="test")
    assert torch.equal(data.x_train, mnist.x_train)
    assert torch.equal(data.y_train, mnist.y_train)
    images = torch.tensor(original("t10k-images-idx3-ubyte.gz", 16)).reshape(10_000, 1, 28, 28)
    assert torch.equal(data.x_valid, images.float() / 255)
    assert torch.equal(data.y_valid, torch.tensor(original("t10k-labels-idx1-ubyte.gz", 8)).long())


def test_the_attribution_names_every_file_and_its_sum():
    text = (MNIST / "ATTRIBUTION.md").read_text()
    for file, sha256 in SOURCES["mnist"].sums.items():
        assert f"| `{file}` | `{sha256}` |" in text
    for word in ("LeCun", "Cortes", "Burges", "CC BY-SA 3.0", "none stated by the authors"):
        assert word in text


def test_unknown_names():
    assert DATASETS == ("mnist", "fashion_mnist", "cifar10")
    with pytest.raises(InputError, match=r"name='mnits' is unknown. Did you mean 'mnist'\? Accepted: mnist, fashion"):
        load_dataset("mnits")
    with pytest.raises(InputError, match=r"held_out='valid' is unknown.*validation, test"):
        load_dataset("mnist", held_out="valid")


def test_a_folder_that_is_missing_is_an_error(tmp_path, monkeypatch):
    with pytest.raises(InputError, match=r"data_dir=.*nowhere' is not usable. Accepted: a folder that exists"):
        load_dataset("mnist", tmp_path / "nowhere")
    monkeypatch.setenv("NORMLAB_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(InputError, match="NORMLAB_DATA="):
        load_dataset("mnist")


def truncate(content: bytes) -> bytes:
    return content[: len(content) // 2]


def flip_a_bit(content: bytes) -> bytes:
    return content[:-9] + bytes([content[-9] ^ 1]) + content[-8:]


def replace_by_a_page(_: bytes) -> bytes:
    return b"<html>Log in to use this network</html>"


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, replace_by_a_page])
@pytest.mark.parametrize("given_by", ["data_dir", "environment"])
def test_a_damaged_local_copy_is_refused_and_left(damage, given_by, tmp_path, monkeypatch):
    """Even where the package's own copy would do: a copy that was asked for is not passed over in silence."""
    path = tmp_path / "mnist" / TRAIN_IMAGES
    path.parent.mkdir()
    content = damage((MNIST / TRAIN_IMAGES).read_bytes())
    path.write_bytes(content)
    if given_by == "environment":
        monkeypatch.setenv("NORMLAB_DATA", str(tmp_path))
    with pytest.raises(InputError) as caught:
        load_dataset("mnist", tmp_path if given_by == "data_dir" else None)
    expected, found = SOURCES["mnist"].sums[TRAIN_IMAGES], hashlib.sha256(content).hexdigest()
    for word in (str(path), f"expected SHA-256 {expected}", f"found {found}", f"{len(content):,} bytes"):
        assert word in str(caught.value)
    assert path.read_bytes() == content


def test_only_the_files_needed_are_opened(tmp_path, mnist):
    (tmp_path / "mnist").mkdir()
    (tmp_path / "mnist" / "t10k-images-idx3-ubyte.gz").write_bytes(b"damaged")
    assert torch.equal(load_dataset("mnist", tmp_path).y_valid, mnist.y_valid)
    with pytest.raises(InputError, match="t10k-images"):
        load_dataset("mnist", tmp_path, held_out="test")


def test_a_file_that_cannot_be_read(tmp_path):
    (tmp_path / "mnist" / TRAIN_IMAGES).mkdir(parents=True)
    with pytest.raises(InputError, match=rf"{TRAIN_IMAGES} cannot be read"):
        load_dataset("mnist", tmp_path)


# idx files


def idx(values: np.ndarray, header: bytes | None = None) -> bytes:
    header = header or struct.pack(f">I{values.ndim}I", 0x800 + values.ndim, *values.shape)
    return gzip.compress(header + values.tobytes())


def test_read_idx():
    values = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    assert np.array_equal(read_idx(idx(values), (2, 3, 4), "file"), values)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"no gzip at all", "expected a gzip file"),
        (b"", "expected a gzip file"),
        (idx(np.zeros((2, 3), np.uint8))[:-4], "expected a gzip file"),
        (idx(np.zeros((3, 2), np.uint8)), "header 00000802 00000002 00000003; found 00000802 00000003 00000002"),
        (idx(np.zeros(6, np.uint8)), "header 00000802 00000002 00000003; found 00000801 00000006"),
        (idx(np.zeros((2, 3), np.uint8), struct.pack(">III", 0xD02, 2, 3)), "found 00000d02"),
        (gzip.compress(b"\0\0"), "found 0000"),
        (idx(np.zeros(5, np.uint8), struct.pack(">III", 0x802, 2, 3)), "expected 18 bytes unpacked, found 17"),
        (idx(np.zeros(7, np.uint8), struct.pack(">III", 0x802, 2, 3)), "expected 18 bytes unpacked, found 19"),
    ],
    ids=["text", "empty", "cut", "sizes", "rank", "type", "no header", "too short", "too long"],
)
def test_an_idx_file_that_is_not_what_it_claims(content, message):
    with pytest.raises(InputError, match=rf"^labels.gz: .*{message}"):
        read_idx(content, (2, 3), "labels.gz")


def test_labels_out_of_range(monkeypatch):
    monkeypatch.setitem(SOURCES, "mnist", replace(SOURCES["mnist"], classes=tuple("012345678")))
    with pytest.raises(InputError, match="mnist: expected labels from 0 to 8, found 9"):
        load_dataset("mnist")


# CIFAR-10, with small batches whose sums take the place of the original ones


def cifar_batch(seed: int, n: int) -> bytes:
    rng = np.random.default_rng(seed)
    labels, pixels = rng.integers(0, 10, (n, 1)), rng.integers(0, 256, (n, 3072))
    return np.concatenate([labels, pixels], axis=1).astype(np.uint8).tobytes()


BATCHES = {f"data_batch_{i}.bin": cifar_batch(i, 3 + i) for i in range(1, 6)} | {"test_batch.bin": cifar_batch(6, 5)}


def archive() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as tar:
        for name, content in {"readme.html": b"<html>", **dict(reversed(BATCHES.items()))}.items():
            member = tarfile.TarInfo(f"{CIFAR10_FOLDER}/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return file.getvalue()


@pytest.fixture
def cifar(monkeypatch):
    contents = BATCHES | {CIFAR10_ARCHIVE: archive()}
    sums = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    monkeypatch.setitem(SOURCES, "cifar10", replace(SOURCES["cifar10"], sums=sums))
    return contents


def write(folder: Path, contents: dict[str, bytes]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        (folder / name).write_bytes(content)


@pytest.mark.parametrize("layout", ["files", "folder", "archive"])
@pytest.mark.parametrize("held_out", ["validation", "test"])
def test_cifar10_layouts(cifar, layout, held_out, tmp_path):
    local = tmp_path / "local"
    if layout == "archive":
        write(local / "cifar10", {CIFAR10_ARCHIVE: cifar[CIFAR10_ARCHIVE]})
    else:
        write(local / "cifar10" / (CIFAR10_FOLDER if layout == "folder" else ""), BATCHES)
    before = sorted(tmp_path.rglob("*"))
    data = load_dataset("cifar10", local, held_out)
    assert sorted(tmp_path.rglob("*")) == before  # nothing is unpacked, nothing cached
    train = b"".join(BATCHES[f"data_batch_{i}.bin"] for i in (1, 2, 3, 4))
    held = BATCHES["test_batch.bin" if held_out == "test" else "data_batch_5.bin"]
    for x, y, content in ((data.x_train, data.y_train, train), (data.x_valid, data.y_valid, held)):
        records = torch.tensor(list(content)).reshape(-1, 3073)
        assert torch.equal(y, records[:, 0])
        assert torch.equal(x, records[:, 1:].reshape(-1, 3, 32, 32) / 255)
        assert x.is_contiguous()


def test_cifar10_planes_are_red_green_blue_row_by_row():
    image = np.zeros((3, 32, 32), np.uint8)
    image[0, 0, 1], image[1, 1, 0], image[2, 31, 31] = 1, 2, 3
    record = bytearray(3073)
    record[0], record[1 + 1], record[1 + 1024 + 32], record[3072] = 7, 1, 2, 3
    images, labels = read_cifar(bytes(record), "file")
    assert np.array_equal(images[0], image)
    assert labels.tolist() == [7]


def test_cifar10_batch_of_another_form():
    for content in (b"", b"x" * 3072, b"x" * 3074):
        with pytest.raises(InputError, match="file: expected records of 3,073 bytes"):
            read_cifar(content, "file")


def test_cifar10_damaged_or_missing_batch_is_refused(cifar, tmp_path):
    write(tmp_path / "cifar10", BATCHES)
    path = tmp_path / "cifar10" / "data_batch_3.bin"
    path.write_bytes(flip_a_bit(BATCHES[path.name]))
    with pytest.raises(InputError, match=r"data_batch_3.bin is not the original file"):
        load_dataset("cifar10", tmp_path)
    path.unlink()
    with pytest.raises(InputError, match=r"data_batch_3.bin cannot be read: No such file"):
        load_dataset("cifar10", tmp_path)


def test_cifar10_damaged_archive_is_refused(cifar, tmp_path):
    write(tmp_path / "cifar10", {CIFAR10_ARCHIVE: truncate(cifar[CIFAR10_ARCHIVE])})
    with pytest.raises(InputError, match=rf"{CIFAR10_ARCHIVE} is not the original file"):
        load_dataset("cifar10", tmp_path)


# The network, played by a server on this machine


@pytest.fixture
def serve(tmp_path):
    """A function that serves a folder and returns its address."""
    servers = []

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    def start(folder: Path) -> str:
        handler = functools.partial(Quiet, directory=str(folder))
        servers.append(http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler))
        threading.Thread(target=servers[-1].serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}/"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_what_is_nowhere_at_hand_is_downloaded_and_cached(cifar, serve, tmp_path, monkeypatch):
    write(tmp_path / "served", cifar)
    source = replace(SOURCES["cifar10"], mirrors=(serve(tmp_path / "served"),))
    monkeypatch.setitem(SOURCES, "cifar10", source)
    data = load_dataset("cifar10")
    cached = tmp_path / "cache" / "cifar10" / CIFAR10_ARCHIVE
    assert cached.read_bytes() == cifar[CIFAR10_ARCHIVE]
    shutil.rmtree(tmp_path / "served")
    assert torch.equal(load_dataset("cifar10").x_train, data.x_train)
    cached.write_bytes(b"altered")
    with pytest.raises(InputError, match=rf"{CIFAR10_ARCHIVE} could not be downloaded"):
        load_dataset("cifar10")


def test_fashion_mnist_is_downloaded_file_by_file(serve, tmp_path, monkeypatch, mnist):
    """With MNIST's files in the place of Fashion-MNIST's, which have the same form."""
    source = replace(SOURCES["fashion_mnist"], sums=SOURCES["mnist"].sums, mirrors=(serve(MNIST),))
    monkeypatch.setitem(SOURCES, "fashion_mnist", source)
    data = load_dataset("fashion_mnist")
    assert torch.equal(data.x_train, mnist.x_train)
    assert data.classes[9] == "Ankle boot"
    cached = {file.name for file in (tmp_path / "cache" / "fashion_mnist").glob("*.gz")}
    assert cached == {TRAIN_IMAGES, "train-labels-idx1-ubyte.gz"}


def test_a_failed_download_tells_how_to_give_a_local_copy():
    with pytest.raises(
        InputError, match=r"127.0.0.1:9/train-images(?s:.)*FOLDER/fashion_mnist/train-images.*--data-dir"
    ):
        load_dataset("fashion_mnist")


@pytest.mark.skipif(not (TEST_DATA / "fashion_mnist").is_dir(), reason="needs Fashion-MNIST under NORMLAB_TEST_DATA")
def test_fashion_mnist_itself():
    data = load_dataset("fashion_mnist", TEST_DATA, held_out="test")
    assert data.x_train.shape == (50_000, 1, 28, 28)
    assert data.x_valid.shape == (10_000, 1, 28, 28)
    assert [data.classes[i] for i in data.y_train[:4]] == ["Ankle boot", "T-shirt/top", "T-shirt/top", "Dress"]
    assert data.y_valid.bincount().tolist() == [1000] * 10


@pytest.mark.skipif(not (TEST_DATA / "cifar10").is_dir(), reason="needs CIFAR-10 under NORMLAB_TEST_DATA")
def test_cifar10_itself():
    data = load_dataset("cifar10", TEST_DATA)
    assert data.x_train.shape == (40_000, 3, 32, 32)
    assert data.y_train[:5].tolist() == [6, 9, 9, 4, 1]
    assert data.y_valid[:5].tolist() == [1, 8, 5, 1, 5]
