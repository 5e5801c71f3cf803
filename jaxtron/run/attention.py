"""The attention backends of a run, selected once for its configuration and its devices."""

from collections.abc import Mapping

from jaxtron.kernels.attention.attention import Implementation
from jaxtron.kernels.selection import Backend
from jaxtron.models.families import program_of
from jaxtron.run.configuration import Configuration
from jaxtron.run.dtypes import DTYPES


def select_attention(config: Configuration, parts: int, device_kind: str) -> Mapping[str, Backend[Implementation]]:
    """By the pattern's symbol, for mesh.context `parts` on devices of this kind (`jax.Device.device_kind`).

    `UserError` where the implementation asked for cannot.
    """
    return program_of(config.model).attention(
        config.model,
        DTYPES[config.train.precision],
        device_kind=device_kind,
        parts=parts,
        length=config.data.sequence_length,
        packed="segments" in config.data.optional_fields,
    )


def attention_lines(backends: Mapping[str, Backend[Implementation]]) -> tuple[str, ...]:
    """One line for each backend: which, and why."""
    return tuple(dict.fromkeys(backend.reason for backend in backends.values()))
