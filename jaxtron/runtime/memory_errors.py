"""What runs out of memory, told in one line."""

import contextlib
import re
from collections.abc import Iterator

import jax

from jaxtron.config import UserError


@contextlib.contextmanager
def out_of_memory_as_user_error(advice: str) -> Iterator[None]:
    """One line, a `UserError` with the advice, where what runs does not fit the devices."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        reason = re.search("out of memory[^.]*", str(error), re.IGNORECASE)
        if reason is None:
            raise
        raise UserError(f"{reason[0]}. {advice}") from None
