"""A decoder in the pieces that the pipeline's executor runs."""

from collections.abc import Callable

from flax import nnx

from jaxtron.layers.inputs import LayerInputs
from jaxtron.models.decoder.model import Decoder
from jaxtron.pipeline.model import HeadOutput, Model, Parameters, Stack
from jaxtron.sharding.blueprint import Blueprint
from jaxtron.typing import Array, PyTree

# where the layers are in a decoder's parameters; the rest is the ends
STACK, PERIODS = "stack", "periods"


class StagedDecoder:
    """The working parameters of a decoder (nested dicts) as a stage's layers and the model's ends, and back."""

    def __init__(self, blueprint: Blueprint[Decoder], params: PyTree) -> None:
        self._blueprint = blueprint
        self._stack = params[STACK]
        self._decoder = blueprint.module(params)
        ends = {name: part for name, part in params.items() if name != STACK}
        self.parameters = Parameters((self._decoder.stack.state(),), ends)

    def model(
        self,
        *,
        embed: Callable[[Decoder, PyTree], Array],
        inputs: Callable[[Decoder, PyTree], LayerInputs],
        head: Callable[[Decoder, Array, PyTree], HeadOutput],
    ) -> Model:
        """What the executor runs; the functions get a decoder whose ends are to be used, and a microbatch."""
        layer = self._decoder.stack.layer()
        stack = Stack(
            enter=lambda ends, _, microbatch: embed(self._with(ends), microbatch),
            shared=lambda microbatch: inputs(self._decoder, microbatch),
            layer=layer,
            unroll=self._decoder.stack.unroll(),
        )
        return Model((stack,), head=lambda ends, x, microbatch: head(self._with(ends), x, microbatch))

    def nested(self, gradients: Parameters) -> PyTree:
        """Gradients as nested dicts like the parameters."""
        return {**gradients.outer, STACK: {PERIODS: nnx.to_pure_dict(gradients.stacks[0])}}

    def _with(self, ends: PyTree) -> Decoder:
        return self._blueprint.module({**ends, STACK: self._stack})
