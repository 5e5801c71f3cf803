"""Mamba-2: a convolution, a state for each head, and a gate (2405.21060, section 7; Megatron's `MambaMixer`)."""

from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn import initializers

from jaxtron.kernels.selection import Backend
from jaxtron.kernels.ssd.backend import select_backend
from jaxtron.kernels.ssd.ssd import StateSpaceDuality
from jaxtron.layers.inputs import LayerInputs, dropout
from jaxtron.layers.linear import Linear, project
from jaxtron.layers.ssm.config import MambaConfig
from jaxtron.layers.ssm.convolution import convolve, convolve_plainly
from jaxtron.layers.ssm.groups import BY_GROUP, by_head, grouped
from jaxtron.layers.ssm.initial import Taps, first_decays, first_steps
from jaxtron.layers.ssm.memory import LayerMemory, remembered, with_before, without_padding
from jaxtron.layers.ssm.norm import GatedNorm
from jaxtron.layers.ssm.recurrences import HEADS, STEPS, duality
from jaxtron.layers.ssm.scan import advance, scan
from jaxtron.sharding.parameters import parameter
from jaxtron.sharding.rules import constrain, current
from jaxtron.typing import Array, DTypeLike, Float


class _Projected(NamedTuple):
    """The products of a layer's input."""

    z: Float[Array, "B S H P"]
    convolved: tuple[Float[Array, "B S *channels"], ...]
    """x, B and C by group in one; or x by head, and B with C."""
    dt: Float[Array, "B S H"]


# x, dt, A, B, C and D
_Scanned = tuple[Array, Array, Array, Array, Array, Array]


class Mamba2(nnx.Module):
    """`output(norm(scan(x, B, C; dt) * silu(z)))`, x, B and C convolved.

    The five products of the input are parameters of their own, so that a checkpoint does not depend on the mesh; by
    group of heads they are joined to one. Where groups are fewer than tensor parts B and C are made on every device.
    """

    # projections whose weights one product reads
    JOINED: ClassVar[tuple[str, ...]] = ("z", "x", "B", "C", "dt")

    def __init__(
        self,
        embed: int,
        num_heads: int,
        config: MambaConfig,
        *,
        std: float,
        output_std: float,
        epsilon: float,
        dropout: float,
        rngs: nnx.Rngs,
    ) -> None:
        self.config, self.dropout = config, dropout
        self.num_heads = num_heads
        stream, heads = {"embed": embed}, {"heads": num_heads, "head_dim": config.head_dim}
        groups = {"groups": config.num_groups, "state": config.state_size}
        self.z = Linear(stream, heads, bias=False, std=std, rngs=rngs)
        self.x = Linear(stream, heads, bias=False, std=std, rngs=rngs)
        self.B = Linear(stream, groups, bias=False, std=std, rngs=rngs)
        self.C = Linear(stream, groups, bias=False, std=std, rngs=rngs)
        self.dt = Linear(stream, {"heads": num_heads}, bias=False, std=std, rngs=rngs)
        self.conv_x = Taps(config.conv_width, heads, rngs)
        self.conv_B = Taps(config.conv_width, groups, rngs)
        self.conv_C = Taps(config.conv_width, groups, rngs)
        shape = (num_heads,)
        self.dt_bias = parameter(rngs, first_steps(config), shape, axes=("heads",), role="state")
        self.A_log = parameter(rngs, first_decays(config.decay_range), shape, axes=("heads",), role="state")
        self.D = parameter(rngs, initializers.ones, shape, axes=("heads",), role="state")
        norm_groups = config.norm_groups or config.num_groups
        self.norm = GatedNorm(num_heads, config.head_dim, norm_groups, epsilon=epsilon, rngs=rngs)
        self.output = Linear(heads, stream, bias=False, std=output_std, rngs=rngs)

    def __call__(self, x: Float[Array, "B S E"], inputs: LayerInputs) -> Float[Array, "B S E"]:
        segments = None if inputs.segments is None else constrain(inputs.segments, "batch", "full_seq")
        z, convolved, dt = self._project(constrain(x, "batch", "full_seq", "embed"))
        through: list[Any] = [
            convolve(part, kernel, bias, segments, names)
            for part, (kernel, bias, names) in zip(convolved, self._taps(), strict=True)
        ]
        arrays, implementation = self._scanned(dt, *through)
        y = self.output(
            self.norm(scan(duality(implementation), arrays, segments), z), "batch", "seq", "embed", inputs=inputs
        )
        return dropout(y, self.dropout, inputs, "batch", "seq", "embed")

    def advance(
        self, x: Float[Array, "B S E"], memory: LayerMemory | None, inputs: LayerInputs
    ) -> tuple[Float[Array, "B S E"], LayerMemory]:
        """The same for what follows a sequence of which this is the memory (none: nothing came before).

        For generation: the sequence is one document, whole on each device.
        """
        z, convolved, dt = self._project(constrain(x, "batch", "full_seq", "embed"))
        num_before, shape = self.config.conv_width - 1, (self.config.state_size, self.config.head_dim)
        wide = with_before(memory, convolved, num_before)
        state = jnp.zeros((x.shape[0], self.num_heads, *shape), jnp.float32) if memory is None else memory.state
        taps = self._taps()
        through = [convolve_plainly(part, kernel, bias) for part, (kernel, bias, _) in zip(wide, taps, strict=True)]
        arrays, implementation = self._scanned(without_padding(dt, inputs.growth), *through)
        state = constrain(state, "batch", "heads", "state", "head_dim")
        y, state = advance(duality(implementation), arrays, state)
        # few positions need not split
        y = self.output(self.norm(y, z), "batch", "full_seq", "embed", inputs=inputs)
        return y, remembered(wide, num_before, state, inputs.growth)

    def _scanned(self, dt: Float[Array, "B S H"], *convolved: Array) -> tuple[_Scanned, StateSpaceDuality]:
        """What a scan reads, and what computes it."""
        x, B, C = self._apart(*convolved)
        A, D = (constrain(array, "heads") for array in (-jnp.exp(self.A_log[...]), self.D[...]))
        return (x, dt, A, B, C, D), select_scan(self.config, self.num_heads, x.dtype).implementation

    def _project(self, x: Float[Array, "B S E"]) -> _Projected:
        """The products, and the steps made of the last of them."""
        if self._by_group:
            joined = project(x, self._joined(), BY_GROUP)
            width = self.num_heads // self.config.num_groups * self.config.head_dim
            z, convolved = joined[..., :width], joined[..., width : 2 * width + 2 * self.config.state_size]
            dt = joined[..., 2 * width + 2 * self.config.state_size :]
            z, dt = by_head(z, self.num_heads, self.config.head_dim), by_head(dt, self.num_heads)
            # an axis of one group loses its name in a slice
            return _Projected(z, (constrain(convolved, *BY_GROUP),), self._steps(dt))
        kernel = jnp.concatenate([self.z.kernel[...], self.x.kernel[...], self.dt.kernel[...][..., None]], -1)
        joined, width = project(x, kernel, HEADS), self.config.head_dim
        shared = jnp.concatenate([self.B.kernel[...], self.C.kernel[...]], -1)
        both = project(x, shared, ("batch", "full_seq", None, "state"))
        return _Projected(
            joined[..., :width], (joined[..., width : 2 * width], both), self._steps(joined[..., 2 * width])
        )

    def _steps(self, dt: Float[Array, "B S H"]) -> Float[Array, "B S H"]:
        dt = jax.nn.softplus(dt.astype(jnp.float32) + self.dt_bias[...])
        return constrain(jnp.clip(dt, *self.config.dt_limit), *STEPS)

    def _taps(self) -> tuple[tuple[Array, Array, tuple[str | None, ...]], ...]:
        """Kernel, bias and axes of channels for each array that is convolved."""
        if self._by_group:
            return ((self._joined_taps("kernel"), self._joined_taps("bias"), BY_GROUP[2:]),)
        kernel = jnp.concatenate([self.conv_B.kernel[...], self.conv_C.kernel[...]], -1)
        bias = jnp.concatenate([self.conv_B.bias[...], self.conv_C.bias[...]], -1)
        return (self.conv_x.kernel[...], self.conv_x.bias[...], HEADS[2:]), (kernel, bias, (None, "state"))

    def _apart(
        self, *convolved: Array
    ) -> tuple[Float[Array, "B S H P"], Float[Array, "B S G N"], Float[Array, "B S G N"]]:
        size = self.config.state_size
        if not self._by_group:
            return convolved[0], convolved[1][..., :size], convolved[1][..., size:]
        (whole,) = convolved
        B, C = (constrain(part, *BY_GROUP) for part in (whole[..., -2 * size : -size], whole[..., -size:]))
        return by_head(whole[..., : -2 * size], self.num_heads, self.config.head_dim), B, C

    @property
    def _by_group(self) -> bool:
        """Whether tensor parts have whole groups."""
        return current().splits("groups", self.config.num_groups)

    def _joined(self) -> Array:
        """Weights of the products by group: those of z and x of its heads, B, C, and the steps of its heads."""
        B = self.B.kernel[...]
        parts = (grouped(layer.kernel[...], B) for layer in (self.z, self.x))
        return jnp.concatenate([*parts, B, self.C.kernel[...], grouped(self.dt.kernel[...], B)], -1)

    def _joined_taps(self, name: str) -> Array:
        B, C, x = (getattr(taps, name)[...] for taps in (self.conv_B, self.conv_C, self.conv_x))
        return jnp.concatenate([grouped(x, B), B, C], -1)


def select_scan(config: MambaConfig, num_heads: int, dtype: DTypeLike) -> Backend[StateSpaceDuality]:
    """What computes the scan of so many heads on the devices of the mesh in use, and why.

    `UserError` where the one that was asked for cannot.
    """
    x = jax.ShapeDtypeStruct((1, 1, num_heads, config.head_dim), dtype)
    shared = jax.ShapeDtypeStruct((1, 1, config.num_groups, config.state_size), dtype)
    return select_backend(config.implementation, x, shared, current().device_kind)
