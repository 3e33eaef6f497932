"""The house: an import only goes down, ground rooms know nothing of each other, and everything public is explained."""

import ast
import importlib
import inspect
import pkgutil
from pathlib import Path

import pytest

import normlab

ROOT = Path(normlab.__file__).parent
FLOORS = [
    {"errors"},
    {"choice", "colours", "files"},
    {"kernels", "training", "observe", "data", "notebook"},
    {"nn"},
    {"surgery", "models"},
    {"lesson", "health", "integrations"},
    {"study"},
    {"cli"},
]
OPTIONAL = ("pytorch_lightning", "triton")
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}


def imported_rooms(path: Path) -> set[str]:
    """The rooms of the package that a file imports."""
    package = ("normlab", *path.relative_to(ROOT).parent.parts)
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            names = [f"{module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        rooms |= {name.split(".")[1] for name in names if name.startswith("normlab.")}
    return rooms & set(FLOOR)


def files() -> list[Path]:
    return sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_down(path):
    room = path.relative_to(ROOT).parts[0].removesuffix(".py")
    assert room in FLOOR, f"{room} has no floor"
    up = {other for other in imported_rooms(path) if other != room and FLOOR[other] >= FLOOR[room]}
    assert not up, f"{path.name} imports {up}, which stand no lower"


def public_objects():
    for module in pkgutil.walk_packages(normlab.__path__, "normlab."):
        if module.name.endswith("__main__"):
            continue
        try:
            loaded = importlib.import_module(module.name)
        except ModuleNotFoundError as error:
            if error.name not in OPTIONAL:
                raise
            continue  # made for what is not installed
        yield module.name, loaded
        for name, thing in vars(loaded).items():
            own = getattr(thing, "__module__", None) == module.name
            if own and not name.startswith("_") and (inspect.isclass(thing) or inspect.isfunction(thing)):
                yield f"{module.name}.{name}", thing


def test_everything_public_has_a_docstring():
    assert not [name for name, thing in public_objects() if not inspect.getdoc(thing)]


def test_type_checkers_read_the_package():
    assert (ROOT / "py.typed").exists()
