"""A function cut in two: what some of its outputs need, and later the rest, with what must be kept in between.

A layer's backward gives the gradients of its input and of its weights. Cut here, the first part runs the whole backward
but the products that form weight gradients; what it keeps of their operands is each weight's output cotangent. Weights'
inputs are made from what the forward kept: no operation is run twice but for moving and gathering data, and what is
done element by element where its operands are smaller or there already (zero-bubble pipelines, 2401.10241).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jax.extend.core import JaxprEqn, Var

from jaxtron.pipeline.jaxprs import bind, evaluate, flat_jaxpr, needed, unique, value
from jaxtron.typing import Array, PyTree

# run again rather than kept: what they make is larger than what they are made from, or the same in another order
REPEATED = {"reshard", "all_gather", "transpose", "reshape", "broadcast_in_dim", "squeeze", "convert_element_type"}
# likewise where what they are made from is smaller to keep, or there again
ELEMENTWISE = {
    "add",
    "add_any",
    "sub",
    "mul",
    "div",
    "neg",
    "max",
    "min",
    "square",
    "integer_pow",
    "exp",
    "log",
    "sqrt",
}
ELEMENTWISE |= {"rsqrt", "tanh", "logistic", "erf", "erf_inv", "select_n", "eq", "ne", "lt", "le", "gt", "ge", "and"}


@jax.tree_util.register_static
@dataclass(frozen=True, eq=False)
class SplitBackward:
    """`input_grads(inputs, given)` gives the outputs wanted at once, and what to keep for the others: the operands of
    `weight_grads(kept, given)`."""

    input_grads: Callable[[PyTree, PyTree], tuple[list[Array], list[Array]]]
    weight_grads: Callable[[list[Array], PyTree], list[Array]]


def split_backward(
    function: Callable[[PyTree, PyTree], Sequence[Array]], inputs: PyTree, given: PyTree, is_deferred: Sequence[bool]
) -> SplitBackward:
    """Cut `function(inputs, given)`, whose flat outputs are wanted at once or deferred.

    `given` is there again when `weight_grads` runs, so none of it is kept.
    """
    num_inputs = len(jax.tree.leaves(inputs))
    closed = flat_jaxpr(function, inputs, given)
    jaxpr = closed.jaxpr
    outputs = list(zip(jaxpr.outvars, is_deferred, strict=True))
    at_once = [var for var, deferred in outputs if not deferred]
    put_off = [var for var, deferred in outputs if deferred]
    first = needed(jaxpr.eqns, at_once, stop=set())
    again = set(jaxpr.invars[num_inputs:]) | set(jaxpr.constvars)
    repeated = _repeated(jaxpr.eqns, again)
    made = {var for equation in first for var in equation.outvars if var not in repeated}
    second = needed(jaxpr.eqns, put_off, stop=made)
    own = {var for equation in second for var in equation.outvars}
    kept = unique(
        var
        for var in [*(v for equation in second for v in equation.invars), *put_off]
        if isinstance(var, Var) and var not in own and var not in again
    )

    def input_grads(inputs: PyTree, given: PyTree) -> tuple[list[Array], list[Array]]:
        values = evaluate(jaxpr, first, bind(closed, jax.tree.leaves((inputs, given))))
        return [value(values, var) for var in at_once], [values[var] for var in kept]

    def weight_grads(kept_values: list[Array], given: PyTree) -> list[Array]:
        values = dict(zip(jaxpr.constvars, closed.consts, strict=True))
        values |= dict(zip(jaxpr.invars[num_inputs:], jax.tree.leaves(given), strict=True))
        values |= dict(zip(kept, kept_values, strict=True))
        values = evaluate(jaxpr, second, values)
        return [value(values, var) for var in put_off]

    return SplitBackward(input_grads, weight_grads)


def _repeated(equations: Sequence[JaxprEqn], again: set[Var]) -> set[Var]:
    """What to make a second time rather than to keep; `again` is there anyway."""
    cost = dict.fromkeys(again, 0)
    found = set()

    def bytes_of(var: Var) -> int:
        aval: Any = var.aval
        return math.prod(aval.shape) * aval.dtype.itemsize

    for equation in equations:
        inputs = unique(var for var in equation.invars if isinstance(var, Var))
        kept, whole = sum(cost.get(var, bytes_of(var)) for var in inputs), sum(map(bytes_of, equation.outvars))
        is_cheap = equation.primitive.name in ELEMENTWISE and kept < whole
        if _is_moved(equation) or is_cheap:
            found |= set(equation.outvars)
            cost |= dict.fromkeys(equation.outvars, kept)
    return found


def _is_moved(equation: JaxprEqn) -> bool:
    if equation.primitive.name == "shard_map":
        return all(_is_moved(inner) for inner in equation.params["jaxpr"].eqns)
    if equation.primitive.name == "convert_element_type" and equation.outvars[0].aval.dtype.itemsize == 1:
        # smaller than what it is made from
        return False
    return equation.primitive.name in REPEATED
