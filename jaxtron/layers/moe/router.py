"""The router of a mixture: which experts a token is sent to, with which weights, and what keeps their load even."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn import initializers

from jaxtron.layers.inputs import LayerInputs, random_bits
from jaxtron.layers.linear import normal
from jaxtron.layers.moe.capacity import TOKENS, drop_excess
from jaxtron.layers.moe.config import MoeConfig, Scores
from jaxtron.layers.saved import save_for_backward
from jaxtron.sharding.collectives import all_reduce
from jaxtron.sharding.parameters import buffer, parameter
from jaxtron.sharding.regions import on_each_device
from jaxtron.sharding.rules import current, spec
from jaxtron.typing import Array, Float, Int

# tokens of each expert, before any is dropped
LOAD = "moe/load"
# what is drawn beside a branch's dropout
JITTER, DROPS = 1, 2


class Routing(NamedTuple):
    """What the router decides for each token, and what it reports."""

    weights: Float[Array, "B S K"]
    chosen: Int[Array, "B S K"]
    loss: Float[Array, ""] | None
    """This device's part of the losses that keep load even; None where there are none."""
    metrics: dict[str, Float[Array, "..."]]


class Router(nnx.Module):
    """Logits in float32, `top_k` experts of each token by them."""

    def __init__(self, embed: int, config: MoeConfig, *, bias: bool, std: float, rngs: nnx.Rngs) -> None:
        self.config = config
        shape = (embed, config.num_experts)
        self.kernel = parameter(rngs, normal(std), shape, axes=("embed", "choice"), role="router")
        choices = {"shape": (config.num_experts,), "axes": ("choice",)}
        # that of the logits, and one that only chooses
        self.logit_bias = parameter(rngs, initializers.zeros, **choices, role="bias") if bias else None
        self.bias = buffer(**choices) if config.bias_rate else None

    def __call__(self, x: Float[Array, "B S E"], inputs: LayerInputs) -> Routing:
        config = self.config
        layout = spec(*TOKENS)
        if config.jitter and inputs.keys is not None:
            x = x * jittered(x.shape, config.jitter, inputs).astype(x.dtype)
        # sums in float32 of products that are exact in it
        logits = jax.lax.dot_general(
            x.astype(jnp.float32),
            self.kernel[...],
            (((2,), (0,)), ((), ())),
            precision=jax.lax.Precision.HIGHEST,
            out_sharding=layout,
        )
        if self.logit_bias is not None:
            logits = logits + self.logit_bias[...]
        scores = jax.nn.sigmoid(logits) if config.scores == "sigmoid" else jax.nn.softmax(logits, -1)
        ranked = scores if config.scores == "sigmoid" or self.bias is not None else logits
        if self.bias is not None:
            ranked = ranked + self.bias[...]
        chosen = save_for_backward(_choose(config, jax.lax.stop_gradient(ranked)))
        # selected by comparison: the derivative of a gather would be a scatter
        numbers = jax.lax.broadcasted_iota(
            jnp.int32, (*chosen.shape, config.num_experts), 3, out_sharding=spec(*TOKENS, None)
        )
        is_chosen = numbers == chosen[..., None]
        weights = self._weights(logits, scores, is_chosen)
        load = is_chosen.sum((2,), dtype=jnp.float32)
        loss = self._loss(logits, scores, load, inputs)
        sums = {LOAD: load.sum((0, 1)), "moe/entropy": _entropy(logits, config.scores)}
        if config.capacity_factor is not None:
            chosen = save_for_backward(drop_excess(config, chosen, weights, inputs.fold(DROPS).keys))
            sums["moe/dropped"] = jnp.sum(chosen == config.num_experts, dtype=jnp.float32)
        return Routing(weights, chosen, loss, jax.tree.map(jax.lax.stop_gradient, sums))

    def _weights(self, logits: Array, scores: Array, is_chosen: Array) -> Float[Array, "B S K"]:
        config = self.config

        def of_chosen(values: Array) -> Array:
            return jnp.sum(jnp.where(is_chosen, values[:, :, None], 0.0), -1)

        if config.scores == "topk_softmax":
            return config.scaling * jax.nn.softmax(of_chosen(logits), -1)
        weights = of_chosen(scores)
        if config.renormalize:
            weights = weights / (weights.sum(-1, keepdims=True) + 1e-20)
        return config.scaling * weights

    def _loss(self, logits: Array, scores: Array, load: Array, inputs: LayerInputs) -> Float[Array, ""] | None:
        """Sums over the device's rows, each with its share of the step's loss.

        Of a sequence of S tokens the balance is N / (k S^2) sum over experts of (sum of a token's scores) x (its
        tokens in as many), 1 where load is even.
        """
        config, rules = self.config, current()
        if inputs.row_weights is None or not (config.balance or config.z_loss):
            return None
        length = logits.shape[1] * rules.parts("context")
        total = jnp.zeros((), jnp.float32)
        if config.balance:
            if config.scores == "sigmoid":
                scores = scores / scores.sum(-1, keepdims=True)
            counts = self._counts(jax.lax.stop_gradient(load), length, inputs)
            even = config.num_experts / (config.top_k * length**2)
            of_rows = even * jnp.sum(scores.sum(1) * counts, -1)
            total += config.balance * jnp.sum(of_rows * inputs.row_weights)
        if config.z_loss:
            of_rows = jnp.square(jax.nn.logsumexp(logits, -1)).sum(1) / length
            total += config.z_loss * jnp.sum(of_rows * inputs.row_weights)
        return total

    def _counts(self, load: Array, length: int, inputs: LayerInputs) -> Float[Array, "rows N"]:
        """Each expert's tokens in a sequence: in each by itself, or (one row) in one with the load of many.

        They have no gradient, so a device's part of the loss needs nothing of the others but these.
        """
        config, rules = self.config, current()
        if config.balance_over == "sequence":
            return all_reduce(load.sum(1), rules.axes("context"))
        counts = load.sum((0, 1))
        if config.balance_over == "global" and inputs.load is not None:
            counts += inputs.load[0]
        counts = all_reduce(counts, (*rules.batch, *rules.axes("context")))
        # a few numbers, and else every device would ask the others again in the backward
        return save_for_backward(counts * (config.top_k * length / counts.sum()))[None]


def evened(bias: Float[Array, "L N"], load: Float[Array, "L N"], rate: float) -> Float[Array, "L N"]:
    """The selection bias after a step of this load: raised where it is below the mean (2408.15664, Algorithm 1)."""
    return bias + rate * jnp.sign(load.mean(-1, keepdims=True) - load)


def _entropy(logits: Float[Array, "B S N"], scores: Scores) -> Float[Array, ""]:
    """Of the scores as a distribution over the experts, summed over the tokens, in nats."""
    if scores == "sigmoid":
        logits = jax.nn.log_sigmoid(logits)
    log = jax.nn.log_softmax(logits, -1)
    return -jnp.sum(jnp.exp(log) * log)


def jittered(shape: tuple[int, ...], jitter: float, inputs: LayerInputs) -> Float[Array, "B S E"]:
    """Random numbers in 1 +- jitter, of 16 bits, the same on every mesh."""
    drawn = random_bits(shape, inputs.fold(JITTER), "batch", "seq", "embed").astype(jnp.float32)
    return 1.0 + jitter * (drawn * (2.0 / 65535.0) - 1.0)


def _choose(config: MoeConfig, ranked: Float[Array, "B S N"]) -> Int[Array, "B S K"]:
    """Each token's best experts, of a device's own tokens: left to XLA, all are gathered over tensor first."""

    def local(ranked: Array) -> Array:
        if config.groups > 1:
            of_groups = ranked.reshape(*ranked.shape[:2], config.groups, -1)
            best = jax.lax.top_k(of_groups, 1 if config.group_score == "largest" else 2)[0].sum(-1)
            groups = jax.lax.top_k(best, config.top_groups)[1]
            is_open = jnp.any(groups[..., None] == jnp.arange(config.groups), 2)
            ranked = jnp.where(is_open[..., None], of_groups, -jnp.inf).reshape(ranked.shape)
        return jax.lax.top_k(ranked, config.top_k)[1]

    layout = spec(*TOKENS)
    return on_each_device(local, layout, layout)(ranked)
