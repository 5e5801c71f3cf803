"""What a model reads of a step: a dataclass whose fields say, in this one place, their axes, type and role.

One class is the sample of a source (without the axis of rows), a process's rows of a batch, the global batch and the
abstract batch of a plan; its fields are NumPy's arrays, JAX's or shapes. A pipeline's microbatches are its rows.
"""

import dataclasses
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import DTypeLike

BatchT = TypeVar("BatchT")
# the axes along which `mesh.context` splits: of a row's sequence, and of a second one of another length (a decoder's)
SEQUENCE, SECOND_SEQUENCE = "seq", "second_seq"
SEQUENCES = (SEQUENCE, SECOND_SEQUENCE)
FIELD = "jaxtron"


@dataclass(frozen=True)
class BatchField:
    """Logical axes after the rows', type, what the sum of a weight counts, and whether a source may leave it out."""

    axes: tuple[str, ...]
    dtype: np.dtype
    normalizer: str | None = None
    is_optional: bool = False


def rows(*axes: str, dtype: DTypeLike = np.int32, optional: bool = False) -> Any:
    """A field of a batch with these axes in each row; `SEQUENCES` are what `mesh.context` splits."""
    spec = BatchField(axes, np.dtype(dtype), is_optional=optional)
    if optional:
        return dataclasses.field(metadata={FIELD: spec}, default=None)
    return dataclasses.field(metadata={FIELD: spec})


def weight(*axes: str, normalizes: str) -> Any:
    """A field of float32 weights, 0 for padding, whose sum over the global batch is the count called `normalizes`.

    A step divides the weights by that count, so that a sum over them is a mean, however the batch is cut.
    """
    return dataclasses.field(metadata={FIELD: BatchField(axes, np.dtype(np.float32), normalizes)})


def batch_fields(batch_type: type) -> dict[str, BatchField]:
    """The fields of a batch's class by name."""
    return {field.name: field.metadata[FIELD] for field in dataclasses.fields(batch_type)}


def normalizers(batch_type: type) -> tuple[str, ...]:
    """Names of the counts of a batch's class, in the order of its weights."""
    return tuple(field.normalizer for field in batch_fields(batch_type).values() if field.normalizer is not None)


def present(batch: Any) -> Iterator[tuple[str, BatchField, Any]]:
    """Name, field and array of what a batch has."""
    for name, field in batch_fields(type(batch)).items():
        if (array := getattr(batch, name)) is not None:
            yield name, field, array


def map_batch(function: Callable[[BatchField, Any], Any], batch: BatchT) -> BatchT:
    """The batch with `function(field, array)` for each of its arrays."""
    return type(batch)(**{name: function(field, array) for name, field, array in present(batch)})


def stack_samples(samples: Sequence[BatchT]) -> BatchT:
    """Samples of one source as the rows of a batch; all of them have the same fields."""
    given = {name for name, _, _ in present(samples[0])}
    for sample in samples:
        for name, field, array in present(sample):
            assert array.dtype == field.dtype, f"{name} is {array.dtype}, but declared {field.dtype}"
        odd = given ^ {name for name, _, _ in present(sample)}
        assert not odd, f"a source gives {min(odd)} of all its samples or of none"
    return type(samples[0])(**{name: np.stack([getattr(sample, name) for sample in samples]) for name in given})


def make_batch(
    batch_type: type[BatchT],
    size: int,
    lengths: Mapping[str, int],
    given: Collection[str],
    make: Callable[[tuple[int, ...], np.dtype], Any],
) -> BatchT:
    """`make(shape, type)` for each field of a batch of `size` rows; of the optional ones for those `given`."""
    fields = batch_fields(batch_type).items()
    return batch_type(
        **{
            name: make((size, *(lengths[axis] for axis in field.axes)), field.dtype)
            for name, field in fields
            if not field.is_optional or name in given
        }
    )


def row_bytes(batch_type: type, lengths: Mapping[str, int], given: Collection[str] = ()) -> int:
    """Bytes of one row of a batch."""
    fields = [field for name, field in batch_fields(batch_type).items() if not field.is_optional or name in given]
    return sum(math.prod(lengths[axis] for axis in field.axes) * field.dtype.itemsize for field in fields)


@dataclass(frozen=True)
class TokenBatch:
    """Sequences to predict the next token of: ids, the id after each, what each prediction weighs in the loss.

    A source gives all of its samples positions, or none of them; segments likewise.
    """

    tokens: Int[Any, "*B S"] = rows(SEQUENCE)
    targets: Int[Any, "*B S"] = rows(SEQUENCE)
    weights: Float[Any, "*B S"] = weight(SEQUENCE, normalizes="tokens")
    positions: Int[Any, "*B S"] | None = rows(SEQUENCE, optional=True)
    """Places of the tokens, starting again at 0 in each document; none: those in the sequence."""
    segments: Int[Any, "*B S"] | None = rows(SEQUENCE, optional=True)
    """Documents by number: tokens see those of their own only; none: one document."""
