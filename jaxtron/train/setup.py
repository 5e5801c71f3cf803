"""From a configuration to a run that is ready to step: mesh, data, trainer, directory, state."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxtron.checkpoint.layer_order import LayerOrder, layer_order
from jaxtron.checkpoint.manager import Checkpoints
from jaxtron.checkpoint.restore import committed_steps
from jaxtron.config import UserError
from jaxtron.data.dataset import Data, open_data
from jaxtron.data.loader import Loader
from jaxtron.models.decoder.model import Decoder
from jaxtron.optim.batch_ramp import batch_size, check_batch_ramp
from jaxtron.pipeline.partition import Partition
from jaxtron.run.attention import choose_attention
from jaxtron.run.batches import Placement
from jaxtron.run.configuration import Configuration
from jaxtron.run.dtypes import DTYPES
from jaxtron.run.history import Continuation, changes, check_changes, listed, recorded_settings
from jaxtron.run.metrics import Tally
from jaxtron.run.sizes import check_batch_fits, check_state_fits
from jaxtron.run.step import Trainer, TrainState, batch_sharding
from jaxtron.sharding.blueprint import blueprint
from jaxtron.sharding.mesh import build_mesh
from jaxtron.sharding.rules import current, make_rules, use
from jaxtron.train.divergence import check_state
from jaxtron.train.run_lock import run_lock
from jaxtron.train.trackers import import_tracker
from jaxtron.typing import Array, PyTree


@dataclass(frozen=True)
class Run:
    """Everything a training loop needs; made by `open_run`."""

    config: Configuration
    directory: Path
    data: Data
    trainer: Trainer
    placement: Placement
    checkpoints: Checkpoints
    layer_order: LayerOrder
    evaluate: Callable[[PyTree, Any], tuple[Array, Array]]
    state: TrainState
    step: int
    position: int
    continuation: Continuation
    tally: Tally

    def save(self, step: int, state: TrainState, position: int, tally: Tally) -> None:
        """Save a checkpoint of the state after this step, with the position of the data after it."""
        extra = {
            "position": position,
            "tally": asdict(tally),
            "data": self.data.fingerprint,
            "tokenizer": self.data.tokenizer.fingerprint,
            "seed": self.config.seed,
            "settings": self.config.model_dump(mode="json"),
        }
        order = self.layer_order
        self.checkpoints.save(step, order.in_model_order(state), extra, order.on_disk(state))

    def train_loader(self) -> Loader:
        """Batches from the run's position on."""
        train = self.config.train
        # plain data and functions of modules, which processes that read can be sent
        size = partial(batch_size, train.batch_ramp, train.global_batch)
        rows = {
            found: self.placement.local_rows(found)
            for found in check_batch_ramp(train.batch_ramp, train.global_batch, 1)
        }
        return self.data.train_loader(batch_size=size, local_rows=rows.__getitem__, position=self.position)


@contextlib.contextmanager
def open_run(config: Configuration, name: str) -> Iterator[Run]:
    """A run on all devices, resumed from its directory's newest checkpoint where there is one.

    Nothing is written before everything that can be checked was: a `UserError` leaves no half-made directory. Where
    there are steps to take, the directory is locked.
    """
    config = config.resolved()
    devices = jax.devices()
    sizes = config.mesh.shape(len(devices))
    config.check_mesh(sizes)
    choose_attention(config, sizes["context"], devices[0].device_kind)
    check_records(config)
    check_batch_fits("train.global_batch", config.train.global_batch, config.data.sequence_length)
    mesh = build_mesh(config.mesh, devices)
    if jax.process_index() == 0:
        print("reading the data", flush=True)
    data = open_data(config.data, seed=config.seed, train_samples=config.train_samples())
    check_vocabulary(config, data)
    with use(make_rules(mesh, config.sharding, config.context)), contextlib.ExitStack() as stack:
        trainer = make_trainer(config)
        abstract = _placed(trainer.abstract_state(), mesh)
        check_state_fits(config.family.sizes(config.model), abstract, what="training state")
        order = layer_order(trainer.partition, trainer.blueprint)
        directory = Path(config.run.directory or f"runs/{name}")
        if not directory.exists():
            stack.callback(_remove_empty, directory / "checkpoints", directory)
        lock = stack.enter_context(contextlib.ExitStack())
        newest = max(committed_steps(directory / "checkpoints"), default=0)
        # a complete run is only looked at, even while another command goes on with it
        is_complete = newest >= config.train.steps
        if not is_complete:
            lock.enter_context(run_lock(directory))
        checkpoints = Checkpoints(directory / "checkpoints", config.checkpoint, writes=not is_complete)
        stack.callback(checkpoints.close)
        check = partial(check_record, config=config, data=data, directory=directory)
        restored = checkpoints.restore(order.abstract(abstract), check, order.on_disk(abstract))
        if restored is None:
            state, step, position, continuation = trainer.initial_state(), 0, 0, Continuation()
        else:
            state = order.in_stage_order(restored.state, abstract)
            check_state(checkpoints, restored.step, state)
            step, position = restored.step, restored.extra["position"]
            continuation = Continuation.of(restored.extra, config, directory, step=step)
        if is_complete and step < config.train.steps:
            # the newest was damaged
            lock.enter_context(run_lock(directory))
        yield Run(
            config=config,
            directory=directory,
            data=data,
            trainer=trainer,
            placement=Placement(batch_sharding()),
            checkpoints=checkpoints,
            layer_order=order,
            evaluate=jax.jit(trainer.evaluate),
            state=state,
            step=step,
            position=position,
            continuation=continuation,
            tally=Tally() if restored is None else Tally.of(restored.extra, config.data.sequence_length),
        )


def make_trainer(config: Configuration) -> Trainer:
    """The trainer of a resolved configuration, inside `sharding.use(rules)`."""
    stages = config.partition(current().mesh.shape["pipe"])
    plan = blueprint(partial(_build, config, stages), layers=stages.num_layers)
    return Trainer(plan, config.model, config.train, config.optimizer, config.pipeline, stages, config.seed)


def check_vocabulary(config: Configuration, data: Data) -> None:
    """`UserError` unless the model has an entry for every token."""
    if data.tokenizer.vocab_size > config.model.vocab_size:
        raise UserError(
            f"the tokenizer {config.data.tokenizer} has {data.tokenizer.vocab_size} tokens, more than "
            f"model.vocab_size {config.model.vocab_size}; set --model.vocab_size {data.tokenizer.vocab_size}"
        )


def check_records(config: Configuration) -> None:
    """`UserError` for a tracker whose package is missing, and a trace that would not end with the run."""
    for name in config.run.trackers:
        import_tracker(name)
    if config.run.profile_steps is not None and config.run.profile_steps[1] > config.train.steps:
        first, last = config.run.profile_steps
        raise UserError(f"run.profile_steps {first} {last} ends after train.steps {config.train.steps}; end it earlier")


def check_record(extra: dict[str, Any], config: Configuration, data: Data, directory: Path) -> None:
    """`UserError` unless what a checkpoint of the directory was trained with is what this configuration trains."""
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


def _build(config: Configuration, stages: Partition, rngs) -> Decoder:
    return Decoder(config.model, dtype=DTYPES[config.train.precision], partition=stages, rngs=rngs)


def _remove_empty(*folders: Path) -> None:
    """Remove those without contents: what a run that could not begin would leave."""
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()


def _placed(abstract: TrainState, mesh: Mesh) -> TrainState:
    """The abstract state with its shardings on the mesh's devices, where arrays can be restored to."""

    def place(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        spec = PartitionSpec() if leaf.sharding is None else leaf.sharding.spec
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree.map(place, abstract)
