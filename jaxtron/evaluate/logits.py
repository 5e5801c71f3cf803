"""Logits of rows of tokens, on any mesh: each device those of its rows, its part of them and of the vocabulary."""

import math
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import PartitionSpec
from jaxtyping import Int32

from jaxtron.config import UserError
from jaxtron.data.loader import LocalBatch
from jaxtron.evaluate.model import EvaluatedModel, open_model
from jaxtron.evaluate.request import EvaluateRequest
from jaxtron.evaluate.token_rows import TokenRows
from jaxtron.layers.positions import local_positions
from jaxtron.models.families import program_of
from jaxtron.models.program import Microbatch
from jaxtron.pipeline import executor
from jaxtron.pipeline.model import HeadOutput, Model, Outer, Stream
from jaxtron.pipeline.partition import forward_only
from jaxtron.run.configuration import Configuration
from jaxtron.run.step import Trainer, batch_spec
from jaxtron.runtime.memory_errors import out_of_memory_as_user_error
from jaxtron.runtime.start import start_runtime
from jaxtron.runtime.together import leaving_together
from jaxtron.sharding.collectives import all_reduce
from jaxtron.sharding.parameters import manual_specs
from jaxtron.sharding.regions import region
from jaxtron.sharding.rules import current
from jaxtron.typing import Array, Float, Int, PyTree

ROOM = "Lower --batch, or raise --mesh.fsdp, --mesh.tensor or --mesh.context"


def write_logits(request: EvaluateRequest, trained: Configuration, config: Configuration, rows: TokenRows) -> None:
    """Writes a .npy of float32 [row, token, vocabulary], whole or not at all."""
    program = program_of(config.model)
    if program.logits is None or program.token_rows is None:
        raise UserError(
            f"{request.run} has model.family {config.model.family}, which gives no logits of tokens alone: give a run "
            "of another family, such as decoder"
        )
    tokens = np.asarray(rows.answered, np.int32)
    start_runtime(config.runtime, devices=config.devices)
    config = with_length(config, max(len(rows.tokens[0]), tokens.shape[1]))
    path, vocabulary = request.logits, config.vocabulary_size()
    assert path is not None and vocabulary is not None
    with leaving_together(), out_of_memory_as_user_error(ROOM), open_model(request, trained, config) as model:
        unfinished = path.with_name(f".{path.name}.unfinished")
        is_first = jax.process_index() == 0
        try:
            shape = (*tokens.shape, vocabulary)
            into = np.lib.format.open_memmap(unfinished, "w+", np.float32, shape) if is_first else None
            for start, logits in batches_of_logits(model, rows):
                logits = logits[..., :vocabulary]
                if not np.isfinite(logits).all():
                    raise model.diverged("its logits are not finite")
                if into is not None:
                    into[start : start + len(logits)] = logits
            if into is not None:
                into.flush()
                _keep(unfinished, path)
        finally:
            unfinished.unlink(missing_ok=True)
        if is_first:
            print(f"logits of {len(tokens):,} x {tokens.shape[1]:,} tokens, {vocabulary:,} of each, in {path}")


def _keep(unfinished: Path, path: Path) -> None:
    with unfinished.open("rb") as file:
        os.fsync(file.fileno())
    try:
        unfinished.replace(path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; write elsewhere") from None


def with_length(config: Configuration, length: int) -> Configuration:
    """The configuration with sequences as long as the rows; where the mesh splits them, with room to split evenly.

    A `UserError` where the model has no positions for so many.
    """
    longest = getattr(config.model, "max_positions", None)
    if longest is not None and length > longest:
        raise UserError(
            f"--token_ids has rows of {length:,} tokens, and the model has {longest:,} positions: shorten them"
        )
    context, tensor = (max(1, getattr(config.mesh, axis)) for axis in ("context", "tensor"))
    parts = tensor * context * (2 if context > 1 else 1)
    # what follows a token changes nothing of it
    whole = math.ceil(length / parts) * parts
    data = config.data.model_copy(update={"sequence_length": whole})
    model = config.family.of_any_length(config.model)
    return config.model_copy(update={"data": data, "model": model}).resolved()


def batches_of_logits(model: EvaluatedModel, rows: TokenRows) -> Iterator[tuple[int, Float[np.ndarray, "B S V"]]]:
    """Logits of some rows at a time, with the number of the first; with the padding of the vocabulary."""
    session, num_rows, length = model.session, len(rows.tokens), len(rows.answered[0])
    whole = session.config.data.sequence_length
    shape = (math.ceil(num_rows / model.batch) * model.batch, whole)
    tokens, is_text = _filled(rows.tokens, shape), _filled(np.ones_like(rows.tokens), shape) > 0
    decoder_tokens = None if rows.decoder_tokens is None else _filled(rows.decoder_tokens, shape)
    run = jax.jit(partial(_logits, session.trainer))
    for start in range(0, num_rows, model.batch):
        own = session.batches.local_rows(model.batch)
        given = (None if array is None else array[start:][own] for array in (tokens, is_text, decoder_tokens))
        batch = session.trainer.program.token_rows(*given)
        batch = session.batches.globalize(LocalBatch(0, model.batch, model.batch, own, batch))
        logits, places = (_on_host(array) for array in run(model.params, batch))
        in_order = np.empty_like(logits)
        in_order[:, places] = logits
        yield start, in_order[: num_rows - start, :length]


def _filled(rows: Any, shape: tuple[int, int]) -> Int32[np.ndarray, "N S"]:
    """Rows as an array of this shape, with zeros behind them and behind the last."""
    found, given = np.zeros(shape, np.int32), np.asarray(rows, np.int32)
    found[: given.shape[0], : given.shape[1]] = given
    return found


def _logits(trainer: Trainer, params: PyTree, batch: Any) -> tuple[Float[Array, "B S V"], Int[Array, "S"]]:
    """Of a global batch, tokens in the order of the devices' pieces, and the place of each."""
    split = current().axes("context")
    specs = manual_specs(trainer.blueprint.parameters), batch_spec()
    lies = PartitionSpec(current().batch, split), PartitionSpec(split)
    return region(partial(_local, trainer), specs, lies)(params, batch)


def _local(trainer: Trainer, params: PyTree, batch: Any) -> tuple[Float[Array, "B S V"], Int[Array, "S"]]:
    program, parts = trainer.program, trainer.parts
    compute = program.logits
    assert compute is not None

    def head(outer: Outer, stream: Stream, _microbatch: Microbatch[Any]) -> HeadOutput:
        # no loss, for nothing is trained
        return HeadOutput(jnp.float32(0.0), {"logits": compute(parts, outer, stream).astype(jnp.float32)})

    microbatches, table = trainer.microbatches(batch, 1), forward_only(trainer.stages)
    model = Model(program.model(parts, None).stacks, head)
    sums = executor.run(table, trainer.stages, model, trainer.working(params), microbatches).sums
    length = microbatches.batch.tokens.shape[-1]
    # only the last stage has any
    return all_reduce(sums["logits"], current().axes("pipe")), local_positions(length)


def _on_host(array: Array) -> np.ndarray:
    """A global array, whole on every process."""
    if array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))
