"""The toy family as it is computed: two stacks, two losses with a normalizer each, a batch of its own."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxtron.data.batch import SEQUENCE, TokenBatch, rows, weight
from jaxtron.data.source import Source
from jaxtron.layers.embedding import Embedding
from jaxtron.layers.inputs import LayerInputs
from jaxtron.layers.linear import normal
from jaxtron.layers.loss import cross_entropy
from jaxtron.layers.mlp import Mlp
from jaxtron.layers.norm import Norm
from jaxtron.models.program import BuildContext, Microbatch, Parts, Program, whole
from jaxtron.models.stacked import stacked
from jaxtron.pipeline.model import HeadOutput, LayerOutput, Model, Stack
from jaxtron.sharding.collectives import zeros_like_type
from jaxtron.sharding.parameters import buffer, parameter
from jaxtron.sharding.rules import constrain, current
from tests.toy_family.config import ToyConfig

PENALTY = 0.01
DECAY = 0.25


@dataclass(frozen=True)
class ToyBatch:
    """A sequence to encode, what follows each of its tokens, and a label of the whole that some rows have."""

    tokens: Any = rows(SEQUENCE)
    targets: Any = rows(SEQUENCE)
    weights: Any = weight(SEQUENCE, normalizes="tokens")
    label: Any = rows()
    label_weights: Any = weight(normalizes="labels")


@dataclass(frozen=True)
class Labelled:
    """Samples of text with a label: whether the first token is odd; a row in four has none."""

    source: Source

    @property
    def sequence_length(self) -> int:
        return self.source.sequence_length

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> ToyBatch:
        sample: TokenBatch = self.source[index]
        label = np.asarray(sample.tokens[0] % 2, np.int32)
        has_label = np.asarray(sample.tokens[0] % 4 != 0, np.float32)
        return ToyBatch(sample.tokens, sample.targets, sample.weights, label, has_label)


def make_norm(config: ToyConfig, rngs: nnx.Rngs) -> Norm:
    return Norm(config.width, kind="rms_norm", bias=False, epsilon=1e-5, rngs=rngs)


class Layer(nnx.Module):
    """`x + mlp(norm(x + memory))`, of channels that were large less; memory is zero in the encoder."""

    def __init__(self, config: ToyConfig, rngs: nnx.Rngs) -> None:
        self.norm = make_norm(config, rngs)
        sizes = {"activation": "gelu_tanh", "bias": False, "std": 0.1, "output_std": 0.1, "dropout": 0.0}
        self.mlp = Mlp(config.width, 4 * config.width, **sizes, rngs=rngs)
        # of each channel's squares so far, over all tokens
        self.mean_square = buffer((config.width,), axes=("norm",))

    def __call__(self, x, memory):
        scale = jax.lax.rsqrt(1.0 + jnp.abs(self.mean_square[...])).astype(x.dtype)
        return x + scale * self.mlp(self.norm(x + memory), LayerInputs())


class Layers(nnx.Module):
    def __init__(self, config: ToyConfig, partition, rngs: nnx.Rngs) -> None:
        self.layers = stacked(partial(Layer, config), partition, rngs)


class Toy(nnx.Module):
    """Embedding, both stacks, the norms after them, and the label's vector."""

    def __init__(self, config: ToyConfig, context: BuildContext, rngs: nnx.Rngs) -> None:
        self.config, self.dtype = config, context.dtype
        self.embedding = Embedding(config.padded_vocab, config.width, num_positions=None, std=0.5, rngs=rngs)
        self.encoder = Layers(config, context.partitions["encoder/layers"], rngs)
        self.decoder = Layers(config, context.partitions["decoder/layers"], rngs)
        self.final_norm = make_norm(config, rngs)
        self.label = parameter(rngs, normal(0.5), (config.width,), axes=("norm",), role="scale")


def model(parts: Parts[Toy], _key) -> Model:
    """A stream of two arrays: the decoder reads what the encoder left beside its own."""
    config, dtype = parts.abstract.config, parts.abstract.dtype

    def embed(outer, microbatch: Microbatch[ToyBatch]):
        return whole(parts.outer(outer).embedding, dtype)(microbatch.batch.tokens)

    def encode(outer, _stream: None, microbatch: Microbatch[ToyBatch]):
        x = embed(outer, microbatch)
        return {"x": x, "memory": zeros_like_type(x, ())}

    def decode(outer, stream, microbatch: Microbatch[ToyBatch]):
        return {"x": embed(outer, microbatch), "memory": stream["x"]}

    def layer(number_of_stack: int, weights, stream, number, weigh):
        x = whole(parts.layer(number_of_stack, weights), dtype)(stream["x"], stream["memory"])
        squares = jnp.square(x.astype(jnp.float32))
        square = squares.mean(-1)
        loss = PENALTY * (number + 1) * (square * weigh).sum()
        found = jax.lax.stop_gradient(squares * weigh[..., None])
        metrics = {"square": found.mean(-1).sum(), "squares": found.sum((0, 1)), "weight": weigh.sum()}
        return LayerOutput({**stream, "x": x}, loss, metrics)

    def head(outer, stream, microbatch: Microbatch[ToyBatch]) -> HeadOutput:
        toy, batch = parts.outer(outer), microbatch.batch
        x, table = toy.final_norm(stream["x"]), whole(toy.embedding, dtype).table[...]
        loss, nll = cross_entropy(x, table, batch.targets, batch.weights, config.vocab_size, 0.0)
        split = current().axes("context")
        found = jax.lax.psum(stream["memory"].astype(jnp.float32).sum(1), split)
        score = (found * toy.label[...]).sum(-1)
        # every device of a sequence has the whole of this: it counts its share
        share = batch.label_weights / current().parts("context")
        wrong = (share * jax.nn.softplus(jnp.where(batch.label == 1, -score, score))).sum()
        return HeadOutput(loss + config.label_weight * wrong, {"text": nll, "label": config.label_weight * wrong})

    def shared(microbatch: Microbatch[ToyBatch]):
        return constrain(microbatch.batch.weights, "batch", "seq")

    return Model((Stack(encode, shared, partial(layer, 0)), Stack(decode, shared, partial(layer, 1))), head)


def update_buffers(_parts: Parts[Toy], buffers, reported):
    """Running means: a sum over the step's tokens by the sum of their weights."""
    found = {}
    for name, mean in buffers.items():
        stack = name.removesuffix("/mean_square")
        step = reported[f"{stack}/squares"] / reported[f"{stack}/weight"][:, None]
        found[name] = mean + DECAY * (step - mean)
    return found


PROGRAM = Program(
    batch=ToyBatch,
    losses={"text": "tokens", "label": "labels"},
    build=Toy,
    model=model,
    update_buffers=update_buffers,
    source=lambda config, source, tokenizer: Labelled(source),
)
