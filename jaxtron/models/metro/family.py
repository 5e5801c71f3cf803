"""What a configuration knows of METRO-LM."""

from collections.abc import Mapping
from typing import Any

from jaxtron.config import UserError
from jaxtron.models.encoder.cost import recompute_levels
from jaxtron.models.encoder.settings import check as check_encoder
from jaxtron.models.encoder.settings import evaluated, resolve
from jaxtron.models.encoder.settings import sizes as sizes_of_encoder
from jaxtron.models.family import Family
from jaxtron.models.metro.config import MetroConfig
from jaxtron.models.metro.cost import flops_per_token, num_parameters, padding_flops, passes, work
from jaxtron.sharding.config import ContextConfig


def check(config: MetroConfig, mesh: Mapping[str, int], length: int, context: ContextConfig) -> None:
    """`UserError` where layers, vocabulary or masked places do not fit a mesh of these sizes by flag."""
    check_encoder(config, mesh, length, context)
    places = config.places(length)
    if places % mesh["tensor"]:
        raise UserError(
            f"sequences of {length} tokens have room for {places} masked places, which mesh.tensor {mesh['tensor']} "
            "does not divide; use another mesh.tensor, or change model.masked_share"
        )


def sizes(config: MetroConfig) -> str:
    """What decides how large the model is."""
    return f"model.auxiliary_layers {config.auxiliary_layers}, {sizes_of_encoder(config)}"


def meaning(config: MetroConfig) -> dict[str, Any]:
    """A default spelled out is the same model, and so is one that was told other things of masks and losses."""
    ignored = dict.fromkeys(("masked_share", "detection_weight", "correction_weight"))
    return {"head_dim": config.head_size, "mlp_size": config.mlp_width, **ignored}


FAMILY = Family(
    config=MetroConfig,
    program="jaxtron.models.metro.program",
    stacks=lambda config: {"auxiliary/layers": config.auxiliary_layers, "main/layers": config.num_layers},
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
