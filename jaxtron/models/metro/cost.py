"""What METRO-LM costs: parameters, floating-point operations, and what it takes of a device."""

from dataclasses import replace

from jaxtron.models.encoder.cost import (
    embedding_parameters,
    encoder_work,
    final_norm_parameters,
    layer_flops,
    layer_parameters,
    masked_head_flops,
    masked_head_parameters,
    masked_head_work,
    token_products,
)
from jaxtron.models.metro.config import MetroConfig
from jaxtron.models.work.model import ModelWork
from jaxtron.models.work.operations import PhaseWork, Product, SlotWork
from jaxtron.models.work.shapes import FLOAT, Shapes, gather
from jaxtron.roles import Role


def num_parameters(config: MetroConfig, length: int) -> int:
    """Of both encoders, padding of the vocabulary included."""
    layers = (config.auxiliary_layers + config.num_layers) * layer_parameters(config)
    return embedding_parameters(config, length) + layers + head_parameters(config)


def head_parameters(config: MetroConfig, tensor: int = 1) -> int:
    """Those outside of stacks that are not the embedding's, on each of `tensor` devices."""
    distances = config.distance_buckets * config.num_heads // tensor
    end = distances + final_norm_parameters(config) + masked_head_parameters(config, tensor)
    return 2 * end + config.hidden_size + 1


def flops_per_token(config: MetroConfig, length: int) -> float:
    """Of a token's forward and backward; heads of masked tokens run at masked places alone.

    That logits are made once more for what is drawn of them is not counted.
    """
    layers = (config.auxiliary_layers + config.num_layers) * layer_flops(config, length)
    heads = 2 * masked_head_flops(config) * config.places(length) / length
    return 3.0 * (layers + heads + 2.0 * config.hidden_size)


def padding_flops(config: MetroConfig) -> float:
    """Those of a token's forward and backward, where `masked_share` are masked, that rows of the vocabulary take which
    are no tokens."""
    rows = config.padded_vocab - config.vocab_size
    return 2 * config.masked_share * 6.0 * config.hidden_size * rows


def passes(config: MetroConfig, name: str, role: Role, _axes: tuple[str, ...]) -> float:
    """How many products of a token each number of a parameter is in: the table of tokens is both heads', and these run
    at masked places."""
    if name.endswith("embedding.tokens.table"):
        return 2 * config.masked_share
    return float(role == "kernel") * (config.masked_share if ".masked." in name else 1.0)


def work(config: MetroConfig, shapes: Shapes) -> ModelWork:
    """Both stacks on the same stages, the head of the smaller one where the larger is entered."""
    hidden, vocab = config.hidden_size, config.padded_vocab / shapes.tensor
    places = _at_places(config, shapes)
    auxiliary, main = encoder_work(config.auxiliary, shapes), encoder_work(config, shapes)
    # distances and where tokens were replaced beside what layers make
    beside = FLOAT * (shapes.tokens + config.num_heads / shapes.tensor * (2 * config.max_distance + 1))
    return ModelWork(
        stacks=(auxiliary, replace(main, enter=main.enter + _between(config, places))),
        head=masked_head_work(config, places) + SlotWork(forward=token_products(shapes, hidden, 1, bias=True)),
        outer_parameters=embedding_parameters(config, shapes.length, shapes.tensor)
        + head_parameters(config, shapes.tensor),
        stream=shapes.stream_bytes(hidden) + beside,
        head_matrix=vocab * hidden,
        logits=places.tokens * vocab,
    )


def _at_places(config: MetroConfig, shapes: Shapes) -> Shapes:
    """Sizes where rows have their masked places alone; of a sequence over several devices each has all of them."""
    return replace(shapes, length=config.places(shapes.length) * shapes.parts)


def _between(config: MetroConfig, places: Shapes) -> SlotWork:
    """The smaller encoder's head, and what is drawn of its logits; both again where its gradients are formed."""
    hidden, vocab = config.hidden_size, config.padded_vocab / places.tensor
    logits = Product(places.tokens, vocab, hidden, width=places.width, output_width=0)
    # logits and random numbers, each written and read
    drawn = PhaseWork((logits,), stream=places.tokens * vocab * 4 * FLOAT, kernels=8)
    drawn += PhaseWork(collectives=gather(places, places.stream_bytes(hidden)))
    transform = Product(places.own_tokens, hidden, hidden, width=places.width, output_width=places.width)
    stream = places.tokens * vocab * places.profile.logit_bytes
    scored = PhaseWork((logits, transform), stream=stream, kernels=8)
    return SlotWork(forward=drawn + scored, backward=drawn + masked_head_work(config, places).forward)
