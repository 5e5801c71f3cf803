"""Rotary frequencies and tables, Llama 3's scaling, and ALiBi slopes."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from jaxtron.layers.config import RotaryConfig, RotaryScaling
from jaxtron.layers.positions import alibi_slopes, rotary_frequencies, rotary_tables, rotate


def test_frequencies_are_a_geometric_series():
    np.testing.assert_allclose(rotary_frequencies(RotaryConfig(), 8), [1, 0.1, 0.01, 0.001], rtol=1e-12)
    np.testing.assert_allclose(rotary_frequencies(RotaryConfig(base=16.0), 4), [1, 0.25], rtol=1e-12)


@pytest.mark.parametrize(("head_dim", "fraction", "rotated"), [(64, 1, 64), (64, 0.25, 16), (80, 0.4, 32), (6, 0.5, 2)])
def test_fraction_rotates_an_even_number_of_dimensions(head_dim, fraction, rotated):
    config = RotaryConfig(fraction=fraction)
    assert config.dimensions(head_dim) == rotated
    frequencies = rotary_frequencies(config, config.dimensions(head_dim))
    np.testing.assert_allclose(frequencies, 10000.0 ** (-np.arange(0, rotated, 2) / rotated), rtol=1e-12)


def test_tables_are_cosines_and_sines_of_both_halves():
    cos, sin = rotary_tables(RotaryConfig(base=100.0), 4, jnp.arange(50))
    angles = np.arange(50)[:, None] * np.array([1, 0.1, 1, 0.1])
    assert cos.dtype == sin.dtype == jnp.float32
    np.testing.assert_allclose(cos, np.cos(angles), atol=1e-5)
    np.testing.assert_allclose(sin, np.sin(angles), atol=1e-5)


def test_rotation_turns_pairs_and_leaves_the_rest():
    x = np.random.default_rng(0).normal(size=(1, 3, 2, 6)).astype(np.float32)
    y = np.asarray(rotate(jnp.asarray(x), rotary_tables(RotaryConfig(base=4.0), 4, jnp.arange(3))))
    for position in range(3):
        for pair, angle in enumerate((position, position / 2)):
            first, second = x[0, position, :, pair], x[0, position, :, pair + 2]
            turned = first * math.cos(angle) - second * math.sin(angle)
            np.testing.assert_allclose(y[0, position, :, pair], turned, atol=1e-6)
            turned = second * math.cos(angle) + first * math.sin(angle)
            np.testing.assert_allclose(y[0, position, :, pair + 2], turned, atol=1e-6)
    np.testing.assert_array_equal(y[..., 4:], x[..., 4:])


def test_products_of_rotated_vectors_depend_on_their_distance():
    generator = np.random.default_rng(0)
    query, key = (np.broadcast_to(generator.normal(size=8), (1, 40, 1, 8)).astype(np.float32) for _ in range(2))
    tables = rotary_tables(RotaryConfig(), 8, jnp.arange(40))
    query, key = (np.asarray(rotate(jnp.asarray(array), tables))[0, :, 0] for array in (query, key))
    products = query @ key.T
    for distance in range(-5, 6):
        diagonal = np.diagonal(products, distance)
        np.testing.assert_allclose(diagonal, diagonal[0], rtol=1e-4, atol=1e-4)


def test_rotation_is_float32_inside_bfloat16():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 64, 1, 8)), jnp.bfloat16)
    tables = rotary_tables(RotaryConfig(), 8, jnp.arange(64))
    y = rotate(x, tables)
    assert y.dtype == jnp.bfloat16
    exact = rotate(x.astype(jnp.float32), tables).astype(jnp.bfloat16)
    np.testing.assert_array_equal(np.asarray(y), np.asarray(exact))


# Llama 3.1: head dimension 128, base 500000, stretched 8 times from 8192 tokens
LLAMA = RotaryConfig(base=500000.0, scaling=RotaryScaling())


def llama_formula(frequency):
    """As in the released code of Llama 3.1: by wavelength, in three cases."""
    wavelength = 2 * math.pi / frequency
    if wavelength < 8192 / 4:
        return frequency
    if wavelength > 8192 / 1:
        return frequency / 8
    smooth = (8192 / wavelength - 1) / (4 - 1)
    return (1 - smooth) * frequency / 8 + smooth * frequency


def test_llama_scaling_follows_the_formula():
    plain = rotary_frequencies(RotaryConfig(base=500000.0), 128)
    scaled = rotary_frequencies(LLAMA, 128)
    np.testing.assert_allclose(scaled, [llama_formula(frequency) for frequency in plain], rtol=1e-12)


def test_llama_scaling_keeps_short_wavelengths_and_stretches_long_ones():
    plain = rotary_frequencies(RotaryConfig(base=500000.0), 128)
    scaled = rotary_frequencies(LLAMA, 128)
    wavelengths = 2 * math.pi / plain
    short, long = wavelengths < 2048, wavelengths > 8192
    # pairs 0-28 keep theirs, 35-63 are stretched, and six lie between
    assert (short.sum(), long.sum()) == (29, 29)
    np.testing.assert_array_equal(scaled[short], plain[short])
    np.testing.assert_allclose(scaled[long], plain[long] / 8, rtol=1e-12)
    between = scaled[~short & ~long] / plain[~short & ~long]
    assert np.all((between > 1 / 8) & (between < 1)) and np.all(np.diff(between) < 0)


def test_yarn_stretches_by_the_pairs_number_as_deepseek_v3_has_it():
    scaling = RotaryScaling(kind="yarn", factor=40, original_length=4096, mscale=1, mscale_all_dim=1)
    plain = rotary_frequencies(RotaryConfig(), 64)
    scaled = rotary_frequencies(RotaryConfig(scaling=scaling), 64)
    # pair i turns 4096 / (2 pi 10000^(i / 32)) times: 32 times at 10.5, once at 22.5
    stretched = np.clip((np.arange(32) - 10) / (23 - 10), 0, 1)
    np.testing.assert_allclose(scaled, plain * (1 - stretched) + plain / 40 * stretched, rtol=1e-12)
    np.testing.assert_array_equal(scaled[:11], plain[:11])
    # 0.1 ln 40 + 1, squared
    assert scaling.latent_scores == pytest.approx(1.8738, rel=1e-4) and scaling.magnitude == 1.0


def test_yarn_stretches_between_bounds_that_are_no_whole_numbers_as_gpt_oss_has_it():
    scaling = RotaryScaling(kind="yarn", factor=32, original_length=4096, truncate=False)
    plain = rotary_frequencies(RotaryConfig(base=150000), 64)
    scaled = rotary_frequencies(RotaryConfig(base=150000, scaling=scaling), 64)
    low, high = (32 * math.log(4096 / (2 * math.pi * turns)) / math.log(150000) for turns in (32, 1))
    assert (round(low, 2), round(high, 2)) == (8.09, 17.40)
    stretched = np.clip((np.arange(32) - low) / (high - low), 0, 1)
    np.testing.assert_allclose(scaled, plain * (1 - stretched) + plain / 32 * stretched, rtol=1e-12)
    assert 0 < stretched[9] < 1 / (17 - 8)


def test_yarn_makes_what_is_rotated_larger():
    scaling = RotaryScaling(kind="yarn", factor=4, original_length=32)
    cos, sin = rotary_tables(RotaryConfig(scaling=scaling), 8, jnp.arange(20))
    np.testing.assert_allclose(cos**2 + sin**2, (0.1 * math.log(4) + 1) ** 2, rtol=1e-5)
    assert scaling.latent_scores == 1.0 and LLAMA.scaling.magnitude == 1.0


@pytest.mark.parametrize(
    "bad",
    [
        {"fraction": 0.0},
        {"fraction": 1.5},
        {"base": 0.0},
        {"scaling": {"low_frequency_factor": 4.0, "high_frequency_factor": 4.0}},
        {"scaling": {"factor": 0.0}},
        {"scaling": {"original_length": 0}},
        {"scaling": {"mscale": 2.0}},
        {"scaling": {"kind": "yarn", "high_frequency_factor": 8.0}},
        {"scaling": {"kind": "yarn", "beta_fast": 1.0, "beta_slow": 1.0}},
        {"scaling": {"truncate": False}},
    ],
    ids=str,
)
def test_settings_without_meaning_are_errors(bad):
    with pytest.raises(ValueError):
        RotaryConfig(**bad)


@pytest.mark.parametrize("num_heads", [1, 2, 8, 16])
def test_alibi_slopes_of_powers_of_two(num_heads):
    # a geometric series that starts at its own ratio, 2^(-8/n)
    slopes = alibi_slopes(num_heads)
    np.testing.assert_allclose(slopes, [(2 ** (-8 / num_heads)) ** k for k in range(1, num_heads + 1)], rtol=1e-12)


def test_alibi_slopes_of_eight_and_twelve_heads():
    eight = [1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64, 1 / 128, 1 / 256]
    np.testing.assert_allclose(alibi_slopes(8), eight, rtol=1e-12)
    # the released code: those of 8, then every other one of 16
    np.testing.assert_allclose(alibi_slopes(12), eight + list(alibi_slopes(16)[0:8:2]), rtol=1e-12)


@pytest.mark.parametrize("num_heads", [3, 6, 12, 20, 40, 112])
def test_alibi_slopes_of_other_head_counts(num_heads):
    def released(count):
        """`get_slopes` of the authors' code."""
        if math.log2(count).is_integer():
            return list(alibi_slopes(count))
        closest = 2 ** math.floor(math.log2(count))
        return released(closest) + released(2 * closest)[0::2][: count - closest]

    slopes = alibi_slopes(num_heads)
    assert len(slopes) == num_heads == len(set(slopes))
    np.testing.assert_allclose(slopes, released(num_heads), rtol=1e-12)


def test_a_linear_stretch_is_of_all_pairs_alike():
    plain, scaled = (
        rotary_frequencies(RotaryConfig(scaling=one), 8) for one in (None, RotaryScaling(kind="linear", factor=8))
    )
    np.testing.assert_allclose(scaled, plain / 8, rtol=1e-12)


def test_a_dynamic_stretch_grows_the_base_with_the_sequence():
    scaling = RotaryScaling(kind="dynamic", factor=4, original_length=32)
    plain = rotary_frequencies(RotaryConfig(), 8)
    for length in (5, 32):
        np.testing.assert_array_equal(rotary_frequencies(RotaryConfig(scaling=scaling), 8, length), plain)
    # three times as long: 4 x 3 - 3, to the power of 8 / 6
    expected = (10000.0 * 9 ** (8 / 6)) ** (-np.arange(4) / 4)
    np.testing.assert_allclose(rotary_frequencies(RotaryConfig(scaling=scaling), 8, 96), expected, rtol=1e-12)


def test_longrope_stretches_each_pair_by_a_number_of_its_own():
    factors = {"short_factors": (1.0, 2.0), "long_factors": (3.0, 5.0)}
    scaling = RotaryScaling(kind="longrope", factor=4, original_length=32, **factors)
    plain = rotary_frequencies(RotaryConfig(), 4)
    for length, divisors in ((32, (1, 2)), (33, (3, 5))):
        found = rotary_frequencies(RotaryConfig(scaling=scaling), 4, length)
        np.testing.assert_allclose(found, plain / divisors, rtol=1e-12)
    assert scaling.magnitude == pytest.approx(math.sqrt(1 + math.log(4) / math.log(32)))
    assert scaling.model_copy(update={"attention_factor": 1.25}).magnitude == 1.25


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "linear", "original_length": 5}, "original_length 5 has no effect with kind linear"),
        ({"kind": "dynamic", "truncate": False}, "truncate false has no effect with kind dynamic"),
        ({"kind": "dynamic", "factor": 0.5}, "factor 0.5 of kind dynamic must be 1 or more"),
        ({"kind": "longrope", "long_factors": (1.0,)}, r"short_factors \[\] of kind longrope must be numbers above 0"),
        ({"kind": "llama3", "attention_factor": 2.0}, "attention_factor 2.0 has no effect with kind llama3"),
    ],
)
def test_settings_of_another_rule_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        RotaryScaling(**settings)
