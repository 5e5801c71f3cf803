"""Names of a state's arrays: the path in the tree, which is the same on every mesh.

A name joins the path's parts by dots: `parameters.decoder.embed`, `optimizer.1.mu.decoder.embed`.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding
from jax.tree_util import KeyPath, keystr
from jaxtyping import Array, PyTree

from jaxtron.checkpoint.record import Signature

# arrays in the type that a step computes in, which may be another for the one that reads them
CAST = "frozen."


def parts(path: KeyPath) -> tuple[str, ...]:
    return tuple(keystr((entry,), simple=True) for entry in path)


def name_of(path: KeyPath) -> str:
    return ".".join(parts(path))


def is_key(leaf: Array | jax.ShapeDtypeStruct) -> bool:
    """Whether a leaf holds typed PRNG keys."""
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def signature(tree: PyTree) -> Signature:
    """The name, dtype and shape of every leaf, in tree order."""
    leaves = jax.tree.leaves_with_path(tree)
    result = {name_of(path): (str(leaf.dtype), tuple(leaf.shape)) for path, leaf in leaves}
    assert len(result) == len(leaves), "two leaves of the state have the same name"
    return result


def first_difference(stored: Signature, wanted: Signature) -> str | None:
    """One phrase about the first array in which a checkpoint and a model differ, or None."""
    for name, (dtype, shape) in wanted.items():
        if name not in stored:
            return f"it has no {name}, of {dtype}{list(shape)} here"
        stored_dtype, stored_shape = stored[name]
        if stored_shape != shape:
            return f"{name} has shape {list(stored_shape)} there and {list(shape)} here"
        if stored_dtype != dtype and not name.startswith(CAST):
            return f"{name} is {stored_dtype} there and {dtype} here"
    for name, (dtype, shape) in stored.items():
        if name not in wanted:
            return f"it has {name}, of {dtype}{list(shape)}, which is not in the model here"
    return None


def nest(tree: PyTree) -> dict[str, Any]:
    """The tree as nested dictionaries by name; tuples, named tuples and empty nodes leave no trace."""
    root: dict[str, Any] = {}
    for path, leaf in jax.tree.leaves_with_path(tree):
        *folders, last = parts(path)
        node = root
        for folder in folders:
            node = node.setdefault(folder, {})
        node[last] = leaf
    return root


def unnest(nested: dict[str, Any], like: PyTree) -> PyTree:
    """The inverse of `nest`: leaves in the tree structure of `like`."""

    def find(path: KeyPath, _: Any) -> Any:
        node = nested
        for part in parts(path):
            node = node[part]
        return node

    return jax.tree.map_with_path(find, like)


def plain(leaf: Array) -> Array:
    """What is stored of a leaf: itself, or the data (uint32) of typed PRNG keys."""
    return jax.random.key_data(leaf) if is_key(leaf) else leaf


def plain_abstract(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """The abstract of `plain(leaf)`, placed like the leaf; a leaf without sharding goes to the first device."""
    sharding = leaf.sharding or SingleDeviceSharding(jax.local_devices()[0])
    if is_key(leaf):
        leaf = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def from_plain(leaf: Array, like: jax.ShapeDtypeStruct) -> Array:
    """The inverse of `plain` for a leaf like `like`."""
    if not is_key(like):
        return leaf
    impl = jax.random.key_impl(jnp.empty((), like.dtype))
    return jax.jit(partial(jax.random.wrap_key_data, impl=impl), out_shardings=like.sharding)(leaf)
