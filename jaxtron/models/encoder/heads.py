"""What predicts masked tokens of an encoder's output; the table of its logits is the embedding's."""

from flax import nnx
from jax.nn import initializers

from jaxtron.layers.inputs import LayerInputs
from jaxtron.layers.linear import Linear
from jaxtron.layers.mlp import FUNCTIONS
from jaxtron.layers.norm import Norm
from jaxtron.models.encoder.layer import make_norm
from jaxtron.models.encoder.settings import EncoderSettings
from jaxtron.sharding.parameters import parameter
from jaxtron.sharding.rules import constrain, current
from jaxtron.typing import Array, Float


class MaskedHead(nnx.Module):
    """Product, activation and norm before the logits, and a bias of these; their table is the embedding's."""

    def __init__(self, config: EncoderSettings, rngs: nnx.Rngs) -> None:
        self.activate = FUNCTIONS[config.activation]
        size = config.hidden_size
        self.transform = Linear({"embed": size}, {"latent": size}, bias=True, std=config.initial_std, rngs=rngs)
        self.norm: Norm = make_norm(config, rngs)
        self.bias = parameter(rngs, initializers.zeros, (config.padded_vocab,), axes=("vocab",), role="bias")

    def __call__(self, x: Float[Array, "B S E"]) -> Float[Array, "B S E"]:
        # on one tensor part a sequence that is not named as split is multiplied as one matrix
        part = "seq" if current().parts("tensor") > 1 else "full_seq"
        y = self.transform(constrain(x, "batch", part, "embed"), "batch", part, "latent", inputs=LayerInputs())
        return constrain(self.norm(self.activate(y)), "batch", "seq", "embed")
