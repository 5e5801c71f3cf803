"""A run's adapters (`train.lora`) added to its matrices, a piece at a time, for a model that has none."""

from collections.abc import Mapping

import numpy as np

from jaxtron.checkpoint.parts import StoredArrays
from jaxtron.models.adapters import LORA
from jaxtron.sharding.parameters import ParameterSpec

MATRIX = ".kernel"


class Merging:
    """What pieces of a checkpoint's matrices are with their adapters.

    `specs` are the model's parameters by name, and `named` their names in the checkpoint; `scale` is the adapters'.
    """

    def __init__(
        self, stored: StoredArrays, specs: Mapping[str, ParameterSpec], named: Mapping[str, str], scale: float
    ) -> None:
        self._stored, self._specs, self._named, self._scale = stored, specs, named, scale

    def pair(self, name: str) -> "AdapterPair | None":
        """The adapter of a parameter, read whole; none where it has none."""
        first = f"{name.removesuffix(MATRIX)}.{LORA}"
        if not name.endswith(MATRIX) or f"{first}.a" not in self._specs:
            return None
        a, b = (self._read(f"{first}.{which}") for which in "ab")
        axes = self._specs[f"{first}.a"].axes
        return AdapterPair(a, b, self._scale, axes[0] == "layers", "gate" in axes)

    def _read(self, name: str) -> np.ndarray:
        parts = list(self._stored.parts(self._named[name]))
        shape = np.max([np.add(starts, part.shape) for starts, part in parts], 0)
        whole = np.zeros(shape, np.float32)
        for starts, part in parts:
            whole[tuple(slice(start, start + size) for start, size in zip(starts, part.shape, strict=True))] = part
        return whole


class AdapterPair:
    """`scale * a @ b` of a matrix, or of a stack of them; `are_several`: of gate and up, each with its own pair."""

    def __init__(self, a: np.ndarray, b: np.ndarray, scale: float, is_stacked: bool, are_several: bool) -> None:
        self._a, self._b, self._scale = (a, b, scale) if is_stacked else (a[None], b[None], scale)
        self._is_stacked, self._are_several = is_stacked, are_several

    def added_to(self, starts: tuple[int, ...], part: np.ndarray) -> np.ndarray:
        """A piece of the matrix that begins there, in float32, with what the adapter adds."""
        part = part.astype(np.float32)
        if not self._is_stacked:
            return part + self._piece(0, starts, part.shape)
        for number, row in enumerate(part):
            row += self._piece(starts[0] + number, starts[1:], row.shape)
        return part

    def _piece(self, layer: int, starts: tuple[int, ...], shape: tuple[int, ...]) -> np.ndarray:
        where = [slice(start, start + size) for start, size in zip(starts, shape, strict=True)]
        a, b = self._a[layer], self._b[layer]
        num_inputs = a.ndim - 1 - self._are_several
        inputs, outputs = where[:num_inputs], where[num_inputs:]
        if not self._are_several:
            return self._scale * np.tensordot(a[*inputs], b[:, *outputs], 1)
        gates, others = outputs[0], outputs[1:]
        numbers = range(gates.start, gates.stop)
        pairs = [np.tensordot(a[*inputs, number], b[number][:, *others], 1) for number in numbers]
        return self._scale * np.stack(pairs, num_inputs)
