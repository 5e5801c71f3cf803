"""XLA as tests have it, in their own process and in those that they start: quick to compile, slow to run.

Most of the time goes into LLVM and MLIR, for programs that run once. The older emitters of fusions, which do without
MLIR, halve it (`--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters`), but round by how XLA fuses: programs
that compute the same then differ in their last bits, and drop another token where two are as likely.
"""

import atexit
import functools
import shutil
import tempfile
from pathlib import Path

QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
# JAX keeps what took a second; read from the environment, by processes that a test starts too
KEEP_SECONDS = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1"}


@functools.cache
def programs() -> Path:
    """A directory for programs that the runs of this process's tests compile, so that none does what another did."""
    directory = tempfile.mkdtemp(prefix="programs")
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    return Path(directory)
