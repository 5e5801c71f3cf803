"""What encoders cost: parameters and floating-point operations of their pieces, and work of a device."""

from dataclasses import replace

from jaxtron.models.encoder.settings import EncoderSettings
from jaxtron.models.work.attention import AttentionShapes, core, core_temporaries, projections
from jaxtron.models.work.blocks import embedding, linear, mlp, mlp_temporaries, norm, residual, token_head
from jaxtron.models.work.model import StackWork
from jaxtron.models.work.operations import PhaseWork, Product, SlotWork
from jaxtron.models.work.shapes import Shapes, gathered_weights, over_tensor
from jaxtron.roles import Role


def norm_parameters(config: EncoderSettings) -> int:
    """Of a norm of the stream."""
    return config.hidden_size * (2 if config.norms_have_bias else 1)


def embedding_parameters(config: EncoderSettings, length: int, tensor: int = 1) -> int:
    """Of tables of tokens, positions and kinds of tokens, and the norm after them, on each of `tensor` devices.

    `length` in tokens is that of the table of positions where `max_positions` is none.
    """
    rows = config.padded_vocab // tensor + (config.max_positions or length) + config.token_types
    return config.hidden_size * rows + (norm_parameters(config) if config.norm_placement == "post" else 0)


def final_norm_parameters(config: EncoderSettings) -> int:
    """Of the norm after the last layer, which is there where branches norm what they read."""
    return norm_parameters(config) if config.norm_placement == "pre" else 0


def layer_parameters(config: EncoderSettings, tensor: int = 1) -> int:
    """Of a layer on each of `tensor` devices, whole over the other axes of the mesh."""
    hidden, heads, width = config.hidden_size, config.heads_width // tensor, config.mlp_width // tensor
    inner = config.mlp_inputs * width
    attention = 4 * hidden * heads + 3 * heads + hidden
    return attention + hidden * (inner + width) + inner + hidden + 2 * norm_parameters(config)


def layer_flops(config: EncoderSettings, length: int) -> float:
    """Of a token's forward through a layer: products of weights, and scores of all tokens with all others."""
    hidden, heads = config.hidden_size, config.heads_width
    products = 4 * hidden * heads + (config.mlp_inputs + 1) * hidden * config.mlp_width
    return 2.0 * (products + 2 * length * heads)


def masked_head_parameters(config: EncoderSettings, tensor: int = 1) -> int:
    """Of the head of masked tokens, but for the embedding's table, on each of `tensor` devices."""
    hidden = config.hidden_size
    return hidden * (hidden + 1) + norm_parameters(config) + config.padded_vocab // tensor


def masked_head_flops(config: EncoderSettings) -> float:
    """Of a token's forward from the last layer to its logits."""
    return 2.0 * config.hidden_size * (config.padded_vocab + config.hidden_size)


def padding_flops(config: EncoderSettings) -> float:
    """Those of a token's forward and backward that rows of the vocabulary take which are no tokens."""
    return 6.0 * config.hidden_size * (config.padded_vocab - config.vocab_size)


def passes(_config: EncoderSettings, name: str, role: Role, _axes: tuple[str, ...]) -> float:
    """How many products of a token each number of a parameter is in: the table of tokens is the head's too."""
    return float(role == "kernel" or name.endswith("embedding.tokens.table"))


def recompute_levels(_config: EncoderSettings) -> tuple[str, ...]:
    """Values of the setting `recompute`, those that keep most first."""
    return ("none", "selective", "all_but_cores", "full")


def encoder_work(config: EncoderSettings, shapes: Shapes, *, enters: bool = True) -> StackWork:
    """A stack of layers over all tokens, recomputation in the backward, and the embedding before it if it `enters`."""
    layer, hidden, parameters = (
        attention_shapes(config, shapes),
        config.hidden_size,
        layer_parameters(config, shapes.tensor),
    )
    inner = config.mlp_width / shapes.tensor
    is_dropped = config.dropout > 0
    rest = projections(shapes, layer)
    rest += mlp(shapes, hidden, inner, gated=config.mlp_inputs == 2, bias=True)
    for _ in ("attention", "mlp"):
        rest += norm(shapes, hidden) + residual(shapes, hidden, dropout=is_dropped)
    scores = core(shapes, layer)
    is_fused = shapes.profile.attention == "fused"
    found = rest + scores
    if "layer" in config.recomputed:
        found += SlotWork(backward=(rest if config.spared and is_fused else rest + scores).forward)
    elif config.recomputed and not is_fused:
        found += SlotWork(backward=scores.forward)
    enter = SlotWork()
    if enters:
        tables = embedding_parameters(config, shapes.length, shapes.tensor)
        enter = embedding(shapes, hidden, tables, passes=4 + (config.norm_placement == "post"), dropout=is_dropped)
    return StackWork(
        layer=found + gathered_weights(shapes, parameters),
        parameters=parameters,
        enter=enter,
        temporaries=core_temporaries(shapes, layer) + mlp_temporaries(shapes, hidden, inner),
        recomputed=config.recomputed,
    )


def masked_head_work(config: EncoderSettings, shapes: Shapes) -> SlotWork:
    """The head of masked tokens and its loss at every token of these shapes, with gradients, formed in its forward."""
    hidden = config.hidden_size
    own = replace(shapes, rows=shapes.rows / shapes.tensor) if shapes.profile.sequence_sharded else shapes
    # a product of each device's own positions with a matrix that all have, activation and norm
    made = linear(own, hidden, hidden, bias=True) + norm(shapes, hidden, gathered=False)
    # of a matrix that each device has, the gradient of its part of the sequence
    summed = PhaseWork(collectives=over_tensor(shapes, "all_reduce", hidden * hidden * shapes.width))
    transform = SlotWork(forward=at_once(made + gathered_weights(shapes, hidden * hidden)) + summed)
    return token_head(shapes, hidden, config.padded_vocab / shapes.tensor) + transform


def pooled_products(shapes: Shapes, hidden: int, outputs: int) -> PhaseWork:
    """One token of each sequence through a pooler and a head of so many outputs, forward and backward, in one slot."""
    products = tuple(
        Product(*sizes, width=shapes.width, output_width=shapes.width)
        for columns in (hidden, outputs)
        for sizes in ((shapes.rows, columns, hidden), (shapes.rows, hidden, columns), (hidden, columns, shapes.rows))
    )
    return PhaseWork(products, stream=shapes.own_bytes(hidden), kernels=8)


def token_products(shapes: Shapes, hidden: int, outputs: int, *, bias: bool) -> PhaseWork:
    """A few numbers of each token of a device's own positions, with gradients, in one slot."""
    own = replace(shapes, rows=shapes.rows / shapes.tensor) if shapes.profile.sequence_sharded else shapes
    return at_once(linear(own, hidden, outputs, bias=bias))


def at_once(work: SlotWork) -> PhaseWork:
    """All of it in one slot: a head's gradients are formed in its forward."""
    return work.forward + work.backward + work.weight


def attention_shapes(config: EncoderSettings, shapes: Shapes) -> AttentionShapes:
    """Attention over all tokens, on a device."""
    heads = config.num_heads / shapes.tensor
    return AttentionShapes(
        hidden=config.hidden_size,
        heads=heads,
        kv_heads=heads,
        head_size=config.head_size,
        value_size=config.head_size,
        bias=True,
        output_bias=True,
        dropout=config.attention_dropout > 0,
        causal=False,
    )
