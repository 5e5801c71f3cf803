"""A kind of layer that only the tests know: one entry of each table by symbol, put there and taken away."""

import contextlib
from collections.abc import Iterator

import jax.numpy as jnp
from flax import nnx

from jaxtron.layers.inputs import LayerInputs
from jaxtron.layers.linear import Linear
from jaxtron.models.decoder.config import ModelConfig
from jaxtron.models.decoder.kinds import KINDS, LayerKind
from jaxtron.models.decoder.layers import BUILDERS
from jaxtron.models.decoder.pattern import parse
from jaxtron.models.decoder.settings import DecoderSettings
from jaxtron.models.decoder.work import LAYER_WORK, LayerWork, RegionWork
from jaxtron.models.fits import check_multiple
from jaxtron.models.work.blocks import linear
from jaxtron.models.work.shapes import Shapes
from jaxtron.sharding.rules import constrain
from jaxtron.typing import Array, Float


class Wave(nnx.Module):
    """`down(sin(up(x)))`, one and a half times as wide as the stream."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs) -> None:
        width = width_of(config)
        self.up = Linear({"embed": config.hidden_size}, {"mlp": width}, bias=False, std=config.initial_std, rngs=rngs)
        self.down = Linear({"mlp": width}, {"embed": config.hidden_size}, bias=False, std=config.output_std, rngs=rngs)

    def __call__(self, x: Float[Array, "B S E"], inputs: LayerInputs) -> Float[Array, "B S E"]:
        x = constrain(x, "batch", "full_seq", "embed")
        waves = jnp.sin(self.up(x, "batch", "full_seq", "mlp", inputs=inputs))
        return self.down(waves, "batch", "seq", "embed", inputs=inputs)


def width_of(settings: DecoderSettings) -> int:
    """Channels of a wave."""
    return settings.hidden_size * 3 // 2


WAVE = LayerKind(
    symbol="S",
    name="wave",
    module="wave",
    parameters=lambda settings, tensor: 2 * settings.hidden_size * width_of(settings) // tensor,
    flops=lambda settings, length: {"wave": 4 * settings.hidden_size * width_of(settings)},
    # the MLP reads it too: refused where neither is
    fields=("mlp_size",),
    check=lambda settings, sizes, length, context: check_multiple(
        "the wave's width", width_of(settings), sizes["tensor"]
    ),
)


def _work(config: ModelConfig, shapes: Shapes) -> RegionWork:
    hidden, width = config.hidden_size, width_of(config) / shapes.tensor
    return {"wave": linear(shapes, hidden, width) + linear(shapes, width, hidden)}


@contextlib.contextmanager
def wave_known() -> Iterator[None]:
    """Inside, patterns may have `S`."""
    entries = (
        (KINDS, WAVE),
        (BUILDERS, lambda config, kind, backends, rngs: Wave(config, rngs)),
        (LAYER_WORK, LayerWork(_work)),
    )
    for table, entry in entries:
        assert WAVE.symbol not in table
        table[WAVE.symbol] = entry
    try:
        yield
    finally:
        for table, _ in entries:
            del table[WAVE.symbol]
        parse.cache_clear()
