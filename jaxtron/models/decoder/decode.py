"""A decoder that goes on from what its layers remember: a sequence in parts, at last one token at a time.

Layers are apart here, each with parameters of its own, so that a step reads these and copies none.
"""

import dataclasses
from collections.abc import Iterator
from typing import TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from jaxtron.config import UserError
from jaxtron.models.decoder.model import Decoder
from jaxtron.models.decoder.pattern import layer_kinds
from jaxtron.models.decoder.stack import Layer, Memories
from jaxtron.models.program import whole
from jaxtron.sharding.rules import current
from jaxtron.typing import Array, Float, Int

ModuleT = TypeVar("ModuleT", bound=nnx.Module)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecoderMemory:
    """What a decoder remembers of some sequences so far."""

    layers: tuple[Memories, ...]
    """Of each layer, in their order."""
    length: Int[Array, ""]
    """Positions so far, of which attention has `room` for a given number."""


class Steps(nnx.Module):
    """A decoder whose layers are apart, with their weights whole and in its type; inside `sharding.use(rules)`.

    For devices along `data` and `fsdp`: `UserError` for others, which would split a token's position.
    """

    def __init__(self, decoder: Decoder) -> None:
        rules = current()
        if rules.parts("pipe", "context", "tensor") > 1:
            raise UserError("going on from a memory needs --mesh.pipe 1 --mesh.context 1 --mesh.tensor 1")
        self.decoder = _without_layers(decoder)
        self.layers = nnx.List([whole(layer, decoder.dtype) for layer in _in_order(decoder)])

    def start(self, rows: int, room: int) -> DecoderMemory:
        """What is remembered of sequences that begin; attention has room for so many positions."""
        layers = (layer.start(rows, room, self.decoder.dtype) for layer in self.layers)
        return DecoderMemory(tuple(layers), jnp.int32(0))

    def advance(self, tokens: Int[Array, "B S"], memory: DecoderMemory) -> tuple[Float[Array, "B V"], DecoderMemory]:
        """Logits of what follows these tokens, the vocabulary's padding included, and what is then remembered.

        There has to be room for them: what goes beyond it overwrites what was there.
        """
        rows, length = tokens.shape
        places = jnp.broadcast_to(memory.length + jnp.arange(length, dtype=jnp.int32), (rows, length))
        x = self.decoder.embed(tokens, positions=places)
        inputs = dataclasses.replace(self.decoder.inputs(length, positions=places), before=memory.length)
        found = []
        for number, (layer, memories) in enumerate(zip(self.layers, memory.layers, strict=True)):
            x, memories = layer.advance(x, memories, inputs.fold(number))
            found.append(memories)
        logits = self.decoder.predict(x[:, -1:])
        return logits[:, 0], DecoderMemory(tuple(found), memory.length + length)


def _in_order(decoder: Decoder) -> Iterator[Layer]:
    """Its layers, each with values of its own."""
    layout, stack = decoder.config.layout, decoder.stack
    if layout.mixed:
        before = dict.fromkeys(layout.kinds, 0)
        for kind in layer_kinds(layout):
            yield _slot(getattr(stack.layers, kind), before[kind])
            before[kind] += 1
        return
    for period in stack.leading or ():
        yield from period.layers
    for number in range(layout.repeats):
        yield from _slot(stack.periods, number).layers


def _slot(stacked: ModuleT, number: int) -> ModuleT:
    """One of the modules that are stacked here."""
    graph, state = nnx.split(stacked)
    return nnx.merge(graph, jax.tree.map(lambda array: array[number], state))


def _without_layers(decoder: Decoder) -> Decoder:
    graph, state = nnx.split(decoder)
    apart = nnx.merge(graph, state)
    del apart.stack
    return apart
