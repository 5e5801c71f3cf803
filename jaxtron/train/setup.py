"""From a configuration to a run that is ready to step: mesh, data, trainer, directory, state."""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax

from jaxtron.checkpoint.keeping import LOSS
from jaxtron.checkpoint.manager import Checkpoints
from jaxtron.checkpoint.restore import Check, committed_steps
from jaxtron.checkpoint.tiers.copies import Copies, FoundCopy
from jaxtron.checkpoint.tiers.places import homes
from jaxtron.config import UserError
from jaxtron.data.dataset import Data, open_data, wrapped
from jaxtron.data.loader import Loader
from jaxtron.models.families import program_of
from jaxtron.optim.batch_ramp import batch_size, check_batch_ramp
from jaxtron.run.beginning import beginning_of, beginning_settings
from jaxtron.run.configuration import Configuration
from jaxtron.run.history import Continuation, changes, check_changes, listed, recorded_settings
from jaxtron.run.metrics import MetricsTally
from jaxtron.run.restored import has_model_alone
from jaxtron.run.session import RunSession, make_session
from jaxtron.run.sizes import check_batch_fits, check_state_fits
from jaxtron.run.state import TrainState
from jaxtron.train.divergence import check_state
from jaxtron.train.initial import begin
from jaxtron.train.run_lock import run_lock
from jaxtron.train.trackers import import_tracker


@dataclass(frozen=True)
class Run:
    """Everything a training loop needs; made by `open_run`."""

    session: RunSession
    directory: Path
    data: Data
    checkpoints: Checkpoints
    state: TrainState
    step: int
    position: int
    continuation: Continuation
    tally: MetricsTally
    copies: Copies | None = None
    """Of the state, beside its checkpoints; None where there are none."""
    tier: str = ""
    """Where the state was found, `memory` or `local`, if not in a checkpoint."""
    origin: Mapping[str, Any] = field(default_factory=dict)
    """What the history says of where the model of its first step comes from, if it was not drawn."""

    @property
    def config(self) -> Configuration:
        """The settings, resolved."""
        return self.session.config

    def save(
        self,
        step: int,
        state: TrainState,
        position: int,
        tally: MetricsTally,
        validation_loss: float | None = None,
    ) -> None:
        """Save a checkpoint of the state after this step, with the position of the data after it, and its loss."""
        extra = self.extra(position, tally) | {LOSS: validation_loss}
        order = self.session.layer_order
        self.checkpoints.save(step, order.in_model_order(state), extra, order.on_disk(state))

    def extra(self, position: int, tally: MetricsTally) -> dict[str, Any]:
        """What a state is saved with, so that a command may go on from it."""
        return {
            "position": position,
            "tally": asdict(tally),
            "data": self.data.fingerprint,
            "tokenizer": self.data.tokenizer.fingerprint,
            "seed": self.config.seed,
            "settings": self.config.model_dump(mode="json"),
        }

    def train_loader(self) -> Loader:
        """Batches from the run's position on."""
        train = self.config.train
        # plain data and functions of modules, which processes that read can be sent
        size = partial(batch_size, train.batch_ramp, train.global_batch)
        rows = {
            found: self.session.batches.local_rows(found)
            for found in check_batch_ramp(train.batch_ramp, train.global_batch, 1)
        }
        return self.data.train_loader(batch_size=size, local_rows=rows.__getitem__, position=self.position)


@contextlib.contextmanager
def open_run(config: Configuration, name: str) -> Iterator[Run]:
    """A run on all devices, resumed from its directory's newest checkpoint where there is one.

    Nothing is written before everything that can be checked was: a `UserError` leaves no half-made directory. Where
    there are steps to take, the directory is locked.
    """
    for name in config.run.trackers:
        # missing packages are told before anything is made
        import_tracker(name)
    session = make_session(config, jax.devices())
    config = session.config
    check_batch_fits("train.global_batch", config.train.global_batch, config)
    if jax.process_index() == 0:
        print("reading the data", flush=True)
    data = open_samples(config)
    if config.checkpoint.keep_best and not len(data.validation):
        raise UserError(
            f"checkpoint.keep_best {config.checkpoint.keep_best}: the data have nothing to validate on, so no "
            "checkpoint is the best; leave it out, or give data.validation_fraction or data.validation"
        )
    # before anything is made in the run's own
    homes(config.checkpoint)
    with session.use(), contextlib.ExitStack() as stack:
        abstract = session.abstract_state()
        check_state_fits(config.family.sizes(config.model), abstract, what="training state")
        directory = Path(config.run.directory or f"runs/{name}")
        if not directory.exists():
            stack.callback(_remove_empty, directory / "checkpoints", directory)
        lock = stack.enter_context(contextlib.ExitStack())
        newest = max(committed_steps(directory / "checkpoints"), default=0)
        if newest == 0 and (beginning := beginning_of(config)) is not None:
            # it has to be there now, before anything is made
            beginning_settings(beginning)
        # a complete run is only looked at, even while another command goes on with it
        is_complete = newest >= config.train.steps
        if not is_complete:
            lock.enter_context(run_lock(directory))
        checkpoints = Checkpoints(directory / "checkpoints", config.checkpoint, writes=not is_complete)
        stack.callback(checkpoints.close)
        check = partial(check_record, config=config, data=data, directory=directory)
        origin: dict[str, Any] = {}
        copies = None
        if not is_complete and (config.checkpoint.memory_every or config.checkpoint.local_every):
            copies = Copies(config.checkpoint, directory, session.mesh, abstract, repr(session.trainer.partitions))
            stack.callback(copies.close)
        resumes = config.checkpoint.resume
        own = directory if resumes and has_model_alone(checkpoints.directory) else None
        restored = restore_state(session, checkpoints, copies, check, resumes=resumes, is_model_alone=own is not None)
        if restored is None:
            (state, origin), step, position, continuation = (
                begin(session, data.tokenizer.fingerprint, own),
                0,
                0,
                Continuation(),
            )
        else:
            state, step, position = restored.state, restored.step, restored.extra["position"]
            continuation = Continuation.of(restored.extra, config, directory, step=step)
        if is_complete and step < config.train.steps:
            # the newest was damaged
            lock.enter_context(run_lock(directory))
        yield Run(
            session=session,
            directory=directory,
            data=data,
            checkpoints=checkpoints,
            state=state,
            step=step,
            position=position,
            continuation=continuation,
            copies=copies,
            tier="" if restored is None else restored.tier,
            origin=origin,
            tally=MetricsTally() if restored is None else MetricsTally.of(restored.extra, config.data.sequence_length),
        )


def go_back(run: Run, position: int | None) -> Run:
    """The run as its newest checkpoint has it (none: its first state), to go on with the data from `position` on.

    None: from the checkpoint's own.
    """
    session, config = run.session, run.config
    run.checkpoints.wait()
    with session.use():
        own = run.directory if has_model_alone(run.checkpoints.directory) else None
        check = partial(check_record, config=config, data=run.data, directory=run.directory)
        restored = restore_state(session, run.checkpoints, run.copies, check, is_model_alone=own is not None)
        if restored is None:
            state, _ = begin(session, run.data.tokenizer.fingerprint, own)
            return replace(run, state=state, step=0, position=position or 0, tally=MetricsTally(), tier="")
    return replace(
        run,
        state=restored.state,
        step=restored.step,
        position=restored.extra["position"] if position is None else position,
        tally=MetricsTally.of(restored.extra, config.data.sequence_length),
        tier=restored.tier,
    )


def restore_state(
    session: RunSession,
    checkpoints: Checkpoints,
    copies: Copies | None,
    check: Check,
    *,
    resumes: bool = True,
    is_model_alone: bool,
) -> FoundCopy | None:
    """The newest state of all places, finite and as `abstract_state`; None where a run begins.

    A model alone, of which nothing was trained yet, is no state, but there may be copies that are newer. Copies of
    later steps than what is found are removed. Where the run does not resume, a `UserError` if there are checkpoints.
    """
    abstract, order, newest = session.abstract_state(), session.layer_order, checkpoints.latest_step() or 0
    found = copies.restore(newer_than=newest, check=check) if copies is not None and resumes else None
    if found is None and not is_model_alone:
        restore = checkpoints.go_back if resumes else checkpoints.restore
        saved = restore(order.abstract(abstract), check, order.on_disk(abstract))
        if saved is not None and copies is not None and saved.step < newest:
            # the newest was damaged
            found = copies.restore(newer_than=saved.step, check=check)
        if saved is not None and found is None:
            found = FoundCopy("", saved.step, order.in_stage_order(saved.state, abstract), saved.extra)
    if found is not None:
        check_state(checkpoints, found.step, found.state)
    if copies is not None:
        copies.drop_after(0 if found is None else found.step)
    return found


def open_samples(config: Configuration) -> Data:
    """The data as the model's family reads it, opened by that where it opens its own; `UserError` for bad input."""
    program, given = program_of(config.model), {"seed": config.seed, "train_samples": config.train_samples()}
    if program.open_data is not None:
        data = program.open_data(config.model, config.data, **given)
        check_vocabulary(config, data)
        return data
    data = open_data(config.data, **given)
    check_vocabulary(config, data)
    return wrapped(data, lambda source: program.source(config.model, source, data.tokenizer))


def check_vocabulary(config: Configuration, data: Data) -> None:
    """`UserError` unless the model has an entry for every token."""
    name, known = config.family.vocabulary, config.vocabulary_size()
    if known is not None and data.tokenizer.vocab_size > known:
        raise UserError(
            f"the tokenizer {config.data.tokenizer} has {data.tokenizer.vocab_size} tokens, more than model.{name} "
            f"{known}; give the model's with --data.tokenizer, or set --model.{name} {data.tokenizer.vocab_size}"
        )


def check_record(extra: dict[str, Any], config: Configuration, data: Data, directory: Path) -> None:
    """`UserError` unless what a checkpoint of the directory was trained with is what this configuration trains."""
    if type(extra.get("position")) is not int or not isinstance(extra.get("data"), str):
        raise UserError(
            f"the newest checkpoint in {directory} has a record that no training wrote, without its position or data; "
            "bring back a good copy, or choose another --run.directory"
        )
    recorded = recorded_settings(extra, directory)
    found = [] if recorded is None else changes(recorded, config)
    check_changes(found, str(directory))
    if extra["data"] != data.fingerprint:
        # more steps are other data only where samples are in Megatron's order
        causes = [change for change in found if change.name.startswith("data.")]
        causes = causes or [change for change in found if change.name == "train.steps"]
        raise UserError(
            f"{directory} was trained on other data ({listed(causes) or 'the text itself has changed'}), so its "
            "position means nothing here; bring that back, or choose another --run.directory"
        )
    if extra.get("tokenizer", data.tokenizer.fingerprint) != data.tokenizer.fingerprint:
        causes = [change for change in found if change.name in ("data.tokenizer", "data.end_of_document")]
        raise UserError(
            f"{directory} was trained with another tokenizer ({listed(causes) or 'its file has changed'}); bring that "
            "back, or choose another --run.directory"
        )


def _remove_empty(*folders: Path) -> None:
    """Remove those without contents: what a run that could not begin would leave."""
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()
