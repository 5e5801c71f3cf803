"""What a layer keeps for its backward, in bytes, from shapes alone."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxtron.config import UserError
from jaxtron.layers.inputs import row_keys
from jaxtron.models.decoder.model import Decoder
from jaxtron.models.decoder.staged import StagedDecoder
from jaxtron.pipeline.layer_loop import LayerLoop
from jaxtron.plan.memory_use import device_bytes
from jaxtron.run.attention import select_attention
from jaxtron.run.configuration import Configuration
from jaxtron.run.dtypes import DTYPES
from jaxtron.sharding.blueprint import blueprint
from jaxtron.sharding.collectives import vary
from jaxtron.sharding.config import MeshConfig, ShardingConfig
from jaxtron.sharding.context import part
from jaxtron.sharding.mesh import build_mesh
from jaxtron.sharding.parameters import manual_specs
from jaxtron.sharding.regions import region
from jaxtron.sharding.rules import current, make_rules, use
from jaxtron.typing import Array, PyTree


class Kept(NamedTuple):
    """Bytes a device keeps of one row in one period: for backwards, and for weight gradients that were put off."""

    residuals: int
    pairs: int


def layer_bytes(config: Configuration, sizes: dict[str, int], kind: str | None = None) -> int:
    """Bytes that a device keeps of one microbatch in one layer (a period of the pattern) of a pipeline's stage.

    `kind` is what the devices are (`jax.Device.device_kind`; none: this machine's): kernels keep no probabilities.
    """
    rows = config.train.global_batch // config.train.microbatches // (sizes["data"] * sizes["fsdp"])
    return rows * kept_bytes(config, sizes["tensor"], sizes["context"], kind).residuals


def kept_bytes(config: Configuration, tensor: int, context: int = 1, kind: str | None = None) -> Kept:
    """Bytes kept of one row of a microbatch in one period of the pattern, on each of `tensor` x `context` devices.

    Traced, never run, on devices of this machine that stand for those of this `kind`; `UserError` where it has too few.
    """
    # two parts of a sequence stand for any number: nothing that is kept is larger than a part
    parts = min(context, 2)
    length, count = config.data.sequence_length // context * parts, tensor * parts
    if count > len(jax.devices()):
        raise UserError(f"mesh.tensor {tensor} is traced on {count} devices, here are {len(jax.devices())}: --devices")
    mesh = build_mesh(MeshConfig(data=1, context=parts, tensor=tensor), jax.devices()[:count])
    model, dtype = config.model, DTYPES[config.train.precision]
    found: list[list[int]] = []
    with use(make_rules(mesh, ShardingConfig())):
        attention = select_attention(config, parts, kind or current().device_kind)
        plan = blueprint(lambda rngs: Decoder(model, dtype=dtype, attention=attention, rngs=rngs))

        def local(params: PyTree, tokens: Array, numbers: Array) -> Array:
            tokens = part(current().context, parts, tokens, 1)
            segments = tokens if "segments" in config.data.optional_fields else None
            working = plan.working(params, dtype)
            drops = model.dropout > 0 or model.attention_dropout > 0
            keys = row_keys(jax.random.key(0), vary(numbers)) if drops else None
            decoder = plan.module(working)
            x = jax.eval_shape(decoder.embed, vary(tokens), keys)
            shared = decoder.inputs(tokens.shape[1], keys, segments=segments)
            (layers,) = StagedDecoder(plan, working).parameters.stacks
            loop = LayerLoop(decoder.stack.layer(), layers, jnp.arange(model.layout.repeats), 1)
            held = loop.buffers(loop.prepare(x, shared, splits=True), 1, 1, 1)
            kept = (held.residuals, held.deferred)
            found.extend([[device_bytes(jax.typeof(array)) for array in arrays] for arrays in kept])
            return jnp.float32(0.0)

        scalar = PartitionSpec()
        specs = (manual_specs(plan.parameters), scalar, scalar)
        tokens = jax.ShapeDtypeStruct((1, length), jnp.int32)
        jax.eval_shape(region(local, specs, scalar), plan.abstract, tokens, jax.ShapeDtypeStruct((1,), jnp.int32))
    residuals, pairs = found
    return Kept(sum(residuals), sum(pairs))
