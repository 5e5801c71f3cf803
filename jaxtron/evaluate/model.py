"""The model of a run, restored on the devices here, whatever mesh it was trained on; or one of Hugging Face weights."""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from jaxtron.config import UserError
from jaxtron.data.loader import validation_batches
from jaxtron.data.source import Source
from jaxtron.data.tokenizers import Tokenizer
from jaxtron.evaluate.request import EvaluateRequest
from jaxtron.run.configuration import Configuration
from jaxtron.run.restored import diverged, restore_model, tokenizer_of
from jaxtron.run.session import RunSession, make_session
from jaxtron.run.sizes import check_batch_fits, check_state_fits
from jaxtron.sharding.folding import BATCH_FLAGS, FLAGS
from jaxtron.typing import PyTree
from jaxtron.weights.load import load_parameters

WINDOWS_PER_PART = 8


@dataclass(frozen=True)
class EvaluatedModel:
    """A trained model on a mesh; made by `open_model`, used inside it."""

    session: RunSession
    params: PyTree
    tokenizer: Tokenizer | None
    """None where no text is scored."""
    origin: Path
    """Its checkpoints, or its weights."""
    step: int | None
    """Of a run."""
    batch: int
    sequence_length: int
    num_devices: int

    def nll(self, source: Source) -> float:
        """Sum of the negative log-likelihood, in nats, of all targets of a source, each times its weight.

        A `UserError` where it is not finite.
        """
        batches, name = self.session.batches, self.session.config.family.text_loss
        assert name is not None, "`read_configuration` refuses what scores no text"
        total, earlier = 0.0, None
        for batch in validation_batches(source, batch_size=self.batch, local_rows=batches.local_rows):
            nll = self.session.evaluate(self.params, batches.globalize(batch))[0][name]
            # read a step late, so that devices need not wait and batches do not pile up
            total += 0.0 if earlier is None else float(earlier)
            earlier = nll
        total += 0.0 if earlier is None else float(earlier)
        if not math.isfinite(total):
            raise self.diverged(f"its loss is {total}")
        return total

    def diverged(self, what: str) -> UserError:
        """The error for a model that is of no use."""
        if self.step is None:
            return UserError(f"the model of {self.origin} is of no use, {what}; with --train.precision fp32 it may be")
        return diverged(self.origin, self.step, what)


@contextlib.contextmanager
def open_model(request: EvaluateRequest, trained: Configuration, config: Configuration) -> Iterator[EvaluatedModel]:
    """The model of `read_configuration`, with the parameters of the checkpoint that is asked for."""
    devices = jax.devices()
    known = [getattr(config.mesh, axis) for axis in FLAGS]
    if -1 not in known and config.devices is None and jax.process_count() == 1:
        # too few devices are an error below
        devices = devices[: math.prod(known)]
    sizes = config.mesh.shape(len(devices))
    parts = math.prod(sizes[axis] for axis in BATCH_FLAGS)
    batch = request.batch or WINDOWS_PER_PART * parts
    if batch % parts:
        axes = " x ".join(f"mesh.{axis} {sizes[axis]}" for axis in BATCH_FLAGS)
        raise UserError(f"--batch {batch} is not a multiple of {axes} = {parts}")
    check_batch_fits("--batch", batch, config)
    session = make_session(config, devices, trains=False)
    with session.use():
        params, origin, step, extra = _restored(session, request, trained)
        yield EvaluatedModel(
            session=session,
            params=params,
            tokenizer=tokenizer_of(trained, config, extra) if request.token_ids is None else None,
            origin=origin,
            step=step,
            batch=batch,
            sequence_length=config.data.sequence_length,
            num_devices=len(devices),
        )


def _restored(
    session: RunSession, request: EvaluateRequest, trained: Configuration
) -> tuple[PyTree, Path, int | None, dict[str, Any]]:
    """Parameters, where they are from, their step, and what was saved beside them."""
    if not request.is_hub:
        restored = restore_model(session, request.run, trained, request.step)
        return restored.params, restored.checkpoints, restored.step, restored.extra
    model = session.config.model
    check_state_fits(session.config.family.sizes(model), session.blueprint.abstract, what="parameters")
    params = load_parameters(request.run, model, session.blueprint, session.trainer.partitions)
    return params, request.run, None, {}
