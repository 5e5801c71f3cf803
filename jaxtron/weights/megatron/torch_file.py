"""A file as `torch.save` writes it: a value, and the numbers of its tensors, read when they are asked for.

Two forms: an uncompressed ZIP archive (torch 1.6 and later), and before it pickles one after the other with the numbers
behind them. Without NumPy: settings are read from such files with every configuration.
"""

import io
import mmap
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from jaxtron.config import UserError
from jaxtron.weights.megatron.pickles import PickleReader, StoredNumbers

MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
ARCHIVE = b"PK\x03\x04"
POINTER = b"version https://git-lfs"
# bytes of a number, by the names of files of safetensors
WIDTHS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "U8": 1, "I8": 1, "I16": 2, "I32": 4, "I64": 8, "BOOL": 1}
DAMAGE = (
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    KeyError,
    IndexError,
    EOFError,
    OSError,
    ValueError,
    OverflowError,
    NotImplementedError,
    RuntimeError,
)


class TorchFile:
    """A value with references to numbers (`StoredNumbers`), and these by reference."""

    def __init__(self, value: Any, read: Callable[[StoredNumbers], bytes]) -> None:
        self.value = value
        self._read = read

    def read(self, numbers: StoredNumbers) -> bytes:
        """The bytes of numbers, little-endian; `UserError` where the file does not have them whole."""
        found = self._read(numbers)
        width = WIDTHS[numbers.dtype]
        return found[numbers.start * width : (numbers.start + numbers.count) * width]


def open_torch_file(path: Path) -> TorchFile:
    """The file at a path; `UserError` where there is none or it is damaged."""
    try:
        with path.open("rb") as file:
            beginning = file.read(len(POINTER))
            if beginning == POINTER:
                raise UserError(f"{path} is a pointer of Git LFS and not what it points to; run git lfs pull there")
            if not beginning:
                raise UserError(f"{path} is empty; bring back a good copy")
            if beginning.startswith(ARCHIVE):
                return _archive(lambda: path.open("rb"), str(path))
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _one_after_the_other(data, path)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None


def torch_file_of(data: bytes, where: str) -> TorchFile:
    """A file that lies in another: `data` are its bytes, `where` what messages call it."""
    if not data.startswith(ARCHIVE):
        _damaged(where, "it is no ZIP archive")
    return _archive(lambda: io.BytesIO(data), where)


def _archive(opened: Callable[[], io.BytesIO | io.BufferedReader], where: str) -> TorchFile:
    """Of torch 1.6 and later: `NAME/data.pkl` and `NAME/data/KEY`. It is open only while something is read."""
    try:
        with opened() as stream, zipfile.ZipFile(stream) as archive:
            names = archive.namelist()
            pickles = [name for name in names if name.endswith("/data.pkl")]
            if len(pickles) != 1:
                raise ValueError(f"{len(pickles)} of its members are data.pkl")
            folder = pickles[0].removesuffix("data.pkl")
            is_other = f"{folder}byteorder" in names and _member(archive, f"{folder}byteorder") != b"little"
            content = _member(archive, pickles[0])
    except DAMAGE as error:
        _damaged(where, error)
    if is_other:
        raise _of_other_machines(where)

    def read(numbers: StoredNumbers) -> bytes:
        name = f"{folder}data/{numbers.key}"
        try:
            with opened() as stream, zipfile.ZipFile(stream) as archive:
                found = _member(archive, name)
            if len(found) < (numbers.start + numbers.count) * WIDTHS[numbers.dtype]:
                raise ValueError(f"{name} is too short")
        except DAMAGE as error:
            _damaged(where, error)
        return found

    return TorchFile(PickleReader(content, where).load(), read)


def _member(archive: zipfile.ZipFile, name: str) -> bytes:
    """A member's bytes, which have the checksum that the archive says."""
    member = archive.getinfo(name)
    if member.compress_type != zipfile.ZIP_STORED:
        # torch never does, and a few bytes could become many
        raise ValueError(f"{name} is compressed")
    return archive.read(member)


def _one_after_the_other(data: mmap.mmap, path: Path) -> TorchFile:
    """Of torch before 1.6: a magic number, a version, the machine, the value, keys; then the numbers of each key."""
    where = str(path)
    reader = PickleReader(data, where)
    if data[:2] not in (b"\x80\x02", b"\x80\x03", b"\x80\x04") or reader.load() != MAGIC:
        raise UserError(f"{where} is no file of torch; bring back a good copy")
    if reader.load() != PROTOCOL:
        _damaged(where, "its version is not known")
    machine, value, keys = reader.load(), reader.load(), reader.load()
    if not isinstance(machine, dict) or machine.get("little_endian") is not True:
        raise _of_other_machines(where)
    if not isinstance(keys, list) or not all(isinstance(key, str | int) for key in keys):
        _damaged(where, "its keys are no list")
    places = _places(data, reader.position, [(str(key), reader.dtypes.get(str(key))) for key in keys], where)

    def read(numbers: StoredNumbers) -> bytes:
        start, end = places.get(numbers.key, (0, 0))
        if end - start < (numbers.start + numbers.count) * WIDTHS[numbers.dtype]:
            _damaged(where, f"the numbers of {numbers.key} are too short")
        try:
            with path.open("rb") as file:
                file.seek(start)
                found = file.read(end - start)
        except OSError as error:
            _damaged(where, error)
        if len(found) < end - start:
            _damaged(where, "it ends early")
        return found

    return TorchFile(value, read)


def _of_other_machines(where: str) -> UserError:
    return UserError(f"{where} has its numbers in the order of bytes of other machines; save it on one like this")


def _places(
    data: mmap.mmap, position: int, keys: list[tuple[str, str | None]], where: str
) -> dict[str, tuple[int, int]]:
    """Where the numbers of each key begin and end: they lie one after the other, each run behind its length."""
    found = {}
    for key, dtype in keys:
        count = int.from_bytes(data[position : position + 8], "little", signed=True)
        # numbers that nothing refers to have no type
        end = position + 8 + count * WIDTHS[dtype or "F32"]
        if dtype is None or count < 0 or end > len(data):
            _damaged(where, f"the numbers of {key} are not there")
        found[key] = (position + 8, end)
        position = end
    return found


def _damaged(where: str, reason: Exception | str) -> NoReturn:
    said = str(reason).strip("'\"").splitlines()
    raise UserError(
        f"{where} is no whole file of torch: {said[0][:120] if said else type(reason).__name__}; bring back a good copy"
    )
