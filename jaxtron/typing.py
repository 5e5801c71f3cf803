"""Array types and the one legend of shape letters, used in every signature and einsum.

B  rows of a batch            E  embedding (model width)    V  vocabulary entries
S  sequence positions         H  query heads                L  layers
T  key positions              K  key/value heads            R  rows held by one process
D  head dimension             G  query heads per K          I, O  inputs, outputs of a product
F  MLP width                  M  microbatches               ...  any leading axes
"""

from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Int, Key, Shaped, UInt, UInt32

if TYPE_CHECKING:
    from jax import Array
else:
    # a NumPy array goes wherever JAX takes one of its own
    Array = jax.Array | np.ndarray

PyTree = Any
# to a type checker `jax.Device` is a variable
Device = Any

__all__ = ["Array", "Bool", "DTypeLike", "Device", "Float", "Int", "Key", "PyTree", "Shaped", "UInt", "UInt32"]
