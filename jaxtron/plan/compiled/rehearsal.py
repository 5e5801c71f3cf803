"""The real train step, compiled for GPUs that are not there."""

import time
from dataclasses import dataclass

import jax

from jaxtron.gpus import Gpu, gpu_named
from jaxtron.plan.compiled import hlo
from jaxtron.plan.compiled.census import Collective, census
from jaxtron.plan.compiled.deviceless import MORE, Memory, gpu_devices, memory
from jaxtron.plan.compiled.memory import memory_use
from jaxtron.plan.layout import ParameterRow, parameter_rows
from jaxtron.plan.memory_use import MemoryUse
from jaxtron.quiet import collect_stderr
from jaxtron.run.attention import attention_lines
from jaxtron.run.batches import abstract_batch
from jaxtron.run.configuration import Configuration
from jaxtron.run.session import RunSession, make_session
from jaxtron.runtime.xla_flags import gpu_options, refused_option
from jaxtron.sharding.rules import Tables

# Without a GPU there is nothing to tune on, and trying costs half of the compilation. Everything else is as in a run.
COMPILER_OPTIONS = {"xla_gpu_autotune_level": 0}
NO_CONFIGURATION = "default config"


@dataclass(frozen=True)
class Rehearsal:
    """A compiled step: its collectives, memory a device, parameters, and the scheduled program itself.

    `attention` says by what it is computed, `choices` what else was chosen; `memory` is the compiler's sum,
    `memory_use` the same by what it is for; `messages` are lines that the compiler printed; `seconds` went into tracing
    and compiling.
    """

    session: RunSession
    attention: tuple[str, ...]
    choices: tuple[str, ...]
    gpu: Gpu
    gpus_per_node: int
    collectives: tuple[Collective, ...]
    memory: Memory
    memory_use: MemoryUse
    layout: tuple[ParameterRow, ...]
    module: hlo.Module
    hlo: str
    messages: tuple[str, ...]
    seconds: float


def rehearse(
    config: Configuration, *, gpu: str, num_gpus: int, gpus_per_node: int = 8, tables: Tables | None = None
) -> Rehearsal:
    """Traces and compiles the configuration's step for `num_gpus` GPUs of that name, on a machine without any.

    `tables` are the two of sharding (none: the house's).
    """
    began = time.perf_counter()
    # what does not fit is refused before the compiler's devices are made
    config.resolved().check_mesh(config.mesh.shape(num_gpus, more=MORE))
    session = make_session(config, gpu_devices(gpu, num_gpus, gpus_per_node), tables=tables)
    with session.use():
        trainer, batch = session.trainer, abstract_batch(session.config)
        lowered = session.lower_step(trainer.abstract_state(), batch)
        # lines of XLA's C++, which Python does not see
        with collect_stderr() as messages:
            options = gpu_options(config.runtime, split=config.mesh.split)
            compiled = _compile(lowered, {**options, **COMPILER_OPTIONS})
        text, planned = compiled.as_text() or "", memory(compiled)
        module = hlo.parse(text)
        collectives = census(module, session.mesh.shape, session.rules.folding.names)
        num_groups = len({entry.axes for entry in collectives if entry.group_size > 1})
        rows = tuple(parameter_rows(trainer.blueprint))
        use_of_memory = memory_use(trainer, batch, planned, gpu_named(gpu), num_groups)
    return Rehearsal(
        session=session,
        attention=attention_lines(session.attention),
        choices=session.choices,
        gpu=gpu_named(gpu),
        gpus_per_node=gpus_per_node,
        collectives=collectives,
        memory=planned,
        memory_use=use_of_memory,
        layout=rows,
        module=module,
        hlo=text,
        messages=tuple(messages),
        seconds=time.perf_counter() - began,
    )


def _compile(lowered: jax.stages.Lowered, options: dict[str, bool | int | str]) -> jax.stages.Compiled:
    """The compiled step; once more with library calls for products where XLA's own fusions find no configuration.

    A `UserError` for a flag that the compiler does not take.
    Such fusions, of a concatenation into a product for one, are configured by trying them out on a GPU.
    """
    try:
        return lowered.compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
        if (refused := refused_option(error)) is not None:
            raise refused from None
        if NO_CONFIGURATION not in str(error):
            raise
    return lowered.compile(compiler_options={**options, "xla_gpu_enable_triton_gemm": False})
