"""`jaxtron.open_run` and `jaxtron.export`: what a training left, in a program again or as Hugging Face's files."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from jaxtron.api.html import html_lines
from jaxtron.api.session import Session
from jaxtron.api.settings import load
from jaxtron.checkpoint.finite import first_not_finite
from jaxtron.checkpoint.restore import restore_part
from jaxtron.config import UserError, expand_home
from jaxtron.convert.target import check_new
from jaxtron.convert.to_hub import write_weights
from jaxtron.convert.transfer import DTYPES, HF, TransferRequest, export_configuration
from jaxtron.run.configuration import CONFIG_FILE, Configuration
from jaxtron.run.history import changes, check_changes, recorded_settings
from jaxtron.run.metrics import read_metrics
from jaxtron.run.restored import diverged, has_model_alone
from jaxtron.run.state import TrainState
from jaxtron.train.initial import begin
from jaxtron.typing import Device

METRICS = "metrics.jsonl"


@dataclass(frozen=True)
class OpenedRun:
    """A run's directory as a session and the state of one of its checkpoints."""

    directory: Path
    session: Session
    state: TrainState

    @property
    def step(self) -> int:
        """Steps that the state has done."""
        return int(self.state.step)

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """A record of each logged step; empty where the run wrote none."""
        path = self.directory / METRICS
        return read_metrics(path) if path.is_file() else []

    def __repr__(self) -> str:
        return f"OpenedRun: step {self.step} of {self.directory}; {self.session!r}"

    def _repr_html_(self) -> str:
        return html_lines(repr(self))


def open_run(
    directory: str | Path, *, step: int | None = None, devices: Sequence[Device] | None = None, **overrides: Any
) -> OpenedRun:
    """The session and the state of a run, such as `runs/gpt_tiny`, on the devices here, whatever it was trained on.

    `step` is the checkpoint's (none: the newest). `overrides` are settings as `load` takes them, above all another
    layout, `mesh={"data": 1, "tensor": 2}`; what a run has once (its model, its data) cannot be another. Raises
    `UserError` where there is no such run or checkpoint, it is damaged or not finite, or does not fit the devices.
    """
    path = Path(expand_home(str(directory)))
    if not (path / CONFIG_FILE).is_file():
        what = f"{path} has no {CONFIG_FILE}" if path.is_dir() else f"no directory {path}"
        raise UserError(f"{what}; give the run.directory of a training, such as runs/gpt_tiny")
    if step is not None and (isinstance(step, bool) or not isinstance(step, int)):
        raise UserError(f"step {step!r}: give a whole number, or nothing for the newest checkpoint")
    session = Session(load(path / CONFIG_FILE, **overrides), devices=devices)
    checkpoints = (path / "checkpoints").absolute()
    if step is None and has_model_alone(checkpoints):
        return OpenedRun(path, session, begin(session.run, session.tokenizer.fingerprint, path)[0])
    run = session.run
    with run.use():
        abstract = {field.name: getattr(run.abstract_state(), field.name) for field in dataclasses.fields(TrainState)}
        order = run.layer_order
        restored = restore_part(
            checkpoints,
            order.abstract(abstract),
            step=step,
            check=partial(_check, config=session.config, directory=path),
            on_disk=order.on_disk(abstract),
        )
        state = TrainState(**order.in_stage_order(restored.state, abstract))
    name = first_not_finite(state)
    if name is not None:
        raise diverged(checkpoints, restored.step, f"{name} has numbers that are not finite")
    session.position = restored.extra.get("position", 0)
    return OpenedRun(path, session, state)


def export(run: str | Path, directory: str | Path, *, step: int | None = None, dtype: str | None = None) -> Path:
    """Writes a run's model as Hugging Face's files, config.json and safetensors, into a new directory; gives that.

    Adapters are merged into their weights. `step` is the checkpoint's (none: the newest), `dtype` fp32, fp16 or bf16
    (none: that of the weights it began with, else fp32). The same as `python -m jaxtron.convert --from RUN --to
    DIRECTORY`; one layer is in memory at a time. Raises `UserError` where no class of Hugging Face has such a model.
    """
    source, target = Path(expand_home(str(run))), Path(expand_home(str(directory)))
    if not (source / CONFIG_FILE).is_file():
        raise UserError(f"{source} has no {CONFIG_FILE}; give the directory of a run, such as Session.save writes")
    if dtype not in (None, *DTYPES):
        raise UserError(f"dtype {dtype!r}: give one of {', '.join(DTYPES)}, or nothing")
    check_new("directory", target)
    request = TransferRequest(source, target, str(source), HF, step=step, dtype=dtype)
    write_weights(request, *export_configuration(request))
    return target


def _check(extra: dict[str, Any], config: Configuration, directory: Path) -> None:
    recorded = recorded_settings(extra, directory)
    check_changes([] if recorded is None else changes(recorded, config), str(directory))
