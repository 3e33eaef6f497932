"""Image data sets as tensors: from a local copy, the package itself (MNIST), the cache, or the network, in that order.

Every file is checked against the SHA-256 sum of the original before a byte of it is used.
"""

import hashlib
import io
import math
import os
import struct
import tarfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError, check, unknown

HELD_OUT = ("validation", "test")
NUM_VALID = 10_000
PACKAGE = Path(__file__).parent

Part = tuple[np.ndarray, np.ndarray]  # images [N, C, H, W] and labels [N], both unsigned bytes


@dataclass(frozen=True, eq=False)
class ImageData:
    """The images a model trains on and those held out to validate it.

    Attributes:
        name: one of `DATASETS`.
        x_train: [N, C, H, W], float32 in 0..1.
        y_train: [N], int64, an index into `classes`.
        x_valid: as `x_train`.
        y_valid: as `y_train`.
        classes: what each label stands for.
    """

    name: str
    x_train: Tensor
    y_train: Tensor
    x_valid: Tensor
    y_valid: Tensor
    classes: tuple[str, ...]


def load_dataset(name: str, data_dir: str | Path | None = None, held_out: str = "validation") -> ImageData:
    """Load a data set. It is downloaded only if it is nowhere at hand.

    The last 10,000 training images are never trained on, so both choices of `held_out` give the same training images:
    50,000 of MNIST and Fashion-MNIST, 40,000 of CIFAR-10.

    Args:
        name: one of `DATASETS`.
        data_dir: folder of local copies, `data_dir/name/original file name`. By default it is the environment variable
            NORMLAB_DATA. CIFAR-10 is read from its `.bin` files, there or in `cifar-10-batches-bin`, or from
            `cifar-10-binary.tar.gz`. Downloads go to NORMLAB_CACHE, or the user's cache folder.
        held_out: `validation` holds out the last 10,000 training images, `test` the test images.

    Raises:
        InputError: a name or folder is unknown, a file is not the original, or nothing could be downloaded.
    """
    if name not in SOURCES:
        raise unknown("name", name, DATASETS)
    if held_out not in HELD_OUT:
        raise unknown("held_out", held_out, HELD_OUT)
    source = SOURCES[name]
    (x_train, y_train), (x_valid, y_valid) = source.read(name, _local_folder(data_dir), held_out)
    for labels in (y_train, y_valid):
        if labels.max() >= len(source.classes):
            raise InputError(f"{name}: expected labels from 0 to {len(source.classes) - 1}, found {labels.max()}.")
    return ImageData(
        name=name,
        x_train=_pixels(x_train),
        y_train=_labels(y_train),
        x_valid=_pixels(x_valid),
        y_valid=_labels(y_valid),
        classes=source.classes,
    )


def read_idx(content: bytes, shape: tuple[int, ...], origin: str | Path) -> np.ndarray:
    """The array of unsigned bytes in a gzip-compressed idx file.

    Args:
        content: the compressed file.
        shape: the one it must have.
        origin: the file's name, for errors.

    Raises:
        InputError: not gzip, or cut; another type or shape; more or fewer values than the shape says.
    """
    header = struct.pack(f">HBB{len(shape)}I", 0, 8, len(shape), *shape)  # zeros, type 8 (unsigned byte), rank, sizes
    size = len(header) + math.prod(shape)
    try:
        raw = zlib.decompress(content, wbits=zlib.MAX_WBITS | 16, bufsize=size)  # 16: a gzip header; faster than gzip
    except zlib.error as error:
        raise InputError(f"{origin}: expected a gzip file, found one that cannot be unpacked ({error}).") from error
    found = raw[: len(header)]
    if found != header:
        raise InputError(
            f"{origin}: expected an idx file of bytes, shape {shape}, so the header {header.hex(' ', 4)}; "
            f"found {found.hex(' ', 4)}."
        )
    if len(raw) != size:
        raise InputError(f"{origin}: expected {size:,} bytes unpacked, found {len(raw):,}.")
    return np.frombuffer(raw, np.uint8, offset=len(header)).reshape(shape)


def read_cifar(content: bytes, origin: str | Path) -> Part:
    """The images and labels in a binary batch of CIFAR-10: records of a label and three 32×32 planes.

    Raises:
        InputError: the batch is not a whole number of records.
    """
    record = 1 + 3 * 32 * 32
    if not content or len(content) % record:
        raise InputError(f"{origin}: expected records of {record:,} bytes, found {len(content):,} bytes.")
    records = np.frombuffer(content, np.uint8).reshape(-1, record)
    return records[:, 1:].reshape(-1, 3, 32, 32), records[:, 0]


def _read_mnist(name: str, local: Path | None, held_out: str) -> tuple[Part, Part]:
    """Training and held-out images of a set laid out as MNIST is; only the files needed are opened."""

    def read(prefix: str, count: int) -> Part:
        images, labels = f"{prefix}-images-idx3-ubyte.gz", f"{prefix}-labels-idx1-ubyte.gz"
        pixels = read_idx(_content(name, images, local), (count, 28, 28), images)
        return pixels[:, None], read_idx(_content(name, labels, local), (count,), labels)

    images, labels = read("train", 60_000)
    held = read("t10k", 10_000) if held_out == "test" else (images[-NUM_VALID:], labels[-NUM_VALID:])
    return (images[:-NUM_VALID], labels[:-NUM_VALID]), held


def _read_cifar10(name: str, local: Path | None, held_out: str) -> tuple[Part, Part]:
    """Training and held-out images of CIFAR-10, whose fifth batch is the last 10,000 training images."""
    files = [f"data_batch_{i}.bin" for i in (1, 2, 3, 4)]
    files.append("test_batch.bin" if held_out == "test" else "data_batch_5.bin")
    contents = _cifar10_contents(name, files, local)
    batches = [read_cifar(content, file) for content, file in zip(contents, files, strict=True)]
    images, labels = zip(*batches[:-1], strict=True)
    return (np.concatenate(images), np.concatenate(labels)), batches[-1]


def _cifar10_contents(name: str, files: list[str], local: Path | None) -> list[bytes]:
    """The checked batches: local ones if any lies there, else the members of the archive, read without unpacking it."""
    sums = SOURCES[name].sums
    for folder in (local / name, local / name / CIFAR10_FOLDER) if local else ():
        if any((folder / file).exists() for file in files):
            return [_checked(folder / file, sums[file]) for file in files]
    archive = _content(name, CIFAR10_ARCHIVE, local)
    with tarfile.open(fileobj=io.BytesIO(archive), mode="r:gz") as tar:
        found = {Path(member.name).name: data.read() for member in tar if (data := tar.extractfile(member))}
    return [found[file] for file in files]


def _content(name: str, file: str, local: Path | None) -> bytes:
    """The checked content of an original file, from the first place that has it."""
    source = SOURCES[name]
    for folder in (local, PACKAGE) if local else (PACKAGE,):
        path = folder / name / file
        if path.exists():
            return _checked(path, source.sums[file])
    from .download import cache_folder, fetch  # what is at hand is read without loading a network library

    return _checked(fetch(file, source.sums[file], source.mirrors, cache_folder() / name), source.sums[file])


def _checked(path: Path, sha256: str) -> bytes:
    """The content of a file, refused unless it is the original one."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.") from error
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise InputError(
            f"{path} is not the original file: expected SHA-256 {sha256}, found {found} ({len(content):,} bytes). "
            "It was left as it is; replace it or take it away."
        )
    return content


def _local_folder(data_dir: str | Path | None) -> Path | None:
    """The folder of local copies that is asked for, if any."""
    given, argument = (data_dir, "data_dir") if data_dir else (os.environ.get("NORMLAB_DATA"), "NORMLAB_DATA")
    if not given:
        return None
    check(Path(given).is_dir(), argument, str(given), "a folder that exists")
    return Path(given)


def _pixels(images: np.ndarray) -> Tensor:
    """Bytes as float32 in 0..1; numpy asks the system for huge pages, which makes it faster here than torch."""
    return torch.from_numpy(np.divide(images, np.float32(255), dtype=np.float32))


def _labels(labels: np.ndarray) -> Tensor:
    return torch.from_numpy(labels.astype(np.int64))


CIFAR10_ARCHIVE = "cifar-10-binary.tar.gz"
CIFAR10_FOLDER = "cifar-10-batches-bin"


@dataclass(frozen=True)
class Source:
    """What a data set is made of: its classes, its files with their SHA-256 sums, who serves them, how to read them."""

    classes: tuple[str, ...]
    sums: dict[str, str]
    mirrors: tuple[str, ...]
    read: Callable[[str, Path | None, str], tuple[Part, Part]]


SOURCES = {
    "mnist": Source(
        classes=tuple("0123456789"),
        sums={
            "train-images-idx3-ubyte.gz": "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
            "train-labels-idx1-ubyte.gz": "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
            "t10k-images-idx3-ubyte.gz": "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
            "t10k-labels-idx1-ubyte.gz": "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
        },
        mirrors=("https://ossci-datasets.s3.amazonaws.com/mnist/",),
        read=_read_mnist,
    ),
    "fashion_mnist": Source(
        classes=(
            *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
            *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
        ),
        sums={
            "train-images-idx3-ubyte.gz": "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
            "train-labels-idx1-ubyte.gz": "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
            "t10k-images-idx3-ubyte.gz": "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
            "t10k-labels-idx1-ubyte.gz": "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
        },
        mirrors=(
            "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
            "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion/",
            "https://storage.googleapis.com/tensorflow/tf-keras-datasets/",
        ),
        read=_read_mnist,
    ),
    "cifar10": Source(
        classes=("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
        sums={
            CIFAR10_ARCHIVE: "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
            "data_batch_1.bin": "cee916563c9f80d84e3cc88e17fdc0941787f1244f00a67874d45b261883ada5",
            "data_batch_2.bin": "a591ca11fa1708a91ee40f54b3da4784ccd871ecf2137de63f51ada8b3fa57ed",
            "data_batch_3.bin": "bbe8596564c0f86427f876058170b84dac6670ddf06d79402899d93ceea26f67",
            "data_batch_4.bin": "014e562d6e23c72197cc727519169a60359f5eccd8945ad5a09d710285ff4e48",
            "data_batch_5.bin": "755304fc0b379caeae8c14f0dac912fbc7d6cd469eb67a1029a08a39453a9add",
            "test_batch.bin": "8e2eb146ae340b09e24670f29cabc6326dba54da8789dab6768acf480273f65b",
        },
        mirrors=(
            "https://www.cs.toronto.edu/~kriz/",
            "https://storage.googleapis.com/s4tf-hosted-binaries/datasets/CIFAR10/",
        ),
        read=_read_cifar10,
    ),
}
DATASETS = tuple(SOURCES)
