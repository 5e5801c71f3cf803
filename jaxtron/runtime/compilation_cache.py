"""Programs that earlier runs compiled, kept in a directory."""

import os
from pathlib import Path

import jax

from jaxtron.config import UserError, expand_home


def set_compilation_cache(name: str | None) -> None:
    """JAX looks for programs in the directory of that name, which is made, and leaves them there; none: it does not.

    A `UserError` where it cannot be made or written to.
    """
    if name is None:
        return
    directory = Path(expand_home(name))
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"runtime.compilation_cache {directory} cannot be made: {error.strerror}") from None
    if not os.access(directory, os.W_OK):
        raise UserError(f"runtime.compilation_cache {directory} cannot be written to")
    jax.config.update("jax_compilation_cache_dir", str(directory))
