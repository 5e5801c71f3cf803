"""The real train step, compiled for GPUs that are not there."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jaxtron.plan.census import Collective, census
from jaxtron.plan.deviceless import Memory, gpu_devices, memory
from jaxtron.sharding import build_mesh, make_rules, use
from jaxtron.train.config import Configuration
from jaxtron.train.setup import make_trainer
from jaxtron.train.step import Batch, Trainer, batch_sharding, jit_step

# Without a GPU there is nothing to tune on, and trying costs half of the compilation. The pass is wrong in JAX 0.10: it
# turns "take my part of an all-gather" into an empty permute, which is zeros (openxla/xla pull request 45218).
COMPILER_OPTIONS = {
    "xla_gpu_autotune_level": 0,
    "xla_disable_hlo_passes": "all-gather-to-collective-permute-simplifier",
}


@dataclass(frozen=True)
class Rehearsal:
    """A compiled step: its collectives, memory a device, parameters, and the scheduled program itself."""

    trainer: Trainer
    collectives: tuple[Collective, ...]
    memory: Memory
    hlo: str


def rehearse(config: Configuration, *, gpu: str, num_gpus: int, gpus_per_node: int = 8) -> Rehearsal:
    """Traces and compiles the configuration's step for `num_gpus` GPUs of that name, on a machine without any."""
    config = config.resolved()
    config.check_mesh(config.mesh.shape(num_gpus))
    mesh = build_mesh(config.mesh, gpu_devices(gpu, num_gpus, gpus_per_node))
    with use(make_rules(mesh, config.sharding)):
        trainer = make_trainer(config)
        batch = abstract_batch(config)
        lowered = jit_step(trainer).lower(trainer.abstract_state(), batch)
        compiled = lowered.compile(compiler_options=COMPILER_OPTIONS)
    hlo = compiled.as_text()
    return Rehearsal(trainer, census(hlo, mesh), memory(compiled), hlo)


def abstract_batch(config: Configuration) -> Batch:
    """Shapes, types and shardings of the global batch, inside `sharding.use(rules)`."""
    shape, sharding = (config.train.global_batch, config.data.sequence_length), batch_sharding()

    def batch() -> Batch:
        types = (jnp.int32, jnp.int32, jnp.float32)
        return Batch(*(jnp.zeros(shape, dtype) for dtype in types))

    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), jax.eval_shape(batch)
    )
