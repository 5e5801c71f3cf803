"""The experts of a mixture, each an MLP where it lies: one derivative around what devices exchange and multiply."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxtron.kernels.varying import vary_alike
from jaxtron.layers.moe.exchange import Dispatch, Exchange, make_dispatch, receive, receive_tokens, send
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
    """What a device has of the tokens, by token."""

    x: Float[Array, "T E"]
    weights: Float[Array, "T K"]
    chosen: Int[Array, "T K"]


def _forward(
    x: Array, weights: Array, chosen: Array, up: Array, down: Array, exchange: Exchange, activate: Activate
) -> tuple[Array, tuple[Array, ...]]:
    def local(*arrays: Array) -> tuple[Array, ...]:
        tokens, (up, down) = _enter(arrays[:3]), (block[0] for block in arrays[3:])
        dispatch = make_dispatch(exchange, tokens.chosen)

        def a_round(turn: Array | int) -> tuple[Array, tuple[Array, ...]]:
            rows = send(exchange, dispatch, turn, tokens.x[:, None])
            of_rows = send(exchange, dispatch, turn, tokens.weights[..., None])
            hidden = _product(rows, up)
            out = _product(activate(hidden, of_rows), down)
            return receive_tokens(exchange, dispatch, turn, out), (rows, of_rows, hidden)

        y, kept = a_round(0)
        y = _further(exchange, dispatch, lambda turn: a_round(turn)[0], y)
        return (y.astype(arrays[0].dtype).reshape(arrays[0].shape), *(array[None] for array in kept))

    tokens, block = _specs()
    y, *kept = on_each_device(local, (tokens, tokens, tokens, block, block), (tokens, block, block, block))(
        x, weights, chosen, up, down
    )
    return y, (x, weights, chosen, up, down, *map(save_for_backward, kept))


def _backward(
    exchange: Exchange, activate: Activate, residuals: tuple[Array, ...], cotangent: Array
) -> tuple[Array, Array, None, Array, Array]:
    """In two regions: gradients of the tokens, and of the experts, which a pipeline may put off."""
    x, weights, chosen, up, down, rows, of_rows, hidden = residuals
    tokens, block = _specs()
    given, lie = (x, weights, chosen, cotangent, up, down), (tokens, tokens, tokens, tokens, block, block)

    def of_tokens(*arrays: Array) -> tuple[Array, ...]:
        step = _Back(exchange, activate, arrays)
        of_rows, hidden = (array[0] for array in arrays[6:])
        sums, dhidden, dout = step.inputs(0, of_rows, hidden)

        def further(turn: Array) -> PyTree:
            _, of_rows, hidden = step.again(turn)
            return step.inputs(turn, of_rows, hidden)[0]

        dx, dweights = _further(exchange, step.dispatch, further, sums)
        return (
            dx.astype(x.dtype).reshape(arrays[0].shape),
            dweights.reshape(arrays[1].shape),
            dhidden[None],
            dout[None],
        )

    run = on_each_device(of_tokens, (*lie, block, block), (tokens, tokens, block, block))
    dx, dweights, dhidden, dout = run(*given, of_rows, hidden)

    def of_experts(*arrays: Array) -> tuple[Array, Array]:
        step = _Back(exchange, activate, arrays)
        rows, of_rows, hidden, dhidden, dout = (array[0] for array in arrays[6:])
        sums = _gradients(activate, rows, of_rows, hidden, dhidden, dout)

        def further(turn: Array) -> PyTree:
            rows, of_rows, hidden = step.again(turn)
            _, dhidden, dout = step.inputs(turn, of_rows, hidden)
            return _gradients(activate, rows, of_rows, hidden, dhidden, dout)

        dup, ddown = _further(exchange, step.dispatch, further, sums)
        return dup.astype(up.dtype)[None], ddown.astype(down.dtype)[None]

    run = on_each_device(of_experts, (*lie, *(block,) * 5), (block, block))
    dup, ddown = run(*given, rows, of_rows, hidden, dhidden, dout)
    return dx, dweights, None, dup, ddown


mix.defvjp(_forward, _backward)


class _Back:
    """The backward of rounds on one device."""

    def __init__(self, exchange: Exchange, activate: Activate, arrays: tuple[Array, ...]) -> None:
        self.exchange, self.activate = exchange, activate
        self.tokens = _enter(arrays[:3])
        self.cotangent = _rows(arrays[3])
        self.up, self.down = arrays[4][0], arrays[5][0]
        self.dispatch: Dispatch = make_dispatch(exchange, self.tokens.chosen)

    def again(self, turn: Array) -> tuple[Array, Array, Array]:
        """What the first round keeps, of a further one."""
        rows = send(self.exchange, self.dispatch, turn, self.tokens.x[:, None])
        of_rows = send(self.exchange, self.dispatch, turn, self.tokens.weights[..., None])
        return rows, of_rows, _product(rows, self.up)

    def inputs(self, turn: Array | int, of_rows: Array, hidden: Array) -> tuple[PyTree, Array, Array]:
        """Cotangents of the tokens and their weights, of what entered the activation, and of what left the expert."""
        exchange, dispatch = self.exchange, self.dispatch
        dout = send(exchange, dispatch, turn, self.cotangent[:, None])
        pull = jax.vjp(self.activate, hidden, of_rows)[1]
        dhidden, dof_rows = pull(jnp.einsum("nre,nfe->nrf", dout, self.down))
        drows = jnp.einsum("nrgf,negf->nre", dhidden, self.up)
        dx = receive_tokens(exchange, dispatch, turn, drows)
        return (dx, receive(exchange, dispatch, turn, dof_rows)[..., 0]), dhidden, dout


def _gradients(
    activate: Activate, rows: Array, of_rows: Array, hidden: Array, dhidden: Array, dout: Array
) -> tuple[Array, Array]:
    """Of a device's experts, in float32."""
    inner = activate(hidden, of_rows)
    dup = jnp.einsum("nre,nrgf->negf", rows, dhidden, preferred_element_type=jnp.float32)
    return dup, jnp.einsum("nrf,nre->nfe", inner, dout, preferred_element_type=jnp.float32)


def _product(rows: Array, kernel: Array) -> Array:
    """Rows [N, R, I] of each expert times its kernel [N, I, ...]."""
    return jnp.einsum("nri,ni...->nr...", rows, kernel)


def _further(exchange: Exchange, dispatch: Dispatch, a_round: Callable[[Array], PyTree], sums: PyTree) -> PyTree:
    """`sums` and what rounds after the first add to it: usually there are none."""
    if not exchange.has_rounds:
        return sums
    turn, _ = vary_alike((jnp.int32(1), dispatch.rounds))

    def body(carry: tuple[Array, PyTree]) -> tuple[Array, PyTree]:
        turn, sums = carry
        return turn + 1, jax.tree.map(jnp.add, sums, a_round(turn))

    with jax.named_scope(FURTHER_ROUNDS):
        return jax.lax.while_loop(lambda carry: carry[0] < dispatch.rounds, body, (turn, sums))[1]


def _specs() -> tuple[PartitionSpec, PartitionSpec]:
    """Of what is split by token, and of a block for each device along tensor."""
    return spec("batch", "seq", None), PartitionSpec(current().axes("tensor"))


def _enter(arrays: tuple[Array, ...]) -> _Tokens:
    x, weights, chosen = map(_rows, arrays)
    return _Tokens(x, weights, chosen)


def _rows(array: Array) -> Array:
    """By token, typed as every device's own."""
    return vary(array.reshape(-1, array.shape[-1]))
