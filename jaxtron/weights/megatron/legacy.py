"""Checkpoints of the older format: a file of each rank, with the parts that it had of tensors and of layers."""

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from jaxtron.config import UserError
from jaxtron.weights.megatron.arguments import MeshSizes
from jaxtron.weights.megatron.arrays import array_of, by_heads, joined_parts, joined_shape
from jaxtron.weights.megatron.directory import Checkpoint, rank_files
from jaxtron.weights.megatron.names import NUMBERED, Joined, joined, moved, name_of
from jaxtron.weights.megatron.pickles import TensorRecord
from jaxtron.weights.megatron.torch_file import TorchFile, open_torch_file

Rank = tuple[int, int, int]
"""Of tensor, pipeline and expert parallelism."""


@dataclass(frozen=True)
class Part:
    """What a rank has of a tensor."""

    path: Path
    file: TorchFile
    record: TensorRecord
    theirs: str

    def array(self) -> np.ndarray:
        """Its numbers."""
        return array_of(self.file, self.record, f"{self.path}, {self.theirs},")


@dataclass
class Pieces:
    """Of a tensor in the whole model: the parts of tensor-parallel ranks, of each expert where it is of all."""

    of_experts: dict[int | None, dict[int, Part]] = field(default_factory=dict)


class LegacyTensors:
    """All tensors of a checkpoint by name."""

    def __init__(self, checkpoint: Checkpoint, sizes: MeshSizes, version: float) -> None:
        """Opens the files of all ranks; `UserError` where one is missing or damaged."""
        self.directory = checkpoint.directory
        self._sizes, self._version = sizes, version
        self._pieces: dict[str, Pieces] = {}
        files = _by_rank(rank_files(checkpoint), sizes, self.directory)
        firsts: dict[tuple[int, int], int] = {}
        models = {rank: list(_models(path, file)) for rank, (path, file) in files.items()}
        chunks = max(len(found) for found in models.values())
        first = 0
        # chunk after chunk goes through the stages
        for chunk in range(chunks):
            for stage in range(sizes.pipeline):
                firsts[chunk, stage] = first
                ranks = [found for (_, other, _), found in models.items() if other == stage]
                first += max((_num_layers(found[chunk]) for found in ranks if chunk < len(found)), default=0)
        for rank, found in models.items():
            for chunk, tensors in enumerate(found):
                self._add(rank, firsts[chunk, rank[1]], *files[rank], tensors)
        self._check()

    def _add(self, rank: Rank, first: int, path: Path, file: TorchFile, tensors: Mapping[str, Any]) -> None:
        tensor, _, expert = rank
        names = {theirs: name_of(theirs) for theirs in tensors}
        local = 1 + max((name.expert for name in names.values() if name and name.expert is not None), default=-1)
        for theirs, name in names.items():
            record = tensors[theirs]
            if name is None or not isinstance(record, TensorRecord):
                # None, or what no model computes with
                continue
            number = None if name.expert is None else expert * local + name.expert
            piece = self._pieces.setdefault(moved(name.whole, first), Pieces())
            part = Part(path, file, record, theirs)
            piece.of_experts.setdefault(number, {}).setdefault(tensor, part)

    def _check(self) -> None:
        """`UserError` where a tensor lacks a rank's part, or parts are not alike."""
        for whole, pieces in self._pieces.items():
            found = [part for parts in pieces.of_experts.values() for part in parts.values()]
            if any(len(parts) != self._sizes.tensor for parts in pieces.of_experts.values()):
                raise UserError(f"{self.directory}: not all ranks have their part of {whole}; bring back all files")
            numbers = [number for number in pieces.of_experts if number is not None]
            if numbers and sorted(numbers) != list(range(len(pieces.of_experts))):
                raise UserError(f"{self.directory}: some experts' parts of {whole} are not there; bring back all files")
            one = found[0]
            for part in found:
                if (part.record.shape, part.record.numbers.dtype) != (one.record.shape, one.record.numbers.dtype):
                    raise UserError(
                        f"{part.path} has {part.theirs} of another form than {one.path}; bring back all files"
                    )
            if joined(whole, is_gated=self._sizes.is_gated) == "halves" and one.record.shape[0] % 2:
                raise UserError(f"{one.path} has {one.theirs} of an odd size, which is no gate and what it opens")

    @property
    def names(self) -> Iterable[str]:
        """Those of the table."""
        return self._pieces.keys()

    def first(self, whole: str) -> Part:
        """A part of a tensor."""
        return next(iter(next(iter(self._pieces[whole].of_experts.values())).values()))

    def shape(self, whole: str) -> tuple[int, ...]:
        """Of the whole tensor."""
        experts = self._pieces[whole].of_experts
        shape = joined_shape(self.first(whole).record.shape, self._sizes.tensor, self._how(whole))
        return shape if None in experts else (len(experts), *shape)

    def read(self, whole: str) -> np.ndarray:
        """The whole tensor, in its own type."""
        experts = self._pieces[whole].of_experts
        if None in experts:
            return self._joined(whole, experts[None])
        return np.stack([self._joined(whole, experts[number]) for number in range(len(experts))])

    def _joined(self, whole: str, parts: Mapping[int, Part]) -> np.ndarray:
        arrays = [parts[rank].array() for rank in range(self._sizes.tensor)]
        if ".linear_qkv." in whole and self._version < 2:
            heads = self._sizes.heads // self._sizes.tensor
            arrays = [by_heads(array, heads, self._version) for array in arrays]
        return joined_parts(arrays, self._how(whole))

    def _how(self, whole: str) -> Joined:
        return joined(whole, is_gated=self._sizes.is_gated)


def _by_rank(paths: list[Path], sizes: MeshSizes, directory: Path) -> dict[Rank, tuple[Path, TorchFile]]:
    """The opened files of all ranks; `UserError` where one is missing, or more are there than there were ranks."""
    found = {}
    for path in paths:
        numbers = [int(number) for number in path.parent.name.removeprefix("mp_rank_").split("_")]
        tensor, *others = numbers
        if len(others) == 1:
            others = [*others, 0] if sizes.pipeline > 1 or sizes.expert == 1 else [0, *others]
        pipeline, expert = others or (0, 0)
        found[tensor, pipeline, expert] = path
    expected = {
        (tensor, pipeline, expert)
        for tensor in range(sizes.tensor)
        for pipeline in range(sizes.pipeline)
        for expert in range(sizes.expert)
    }
    said = f"tensor, pipeline and expert parallelism of {sizes.tensor}, {sizes.pipeline} and {sizes.expert}"
    if missing := sorted(expected - found.keys()):
        raise UserError(f"{directory} lacks the file of rank {missing[0]} of {said}; bring back all files")
    if extra := sorted(found.keys() - expected):
        raise UserError(f"{found[extra[0]].parent} is no rank's folder of {said}, which args say; remove it")
    return {rank: (found[rank], open_torch_file(found[rank])) for rank in sorted(expected)}


def _models(path: Path, file: TorchFile) -> Iterator[dict[str, Any]]:
    """The tensors by name that a file has: those of its model, or of each of the parts that it had."""
    value = file.value
    if not isinstance(value, dict):
        raise UserError(f"{path} has no model; bring back a good copy")
    names = ["model"] if "model" in value else []
    if not names:
        names = list(itertools.takewhile(lambda name: name in value, (f"model{n}" for n in itertools.count())))
    if not names or not all(isinstance(value[name], dict) for name in names):
        raise UserError(f"{path} has no model; bring back a good copy")
    for name in names:
        yield dict(_flat(path, value[name]))


def _flat(path: Path, tree: Mapping[Any, Any]) -> Iterator[tuple[str, Any]]:
    """The values of nested dictionaries, by their keys with points between."""
    waiting, seen = [("", tree)], {id(tree)}
    while waiting:
        before, folder = waiting.pop()
        for key, value in folder.items():
            if isinstance(key, str) and isinstance(value, dict):
                if id(value) in seen:
                    raise UserError(f"{path} has {before}{key} twice in its model; bring back a good copy")
                seen.add(id(value))
                waiting.append((f"{before}{key}.", value))
            elif isinstance(key, str):
                yield f"{before}{key}", value


def _num_layers(tensors: Iterable[str]) -> int:
    numbers = (NUMBERED.fullmatch(name.whole) for name in map(name_of, tensors) if name is not None)
    return 1 + max((int(found[1]) for found in numbers if found), default=-1)
