"""Holds the files that are written by hand, and what is read here, to torch itself: bit for bit, both ways.

    pip install torch
    python -m tests.megatron.against_torch

The suite does without torch; this says that what it reads and writes is what torch writes and reads.
"""

import tempfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import torch
from torch.distributed import checkpoint

from jaxtron.weights.megatron.arrays import array_of
from jaxtron.weights.megatron.files import open_checkpoint
from jaxtron.weights.megatron.pickles import TensorRecord
from jaxtron.weights.megatron.torch_file import open_torch_file
from tests.megatron.writer import torch_old, torch_zip
from tests.weights.megatron.models import ARGS, EXPERTS, saved_distributed, whole_tensors

TYPES = {
    torch.float64: np.float64,
    torch.float32: np.float32,
    torch.float16: np.float16,
    torch.bfloat16: ml_dtypes.bfloat16,
}


def arrays() -> dict[str, np.ndarray]:
    """Of all types and of several forms, one a view with strides of its own."""
    random = np.random.default_rng(0)
    found = {}
    for dtype in TYPES.values():
        for shape in ((3, 5), (7,), (), (0, 2), (2, 3, 4)):
            found[f"{np.dtype(dtype).name} {shape}"] = random.standard_normal(shape).astype(dtype)
    found["view"] = random.standard_normal((4, 6)).astype(np.float32).T[1:, ::2]
    return found


def as_torch(array: np.ndarray) -> torch.Tensor:
    """The same bits as a tensor."""
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(array.copy() if array.flags.c_contiguous else array)


def bits(tensor: torch.Tensor) -> bytes:
    """Of a tensor's numbers in order."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def check_written_by_hand(folder: Path) -> None:
    """torch loads both forms, by its own restricted reader too."""
    given = arrays()
    for write, is_restricted in ((torch_zip, True), (torch_zip, False), (torch_old, True), (torch_old, False)):
        path = folder / "written.pt"
        path.write_bytes(write({"model": given, "list": [1, 2.5, None, True, "text"]}))
        loaded = torch.load(path, map_location="cpu", weights_only=is_restricted)
        assert loaded["list"] == [1, 2.5, None, True, "text"]
        for name, array in given.items():
            assert loaded["model"][name].shape == array.shape, name
            assert bits(loaded["model"][name]) == np.ascontiguousarray(array).tobytes(), (write, name)
    print(f"torch.load reads {len(given)} tensors of both forms written by hand")


def check_read_here(folder: Path) -> None:
    """What torch saves in both forms, numbers shared between tensors too."""
    given = {name: as_torch(array) for name, array in arrays().items()}
    shared = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    given |= {"whole": shared, "row": shared[2], "column": shared[:, 3], "turned": shared.T}
    for is_zip in (True, False):
        path = folder / "saved.pt"
        torch.save({"model": given}, path, _use_new_zipfile_serialization=is_zip)
        file = open_torch_file(path)
        for name, tensor in given.items():
            record: Any = file.value["model"][name]
            assert isinstance(record, TensorRecord) and record.shape == tuple(tensor.shape), name
            assert np.ascontiguousarray(array_of(file, record, name)).tobytes() == bits(tensor), (is_zip, name)
    print(f"{len(given)} tensors of both forms that torch.save writes are read here")


def check_distributed_by_hand(folder: Path) -> None:
    """torch's distributed checkpoints load what is written by hand."""
    for name, args in (("llama", ARGS), ("experts", EXPERTS)):
        given = whole_tensors(args, ml_dtypes.bfloat16)
        directory = saved_distributed(folder / name, args, given, tensor=2, expert=2, form="numbered", common=True)
        metadata = checkpoint.FileSystemReader(directory).read_metadata()
        wanted = {
            key: torch.empty(tuple(entry.size), dtype=entry.properties.dtype)
            for key, entry in metadata.state_dict_metadata.items()
        }
        checkpoint.load(wanted, checkpoint_id=directory, no_dist=True)
        for key, tensor in wanted.items():
            own = key.replace(".experts.experts.", ".experts.")
            own = own.replace("self_attention.linear_qkv.layer_norm_", "input_layernorm.")
            own = own.replace("mlp.linear_fc1.layer_norm_", "pre_mlp_layernorm.")
            assert bits(tensor) == given[own].tobytes(), key
        print(f"torch.distributed.checkpoint reads {len(wanted)} tensors of {name} written by hand")


def check_distributed_read_here(folder: Path) -> None:
    """What torch's distributed checkpoints save, beside a file of what is no tensor."""
    given = whole_tensors(ARGS, ml_dtypes.bfloat16)
    directory = saved_distributed(folder / "own", ARGS, given, common=True)
    for path in (*directory.glob("*.distcp"), directory / ".metadata"):
        path.unlink()
    checkpoint.save({name: as_torch(array) for name, array in given.items()}, checkpoint_id=directory, no_dist=True)
    files, _ = open_checkpoint(directory)
    for name in given:
        if ".linear_qkv." not in name:
            assert files.read(name).tobytes() == given[name].astype(np.float32).tobytes(), name
    print(f"{len(files.tensors)} tensors that torch.distributed.checkpoint writes are read here")


if __name__ == "__main__":
    print(f"torch {torch.__version__}")
    with tempfile.TemporaryDirectory() as place:
        for check in (
            check_written_by_hand,
            check_read_here,
            check_distributed_by_hand,
            check_distributed_read_here,
        ):
            check(Path(place))
