"""The experts of a mixture, each an MLP where it lies: one derivative around what devices exchange and multiply."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxtron.kernels.varying import vary_alike
from jaxtron.layers.moe.exchange import (
    Dispatch,
    Exchange,
    Turn,
    enter,
    leave,
    make_dispatch,
    make_turn,
    receive,
    receive_tokens,
    send,
)
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


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def mix(
    x: Float[Array, "B S E"],
    weights: Float[Array, "B S K"],
    chosen: Int[Array, "B S K"],
    up: Float[Array, "T N E G F"],
    down: Float[Array, "T N F E"],
    exchange: Exchange,
    activate: Activate,
) -> Float[Array, "B S E"]:
    """The sum over a token's experts of weight x down(activate(up(x))).

    x, weights and chosen are split over tensor along S; up and down are a block for each device along tensor
    (`Layout.blocks`), of its own experts and its own part of their width. The weight is put on before the last product:
    what comes back needs only be summed, and its gradient arises where the expert is.
    """
    return _forward(x, weights, chosen, up, down, exchange, activate)[0]


class _Tokens(NamedTuple):
    """What a device sends of its tokens, by token."""

    x: Float[Array, "T E"]
    weights: Float[Array, "T K"]


class _Kept(NamedTuple):
    """Of the first round, for the backward."""

    rows: Float[Array, "*rows E"]
    of_rows: Float[Array, "*rows 1"]
    """Their weights."""
    hidden: Float[Array, "*rows G F"]


def _forward(
    x: Array, weights: Array, chosen: Array, up: Array, down: Array, exchange: Exchange, activate: Activate
) -> tuple[Array, tuple[PyTree, ...]]:
    def local(*arrays: Array) -> tuple[Array, PyTree, PyTree]:
        (x, weights, chosen), (up, down) = map(_rows, arrays[:3]), (block[0] for block in arrays[3:])
        tokens, dispatch = _Tokens(x, weights), make_dispatch(exchange, enter(exchange, chosen))

        def a_round(number: Array | int) -> tuple[Array, _Kept]:
            turn, kept = _expert_rows(exchange, dispatch, number, tokens, up)
            out = product(exchange, turn, activate(kept.hidden, kept.of_rows), down)
            return receive_tokens(exchange, turn, out), kept

        y, kept = a_round(0)
        y = leave(exchange, _further(exchange, dispatch, lambda number: a_round(number)[0], y))
        return y.astype(arrays[0].dtype).reshape(arrays[0].shape), _as_block(dispatch), _as_block(kept)

    tokens, block = _specs()
    run = on_each_device(local, (tokens, tokens, tokens, block, block), (tokens, block, block))
    y, dispatch, kept = run(x, weights, chosen, up, down)
    return y, (x, weights, up, down, *jax.tree.map(save_for_backward, (dispatch, kept)))


def _backward(
    exchange: Exchange, activate: Activate, residuals: tuple[PyTree, ...], cotangent: Array
) -> tuple[Array, Array, None, Array, Array]:
    """In two regions: gradients of the tokens, and of the experts, which a pipeline may put off."""
    x, weights, up, down, dispatch, kept = residuals
    tokens, block = _specs()
    given, lie = (x, weights, cotangent, up, down, dispatch), (tokens, tokens, tokens, block, block, block)

    def of_tokens(*arrays: PyTree) -> tuple[Array, ...]:
        step = _Back(exchange, activate, arrays[:-1])
        sums, dhidden, dout = step.inputs(step.turn(0), _own(arrays[-1]))

        def further(number: Array) -> PyTree:
            return step.inputs(*step.again(number))[0]

        dx, dweights = (leave(exchange, array) for array in _further(exchange, step.dispatch, further, sums))
        dx, dweights = dx.astype(x.dtype).reshape(arrays[0].shape), dweights.reshape(arrays[1].shape)
        return dx, dweights, dhidden[None], dout[None]

    run = on_each_device(of_tokens, (*lie, block), (tokens, tokens, block, block))
    dx, dweights, dhidden, dout = run(*given, kept)

    def of_experts(*arrays: PyTree) -> tuple[Array, Array]:
        step = _Back(exchange, activate, arrays[:-3])
        kept, dhidden, dout = map(_own, arrays[-3:])
        sums = step.experts(step.turn(0), kept, dhidden, dout)

        def further(number: Array) -> PyTree:
            turn, kept = step.again(number)
            return step.experts(turn, kept, *step.inputs(turn, kept)[1:])

        dup, ddown = _further(exchange, step.dispatch, further, sums)
        return dup.reshape(arrays[3].shape).astype(up.dtype), ddown.reshape(arrays[4].shape).astype(down.dtype)

    run = on_each_device(of_experts, (*lie, block, block, block), (block, block))
    dup, ddown = run(*given, kept, dhidden, dout)
    return dx, dweights, None, dup, ddown


mix.defvjp(_forward, _backward)


class _Back:
    """The backward of rounds on one device."""

    def __init__(self, exchange: Exchange, activate: Activate, arrays: tuple[PyTree, ...]) -> None:
        x, weights, cotangent, up, down, dispatch = arrays
        self.exchange, self.activate = exchange, activate
        self.dispatch: Dispatch = _own(dispatch)
        self.tokens = _Tokens(_rows(x), _rows(weights))
        self.cotangent = enter(exchange, _rows(cotangent))
        self.up, self.down = up[0], down[0]

    def turn(self, number: Array | int) -> Turn:
        """A round."""
        return make_turn(self.exchange, self.dispatch, number)

    def again(self, number: Array) -> tuple[Turn, _Kept]:
        """What the first round keeps, of a further one."""
        return _expert_rows(self.exchange, self.dispatch, number, self.tokens, self.up)

    def inputs(self, turn: Turn, kept: _Kept) -> tuple[PyTree, Array, Array]:
        """Cotangents of the tokens and their weights, of what entered the activation, and of what left the expert."""
        exchange = self.exchange
        dout = send(exchange, turn, self.cotangent[:, None])
        pull = jax.vjp(self.activate, kept.hidden, kept.of_rows)[1]
        dhidden, dof_rows = pull(product_transposed(exchange, turn, dout, self.down))
        drows = product_transposed(exchange, turn, _flat(dhidden), self.up)
        dx = receive_tokens(exchange, turn, drows)
        return (dx, receive(exchange, turn, dof_rows)[..., 0]), dhidden, dout

    def experts(self, turn: Turn, kept: _Kept, dhidden: Array, dout: Array) -> tuple[Array, Array]:
        """Gradients of the device's experts, in float32."""
        inner = self.activate(kept.hidden, kept.of_rows)
        dup = gradient(self.exchange, turn, kept.rows, _flat(dhidden))
        return dup, gradient(self.exchange, turn, inner, dout)


def _expert_rows(
    exchange: Exchange, dispatch: Dispatch, number: Array | int, tokens: _Tokens, up: Array
) -> tuple[Turn, _Kept]:
    """A round, as far as the first product."""
    turn = make_turn(exchange, dispatch, number)
    rows = send(exchange, turn, enter(exchange, tokens.x)[:, None])
    of_rows = send(exchange, turn, enter(exchange, tokens.weights)[..., None])
    return turn, _Kept(rows, of_rows, product(exchange, turn, rows, up))


def _further(exchange: Exchange, dispatch: Dispatch, a_round: Callable[[Array], PyTree], sums: PyTree) -> PyTree:
    """`sums` and what rounds after the first add to it: usually there are none."""
    if not exchange.has_rounds:
        return sums
    number, _ = vary_alike((jnp.int32(1), dispatch.rounds))

    def body(carry: tuple[Array, PyTree]) -> tuple[Array, PyTree]:
        number, sums = carry
        return number + 1, jax.tree.map(jnp.add, sums, a_round(number))

    with jax.named_scope(FURTHER_ROUNDS):
        return jax.lax.while_loop(lambda carry: carry[0] < dispatch.rounds, body, (number, sums))[1]


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
