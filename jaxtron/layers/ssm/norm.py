"""The norm of a state-space layer, with its gate, over groups of heads."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn import initializers

from jaxtron.layers.ssm.recurrences import HEADS, STEPS
from jaxtron.sharding.parameters import parameter
from jaxtron.sharding.rules import constrain, current, spec
from jaxtron.typing import Array, Float


class GatedNorm(nnx.Module):
    """RMSNorm of y x silu(z), each of the groups of neighbouring heads by itself; the gate comes first (Megatron's
    `norm_before_gate=False`)."""

    def __init__(self, num_heads: int, head_dim: int, num_groups: int, *, epsilon: float, rngs: nnx.Rngs) -> None:
        self.num_groups, self.epsilon = num_groups, epsilon
        shape, axes = (num_heads, head_dim), ("heads", "head_dim")
        self.scale = parameter(rngs, initializers.ones, shape, axes=axes, role="scale")

    def __call__(self, y: Float[Array, "B S H P"], z: Float[Array, "B S H P"]) -> Float[Array, "B S H P"]:
        y, z = constrain(y, *HEADS), constrain(z, *HEADS)
        wide = y.astype(jnp.float32) * jax.nn.silu(z.astype(jnp.float32))
        inverse = jax.lax.rsqrt(self._of_groups(jnp.mean(jnp.square(wide), -1)) + self.epsilon)
        return (wide * inverse[..., None] * self.scale[...].astype(jnp.float32)).astype(y.dtype)

    def _of_groups(self, means: Float[Array, "B S H"]) -> Float[Array, "B S H"]:
        """The mean over each head's group; of a group on several devices, from the numbers of all heads."""
        group = "groups" if current().splits("groups", self.num_groups) else None
        if group is None:
            means = constrain(means, "batch", "full_seq", None)
        apart = (*means.shape[:2], self.num_groups, means.shape[2] // self.num_groups)
        layout = spec("batch", "full_seq", group, None)
        grouped = jnp.mean(jnp.reshape(means, apart, out_sharding=layout), -1, keepdims=True)
        everyone = jnp.broadcast_to(grouped, apart, out_sharding=layout)
        back = spec(*STEPS) if group else spec("batch", "full_seq", None)
        return constrain(jnp.reshape(everyone, means.shape, out_sharding=back), *STEPS)


class GatedHeadNorm(nnx.Module):
    """RMSNorm of each head by itself, with one scale for all, times silu(z): the gate comes last (Qwen3-Next)."""

    def __init__(self, head_dim: int, *, epsilon: float, rngs: nnx.Rngs) -> None:
        self.epsilon = epsilon
        self.scale = parameter(rngs, initializers.ones, (head_dim,), axes=("head_dim",), role="scale")

    def __call__(self, y: Float[Array, "B S H P"], z: Float[Array, "B S H P"]) -> Float[Array, "B S H P"]:
        wide = y.astype(jnp.float32)
        normed = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), -1, keepdims=True) + self.epsilon)
        return (normed * self.scale[...].astype(jnp.float32) * jax.nn.silu(z.astype(jnp.float32))).astype(y.dtype)
