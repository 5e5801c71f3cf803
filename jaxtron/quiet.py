"""JAX imported without the lines that its CUDA plugin writes where there is no NVIDIA driver."""

import importlib
import os
import sys
import tempfile

from jaxtron import interrupts

# what the plugin (the extra `plan`) writes while it is imported
_NOISE = ("cudart_stub", "before absl::InitializeLog()")


def import_jax() -> None:
    """Imports JAX; whatever else it writes to standard error comes after."""
    if "jax" in sys.modules or os.path.exists("/proc/driver/nvidia/version"):
        return
    with tempfile.TemporaryFile() as held:
        stderr = os.dup(2)
        os.dup2(held.fileno(), 2)
        try:
            importlib.import_module("jax")
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
            held.seek(0)
            lines = held.read().decode(errors="replace").splitlines(keepends=True)
            if not interrupts.is_ending():
                sys.stderr.write("".join(line for line in lines if not any(noise in line for noise in _NOISE)))
