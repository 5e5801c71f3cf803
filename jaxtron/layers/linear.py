"""Linear layers whose parallelism is in the names of their axes."""

import functools

import jax
from flax import nnx
from jax.nn import initializers
from jax.sharding import PartitionSpec

from jaxtron.layers import fp8, fp8_blocks
from jaxtron.layers.config import Scaling
from jaxtron.layers.saved import save_for_backward
from jaxtron.sharding.layout import spec_axes
from jaxtron.sharding.parameters import parameter
from jaxtron.sharding.rules import constrain, current, spec
from jaxtron.typing import Array, Float

_EIGHT_BITS = {"current": fp8.product, "block": fp8_blocks.product}


def normal(std: float) -> initializers.Initializer:
    """Megatron's initializer: a normal of mean 0 and the given standard deviation."""
    return initializers.normal(std)


class Linear(nnx.Module):
    """`y = x @ kernel + bias`; inputs and outputs may be several named dimensions, flattened in the product.

    Column parallel: `inputs={"embed": e}, outputs={"mlp": f}`. Row parallel: the reverse. Which mesh axis that means is
    decided in `sharding/rules.py`. With a `scaling` the product is one of 8-bit numbers.
    """

    def __init__(
        self,
        inputs: dict[str, int],
        outputs: dict[str, int],
        *,
        bias: bool,
        std: float,
        rngs: nnx.Rngs,
        scaling: Scaling = "none",
    ) -> None:
        self.scaling: Scaling = scaling
        sizes, names = (*inputs.values(), *outputs.values()), (*inputs, *outputs)
        self.kernel = parameter(rngs, normal(std), sizes, axes=names, role="kernel")
        self.bias = (
            parameter(rngs, initializers.zeros, tuple(outputs.values()), axes=bias_axes(outputs), role="bias")
            if bias
            else None
        )

    def __call__(self, x: Float[Array, "B S *inputs"], *logical: str | None) -> Float[Array, "B S *outputs"]:
        """The product laid out as `logical` names: partial sums over a split input are reduced on the way there."""
        y = project(x, self.kernel[...], logical, self.scaling)
        return y if self.bias is None else y + self.bias[...].astype(y.dtype)


def bias_axes(outputs: dict[str, int]) -> tuple[str, ...]:
    """Axes of a bias: those of the outputs, with `embed` (which batch axes would shard) replaced by `norm`."""
    return tuple("norm" if name == "embed" else name for name in outputs)


def whole_sequence(x: Float[Array, "B S E"], scaling: Scaling = "none") -> Float[Array, "B S E"]:
    """A residual stream as products over all of its sequence read it: those of 8-bit numbers gather it themselves."""
    gathers = scaling != "none" and current().parts("tensor") > 1
    return x if gathers else constrain(x, "batch", "full_seq", "embed")


def project(
    x: Float[Array, "B S ..."],
    kernel: Float[Array, "..."],
    logical: tuple[str | None, ...],
    scaling: Scaling = "none",
) -> Float[Array, "..."]:
    """`x` (all but its first two axes) contracted with the leading axes of `kernel`, laid out as `logical` names.

    On one tensor part, rows and positions become one axis: a plain matrix product and its gradients need no transposed
    copies, which on a CPU cost more than the product. On several they must stay apart: the backward's partial sums
    become a reduce-scatter along the sequence only where the sequence is an axis.
    """
    num_inputs = x.ndim - 2
    layout = spec(*logical)
    if scaling != "none":
        return _project_fp8(x, kernel, layout, scaling)
    if current().parts("tensor") > 1:
        return save_for_backward(_product(x, kernel, layout))
    rows = x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])
    contracted = (tuple(range(1, rows.ndim)), tuple(range(num_inputs)))
    y = jax.lax.dot_general(rows, kernel, (contracted, ((), ())), out_sharding=PartitionSpec(layout[0], *layout[2:]))
    return y.reshape(*x.shape[:2], *y.shape[1:])


def _project_fp8(
    x: Float[Array, "B S ..."], kernel: Float[Array, "..."], layout: PartitionSpec, scaling: Scaling
) -> Float[Array, "..."]:
    """The same by 8-bit numbers, which are gathered where the sequence is split in the input and whole in the output,
    and in the backward where it is the other way round.
    """
    given, product = jax.typeof(x).sharding.spec, _EIGHT_BITS[scaling]
    if current().parts("tensor") > 1:
        # where both are split alike, each device has rows of its own
        sequence = layout[1] if spec_axes(given)[1] == spec_axes(layout)[1] else None
        multiplied = (PartitionSpec(own[0], sequence, *own[2:]) for own in (given, layout))
        return save_for_backward(product(x, kernel, fp8.Form(2, layout, *multiplied)))
    # on one part a split by name alone
    x = jax.sharding.reshard(x, PartitionSpec(given[0], None, *given[2:]))
    rows, given = x.reshape(x.shape[0] * x.shape[1], *x.shape[2:]), PartitionSpec(given[0], *given[2:])
    flat = PartitionSpec(layout[0], *layout[2:])
    y = save_for_backward(product(rows, kernel, fp8.Form(1, flat, given, flat)))
    return y.reshape(*x.shape[:2], *y.shape[1:])


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _product(x: Float[Array, "B S ..."], kernel: Float[Array, "..."], layout: PartitionSpec) -> Float[Array, "B S ..."]:
    """`x`, all but its first two axes, contracted with the leading axes of `kernel`, laid out so.

    Its backward gathers the cotangent once for both of its products: XLA does so of its own accord only where none of
    the axes is one long.
    """
    contracted = (tuple(range(2, x.ndim)), tuple(range(x.ndim - 2)))
    return jax.lax.dot_general(x, kernel, (contracted, ((), ())), out_sharding=layout)


def _product_forward(x: Array, kernel: Array, layout: PartitionSpec) -> tuple[Array, tuple[Array, Array]]:
    return _product(x, kernel, layout), (x, kernel)


def _product_backward(layout: PartitionSpec, kept: tuple[Array, Array], cotangent: Array) -> tuple[Array, Array]:
    x, kernel = kept
    of_x, of_kernel = (jax.typeof(array).sharding.spec for array in kept)
    num_inputs = x.ndim - 2
    cotangent = jax.sharding.reshard(cotangent, PartitionSpec(*of_x[:2], *of_kernel[num_inputs:]))
    outputs = (tuple(range(2, cotangent.ndim)), tuple(range(num_inputs, kernel.ndim)))
    to_x = jax.lax.dot_general(cotangent, kernel, (outputs, ((), ())), out_sharding=of_x)
    return to_x, jax.lax.dot_general(x, cotangent, (((0, 1), (0, 1)), ((), ())), out_sharding=of_kernel)


_product.defvjp(_product_forward, _product_backward)
