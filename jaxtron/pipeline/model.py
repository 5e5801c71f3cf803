"""What the executor needs of a model: stacks of equal layers, how a microbatch enters each, and the head.

A model's *stream* is what goes from layer to layer and from stage to stage: a pytree of floating-point arrays with the
same structure, shapes and types everywhere in the pipeline (an encoder-decoder's has the encoder's output beside the
decoder's). What layers read and no gradient goes through, such as masks and positions, is their *shared* input.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax

from jaxtron.typing import Array, Float, Int, PyTree

Outer = PyTree
Stream = PyTree
Microbatch = PyTree


@partial(jax.tree_util.register_dataclass, data_fields=("stream", "loss", "metrics", "cache"), meta_fields=())
@dataclass(frozen=True)
class LayerOutput:
    """What one layer makes of one microbatch, on one device."""

    stream: Stream
    """What the next layer reads."""
    loss: Float[Array, ""] | None = None
    """A summand of the differentiated loss: its cotangent is 1, so it is already weighted as the token loss is."""
    metrics: dict[str, Float[Array, "..."]] | tuple[()] = ()
    """Float32 arrays to report, without gradient: summed over the microbatches, kept by layer."""
    cache: PyTree = None
    """What decoding keeps of it; training keeps none."""


# (a layer's parameters, the stream, the layer's number in its stack, the stack's shared input) -> its output
LayerFunction = Callable[[PyTree, Stream, Int[Array, ""], PyTree], LayerOutput]


class HeadOutput(NamedTuple):
    """What the head makes of one microbatch, on one device."""

    loss: Float[Array, ""]
    """To differentiate."""
    sums: dict[str, Float[Array, "..."]]
    """To report, summed over the microbatches (and over the devices by who runs the executor)."""


@dataclass(frozen=True)
class Stack:
    """Layers that differ in nothing but their parameters and their numbers; or of several kinds, whose parameters the
    layer function gets by kind, `{kind: parameters}`."""

    enter: Callable[[Outer, Stream | None, Microbatch], Stream]
    """(outer, what left the stack before, microbatch) -> the first layer's stream; the first gets None: embeds."""
    shared: Callable[[Microbatch], PyTree]
    """What all layers of the stack read beside the stream."""
    layer: LayerFunction
    unroll: int = 1
    """Layers unrolled in each iteration of the loop over them."""
    recall: Callable[[PyTree, PyTree], PyTree] | None = None
    """(shared input, this device's sums of a layer's metrics over the step's earlier microbatches) -> the shared input
    of a layer that is trained; none: it remembers nothing."""


@dataclass(frozen=True)
class Model:
    """A model in the pieces that stages run; its functions see whole parameters, trained and frozen together."""

    stacks: tuple[Stack, ...]
    """In the order in which a microbatch passes them: encoder, decoder."""
    head: Callable[[Outer, Stream, Microbatch], HeadOutput]


@partial(jax.tree_util.register_dataclass, data_fields=("stacks", "outer"), meta_fields=())
@dataclass(frozen=True)
class Parameters:
    """A model's parameters, or what is like them: gradients, or those that are frozen."""

    stacks: tuple[PyTree, ...]
    """Each stack's layers along a leading axis of slots, as its partition orders them: a stage has its own."""
    outer: PyTree
    """Embedding, final norm, head: every stage has all of it."""


def merge(trained: PyTree, frozen: PyTree) -> PyTree:
    """The whole of two trees that are alike but for None where the other has a leaf; `frozen` None: all are trained."""
    if frozen is None:
        return trained
    return jax.tree.map(
        lambda one, other: other if one is None else one, trained, frozen, is_leaf=lambda node: node is None
    )
