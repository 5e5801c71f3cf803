"""Tensor cores and copies that add for Pallas' interpreter; its race detector sees what both read of shared memory.

The interpreter multiplies at once and tells the detector nothing. On the GPU a product reads its operands by the way
of copies (an ordinary store is seen only behind `commit_smem`) and goes on doing so until it is waited for: what is
written there before is a race. Importing this teaches the interpreter both, products of an operand in registers, and
what it lacks altogether: copies to global memory that add.
"""

import collections
import functools
import threading
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax.experimental import pallas as pl

from jaxtron.kernels.mosaic import Target, plgpu

_issue, _read, _copy = plgpu.wgmma, gpu_callbacks.wgmma_accumulator_deref, gpu_callbacks.copy_smem_to_gmem
_ADDING = threading.Lock()


def _numbers(transforms: Any) -> Any:
    return jax.tree.map(int, gpu_callbacks._remove_noop_transforms(transforms))


def _pending(memory: Any, thread: Any) -> collections.deque:
    """Clocks of a warpgroup's products that it has not waited for."""
    if not hasattr(memory, "pending_products"):
        memory.pending_products = collections.defaultdict(collections.deque)
    return memory.pending_products[thread]


@gpu_callbacks.fail_on_exception
def _multiply(
    *,
    token: Any,
    mesh_location: Any,
    thread: Any,
    acc_allocation_key_as_array: Any,
    acc_transforms: Any,
    a_allocation_key_as_array: Any,
    a_transforms: Any,
    b_allocation_key_as_array: Any,
    b_transforms: Any,
    source_info: Any = None,
) -> Any:
    """`gpu_callbacks.wgmma`, whose first operand may be the values themselves."""
    memory = gpu_callbacks._get_shared_memory()
    clock = memory.incr_clock(thread)
    # from here on it runs beside the warpgroup that issued it
    clock.inc(memory.get_next_tma_thread_id())
    _pending(memory, thread).append(clock)

    def operand(given: Any, transforms: Any) -> np.ndarray:
        if given.ndim == 2:
            return np.asarray(given, np.float32)
        key = gpu_callbacks.HostAllocationKey.from_array(given)
        access = memory.access(key, _numbers(transforms))
        values, _, _ = memory.get_buffer_content(key, access, thread)
        gpu_callbacks.get_races().check_read(
            thread, clock.async_smem_clock.copy(), key, access, source_info=source_info
        )
        return np.asarray(values, np.float32)

    left, right = operand(a_allocation_key_as_array, a_transforms), operand(b_allocation_key_as_array, b_transforms)
    key = gpu_callbacks.HostAllocationKey.from_array(acc_allocation_key_as_array)
    access = memory.access(key, _numbers(acc_transforms))
    total, _, _ = memory.get_buffer_content(key, access, thread)
    memory.store_buffer_content(key, access, total + left @ right, thread)
    return token


@gpu_callbacks.fail_on_exception
def _read_sums(*, token: Any, thread: Any, wait_n: int | None, **rest: Any) -> Any:
    """`gpu_callbacks.wgmma_accumulator_deref`, which waits until no more than `wait_n` products are under way."""
    memory = gpu_callbacks._get_shared_memory()
    memory.incr_clock(thread)
    pending = _pending(memory, thread)
    while wait_n is not None and len(pending) > wait_n:
        done = pending.popleft()
        with memory.lock:
            memory.clocks[thread].update(done)
    return _read(token=token, thread=thread, wait_n=wait_n, **rest)


class _Addition(gpu_callbacks.AsyncCopySmemToGmemTask):
    """A copy that adds; in whatever order additions come, none is a race with another."""

    def __call__(self, tma_thread_id: int) -> None:
        memory = gpu_callbacks._get_shared_memory()
        self.pre_read(tma_thread_id, memory)
        values, _, _ = memory.get_buffer_content(self.src_allocation_key, self.src_access, self.thread)
        with _ADDING:
            sums, _, _ = memory.get_buffer_content(self.dst_allocation_key, self.dst_access, self.thread)
            memory.store_buffer_content(self.dst_allocation_key, self.dst_access, sums + values, self.thread)
        self.write_clock = self.clock
        self.post_write(tma_thread_id, memory)


@gpu_callbacks.fail_on_exception
def _copy_or_add(*, reduction_op: str | None, **given: Any) -> Any:
    """`gpu_callbacks.copy_smem_to_gmem`."""
    if reduction_op is None:
        return _copy(reduction_op=None, **given)
    assert reduction_op == "add" and given["predicate"] is None
    memory = gpu_callbacks._get_shared_memory()
    ends: dict[str, Any] = {}
    for end in ("src", "dst"):
        key = gpu_callbacks.HostAllocationKey.from_array(given[f"{end}_allocation_key_as_array"])
        ends |= {
            f"{end}_allocation_key": key,
            f"{end}_access": memory.access(key, _numbers(given[f"{end}_transforms"])),
        }
    where = {name: given[name] for name in ("mesh_location", "thread", "source_info")}
    memory.execute_async_task(_Addition(**ends, **where, clock=memory.incr_clock(given["thread"])))
    return given["token"]


def _product(self: Target, left: Any, right: Any, total: Any, issued: Callable[[], None]) -> jax.Array:
    """`Target.product` in the interpreter, which knows no accumulator with a first value."""

    def fresh(sums: Any) -> jax.Array:
        plgpu.wgmma(sums, left, right)
        issued()
        return sums[...]

    made = pl.run_scoped(fresh, plgpu.ACC((left.shape[0], right.shape[1]), jnp.float32))
    return made if total is None else total + made


def _issue_product(sums: Any, left: Any, right: Any) -> None:
    """`plgpu.wgmma`; the interpreter passes over `plgpu.wgmma_wait`, but not over a load that waits."""
    plgpu.wgmma_wait = functools.partial(_wait_for_products, sums)
    _issue(sums, left, right)


def _wait_for_products(sums: Any, count: int) -> None:
    plgpu.wgmma_accumulator_load(sums, wait_n=count)


gpu_callbacks.wgmma, gpu_callbacks.wgmma_accumulator_deref = _multiply, _read_sums
gpu_callbacks.copy_smem_to_gmem = _copy_or_add
plgpu.wgmma = _issue_product
Target._product_of_values = _product
