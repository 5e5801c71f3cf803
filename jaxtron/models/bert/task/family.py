"""What a configuration knows of a BERT with a task."""

from dataclasses import replace

from jaxtron.models.bert.family import meaning
from jaxtron.models.bert.task.config import BertTaskConfig
from jaxtron.models.encoder.cost import (
    embedding_parameters,
    encoder_work,
    final_norm_parameters,
    layer_flops,
    layer_parameters,
    pooled_products,
    recompute_levels,
    token_products,
)
from jaxtron.models.encoder.settings import check, evaluated, resolve, sizes
from jaxtron.models.family import Family
from jaxtron.models.work.model import ModelWork
from jaxtron.models.work.operations import SlotWork
from jaxtron.models.work.shapes import Shapes, gathered_weights
from jaxtron.roles import Role


def num_parameters(config: BertTaskConfig, length: int) -> int:
    """Parameters, padding of the vocabulary included."""
    layers = config.num_layers * layer_parameters(config)
    return embedding_parameters(config, length) + layers + final_norm_parameters(config) + head_parameters(config)


def head_parameters(config: BertTaskConfig) -> int:
    """Of the pooler and of what tells classes apart, or of what finds answers."""
    hidden = config.hidden_size
    if config.task == "answer":
        return config.outputs * hidden
    return hidden * (hidden + 1) + config.outputs * (hidden + (config.outputs > 1))


def flops_per_token(config: BertTaskConfig, length: int) -> float:
    """Of a token's forward and backward in all texts of its example; the head's are shared out over the sequence."""
    hidden = config.hidden_size
    outputs = 2.0 * hidden * config.outputs
    head = outputs if config.task == "answer" else (2.0 * hidden * hidden + outputs) / length
    return 3.0 * config.texts * (config.num_layers * layer_flops(config, length) + head)


def passes(_config: BertTaskConfig, name: str, role: Role, _axes: tuple[str, ...]) -> float:
    """How many products of a token each number of a parameter is in; those of one token alone count for nothing."""
    return float(role == "kernel" and name.startswith(("encoder.", "answer.")))


def work(config: BertTaskConfig, shapes: Shapes) -> ModelWork:
    """One stack, whose rows are texts, and a head of one token each, or of all."""
    own = replace(shapes, rows=shapes.rows * config.texts)
    hidden = config.hidden_size
    if config.task == "answer":
        head = token_products(own, hidden, config.outputs, bias=False)
    else:
        weights = gathered_weights(own, hidden * (hidden + config.outputs))
        head = pooled_products(own, hidden, config.outputs) + weights.forward + weights.weight
    outer = embedding_parameters(config, shapes.length, shapes.tensor) + final_norm_parameters(config)
    return ModelWork(
        stacks=(encoder_work(config, own),),
        head=SlotWork(forward=head),
        outer_parameters=outer + head_parameters(config),
        stream=own.stream_bytes(hidden),
    )


FAMILY = Family(
    config=BertTaskConfig,
    program="jaxtron.models.bert.task.program",
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
    reads_files=True,
    recompute=recompute_levels,
)
