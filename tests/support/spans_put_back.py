"""The inverse of taking spans out of a text, as an oracle for the tests."""

import numpy as np
from jaxtyping import Int32

from jaxtron.data.masked.spans import SpanSample, SpanVocabulary


def put_back(sample: SpanSample, vocabulary: SpanVocabulary) -> Int32[np.ndarray, "N"]:
    """The text of a sample, with its prefix: each sentinel of the encoder replaced by what the targets say after it."""
    targets = sample.targets[sample.weights > 0]
    targets = targets[: int(np.argmax(targets == vocabulary.end))] if vocabulary.end in targets else targets
    text = sample.encoder_tokens[~sample.encoder_padding]
    places = np.flatnonzero(np.isin(targets, vocabulary.sentinels))
    spoken = {int(part[0]): part[1:] for part in np.split(targets, places)[1:]}
    return np.concatenate([np.asarray(spoken.get(token, [token]), np.int32) for token in text.tolist()])
