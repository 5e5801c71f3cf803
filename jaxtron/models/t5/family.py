"""What a configuration knows of T5."""

from collections.abc import Mapping

from jaxtron.config import UserError
from jaxtron.models.family import Family
from jaxtron.models.fits import check_heads, check_multiple
from jaxtron.models.t5.config import T5Config
from jaxtron.models.t5.cost import flops_per_token, num_parameters, padding_flops, passes, work
from jaxtron.sharding.config import ContextConfig


def check(config: T5Config, sizes: Mapping[str, int], length: int, context: ContextConfig) -> None:
    """`UserError` where widths or the decoder's sequences do not fit a mesh of these sizes."""
    tensor, parts = sizes["tensor"], sizes["context"]
    check_heads({"num_heads": config.num_heads}, sizes, context)
    check_multiple("model.mlp_size", config.mlp_width, tensor)
    check_multiple("model.vocab_size, padded,", config.padded_vocab, tensor)
    pieces = tensor * (2 * parts if parts > 1 else 1)
    if config.decoder_tokens(length) % pieces:
        why = f"2 x mesh.context {parts} x mesh.tensor {tensor} = {pieces}" if parts > 1 else f"mesh.tensor {tensor}"
        raise UserError(
            f"model.decoder_length {config.decoder_tokens(length)} is not a multiple of {why}; change one of them"
        )


def evaluated(config: T5Config) -> T5Config:
    """The same with nothing dropped."""
    return config.model_copy(update={"dropout": 0.0, "attention_dropout": 0.0})


def sizes(config: T5Config) -> str:
    """What decides how large it is."""
    return (
        f"model.encoder_layers {config.encoder_layers}, model.decoder_layers {config.decoder_layers}, "
        f"model.hidden_size {config.hidden_size:,} and model.vocab_size {config.vocab_size:,}"
    )


FAMILY = Family(
    config=T5Config,
    program="jaxtron.models.t5.program",
    stacks=lambda config: {"encoder/layers": config.encoder_layers, "decoder/layers": config.decoder_layers},
    num_parameters=num_parameters,
    flops_per_token=flops_per_token,
    passes=passes,
    check=check,
    evaluated=evaluated,
    sizes=sizes,
    vocabulary="vocab_size",
    work=work,
    recompute=lambda config: ("none", "full"),
    padding_flops=padding_flops,
    writes="answer",
    of_any_length=lambda config: config.model_copy(update={"decoder_length": None}),
)
