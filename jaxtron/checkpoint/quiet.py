"""What Orbax leaves behind when a save fails: it stops at the first error, which `Checkpoints` raises in one line.

Its other writes go on, each to an error that nobody asks for: tasks of an event loop that is closed. Python would print
them all, some as late as at its exit.
"""

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# part of every path that is written before a commit
UNCOMMITTED = ".orbax-checkpoint-tmp"


@contextmanager
def quiet_saves() -> Iterator[None]:
    """Keeps failed saves from printing more than what is raised, while it lasts; errors of others are shown."""
    absl, before = logging.getLogger("absl"), sys.unraisablehook

    def hook(unraisable: Any) -> None:
        # a write that ended after its event loop did; TensorStore has no object to name
        late = unraisable.object is None and isinstance(unraisable.exc_value, RuntimeError)
        if not (late and str(unraisable.exc_value) == "Event loop is closed"):
            before(unraisable)

    absl.addFilter(_is_news)
    sys.unraisablehook = hook
    try:
        yield
    finally:
        absl.removeFilter(_is_news)
        if sys.unraisablehook is hook:
            sys.unraisablehook = before


def forget_failed_writes() -> None:
    """From a failure to the end of the process: no word about tasks of it that are collected as garbage."""
    asyncio = logging.getLogger("asyncio")
    if _is_wanted not in asyncio.filters:
        asyncio.addFilter(_is_wanted)
    warnings.filterwarnings("ignore", r"coroutine 'async_serialize_from_host", RuntimeWarning)


def _is_news(record: logging.LogRecord) -> bool:
    # Orbax logs the traceback of an error in the background, which `wait` raises anyway
    return not (record.exc_info and "orbax" in record.pathname)


def _is_wanted(record: logging.LogRecord) -> bool:
    error = record.exc_info[1] if record.exc_info else None
    return not ("never retrieved" in record.getMessage() and UNCOMMITTED in str(error))
