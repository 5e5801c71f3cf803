"""What a layer keeps for its backward, in bytes, from shapes alone."""

import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxtron.layers.inputs import row_keys
from jaxtron.models.decoder import Decoder
from jaxtron.models.staged import StagedDecoder
from jaxtron.pipeline.layer_loop import LayerLoop
from jaxtron.sharding import MANUAL_AXES, ShardingConfig, blueprint, build_mesh, current, make_rules, use
from jaxtron.sharding.collectives import vary
from jaxtron.sharding.mesh import MeshConfig
from jaxtron.sharding.parameters import manual_specs
from jaxtron.train.config import Configuration
from jaxtron.train.step import DTYPES
from jaxtron.typing import Array, PyTree


def layer_bytes(config: Configuration, sizes: dict[str, int]) -> int:
    """Bytes that a device keeps of one microbatch in one layer (a period of the pattern) of a pipeline's stage.

    Traced, never run, on `mesh.tensor` devices of this machine: no other axis splits what is kept, beside the batch.
    """
    mesh = build_mesh(MeshConfig(data=1, tensor=sizes["tensor"]), jax.devices()[: sizes["tensor"]])
    rows = config.train.global_batch // config.train.microbatches // (sizes["data"] * sizes["fsdp"])
    model, dtype = config.model, DTYPES[config.train.precision]
    kept: list[int] = []
    with use(make_rules(mesh, ShardingConfig())):
        plan = blueprint(lambda rngs: Decoder(model, dtype=dtype, rngs=rngs))

        def local(params: PyTree, tokens: Array, numbers: Array) -> Array:
            staged = StagedDecoder(plan, plan.working(params, dtype))
            drops = model.dropout > 0 or model.attention_dropout > 0
            keys = row_keys(jax.random.key(0), vary(numbers)) if drops else None
            decoder = plan.module(plan.working(params, dtype))
            x = jax.eval_shape(decoder.embed, vary(tokens), keys)
            layers = staged.parameters.layers
            layer = decoder.stack.layer()
            loop = LayerLoop(layer, layers, jnp.arange(model.layout.repeats), 1)
            kept.extend(map(_bytes, loop.buffer(x, decoder.inputs(tokens.shape[1], keys), 1, 1)))
            return jnp.float32(0.0)

        scalar = PartitionSpec()
        specs = (manual_specs(plan.specs), scalar, scalar)
        region = jax.shard_map(local, in_specs=specs, out_specs=scalar, axis_names=set(MANUAL_AXES))
        tokens = jax.ShapeDtypeStruct((rows, config.data.sequence_length), jnp.int32)
        jax.eval_shape(region, plan.abstract, tokens, jax.ShapeDtypeStruct((rows,), jnp.int32))
    return sum(kept)


def _bytes(array: Array) -> int:
    """Those of a device's part."""
    abstract = jax.typeof(array)
    axes = [axis for entry in abstract.sharding.spec for axis in ((entry,) if isinstance(entry, str) else entry or ())]
    return abstract.size * abstract.dtype.itemsize // math.prod(current().mesh.shape[axis] for axis in axes)
