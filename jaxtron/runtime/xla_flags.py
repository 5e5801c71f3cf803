"""XLA's flags of a run on GPUs, the same where it runs and where it is rehearsed."""

import importlib.metadata
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path

import jax

from jaxtron.config import UserError
from jaxtron.gpus import pool_fraction
from jaxtron.runtime.config import Preset, RuntimeConfig
from jaxtron.runtime.determinism import deterministic_flags

JAXLIB = importlib.metadata.version("jaxlib")

_SCHEDULER = "--xla_gpu_enable_latency_hiding_scheduler=true"
_DOUBLE_BUFFERING = "--xla_gpu_enable_while_loop_double_buffering=true"
# By the first JAX that they are for; a newer one gets the nearest row before it. On an 8B step for 512 H100
# (JAX 0.12.0.1, 2026-11) `latency` took the overlapped all-gathers from 8 to 35, reduce-scatters from 7 to 24 and
# temporary memory from 1.17 to 1.10 GiB; `collective_matmul` cut the tensor-parallel ones into 12 permutes.
# Left out: JAX_OPTIMIZATION_LEVEL=O1 (crashed the compiler), combine_by_dim, highest_priority_async_stream and an empty
# command_buffer (all without effect), and no rematerialization pass (the memory below is what calls for it).
XLA_PRESETS: dict[Preset, dict[tuple[int, int], tuple[str, ...]]] = {
    "none": {(0, 10): ()},
    "auto": {(0, 10): (_SCHEDULER,)},
    "latency": {
        (0, 10): (
            _SCHEDULER,
            "--xla_gpu_enable_pipelined_all_gather=true",
            "--xla_gpu_enable_pipelined_reduce_scatter=true",
            "--xla_gpu_enable_pipelined_all_reduce=true",
            _DOUBLE_BUFFERING,
        ),
        # the switches became modes, and are no options of a single compilation any more
        (0, 11): (
            _SCHEDULER,
            "--xla_gpu_pipeline_all_gather=on",
            "--xla_gpu_pipeline_reduce_scatter=on",
            "--xla_gpu_pipeline_all_reduce=on",
            _DOUBLE_BUFFERING,
        ),
    },
    "collective_matmul": {
        (0, 10): (
            _SCHEDULER,
            "--xla_gpu_threshold_for_windowed_einsum_mib=0",
            "--xla_gpu_multi_streamed_windowed_einsum=true",
        )
    },
}
# Whatever the preset: passes without which a JAX computes right. 0.10's compiler turns "take my part of an all-gather"
# into an empty permute, which is zeros, in tensor-parallel steps on GPUs (openxla/xla pull request 45218).
WRONG_PASSES: dict[tuple[int, int], tuple[str, ...]] = {
    (0, 10): ("all-gather-to-collective-permute-simplifier",),
    (0, 11): (),
}
# XLA schedules for this part of a GPU's memory, and for little more beyond it waits for communication and computes
# products again; a factor in hundredths changes it. With that of JAX's pool a step of Llama 3 8B on 8 H100 is bounded
# by 1.55 s instead of 1.70 (JAX 0.11.2, 2026-11).
SCHEDULED_FRACTION = 0.8
# Of a pipeline XLA counts buffers more than once that branches pass on: it may schedule for so much more, and steps of
# gpt_1t, gpt_530b and Llama 3 70B need no byte more (JAX 0.11.2, 2026-11).
PIPELINE_FACTOR = 1.3
# Beside a preset, where mesh.tensor splits layers. Halves of a microbatch (`sharding.halves`) go side by side only
# while their products and collectives stay apart: XLA would join products of one weight, and small reduce-scatters.
TENSOR_FLAGS = ("--xla_gpu_dot_merger_threshold_mb=0", "--xla_gpu_reduce_scatter_combine_threshold_bytes=1048576")
# Where mesh.fsdp alone splits layers: several of a layer's gathers and reduce-scatters are under way at once, and those
# of its parts are not joined: they would wait for the last. So gradients of a layer's weights travel beside its
# other products: Llama 3 8B on 8 H100 1,455 to 1,432 ms, on 64 of fsdp 64 1,491 to 1,423 (JAX 0.11.2, 2026-11). In
# the same programs reduce-scatters pipelined by XLA change nothing, pipelined gathers cost 23 ms and unrolled loops 3.
# Beside tensor or context the scheduler uses several at once for less: Llama 3 8B of fsdp 4 x tensor 2 loses 9 ms, and
# llama3_8b_128k 7; with two at once instead of four it waits for keys and values, 0.6 s.
FSDP_FLAGS = (
    "--xla_gpu_experimental_parallel_collective_overlap_limit=4",
    "--xla_gpu_reduce_scatter_combine_threshold_bytes=4194304",
)
_DISABLE_PASSES = "--xla_disable_hlo_passes"
_PIPELINING = re.compile(r"xla_gpu_(?:enable_pipelined|pipeline)_(all_gather|all_reduce|reduce_scatter)")


def preset_flags(
    preset: Preset, version: str = jax.__version__, split: Collection[str] = frozenset()
) -> tuple[str, ...]:
    """The flags of a preset for a JAX version, with those that the version always needs.

    `split` are the mesh's flags that split anything: some ask for more.
    """
    wrong, flags = _nearest(WRONG_PASSES, version), _nearest(XLA_PRESETS[preset], version)
    fixes = (f"{_DISABLE_PASSES}={','.join(wrong)}",) if wrong else ()
    if not flags:
        return fixes
    factor = 100 * min(1.0, pool_fraction()) / SCHEDULED_FRACTION * (PIPELINE_FACTOR if "pipe" in split else 1.0)
    more = TENSOR_FLAGS if "tensor" in split else FSDP_FLAGS if "fsdp" in split and "context" not in split else ()
    return (*fixes, *flags, f"--xla_gpu_memory_limit_slop_factor={round(factor)}", *more)


def gpu_flags(
    config: RuntimeConfig,
    inherited: str = "",
    version: str = jax.__version__,
    split: Collection[str] = frozenset(),
) -> tuple[str, str]:
    """What a run on GPUs puts before and after the `inherited` text of XLA_FLAGS, where the last of a name counts.

    The environment's and the user's flags win over the preset's; passes that compute wrong are left out all the same.
    """
    given = {_name(word): word.partition("=")[2] for word in [*inherited.split(), *shlex.split(config.xla_flags)]}
    before = [flag for flag in preset_flags(config.xla_preset, version, split) if _name(flag) not in given]
    before += deterministic_flags(config, given)
    after = [config.xla_flags.strip()]
    wrong = _nearest(WRONG_PASSES, version)
    if wrong and _DISABLE_PASSES in given:
        passes = dict.fromkeys([*filter(None, given[_DISABLE_PASSES].split(",")), *wrong])
        after.append(f"{_DISABLE_PASSES}={','.join(passes)}")
    return " ".join(before), " ".join(filter(None, after))


def gpu_options(
    config: RuntimeConfig,
    inherited: str | None = None,
    version: str = jax.__version__,
    split: Collection[str] = frozenset(),
) -> dict[str, bool | int | str]:
    """The same flags as options of one compilation, for GPUs that this process does not have.

    The `inherited` ones (those of XLA_FLAGS unless given) are no part of it: the compiler reads them itself.
    """
    inherited = os.environ.get("XLA_FLAGS", "") if inherited is None else inherited
    words = shlex.split(" ".join(gpu_flags(config, inherited, version, split)))
    flags = (word.removeprefix("--").partition("=") for word in words)
    return dict(_option(name, text, version) for name, _, text in flags)


def refused_option(error: Exception) -> UserError | None:
    """What to tell where a compilation does not know one of `gpu_options`, or None for any other error."""
    found = re.search(r"No such compile option: '(\w+)'|While setting option (\w+), ([^\n]*)", str(error))
    if found is None:
        return None
    reason = f": {found[3]}" if found[3] else ""
    return UserError(
        f"the compiler of JAX {jax.__version__} does not take the flag --{found[1] or found[2]}{reason}; change "
        "runtime.xla_flags, or take --runtime.xla_preset none"
    )


def set_xla_flags(
    config: RuntimeConfig, *, gpu: bool, split: Collection[str] = frozenset(), cache_directory: Path | None = None
) -> None:
    """Puts the preset's and the user's flags into XLA_FLAGS, having tried that this jaxlib starts with them.

    Raises `UserError` for a flag that it does not know, and for a preset that the run's devices would ignore.
    """
    if not gpu and config.xla_preset in ("latency", "collective_matmul"):
        raise UserError(
            f"runtime.xla_preset {config.xla_preset} is for GPUs and this run has none: set it to auto or none"
        )
    inherited, chosen = os.environ.get("XLA_FLAGS", "").strip(), config.xla_flags.strip()
    before, after = gpu_flags(config, inherited, split=split) if gpu else ("", chosen)
    if not before and not after:
        return
    if inherited and not inherited.startswith("--"):
        raise UserError(f"XLA_FLAGS={inherited} in the environment is a file, which cannot be added to: unset it")
    if complaint := _complaint(chosen, cache_directory):
        raise UserError(f"runtime.xla_flags: jaxlib {JAXLIB} does not start with them: {complaint}")
    if complaint := _complaint(before, cache_directory):
        raise UserError(
            f"runtime.xla_preset {config.xla_preset}: jaxlib {JAXLIB} does not start with it: {complaint}; "
            "set it to none"
        )
    os.environ["XLA_FLAGS"] = " ".join(filter(None, (before, inherited, after)))


def _nearest(rows: dict[tuple[int, int], tuple[str, ...]], version: str) -> tuple[str, ...]:
    major, minor = (int(part) for part in version.split(".")[:2])
    return rows[max(first for first in rows if first <= (major, minor))]


def _name(flag: str) -> str:
    return flag.partition("=")[0]


def _option(name: str, text: str, version: str) -> tuple[str, bool | int | str]:
    """A flag as an option of a compilation, which spells some differently."""
    pipelined = _PIPELINING.fullmatch(name)
    if pipelined is not None and XLA_PRESETS["latency"][0, 11] == _nearest(XLA_PRESETS["latency"], version):
        mode = {"": "on", "true": "on", "false": "default"}.get(text, text)
        return f"xla_gpu_pipeline_{pipelined[1]}", f"COLLECTIVE_PIPELINING_MODE_{mode.upper()}"
    if text in ("", "true", "false"):
        return name, text != "false"
    return name, int(text) if re.fullmatch(r"-?\d+", text) else text


def _complaint(flags: str, cache_directory: Path | None = None) -> str:
    """What this jaxlib has against flags, or nothing; tried in a process of its own, once for each set of flags.

    A flag that XLA does not know ends the process that starts a device, so they cannot be tried in this one.
    """
    if not flags:
        return ""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    file = (cache_directory or home / "jaxtron") / "xla_flags.json"
    key = f"{JAXLIB} {flags}"
    try:
        verdicts = json.loads(file.read_text())
    except (OSError, ValueError):
        verdicts = {}
    if key not in verdicts:
        verdicts[key] = _try_flags(flags)
        _write_verdicts(file, verdicts)
    return verdicts[key]


def _try_flags(flags: str) -> str:
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    command = [sys.executable, "-c", "import jax; jax.devices()"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    if result.returncode == 0:
        return ""
    # such as `F1121 02:04:01.5 23365 file.cc:63] Unknown flag in XLA_FLAGS: --xla_foo=1`
    logged = re.findall(r"^[EF]\d{4} .*?\] (.*)", result.stderr, flags=re.MULTILINE)
    return logged[0] if logged else f"exit code {result.returncode}"


def _write_verdicts(file: Path, verdicts: dict[str, str]) -> None:
    scratch = file.with_suffix(f".{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        scratch.write_text(json.dumps(verdicts, indent=1))
        scratch.replace(file)
    except OSError:
        # without the file the next run tries again, which costs a second
        return
