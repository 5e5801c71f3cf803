"""XLA as tests have it, in their own process and in those that they start: quick to compile, slow to run.

Most of the time goes into LLVM and MLIR, for programs that run once. The older emitters of fusions, which do without
MLIR, halve it, but round by how XLA fuses: programs that compute the same then differ in their last bits, and drop
another token where two are as likely. A test of such bits is marked `usual_emitters` (`support/emitters.py`).
"""

import atexit
import functools
import os
import shutil
import tempfile
from pathlib import Path

LITTLE_WORK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
OLDER_EMITTERS = "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters"
USUAL = "JAXTRON_TEST_EMITTERS"
"""In the environment of a process of tests: `usual` for XLA's emitters as users have them."""
QUICK = LITTLE_WORK if os.environ.get(USUAL) == "usual" else f"{LITTLE_WORK} {OLDER_EMITTERS}"
# JAX keeps what took a second; read from the environment, by processes that a test starts too
KEEP_SECONDS = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1"}


def eight_devices() -> None:
    """Sets the environment in which JAX, not yet started, has eight simulated devices (a GPU's platform: its own)."""
    os.environ["JAX_PLATFORMS"] = os.environ.get("JAXTRON_TEST_PLATFORM", "cpu")
    # the second as `simulate_devices` has it
    flags = ["--xla_force_host_platform_device_count=8", "--xla_cpu_enable_concurrency_optimized_scheduler=false"]
    if os.environ["JAX_PLATFORMS"] == "cpu":
        # a GPU's programs are tested as they are used
        flags += [QUICK]
    os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *flags])
    # as `simulate_devices` has it: eight devices that wait for each other want more threads than a small machine has
    os.environ.setdefault("PJRT_NPROC", "32")
    os.environ.update(KEEP_SECONDS)


def has_usual_emitters() -> bool:
    """Whether this process's programs are fused as users have them."""
    return QUICK == LITTLE_WORK or os.environ["JAX_PLATFORMS"] != "cpu"


def usual_emitters() -> dict[str, str]:
    """What the environment of a process has in which they are."""
    return {USUAL: "usual", "XLA_FLAGS": os.environ["XLA_FLAGS"].replace(OLDER_EMITTERS, "")}


@functools.cache
def programs() -> Path:
    """A directory for programs that the runs of this process's tests compile, so that none does what another did."""
    directory = tempfile.mkdtemp(prefix="programs")
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    return Path(directory)
