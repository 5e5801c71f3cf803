"""METRO-LM as it is computed: two stacks, and between them what the first draws is written into the text.

The stream has beside what layers make the biases by distance of the stack at hand, which are made where it is entered,
and, without gradient, what the second was given: where tokens were replaced. What the first stack's head lost goes with
it to the end, where losses are added.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp

from jaxtron.data.batch import SEQUENCE
from jaxtron.layers.inputs import LayerInputs, row_keys
from jaxtron.models.adapters import drops
from jaxtron.models.decoder import recompute
from jaxtron.models.metro.attention_backends import attention_backends
from jaxtron.models.metro.batch import MASKED, PLACES, TOKENS, MetroBatch
from jaxtron.models.metro.config import MetroConfig
from jaxtron.models.metro.data import samples_of_text
from jaxtron.models.metro.model import Metro, at_places, hits, ids_at, written
from jaxtron.models.program import Microbatch, Parts, Program, whole
from jaxtron.pipeline.model import HeadOutput, LayerOutput, Model, Outer, Stack
from jaxtron.sharding.collectives import vary
from jaxtron.sharding.rules import constrain
from jaxtron.typing import Array, Bool, Float, Int, Key, PyTree

X, DISTANCES, REPLACED, LOSS = "x", "distances", "replaced", "loss"
Stream = dict[str, Array]


def model(parts: Parts[Metro], key: Key[Array, ""] | None) -> Model:
    """Both stacks and the heads; without a key nothing is dropped, and the same is drawn at each step."""
    metro = parts.abstract
    config, dtype = metro.config, metro.dtype
    is_dropped = key is not None and (config.is_random or drops(metro))
    drawing = jax.random.key(0) if key is None else key
    # sites of what is drawn outside of layers: after those of all layers
    outside = config.auxiliary_layers + config.num_layers

    def inputs(microbatch: Microbatch[MetroBatch]) -> LayerInputs:
        keys = row_keys(drawing, microbatch.rows) if is_dropped else None
        return LayerInputs(keys=keys, segments=microbatch.batch.segments)

    def auxiliary_inputs(microbatch: Microbatch[MetroBatch]) -> LayerInputs:
        return inputs(microbatch) if drops(metro) else replace(inputs(microbatch), keys=None)

    def enter_auxiliary(outer: Outer, _stream: None, microbatch: Microbatch[MetroBatch]) -> Stream:
        module, tokens = parts.outer(outer), microbatch.batch.tokens
        x = whole(module.embedding, dtype)(tokens, jnp.zeros_like(tokens), LayerInputs())
        # nothing yet, as large as they will be
        replaced, loss = vary(jnp.zeros(tokens.shape, jnp.float32)), vary(jnp.zeros((1,), jnp.float32))
        return {X: x, DISTANCES: module.auxiliary_end.distances(), REPLACED: replaced, LOSS: loss}

    def enter_main(outer: Outer, stream: Stream | None, microbatch: Microbatch[MetroBatch]) -> Stream:
        assert stream is not None, "it is the second"
        module, batch = parts.outer(outer), microbatch.batch
        hit, weights = _here(batch)
        end = module.auxiliary_end
        found = at_places(end.normed(stream[X]), hit)
        loss, _ = module.score(end, found, ids_at(batch.targets, hit), weights)
        drawn = module.draw(jax.lax.stop_gradient(found), _draws(drawing, microbatch, outside))
        tokens = written(batch.tokens, drawn, hit)
        replaced = (tokens != batch.targets).astype(jnp.float32)
        x = whole(module.embedding, dtype)(tokens, jnp.zeros_like(tokens), inputs(microbatch).fold(outside + 1))
        return {X: x, DISTANCES: module.main_end.distances(), REPLACED: replaced, LOSS: vary(loss[None])}

    def auxiliary_layer(weights: PyTree, stream: Stream, number: Int[Array, ""], given: LayerInputs) -> LayerOutput:
        return _layer(0, weights, stream, given.fold(number))

    def main_layer(weights: PyTree, stream: Stream, number: Int[Array, ""], given: LayerInputs) -> LayerOutput:
        return _layer(1, weights, stream, given.fold(config.auxiliary_layers + number))

    def _layer(stack: int, weights: PyTree, stream: Stream, given: LayerInputs) -> LayerOutput:
        given = replace(given, distance_bias=stream[DISTANCES])
        return LayerOutput({**stream, X: whole(parts.layer(stack, weights), dtype)(stream[X], given)})

    def head(outer: Outer, stream: Stream, microbatch: Microbatch[MetroBatch]) -> HeadOutput:
        module, batch = parts.outer(outer), microbatch.batch
        hit, weights = _here(batch)
        end, replaced = module.main_end, stream[REPLACED]
        x = end.normed(stream[X])
        auxiliary = stream[LOSS].sum()
        correction, _ = module.score(end, at_places(x, hit), ids_at(batch.targets, hit), weights)
        logits = module.detect(x)
        wanted, weigh = (constrain(array, "batch", "seq") for array in (replaced, batch.weights))
        detection = (weigh * (jax.nn.softplus(logits) - wanted * logits)).sum()
        is_right = jax.lax.stop_gradient((logits > 0) == (wanted > 0))
        sums = {
            "auxiliary": auxiliary,
            "detection": config.detection_weight * detection,
            "correction": config.correction_weight * correction,
        }
        told = {
            "replaced": (weights * jnp.where(hit, replaced[:, None, :], 0.0).sum(2)).sum(),
            "detection_accuracy": (weigh * is_right).sum(),
        }
        return HeadOutput(sum(sums.values(), jnp.float32(0)), {**jax.lax.stop_gradient(sums), **told})

    stacks = (
        Stack(enter_auxiliary, auxiliary_inputs, recompute.layer(config.auxiliary, auxiliary_layer)),
        Stack(enter_main, inputs, recompute.layer(config, main_layer)),
    )
    return Model(stacks, head)


def _here(batch: MetroBatch) -> tuple[Bool[Array, "B P S"], Float[Array, "B P"]]:
    """Where masked places are on this part of the sequence, and their weights, 0 of those elsewhere."""
    hit = hits(batch.places, batch.tokens.shape[1])
    return hit, jnp.where(hit.any(2), batch.place_weights, 0.0)


def _draws(key: Key[Array, ""], microbatch: Microbatch[MetroBatch], site: int) -> LayerInputs:
    """Keys of each row for what is drawn of it."""
    return LayerInputs(keys=row_keys(key, microbatch.rows)).fold(site)


def lengths(config: MetroConfig, length: int) -> dict[str, int]:
    """Of sequences, and how many masked places each has."""
    return {SEQUENCE: length, PLACES: config.places(length)}


PROGRAM = Program(
    batch=MetroBatch,
    losses={"auxiliary": MASKED, "detection": TOKENS, "correction": MASKED},
    metrics={"replaced": MASKED, "detection_accuracy": TOKENS},
    build=Metro,
    model=model,
    lengths=lengths,
    source=samples_of_text,
    attention=attention_backends,
)
