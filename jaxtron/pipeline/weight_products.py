"""Weight gradients that are products left undone: their operands instead, to be added to sums as they are multiplied.

A backward's jaxpr tells which of its outputs are a product of two arrays over all rows, perhaps a part of it or in
another order, or a sum of such: of two halves of a microbatch for one. The others come out as they are.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
from jax.extend.core import Jaxpr, JaxprEqn, Literal, Var
from jax.sharding import PartitionSpec

from jaxtron.kernels.weight_sums.spec import WeightSums
from jaxtron.pipeline.jaxprs import bind, evaluate, flat_jaxpr, needed, value
from jaxtron.sharding.layout import spec_axes
from jaxtron.sharding.regions import over_tensor
from jaxtron.sharding.rules import current
from jaxtron.typing import Array, Float, PyTree

# what leaves the numbers of a product as they are, and what moves them too
RETYPED = {"convert_element_type", "reshard", "pcast", "pvary"}
FOLLOWED = {*RETYPED, "transpose", "split", "reduce_sum", "squeeze", "reshape"}
ADDED = {"add", "add_any"}
# of an operand, without its rows: what a product's result went through
Change = Callable[[Array], Array]


class Operands(NamedTuple):
    """Of a gradient [*I, *O], or a summand of one: its sum over rows is `x` transposed times the cotangent."""

    x: Float[Array, "*rows I"]
    """[*rows, *I], laid out as the gradient is."""
    cotangent: Float[Array, "*rows O"]
    """[*rows, *O], likewise."""
    num_rows: int
    """How many axes rows are."""


# all that a gradient is the sum of
Summands = tuple[Operands, ...]


@jax.tree_util.register_static
@dataclass(frozen=True, eq=False)
class OpenBackward:
    """`run(inputs, given)` gives the function's outputs, or the operands of those whose products are left undone."""

    run: Callable[[PyTree, PyTree], list[Array | Summands]]


def open_backward(
    function: Callable[[PyTree, PyTree], Sequence[Array]],
    inputs: PyTree,
    given: PyTree,
    num_gradients: int,
    sums: WeightSums,
) -> OpenBackward:
    """`function(inputs, given)`, of whose flat outputs the first are gradients, without products that `sums` adds."""
    closed = flat_jaxpr(function, inputs, given)
    jaxpr = closed.jaxpr
    makers = {var: equation for equation in jaxpr.eqns for var in equation.outvars}
    found = {
        number: products
        for number, var in enumerate(jaxpr.outvars[:num_gradients])
        if (products := _products(var, makers)) and all(product.is_taken(sums) for product in products)
    }
    # what is multiplied anyway is not multiplied twice
    rest = set(map(id, _rest(jaxpr, found)))
    found = {
        number: products
        for number, products in found.items()
        if not any(id(product.equation) in rest for product in products)
    }
    equations = _rest(jaxpr, found)

    def run(inputs: PyTree, given: PyTree) -> list[Array | Summands]:
        values = evaluate(jaxpr, equations, bind(closed, jax.tree.leaves((inputs, given))))
        return [
            tuple(product.operands(values) for product in found[number]) if number in found else value(values, var)
            for number, var in enumerate(jaxpr.outvars)
        ]

    return OpenBackward(run)


def add_products(total: Float[Array, "L *shape"], summands: Summands, slot: Array | int, sums: WeightSums) -> Array:
    """`total` with products added at this index of its leading axis, on each part along tensor."""
    for operands in summands:
        total = _add_product(total, operands, slot, sums)
    return total


def _add_product(total: Float[Array, "L *shape"], operands: Operands, slot: Array | int, sums: WeightSums) -> Array:
    x, cotangent, num_rows = operands
    num_inputs = x.ndim - num_rows
    of_gradient = jax.typeof(total).sharding.spec[1:]
    rows = (None,) * num_rows

    def local(total: Array, x: Array, cotangent: Array, slot: Array) -> Array:
        count = math.prod(x.shape[:num_rows])
        width, out = math.prod(x.shape[num_rows:]), math.prod(cotangent.shape[num_rows:])
        matrices = total.reshape(total.shape[0], width, out)
        made = sums.add(matrices, x.reshape(count, width), cotangent.reshape(count, out), slot)
        return made.reshape(total.shape)

    whole = PartitionSpec(None, *of_gradient)
    inputs, outputs = of_gradient[:num_inputs], of_gradient[num_inputs:]
    specs = (whole, PartitionSpec(*rows, *inputs), PartitionSpec(*rows, *outputs), PartitionSpec())
    return over_tensor(local, specs, whole)(total, x, cotangent, jax.numpy.asarray(slot, jax.numpy.int32))


@dataclass(frozen=True)
class _Side:
    """One operand of a product: contracted over its first axes, then changed in the others."""

    var: Var
    changes: tuple[Change, ...] = ()

    def of(self, values: Mapping[Var, Array], spec: PartitionSpec) -> Array:
        array = values[self.var]
        for change in self.changes:
            array = change(array)
        return jax.sharding.reshard(array, spec)

    def then(self, change: Change) -> "_Side":
        return replace(self, changes=(*self.changes, change))


@dataclass(frozen=True)
class _Product:
    """A product over `num_rows` axes of both operands. `places` says of each axis of the result of which operand it is
    (0 or 1)."""

    equation: JaxprEqn
    sides: tuple[_Side, _Side]
    num_rows: int
    places: tuple[int, ...]
    aval: Any
    """The result's type."""

    def operands(self, values: Mapping[Var, Array]) -> Operands:
        first = self.places[0]
        x, cotangent = (
            self.sides[side].of(
                values, PartitionSpec(*(None,) * self.num_rows, *self._of(side, self.aval.sharding.spec))
            )
            for side in (first, 1 - first)
        )
        return Operands(x, cotangent, self.num_rows)

    def is_taken(self, sums: WeightSums) -> bool:
        """Whether its axes are those of one operand, then of the other, and the parts are such as `sums` takes."""
        if not self._is_in_order():
            return False
        mesh, spec = current().mesh, self.aval.sharding.spec
        parts = [math.prod(mesh.shape[axis] for axis in axes) for axes in spec_axes(spec)]
        local = [size // count for size, count in zip(self.aval.shape, parts, strict=True)]
        rows = math.prod(self.sides[0].var.aval.shape[: self.num_rows])
        x, cotangent = (
            jax.ShapeDtypeStruct((rows, math.prod(self._of(side, local))), self.sides[side].var.aval.dtype)
            for side in (self.places[0], 1 - self.places[0])
        )
        return sums.unsupported_reason(x, cotangent, current().device_kind) is None

    def after(self, equation: JaxprEqn, result: Var) -> "_Product | None":
        """What comes of it in another step; none where that is no product any more."""
        name, params = equation.primitive.name, equation.params
        if name in RETYPED:
            return replace(self, aval=result.aval)
        if name == "transpose":
            return self._transposed(params["permutation"], result)
        if name == "split":
            number = equation.outvars.index(result)
            side, axis = self._place(params["axis"])
            change = partial(_part, axis=axis, sizes=tuple(params["sizes"]), number=number)
            return self._changed(side, change, self.places, result)
        if name in ("reduce_sum", "squeeze"):
            return self._squeezed(params["axes" if name == "reduce_sum" else "dimensions"], result)
        return self._reshaped(result) if params["dimensions"] is None else None

    def _transposed(self, permutation: Sequence[int], result: Var) -> "_Product | None":
        for side in (0, 1):
            own = [axis for axis in permutation if self.places[axis] == side]
            if own != sorted(own):
                return None
        return replace(self, places=tuple(self.places[axis] for axis in permutation), aval=result.aval)

    def _squeezed(self, axes: Sequence[int], result: Var) -> "_Product | None":
        if any(self.aval.shape[axis] != 1 for axis in axes):
            return None
        made = self
        for axis in sorted(axes, reverse=True):
            side, place = made._place(axis)
            places = (*made.places[:axis], *made.places[axis + 1 :])
            made = made._changed(side, partial(jax.numpy.squeeze, axis=place), places, result)
        return made

    def _reshaped(self, result: Var) -> "_Product | None":
        if not self._is_in_order():
            return None
        first, shape = self.places[0], result.aval.shape
        size = math.prod(self._of(first, self.aval.shape))
        cut = next((count for count in range(1, len(shape)) if math.prod(shape[:count]) == size), None)
        if cut is None:
            return None
        made = replace(self, places=(*(first,) * cut, *(1 - first,) * (len(shape) - cut)))
        for side in (0, 1):
            change = partial(
                _reshaped,
                num_rows=self.num_rows,
                shape=made._of(side, shape),
                spec=made._of(side, result.aval.sharding.spec),
            )
            made = made._changed(side, change, made.places, result)
        return made

    def _changed(self, side: int, change: Change, places: tuple[int, ...], result: Var) -> "_Product":
        sides = tuple(own.then(change) if number == side else own for number, own in enumerate(self.sides))
        return replace(self, sides=sides, places=places, aval=result.aval)

    def _of(self, side: int, by_axis: Iterable[Any]) -> tuple[Any, ...]:
        """Of what is by axis of the result that of one operand's."""
        return tuple(one for one, own in zip(by_axis, self.places, strict=True) if own == side)

    def _place(self, axis: int) -> tuple[int, int]:
        """An axis of the result: which operand's, and which of that."""
        side = self.places[axis]
        return side, self.num_rows + self.places[:axis].count(side)

    def _is_in_order(self) -> bool:
        changes = sum(one != other for one, other in zip(self.places, self.places[1:], strict=False))
        return changes == 1


def _products(var: Var | Literal, makers: Mapping[Var, JaxprEqn]) -> tuple[_Product, ...]:
    """The products that a variable is the sum of, all of each where its operands' rows are whole; none: it is no such
    thing."""
    if not isinstance(var, Var) or var not in makers:
        return ()
    equation = makers[var]
    name = equation.primitive.name
    if name in ADDED:
        parts = [_products(one, makers) for one in equation.invars]
        return tuple(itertools.chain(*parts)) if all(parts) else ()
    if name in FOLLOWED:
        after = [product.after(equation, var) for product in _products(equation.invars[0], makers)]
        return tuple(product for product in after if product is not None) if all(after) else ()
    product = _product(equation) if name == "dot_general" else None
    return () if product is None else (product,)


def _product(equation: JaxprEqn) -> _Product | None:
    """That of a `dot_general`; none where it is not over the first axes of both operands alone."""
    (left, right), batch = equation.params["dimension_numbers"]
    num_rows, operands, (var,) = len(left), equation.invars, equation.outvars
    leading = tuple(range(num_rows))
    if any(batch) or tuple(left) != leading or tuple(right) != leading:
        return None
    result: Any = var.aval
    split = {axis for axes in spec_axes(result.sharding.spec) for axis in axes}
    for operand in operands:
        aval: Any = operand.aval
        # rows that are split otherwise than the result leave sums of parts
        rows = {axis for axes in spec_axes(aval.sharding.spec)[:num_rows] for axis in axes}
        if not isinstance(operand, Var) or not rows <= split:
            return None
    places = tuple(side for side in (0, 1) for _ in range(operands[side].aval.ndim - num_rows))
    return _Product(equation, (_Side(operands[0]), _Side(operands[1])), num_rows, places, var.aval)


def _rest(jaxpr: Jaxpr, found: Mapping[int, Iterable[_Product]]) -> list[JaxprEqn]:
    """What outputs need that are not `found`, and the operands of products that are."""
    operands = [side.var for products in found.values() for product in products for side in product.sides]
    others = [var for number, var in enumerate(jaxpr.outvars) if number not in found]
    return needed(jaxpr.eqns, [*others, *operands], stop=set())


def _part(array: Array, *, axis: int, sizes: tuple[int, ...], number: int) -> Array:
    start = sum(sizes[:number])
    return jax.lax.slice_in_dim(array, start, start + sizes[number], axis=axis)


def _reshaped(array: Array, *, num_rows: int, shape: tuple[int, ...], spec: tuple[Any, ...]) -> Array:
    rows = (None,) * num_rows
    return jax.lax.reshape(array, (*array.shape[:num_rows], *shape), out_sharding=PartitionSpec(*rows, *spec))
