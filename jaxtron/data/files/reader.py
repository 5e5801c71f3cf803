"""Which files a data path means, and their text."""

import logging
import os
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from jaxtron.config import UserError, expand_home
from jaxtron.data.config import PYTHON_STDLIB
from jaxtron.data.files.decompress import read_blocks
from jaxtron.data.files.file_kind import (
    BYTE_ORDER_MARK,
    NOT_LINES,
    compression_of,
    ending,
    file_kind,
    is_json_lines,
    read_head,
)
from jaxtron.data.files.outputs import describe_file, describe_folder, without_outputs

STDLIB_BYTES = 8_000_000
# tests, tables and code that is not of the library itself
STDLIB_SKIPPED = frozenset(
    "dist-packages encodings idlelib lib2to3 pydoc_data site-packages test tests turtledemo".split()
)
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
MOST_SHOWN = 3
CONVERT = "convert it to UTF-8"

logger = logging.getLogger(__name__)


class NotTextError(ValueError):
    """Content that is no UTF-8 text: what it is instead, and the mend."""

    def __init__(self, reason: str, mend: str):
        super().__init__(reason)
        self.mend = mend


def find_files(paths: Sequence[str], *, cache: Path | None = None) -> list[Path]:
    """Every file of the paths, sorted within each; what is empty, hidden, our own output or the cache is left out."""
    files = []
    for path in without_outputs([Path(expand_home(name)) for name in paths], logger.warning):
        found = _stdlib_files() if str(path) == PYTHON_STDLIB else _files_below(path, len(paths) == 1, cache)
        files.extend(file for file in found if file.stat().st_size > 0)
    if not files:
        raise UserError(
            f"no text in --data.path {few(paths)}: every file there is empty or made by Jaxtron; give files with text"
        )
    for note in repeated(files):
        logger.warning(note)
    return files


def missing(path: Path) -> str:
    """What is said of a file or folder that is not there."""
    return f"no such file or folder {path}; set --data.path to UTF-8 text, or to {PYTHON_STDLIB}"


def check_text(files: Sequence[Path]) -> None:
    """UserError for the first file that is no plain text but documents in another form, and how to train on these."""
    for path in files:
        kind = file_kind(path)
        # a single object is JSON that stands for itself, as code has it
        if kind.kind == "lines" and (
            ending(path) != ".json" or is_json_lines(read_head(path, kind.compression), least=2)
        ):
            raise UserError(
                f"{path} is JSON lines, not text: --data.format chat trains on conversations, python -m "
                f"jaxtron.preprocess --input {path} makes token files of documents, and --data.format text takes "
                "it as it stands"
            )
        if kind.kind == "rows":
            raise UserError(f"{path} is Parquet, not text: make token files with python -m jaxtron.preprocess")


def read_document(path: Path) -> str:
    """Text of one file, decompressed, its line ends untouched; UserError names the byte where it stops being UTF-8."""
    try:
        content = read_content(path)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}; make it readable or leave it out") from error
    try:
        return decode_text(content)
    except NotTextError as error:
        raise UserError(f"{path} is {error}; {error.mend}, or leave it out of --data.path") from None


def read_content(path: Path) -> bytes:
    """Bytes of one file, decompressed; OSError is the caller's."""
    with path.open("rb") as raw:
        return b"".join(read_blocks(path, raw, compression_of(path)))


def decode_text(content: bytes) -> str:
    """UTF-8 text without the mark that may begin it; NotTextError says what the content is instead."""
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise NotTextError("UTF-16 text", CONVERT)
    if content.startswith(LFS_POINTER):
        raise NotTextError("a pointer of Git LFS and not the file itself", "fetch that (git lfs pull)")
    if (offset := content.find(b"\0")) >= 0:
        raise NotTextError(f"binary: a zero byte at offset {offset}", CONVERT)
    try:
        return content.removeprefix(BYTE_ORDER_MARK).decode("utf-8")
    except UnicodeDecodeError as error:
        place = error.start + (len(BYTE_ORDER_MARK) if content.startswith(BYTE_ORDER_MARK) else 0)
        raise NotTextError(f"not UTF-8 text: byte 0x{content[place]:02x} at offset {place}", CONVERT) from None


def read_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Number and content of each line, decompressed, without a mark of UTF-8 before it; OSError is the caller's."""
    number, rest = 0, b""
    if file_kind(path).kind == "rows":
        raise UserError(f"{path} is Parquet, not JSON lines; convert it")
    with path.open("rb") as raw:
        for block in read_blocks(path, raw, compression_of(path)):
            *lines, rest = (rest + block).split(b"\n")
            for line in lines:
                number += 1
                if number == 1 and line.strip() in (b"[", b"{"):
                    raise UserError(f"{path} line 1 is {NOT_LINES}")
                yield number, line.removeprefix(BYTE_ORDER_MARK)
    if rest:
        yield number + 1, rest.removeprefix(BYTE_ORDER_MARK)


def walk(root: Path, *, say: Callable[[str], None], alone: bool = True, cache: Path | None = None) -> list[Path]:
    """Files below a folder in path order; links are followed, and each folder is read once.

    What is hidden is left out, and what Jaxtron itself wrote, which is said. UserError for a folder that cannot be
    read, a link to nothing, and where nothing is left, unless that is not `alone` and had only what Jaxtron wrote.
    """
    if what := describe_folder(root):
        hint = f"its documents are in {root / 'documents'}" if what == "a curation" else "give the folder of its text"
        raise UserError(f"{root} is {what}, not data; {hint}")
    files: list[Path] = []
    left_out: dict[str, list[str]] = {}

    def is_ours(path: Path, what: str | None) -> bool:
        if what is not None:
            left_out.setdefault(what, []).append(str(path))
        return what is not None

    seen = {os.path.realpath(path) for path in (root, cache) if path is not None}
    for folder, subfolders, names in os.walk(root, onerror=_unreadable, followlinks=True):
        here, beside = Path(folder), [*names, *subfolders]
        inside, subfolders[:] = sorted(_visible(subfolders)), []
        for name in inside:
            real = os.path.realpath(here / name)
            if real not in seen and not is_ours(here / name, describe_folder(here / name)):
                subfolders.append(name)
            seen.add(real)
        for path in (here / name for name in _visible(names)):
            if path.is_symlink() and not path.exists():
                raise UserError(f"{path} is a link to {os.readlink(path)}, which is not there; mend or remove it")
            if path.is_file() and not is_ours(path, describe_file(path, beside)):
                files.append(path)
    for what, paths in left_out.items():
        say(f"left out of {root}: {what}, {few(sorted(paths))}")
    if not files and (alone or not left_out):
        raise UserError(f"the folder {root} has {_nothing_but(left_out)}")
    return _in_path_order(files, root)


def repeated(files: Sequence[Path]) -> list[str]:
    """A line for a person where files are named more than once: they are read as often."""
    several = [str(path) for path, count in Counter(map(os.path.realpath, files)).items() if count > 1]
    return [f"given more than once, and read as often: {few(several)}"] if several else []


def few(names: Sequence[str]) -> str:
    """The first of many names, and how many more there are."""
    more = f" and {len(names) - MOST_SHOWN:,} more" if len(names) > MOST_SHOWN else ""
    return ", ".join(names[:MOST_SHOWN]) + more


def _files_below(path: Path, alone: bool, cache: Path | None) -> list[Path]:
    # os.path rather than Path: False, not an exception, for what may not be looked at
    if os.path.isfile(path):
        return [path.resolve()]
    if not os.path.exists(path):
        raise UserError(missing(path))
    if not os.path.isdir(path):
        raise UserError(f"{path} is neither a file nor a folder; set --data.path to UTF-8 text")
    return walk(path.resolve(), say=logger.warning, alone=alone, cache=cache)


def _stdlib_files() -> list[Path]:
    """The `*.py` files of Python's own library in path order, as many as fit in STDLIB_BYTES."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files: list[Path] = []
    for folder, subfolders, names in os.walk(root, onerror=_unreadable):
        subfolders[:] = [name for name in _visible(subfolders) if name not in STDLIB_SKIPPED]
        files.extend(path for path in (Path(folder, name) for name in _visible(names)) if path.is_file())
    chosen, total = [], 0
    for file in _in_path_order(files, root):
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


def _visible(names: Sequence[str]) -> list[str]:
    return [name for name in names if not name.startswith(".")]


def _in_path_order(files: Sequence[Path], root: Path) -> list[Path]:
    return sorted(files, key=lambda file: file.relative_to(root).parts)


def _nothing_but(left_out: dict[str, list[str]]) -> str:
    """What a folder without files to read has."""
    if indices := [path for path in left_out.get("token files", ()) if path.endswith(".idx")]:
        return f"token files, not text; --data.path takes their prefix, such as {indices[0].removesuffix('.idx')}"
    what = f"only {' and '.join(left_out)}" if left_out else "no files"
    return f"{what}; put text there or give another"


def _unreadable(error: OSError) -> None:
    raise UserError(f"cannot read the folder {error.filename}: {error.strerror}; make it readable or leave it out")
