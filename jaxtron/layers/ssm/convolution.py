"""A causal convolution of each channel by itself, with its activation: what a state-space layer sees of neighbours."""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxtron.layers.ssm.documents import own_documents
from jaxtron.sharding.context import before, before_transposed, pieces, whole
from jaxtron.sharding.regions import on_each_device
from jaxtron.sharding.rules import current, spec
from jaxtron.typing import Array, Float, Int

Names = tuple[str | None, ...]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def convolve(
    x: Float[Array, "B S *C"],
    kernel: Float[Array, "W *C"],
    bias: Float[Array, "*C"] | None,
    segments: Int[Array, "B S"] | None,
    channels: Names,
) -> Float[Array, "B S *C"]:
    """silu of the sum over the last W positions of x times kernel, perhaps plus bias; not across documents.

    It is float32 inside. The last row of the kernel is that of a position itself, as PyTorch's `conv1d` has it;
    `channels` names the axes of C. The backward keeps x alone.
    """
    return _forward(x, kernel, bias, segments, channels)[0]


def convolve_plainly(
    wide: Float[Array, "B T *C"],
    kernel: Float[Array, "W *C"],
    bias: Float[Array, "*C"] | None,
    ids: Int[Array, "B T"] | None = None,
) -> Float[Array, "B S *C"]:
    """The same on one device, of S positions with the W - 1 before them: T = S + W - 1. Equal `ids`: one document."""
    total = jnp.zeros((), jnp.float32) if bias is None else bias.astype(jnp.float32)
    for tap, part in enumerate(_windows(wide, ids, kernel.shape[0])):
        total = total + part.astype(jnp.float32) * kernel[tap].astype(jnp.float32)
    return jax.nn.silu(total).astype(wide.dtype)


def _windows(wide: Array, ids: Array | None, width: int) -> Iterator[Array]:
    length = wide.shape[1] - width + 1
    for tap in range(width):
        part = wide[:, tap : tap + length]
        if ids is not None:
            same = ids[:, tap : tap + length] == ids[:, width - 1 :]
            part = jnp.where(same.reshape(*same.shape, *(1,) * (part.ndim - 2)), part, jnp.zeros((), part.dtype))
        yield part


def _specs(channels: Names, bias: Array | None, segments: Array | None) -> tuple[PartitionSpec | None, ...]:
    """Of x, kernel, bias and segments."""
    by_channel = None if bias is None else spec(*channels)
    by_position = None if segments is None else spec("batch", "full_seq")
    return spec("batch", "full_seq", *channels), spec(None, *channels), by_channel, by_position


def _given(x: Array, segments: Array | None, width: int) -> tuple[Array, Array | None]:
    """A device's pieces with what comes before them, and the numbers of documents alike."""
    x = pieces(x)
    assert current().parts("context") == 1 or x.shape[1] >= width - 1, "the kinds of layers check it"
    ids = None if segments is None else own_documents(segments, width - 1)
    return jnp.concatenate([before(x, width - 1), x], 1), ids


def _forward(
    x: Array, kernel: Array, bias: Array | None, segments: Array | None, channels: Names
) -> tuple[Array, tuple[Array | None, ...]]:
    def local(x: Array, kernel: Array, bias: Array | None, segments: Array | None) -> Array:
        wide, ids = _given(x, segments, kernel.shape[0])
        return whole(convolve_plainly(wide, kernel, bias, ids))

    specs = _specs(channels, bias, segments)
    run = on_each_device(local, specs, specs[0])
    return run(x, kernel, bias, segments), (x, kernel, bias, segments)


def _backward(
    channels: Names, kept: tuple[Array | None, ...], cotangent: Array
) -> tuple[Array, Array, Array | None, None]:
    def local(
        x: Array, kernel: Array, bias: Array | None, segments: Array | None, cotangent: Array
    ) -> tuple[Array | None, ...]:
        wide, ids = _given(x, segments, kernel.shape[0])
        _, pull = jax.vjp(functools.partial(convolve_plainly, ids=ids), wide, kernel, bias)
        dwide, dkernel, dbias = pull(pieces(cotangent))
        ends = kernel.shape[0] - 1
        dx = dwide[:, ends:] + before_transposed(dwide[:, :ends], dwide.shape[1] - ends)
        return whole(dx), dkernel, dbias

    specs = _specs(channels, *kept[2:])
    return *on_each_device(local, (*specs, specs[0]), specs[:3])(*kept, cotangent), None


convolve.defvjp(_forward, _backward)
