"""Types of values inside a `jax.shard_map`: over which manual axes they vary."""

from typing import TypeVar

import jax

from jaxtron.typing import Array, PyTree

Tree = TypeVar("Tree")


def vary_alike(tree: Tree) -> Tree:
    """`tree` whose arrays all vary over every manual axis over which one of them does (outside: as it is).

    A loop that mixes them can then start from zeros like any of them. The transpose sums gradients over the axes that
    an array did not vary over, as it must: the array was one for all.
    """
    arrays = [leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array)]
    axes = frozenset[str]().union(*(_varying(array) for array in arrays))

    def vary(leaf: PyTree) -> PyTree:
        missing = axes - _varying(leaf) if isinstance(leaf, jax.Array) else ()
        return jax.lax.pcast(leaf, tuple(sorted(missing)), to="varying") if missing else leaf

    return jax.tree.map(vary, tree)


def _varying(array: Array) -> frozenset[str]:
    return frozenset(jax.typeof(array).manual_axis_type.varying)
