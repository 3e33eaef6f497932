"""What makes a run: code, data, versions and threads. A run that others made is not taken for it."""

import ast
import hashlib
import sys
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from importlib.metadata import packages_distributions, version
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import check
from ..kernels import cpu
from .named import find_named, is_users
from .plan import Trial
from .record import Record
from .tasks import is_own, make_data, seed_all, torch_threads
from .trial import environment

NORMLAB = Path(__file__).resolve().parents[1]
# What of normlab makes runs: changed, it makes other runs.
ROOMS = ("nn", "kernels", "training", "models", "data", "surgery")
FILES = ("choice.py", "study/trial.py", "study/tasks.py", "study/named.py", "study/optimizers.py", "study/schedules.py")
BATCHES = 4  # of the data are looked at
CHANGING = "another at each call"


def fingerprint(trial: Trial, data_dir: str | Path | None = None, threads: int | None = None) -> dict[str, str]:
    """What makes the run of a trial here and now, for the field `made_by` of its record.

    Two runs of equal settings and fingerprints are the same run: in one study they are made once.

    Args:
        trial: whose functions can be imported.
        data_dir: folder with local copies of the data sets.
        threads: of the process of the run; those of this process if None.

    Returns:
        The versions of Python, normlab, torch and numpy by name; `threads`; what `code_of` gives; and `data`, a hash of
        the first batches for training and for validation.

    Raises:
        InputError: a function of the user's cannot be imported or fails.
    """
    size = trial.batch_size if is_own(trial.data) else 1
    threads = torch.get_num_threads() if threads is None else threads
    return {
        **_here(),
        "threads": str(threads),
        **code_of(trial),
        "data": _data(trial.data, size, str(data_dir) if data_dir else None, threads),
    }


def code_of(trial: Trial) -> dict[str, str]:
    """The code that makes the run of a trial.

    Returns:
        `kernels`, in words and with a hash of the code they were compiled of; `code`, a hash of normlab's files that
        train. If the trial names functions of the user's, `own` is a hash of their files and of all those that these
        import from the user's folders. `packages` are the versions of the other packages that they import. Files that
        are only read, such as settings, do not count.

    Raises:
        InputError: a function of the user's cannot be imported.
    """
    return dict(_code_of((trial.model, trial.data, trial.loss, trial.optimizer, *trial.metrics)))


def is_made_by(record: Record, made_by: Mapping[str, str]) -> bool:
    """Whether a record is of a run that `fingerprint` tells; of older records, only the versions are known."""
    return not differences(record, made_by)


def differences(record: Record, made_by: Mapping[str, str]) -> list[str]:
    """The names of the parts of a fingerprint in which a record differs, such as `code` or `threads`."""
    known = record.made_by or record.versions
    names = dict.fromkeys((*known, *made_by)) if record.made_by or not known else known
    return [name for name in names if known.get(name) != made_by.get(name)]


@lru_cache(maxsize=1)
def _here() -> dict[str, str]:
    return environment()["versions"]


@lru_cache(maxsize=1)
def _code() -> str:
    files = [file for room in ROOMS for file in (NORMLAB / room).rglob("*.py")]
    return _hash_of_files({str(file.relative_to(NORMLAB)): file for file in [*files, *map(NORMLAB.joinpath, FILES)]})


def _kernels() -> str:
    """The kernels of norms in words, and a hash of the code that was compiled: it may be older than that beside it."""
    return cpu.PATH if cpu.kernels is None else f"{cpu.PATH}, code {cpu.kernels.code}"


@lru_cache(maxsize=64)
def _code_of(names: tuple[str | None, ...]) -> dict[str, str]:
    own = [name for name in names if name is not None and is_own(name)]
    return {"kernels": _kernels(), "code": _code(), **(_own_code(own) if own else {})}


def _own_code(names: list[str]) -> dict[str, str]:
    files: dict[str, Path] = {}
    packages: set[str] = set()
    for name in names:
        find_named("name", name)  # it is loaded, and its folder can be imported from
        module = name.rpartition(":")[0]
        if module.endswith(".py"):
            path = Path(module).resolve()
            _follow(path.stem, path, [path.parent, *_folders()], files, packages)
        elif (path := _find(module, _folders())) is not None:
            _follow(module, path, _folders(), files, packages)
        else:
            packages.add(module.partition(".")[0])
    found = {"own": _hash_of_files(files)} if files else {}
    if versions := _versions(packages):
        found["packages"] = ", ".join(versions)
    return found


def _folders() -> list[Path]:
    """The user's among the folders that modules are imported from."""
    return [Path(folder).resolve() for folder in sys.path if is_users(str(Path(folder).resolve() / "module.py"))]


def _follow(name: str, path: Path, folders: list[Path], files: dict[str, Path], packages: set[str]) -> None:
    """Add a module to `files`, and what it imports from the folders, at any depth; the others to `packages`."""
    if name in files:
        return
    files[name] = path
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for imported in _imports(path, package):
        parts = imported.split(".")
        names = [".".join(parts[:count]) for count in range(1, len(parts) + 1)]
        found = [(one, file) for one in names if (file := _find(one, folders)) is not None]
        for one, file in found:
            _follow(one, file, folders, files, packages)
        if not found:
            packages.add(parts[0])


def _imports(path: Path, package: str) -> Iterator[str]:
    """The names of modules that a file imports anywhere, and of what is taken from them, which may be modules."""
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            yield from (one.name for one in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = [*above, *([node.module] if node.module else [])]
            yield from (".".join([*base, one.name]) for one in node.names)


def _find(name: str, folders: Iterable[Path]) -> Path | None:
    """The file of a module in the first folder that has it."""
    for folder in folders:
        place = folder.joinpath(*name.split("."))
        for path in (place / "__init__.py", place.with_name(f"{place.name}.py")):
            if path.is_file():
                return path
    return None


def _versions(packages: set[str]) -> list[str]:
    """Name and version of each package that is installed; normlab, torch and numpy are known anyway."""
    others = packages - sys.stdlib_module_names - {"normlab", "torch", "numpy"}
    of = packages_distributions() if others else {}
    return sorted(f"{one} {version(one)}" for one in {one for name in others for one in of.get(name, [])})


def _hash_of_files(files: Mapping[str, Path]) -> str:
    total = hashlib.sha256()
    for name in sorted(files):
        total.update(f"{name}\n".encode() + hashlib.sha256(files[name].read_bytes()).digest())
    return total.hexdigest()[:12]


@lru_cache(maxsize=64)
def _data(name: str, batch_size: int, data_dir: str | None, threads: int) -> str:
    """A hash of the first batches of training and validation; `CHANGING` if they are others each time."""
    trial = Trial(data=name, batch_size=batch_size)
    with torch_threads(threads):
        first, again = _hash_of_data(trial, data_dir), None
        if is_own(name):
            again = _hash_of_data(trial, data_dir)
    return first if again in (None, first) else CHANGING


def _hash_of_data(trial: Trial, data_dir: str | None) -> str:
    total = hashlib.sha256()
    seed_all(0)
    for batches in make_data(trial, data_dir):
        check(isinstance(batches, Iterable), f"data={trial.data!r}: result", type(batches).__name__, "batches")
        for batch in islice(batches, BATCHES):
            _add(total, batch)
    return total.hexdigest()[:12]


def _add(total: Any, value: Any) -> None:
    """Add what a batch holds to a hash: numbers, texts and arrays; of other things only the type."""
    total.update(f"{type(value).__name__}:".encode())
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        value = value.view(torch.uint8).numpy() if value.dtype == torch.bfloat16 else value.numpy()
    if isinstance(value, Mapping):
        for key in sorted(value, key=str):
            total.update(f"{key}=".encode())
            _add(total, value[key])
    elif isinstance(value, list | tuple):
        for item in value:
            _add(total, item)
    elif isinstance(value, str | bytes | int | float | None):
        total.update(repr(value).encode())
    elif isinstance(value, np.ndarray) or hasattr(value, "__array__"):
        array = np.asarray(value)
        total.update(f"{array.dtype}{array.shape}".encode())
        if array.dtype != object:
            total.update(np.ascontiguousarray(array).tobytes())
