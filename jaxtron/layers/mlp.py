"""The MLP of a transformer layer."""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from jaxtron.layers.config import GATED, Activation, Scaling
from jaxtron.layers.inputs import LayerInputs, dropout
from jaxtron.layers.linear import Linear, whole_sequence
from jaxtron.layers.saved import checkpoint_inputs
from jaxtron.typing import Array, Float


def gelu(x: Array) -> Array:
    """`x * Phi(x)` (1606.08415) by erf, in float32: half the work of the erfc form."""
    wide = x.astype(jnp.float32)
    return (0.5 * wide * (1.0 + jax.lax.erf(wide * math.sqrt(0.5)))).astype(x.dtype)


FUNCTIONS: dict[Activation, Callable[[Array], Array]] = {
    "gelu": gelu,
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
    "squared_relu": lambda x: jnp.square(jax.nn.relu(x)),
    "swiglu": jax.nn.silu,
    "geglu": gelu,
    "geglu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "clamped_swiglu": lambda x: x * jax.nn.sigmoid(1.702 * x),
}
# of clamped_swiglu, which gates what is one more than it was (gpt-oss, 2508.10925)
LIMIT = 7.0


def gated(name: Activation, gate: Float[Array, "*rows F"], up: Float[Array, "*rows F"]) -> Float[Array, "*rows F"]:
    """What goes into the last product of a gated MLP."""
    if name == "clamped_swiglu":
        gate, up = jnp.minimum(gate, LIMIT), jnp.clip(up, -LIMIT, LIMIT) + 1.0
    return FUNCTIONS[name](gate) * up


class Mlp(nnx.Module):
    """`down(f(up(x)))`, or `down(f(gate(x)) * up(x))` for the gated kinds (GLU variants, 2002.05202)."""

    def __init__(
        self,
        embed: int,
        mlp: int,
        *,
        activation: Activation,
        bias: bool,
        std: float,
        output_std: float,
        dropout: float,
        rngs: nnx.Rngs,
        scaling: Scaling = "none",
    ) -> None:
        self.activation: Activation = activation
        self.dropout = dropout
        outputs = {"gate": 2, "mlp": mlp} if activation in GATED else {"mlp": mlp}
        self.up = Linear({"embed": embed}, outputs, bias=bias, std=std, rngs=rngs, scaling=scaling)
        self.down = Linear({"mlp": mlp}, {"embed": embed}, bias=bias, std=output_std, rngs=rngs, scaling=scaling)

    def __call__(self, x: Float[Array, "B S E"], inputs: LayerInputs) -> Float[Array, "B S E"]:
        return self.leave(self.enter(x, inputs), inputs)

    def enter(self, x: Float[Array, "B S E"], inputs: LayerInputs) -> Float[Array, "B S *gates F"]:
        """What goes into the activation."""
        return self.up(whole_sequence(x, self.up.scaling), *self.entered, inputs=inputs, own=x)

    @property
    def entered(self) -> tuple[str, ...]:
        """How this is split."""
        return ("batch", "full_seq", *(("gate",) if self.activation in GATED else ()), "mlp")

    def leave(self, hidden: Float[Array, "B S *gates F"], inputs: LayerInputs) -> Float[Array, "B S E"]:
        """What comes of it."""
        if self.activation in GATED:
            hidden = checkpoint_inputs(lambda pair: gated(self.activation, pair[:, :, 0], pair[:, :, 1]))(hidden)
        else:
            hidden = checkpoint_inputs(FUNCTIONS[self.activation])(hidden)
        y = self.down(hidden, "batch", "seq", "embed", inputs=inputs)
        return dropout(y, self.dropout, inputs, "batch", "seq", "embed")
