"""Runs a schedule's table: a scan over its ticks, gradients summed in float32 as it goes."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxtron.pipeline.schedule import Schedule
from jaxtron.sharding import vary
from jaxtron.typing import Array, PyTree

# (parameters, microbatch) -> (loss to differentiate, sums to report)
StageLoss = Callable[[PyTree, PyTree], tuple[Array, PyTree]]


def run(schedule: Schedule, stage_loss: StageLoss, params: PyTree, batch: PyTree) -> tuple[PyTree, PyTree]:
    """Gradients of the summed loss and summed reports over all microbatches of this device.

    `batch` leaves have leading axes [microbatch, row]. Called inside the manual region with varying parameters: no
    communication over the batch axes happens in the loop beyond what gathering weights at use asks for.
    """
    if schedule.num_stages != 1:
        raise NotImplementedError(f"the executor runs one-stage tables; this one has {schedule.num_stages} stages")
    differentiate = jax.value_and_grad(stage_loss, has_aux=True)

    def forward_backward(index: Array | int) -> tuple[PyTree, PyTree]:
        microbatch = jax.tree.map(lambda leaf: leaf[index], batch)
        (_, reports), gradients = differentiate(params, microbatch)
        return jax.tree.map(_float32, gradients), jax.tree.map(vary, reports)

    work = [row[0].microbatch for row in schedule.table if row[0].kind == "forward_backward"]
    if len(work) == 1:
        return forward_backward(work[0])

    def tick(sums: tuple[PyTree, PyTree], index: Array) -> tuple[tuple[PyTree, PyTree], None]:
        return jax.tree.map(jnp.add, sums, forward_backward(index)), None

    gradients = jax.tree.map(lambda leaf: jnp.zeros_like(leaf, jnp.float32), params)
    reports = jax.eval_shape(lambda: forward_backward(0)[1])
    zeros = jax.tree.map(lambda leaf: vary(jnp.zeros(leaf.shape, leaf.dtype)), reports)
    return jax.lax.scan(tick, (gradients, zeros), jnp.asarray(work))[0]


def _float32(leaf: Array) -> Array:
    return leaf.astype(jnp.float32)
