"""What a T5 costs: parameters, floating-point operations, and what it takes of a device."""

from dataclasses import dataclass, replace

from jaxtron.models.t5.config import T5Config
from jaxtron.models.work.attention import AttentionShapes, core, core_temporaries, projections
from jaxtron.models.work.blocks import (
    embedding,
    linear,
    mlp,
    mlp_temporaries,
    norm,
    put_together,
    residual,
    token_head,
)
from jaxtron.models.work.model import ModelWork, StackWork
from jaxtron.models.work.operations import CollectiveWork, FusedKernel, PhaseWork, Product, SlotWork
from jaxtron.models.work.shapes import FLOAT, Shapes, gathered_weights
from jaxtron.roles import Role


def num_parameters(config: T5Config, _length: int) -> int:
    """Parameters, padding of the vocabulary included; how long sequences are changes nothing."""
    layers = config.encoder_layers * encoder_parameters(config) + config.decoder_layers * decoder_parameters(config)
    return layers + outer_parameters(config)


def encoder_parameters(config: T5Config, tensor: int = 1) -> int:
    """Of a layer of the encoder on each of `tensor` devices: attention, MLP, and two norms."""
    hidden = config.hidden_size
    return (4 * hidden * config.heads_width + _mlp(config)) // tensor + 2 * hidden


def decoder_parameters(config: T5Config, tensor: int = 1) -> int:
    """Of a layer of the decoder: attention of its own, to the encoder's output, MLP, and three norms."""
    hidden = config.hidden_size
    return (8 * hidden * config.heads_width + _mlp(config)) // tensor + 3 * hidden


def outer_parameters(config: T5Config, tensor: int = 1) -> int:
    """Of what is in no stack: tables of tokens, biases by distance, and the norms after both stacks."""
    tables = (1 + (not config.tied_head)) * config.padded_vocab * config.hidden_size
    return (tables + 2 * config.num_buckets * config.num_heads) // tensor + 2 * config.hidden_size


def _mlp(config: T5Config) -> int:
    return (config.mlp_inputs + 1) * config.hidden_size * config.mlp_width


def flops_per_token(config: T5Config, length: int) -> float:
    """Of a token of the encoder's sequence, with its share of the decoder's: forward and backward, the whole square of
    scores counted."""
    hidden, width, decoder = config.hidden_size, config.heads_width, config.decoder_tokens(length)
    encoder = length * 2.0 * (4 * hidden * width + _mlp(config)) + 4.0 * length * length * width
    crossed = 2.0 * 2 * (decoder + length) * hidden * width + 4.0 * decoder * length * width
    own = decoder * 2.0 * (4 * hidden * width + _mlp(config)) + 4.0 * decoder * decoder * width
    head = 2.0 * decoder * hidden * config.padded_vocab
    forward = config.encoder_layers * encoder + config.decoder_layers * (own + crossed) + head
    return 3.0 * forward / length


def padding_flops(config: T5Config) -> float:
    """Those of a decoder's token that rows of the vocabulary take which are no tokens, where it has as many tokens as
    the encoder."""
    return 6.0 * config.hidden_size * (config.padded_vocab - config.vocab_size)


def passes(config: T5Config, name: str, role: Role, _axes: tuple[str, ...]) -> float:
    """How many products of a token each number of a parameter is in; of the decoder's as if it had as many tokens."""
    if role == "embedding":
        return float(config.tied_head or name.startswith("head."))
    return float(role == "kernel")


def work(config: T5Config, shapes: Shapes) -> ModelWork:
    """Both stacks on the same stages; the stream has the encoder's part beside the decoder's."""
    hidden, vocab = config.hidden_size, config.padded_vocab / shapes.tensor
    sizes = _Sizes(shapes, replace(shapes, length=config.decoder_tokens(shapes.length)))
    tables, drops = vocab * hidden, config.dropout > 0
    left = norm(sizes.encoder, hidden, gathered=False)
    return ModelWork(
        stacks=(
            replace(_encoder(config, sizes), enter=embedding(sizes.encoder, hidden, tables, dropout=drops)),
            replace(_decoder(config, sizes), enter=embedding(sizes.decoder, hidden, tables, dropout=drops) + left),
        ),
        head=token_head(sizes.decoder, hidden, vocab),
        outer_parameters=outer_parameters(config, shapes.tensor),
        stream=sizes.encoder.stream_bytes(hidden) + sizes.decoder.stream_bytes(hidden),
        head_matrix=tables,
        logits=sizes.decoder.tokens * vocab,
    )


@dataclass(frozen=True)
class _Sizes:
    """Sizes of the sequences of both stacks."""

    encoder: Shapes
    decoder: Shapes


def _heads(config: T5Config, shapes: Shapes, *, causal: bool) -> AttentionShapes:
    heads = config.num_heads / shapes.tensor
    return AttentionShapes(
        hidden=config.hidden_size,
        heads=heads,
        kv_heads=heads,
        head_size=config.head_size,
        value_size=config.head_size,
        dropout=config.attention_dropout > 0,
        causal=causal,
    )


def _own(config: T5Config, shapes: Shapes, *, causal: bool) -> SlotWork:
    """Attention of a stack to its own sequence, and the MLP."""
    hidden, drops = config.hidden_size, config.dropout > 0
    layer = _heads(config, shapes, causal=causal)
    branch = norm(shapes, hidden) + residual(shapes, hidden, dropout=drops)
    gated = config.mlp_inputs > 1
    found = projections(shapes, layer) + core(shapes, layer)
    found += mlp(shapes, hidden, config.mlp_width / shapes.tensor, gated=gated)
    return found + branch + branch


def _crossed(config: T5Config, sizes: _Sizes) -> SlotWork:
    """Queries of the decoder, keys and values of the encoder's output, which layers put together each for itself."""
    hidden, width = config.hidden_size, config.heads_width / sizes.encoder.tensor
    found = linear(sizes.decoder, hidden, width) + linear(sizes.encoder, hidden, 2 * width)
    found += linear(sizes.decoder, width, hidden) + put_together(sizes.encoder, hidden)
    found += norm(sizes.decoder, hidden) + residual(sizes.decoder, hidden, dropout=config.dropout > 0)
    return found + _cross_core(config, sizes) + _travelling(sizes, width)


def _cross_core(config: T5Config, sizes: _Sizes) -> SlotWork:
    """Scores, softmax and the mix of values, of each query with every key."""
    shapes, keys, size = sizes.decoder, sizes.encoder.length, config.head_size
    heads, narrow = shapes.rows * config.num_heads / shapes.tensor, shapes.width
    queries = shapes.length / shapes.parts
    if shapes.profile.attention == "fused":
        product = 2.0 * heads * queries * keys * size
        stream = 2 * heads * (queries + keys) * size * narrow
        return SlotWork(
            forward=PhaseWork(fused=(FusedKernel(2 * product),), stream=stream, kernels=1),
            # the scores are made again
            backward=PhaseWork(fused=(FusedKernel(5 * product),), masked_flops=-product, stream=2 * stream, kernels=2),
        )
    square = heads * queries * keys
    scores = Product(queries, keys, size, heads, narrow, output_width=FLOAT)
    mix = Product(queries, size, keys, heads, narrow, output_width=narrow)
    back = (
        Product(queries, keys, size, heads, narrow, output_width=narrow),
        Product(queries, size, keys, heads, narrow, output_width=narrow),
        Product(keys, size, queries, heads, narrow, output_width=narrow),
        Product(keys, size, queries, heads, narrow, output_width=narrow),
    )
    return SlotWork(
        # softmax reads float32 scores three times, and writes them narrow
        forward=PhaseWork((scores, mix), stream=square * (3 * FLOAT + narrow), kernels=2),
        backward=PhaseWork(back, stream=square * (2 * narrow + FLOAT), kernels=2),
    )


def _travelling(sizes: _Sizes, width: float) -> SlotWork:
    """Keys and values of the other parts of the encoder's sequence, and their gradients' sums in float32."""
    shapes = sizes.encoder
    if shapes.parts == 1:
        return SlotWork()
    elements = shapes.tokens * shapes.parts * 2 * width
    gather = CollectiveWork("all_gather", elements * shapes.width, "context")
    back = (gather, CollectiveWork("reduce_scatter", FLOAT * elements, "context"))
    return SlotWork(forward=PhaseWork(collectives=(gather,)), backward=PhaseWork(collectives=back))


def _encoder(config: T5Config, sizes: _Sizes) -> StackWork:
    parameters = encoder_parameters(config, sizes.encoder.tensor)
    return _stack(config, sizes.encoder, _own(config, sizes.encoder, causal=False), parameters, causal=False)


def _decoder(config: T5Config, sizes: _Sizes) -> StackWork:
    parameters = decoder_parameters(config, sizes.decoder.tensor)
    layer = _own(config, sizes.decoder, causal=True) + _crossed(config, sizes)
    return _stack(config, sizes.decoder, layer, parameters, causal=True)


def _stack(config: T5Config, shapes: Shapes, layer: SlotWork, parameters: float, *, causal: bool) -> StackWork:
    again = SlotWork(backward=layer.forward) if config.recompute == "full" else SlotWork()
    heads = _heads(config, shapes, causal=causal)
    hidden, width = config.hidden_size, config.mlp_width / shapes.tensor
    return StackWork(
        layer=layer + again + gathered_weights(shapes, parameters),
        parameters=parameters,
        temporaries=core_temporaries(shapes, heads) + mlp_temporaries(shapes, hidden, width),
        recomputed=config.recomputed,
    )
