"""A mixture of experts as a branch of a layer: the router, then the experts of each token (Switch, 2101.03961)."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn import initializers

from jaxtron.layers.config import GATED, Activation
from jaxtron.layers.inputs import BranchOutput, LayerInputs, dropout
from jaxtron.layers.linear import normal
from jaxtron.layers.mlp import FUNCTIONS, Mlp, gated
from jaxtron.layers.moe.config import MoeConfig
from jaxtron.layers.moe.experts import ExpertParameters, mix
from jaxtron.layers.moe.router import Router
from jaxtron.layers.moe.sizes import make_exchange
from jaxtron.layers.saved import save_for_backward
from jaxtron.sharding.parameters import parameter
from jaxtron.sharding.rules import constrain, current
from jaxtron.typing import Array, Float


class Moe(nnx.Module):
    """`sum over a token's experts of weight x down(f(gate(x)) * up(x))`, and what the router reports."""

    def __init__(
        self,
        embed: int,
        mlp: int,
        config: MoeConfig,
        *,
        activation: Activation,
        bias: bool,
        std: float,
        output_std: float,
        dropout: float,
        rngs: nnx.Rngs,
    ) -> None:
        self.config = config
        self.activation: Activation = activation
        self.dropout = dropout
        self.router = Router(embed, config, bias=bias, std=std, rngs=rngs)
        of_mlp = {"activation": activation, "bias": bias, "std": std, "output_std": output_std, "dropout": 0.0}
        self.shared = Mlp(embed, config.shared_size, **of_mlp, rngs=rngs) if config.shared_size else None
        gate = functools.partial(parameter, rngs, normal(std), (embed,), axes=("embed",), role="router")
        self.shared_gate = gate() if config.shared_gate else None
        inputs = 2 if activation in GATED else 1
        self.kernel_shape = (embed, inputs, mlp)
        shape, axes = (config.num_experts, *self.kernel_shape), ("expert", "expert_embed", "gate", "expert_mlp")
        self.up = parameter(rngs, normal(std), shape, axes=axes, role="kernel")
        shape, axes = (config.num_experts, mlp, embed), ("expert", "expert_mlp", "expert_embed")
        self.down = parameter(rngs, normal(output_std), shape, axes=axes, role="kernel")
        zeros = functools.partial(parameter, rngs, initializers.zeros, role="bias")
        shape, axes = (config.num_experts, inputs, mlp), ("expert", "gate", "expert_mlp")
        self.up_bias = zeros(shape, axes=axes) if bias else None
        self.down_bias = zeros((config.num_experts, embed), axes=("expert", "norm")) if bias else None

    def __call__(self, x: Float[Array, "B S E"], inputs: LayerInputs) -> BranchOutput:
        x = constrain(x, "batch", "seq", "embed")
        routing = self.router(x, inputs)
        shape = (x.shape[0], x.shape[1] // current().parts("tensor"))
        exchange = make_exchange(self.config, shape, self.kernel_shape, x.dtype)
        # what all tokens go through is multiplied while tokens travel to experts and back
        beside = None if self.shared is None else self.shared.enter(x, inputs)
        names = () if self.shared is None else self.shared.entered
        run = functools.partial(mix, x, routing.weights, routing.chosen, self._experts(), beside)
        y, beside = run(exchange, functools.partial(activate, self.activation), names)
        if beside is not None:
            y = y + self._shared(x, save_for_backward(beside), inputs)
        y = dropout(y, self.dropout, inputs, "batch", "seq", "embed")
        return BranchOutput(y, routing.loss, routing.metrics)

    def _experts(self) -> ExpertParameters:
        """The parameters of the experts."""
        biases = (None if bias is None else bias[...] for bias in (self.up_bias, self.down_bias))
        return ExpertParameters(self.up[...], self.down[...], *biases)

    def _shared(
        self, x: Float[Array, "B S E"], hidden: Float[Array, "B S *gates F"], inputs: LayerInputs
    ) -> Float[Array, "B S E"]:
        """What every token goes through, from what goes into its activation on."""
        assert self.shared is not None
        y = self.shared.leave(hidden, inputs)
        if self.shared_gate is None:
            return y
        logits = jnp.sum(x.astype(jnp.float32) * self.shared_gate[...], -1, keepdims=True)
        return y * jax.nn.sigmoid(logits).astype(y.dtype)


def activate(
    name: Activation, hidden: Float[Array, "*rows G F"], weights: Float[Array, "*rows 1"]
) -> Float[Array, "*rows F"]:
    """What goes into an expert's last product, with the router's weight of its row on it."""
    first = hidden[..., 0, :]
    inner = gated(name, first, hidden[..., 1, :]) if name in GATED else FUNCTIONS[name](first)
    return (inner * weights).astype(hidden.dtype)
