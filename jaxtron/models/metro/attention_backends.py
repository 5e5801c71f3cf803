"""The backends of both encoders' attention, selected before anything is traced."""

from collections.abc import Mapping
from typing import Any

from jaxtron.kernels.attention.attention import Implementation
from jaxtron.kernels.selection import Backend
from jaxtron.models.encoder.attention_backends import ENCODER
from jaxtron.models.encoder.attention_backends import attention_backends as encoder_backends
from jaxtron.models.metro.config import MetroConfig
from jaxtron.typing import DTypeLike

# the smaller encoder, which drops nothing, and the larger
AUXILIARY, MAIN = "auxiliary", "main"


def attention_backends(config: MetroConfig, dtype: DTypeLike, **devices: Any) -> Mapping[str, Backend[Implementation]]:
    """By encoder, both with biases by distance; `devices` are as in `encoder.attention_backends`.

    `UserError` where the implementation asked for cannot.
    """
    distances = 2 * config.max_distance + 1
    encoders = {AUXILIARY: config.auxiliary, MAIN: config}
    return {
        name: encoder_backends(settings, dtype, distances=distances, **devices)[ENCODER]
        for name, settings in encoders.items()
    }
