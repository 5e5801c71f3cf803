"""Text to token ids to batches: `open_data` reads, `Loader` and `validation_batches` serve rows."""

from jaxtron.data.config import DataConfig
from jaxtron.data.dataset import Data, open_data
from jaxtron.data.loader import Loader, LocalBatch, LocalRows, validation_batches
from jaxtron.data.source import Sample, Source
from jaxtron.data.tokenizers import Tokenizer

__all__ = [
    "Data",
    "DataConfig",
    "Loader",
    "LocalBatch",
    "LocalRows",
    "Sample",
    "Source",
    "Tokenizer",
    "open_data",
    "validation_batches",
]
