"""A pattern's residual layers, stacked by period and scanned."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxtron.layers.inputs import LayerInputs
from jaxtron.layers.saved import save_for_backward
from jaxtron.models.decoder import recompute
from jaxtron.models.decoder.config import ModelConfig
from jaxtron.models.decoder.kinds import KINDS
from jaxtron.models.decoder.layers import BUILDERS, Backends, make_norm
from jaxtron.models.decoder.pattern import Branch
from jaxtron.pipeline.model import LayerFunction, LayerOutput
from jaxtron.pipeline.partition import Partition
from jaxtron.sharding.parameters import gather_at_use
from jaxtron.typing import Array, Float


class Layer(nnx.Module):
    """`x + sum of branches(norm(x))`: one attention or MLP, or several in parallel on one norm."""

    def __init__(self, config: ModelConfig, branch: Branch, backends: Backends, rngs: nnx.Rngs) -> None:
        self.recomputed = config.recomputed
        self.norm = make_norm(config, config.hidden_size, rngs)
        self.names = tuple(KINDS[symbol].module for symbol in branch)
        # in the table's order, so that first values do not depend on the pattern's
        for symbol, kind in KINDS.items():
            if symbol in branch:
                setattr(self, kind.module, BUILDERS[symbol](config, kind, backends, rngs))

    def __call__(self, x: Float[Array, "B S E"], inputs: LayerInputs) -> Float[Array, "B S E"]:
        normed = self.norm(x)
        for site, name in enumerate(self.names):
            branch = self._region(name, getattr(self, name))
            x = save_for_backward(x + branch(normed, inputs.fold(site)))
        return x

    def _region(self, name: str, module: nnx.Module):
        if name not in self.recomputed:
            return module
        graph, state = nnx.split(module)
        run = recompute.region(name, self.recomputed, lambda state, *args: nnx.merge(graph, state)(*args))
        return functools.partial(run, state)


class Period(nnx.Module):
    """The layers of one period, in order."""

    def __init__(self, config: ModelConfig, backends: Backends, rngs: nnx.Rngs) -> None:
        self.layers = nnx.List([Layer(config, branch, backends, rngs) for branch in config.layout.period])

    def __call__(self, x: Float[Array, "B S E"], inputs: LayerInputs) -> Float[Array, "B S E"]:
        for number, layer in enumerate(self.layers):
            x = layer(x, inputs.fold(number))
        return x


class Stack(nnx.Module):
    """All layers: one period's module whose parameters carry a leading axis over the repeats.

    With a `partition` of several stages the axis is in their order, and only the pipeline's executor runs the layers.
    """

    def __init__(
        self, config: ModelConfig, dtype: jnp.dtype, partition: Partition, backends: Backends, rngs: nnx.Rngs
    ) -> None:
        self.config = config
        self.dtype = dtype
        self.partition = partition
        graph = nnx.split(nnx.eval_shape(lambda: Period(config, backends, nnx.Rngs(0))))[0]
        keys = jax.random.split(rngs.params(), config.layout.repeats)
        # keys are put in the rows' order, not values: so each device makes only its own
        keys = keys if partition.is_in_order else keys[np.maximum(np.asarray(partition.slot_layers), 0)]
        states = jax.vmap(lambda key: nnx.split(Period(config, backends, nnx.Rngs(key)))[1])(keys)
        self.periods = nnx.merge(graph, jax.tree.map(functools.partial(_empty_as_zeros, partition), states))

    def __call__(self, x: Float[Array, "B S E"], inputs: LayerInputs) -> Float[Array, "B S E"]:
        layer = self.layer()

        def body(x: Array, step: tuple[Array, nnx.State]) -> tuple[Array, None]:
            number, state = step
            return layer(state, x, number, inputs).stream, None

        steps = (jnp.arange(self.config.layout.repeats), self.state())
        return jax.lax.scan(body, x, steps, unroll=self.unroll())[0]

    def state(self) -> nnx.State:
        """Parameters of all periods."""
        return nnx.split(self.periods)[1]

    def layer(self) -> LayerFunction:
        """(a period's parameters, its input, its number, inputs shared by all) -> its output, under its policy."""
        graph = nnx.split(self.periods)[0]

        def layer(state: nnx.State, x: Array, number: Array, inputs: LayerInputs) -> LayerOutput:
            period = nnx.merge(graph, gather_at_use(state, self.dtype))
            return LayerOutput(period(x, inputs.fold(number)))

        return recompute.layer(self.config.recomputed, layer)

    def unroll(self) -> int:
        """Periods in each iteration of a loop over them."""
        return min(self.config.unroll or 1, self.config.layout.repeats)


def _empty_as_zeros(partition: Partition, rows: Array) -> Array:
    filled = (np.asarray(partition.slot_layers) >= 0).reshape(-1, *(1,) * (rows.ndim - 1))
    return rows if filled.all() else jnp.where(filled, rows, 0)
