"""The tensors of a Megatron-LM checkpoint by the names of the table, whole and read one at a time."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from jaxtron.config import UserError
from jaxtron.weights.files import StoredTensor, WeightFiles, finite_float32
from jaxtron.weights.megatron.arguments import ArgumentReader, MeshSizes, sizes_of
from jaxtron.weights.megatron.arrays import DTYPES, PARTS, assembled, check_covered, of_groups
from jaxtron.weights.megatron.directory import Checkpoint, find_checkpoint, read_arguments
from jaxtron.weights.megatron.distributed import DistributedTensor, read_index
from jaxtron.weights.megatron.legacy import LegacyTensors
from jaxtron.weights.megatron.names import LAYERS, NUMBERED, Name, name_of
from jaxtron.weights.megatron.table import QKV, megatron_table
from jaxtron.weights.table import TensorTable

GATE = ".shared_experts.gate_weight"
NORM = "norm.weight"


@dataclass(frozen=True)
class Whole:
    """A tensor: its form, and what reads it in its own type."""

    stored: StoredTensor
    read: Callable[[], np.ndarray]


@dataclass(frozen=True)
class MegatronFiles(WeightFiles):
    """The tensors of a checkpoint."""

    _whole: Mapping[str, Whole] = field(repr=False, default_factory=dict)
    _adds_one: bool = False

    @property
    def described(self) -> str:
        """What says what the model is."""
        return "args"

    @property
    def says_tied(self) -> str:
        """What it says of a model whose head is its embedding."""
        return "args have untie_embeddings_and_output_weights False; bring back the checkpoint's own files"

    def read(self, name: str) -> np.ndarray:
        """The numbers of a tensor as float32; `UserError` where the file does not have them, or they are not finite."""
        whole = self._whole[name]
        values = finite_float32(whole.read(), name, whole.stored.path)
        return values + np.float32(1) if self._adds_one and name.endswith(NORM) else values


def open_checkpoint(directory: Path) -> tuple[MegatronFiles, TensorTable]:
    """A checkpoint's tensors, of which only the descriptions are read at once, and the table that they are of.

    `UserError` where a file is missing or damaged, or parts do not make a tensor.
    """
    checkpoint = find_checkpoint(directory)
    arguments = read_arguments(checkpoint)
    sizes = sizes_of(ArgumentReader(arguments))
    if checkpoint.format == "torch_dist":
        found = dict(_distributed(checkpoint))
    else:
        found = dict(_ranks(checkpoint, sizes, arguments.version))
    whole = dict(_parted(found, sizes))
    tensors = {name: one.stored for name, one in whole.items()}
    return MegatronFiles(directory, tensors, {}, whole, sizes.adds_one), megatron_table(is_gated=sizes.is_gated)


def _ranks(checkpoint: Checkpoint, sizes: MeshSizes, version: float) -> Iterator[tuple[str, Whole]]:
    tensors = LegacyTensors(checkpoint, sizes, version)
    for name in tensors.names:
        first = tensors.first(name)
        stored = StoredTensor(first.path, first.record.numbers.dtype, tensors.shape(name))
        yield name, Whole(stored, lambda name=name: tensors.read(name))


def _distributed(checkpoint: Checkpoint) -> Iterator[tuple[str, Whole]]:
    """Those of `torch_dist`: what has all layers, experts or halves in one is taken apart or put together."""
    parts: dict[str, dict[Name, Whole]] = {}
    for theirs, tensor in read_index(checkpoint.directory).tensors.items():
        if name_of(theirs) is None:
            continue
        if tensor.dtype not in DTYPES:
            raise UserError(f"{tensor.path} has {theirs} in {tensor.dtype}: only {', '.join(DTYPES)} are read")
        check_covered(tensor)
        for key, row in _rows(theirs, tensor):
            name = name_of(key)
            assert name is not None
            shape = tensor.shape if row is None else tensor.shape[1:]
            stored = StoredTensor(tensor.path, tensor.dtype, shape)
            whole = Whole(stored, lambda tensor=tensor, row=row: assembled(tensor, row))
            if parts.setdefault(name.whole, {}).setdefault(name, whole) is not whole:
                raise UserError(f"{tensor.path} has {key} twice, under another name; bring back the checkpoint's own")
    for whole, found in parts.items():
        yield whole, _together(whole, found)


def _rows(theirs: str, tensor: DistributedTensor) -> Iterator[tuple[str, int | None]]:
    """The name of a tensor, or, where it has all layers, that of each with its row."""
    if not theirs.startswith(LAYERS) or NUMBERED.fullmatch(theirs):
        yield theirs, None
    elif not tensor.shape:
        raise UserError(f"{tensor.path} has {theirs}, which has no layers; bring back the checkpoint's own")
    else:
        for layer in range(tensor.shape[0]):
            yield f"{LAYERS}{layer}.{theirs.removeprefix(LAYERS)}", layer


def _together(name: str, found: Mapping[Name, Whole]) -> Whole:
    """A tensor of halves and of experts that lie apart."""
    if len(found) == 1 and next(iter(found)) == Name(name):
        return next(iter(found.values()))
    experts = sorted({one.expert for one in found if one.expert is not None}) or [None]
    halves = sorted({one.half for one in found if one.half is not None}) or [None]
    first = next(iter(found.values())).stored
    wanted = [[Name(name, expert, half) for half in halves] for expert in experts]
    is_whole = experts in ([None], list(range(len(experts)))) and halves in ([None], [0, 1])
    if not is_whole or {one for names in wanted for one in names} != found.keys():
        raise UserError(f"{first.path} does not have all parts of {name}; bring back all files")
    if any((one.stored.shape, one.stored.dtype) != (first.shape, first.dtype) for one in found.values()):
        raise UserError(f"{first.path} has parts of {name} of several forms; bring back the checkpoint's own")
    shape = (first.shape[0] * len(halves), *first.shape[1:]) if halves != [None] else first.shape
    stored = StoredTensor(first.path, first.dtype, shape if experts == [None] else (len(experts), *shape))

    def read() -> np.ndarray:
        arrays = [np.concatenate([found[one].read() for one in names]) for names in wanted]
        return arrays[0] if experts == [None] else np.stack(arrays)

    return Whole(stored, read)


def _parted(found: Mapping[str, Whole], sizes: MeshSizes) -> Iterator[tuple[str, Whole]]:
    """With queries, keys and values apart, and without dimensions of one."""
    rows = (sizes.heads + 2 * sizes.groups) * sizes.dim
    for name, whole in found.items():
        stored = whole.stored
        before, qkv, kind = name.partition(f"{QKV}.")
        if qkv and kind in ("weight", "bias"):
            if stored.shape[:1] != (rows,):
                raise UserError(
                    f"{stored.path} has {name} of shape {list(stored.shape)}, and args make it {rows:,} rows; bring "
                    "back the checkpoint's own"
                )
            for part in PARTS:
                count = sizes.heads if part == "query" else sizes.groups
                form = StoredTensor(stored.path, stored.dtype, (count * sizes.dim, *stored.shape[1:]))
                yield f"{before}{QKV}.{part}.{kind}", Whole(form, _reader_of(whole, part, sizes))
        elif name.endswith(GATE) and stored.shape[:1] == (1,):
            form = StoredTensor(stored.path, stored.dtype, stored.shape[1:])
            yield name, Whole(form, lambda whole=whole: whole.read()[0])
        else:
            yield name, whole


def _reader_of(whole: Whole, part: str, sizes: MeshSizes) -> Callable[[], np.ndarray]:
    return lambda: of_groups(whole.read(), part, sizes.groups, sizes.dim)
