"""A row of a family's table applied: parameters of tensors, and tensors of parameters.

Apart from the table, which is read with every configuration: NumPy takes longer to import than a refusal may take.
"""

from collections.abc import Sequence

import numpy as np

from jaxtron.weights.table import Tensor


def read_parameter(row: Tensor, tensors: Sequence[np.ndarray], name: str, shape: Sequence[int]) -> np.ndarray:
    """The parameter of this name and shape, of the file's tensors."""
    sizes = row.sizes(shape)
    split = [tensor.reshape([sizes[letter] for letter in row.letters]) for tensor in tensors]
    array, letters = (np.stack(split), row.counted + row.letters) if row.counted else (split[0], row.letters)
    if row.shared:
        place = letters.index(row.shared)
        array = array.take(row.parameters.index(name), place)
        letters = letters.replace(row.shared, "")
    return array.transpose([letters.index(letter) for letter in row.dims.split()])


def parameter_views(row: Tensor, tensors: Sequence[np.ndarray], name: str, shape: Sequence[int]) -> list[np.ndarray]:
    """The file's tensors seen as the parameter of this name and shape: what is put into the views is in the tensors.

    One view, or where a dimension counts tensors one for each, without that dimension.
    """
    sizes, views = row.sizes(shape), []
    for tensor in tensors:
        view, letters = tensor.reshape([sizes[letter] for letter in row.letters]), row.letters
        if row.shared:
            place = letters.index(row.shared)
            view = view[(slice(None),) * place + (row.parameters.index(name),)]
            letters = letters.replace(row.shared, "")
        views.append(view.transpose([letters.index(letter) for letter in row.dims.split() if letter in letters]))
    return views


def write_part(row: Tensor, views: Sequence[np.ndarray], part: np.ndarray, starts: Sequence[int]) -> None:
    """Puts a part of a parameter, which begins at these places, into the views; what lies beyond them is padding."""
    counted = row.dims.split().index(row.counted) if row.counted else None
    if counted is None:
        _put(views[0], part, starts)
        return
    starts = list(starts)
    first = starts.pop(counted)
    for number in range(part.shape[counted]):
        _put(views[first + number], part.take(number, counted), starts)


def _put(view: np.ndarray, part: np.ndarray, starts: Sequence[int]) -> None:
    """Copies what there is room for."""
    there = tuple(slice(start, start + size) for start, size in zip(starts, part.shape, strict=True))
    room = view[there]
    # numbers too large for 16 bits become infinite, which is told elsewhere
    with np.errstate(over="ignore"):
        room[...] = part[tuple(slice(size) for size in room.shape)]
