"""A run's settings and what they name, on this machine."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from jaxtron.config import UserError, expand_home
from jaxtron.data.files.storage import cache_root
from jaxtron.doctor.finding import Finding, fault, good
from jaxtron.doctor.surroundings import Surroundings
from jaxtron.run.configuration import Configuration
from jaxtron.train.early import check_early

# float32 weights and two moments, as most optimizers keep them
BYTES_A_PARAMETER = 12


@dataclass(frozen=True)
class WrittenPlace:
    """A directory of a setting, and the bytes that are to fit."""

    setting: str
    directory: Path
    needed: int


def check_settings(config: Configuration, around: Surroundings) -> Iterator[Finding]:
    """Whether a training with these settings would begin: its mesh, its data, what it begins with."""
    if "SLURM_JOB_ID" in around.environment:
        # one process a machine looks, where more will train: devices are not known
        runtime = config.runtime.model_copy(update={"coordinator_address": "a training's:1"})
        config = config.model_copy(update={"runtime": runtime})
    try:
        check_early(config)
    except UserError as error:
        text, _, mend = " ".join(str(error).split()).partition("; ")
        yield fault("settings", text, mend or "change that setting")
        return
    yield good("settings", f"read; data there: {_data_of(config)}")


def _data_of(config: Configuration) -> str:
    path = config.data.train if config.data.train is not None else config.data.path
    words = path if isinstance(path, str) else " ".join(str(word) for word in path)
    return words if len(words) < 80 else f"{words[:77]}..."


def places_of(config: Configuration, name: str) -> list[WrittenPlace]:
    """Where the run of that name would write."""
    parameters = _or_zero(lambda: config.family.num_parameters(config.model, config.data.sequence_length))
    # one more is written before the oldest is removed
    kept = config.checkpoint.keep + config.checkpoint.keep_best
    if config.checkpoint.keep_every is not None:
        kept += config.train.steps // config.checkpoint.keep_every
    needed = (kept + 1) * BYTES_A_PARAMETER * parameters
    places = [
        WrittenPlace("run.directory", Path(expand_home(config.run.directory or f"runs/{name}")), needed),
        WrittenPlace("data.cache_directory", cache_root(config.data.cache_directory), 0),
    ]
    if config.runtime.compilation_cache is not None:
        places.append(WrittenPlace("runtime.compilation_cache", Path(expand_home(config.runtime.compilation_cache)), 0))
    return places


def _or_zero(count: Callable[[], int]) -> int:
    try:
        return count()
    except UserError:
        # the settings' own check says it
        return 0
