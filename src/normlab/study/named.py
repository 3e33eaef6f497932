"""The user's own things by name, `module:name` or `file.py:name`, and what is said when their code fails."""

import importlib
import importlib.util
import os
import site
import sys
import sysconfig
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any

from ..errors import InputError, check, unknown

OURS = f"{Path(__file__).resolve().parents[1]}{os.sep}"


def find_named(argument: str, name: str) -> Any:
    """What `module:name` or `file.py:name` names.

    A file is loaded as Python would run it: its folder can be imported from, and it is known by its own name.

    Raises:
        InputError: it is not of this form, names nothing, or its code fails.
    """
    module, colon, attribute = name.rpartition(":")
    check(bool(colon and module and attribute), argument, name, "module:name, or file.py:name")
    with explain_failure(f"{argument}={name!r} cannot be imported"):
        loaded = _file(Path(module)) if module.endswith(".py") else _module(module)
    if not hasattr(loaded, attribute):
        own = [one for one, thing in vars(loaded).items() if not one.startswith("_") and _is_own(thing, loaded)]
        raise unknown(argument, name, [f"{module}:{one}" for one in own] or ["a name of another module"])
    return getattr(loaded, attribute)


def make_named(argument: str, name: str, make: Any) -> Any:
    """What a function of the user's gives.

    Raises:
        InputError: it is none, or fails.
    """
    check(callable(make), argument, name, "module:name of the thing itself, or of a function without arguments")
    with explain_failure(f"{argument}={name!r} failed"):
        return make()


@contextmanager
def explain_failure(what: str) -> Iterator[None]:
    """Inside, an error of the user's code becomes an InputError: what failed, their file and line, their message.

    Raises:
        InputError: the code inside failed, or ended the process.
    """
    try:
        yield
    except InputError:
        raise
    except (Exception, SystemExit) as error:
        kind = "" if isinstance(error, ImportError | FileNotFoundError) else f"{type(error).__name__}: "
        message = f"{kind}{error}".strip().partition("\n")[0].removesuffix(".")
        raise InputError(f"{what}: {_where(error)}{message}.") from error


def _where(error: BaseException) -> str:
    """`file.py, line 3: ` of the user's line that failed; empty if none is known."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}, line {error.lineno}: "
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if is_users(frame.filename)]
    return f"{frames[-1].filename}, line {frames[-1].lineno}: " if frames else ""


def is_users(file: str) -> bool:
    """Whether it is no file of ours, of Python's library or of an installed package."""
    installed = [*site.getsitepackages(), site.getusersitepackages()]
    library = [sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    packages = any(part in ("site-packages", "dist-packages") for part in Path(file).parts)
    return not (file.startswith(("<", OURS, *installed, *library)) or packages)


def _module(name: str) -> ModuleType:
    _make_importable(Path.cwd())
    return importlib.import_module(name)


def _file(path: Path) -> ModuleType:
    path = path.resolve()
    _make_importable(path.parent)
    name, known = path.stem, sys.modules.get(path.stem)
    if known is not None and _is_at(known, path):
        return known
    if known is not None:  # a library's, whose name it cannot take
        name = f"{path.stem} of {path.parent}"
        if name in sys.modules:
            return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # before its code runs, which may ask for it: dataclasses do
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _is_own(thing: Any, module: ModuleType) -> bool:
    """Whether it is no module, and no class or function that was imported from one."""
    made = isinstance(thing, type | FunctionType | BuiltinFunctionType)
    return not isinstance(thing, ModuleType) and (not made or thing.__module__ == module.__name__)


def _make_importable(folder: Path) -> None:
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))


def _is_at(module: ModuleType, path: Path) -> bool:
    file = getattr(module, "__file__", None)
    return file is not None and Path(file).resolve() == path
