"""Several pairs of token files to one."""

from jaxtron.config import UserError
from jaxtron.data.files.reader import few
from jaxtron.data.megatron.indexed import IndexedReader, IndexedWriter
from jaxtron.preprocess.request import Merge
from jaxtron.preprocess.work import refuse_existing


def merge(request: Merge) -> None:
    """Writes the pairs' documents in the order given; all must have one dtype, and modes or none.

    UserError where the output is there and is not to be replaced, or would have no token.
    """
    if not request.overwrite:
        refuse_existing([request.output])
    first = IndexedReader(request.input[0])
    with IndexedWriter(request.output, first.dtype, multimodal=first.modes is not None) as writer:
        for prefix in request.input:
            writer.add_index(prefix)
        if not request.overwrite:
            refuse_existing([request.output])
        if not writer.num_tokens:
            raise UserError(f"no token in --input {few(request.input)}: nothing is written; give pairs with documents")
