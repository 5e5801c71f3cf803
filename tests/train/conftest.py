"""A finished run that several tests look at."""

import pytest
from command_runs import FinishedRun, run_here, small


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    """Six steps with validation, checkpoints and a sample; for looking at, not for changing."""
    folder = tmp_path_factory.mktemp("finished")
    flags = [*small(folder), "--train.steps", "6", "--train.validate_every", "3", "--checkpoint.every", "4"]
    flags += ["--train.sample_tokens", "40"]
    return FinishedRun(flags, folder / "run", run_here(*flags))
