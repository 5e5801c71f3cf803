"""A row of a family's table applied: parameters of tensors, and tensors of parameters.

Apart from the table, which is read with every configuration: NumPy takes longer to import than a refusal may take.
"""

from collections.abc import Sequence

import numpy as np

from jaxtron.weights.table import Place, Rows


def read_parameter(place: Place, tensors: Sequence[np.ndarray], shape: Sequence[int]) -> np.ndarray:
    """The parameter of this place and shape, of the file's tensors."""
    row, sizes = place.tensor, place.tensor.sizes(shape)
    if place.rows is not None:
        tensors = [tensor.take(place.rows.places, place.rows.dim) for tensor in tensors]
    split = [tensor.reshape([sizes[letter] for letter in row.letters]) for tensor in tensors]
    array, letters = split[0], row.counted + row.letters
    if row.counted:
        array = np.stack(split).reshape([sizes[letter] for letter in letters])
    if row.shared:
        shared = letters.index(row.shared)
        array = array.take(row.parameters.index(place.name), shared)
        letters = letters.replace(row.shared, "")
    return array.transpose([letters.index(letter) for letter in row.dims.split()])


def write_part(
    place: Place, tensors: Sequence[np.ndarray], shape: Sequence[int], part: np.ndarray, starts: Sequence[int]
) -> None:
    """Puts a part of the parameter of this place and shape, which begins at these places of it, into the file's
    tensors; what lies beyond the shape is padding."""
    if place.rows is not None:
        _put_rows(place, place.rows, tensors[0], shape, part, starts)
        return
    views, dims, sizes = _views(place, tensors, shape), place.tensor.dims.split(), place.tensor.sizes(shape)
    axes = [dims.index(letter) for letter in place.tensor.counted]
    rest = [axis for axis in range(len(dims)) if axis not in axes]
    for numbers in np.ndindex(*(part.shape[axis] for axis in axes)):
        own = [starts[axis] + number for axis, number in zip(axes, numbers, strict=True)]
        counts = [sizes[letter] for letter in place.tensor.counted]
        # others are padding
        if all(number < count for number, count in zip(own, counts, strict=True)):
            view = views[int(np.ravel_multi_index(own, counts)) if own else 0]
            _put(view, part.transpose([*axes, *rest])[numbers], [starts[axis] for axis in rest])


def _views(place: Place, tensors: Sequence[np.ndarray], shape: Sequence[int]) -> list[np.ndarray]:
    """The file's tensors seen as the parameter: what is put into the views is in the tensors.

    One view, or where dimensions count tensors one for each, without those dimensions.
    """
    row, sizes, views = place.tensor, place.tensor.sizes(shape), []
    for tensor in tensors:
        view, letters = tensor.reshape([sizes[letter] for letter in row.letters]), row.letters
        if row.shared:
            shared = letters.index(row.shared)
            view = view[(slice(None),) * shared + (row.parameters.index(place.name),)]
            letters = letters.replace(row.shared, "")
        views.append(view.transpose([letters.index(letter) for letter in row.dims.split() if letter in letters]))
    return views


def _put_rows(
    place: Place, rows: Rows, tensor: np.ndarray, shape: Sequence[int], part: np.ndarray, starts: Sequence[int]
) -> None:
    """The same of rows that lie otherwise."""
    dims, words, shared = place.tensor.dims.split(), place.tensor.stored.split(), place.tensor.shared
    own, tensor = words.pop(rows.dim), np.moveaxis(tensor, rows.dim, 0)
    if shared:
        tensor = tensor[(slice(None),) * (1 + words.index(shared)) + (place.tensor.parameters.index(place.name),)]
        words.remove(shared)
    # other words of several letters would be no views
    assert sorted([*own, *words]) == sorted(dims), place.tensor
    sizes = place.tensor.sizes(shape)
    there = {
        letter: slice(start, min(start + size, sizes[letter]))
        for letter, start, size in zip(dims, starts, part.shape, strict=True)
    }
    if any(bounds.start >= bounds.stop for bounds in there.values()):
        return
    part = part[tuple(slice(there[letter].stop - there[letter].start) for letter in dims)]
    part = part.transpose([dims.index(letter) for letter in (*own, *words)])
    places = np.asarray(rows.places).reshape([sizes[letter] for letter in own])
    places = places[tuple(there[letter] for letter in own)].reshape(-1)
    # as in `_put`
    with np.errstate(over="ignore"):
        values = part.reshape(len(places), *part.shape[len(own) :]).astype(tensor.dtype)
    tensor[(places, *(there[word] for word in words))] = values


def _put(view: np.ndarray, part: np.ndarray, starts: Sequence[int]) -> None:
    """Copies what there is room for."""
    there = tuple(slice(start, start + size) for start, size in zip(starts, part.shape, strict=True))
    room = view[there]
    # numbers too large for 16 bits become infinite, which is told elsewhere
    with np.errstate(over="ignore"):
        room[...] = part[tuple(slice(size) for size in room.shape)]
