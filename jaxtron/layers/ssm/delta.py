"""A gated delta net: a memory of values by key for each head (2412.06464; Qwen3-Next's linear attention)."""

from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn import initializers

from jaxtron.kernels.gated_delta.backend import select_backend
from jaxtron.layers.inputs import LayerInputs, dropout
from jaxtron.layers.linear import Linear, project
from jaxtron.layers.ssm.config import DeltaConfig
from jaxtron.layers.ssm.convolution import convolve, convolve_plainly
from jaxtron.layers.ssm.groups import BY_GROUP, by_head, grouped
from jaxtron.layers.ssm.initial import first_decays, taps
from jaxtron.layers.ssm.memory import LayerMemory, remembered, with_before, without_padding
from jaxtron.layers.ssm.norm import GatedHeadNorm
from jaxtron.layers.ssm.recurrences import HEADS, STEPS, delta_rule
from jaxtron.layers.ssm.scan import Names, Recurrence, advance, scan
from jaxtron.sharding.parameters import parameter
from jaxtron.sharding.rules import constrain, current
from jaxtron.typing import Array, Float

# added to the square of a query's or key's length
_EPSILON = 1e-6


class _Projected(NamedTuple):
    """The products of a layer's input."""

    z: Float[Array, "B S H P"]
    convolved: tuple[Float[Array, "B S *channels"], ...]
    """q, k and v by group in one; or v by head, and q with k."""
    b: Float[Array, "B S H"]
    a: Float[Array, "B S H"]


class GatedDeltaNet(nnx.Module):
    """`output(norm(rule(q, k, v; g, beta)) * silu(z))`, q, k and v convolved, q and k of length 1.

    A part sigmoid(b) of what is remembered at a key is replaced, and exp(g) of all is left at each position, g =
    -exp(A_log) softplus(a + dt_bias). The six products of the input are parameters of their own, so that a checkpoint
    does not depend on the mesh; by key head they are joined to one. Where key heads are fewer than tensor parts q and k
    are made on every device.
    """

    # projections whose weights one product reads
    JOINED: ClassVar[tuple[str, ...]] = ("q", "k", "v", "z", "b", "a")

    def __init__(
        self,
        embed: int,
        config: DeltaConfig,
        *,
        std: float,
        output_std: float,
        epsilon: float,
        dropout: float,
        rngs: nnx.Rngs,
    ) -> None:
        self.config, self.dropout = config, dropout
        width, heads = config.linear_conv_kernel_dim, {"heads": config.linear_num_value_heads}
        stream, values = {"embed": embed}, {**heads, "head_dim": config.linear_value_head_dim}
        keys = {"groups": config.linear_num_key_heads, "state": config.linear_key_head_dim}
        self.q = Linear(stream, keys, bias=False, std=std, rngs=rngs)
        self.k = Linear(stream, keys, bias=False, std=std, rngs=rngs)
        self.v = Linear(stream, values, bias=False, std=std, rngs=rngs)
        self.z = Linear(stream, values, bias=False, std=std, rngs=rngs)
        self.b = Linear(stream, heads, bias=False, std=std, rngs=rngs)
        self.a = Linear(stream, heads, bias=False, std=std, rngs=rngs)
        self.conv_q = taps(width, keys, rngs)
        self.conv_k = taps(width, keys, rngs)
        self.conv_v = taps(width, values, rngs)
        shape = (config.linear_num_value_heads,)
        self.dt_bias = parameter(rngs, initializers.ones, shape, axes=("heads",), role="state")
        self.A_log = parameter(rngs, first_decays(config.decay_range), shape, axes=("heads",), role="state")
        self.norm = GatedHeadNorm(config.linear_value_head_dim, epsilon=epsilon, rngs=rngs)
        self.output = Linear(values, stream, bias=False, std=output_std, rngs=rngs)

    def __call__(self, x: Float[Array, "B S E"], inputs: LayerInputs) -> Float[Array, "B S E"]:
        segments = None if inputs.segments is None else constrain(inputs.segments, "batch", "full_seq")
        z, convolved, b, a = self._project(constrain(x, "batch", "full_seq", "embed"))
        through: list[Any] = [
            convolve(part, kernel, None, segments, names)
            for part, (kernel, names) in zip(convolved, self._taps(), strict=True)
        ]
        y: Any = scan(self._recurrence(), self._scanned(b, a, *through), segments)
        y = self.output(self.norm(y, z), "batch", "seq", "embed", inputs=inputs)
        return dropout(y, self.dropout, inputs, "batch", "seq", "embed")

    def advance(
        self, x: Float[Array, "B S E"], memory: LayerMemory | None, inputs: LayerInputs
    ) -> tuple[Float[Array, "B S E"], LayerMemory]:
        """The same for what follows a sequence of which this is the memory (none: nothing came before).

        For generation: the sequence is one document, whole on each device.
        """
        z, convolved, b, a = self._project(constrain(x, "batch", "full_seq", "embed"))
        config, num_before = self.config, self.config.linear_conv_kernel_dim - 1
        wide = with_before(memory, convolved, num_before)
        shape = (config.linear_num_value_heads, config.linear_key_head_dim, config.linear_value_head_dim)
        state = jnp.zeros((x.shape[0], *shape), jnp.float32) if memory is None else memory.state
        through = [convolve_plainly(part, kernel, None) for part, (kernel, _) in zip(wide, self._taps(), strict=True)]
        recurrence = self._recurrence()
        q, k, v, g, beta = self._scanned(b, a, *through)
        arrays = (q, k, v, *(without_padding(steps, inputs.growth) for steps in (g, beta)))
        y, state = advance(recurrence, arrays, constrain(state, *recurrence.state))
        # few positions need not split
        y = self.output(self.norm(y, z), "batch", "full_seq", "embed", inputs=inputs)
        return y, remembered(wide, num_before, state, inputs.growth)

    def _recurrence(self) -> Recurrence:
        return delta_rule(select_backend(self.config.implementation, current().device_kind).implementation)

    def _scanned(
        self, b: Float[Array, "B S H"], a: Float[Array, "B S H"], *convolved: Array
    ) -> tuple[Array, Array, Array, Array, Array]:
        """What the recurrence reads: q, k, v, g and beta."""
        q, k, v = self._apart(*convolved)
        beta = jax.nn.sigmoid(b.astype(jnp.float32))
        g = -jnp.exp(self.A_log[...]) * jax.nn.softplus(a.astype(jnp.float32) + self.dt_bias[...])
        q = _of_length(q, self.config.linear_key_head_dim**-0.5)
        return q, _of_length(k, 1.0), v, constrain(g, *STEPS), constrain(beta, *STEPS)

    def _project(self, x: Float[Array, "B S E"]) -> _Projected:
        config, heads = self.config, self.config.linear_num_value_heads
        size, width = config.linear_key_head_dim, config.linear_value_head_dim
        q, k, v, z, b, a = (layer.kernel[...] for layer in (self.q, self.k, self.v, self.z, self.b, self.a))
        if self._by_group:
            each = heads // config.linear_num_key_heads
            kernel = jnp.concatenate([grouped(z, q), q, k, *(grouped(one, q) for one in (v, b, a))], -1)
            joined, behind = project(x, kernel, BY_GROUP), 2 * (each * width + size)
            z, convolved, b, a = jnp.split(joined, (each * width, behind, behind + each), -1)
            # an axis of one group loses its name in a slice
            return _Projected(
                by_head(z, heads, width), (constrain(convolved, *BY_GROUP),), by_head(b, heads), by_head(a, heads)
            )
        joined = project(x, jnp.concatenate([z, v, b[..., None], a[..., None]], -1), HEADS)
        shared = project(x, jnp.concatenate([q, k], -1), ("batch", "full_seq", None, "state"))
        return _Projected(
            joined[..., :width],
            (joined[..., width : 2 * width], shared),
            joined[..., 2 * width],
            joined[..., 2 * width + 1],
        )

    def _taps(self) -> list[tuple[Array, Names]]:
        """Kernels of what is convolved, as `_project` has it, and the names of their channels."""
        q, k, v = self.conv_q[...], self.conv_k[...], self.conv_v[...]
        if self._by_group:
            return [(jnp.concatenate([q, k, grouped(v, q)], -1), BY_GROUP[2:])]
        return [(v, ("heads", "head_dim")), (jnp.concatenate([q, k], -1), (None, "state"))]

    def _apart(
        self, *convolved: Array
    ) -> tuple[Float[Array, "B S G N"], Float[Array, "B S G N"], Float[Array, "B S H P"]]:
        config, size = self.config, self.config.linear_key_head_dim
        if not self._by_group:
            return convolved[1][..., :size], convolved[1][..., size:], convolved[0]
        (whole,) = convolved
        q, k = (constrain(part, *BY_GROUP) for part in (whole[..., :size], whole[..., size : 2 * size]))
        return q, k, by_head(whole[..., 2 * size :], config.linear_num_value_heads, config.linear_value_head_dim)

    @property
    def _by_group(self) -> bool:
        """Whether tensor parts have whole key heads."""
        return current().splits("groups", self.config.linear_num_key_heads)


def _of_length(x: Float[Array, "B S G N"], length: float) -> Float[Array, "B S G N"]:
    """With this length, in float32."""
    wide = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.sum(jnp.square(wide), -1, keepdims=True) + _EPSILON)
    return (wide * (length * inverse)).astype(x.dtype)
