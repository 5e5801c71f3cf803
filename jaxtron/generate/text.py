"""Text that goes on from a few tokens, drawn from the model of a session."""

import numpy as np
from jaxtyping import Int32, Integer

from jaxtron.generate.sample import sample
from jaxtron.run.session import RunSession
from jaxtron.typing import PyTree


def continue_tokens(
    session: RunSession, params: PyTree, prompt: Integer[np.ndarray, "P"], *, num_tokens: int, vocab: int
) -> Int32[np.ndarray, "N"]:
    """`num_tokens` tokens after the prompt, all below `vocab`; drawn with the seed of the run.

    A `FloatingPointError` where the model's logits are not finite.
    """
    with session.use():
        return sample(
            session.trainer,
            params,
            prompt,
            num_tokens=num_tokens,
            window=session.config.data.sequence_length,
            vocab=vocab,
            seed=session.config.seed,
        )
