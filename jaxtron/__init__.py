"""Jaxtron: Megatron-LM's parallel training as a JAX program."""

import os
import sys
import tempfile

# Lines that JAX's CUDA plugin (the extra `plan`) writes while it is imported on a machine without an NVIDIA driver.
_NOISE = ("cudart_stub", "before absl::InitializeLog()")


def _import_jax() -> None:
    """Imports JAX without those lines; whatever else it writes to standard error comes after."""
    with tempfile.TemporaryFile() as held:
        stderr = os.dup(2)
        os.dup2(held.fileno(), 2)
        try:
            import jax  # noqa: F401
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
            held.seek(0)
            lines = held.read().decode(errors="replace").splitlines(keepends=True)
            sys.stderr.write("".join(line for line in lines if not any(noise in line for noise in _NOISE)))


if "jax" not in sys.modules and not os.path.exists("/proc/driver/nvidia/version"):
    _import_jax()
