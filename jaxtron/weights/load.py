"""The parameters of a model from a directory of others' weights, each device with its own part of each."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np

from jaxtron.config import UserError
from jaxtron.models.family import FamilyConfig
from jaxtron.pipeline.partition import Partition
from jaxtron.sharding.blueprint import Blueprint
from jaxtron.sharding.parameters import ParameterSpec, shardings
from jaxtron.typing import Array, PyTree
from jaxtron.weights.files import WeightFiles, open_files
from jaxtron.weights.hub import family_of_hub
from jaxtron.weights.megatron.directory import is_megatron
from jaxtron.weights.megatron.files import open_checkpoint
from jaxtron.weights.rows import read_parameter
from jaxtron.weights.table import Place, TensorTable, own_shape
from jaxtron.words import plural, readable_bytes

MOST_NAMES = 3
Allow = Callable[[list[str], list[str]], None]


def load_parameters(
    directory: Path,
    model: FamilyConfig,
    blueprint: Blueprint,
    partitions: Mapping[str, Partition],
    allow: Allow | None = None,
) -> PyTree:
    """The blueprint's parameters with the numbers of the files, as they lie at rest; inside `sharding.use(rules)`.

    `model` is what the directory says (`hub_settings`), and `partitions` has the layers of each stack.
    Tensors are read one at a time, by each process those that its devices need; of a parameter the process's own parts
    are on the host at once. `UserError` where names or shapes are not the model's, before any numbers are read. With
    `allow`, which gets the parameters that are missing and the tensors that are left over and may refuse them, those
    that are missing are None.
    """
    with open_weights(directory) as (files, table):
        reader = WeightReader(files, table, model)
        missing = reader.check(list(wanted_rows(blueprint, table, model, partitions)), allow)
        if jax.process_index() == 0:
            print(f"reading {plural(len(files.tensors), 'tensor')}, {readable_bytes(files.num_bytes)}, of {directory}")
        leaves = [
            None if name in missing else reader.load(name, spec, sharding, partition_of(name, partitions))
            for (name, spec), sharding in zip(
                blueprint.names.items(), jax.tree.leaves(shardings(blueprint.parameters)), strict=True
            )
        ]
    return jax.tree.unflatten(jax.tree.structure(blueprint.parameters), leaves)


@contextlib.contextmanager
def open_weights(directory: Path) -> Iterator[tuple[WeightFiles, TensorTable]]:
    """A directory's tensors, whoever wrote it, and the table that they are of; `UserError` where they are not whole."""
    if is_megatron(directory):
        yield open_checkpoint(directory)
        return
    family = family_of_hub(directory)
    with open_files(directory) as files:
        yield files, family.table_of(files.tensors)


@dataclass(frozen=True)
class WantedRow:
    """A parameter, or its row of one layer, that a table finds in a file."""

    name: str
    """The parameter's, whole."""
    place: Place | None
    """None: the family's files never have it."""
    shape: tuple[int, ...]
    """Without the padding of the vocabulary."""


def partition_of(name: str, partitions: Mapping[str, Partition]) -> Partition | None:
    """Where the layers are that a stacked parameter has, of partitions by path; None of others."""
    found = (part for path, part in partitions.items() if name.startswith(path.replace("/", ".") + "."))
    return next(found, None)


def wanted_rows(
    blueprint: Blueprint, table: TensorTable, model: FamilyConfig, partitions: Mapping[str, Partition]
) -> Iterator[WantedRow]:
    """All that the model has, of all layers."""
    for name, spec in blueprint.names.items():
        partition = partition_of(name, partitions)
        for row in (None,) if partition is None else range(partition.num_layers):
            place = table.find(model, name, row)
            shape = spec.shape if row is None else spec.shape[1:]
            yield WantedRow(name, place, shape if place is None else own_shape(place.tensor, model, shape))


class WeightReader:
    """Parameters of a directory's files by a family's table."""

    def __init__(self, files: WeightFiles, table: TensorTable, model: FamilyConfig) -> None:
        self._files, self._table, self._model = files, table, model
        # the model without a head has names that begin later
        self._has_base = any(name.startswith(table.base) for name in files.tensors)
        # what is tied is stored once, by either name
        self._other_names: dict[str, str] = {}
        self._is_tied = bool(getattr(model, "tied_head", False))
        if self._is_tied and table.head in files.tensors:
            embedding = self._stored(table.place(model, table.embedding).tensors[0])
            if embedding not in files.tensors:
                self._other_names[embedding] = table.head

    def check(self, wanted: list[WantedRow], allow: Allow | None = None) -> set[str]:
        """`UserError` unless the files have just the tensors that are wanted, in their shapes.

        What `allow` gets and does not refuse may differ: the parameters that are missing whole are given back.
        """
        names = {self._stored(name): one for one in wanted if one.place is not None for name in one.place.tensors}
        there, further = self._files.tensors, self._table.further
        beyond = tuple(name.removesuffix(further) for name in there if further and name.endswith(further))
        left = [
            name
            for name in there
            if name not in names
            and not name.endswith(self._table.ignored)
            and not name.startswith(beyond)
            and not self._is_tied_head(name)
        ]
        missing = [name for name in names if name not in there]
        without = {one.name for one in wanted if one.place is None}
        if allow is not None:
            without |= {names[name].name for name in missing}
            found = {
                one.name for one in wanted if one.place and any(self._stored(n) in there for n in one.place.tensors)
            }
            # one of which some layers are there is not missing but damaged
            missing = [name for name in missing if names[name].name in found]
            without -= found
            names = {name: one for name, one in names.items() if one.name not in without}
            if not missing:
                allow(sorted(without), left)
                left = []
        assert allow is not None or not without, f"the table has no row for {without}"
        if missing or left:
            found = [f"needs {_listed(missing)}, not in its files"] * bool(missing)
            found += [f"has no place for {_listed(left)}"] * bool(left)
            raise UserError(
                f"{self._files.directory}: the model of its {self._files.described} {' and '.join(found)}; bring back "
                "the model's own files"
            )
        for name, one in names.items():
            assert one.place is not None
            stored, here = there[name], one.place.stored_shape(one.shape)
            if stored.shape != here:
                raise UserError(
                    f"{stored.path} has {name} of shape {list(stored.shape)}, and {self._files.described} beside it "
                    f"makes it {list(here)}; bring back the model's own"
                )
        return without

    def _stored(self, name: str) -> str:
        name = name if self._has_base else name.removeprefix(self._table.base)
        return self._other_names.get(name, name)

    def _is_tied_head(self, name: str) -> bool:
        """Whether a tensor is a tied model's head, which says what the embedding says; `UserError` if it does not."""
        if name != self._table.head or not self._is_tied:
            return False
        table = self._stored(self._table.place(self._model, self._table.embedding).tensors[0])
        if table in self._files.tensors and not np.array_equal(self._files.read(name), self._files.read(table)):
            raise UserError(
                f"{self._files.directory} has a {name} that is not {table}, and its {self._files.says_tied}"
            )
        return True

    def values(self, place: Place, shape: tuple[int, ...]) -> np.ndarray:
        """A parameter's numbers."""
        tensors = [self._files.read(self._stored(name)) for name in place.tensors]
        return read_parameter(place, tensors, shape)

    def load(
        self, name: str, spec: ParameterSpec, sharding: jax.sharding.NamedSharding, partition: Partition | None
    ) -> Array:
        """A parameter on the devices, with the padding that it has at rest."""
        parts = _Parts(spec, sharding)
        if partition is None:
            parts.fill(self.row(name, spec.shape, None))
            return parts.array()
        for slot, layer in enumerate(partition.slot_layers):
            # an empty slot of a stage stays zeros
            if layer >= 0 and parts.has(slot):
                parts.fill(self.row(name, spec.shape[1:], layer), slot)
        return parts.array()

    def row(self, name: str, shape: tuple[int, ...], row: int | None) -> np.ndarray:
        """A parameter of this shape, or (with `row`) its row of one layer, without the padding of the vocabulary."""
        place = self._table.place(self._model, name, row)
        return self.values(place, own_shape(place.tensor, self._model, shape))


Bounds = tuple[tuple[int, int], ...]


class _Parts:
    """What this process's devices have of an array, on the host; each part once, whichever devices have it."""

    def __init__(self, spec: ParameterSpec, sharding: jax.sharding.NamedSharding) -> None:
        self._shape, self._sharding = spec.layout.padded, sharding
        self._bounds = {
            device: tuple(part.indices(size)[:2] for part, size in zip(index, self._shape, strict=True))
            for device, index in sharding.devices_indices_map(self._shape).items()
            if device in sharding.addressable_devices
        }
        self._parts: dict[Bounds, np.ndarray] = {
            bounds: np.zeros([stop - start for start, stop in bounds], spec.dtype) for bounds in self._bounds.values()
        }

    def has(self, slot: int) -> bool:
        """Whether a device has some of this row."""
        return any(start <= slot < stop for (start, stop), *_ in self._parts)

    def fill(self, values: np.ndarray, slot: int | None = None) -> None:
        """Puts in what devices have of the array, or of its row; it may lack what is padding."""
        for bounds, part in self._parts.items():
            if slot is not None:
                (start, stop), *bounds = bounds
                if not start <= slot < stop:
                    continue
                part = part[slot - start]
            taken = values[tuple(slice(start, stop) for start, stop in bounds)]
            part[tuple(slice(size) for size in taken.shape)] = taken

    def array(self) -> Array:
        """The whole, on the devices."""
        parts = [jax.device_put(self._parts[bounds], device) for device, bounds in self._bounds.items()]
        return jax.make_array_from_single_device_arrays(self._shape, self._sharding, parts)


def _listed(names: list[str]) -> str:
    """Some of the names, and how many there are."""
    some = ", ".join(names[:MOST_NAMES])
    return some if len(names) <= MOST_NAMES else f"{some} and {len(names) - MOST_NAMES:,} more"
