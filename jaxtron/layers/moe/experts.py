"""The experts of a mixture, each an MLP where it lies: one derivative around what devices exchange and multiply."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxtron.layers.moe.biases import (
    add_bias,
    add_output_bias,
    add_weight_gradient,
    bias_gradient,
    output_bias_gradient,
)
from jaxtron.layers.moe.exchange import (
    Dispatch,
    Exchange,
    Turn,
    enter,
    is_left,
    leave,
    make_dispatch,
    make_turn,
    receive,
    receive_tokens,
    send,
    send_tokens,
)
from jaxtron.layers.moe.groups import collect, collect_weights, make_groups, spread, spread_weights
from jaxtron.layers.moe.products import gradient, product, product_transposed
from jaxtron.layers.saved import save_for_backward
from jaxtron.sharding.collectives import vary
from jaxtron.sharding.regions import on_each_device
from jaxtron.sharding.rules import current, spec
from jaxtron.typing import Array, Float, Int, PyTree

# the scope of rounds after the first, by which a plan finds their loop: nobody knows how often it runs
FURTHER_ROUNDS = "further_rounds"

# (what enters an expert's MLP [..., G, F], the weight of its row [..., 1]) -> what goes into its last product [..., F]
Activate = Callable[[Array, Array], Array]


class ExpertParameters(NamedTuple):
    """The parameters of all experts, in blocks or of one device."""

    up: Float[Array, "*T N E G F"]
    down: Float[Array, "*T N F E"]
    up_bias: Float[Array, "*T N G F"] | None = None
    down_bias: Float[Array, "*T N E"] | None = None
    """Where devices share an expert's width, that of the first of them counts."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def mix(
    x: Float[Array, "B S E"],
    weights: Float[Array, "B S K"],
    chosen: Int[Array, "B S K"],
    experts: ExpertParameters,
    beside: Float[Array, "..."] | None,
    exchange: Exchange,
    activate: Activate,
    names: tuple[str, ...],
) -> tuple[Float[Array, "B S E"], Float[Array, "..."] | None]:
    """The sum over a token's experts of weight x down(activate(up(x))), and `beside` as it is.

    x, weights and chosen are split over tensor along S; experts are a block for each device along tensor
    (`Layout.blocks`), of its own experts and its own part of their width. The weight is put on before the last product:
    what comes back needs only be summed, and its gradient arises where the expert is.

    What is computed of the tokens without experts is best computed while they travel, and no earlier or later:
    `beside`, split as `names` say, has to be there when they have come, and what is made of it is made on their way
    back. So has its cotangent in the backward.
    """
    return _forward(x, weights, chosen, experts, beside, exchange, activate, names)[0]


class _Tokens(NamedTuple):
    """What a device sends of its tokens, by token."""

    x: Float[Array, "T E"]
    weights: Float[Array, "T K"]


class _Came(NamedTuple):
    """The rows of a round where they are multiplied, as they came."""

    rows: Float[Array, "*rows E"]
    weights: Float[Array, "*rows K"]
    """Of the row's expert, or of all choices of its token."""
    chosen: Int[Array, "*rows K"] | None
    """These choices, of the device's experts."""


class _Kept(NamedTuple):
    """Of the first round, for the backward."""

    came: _Came | None
    """None where it is made of the device's own tokens alone."""
    hidden: Float[Array, "*rows G F"]


def _forward(
    x: Array,
    weights: Array,
    chosen: Array,
    experts: ExpertParameters,
    beside: Array | None,
    exchange: Exchange,
    activate: Activate,
    names: tuple[str, ...],
) -> tuple[tuple[Array, Array | None], tuple[PyTree, ...]]:
    def local(*arrays: Any) -> tuple[PyTree, ...]:
        (x, weights, chosen), own = map(_rows, arrays[:3]), _own(arrays[3])
        tokens, dispatch = _Tokens(x, weights), make_dispatch(exchange, enter(exchange, chosen))

        def a_round(turn: Turn, beside: Array | None = None) -> tuple[Array, _Kept, Array | None]:
            turn, came, hidden, beside = _expert_rows(exchange, dispatch, turn, tokens, own, beside)
            of_rows = spread_weights(turn.groups, came.weights)
            out = product(exchange, turn, activate(hidden, of_rows), own.down)
            out = collect(turn.groups, add_output_bias(exchange, turn, out, own.down_bias, of_rows))
            out, beside = _when(exchange, out, beside)
            return receive_tokens(exchange, turn, out), _Kept(None if exchange.is_free else came, hidden), beside

        turn = _first(exchange, dispatch)
        y, kept, beside = a_round(turn, arrays[4])
        y = leave(exchange, _further(exchange, dispatch, turn, lambda turn: a_round(turn)[0], y))
        y = y.astype(arrays[0].dtype).reshape(arrays[0].shape)
        return y, beside, _as_block(dispatch), _as_block(kept)

    (tokens, block), companion = _specs(), spec(*names)
    run = on_each_device(local, (tokens, tokens, tokens, block, companion), (tokens, companion, block, block))
    y, beside, dispatch, kept = run(x, weights, chosen, experts, beside)
    return (y, beside), (x, weights, experts, *jax.tree.map(save_for_backward, (dispatch, kept)))


def _backward(
    exchange: Exchange,
    activate: Activate,
    names: tuple[str, ...],
    residuals: tuple[PyTree, ...],
    cotangents: tuple[Array, Array | None],
) -> tuple[PyTree, ...]:
    """In two regions: gradients of the tokens, and of the experts, which a pipeline may put off."""
    x, weights, experts, dispatch, kept = residuals
    cotangent, beside = cotangents
    tokens, block = _specs()
    given, lie = (x, weights, cotangent, experts, dispatch, kept), (tokens, tokens, tokens, block, block, block)

    def of_tokens(*arrays: PyTree) -> tuple[PyTree, ...]:
        step = _Back(exchange, activate, arrays[:-1])
        turn, came, hidden = step.first()
        sums, dhidden, dout, beside = step.inputs(turn, came, hidden, arrays[-1])

        def further(turn: Turn) -> PyTree:
            return step.inputs(*step.again(turn))[0]

        sums = _further(exchange, step.dispatch, turn, further, sums)
        dx, dweights = (leave(exchange, array) for array in sums)
        dx, dweights = dx.astype(x.dtype).reshape(arrays[0].shape), dweights.reshape(arrays[1].shape)
        return dx, dweights, _as_block((dhidden, None if exchange.is_free else dout)), beside

    companion = spec(*names)
    run = on_each_device(of_tokens, (*lie, companion), (tokens, tokens, block, companion))
    dx, dweights, later, beside = run(*given, beside)

    def of_experts(*arrays: PyTree) -> ExpertParameters:
        step = _Back(exchange, activate, arrays[:-1])
        turn, came, hidden = step.first()
        dhidden, dout = _own(arrays[-1])
        sums = step.experts(turn, came, hidden, dhidden, step.send(turn) if dout is None else dout)

        def further(turn: Turn) -> PyTree:
            turn, came, hidden = step.again(turn)
            return step.experts(turn, came, hidden, *step.inputs(turn, came, hidden)[1:3])

        sums = _further(exchange, step.dispatch, turn, further, sums)
        return jax.tree.map(lambda found, own: found.reshape(own.shape).astype(own.dtype), sums, arrays[3])

    dexperts = on_each_device(of_experts, (*lie, block), block)(*given, later)
    return dx, dweights, None, dexperts, beside


mix.defvjp(_forward, _backward)


class _Back:
    """The backward of rounds on one device."""

    def __init__(self, exchange: Exchange, activate: Activate, arrays: tuple[PyTree, ...]) -> None:
        x, weights, cotangent, experts, dispatch, kept = arrays
        self.exchange, self.activate = exchange, activate
        self.dispatch: Dispatch = _own(dispatch)
        self.kept: _Kept = _own(kept)
        self.tokens = _Tokens(_rows(x), _rows(weights))
        self.cotangent = enter(exchange, _rows(cotangent))
        self.own: ExpertParameters = _own(experts)

    def first(self) -> tuple[Turn, _Came, Array]:
        """The first round, of which what came and what entered the activation were kept."""
        turn = _first(self.exchange, self.dispatch)
        came = self.kept.came or _come(self.exchange, self.dispatch, turn, self.tokens)
        return _grouped(self.exchange, turn, came), came, self.kept.hidden

    def again(self, turn: Turn) -> tuple[Turn, _Came, Array]:
        """The same of a further one."""
        return _expert_rows(self.exchange, self.dispatch, turn, self.tokens, self.own)[:3]

    def send(self, turn: Turn) -> Array:
        """The cotangents of what left the experts."""
        return send(self.exchange, turn, self.cotangent[:, None])[0]

    def inputs(
        self, turn: Turn, came: _Came, hidden: Array, beside: Array | None = None
    ) -> tuple[PyTree, Array, Array, Array | None]:
        """Cotangents of the tokens and their weights, of what entered the activation, and of what left the experts; and
        of what is computed beside."""
        exchange = self.exchange
        dout, beside = _when(exchange, self.send(turn), beside)
        pull = jax.vjp(self.activate, hidden, spread_weights(turn.groups, came.weights))[1]
        of_rows = spread(turn.groups, dout)
        dhidden, dof_rows = pull(product_transposed(exchange, turn, of_rows, self.own.down))
        dof_rows = add_weight_gradient(exchange, turn, dof_rows, self.own.down_bias, of_rows)
        drows = collect(turn.groups, product_transposed(exchange, turn, _flat(dhidden), self.own.up))
        drows, beside = _when(exchange, drows, beside)
        dof_rows = collect_weights(turn.groups, dof_rows)
        back = receive if exchange.grouped is None else receive_tokens
        dweights = back(exchange, turn, dof_rows).reshape(-1, exchange.top_k)
        return (receive_tokens(exchange, turn, drows), dweights), dhidden, dout, beside

    def experts(self, turn: Turn, came: _Came, hidden: Array, dhidden: Array, dout: Array) -> ExpertParameters:
        """Gradients of the device's experts, in float32."""
        exchange, dhidden, dout = self.exchange, _flat(dhidden), spread(turn.groups, dout)
        weights = spread_weights(turn.groups, came.weights)
        up = gradient(exchange, turn, spread(turn.groups, came.rows), dhidden)
        down = gradient(exchange, turn, self.activate(hidden, weights), dout)
        if self.own.up_bias is None:
            return ExpertParameters(up, down)
        biases = bias_gradient(exchange, turn, dhidden), output_bias_gradient(exchange, turn, dout, weights)
        return ExpertParameters(up, down, *biases)


def _first(exchange: Exchange, dispatch: Dispatch) -> Turn:
    """The first round."""
    return make_turn(exchange, dispatch, jnp.zeros_like(dispatch.counts))


def _come(exchange: Exchange, dispatch: Dispatch, turn: Turn, tokens: _Tokens) -> _Came:
    """The rows of a round to where they are multiplied."""
    x, weights = (enter(exchange, array) for array in tokens)
    return _Came(*send_tokens(exchange, dispatch, turn, x, weights))


def _grouped(exchange: Exchange, turn: Turn, came: _Came) -> Turn:
    """The round, with how what came is laid out by expert."""
    if came.chosen is None:
        return turn
    pairs = exchange.pairs * (1 if exchange.has_tokens else came.chosen.shape[0] // exchange.rows)
    return turn._replace(groups=make_groups(came.chosen, exchange.own_experts, pairs))


def _expert_rows(
    exchange: Exchange,
    dispatch: Dispatch,
    turn: Turn,
    tokens: _Tokens,
    own: ExpertParameters,
    beside: Array | None = None,
) -> tuple[Turn, _Came, Array, Array | None]:
    """A round, as far as the first product, with what is computed beside."""
    came = _come(exchange, dispatch, turn, tokens)
    rows, beside = _when(exchange, came.rows, beside)
    turn, came = _grouped(exchange, turn, came), came._replace(rows=rows)
    hidden = product(exchange, turn, spread(turn.groups, rows), own.up)
    return turn, came, add_bias(exchange, turn, hidden, own.up_bias), beside


def _when(exchange: Exchange, array: Array, beside: Array | None) -> tuple[Array, Array | None]:
    """Both when both are there, where anything travels."""
    return (array, beside) if beside is None or not exchange.axes else jax.lax.optimization_barrier((array, beside))


def _further(
    exchange: Exchange, dispatch: Dispatch, turn: Turn, a_round: Callable[[Turn], PyTree], sums: PyTree
) -> PyTree:
    """`sums` and what rounds after the first, `turn`, add to it: usually there are none."""
    if not exchange.has_rounds:
        return sums
    further, stop = dispatch.further, turn.stop

    def body(carry: tuple[Array, Array, PyTree]) -> tuple[Array, Array, PyTree]:
        _, first, sums = carry
        turn = make_turn(exchange, dispatch, first)
        sums = jax.tree.map(jnp.add, sums, a_round(turn))
        return is_left(exchange, dispatch, turn.stop), turn.stop, sums

    with jax.named_scope(FURTHER_ROUNDS):
        return jax.lax.while_loop(lambda carry: carry[0] > 0, body, (further, stop, sums))[2]


def _specs() -> tuple[PartitionSpec, PartitionSpec]:
    """Of what is split by token, and of a block for each device along tensor."""
    return spec("batch", "seq", None), PartitionSpec(current().axes("tensor"))


def _as_block(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda array: vary(array)[None], tree)


def _own(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda array: array[0], tree)


def _rows(array: Array) -> Array:
    """By token, typed as every device's own."""
    return vary(array.reshape(-1, array.shape[-1]))


def _flat(array: Float[Array, "*rows G F"]) -> Float[Array, "*rows O"]:
    return array.reshape(*array.shape[:-2], -1)
