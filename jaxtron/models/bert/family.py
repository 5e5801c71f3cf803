"""What a configuration knows of BERT."""

from dataclasses import replace
from typing import Any

from jaxtron.models.bert.config import BertConfig
from jaxtron.models.encoder.cost import (
    embedding_parameters,
    encoder_work,
    final_norm_parameters,
    head_flops,
    layer_flops,
    layer_parameters,
    norm_parameters,
    padding_flops,
    passes,
    recompute_levels,
)
from jaxtron.models.encoder.settings import check, evaluated, resolve, sizes
from jaxtron.models.family import Family
from jaxtron.models.work.blocks import linear, norm, token_head
from jaxtron.models.work.model import ModelWork
from jaxtron.models.work.operations import PhaseWork, Product, SlotWork
from jaxtron.models.work.shapes import Shapes, gathered_weights, over_tensor

# what the pooled output tells apart
CHOICES = 2


def num_parameters(config: BertConfig, length: int) -> int:
    """Parameters, padding of the vocabulary included."""
    layers = config.num_layers * layer_parameters(config)
    return embedding_parameters(config, length) + layers + final_norm_parameters(config) + head_parameters(config)


def head_parameters(config: BertConfig, tensor: int = 1) -> int:
    """Those of both heads that are not the embedding's, on each of `tensor` devices."""
    hidden = config.hidden_size
    transform = hidden * (hidden + 1) + norm_parameters(config) + config.padded_vocab // tensor
    pooler = hidden * (hidden + 1) + CHOICES * (hidden + 1)
    return transform + (pooler if config.pairs != "none" else 0)


def flops_per_token(config: BertConfig, length: int) -> float:
    """Of a token's forward and backward; those of the pooled output are shared out over its sequence."""
    hidden = config.hidden_size
    pooled = 2.0 * hidden * (hidden + CHOICES) if config.pairs != "none" else 0.0
    head = head_flops(config) + 2.0 * hidden * hidden + pooled / length
    return 3.0 * (config.num_layers * layer_flops(config, length) + head)


def work(config: BertConfig, shapes: Shapes) -> ModelWork:
    """One stack, and both heads after it."""
    hidden, vocab = config.hidden_size, config.padded_vocab / shapes.tensor
    outer = embedding_parameters(config, shapes.length, shapes.tensor) + final_norm_parameters(config)
    return ModelWork(
        stacks=(encoder_work(config, shapes),),
        head=token_head(shapes, hidden, vocab) + _transform(config, shapes) + _pooled(config, shapes),
        outer_parameters=outer + head_parameters(config, shapes.tensor),
        stream=shapes.stream_bytes(hidden),
        head_matrix=vocab * hidden,
        logits=shapes.tokens * vocab,
    )


def _transform(config: BertConfig, shapes: Shapes) -> SlotWork:
    """A product of each device's own positions with a matrix that all have, activation and norm, with gradients."""
    hidden = config.hidden_size
    own = replace(shapes, rows=shapes.rows / shapes.tensor) if shapes.profile.sequence_sharded else shapes
    made = linear(own, hidden, hidden, bias=True) + norm(shapes, hidden, gathered=False)
    # of a matrix that each device has, the gradient of its part of the sequence
    summed = PhaseWork(collectives=over_tensor(shapes, "all_reduce", hidden * hidden * shapes.width))
    return SlotWork(forward=_at_once(made + gathered_weights(shapes, hidden * hidden)) + summed)


def _pooled(config: BertConfig, shapes: Shapes) -> SlotWork:
    """One token of each sequence through two products, forward and backward."""
    if config.pairs == "none":
        return SlotWork()
    hidden, rows = config.hidden_size, shapes.rows
    products = [
        Product(*sizes, width=shapes.width, output_width=shapes.width)
        for outputs in (hidden, CHOICES)
        for sizes in ((rows, outputs, hidden), (rows, hidden, outputs), (hidden, outputs, rows))
    ]
    weights = _at_once(gathered_weights(shapes, hidden * (hidden + CHOICES)))
    return SlotWork(forward=PhaseWork(tuple(products), stream=shapes.own_bytes(hidden), kernels=8) + weights)


def _at_once(work: SlotWork) -> PhaseWork:
    """A head's gradients are formed in its forward."""
    return work.forward + work.backward + work.weight


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
