"""What of a run can be refused before JAX is imported, once its settings read."""

from jaxtron.config import UserError
from jaxtron.data.files.data_path import check_there
from jaxtron.run.beginning import check_beginning
from jaxtron.run.configuration import Configuration
from jaxtron.runtime.machine import known_devices


def check_early(config: Configuration) -> None:
    """`UserError` for what can be refused before JAX is imported: a mesh, a batch, a trace, names of files."""
    train = config.train
    if (devices := known_devices(config.runtime, config.devices)) is not None:
        config.check_mesh(config.mesh.shape(devices))
    elif train.global_batch % train.microbatches:
        raise UserError(
            f"train.global_batch {train.global_batch} is not a multiple of train.microbatches {train.microbatches}; "
            "change one of them"
        )
    if config.run.profile_steps is not None and config.run.profile_steps[1] > train.steps:
        first, last = config.run.profile_steps
        raise UserError(f"run.profile_steps {first} {last} ends after train.steps {train.steps}; end it earlier")
    if not config.family.reads_files:
        check_there(config.data)
    check_beginning(config)
