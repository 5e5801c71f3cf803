"""Collectives over the manual axes of the train step, beside an Explicit `tensor` axis.

A gather of weights and its transpose are each a small `shard_map` over `tensor`, joined by a custom VJP: that is the
form which lowers on every supported JAX when a manual axis communicates beside an Explicit one.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxtron.sharding.folding import Axes
from jaxtron.sharding.layout import Gathers, only
from jaxtron.sharding.regions import over_tensor
from jaxtron.sharding.rules import current
from jaxtron.typing import Array


def manual_axes() -> frozenset[str]:
    """Mesh axes that are manual where this is called (empty outside the train step)."""
    return frozenset(jax.sharding.get_abstract_mesh().manual_axes)


def vary(x: Array) -> Array:
    """`x` typed as varying over every manual axis, so that no gradient is summed before we say so."""
    missing = manual_axes() - set(jax.typeof(x).manual_axis_type.varying)
    return jax.lax.pcast(x, tuple(sorted(missing)), to="varying") if missing else x


def all_gather(x: Array, gathers: Gathers, dtype: jnp.dtype) -> Array:
    """`x` in `dtype`, whole along each of `gathers`; the backward reduce-scatters the cotangent in the type of `x`.

    So a float32 shard is sent as `dtype` and its gradient is summed over the devices in float32.
    """
    return _all_gather(x, gathers, dtype, x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _all_gather(x: Array, gathers: Gathers, dtype: jnp.dtype, gradient_dtype: jnp.dtype) -> Array:
    def body(x: Array) -> Array:
        for dim, axes, sizes in gathers:
            x = jax.lax.all_gather(x, axes, axis=dim, tiled=True)
            x = x if sizes is None else jax.lax.slice_in_dim(x, 0, sizes[0], axis=dim)
        return x

    return _along_tensor(body, x.astype(dtype))


def _all_gather_fwd(x: Array, gathers: Gathers, dtype: jnp.dtype, gradient_dtype: jnp.dtype) -> tuple[Array, None]:
    return _all_gather(x, gathers, dtype, gradient_dtype), None


def _all_gather_bwd(
    gathers: Gathers, dtype: jnp.dtype, gradient_dtype: jnp.dtype, _: None, cotangent: Array
) -> tuple[Array]:
    return (reduce_scatter(cotangent.astype(gradient_dtype), gathers),)


_all_gather.defvjp(_all_gather_fwd, _all_gather_bwd)


def reduce_scatter(x: Array, gathers: Gathers) -> Array:
    """The sum of `x` over the axes, each device keeping its part along each of `gathers`; padding is zeros."""
    if not gathers:
        return x

    def body(x: Array) -> Array:
        for dim, axes, sizes in gathers:
            x = x if sizes is None else _padded(x, dim, sizes[1] - sizes[0])
            x = jax.lax.psum_scatter(x, axes, scatter_dimension=dim, tiled=True)
        return x

    return _along_tensor(body, x)


def all_reduce(x: Array, axes: Axes) -> Array:
    """The sum of `x` over the axes, on every device."""
    return _along_tensor(lambda x: jax.lax.psum(x, axes), x) if axes else x


def largest(x: Array, axes: Axes) -> Array:
    """The largest `x` over the axes, on every device."""
    return _along_tensor(lambda x: jax.lax.pmax(x, axes), x)


def permute(x: Array, axes: Axes, pairs: tuple[tuple[int, int], ...]) -> Array:
    """Each destination's `x` from its source along `axes`, zeros where nobody sends; a part of tensor at a time."""
    return jax.lax.ppermute(x, axes, pairs)


def zeros_like_type(x: Array | jax.ShapeDtypeStruct, leading: tuple[int, ...]) -> Array:
    """Zeros of `x`'s type with more axes in front: its sharding, and the manual axes over which it varies."""
    abstract, shape, spec = _type(x, leading)
    return _varying_as(abstract, jnp.zeros(shape, abstract.dtype, out_sharding=spec))


def empty_like_type(x: Array | jax.ShapeDtypeStruct, leading: tuple[int, ...]) -> Array:
    """As `zeros_like_type`, with whatever its memory holds."""
    abstract, shape, spec = _type(x, leading)
    tensor = current().axes("tensor")
    if current().size(tensor) == 1:
        return _varying_as(abstract, jax.lax.empty(shape, abstract.dtype, out_sharding=spec))
    # XLA does not split what it allocates: each device makes its own part
    split = only(spec, tensor)
    parts = (*map(_parts, split), *(1 for _ in shape[len(split) :]))
    local = tuple(size // part for size, part in zip(shape, parts, strict=True))
    return _varying_as(abstract, over_tensor(lambda: jax.lax.empty(local, abstract.dtype), (), split)())


def _type(x: Array | jax.ShapeDtypeStruct, leading: tuple[int, ...]) -> tuple[Any, tuple[int, ...], PartitionSpec]:
    abstract = jax.typeof(x) if isinstance(x, jax.Array) else x
    of_parts = abstract.sharding.spec if abstract.sharding is not None else ()
    return abstract, (*leading, *abstract.shape), PartitionSpec(*(None,) * len(leading), *of_parts)


def _varying_as(abstract: Any, array: Array) -> Array:
    varying = abstract.manual_axis_type.varying
    return jax.lax.pcast(array, tuple(varying), to="varying") if varying else array


def _parts(entry: Axes | str | None) -> int:
    """Devices that share one dimension of an array."""
    return current().size((entry,) if isinstance(entry, str) else tuple(entry or ()))


def _padded(x: Array, dim: int, more: int) -> Array:
    return jnp.pad(x, [(0, more if dim == padded else 0) for padded in range(x.ndim)])


def _along_tensor(body: Callable[[Array], Array], x: Array) -> Array:
    spec = only(jax.typeof(x).sharding.spec, current().axes("tensor"))
    return over_tensor(body, spec, spec)(x)
