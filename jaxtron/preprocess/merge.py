"""Several pairs of token files to one."""

from jaxtron.data.indexed import IndexedReader, IndexedWriter
from jaxtron.preprocess.request import Merge


def merge(request: Merge) -> None:
    """Writes the pairs' documents in the order given; all must have one dtype, and modes or none."""
    first = IndexedReader(request.input[0])
    with IndexedWriter(request.output, first.dtype, multimodal=first.modes is not None) as writer:
        for prefix in request.input:
            writer.add_index(prefix)
