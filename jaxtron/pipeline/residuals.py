"""A layer's vector-Jacobian product as data: what must be stored for it, and how to make it again."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from jaxtron.typing import Array, PyTree


@jax.tree_util.register_static
@dataclass(frozen=True, eq=False)
class Pullback:
    """How to make a `jax.vjp` function again; from which leaves, by index: (is given again, place)."""

    treedef: Any
    sources: tuple[tuple[bool, int], ...]
    keys: tuple[Any, ...]
    # arrays, or literals of JAX's own
    constants: tuple[Any, ...]

    def __call__(self, stored: list[Array], given: PyTree) -> Callable:
        """The function; `given` are today's values of what was `given` to `split_residuals`."""
        values = [
            leaf if key is None else jax.random.wrap_key_data(leaf, impl=key)
            for leaf, key in zip(stored, self.keys, strict=True)
        ]
        again = [*jax.tree.leaves(given), *self.constants]
        return jax.tree.unflatten(
            self.treedef, [(again if is_given else values)[place] for is_given, place in self.sources]
        )


def split_residuals(pull: Callable, given: PyTree) -> tuple[list[Array], Pullback]:
    """The arrays that a `jax.vjp` function holds, less those among `given` (weights, shared inputs), and what is left.

    What is given need not be stored: it is there again when the function is.
    """
    leaves, treedef = jax.tree.flatten(pull)
    # what no input is in, such as ALiBi's slopes, is a constant of the program
    constants = tuple(leaf for leaf in leaves if not isinstance(leaf, Tracer))
    places: dict[int, int] = {}
    for place, leaf in enumerate((*jax.tree.leaves(given), *constants)):
        places.setdefault(id(leaf), place)
    stored: list[Array] = []
    sources = []
    seen: dict[int, int] = {}
    for leaf in leaves:
        if id(leaf) in places:
            sources.append((True, places[id(leaf)]))
            continue
        if id(leaf) not in seen:
            seen[id(leaf)] = len(stored)
            stored.append(leaf)
        sources.append((False, seen[id(leaf)]))
    keys = tuple(
        jax.random.key_impl(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else None for leaf in stored
    )
    plain = [leaf if key is None else jax.random.key_data(leaf) for leaf, key in zip(stored, keys, strict=True)]
    return plain, Pullback(treedef, tuple(sources), keys, constants)
