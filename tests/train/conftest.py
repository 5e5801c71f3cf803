"""A finished run that several tests look at, and an end to what a failed test started."""

from collections.abc import Iterator

import pytest

from tests.support.command_runs import FinishedRun, run_here, small, started


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    """Six steps with validation, checkpoints and a sample; for looking at, not for changing."""
    folder = tmp_path_factory.mktemp("finished")
    flags = [*small(folder), "--train.steps", "6", "--train.validate_every", "3", "--checkpoint.every", "4"]
    flags += ["--train.sample_tokens", "40"]
    return FinishedRun(flags, folder / "run", run_here(*flags))


@pytest.fixture(autouse=True)
def no_process_is_left() -> Iterator[None]:
    """Kills what a test started and did not wait for."""
    yield
    while started:
        process = started.pop()
        if process.poll() is None:
            process.kill()
        for pipe in (process.stdout, process.stderr):
            if pipe is not None:
                pipe.close()
        process.wait()
