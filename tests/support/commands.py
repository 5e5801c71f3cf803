"""Commands of Jaxtron's run in this process, for the tests of each."""

import io
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass

from jaxtron.command import run_command


@dataclass(frozen=True)
class Ended:
    """A command that ended: exit code and what it wrote."""

    code: int
    out: str
    err: str


def run_main(main: Callable[[list[str]], int | None], arguments: Sequence[object]) -> Ended:
    """What a command's `main` makes of these words."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = run_command(main, [str(argument) for argument in arguments])
    return Ended(code, out.getvalue(), err.getvalue())
