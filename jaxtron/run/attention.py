"""Who computes the attention of a run."""

from jaxtron.kernels.attention.choose import Choice
from jaxtron.models.decoder.attention_choice import attention_choices
from jaxtron.run.configuration import Configuration
from jaxtron.run.dtypes import DTYPES


def choose_attention(config: Configuration, parts: int, kind: str) -> dict[str, Choice | None]:
    """By the pattern's symbol, who computes attention with mesh.context `parts` on devices of this kind.

    None: whole scores. `UserError` where the implementation asked for cannot.
    """
    packed = "segments" in config.data.optional_fields
    length, dtype = config.data.sequence_length, DTYPES[config.train.precision]
    return attention_choices(config.model, length, dtype, kind=kind, parts=parts, packed=packed)
