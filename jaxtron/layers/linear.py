"""Linear layers whose parallelism is in the names of their axes."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn import initializers
from jax.sharding import PartitionSpec

from jaxtron.layers import fp8, fp8_blocks
from jaxtron.layers.config import LoraConfig, Scaling
from jaxtron.layers.inputs import LayerInputs, dropout
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

    With an adapter (`lora`) it adds what that makes of the same inputs.

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
        self.num_inputs = len(inputs)
        self.lora: Adapter | None = nnx.data(None)
        sizes, names = (*inputs.values(), *outputs.values()), (*inputs, *outputs)
        self.kernel = parameter(rngs, normal(std), sizes, axes=names, role="kernel")
        self.bias = (
            parameter(rngs, initializers.zeros, tuple(outputs.values()), axes=bias_axes(outputs), role="bias")
            if bias
            else None
        )

    def __call__(
        self,
        x: Float[Array, "B S *inputs"],
        *logical: str | None,
        inputs: LayerInputs,
        own: Float[Array, "B S *inputs"] | None = None,
    ) -> Float[Array, "B S *outputs"]:
        """The product laid out as `logical` names: partial sums over a split input are reduced on the way there.

        An adapter drops by the keys of the layer's `inputs`, and reads `own`: `x` where its sequence was not
        gathered yet (none: `x` itself).
        """
        y = project(x, self.kernel[...], logical, self.scaling)
        y = y if self.bias is None else y + self.bias[...].astype(y.dtype)
        return self.adapted(y, x if own is None else own, *logical, inputs=inputs)

    def adapted(
        self,
        y: Float[Array, "B S *outputs"],
        x: Float[Array, "B S *inputs"],
        *logical: str | None,
        inputs: LayerInputs,
    ) -> Float[Array, "B S *outputs"]:
        """`y`, which the weights made of `x`, with what the adapter makes of it."""
        # the sum is kept for the backward, which then needs neither summand
        return y if self.lora is None else save_for_backward(y + self.lora(x, *logical, inputs=inputs))

    def adapter(self, config: LoraConfig, site: int, rngs: nnx.Rngs) -> "Adapter":
        """A new adapter for a layer like this one, which may be one of a stack; `site` tells it from others of the same
        branch of a layer, for what it drops."""
        spec = self.kernel.get_metadata("spec")
        sizes = tuple(zip(spec.axes, spec.shape, strict=True))
        return Adapter(dict(sizes[: self.num_inputs]), dict(sizes[self.num_inputs :]), config, site, rngs)

    def merged(self) -> Float[Array, "..."]:
        """Its weights, or those of a stack of such layers, with what the adapter adds to them, in float32."""
        kernel = self.kernel[...].astype(jnp.float32)
        if self.lora is None:
            return kernel
        make, num_rows = self.lora.product, kernel.ndim - len(self.kernel.get_metadata("spec").shape)
        for _ in range(num_rows):
            make = jax.vmap(make)
        return kernel + make(self.lora.a[...], self.lora.b[...])


class Adapter(nnx.Module):
    """What is learned beside weights that stay: `scale * (x @ a) @ b` of a low rank, 0 before the first step.

    `a` is drawn as peft and PyTorch do (Kaiming's uniform with a = sqrt(5)), `b` is zeros. Where outputs are several
    matrices side by side (gate and up), each has its own pair, as it has in peft. With a dropout each pair reads what
    that leaves of `x`, drawn for it alone.
    """

    def __init__(
        self, inputs: dict[str, int], outputs: dict[str, int], config: LoraConfig, site: int, rngs: nnx.Rngs
    ) -> None:
        self.scale, self.num_inputs, self.inputs = config.scale, len(inputs), tuple(inputs)
        self.dropout, self.site = config.dropout, site
        rank = {"rank": config.rank}
        beside = {name: size for name, size in outputs.items() if name == "gate"}
        others = {name: size for name, size in outputs.items() if name not in beside}
        self.are_several = bool(beside)
        down, up = {**inputs, **beside, **rank}, {**beside, **rank, **others}
        width = len(inputs)
        matrices = tuple(range(width, width + len(beside)))
        draw = initializers.variance_scaling(1 / 3, "fan_in", "uniform", tuple(range(width)), -1, matrices)
        self.a = parameter(rngs, draw, tuple(down.values()), axes=tuple(down), role="adapter")
        self.b = parameter(rngs, initializers.zeros, tuple(up.values()), axes=tuple(up), role="adapter")

    def __call__(
        self, x: Float[Array, "B S *inputs"], *logical: str | None, inputs: LayerInputs
    ) -> Float[Array, "B S *outputs"]:
        """Its summand of the layer's outputs, laid out as they are.

        On several tensor parts what is narrow travels: each makes it of its own positions, or reduces it to them.
        """
        given, parts = jax.typeof(x).sharding.spec, current().parts("tensor")
        if parts == 1:
            # a split by name alone
            x = jax.sharding.reshard(x, PartitionSpec(given[0], None, *given[2:]))
        # input that is split along its width is reduced to where the outputs' positions are
        is_split = parts > 1 and spec_axes(given)[1] != ()
        inputs = inputs.fold(self.site)
        if not self.are_several:
            return project(self._narrow(x, self.a[...], logical, is_split, inputs), self.b[...], logical)
        pairs, own = range(self.b[...].shape[0]), (*logical[:2], *logical[3:])
        if self.dropout and inputs.keys is not None:
            each = [self._narrow(x, self.a[..., pair, :], own, is_split, inputs.fold(pair)) for pair in pairs]
        else:
            both = self._narrow(x, self.a[...], logical, is_split, inputs, beside=(None,))
            each = [both[:, :, pair] for pair in pairs]
        return jnp.stack([project(narrow, self.b[pair], own) for narrow, pair in zip(each, pairs, strict=True)], 2)

    def _narrow(
        self,
        x: Float[Array, "B S *inputs"],
        a: Float[Array, "*inputs_and_gates R"],
        logical: tuple[str | None, ...],
        is_split: bool,
        inputs: LayerInputs,
        beside: tuple[None, ...] = (),
    ) -> Float[Array, "B S *gates R"]:
        """`scale * x @ a` of what dropout leaves, where the outputs' positions are."""
        batch, sequence, *_ = logical
        x = dropout(x, self.dropout, inputs, batch, "seq" if is_split else "full_seq", *self.inputs)
        narrow = project(x, a, (batch, "seq" if is_split else sequence, *beside, "rank"))
        if current().parts("tensor") > 1:
            narrow = constrain(narrow, batch, sequence, *beside, "rank")
        return narrow * self.scale

    def product(self, a: Float[Array, "..."], b: Float[Array, "..."]) -> Float[Array, "..."]:
        """`scale * a @ b` of one layer: what it adds to the weights."""
        if not self.are_several:
            return self.scale * jnp.tensordot(a, b, 1)
        pairs = (jnp.tensordot(jnp.take(a, number, -2), b[number], 1) for number in range(b.shape[0]))
        return self.scale * jnp.stack(list(pairs), self.num_inputs)


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
