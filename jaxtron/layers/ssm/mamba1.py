"""Mamba: a convolution, a state for each channel, and a gate (2312.00752, section 3.4)."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn import initializers

from jaxtron.kernels.selective_scan.backend import select_backend
from jaxtron.layers.inputs import LayerInputs, dropout
from jaxtron.layers.linear import Linear, project
from jaxtron.layers.norm import Norm
from jaxtron.layers.saved import checkpoint_inputs
from jaxtron.layers.ssm.config import MambaConfig
from jaxtron.layers.ssm.convolution import convolve, convolve_plainly
from jaxtron.layers.ssm.initial import Taps, counted_decays, first_steps, uniform
from jaxtron.layers.ssm.memory import LayerMemory, remembered, with_before, without_padding
from jaxtron.layers.ssm.recurrences import CHANNELS, selective_scan
from jaxtron.layers.ssm.scan import Recurrence, advance, scan
from jaxtron.sharding.parameters import parameter
from jaxtron.sharding.rules import constrain, current
from jaxtron.typing import Array, Float


class Mamba1(nnx.Module):
    """`output(scan(x, B, C; dt) * silu(z))`, where x is convolved, and B, C and dt are products of it.

    Channels are split over tensor. B, C and what the steps are made of are sums over all channels, which every device
    has.
    """

    def __init__(
        self,
        embed: int,
        channels: int,
        rank: int,
        config: MambaConfig,
        *,
        std: float,
        output_std: float,
        epsilon: float,
        dropout: float,
        rngs: nnx.Rngs,
    ) -> None:
        self.config, self.dropout, self.rank = config, dropout, rank
        stream, inner, size = {"embed": embed}, {"channels": channels}, config.state_size
        # x, then z
        self.input = Linear(stream, {"gate": 2, **inner}, bias=False, std=std, rngs=rngs)
        self.conv = Taps(config.conv_width, inner, rngs)
        # what steps are made of, B and C
        self.x_proj = Linear(inner, {"latent": rank + 2 * size}, bias=False, std=std, rngs=rngs)
        bound = 1 / math.sqrt(rank)
        self.dt_proj = parameter(
            rngs, uniform(-bound, bound), (rank, channels), axes=("latent", "channels"), role="kernel"
        )
        self.dt_bias = parameter(rngs, first_steps(config), (channels,), axes=("channels",), role="state")
        self.A_log = parameter(rngs, counted_decays, (channels, size), axes=("channels", "state"), role="state")
        self.D = parameter(rngs, initializers.ones, (channels,), axes=("channels",), role="state")
        self.output = Linear(inner, stream, bias=False, std=output_std, rngs=rngs)

        def norm(width: int) -> Norm | None:
            if not config.inner_norms:
                return None
            return Norm(width, kind="rms_norm", bias=False, epsilon=epsilon, rngs=rngs)

        self.dt_norm, self.B_norm, self.C_norm = norm(rank), norm(size), norm(size)

    def __call__(self, x: Float[Array, "B S E"], inputs: LayerInputs) -> Float[Array, "B S E"]:
        segments = None if inputs.segments is None else constrain(inputs.segments, "batch", "full_seq")
        x, z = self._project(x, inputs)
        through: Any = convolve(x, self.conv.kernel[...], self.conv.bias[...], segments, ("channels",))
        y: Any = scan(self._recurrence(), self._scanned(through, inputs), segments)
        y = self.output(_gated(y, z), "batch", "seq", "embed", inputs=inputs)
        return dropout(y, self.dropout, inputs, "batch", "seq", "embed")

    def advance(
        self, x: Float[Array, "B S E"], memory: LayerMemory | None, inputs: LayerInputs
    ) -> tuple[Float[Array, "B S E"], LayerMemory]:
        """The same for what follows a sequence of which this is the memory (none: nothing came before).

        For generation: the sequence is one document, whole on each device.
        """
        x, z = self._project(x, inputs)
        num_before = self.config.conv_width - 1
        wide = with_before(memory, (x,), num_before)
        x, dt, *others = self._scanned(convolve_plainly(wide[0], self.conv.kernel[...], self.conv.bias[...]), inputs)
        arrays = (x, without_padding(dt, inputs.growth), *others)
        shape = (x.shape[0], self.config.state_size, x.shape[2])
        state = jnp.zeros(shape, jnp.float32) if memory is None else memory.state
        recurrence = self._recurrence()
        y, state = advance(recurrence, arrays, constrain(state, *recurrence.state))
        # few positions need not split
        y = self.output(_gated(y, z), "batch", "full_seq", "embed", inputs=inputs)
        return y, remembered(wide, num_before, state, inputs.growth)

    def _recurrence(self) -> Recurrence:
        return selective_scan(select_backend(self.config.implementation, current().device_kind).implementation)

    def _project(
        self, x: Float[Array, "B S E"], inputs: LayerInputs
    ) -> tuple[Float[Array, "B S C"], Float[Array, "B S C"]]:
        """What is convolved, and the gate."""
        x = constrain(x, "batch", "full_seq", "embed")
        both = self.input(x, "batch", "full_seq", "gate", "channels", inputs=inputs)
        return both[:, :, 0], both[:, :, 1]

    def _scanned(
        self, x: Float[Array, "B S C"], inputs: LayerInputs
    ) -> tuple[Array, Array, Array, Array, Array, Array]:
        """What a scan reads: x, steps, A, B, C and D."""
        found = self.x_proj(x, "batch", "full_seq", "latent", inputs=inputs)
        steps, B, C = jnp.split(found, (self.rank, self.rank + self.config.state_size), -1)
        if self.dt_norm is not None and self.B_norm is not None and self.C_norm is not None:
            steps, B, C = self.dt_norm(steps), self.B_norm(B), self.C_norm(C)
        dt = project(steps, self.dt_proj[...], CHANNELS).astype(jnp.float32) + self.dt_bias[...]
        dt = constrain(jnp.clip(jax.nn.softplus(dt), *self.config.dt_limit), *CHANNELS)
        # one group, which one tensor part splits in name alone
        group = "groups" if current().splits("groups", 1) else None
        B, C = (constrain(part[:, :, None], "batch", "full_seq", group, "state") for part in (B, C))
        return x, dt, -jnp.exp(self.A_log[...]), B, C, self.D[...]


def _gated(y: Float[Array, "B S C"], z: Float[Array, "B S C"]) -> Float[Array, "B S C"]:
    """In float32; the backward keeps both alone."""
    return checkpoint_inputs(lambda y, z: (y.astype(jnp.float32) * jax.nn.silu(z.astype(jnp.float32))).astype(y.dtype))(
        y, z
    )
