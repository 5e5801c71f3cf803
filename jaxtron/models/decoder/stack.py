"""A pattern's residual layers, stacked by period, or by kind where it is mixed, for a loop over them."""

import functools
import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx

from jaxtron.layers.attention import Attention
from jaxtron.layers.inputs import BranchOutput, LayerInputs
from jaxtron.layers.mlp import Mlp
from jaxtron.layers.moe.router import LOAD
from jaxtron.layers.saved import save_for_backward
from jaxtron.models.decoder import recompute
from jaxtron.models.decoder.config import ModelConfig
from jaxtron.models.decoder.kinds import KINDS
from jaxtron.models.decoder.layers import BUILDERS, Backends, make_norm
from jaxtron.models.decoder.pattern import Branch
from jaxtron.models.growing import by_position
from jaxtron.models.stacked import stacked
from jaxtron.pipeline import buffers
from jaxtron.pipeline.partition import Partition
from jaxtron.sharding.collectives import vary
from jaxtron.sharding.halves import Split, halve, join, split_of
from jaxtron.typing import Array, DTypeLike, Float, PyTree

# of each branch of a layer; none where it remembers nothing
Memories = tuple[PyTree, ...]


@runtime_checkable
class Remembers(Protocol):
    """A branch that can go on from what it remembers of a sequence."""

    def advance(
        self, x: Float[Array, "B S E"], memory: PyTree, inputs: LayerInputs
    ) -> tuple[Float[Array, "B S E"], PyTree]:
        """What it makes of further positions, and what it then remembers."""
        ...


@runtime_checkable
class NeedsRoom(Protocol):
    """One whose memory grows with the sequence; that of others has the same size at every position."""

    def start(self, rows: int, room: int, most: int, dtype: DTypeLike) -> PyTree:
        """What it remembers of sequences that begin, with room for so many positions, at most so many at a time."""
        ...


class Layer(nnx.Module):
    """`x + sum of branches(norm(x))`: one attention or MLP, or several in parallel.

    What they read is normed once for all or for each, what they make is not, or is, or it alone (`norm_placement`).
    """

    def __init__(self, config: ModelConfig, branch: Branch, backends: Backends, rngs: nnx.Rngs) -> None:
        self.recomputed = config.recomputed
        self.width, placement = config.hidden_size, config.norm_placement
        make = functools.partial(make_norm, config, config.hidden_size, rngs)
        has_own = config.branch_norms and len(branch) > 1
        self.norm = None if placement == "output" or has_own else make()
        self.multiplier = config.residual_multiplier
        self.names = tuple(KINDS[symbol].module for symbol in branch)
        # in the table's order, so that first values do not depend on the pattern's
        for symbol, kind in KINDS.items():
            if symbol in branch:
                setattr(self, kind.module, BUILDERS[symbol](config, kind, backends, rngs))
                if has_own:
                    setattr(self, f"{kind.module}_norm", make())
                if placement != "input":
                    setattr(self, f"{kind.module}_output_norm", make())
        # where a tensor of 8-bit numbers has one scale each half would have its own; of a loop over kinds, of which one
        # is chosen, XLA makes the gather that several begin with before the choice, and the second half's for nothing
        are_known = all(isinstance(getattr(self, name), (Attention, Mlp)) for name in self.names)
        self.can_be_halved = are_known and config.fp8.scaling != "current" and not config.layout.mixed

    def __call__(self, x: Float[Array, "B S E"], inputs: LayerInputs) -> list[BranchOutput]:
        """The stream after each branch, with what the branch reports."""
        outputs = []
        for site, (name, normed) in enumerate(zip(self.names, self._read(x), strict=True)):
            output = self._region(name, getattr(self, name))(normed, inputs.fold(site))
            output = output if isinstance(output, BranchOutput) else BranchOutput(output, None, {})
            x = save_for_backward(x + self._added(name, output.x))
            outputs.append(output._replace(x=x))
        return outputs

    def side_by_side(
        self, halves: tuple[Float[Array, "B S E"], ...], inputs: LayerInputs, split: Split
    ) -> tuple[Float[Array, "B S E"], ...]:
        """The stream's halves after all branches, which must be attention and MLPs."""
        read = zip(*(self._read(x) for x in halves), strict=True)
        for site, (name, normed) in enumerate(zip(self.names, read, strict=True)):
            found = self._region(name, getattr(self, name), _of_halves(split))(normed, inputs.fold(site))
            halves = tuple(save_for_backward(x + self._added(name, y)) for x, y in zip(halves, found, strict=True))
        return halves

    def start(self, rows: int, room: int, most: int, dtype: DTypeLike) -> Memories:
        """What its branches remember of sequences that begin, with room for so many positions, at most so many at a
        time."""

        def of(module: nnx.Module) -> PyTree:
            if isinstance(module, NeedsRoom):
                return module.start(rows, room, most, dtype)
            if not isinstance(module, Remembers):
                return None
            x = jnp.zeros((rows, 1, self.width), dtype)
            return buffers.zeros(jax.eval_shape(lambda x: module.advance(x, None, LayerInputs())[1], x))

        return jax.tree.map(vary, tuple(of(getattr(self, name)) for name in self.names))

    def advance(
        self, x: Float[Array, "B S E"], memories: Memories, inputs: LayerInputs
    ) -> tuple[Float[Array, "B S E"], Memories]:
        """The stream after the branches, for what follows a sequence of which these are the memories.

        The stream is whole on every part of `mesh.tensor`: of few positions there is nothing to split.
        """
        found = []
        for name, normed, memory in zip(self.names, self._read(x), memories, strict=True):
            module = getattr(self, name)
            if isinstance(module, Remembers):
                y, memory = module.advance(normed, memory, inputs)
            else:
                y = by_position(lambda x, module=module: module(x, LayerInputs()), normed)
            x = x + self._added(name, y)
            found.append(memory)
        return x, tuple(found)

    def _read(self, x: Float[Array, "B S E"]) -> tuple[Float[Array, "B S E"], ...]:
        """What each branch reads of the stream."""
        if self.norm is not None:
            return (self.norm(x),) * len(self.names)
        norms = (getattr(self, f"{name}_norm", None) for name in self.names)
        return tuple(x if norm is None else norm(x) for norm in norms)

    def _added(self, name: str, y: Float[Array, "B S E"]) -> Float[Array, "B S E"]:
        """What the stream gets of what a branch makes."""
        norm = getattr(self, f"{name}_output_norm", None)
        # a backward needs what was normed, and would send it again to have it
        y = y if norm is None else norm(save_for_backward(y))
        return y if self.multiplier == 1.0 else y * jnp.asarray(self.multiplier, y.dtype)

    def _region(self, name: str, module: nnx.Module, call: Callable[..., PyTree] = operator.call):
        if name not in self.recomputed:
            return functools.partial(call, module)
        graph, state = nnx.split(module)
        run = recompute.region(name, self.recomputed, lambda state, *args: call(nnx.merge(graph, state), *args))
        return functools.partial(run, state)


def _of_halves(split: Split) -> Callable[..., tuple[Array, ...]]:
    """What calls a module on the halves of a microbatch."""

    def call(module: nnx.Module, halves: Sequence[Array], inputs: LayerInputs) -> tuple[Array, ...]:
        if split == "positions" and isinstance(module, Attention):
            return module.halves_of_positions(halves, inputs)
        return tuple(module(x, own) for x, own in zip(halves, inputs.halves(split), strict=True))

    return call


class Period(nnx.Module):
    """Some layers in order, those of a period."""

    def __init__(self, config: ModelConfig, branches: tuple[Branch, ...], backends: Backends, rngs: nnx.Rngs) -> None:
        self.layers = nnx.List([Layer(config, branch, backends, rngs) for branch in branches])

    def __call__(self, x: Float[Array, "B S E"], inputs: LayerInputs) -> BranchOutput:
        """What the last layer leaves, as `run_layers`."""
        return run_layers(self.layers, x, inputs)


def run_layers(layers: Iterable[Layer], x: Float[Array, "B S E"], inputs: LayerInputs) -> BranchOutput:
    """What the last layer leaves, the sum of their losses, and of each metric those of the layers that have it."""
    layers = list(layers)
    split = split_of(x) if all(layer.can_be_halved for layer in layers) else None
    if split is not None:
        halves = halve(x, split)
        for number, layer in enumerate(layers):
            halves = layer.side_by_side(halves, inputs.fold(number), split)
        first, second = halves
        return BranchOutput(join(first, second, split), None, {})
    outputs: list[BranchOutput] = []
    for number, layer in enumerate(layers):
        found = layer(x, inputs.fold(number))
        if inputs.load is not None:
            reports = sum(LOAD in output.metrics for output in found)
            inputs = replace(inputs, load=inputs.load[reports:])
        outputs += found
        x = outputs[-1].x
    losses = [output.loss for output in outputs if output.loss is not None]
    names = dict.fromkeys(name for output in outputs for name in output.metrics)
    metrics = {
        name: jnp.stack([output.metrics[name] for output in outputs if name in output.metrics]) for name in names
    }
    return BranchOutput(x, sum(losses[1:], losses[0]) if losses else None, metrics)


class Kinds(nnx.Module):
    """Layers of a mixed pattern, those of each kind stacked under its name."""

    def __init__(self, config: ModelConfig, partition: Partition, backends: Backends, rngs: nnx.Rngs) -> None:
        for name, branch in config.layout.kinds.items():
            make = functools.partial(Layer, config, branch, backends)
            setattr(self, name, stacked(make, partition.by_kind[name], rngs))


class Stack(nnx.Module):
    """All layers, by period: those that are alike, and a few before them (none: no such); or by kind."""

    def __init__(self, config: ModelConfig, partition: Partition, backends: Backends, rngs: nnx.Rngs) -> None:
        layout = config.layout
        if layout.mixed:
            self.layers, self.leading = Kinds(config, partition, backends, rngs), None
            return
        self.periods = stacked(functools.partial(Period, config, layout.period, backends), partition, rngs)
        leading = [Period(config, period, backends, rngs) for period in layout.leading]
        self.leading = nnx.List(leading) if leading else None
