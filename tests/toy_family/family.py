"""What a configuration knows of the toy family."""

from collections.abc import Mapping

from jaxtron.config import UserError
from jaxtron.models.family import Family
from jaxtron.models.work.blocks import embedding, mlp, mlp_temporaries, norm, residual, token_head
from jaxtron.models.work.model import ModelWork, StackWork
from jaxtron.models.work.shapes import Shapes, gathered_weights
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


def check(config: ToyConfig, sizes: Mapping[str, int], _length: int, _context: ContextConfig) -> None:
    """`UserError` unless the width divides."""
    if config.width % sizes["tensor"]:
        raise UserError(f"model.width {config.width} is not a multiple of mesh.tensor {sizes['tensor']}; change one")


def work(config: ToyConfig, shapes: Shapes) -> ModelWork:
    """Both stacks on the same stages: an MLP a layer, and a look-up of the tokens where each begins."""
    width, tables = config.width, config.padded_vocab * config.width / shapes.tensor
    parameters = config.width + 8 * width * width / shapes.tensor
    inner = 4 * width / shapes.tensor
    layer = norm(shapes, width) + mlp(shapes, width, inner) + residual(shapes, width)
    stack = StackWork(
        layer=layer + gathered_weights(shapes, parameters),
        parameters=parameters,
        enter=embedding(shapes, width, tables),
        temporaries=mlp_temporaries(shapes, width, inner),
    )
    return ModelWork(
        stacks=(stack, stack),
        head=token_head(shapes, width, config.padded_vocab / shapes.tensor),
        outer_parameters=tables + 2 * width,
        # the decoder's beside what the encoder left
        stream=2 * shapes.stream_bytes(width),
        head_matrix=tables,
        logits=shapes.tokens * config.padded_vocab / shapes.tensor,
    )


FAMILY = Family(
    config=ToyConfig,
    program="tests.toy_family.program",
    stacks=lambda config: {"encoder/layers": config.encoder_layers, "decoder/layers": config.decoder_layers},
    num_parameters=num_parameters,
    flops_per_token=flops_per_token,
    check=check,
    vocabulary="vocab_size",
    work=work,
)
