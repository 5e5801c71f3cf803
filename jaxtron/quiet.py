"""What C++ below Python writes to the standard error, held back."""

import importlib
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

from jaxtron import interrupts

# what JAX's CUDA plugin (the extra `plan`) writes while it is imported, where there is no NVIDIA driver
_NOISE = ("cudart_stub", "before absl::InitializeLog()")


@contextmanager
def collect_stderr() -> Iterator[list[str]]:
    """Collects the lines that anything in this process writes to the standard error within; they are there after it."""
    found: list[str] = []
    sys.stderr.flush()
    before = os.dup(2)
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        try:
            yield found
        finally:
            os.dup2(before, 2)
            os.close(before)
            held.seek(0)
            found += held.read().decode(errors="replace").splitlines()


def import_jax() -> None:
    """Imports JAX; whatever else it writes to standard error comes after."""
    if "jax" in sys.modules or os.path.exists("/proc/driver/nvidia/version"):
        return
    lines: list[str] = []
    try:
        with collect_stderr() as lines:
            importlib.import_module("jax")
    finally:
        if not interrupts.is_ending():
            sys.stderr.writelines(f"{line}\n" for line in lines if not any(noise in line for noise in _NOISE))
