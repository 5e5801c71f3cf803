"""Decoders as a pipeline runs them."""

from collections.abc import Mapping
from dataclasses import replace

import jax
import numpy as np
from flax import nnx

from jaxtron.config import UserError
from jaxtron.data.batch import TokenBatch
from jaxtron.gpus import has_fp8
from jaxtron.kernels.block_products import backend as block_products
from jaxtron.kernels.gated_delta import backend as gated_delta
from jaxtron.kernels.selective_scan import backend as selective_scan
from jaxtron.layers.config import GATED
from jaxtron.layers.inputs import LayerInputs, row_keys
from jaxtron.layers.moe.router import LOAD, evened
from jaxtron.layers.moe.sizes import exchange_lines
from jaxtron.layers.ssm.mamba2 import select_scan
from jaxtron.models.adapters import drops
from jaxtron.models.decoder import recompute
from jaxtron.models.decoder.attention_backends import attention_backends
from jaxtron.models.decoder.config import ModelConfig
from jaxtron.models.decoder.decode import Steps
from jaxtron.models.decoder.kinds import DELTA, MAMBA, MAMBA1, MOE, expert_width
from jaxtron.models.decoder.model import Decoder
from jaxtron.models.decoder.stack import run_layers
from jaxtron.models.decoder.state_space import mamba2_heads
from jaxtron.models.program import BuildContext, Microbatch, Parts, Program, whole
from jaxtron.pipeline.model import HeadOutput, LayerOutput, Model, Outer, Stack
from jaxtron.sharding.rules import constrain, current
from jaxtron.typing import Array, DTypeLike, Float, Int, Key, PyTree


def build(config: ModelConfig, context: BuildContext, rngs) -> Decoder:
    """The module."""
    (partition,) = context.partitions.values()
    return Decoder(config, dtype=context.dtype, partition=partition, attention=context.attention, rngs=rngs)


def model(parts: Parts[Decoder], key: Key[Array, ""] | None) -> Model:
    """Embedding, layers of the pattern, norm and loss."""
    decoder = parts.abstract
    config = decoder.config
    key = key if config.is_random or drops(decoder) else None

    def keys(microbatch: Microbatch[TokenBatch]) -> Key[Array, "B"] | None:
        return None if key is None else row_keys(key, microbatch.rows)

    def enter(outer: Outer, _stream: None, microbatch: Microbatch[TokenBatch]) -> Float[Array, "B S E"]:
        batch, module = microbatch.batch, parts.outer(outer)
        x = module.embed(batch.tokens, keys(microbatch), batch.positions)
        for number, period in enumerate(module.stack.leading or ()):
            x = lead(*nnx.split(period), x, number, shared(microbatch))
        return x

    def lead(graph: nnx.GraphDef, weights: nnx.State, x: Float[Array, "B S E"], number: int, inputs: LayerInputs):
        def run(weights: nnx.State, x: Float[Array, "B S E"], inputs: LayerInputs) -> Float[Array, "B S E"]:
            output = whole(nnx.merge(graph, weights), decoder.dtype)(x, inputs.fold(number))
            assert output.loss is None and not output.metrics, "layers that lead others report nothing"
            return output.x

        return recompute.layer(config, run)(weights, x, inputs)

    def shared(microbatch: Microbatch[TokenBatch]) -> LayerInputs:
        batch = microbatch.batch
        inputs = decoder.inputs(batch.tokens.shape[1], keys(microbatch), batch.positions, batch.segments)
        return replace(inputs, row_weights=microbatch.row_weights)

    def layer(weights: PyTree, x: Float[Array, "B S E"], number: Int[Array, ""], inputs: LayerInputs) -> LayerOutput:
        inputs = inputs.fold(len(config.layout.leading) + number)
        if config.layout.mixed:
            ((kind, own),) = weights.items()
            output = run_layers([whole(parts.layer(0, own, kind), decoder.dtype)], x, inputs)
        else:
            output = whole(parts.layer(0, weights), decoder.dtype)(x, inputs)
        return LayerOutput(output.x, output.loss, output.metrics)

    def head(outer: Outer, x: Float[Array, "B S E"], microbatch: Microbatch[TokenBatch]) -> HeadOutput:
        loss, nll = parts.outer(outer).score(x, microbatch.batch.targets, microbatch.batch.weights)
        return HeadOutput(loss, {"loss": nll})

    def recall(inputs: LayerInputs, metrics: Mapping[str, Array]) -> LayerInputs:
        # of several kinds of layers not all have experts
        return replace(inputs, load=metrics.get(LOAD))

    unroll = min(config.unroll or 1, config.layout.looped)
    recalls = has_experts(config) and config.moe.balance_over == "global"
    run = recompute.layer(config, layer)
    return Model((Stack(enter, shared, run, unroll, recall if recalls else None),), head)


def predict(parts: Parts[Decoder], outer: Outer, x: Float[Array, "B S E"], place: Int[Array, ""]) -> Float[Array, "V"]:
    """Logits of what follows one place of the first row, padding of the vocabulary included."""
    x = constrain(x, "batch", "full_seq", "embed")
    logits = parts.outer(outer).predict(jax.lax.dynamic_slice_in_dim(x, place, 1, axis=1))
    return constrain(logits[0, 0], None)


def logits(parts: Parts[Decoder], outer: Outer, x: Float[Array, "B S E"]) -> Float[Array, "B S V"]:
    """Logits of what follows every token here, padding of the vocabulary included."""
    return parts.outer(outer).predict(x)


def update_buffers(
    parts: Parts[Decoder], buffers: dict[str, Float[Array, "..."]], reported: Mapping[str, Float[Array, "..."]]
) -> dict[str, Float[Array, "..."]]:
    """Selection biases of routers, by the load of the step; a period's layers with experts report in their order."""
    config, (stack,) = parts.abstract.config, parts.stacks
    with_experts = [number for number, branch in enumerate(config.layout.period) if MOE.symbol in branch]
    places = [(f"{stack}/layers/{number}", stack, place) for place, number in enumerate(with_experts)]
    if config.layout.mixed:
        kinds = (name for name, branch in config.layout.kinds.items() if MOE.symbol in branch)
        places = [(f"{stack}/{name}", f"{stack}/{name}", 0) for name in kinds]
    found = {}
    for layer, reporter, place in places:
        name = f"{layer}/{MOE.module}/router/bias"
        load = reported[f"{reporter}/{LOAD}"][:, place]
        found[name] = evened(buffers[name], load, config.moe.bias_rate)
    assert found.keys() == buffers.keys(), (found.keys(), buffers.keys())
    return found


def choices(config: ModelConfig, dtype: DTypeLike, rows: int, length: int) -> tuple[str, ...]:
    """What multiplies blocks of 8-bit numbers; what computes scans; how tokens get to experts, and what multiplies
    them.

    `UserError` where products of 8-bit numbers are asked of devices that have none.
    """
    scaling, kind_of_device = config.fp8.scaling, current().device_kind
    if scaling != "none" and not has_fp8(kind_of_device):
        raise UserError(
            f"model.fp8.scaling {scaling}: {kind_of_device} has no products of 8-bit numbers, which Hopper has; "
            "set --model.fp8.scaling none"
        )
    kinds = {kind.symbol for kind in config.kinds}
    lines = (block_products.select_backend(dtype, kind_of_device).reason,) if scaling == "block" else ()
    lines += (select_scan(config.mamba, mamba2_heads(config), dtype).reason,) if MAMBA.symbol in kinds else ()
    for kind, backend, named in (
        (MAMBA1, selective_scan, config.mamba.implementation),
        (DELTA, gated_delta, config.delta.implementation),
    ):
        lines += (backend.select_backend(named, current().device_kind).reason,) if kind.symbol in kinds else ()
    if not has_experts(config):
        return lines
    shape = (rows, length // current().parts("context", "tensor"))
    kernel = (config.hidden_size, 2 if config.activation in GATED else 1, expert_width(config))
    return lines + exchange_lines(config.moe, shape, kernel, dtype)


def has_experts(config: ModelConfig) -> bool:
    """Whether a period has a layer with experts."""
    return any(MOE.symbol in branch for branch in config.layout.period)


PROGRAM = Program(
    batch=TokenBatch,
    losses={"loss": "tokens"},
    build=build,
    model=model,
    attention=attention_backends,
    choices=choices,
    update_buffers=update_buffers,
    predict=predict,
    logits=logits,
    token_rows=lambda tokens, is_text, _: TokenBatch(tokens, tokens, np.zeros(tokens.shape, np.float32)),
    steps=lambda decoder, partitions: Steps(decoder, partitions[0]),
)
