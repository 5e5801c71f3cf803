"""Exit codes of a training's processes, and what they mean for those that started them (docs/clusters.md)."""

from collections.abc import Iterable

from jaxtron.interrupts import TRY_AGAIN

# a checkpoint was saved, or nothing was begun
SAVED = (130, 143, 138)
# another process is gone, or this one was killed or crashed: trying again may help
LOST = (TRY_AGAIN, 137, 134, 139, 135, 132, 136)
# of a signal's number, as shells write it
SIGNALLED = 128


def exit_code(returned: int) -> int:
    """The code of a process that Python's subprocess tells of, which writes signals as negative numbers."""
    return returned if returned >= 0 else SIGNALLED - returned


def is_error(code: int) -> bool:
    """Whether it would come again."""
    return code != 0 and code not in SAVED and code not in LOST


def worst(codes: Iterable[int]) -> int:
    """The one that says most of several processes: an error's, else a loss's, else a saved stop's, else 0."""

    def weight(code: int) -> tuple[bool, bool, bool]:
        # 75 tells of others' loss, and a process of its own
        return is_error(code), code in LOST, code != TRY_AGAIN and code != 0

    return max(codes, key=weight, default=0)
