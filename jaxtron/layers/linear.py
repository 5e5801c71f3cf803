"""Linear layers whose parallelism is in the names of their axes."""

import jax
from flax import nnx
from jax.nn import initializers
from jax.sharding import PartitionSpec

from jaxtron.sharding.parameters import parameter
from jaxtron.sharding.rules import current, spec
from jaxtron.typing import Array, Float


def normal(std: float) -> initializers.Initializer:
    """Megatron's initializer: a normal of mean 0 and the given standard deviation."""
    return initializers.normal(std)


class Linear(nnx.Module):
    """`y = x @ kernel + bias`; inputs and outputs may be several named dimensions, flattened in the product.

    Column parallel: `inputs={"embed": e}, outputs={"mlp": f}`. Row parallel: the reverse. Which mesh axis that means is
    decided in `sharding/rules.py`.
    """

    def __init__(
        self, inputs: dict[str, int], outputs: dict[str, int], *, bias: bool, std: float, rngs: nnx.Rngs
    ) -> None:
        sizes, names = (*inputs.values(), *outputs.values()), (*inputs, *outputs)
        self.kernel = parameter(rngs, normal(std), sizes, axes=names, role="kernel")
        self.bias = (
            parameter(rngs, initializers.zeros, tuple(outputs.values()), axes=bias_axes(outputs), role="bias")
            if bias
            else None
        )

    def __call__(self, x: Float[Array, "B S *inputs"], *logical: str | None) -> Float[Array, "B S *outputs"]:
        """The product laid out as `logical` names: partial sums over a split input are reduced on the way there."""
        y = project(x, self.kernel[...], logical)
        return y if self.bias is None else y + self.bias[...].astype(y.dtype)


def bias_axes(outputs: dict[str, int]) -> tuple[str, ...]:
    """Axes of a bias: those of the outputs, with `embed` (which batch axes would shard) replaced by `norm`."""
    return tuple("norm" if name == "embed" else name for name in outputs)


def project(
    x: Float[Array, "B S ..."], kernel: Float[Array, "..."], logical: tuple[str | None, ...]
) -> Float[Array, "..."]:
    """`x` (all but its first two axes) contracted with the leading axes of `kernel`, laid out as `logical` names.

    On one tensor part, rows and positions become one axis: a plain matrix product and its gradients need no transposed
    copies, which on a CPU cost more than the product. On several they must stay apart: the backward's partial sums
    become a reduce-scatter along the sequence only where the sequence is an axis.
    """
    num_inputs = x.ndim - 2
    layout = spec(*logical)
    if current().parts("tensor") > 1:
        contracted = (tuple(range(2, x.ndim)), tuple(range(num_inputs)))
        return jax.lax.dot_general(x, kernel, (contracted, ((), ())), out_sharding=layout)
    rows = x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])
    contracted = (tuple(range(1, rows.ndim)), tuple(range(num_inputs)))
    y = jax.lax.dot_general(rows, kernel, (contracted, ((), ())), out_sharding=PartitionSpec(layout[0], *layout[2:]))
    return y.reshape(*x.shape[:2], *y.shape[1:])
