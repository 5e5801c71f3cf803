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


def write_tensors(row: Tensor, parameters: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The file's tensors, of the parameters: the inverse of `read_parameter`."""
    shape, letters = row.stored_shape(parameters[0].shape), row.dims.replace(" ", "")
    array = parameters[0]
    if row.shared:
        array, letters = np.stack(parameters), row.shared + letters
    array = array.transpose([letters.index(letter) for letter in row.counted + row.letters])
    return [tensor.reshape(shape) for tensor in (array if row.counted else [array])]
