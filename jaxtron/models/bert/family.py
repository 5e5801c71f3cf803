"""What a configuration knows of BERT."""

from typing import Any

from jaxtron.models.bert.config import BertConfig
from jaxtron.models.encoder.cost import (
    at_once,
    embedding_parameters,
    encoder_work,
    final_norm_parameters,
    layer_flops,
    layer_parameters,
    masked_head_flops,
    masked_head_parameters,
    masked_head_work,
    padding_flops,
    passes,
    pooled_products,
    recompute_levels,
)
from jaxtron.models.encoder.settings import check, evaluated, resolve, sizes
from jaxtron.models.family import Family
from jaxtron.models.work.model import ModelWork
from jaxtron.models.work.operations import SlotWork
from jaxtron.models.work.shapes import Shapes, gathered_weights

# what the pooled output tells apart
CHOICES = 2


def num_parameters(config: BertConfig, length: int) -> int:
    """Parameters, padding of the vocabulary included."""
    layers = config.num_layers * layer_parameters(config)
    return embedding_parameters(config, length) + layers + final_norm_parameters(config) + head_parameters(config)


def head_parameters(config: BertConfig, tensor: int = 1) -> int:
    """Those of both heads that are not the embedding's, on each of `tensor` devices."""
    hidden = config.hidden_size
    pooler = hidden * (hidden + 1) + CHOICES * (hidden + 1)
    return masked_head_parameters(config, tensor) + (pooler if config.pairs != "none" else 0)


def flops_per_token(config: BertConfig, length: int) -> float:
    """Of a token's forward and backward; those of the pooled output are shared out over its sequence."""
    hidden = config.hidden_size
    pooled = 2.0 * hidden * (hidden + CHOICES) if config.pairs != "none" else 0.0
    layers = config.num_layers * layer_flops(config, length)
    return 3.0 * (layers + masked_head_flops(config) + pooled / length)


def work(config: BertConfig, shapes: Shapes) -> ModelWork:
    """One stack, and both heads after it."""
    hidden, vocab = config.hidden_size, config.padded_vocab / shapes.tensor
    outer = embedding_parameters(config, shapes.length, shapes.tensor) + final_norm_parameters(config)
    return ModelWork(
        stacks=(encoder_work(config, shapes),),
        head=masked_head_work(config, shapes) + _pooled(config, shapes),
        outer_parameters=outer + head_parameters(config, shapes.tensor),
        stream=shapes.stream_bytes(hidden),
        head_matrix=vocab * hidden,
        logits=shapes.tokens * vocab,
    )


def _pooled(config: BertConfig, shapes: Shapes) -> SlotWork:
    """One token of each sequence through two products, forward and backward."""
    if config.pairs == "none":
        return SlotWork()
    hidden = config.hidden_size
    weights = at_once(gathered_weights(shapes, hidden * (hidden + CHOICES)))
    return SlotWork(forward=pooled_products(shapes, hidden, CHOICES) + weights)


def meaning(config: BertConfig) -> dict[str, Any]:
    """A default spelled out is the same model, and so is one that was told other things of pairs and masks."""
    return {
        "head_dim": config.head_size,
        "mlp_size": config.mlp_width,
        "pairs": config.pairs != "none",
        "masking": None,
    }


FAMILY = Family(
    config=BertConfig,
    program="jaxtron.models.bert.program",
    stacks=lambda config: {"encoder/layers": config.num_layers},
    num_parameters=num_parameters,
    flops_per_token=flops_per_token,
    passes=passes,
    check=check,
    resolve=resolve,
    evaluated=evaluated,
    sizes=sizes,
    meaning=meaning,
    vocabulary="vocab_size",
    work=work,
    recompute=recompute_levels,
    padding_flops=padding_flops,
)
