"""Which files a data path means, and their text."""

import os
import sysconfig
from collections.abc import Sequence
from pathlib import Path

from jaxtron.config import UserError
from jaxtron.data.config import PYTHON_STDLIB

STDLIB_BYTES = 8_000_000
# tests, tables and code that is not of the library itself
STDLIB_SKIPPED = frozenset(
    "dist-packages encodings idlelib lib2to3 pydoc_data site-packages test tests turtledemo".split()
)


def find_files(paths: Sequence[str]) -> list[Path]:
    """Every file of the paths, sorted within each; empty files, hidden files and hidden folders are left out."""
    files = []
    for name in paths:
        found = _stdlib_files() if name == PYTHON_STDLIB else _files_below(Path(name).expanduser())
        files.extend(file for file in found if file.stat().st_size > 0)
    if not files:
        raise UserError(f"no text in --data.path {' '.join(paths)}: every file there is empty; give files with text")
    return files


def read_document(path: Path) -> str:
    """Text of one file, its line ends untouched; UserError names the byte where it stops being UTF-8 text."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}; make it readable or leave it out") from error
    offset, what = content.find(b"\0"), "is binary: a zero byte"
    text = ""
    if offset < 0:
        try:
            text = content.decode("utf-8")
        except UnicodeDecodeError as error:
            offset, what = error.start, f"is not UTF-8 text: byte 0x{content[error.start]:02x}"
    if offset >= 0:
        raise UserError(f"{path} {what} at offset {offset}; convert it to UTF-8, or leave it out of --data.path")
    return text


def _files_below(path: Path) -> list[Path]:
    # os.path rather than Path: False, not an exception, for what may not be looked at
    if os.path.isfile(path):
        return [path.resolve()]
    if not os.path.exists(path):
        raise UserError(f"no such file or folder {path}; set --data.path to UTF-8 text, or to {PYTHON_STDLIB}")
    if not os.path.isdir(path):
        raise UserError(f"{path} is neither a file nor a folder; set --data.path to UTF-8 text")
    files = _walk(path.resolve(), skipped=frozenset())
    if not files:
        raise UserError(f"the folder {path} has no files; put text there or set another --data.path")
    return files


def _stdlib_files() -> list[Path]:
    """The `*.py` files of Python's own library in path order, as many as fit in STDLIB_BYTES."""
    root = Path(sysconfig.get_paths()["stdlib"])
    chosen, total = [], 0
    for file in _walk(root, skipped=STDLIB_SKIPPED):
        # _sysconfigdata* is written by the build of this very Python
        if file.suffix != ".py" or file.name.startswith("_sysconfigdata"):
            continue
        total += file.stat().st_size
        if total > STDLIB_BYTES:
            break
        chosen.append(file)
    if not chosen:
        raise UserError(f"this Python has no source files in {root}; set --data.path to a text file or folder")
    return chosen


def _walk(root: Path, *, skipped: frozenset[str]) -> list[Path]:
    """Regular files below the root in path order, hidden and skipped folders left out."""

    def fail(error: OSError):
        raise UserError(f"cannot read the folder {error.filename}: {error.strerror}; make it readable or leave it out")

    files = []
    for folder, subfolders, names in os.walk(root, onerror=fail):
        subfolders[:] = [name for name in subfolders if name not in skipped and not name.startswith(".")]
        files.extend(Path(folder, name) for name in names if not name.startswith("."))
    return sorted((file for file in files if file.is_file()), key=lambda file: file.relative_to(root).parts)
