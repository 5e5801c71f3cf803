"""Compiling for GPUs that are not there: compile-only devices, and the memory of what was compiled for them."""

import functools
import importlib
import importlib.metadata
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import jax
from jax.experimental import topologies

from jaxtron.config import UserError
from jaxtron.gpus import Gpu, gpu_named
from jaxtron.typing import Device

# what to type for as many as a mesh needs
MORE = "plan for them: --gpus"
_SKIP_CHECK = "JAX_SKIP_CUDA_CONSTRAINTS_CHECK"


@dataclass(frozen=True)
class Memory:
    """Bytes per device of a compiled program; workspaces of libraries and of communication come on top."""

    arguments: int
    outputs: int
    aliases: int
    temporaries: int

    @property
    def peak(self) -> int:
        """Arguments and outputs, donated arguments counted once, with all temporaries."""
        return self.arguments + self.outputs - self.aliases + self.temporaries


def memory(compiled: jax.stages.Compiled) -> Memory:
    """What the compiler planned; it never fails for want of memory, so compare `peak` with the GPU's."""
    stats = compiled.memory_analysis()
    assert stats is not None, "the CPU and CUDA compilers tell what memory they planned"
    return Memory(
        arguments=stats.argument_size_in_bytes,
        outputs=stats.output_size_in_bytes,
        aliases=stats.alias_size_in_bytes,
        temporaries=stats.temp_size_in_bytes,
    )


def gpu_devices(gpu: str, count: int, gpus_per_node: int = 8) -> list[Device]:
    """`count` compile-only GPUs in nodes of `gpus_per_node`, for a `Mesh` to lower and compile with, never to run.

    Raises `UserError` for an unknown GPU, a count that leaves a node half full, or a CUDA plugin missing or not JAX's.
    """
    target = gpu_named(gpu)
    if count < 1 or gpus_per_node < 1:
        raise UserError(f"{count} GPUs in nodes of {gpus_per_node}: both must be at least 1")
    if count > gpus_per_node and count % gpus_per_node:
        raise UserError(f"{count} GPUs do not fill nodes of {gpus_per_node}: use a multiple of {gpus_per_node}")
    plugin = _matching_plugin()
    return list(_topology(target, max(1, count // gpus_per_node), min(count, gpus_per_node), plugin))


# compile-only clients are hardly ever freed: one per shape and process
@functools.cache
def _topology(gpu: Gpu, nodes: int, gpus_per_node: int, plugin: str) -> tuple[Device, ...]:
    describe = functools.partial(
        topologies.get_topology_desc,
        "",
        platform="cuda",
        target_config=gpu.target_config,
        topology=f"{nodes}x1x{gpus_per_node}",
    )
    with _without_cuda_libraries():
        try:
            topology = describe()
        except NotImplementedError:
            # JAX looked for platforms earlier, found no CUDA libraries and gave the plugin up
            importlib.import_module(plugin).initialize()
            topology = describe()
        except jax.errors.JaxRuntimeError as error:
            if gpu.target_file is None:
                raise
            raise UserError(
                f"the target {gpu.name} is not one that XLA reads: {str(error).splitlines()[0]}; write it anew"
            ) from None
    return tuple(topology.devices)


@contextmanager
def _without_cuda_libraries() -> Iterator[None]:
    """Lets JAX register the CUDA plugin where NVIDIA's libraries are not installed."""
    before = os.environ.get(_SKIP_CHECK)
    os.environ[_SKIP_CHECK] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_SKIP_CHECK]
        else:
            os.environ[_SKIP_CHECK] = before


def _matching_plugin() -> str:
    """Module of the installed CUDA plugin; `UserError` with the pip command if there is none of JAX's version."""
    fix = f"pip install jax-cuda12-plugin=={jax.__version__} jax-cuda12-pjrt=={jax.__version__}"
    found = []
    for cuda in ("cuda12", "cuda13"):
        versions = [_version(f"jax-{cuda}-{part}") for part in ("plugin", "pjrt")]
        if versions == [jax.__version__] * 2:
            return f"jax_plugins.xla_{cuda}"
        if any(versions):
            found.append(f"jax-{cuda}-plugin {versions[0]} and jax-{cuda}-pjrt {versions[1]}")
    if found:
        raise UserError(f"compiling for GPUs needs the CUDA plugin of JAX {jax.__version__}, not {found[0]}: {fix}")
    raise UserError(f"compiling for GPUs needs JAX's CUDA plugin (NVIDIA's libraries are not needed): {fix}")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
