"""Tensors of a directory of safetensors files by name, read one at a time."""

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from jaxtron.config import UserError, shown
from jaxtron.config.json_text import each_once
from jaxtron.words import plural

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = ("pytorch_model*.bin", "*.pt", "*.pth", "*.ckpt")
POINTER = b"version https://git-lfs"
LONGEST_NAME = 256
# letters of what a library says
MOST_REASON = 160
# safetensors' names of the types that are read, and their bytes
TYPES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor by what the head of its file says."""

    path: Path
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """In the file."""
        return TYPES.get(self.dtype, 1) * prod(self.shape)


@dataclass(frozen=True)
class WeightFiles:
    """The tensors of a directory; made by `open_files`, and read inside of it."""

    directory: Path
    tensors: Mapping[str, StoredTensor]
    """By name."""
    _open: Mapping[Path, Any] = field(repr=False)

    @property
    def described(self) -> str:
        """What beside them says what the model is."""
        return "config.json"

    @property
    def says_tied(self) -> str:
        """What it says of a model whose head is its embedding, and the mend if it is not."""
        return (
            "config.json has tie_word_embeddings true, or leaves it out for that; say false there if the head is one "
            "of its own"
        )

    @property
    def num_bytes(self) -> int:
        """Of all tensors."""
        return sum(tensor.num_bytes for tensor in self.tensors.values())

    def read(self, name: str) -> np.ndarray:
        """The numbers of a tensor as float32; `UserError` where they are of no weight's type, or not finite."""
        tensor = self.tensors[name]
        if tensor.dtype not in TYPES:
            raise UserError(
                f"{tensor.path} has {name} in {tensor.dtype}: only {', '.join(TYPES)} are read; save the model without "
                "quantization"
            )
        try:
            values = self._open[tensor.path].get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise _damaged(tensor.path, error) from None
        return finite_float32(values, name, tensor.path)


def finite_float32(values: np.ndarray, name: str, path: Path) -> np.ndarray:
    """The same numbers; `UserError` where some are not finite, or too large."""
    if values.dtype == ml_dtypes.bfloat16:
        # the upper half of a float32: faster than a cast
        values = (values.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    else:
        with np.errstate(over="ignore"):
            values = values.astype(np.float32, copy=False)
    if not np.isfinite(values).all():
        raise UserError(f"{path} has numbers in {name} that are not finite; bring back a good copy")
    return values


@contextlib.contextmanager
def open_files(directory: Path) -> Iterator[WeightFiles]:
    """The files of a directory, whose heads alone are read at once; `UserError` where one is missing or damaged.

    Either one file, or several with an index, whose names may not lead out of the directory. Pickles, which can run
    code, are never opened.
    """
    index = _read_index(directory)
    names = sorted(set(index.values())) if index is not None else [SINGLE]
    missing = [name for name in names if not (directory / name).is_file()]
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise UserError(f"{directory} lacks {missing[0]}{more}, which {INDEX} names; bring it back")
    with contextlib.ExitStack() as stack:
        files, tensors = {}, {}
        for path in (directory / name for name in names):
            try:
                files[path] = stack.enter_context(safe_open(path, framework="numpy"))
                for name in files[path].keys():
                    part = files[path].get_slice(name)
                    if name in tensors:
                        raise UserError(f"{name} is in {tensors[name].path} and in {path}; remove one of them")
                    tensors[name] = StoredTensor(path, part.get_dtype(), tuple(part.get_shape()))
            except (SafetensorError, OSError) as error:
                raise _damaged(path, error) from None
        if index is not None:
            _check_index(directory, index, tensors)
        yield WeightFiles(directory, tensors, files)


def _damaged(path: Path, error: Exception) -> UserError:
    try:
        with path.open("rb") as file:
            is_pointer = file.read(len(POINTER)) == POINTER
    except OSError as reason:
        # of which the library says that there is no such file
        return UserError(f"cannot read {path}: {reason.strerror}; bring it back, or give yourself the right to")
    if is_pointer:
        return UserError(f"{path} is a pointer of Git LFS and not what it points to; run git lfs pull there")
    reason = str(error).splitlines()[0][:MOST_REASON] if str(error) else type(error).__name__
    return UserError(f"{path} is no whole file of safetensors: {reason}; bring back a good copy")


def _read_index(directory: Path) -> dict[str, str] | None:
    """The file of each tensor by an index; None where there is one file of all."""
    path = directory / INDEX
    if (directory / SINGLE).is_file():
        if path.is_file():
            raise UserError(f"{directory} has both {SINGLE} and {INDEX}; remove the one that is not the model's")
        return None
    if not path.is_file():
        raise _nothing_there(directory)
    try:
        found = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=each_once)
        index = found["weight_map"]
    except (OSError, ValueError, RecursionError, KeyError, TypeError):
        index = None
    if not isinstance(index, dict) or not index:
        raise UserError(f"{path} is not JSON with a weight_map of tensors; bring back the model's own")
    for name, file in index.items():
        is_plain = isinstance(file, str) and file.endswith(".safetensors") and not set(file) & set("/\\\0")
        # longer than any that a folder can have
        is_plain = is_plain and len(file.encode(errors="replace")) < LONGEST_NAME
        if not is_plain:
            raise UserError(
                f"{path} says that {shown(name)} is in {shown(file)}: that is no name of a .safetensors file in "
                f"{directory}; bring back the model's own"
            )
    return index


def _check_index(directory: Path, index: Mapping[str, str], tensors: Mapping[str, StoredTensor]) -> None:
    """`UserError` where the index and the files do not agree."""
    for name, file in index.items():
        if name not in tensors or tensors[name].path.name != file:
            raise UserError(f"{directory / INDEX} says that {name} is in {file}, where it is not; bring back both")
    extra = sorted(tensors.keys() - index.keys())
    if extra:
        raise UserError(
            f"{tensors[extra[0]].path} has {plural(len(extra), 'tensor')} that {INDEX} does not name, such as "
            f"{extra[0]}; bring back both"
        )


def _nothing_there(directory: Path) -> UserError:
    broken = next((name for name in (SINGLE, INDEX) if (directory / name).is_symlink()), None)
    if broken is not None:
        return UserError(
            f"{directory / broken} is a link to a file that is not there; bring it back, or fetch it again"
        )
    pickles = sorted(path.name for pattern in PICKLES for path in directory.glob(pattern))
    if pickles:
        return UserError(
            f"{directory} has {pickles[0]} and no safetensors: that is a pickle, which can run code, and is never "
            "opened; load it where you trust it and save it again by save_pretrained(..., safe_serialization=True)"
        )
    others = sorted(path.name for path in directory.glob("*.safetensors") if path.is_file())
    what = f", only {others[0]} without an index" if others else ""
    return UserError(f"{directory} has neither {SINGLE} nor {INDEX}{what}; give a directory of Hugging Face weights")
