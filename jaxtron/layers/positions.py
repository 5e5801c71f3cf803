"""Positions that act inside attention: rotary embeddings and ALiBi slopes. (Learned ones: `embedding.py`.)"""

import math

import jax.numpy as jnp
import numpy as np

from jaxtron.layers.config import RotaryConfig, RotaryScaling
from jaxtron.sharding.context import positions
from jaxtron.sharding.rules import current
from jaxtron.typing import Array, Float, Int


def local_positions(length: int) -> Int[Array, "S"]:
    """Places in the whole sequence of the `length` tokens here, which are some of it where `mesh.context` splits it."""
    rules = current()
    return positions(rules.context, rules.parts("context"), length)


def rotary_frequencies(config: RotaryConfig, rotated: int, length: int = 1) -> np.ndarray:
    """Radians per position, one for each pair of so many rotated dimensions, in sequences of so many positions."""
    powers, scaling = -np.arange(0, rotated, 2, dtype=np.float64) / rotated, config.scaling
    frequencies = config.base**powers
    if scaling is None:
        return frequencies
    if scaling.kind == "yarn":
        kept = _kept_by_yarn(config.base, scaling, rotated)
        return frequencies * (kept + (1.0 - kept) / scaling.factor)
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    if scaling.kind == "longrope":
        is_long = length > scaling.original_length
        return frequencies / np.asarray(scaling.long_factors if is_long else scaling.short_factors)
    if scaling.kind == "dynamic":
        # of one pair the frequency is 1 whatever the base
        longer = max(length / scaling.original_length, 1.0)
        stretch = (scaling.factor * longer - (scaling.factor - 1.0)) ** (rotated / max(rotated - 2, 1))
        return (config.base * stretch) ** powers
    turns = scaling.original_length * frequencies / (2 * math.pi)
    blend = (turns - scaling.low_frequency_factor) / (scaling.high_frequency_factor - scaling.low_frequency_factor)
    blend = np.clip(blend, 0.0, 1.0)
    return frequencies * (blend + (1.0 - blend) / scaling.factor)


def _kept_by_yarn(base: float, scaling: RotaryScaling, rotated: int) -> np.ndarray:
    """What of each frequency is not stretched: all where a pair turns often, nothing where it seldom does (2309.00071).

    Between by the pair's number, from the whole number below the one bound to that above the other, as its code does,
    or between the bounds as they are.
    """

    def pair(turns: float) -> float:
        """The number, not a whole one, of the pair that turns so often in the original length."""
        return rotated * math.log(scaling.original_length / (turns * 2 * math.pi)) / (2 * math.log(base))

    low, high = pair(scaling.beta_fast), pair(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotated - 1)
    # apart, however short the training's sequences were
    width = max(high - low, 0.001)
    return 1.0 - np.clip((np.arange(rotated // 2) - low) / width, 0.0, 1.0)


def rotary_tables(
    config: RotaryConfig, rotated: int, places: Int[Array, "*B S"], length: int = 1
) -> tuple[Float[Array, "*B S P"], Float[Array, "*B S P"]]:
    """Cosines and sines at places of a sequence of so many positions for the P rotated dimensions (both halves alike),
    in float32.

    Both are multiplied by what the scaling says of what is rotated.
    """
    frequencies = jnp.asarray(rotary_frequencies(config, rotated, length), jnp.float32)
    angles = places.astype(jnp.float32)[..., None] * frequencies
    angles = jnp.concatenate([angles, angles], -1)
    factor = 1.0 if config.scaling is None else config.scaling.magnitude
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return (cos, sin) if factor == 1.0 else (cos * factor, sin * factor)


def rotate(
    x: Float[Array, "B S N D"], tables: tuple[Float[Array, "*B S P"], Float[Array, "*B S P"]]
) -> Float[Array, "B S N D"]:
    """`x` with its first P dimensions rotated, halves paired as GPT-NeoX and Llama's Hugging Face weights do.

    The tables are of all rows, or of each (packed documents).
    """
    cos, sin = (table[..., None, :] for table in tables)
    rotated, rest = x[..., : cos.shape[-1]].astype(jnp.float32), x[..., cos.shape[-1] :]
    first, second = jnp.split(rotated, 2, -1)
    turned = rotated * cos + jnp.concatenate([-second, first], -1) * sin
    return jnp.concatenate([turned.astype(x.dtype), rest], -1)


def alibi_slopes(num_heads: int) -> np.ndarray:
    """Slope of each head's linear penalty (Press et al., 2108.12409; other head counts as in its released code)."""
    power = 2 ** math.floor(math.log2(num_heads))
    slopes = 2.0 ** (-8.0 * np.arange(1, power + 1) / power)
    extra = 2.0 ** (-4.0 * np.arange(1, 2 * (num_heads - power) + 1, 2) / power)
    return np.concatenate([slopes, extra])
