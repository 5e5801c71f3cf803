"""What tells where in a text an answer begins and ends: two numbers of each token (1810.04805 sec. 4.2)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxtron.layers.inputs import LayerInputs
from jaxtron.layers.linear import Linear
from jaxtron.layers.positions import local_positions
from jaxtron.models.bert.config import BertConfig
from jaxtron.models.bert.stack import Texts
from jaxtron.sharding.rules import constrain, current
from jaxtron.typing import Array, Bool, Float, Int

# the logit of a place that nothing can be at
NOWHERE = -1e30


class AnswerHead(nnx.Module):
    """Logits in float32 of an answer beginning, and of one ending, at each token."""

    def __init__(self, config: BertConfig, rngs: nnx.Rngs) -> None:
        inputs = {"embed": config.hidden_size}
        # of a choice among places the softmax ignores what all have
        self.dense = Linear(inputs, {"choice": 2}, bias=False, std=config.initial_std, rngs=rngs)

    def __call__(self, x: Float[Array, "B S E"]) -> Float[Array, "B S 2"]:
        # on one tensor part a sequence that is not named as split is multiplied as one matrix
        part = "seq" if current().parts("tensor") > 1 else "full_seq"
        read = constrain(x, "batch", part, "embed")
        return self.dense(read, "batch", part, None, inputs=LayerInputs()).astype(jnp.float32)


class AnswerSums(NamedTuple):
    """Weighted sums over rows: the loss, answers found to the token, and what those found share with the right ones."""

    loss: Float[Array, ""]
    exact: Float[Array, ""]
    overlap: Float[Array, ""]


def answer_sums(
    logits: Float[Array, "B S 2"], texts: Texts, label: Int[Array, "B"], weights: Float[Array, "B"], longest: int
) -> AnswerSums:
    """Of the cross-entropies of both ends, whose mean is the loss, and of the likeliest answer.

    An answer is a stretch of the second part of at most `longest` tokens, or none, which is said at the first token.
    `overlap` is the F1 of an answer's places: 2 x common / (found + right).
    """
    logits, types, segments = (_whole_rows(array) for array in (logits, texts.token_types, texts.segments))
    length = logits.shape[1]
    right = jnp.stack([label // length, label % length], axis=-1)
    logits = jnp.where((segments > 0)[..., None], logits, NOWHERE)
    nll = jax.nn.logsumexp(logits, axis=1) - jnp.take_along_axis(logits, right[:, None], axis=1)[:, 0]
    found = _likeliest(jax.lax.stop_gradient(logits), _answers(types), longest)
    is_right = (found == right).all(-1)
    sizes = [ends[:, 1] - ends[:, 0] + 1 for ends in (found, right)]
    common = jnp.minimum(found[:, 1], right[:, 1]) - jnp.maximum(found[:, 0], right[:, 0]) + 1
    overlap = 2 * jnp.maximum(common, 0) / (sizes[0] + sizes[1])
    return AnswerSums((weights * nll.mean(-1)).sum(), (weights * is_right).sum(), (weights * overlap).sum())


def _answers(types: Int[Array, "B S"]) -> Bool[Array, "B S"]:
    """Tokens of the second part, without the `[SEP]` after it."""
    return (types == 1) & (jnp.roll(types, -1, axis=1) == 1)


def _likeliest(logits: Float[Array, "B S 2"], may_be: Bool[Array, "B S"], longest: int) -> Int[Array, "B 2"]:
    """The first and the last place of the stretch with the largest sum of logits, or twice the first token."""
    length = logits.shape[1]
    scores = logits[:, :, None, 0] + logits[:, None, :, 1]
    size = jnp.arange(length)[None, :] - jnp.arange(length)[:, None]
    fits = may_be[:, :, None] & may_be[:, None, :] & (size >= 0) & (size < longest)
    is_none = (jnp.arange(length)[:, None] == 0) & (jnp.arange(length)[None, :] == 0)
    best = jnp.where(fits | is_none, scores, NOWHERE).reshape(len(logits), -1).argmax(-1)
    return jnp.stack([best // length, best % length], axis=-1)


def _whole_rows(x: Array) -> Array:
    """`[B, S, ...]` of all of each row, on every device that has a part of it."""
    rules = current()
    names = ("batch", "full_seq", None)[: x.ndim]
    x = constrain(x, *names)
    parts = rules.parts("context")
    if parts == 1:
        return x
    # each device's places in a row of zeros: of one summand not 0 the sum is exact
    whole = jnp.zeros((len(x), parts * x.shape[1], *x.shape[2:]), x.dtype)
    whole = constrain(whole.at[:, local_positions(x.shape[1])].set(x), *names)
    return jax.lax.psum(whole, rules.axes("context"))
