"""What a configuration knows of the toy family."""

from collections.abc import Mapping

from jaxtron.config import UserError
from jaxtron.models.family import Family
from jaxtron.sharding.config import ContextConfig
from tests.toy_family.config import ToyConfig


def num_parameters(config: ToyConfig, _length: int) -> int:
    """Table, two norms, the label's vector, and a norm and an MLP in each layer."""
    width, layers = config.width, config.encoder_layers + config.decoder_layers
    return config.padded_vocab * width + 2 * width + layers * (width + 8 * width * width)


def flops_per_token(config: ToyConfig, _length: int) -> float:
    """Of products: three times the forward's."""
    width, layers = config.width, config.encoder_layers + config.decoder_layers
    return 6.0 * (layers * 8 * width * width + width * config.padded_vocab)


def check(config: ToyConfig, sizes: Mapping[str, int], length: int, _context: ContextConfig) -> None:
    """`UserError` unless width and sequence divide."""
    parts = sizes["tensor"] * (2 * sizes["context"] if sizes["context"] > 1 else 1)
    if config.width % sizes["tensor"] or length % parts:
        raise UserError(f"model.width {config.width} or data.sequence_length {length} does not fit the mesh")


FAMILY = Family(
    config=ToyConfig,
    program="tests.toy_family.program",
    stacks=lambda config: {"encoder/layers": config.encoder_layers, "decoder/layers": config.decoder_layers},
    num_parameters=num_parameters,
    flops_per_token=flops_per_token,
    check=check,
    vocabulary="vocab_size",
)
