"""Files of safetensors written in place: room for all tensors first, then their numbers in any order.

Whoever writes has no tensor in memory but through the pages of a mapped file, so that models larger than memory can be.
"""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jaxtron.weights.files import INDEX, SINGLE, TYPES

# of --dtype: what NumPy and safetensors call it
DTYPES: dict[str, tuple[np.dtype, str]] = {
    "fp32": (np.dtype(np.float32), "F32"),
    "fp16": (np.dtype(np.float16), "F16"),
    "bf16": (np.dtype(ml_dtypes.bfloat16), "BF16"),
}
# so that numbers begin at a multiple of their size
ALIGNED = 8


@dataclass(frozen=True)
class WeightShards:
    """Tensors in a directory, by name as arrays in its files; `close` when they are written."""

    tensors: Mapping[str, np.ndarray]
    num_bytes: int
    _files: Mapping[Path, np.memmap] = field(repr=False)

    def close(self) -> None:
        """Everything is on the disk after this."""
        for path, mapped in self._files.items():
            mapped.flush()
            with path.open("rb") as file:
                os.fsync(file.fileno())


def make_shards(
    directory: Path, shapes: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, str], shard_bytes: int
) -> WeightShards:
    """Makes the files of these tensors, names of `DTYPES` their types, of so many bytes at most where a tensor alone is
    not larger; and their index where there are several. An `OSError` where the disk has no room for all."""
    types = {name: DTYPES[dtypes[name]] for name in shapes}
    names = sorted(shapes, key=_natural)
    sizes = {name: TYPES[types[name][1]] * prod(shapes[name]) for name in names}
    shards: list[list[str]] = [[]]
    for name in names:
        if shards[-1] and sum(sizes[one] for one in shards[-1]) + sizes[name] > shard_bytes:
            shards.append([])
        shards[-1].append(name)
    paths = [
        directory / (SINGLE if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors")
        for number in range(1, len(shards) + 1)
    ]
    tensors: dict[str, np.ndarray] = {}
    files: dict[Path, np.memmap] = {}
    for path, shard in zip(paths, shards, strict=True):
        head: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        # each then begins at a multiple of its numbers' size
        for name in sorted(shard, key=lambda one: -TYPES[types[one][1]]):
            place = [end, end + sizes[name]]
            head[name] = {"dtype": types[name][1], "shape": list(shapes[name]), "data_offsets": place}
            end += sizes[name]
        text = json.dumps(head, ensure_ascii=False, separators=(",", ":")).encode()
        text += b" " * (-len(text) % ALIGNED)
        with path.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.flush()
            if end:
                # else a full disk would be told by a signal, when a page is written
                os.posix_fallocate(file.fileno(), 8 + len(text), end)
        files[path] = np.memmap(path, np.uint8, "r+")
        for name in shard:
            first, last = head[name]["data_offsets"]
            numbers = files[path][8 + len(text) + first : 8 + len(text) + last]
            tensors[name] = np.asarray(numbers).view(types[name][0]).reshape(shapes[name])
    if len(shards) > 1:
        index = {name: path.name for path, shard in zip(paths, shards, strict=True) for name in shard}
        total = {"total_parameters": sum(map(prod, shapes.values())), "total_size": sum(sizes.values())}
        (directory / INDEX).write_text(json.dumps({"metadata": total, "weight_map": index}, indent=2) + "\n")
    return WeightShards(tensors, sum(sizes.values()), files)


def _natural(name: str) -> list[tuple[int, str]]:
    """An order in which layer 10 comes after layer 9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
