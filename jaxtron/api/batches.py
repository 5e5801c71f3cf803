"""Batches from what a caller has: token ids in any form, or text."""

from typing import Any

import jax
import numpy as np
from jaxtyping import Int32, Integer

from jaxtron.config import UserError
from jaxtron.data.batch import TokenBatch
from jaxtron.data.loader import LocalBatch
from jaxtron.models.families import program_of
from jaxtron.run.configuration import Configuration
from jaxtron.run.session import RunSession


def token_batch(
    config: Configuration,
    tokens: Any,
    targets: Any = None,
    weights: Any = None,
    positions: Any = None,
    segments: Any = None,
) -> TokenBatch:
    """Rows of `data.sequence_length` tokens as NumPy's arrays, checked; see `Session.batch`."""
    length, vocab = config.data.sequence_length, config.vocabulary_size()
    ids = _ids("tokens", tokens)
    if ids.ndim != 2 or not len(ids) or ids.shape[1] not in (length, length + 1):
        raise UserError(
            f"tokens has shape {ids.shape}: give rows of {length + 1:,} tokens, each to be predicted from those before "
            f"it, or of {length:,} (data.sequence_length), in an array of two dimensions"
        )
    if targets is not None and ids.shape[1] != length:
        raise UserError(f"tokens has rows of {ids.shape[1]:,}, and with targets of their own they have {length:,}")
    given = np.ones((len(ids), length), np.float32)
    if targets is not None:
        inputs, wanted = ids, _ids("targets", targets)
    elif ids.shape[1] == length:
        # nobody knows what follows the last
        inputs, wanted = ids, np.roll(ids, -1, 1)
        given[:, -1] = 0
    else:
        inputs, wanted = ids[:, :-1], ids[:, 1:]
    for name, array in (("tokens", ids), ("targets", wanted)):
        if vocab is not None and (array.min() < 0 or array.max() >= vocab):
            odd = int(array.min() if array.min() < 0 else array.max())
            raise UserError(f"{name} has {odd:,}, and the model's tokens are 0 to {vocab - 1:,} (model.vocab_size)")
    if weights is not None:
        given = _weights(weights)
    optional = {
        name: None if value is None else _ids(name, value)
        for name, value in (("positions", positions), ("segments", segments))
    }
    for name, array in (("targets", wanted), ("weights", given), *optional.items()):
        if array is not None and array.shape != inputs.shape:
            raise UserError(f"{name} has shape {array.shape}, and tokens are rows of {inputs.shape}: give one for each")
    return TokenBatch(np.ascontiguousarray(inputs), np.ascontiguousarray(wanted), given, **optional)


def check_rows(session: RunSession, rows: int) -> None:
    """A `UserError` for rows that a step does not take: devices share them evenly, in whole microbatches."""
    train, rules = session.config.train, session.rules
    parts = rules.size(rules.batch)
    each = train.global_batch // train.microbatches // parts
    if rows % parts or (rows // parts > each and rows // parts % each):
        most = f", or a multiple of {each * parts:,} (train.global_batch {train.global_batch:,} in "
        more = f"{most}{train.microbatches:,} microbatches)" if rows > each * parts else ""
        raise UserError(
            f"a batch of {rows:,} rows does not fit: give a multiple of mesh.data x mesh.fsdp = {parts:,}{more}"
        )


def placed_batch(session: RunSession, batch: Any, rows: int) -> Any:
    """The rows of every process on its devices, of a whole batch that all processes have."""
    mine = session.batches.local_rows(rows)
    arrays = jax.tree.map(lambda array: np.asarray(array)[mine], batch)
    return session.batches.globalize(LocalBatch(0, rows, rows, mine, arrays))


def check_batch(session: RunSession, batch: Any) -> None:
    """A `UserError` unless this session made the batch."""
    kind = program_of(session.config.model).batch
    if not isinstance(batch, kind):
        raise UserError(
            f"a step takes a batch that the session made, session.batch(tokens) or one of session.batches(), not "
            f"{type(batch).__name__}"
        )
    for leaf in jax.tree.leaves(batch):
        if not isinstance(leaf, jax.Array) or getattr(leaf.sharding, "mesh", None) != session.mesh:
            raise UserError("the batch lies elsewhere than the session's mesh: make it with this session's batch()")


def fill_rows(ids: Integer[np.ndarray, "T"], rows: int, length: int) -> Int32[np.ndarray, "B S"]:
    """A text's tokens cut into rows, begun again until there are so many."""
    if not len(ids):
        raise UserError("the text is empty: give one of a token or more")
    return np.resize(ids.astype(np.int32), (rows, length))


def _ids(name: str, given: Any) -> Int32[np.ndarray, "..."]:
    try:
        array = np.asarray(given)
    except ValueError:
        raise UserError(f"{name} has rows of different lengths; give rows of one length") from None
    if array.dtype.kind not in "iu":
        what = "an object or rows of different lengths" if array.dtype == object else str(array.dtype)
        raise UserError(f"{name} are whole numbers, ids of tokens, not {what}")
    if array.size and (int(array.max()) > 2**31 - 1 or int(array.min()) < -(2**31)):
        raise UserError(f"{name} has numbers beyond 32 bits; ids of tokens are smaller")
    return array.astype(np.int32)


def _weights(given: Any) -> np.ndarray:
    try:
        array = np.asarray(given).astype(np.float32)
    except (TypeError, ValueError):
        raise UserError("weights are numbers, one for each token; give an array of them") from None
    if not np.isfinite(array).all() or (array < 0).any():
        raise UserError("weights are finite numbers, 0 or above; 0 leaves a token out of the loss")
    return array
