"""A module from a notebook: the cells marked `#export`, in order."""

import json
import os
import re
from pathlib import Path

from .errors import InputError, check
from .files import write_whole

_MARK = re.compile(r"\s*#\s*\|?\s*export\s*(\n|$)")
_NAME = re.compile(r"(\d+[a-z]?)_.+\.ipynb$")


def export_notebook(path: str | Path) -> Path:
    """Write the marked cells of `07_….ipynb` to `exp/nb_07.py` beside it, and return that path.

    Raises:
        InputError: the file is no notebook, is not named by a number, or has no cell marked `#export`.
    """
    path = Path(path)
    name = _NAME.match(path.name)
    if name is None:
        raise InputError(f"notebook={str(path)!r} is not usable. Accepted: a name like 07_batchnorm.ipynb.")
    cells = [_MARK.sub("", cell, count=1).strip() for cell in code_cells(path) if _MARK.match(cell)]
    check(bool(cells), "notebook", str(path), "a notebook with cells whose first line is #export")
    module = path.parent / "exp" / f"nb_{name[1]}.py"
    head = f"# Made from {path.name} by its #export cells; edit the notebook instead."
    write_whole(module, ("\n\n".join([head, *cells]) + "\n").encode())
    return module


def code_cells(path: Path) -> list[str]:
    """The sources of a notebook's code cells."""
    try:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    except FileNotFoundError:
        raise InputError(f"notebook={str(path)!r} does not exist. Accepted: the path of a notebook.") from None
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"notebook={str(path)!r} is not a notebook ({type(error).__name__}: {error}).") from error


def running_notebook() -> Path:
    """The notebook that this code runs in.

    The front end says so where it can (VS Code, Jupyter). Elsewhere it is the numbered notebook of the working
    directory that has `#export` cells. If there are several, it is the one that has most of the cells run so far.

    Raises:
        InputError: there is none, or it cannot be told which.
    """
    variables = _interactive_variables()
    told = variables.get("__vsc_ipynb_file__") or os.environ.get("JPY_SESSION_NAME")
    if told and Path(told).suffix == ".ipynb":
        for path in (Path(told), Path(Path(told).name)):
            if path.exists():
                return path
    candidates = [p for p in sorted(Path.cwd().glob("*.ipynb")) if _NAME.match(p.name) and _has_marks(p)]
    ran = {source.strip() for source in variables.get("In", []) if source.strip()}
    hits = [sum(cell.strip() in ran for cell in code_cells(path)) for path in candidates]
    best = [path for path, hit in zip(candidates, hits, strict=True) if hit == max(hits)]
    if len(best) != 1:
        names = ", ".join(path.name for path in best) or "none there"
        raise InputError(
            f"Cannot tell which notebook of {Path.cwd().name}/ this is ({names}). "
            "Name it: nb_auto_export('07_….ipynb')."
        )
    return best[0]


def _interactive_variables() -> dict:
    try:
        from IPython import get_ipython  # pyright: ignore[reportMissingImports]
    except ImportError:
        return {}
    shell = get_ipython()
    return shell.user_ns if shell else {}


def _has_marks(path: Path) -> bool:
    try:
        return any(_MARK.match(cell) for cell in code_cells(path))
    except InputError:
        return False  # another file that only looks like a notebook is no candidate
