"""Jaxprs cut in parts: which of their equations something needs, and what these make of values."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var, jaxpr_as_fun

from jaxtron.typing import Array, PyTree

# calls whose body is run in place, so that a part of it can be left out
CALLS = {"jit": "jaxpr", "pjit": "jaxpr", "closed_call": "call_jaxpr", "checkpoint": "jaxpr", "remat2": "jaxpr"}
CALLS |= {"custom_vjp_call": "call_jaxpr", "custom_jvp_call": "call_jaxpr"}


def flat_jaxpr(function: Callable[..., Sequence[Array]], *arguments: PyTree) -> ClosedJaxpr:
    """The jaxpr of a function by the leaves of its arguments, with its calls run in place."""
    flat, treedef = jax.tree.flatten(arguments)
    whole = jax.make_jaxpr(lambda *leaves: function(*jax.tree.unflatten(treedef, leaves)))(*flat)
    return jax.make_jaxpr(_inlined(whole))(*flat)


def _inlined(closed: ClosedJaxpr) -> Callable[..., list[Array]]:
    """The function of a jaxpr with its calls run in place."""

    def run(*arguments: Array) -> list[Array]:
        values = bind(closed, arguments)
        for equation in closed.jaxpr.eqns:
            body = equation.params.get(CALLS.get(equation.primitive.name, ""))
            if body is None:
                values = evaluate(closed.jaxpr, [equation], values)
                continue
            inner = _inlined(body if isinstance(body, ClosedJaxpr) else ClosedJaxpr(body, ()))
            results = inner(*(value(values, var) for var in equation.invars))
            values |= dict(zip(equation.outvars, results, strict=True))
        return [value(values, var) for var in closed.jaxpr.outvars]

    return run


def needed(equations: Sequence[JaxprEqn], outputs: Sequence[Var | Literal], stop: set[Var]) -> list[JaxprEqn]:
    """The equations that these outputs need, in order, but for those that make what is in `stop`."""
    wanted = {var for var in outputs if isinstance(var, Var)}
    found = []
    for equation in reversed(equations):
        makes = [var for var in equation.outvars if var in wanted]
        if not makes or any(var in stop for var in makes):
            continue
        found.append(equation)
        wanted |= {var for var in equation.invars if isinstance(var, Var)}
    return found[::-1]


def evaluate(jaxpr: Jaxpr, equations: Sequence[JaxprEqn], values: dict[Var, Array]) -> dict[Var, Array]:
    """All that the equations make from `values`, and the values."""
    made = {var for equation in equations for var in equation.outvars}
    used = unique(var for equation in equations for var in equation.invars if isinstance(var, Var) and var not in made)
    results = unique(var for equation in equations for var in equation.outvars)
    part = jaxpr.replace(
        constvars=[],
        invars=used,
        outvars=results,
        eqns=list(equations),
        debug_info=jaxpr.debug_info.with_unknown_names(),
    )
    outputs = jaxpr_as_fun(ClosedJaxpr(part, ()))(*(values[var] for var in used))
    return {**values, **dict(zip(results, outputs, strict=True))}


def bind(closed: ClosedJaxpr, arguments: Sequence[Array]) -> dict[Var, Array]:
    """The values of its constants and inputs."""
    jaxpr: Jaxpr = closed.jaxpr
    return dict(zip((*jaxpr.constvars, *jaxpr.invars), (*closed.consts, *arguments), strict=True))


def value(values: dict[Var, Array], var: Var | Literal) -> Array:
    """That of a variable, or of a number."""
    if isinstance(var, Var):
        return values[var]
    # it may be a number of JAX's own, which is no array
    aval: Any = var.aval
    return cast(Array, np.asarray(var.val, aval.dtype))


def unique(variables: Iterable[Var]) -> list[Var]:
    """Each once, in order."""
    return list(dict.fromkeys(variables))
