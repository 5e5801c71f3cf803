"""Cross-entropy against the full logits, values and gradients."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxtron.layers import loss
from jaxtron.layers.loss import LogitForm, cross_entropy
from jaxtron.sharding.rules import use

ROWS, LENGTH, EMBED, VOCAB, PADDED = 3, 8, 6, 13, 16


def make_arrays(dtype=np.float32, rows=ROWS, length=LENGTH):
    generator = np.random.default_rng(0)
    x, table = generator.normal(size=(rows, length, EMBED)), generator.normal(size=(PADDED, EMBED))
    # rows of padding that would win every maximum if they took part
    table[VOCAB:] *= 100
    targets = generator.integers(0, VOCAB, (rows, length))
    weights = generator.random((rows, length)) * (generator.random((rows, length)) > 0.3)
    return x.astype(dtype), table.astype(dtype), targets, weights.astype(np.float32)


def reference(x, table, targets, weights, z_loss):
    """Sums over all tokens from the logits of the real vocabulary."""
    logits = jnp.einsum("bse,ve->bsv", x, table[:VOCAB])
    log_z = jax.nn.logsumexp(logits, -1)
    nll = log_z - jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
    return (weights * (nll + z_loss * log_z**2)).sum(), (weights * nll).sum()


@pytest.fixture
def run(in_region):
    """`run(rules, arrays, z_loss)`: total and reported sum, and gradients of `scale * total` by `x` and `table`."""

    def run(rules, arrays, z_loss, scale=1.0):
        def loss_and_gradients(x, table, targets, weights):
            def total(x, table):
                total, nll = cross_entropy(x, table, targets, weights, VOCAB, z_loss)
                return scale * total, (total, nll)

            (_, values), gradients = jax.value_and_grad(total, (0, 1), has_aux=True)(x, table)
            return values, gradients

        return in_region(loss_and_gradients)(*place(rules, arrays))

    return run


def place(rules, arrays):
    specs = ((None, "tensor"), ("tensor",), (), ())
    return [
        jax.device_put(array, NamedSharding(rules.mesh, PartitionSpec(*spec)))
        for array, spec in zip(arrays, specs, strict=True)
    ]


@pytest.mark.parametrize("tensor", [1, 4])
@pytest.mark.parametrize("z_loss", [0.0, 0.1])
def test_equals_full_logits(rules_for, in_region, run, tensor, z_loss):
    arrays = make_arrays()
    expected = reference(*arrays, z_loss)
    expected_gradients = jax.grad(lambda *arrays: reference(*arrays, z_loss)[0], (0, 1))(*map(jnp.asarray, arrays))
    with use(rules_for(tensor=tensor)) as rules:
        values, gradients = run(rules, arrays, z_loss, scale=2.0)
        without_gradients = in_region(lambda *arrays: cross_entropy(*arrays, VOCAB, z_loss))(*place(rules, arrays))
    np.testing.assert_allclose(values, expected, rtol=1e-5)
    np.testing.assert_allclose(without_gradients, expected, rtol=1e-5)
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(gradient, 2 * expected_gradient, rtol=1e-4, atol=1e-5)
    assert np.all(np.asarray(gradients[1])[VOCAB:] == 0)


@pytest.mark.parametrize("tensor", [1, 2])
@pytest.mark.parametrize(
    ("rows", "length", "most", "tokens"),
    # the last: 22 tokens make no even chunks but of 1 and 2, so that 4 of 6 are padded
    [(ROWS, LENGTH, 1, 1), (ROWS, LENGTH, 3, 3), (ROWS, LENGTH, 12, 12), (11, 2, 7, 6)],
)
def test_chunks_change_nothing(rules_for, run, in_region, monkeypatch, tensor, rows, length, most, tokens):
    arrays = make_arrays(rows=rows, length=length)
    with use(rules_for(tensor=tensor)) as rules:
        whole = run(rules, arrays, 0.1)
        monkeypatch.setattr(loss, "CHUNK_ELEMENTS", most * PADDED // tensor)
        assert loss._chunk_length(rows * length, PADDED // tensor) == tokens
        chunked = run(rules, arrays, 0.1)
        scored = in_region(lambda *arrays: cross_entropy(*arrays, VOCAB, 0.1))(*place(rules, arrays))
    for one, other in zip(jax.tree.leaves((chunked, scored)), jax.tree.leaves((whole, whole[0])), strict=True):
        assert one.shape == other.shape
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tensor", [1, 2])
@pytest.mark.parametrize("most", [PADDED * ROWS * LENGTH, 5 * PADDED])
def test_a_bias_a_scale_and_a_cap_are_part_of_the_logits(rules_for, in_region, monkeypatch, tensor, most):
    """In the value and in every gradient, padding without a part."""
    x, table, targets, weights = make_arrays()
    bias, form = np.random.default_rng(3).normal(size=PADDED).astype(np.float32), LogitForm(scale=0.6, soft_cap=1.5)

    def formula(x, table, bias):
        raw = 0.6 * jnp.einsum("bse,ve->bsv", x, table[:VOCAB]) + bias[:VOCAB]
        logits = 1.5 * jnp.tanh(raw / 1.5)
        log_z = jax.nn.logsumexp(logits, -1)
        nll = log_z - jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
        return (weights * (nll + 0.1 * log_z**2)).sum()

    def ours(x, table, targets, weights, bias):
        return jax.value_and_grad(
            lambda *own: cross_entropy(own[0], own[1], targets, weights, VOCAB, 0.1, own[2], form)[0], (0, 1, 2)
        )(x, table, bias)

    expected = jax.value_and_grad(formula, (0, 1, 2))(*map(jnp.asarray, (x, table, bias)))
    with use(rules_for(tensor=tensor)) as rules:
        monkeypatch.setattr(loss, "CHUNK_ELEMENTS", most // tensor)
        placed = place(rules, (x, table, targets, weights))
        placed.append(jax.device_put(bias, NamedSharding(rules.mesh, PartitionSpec("tensor"))))
        found = in_region(ours)(*placed)
    assert np.abs(np.asarray(expected[1][2])[:VOCAB]).min() > 1e-4
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def test_chunks_are_about_the_longest_that_fit(rules_for, monkeypatch):
    monkeypatch.setattr(loss, "CHUNK_ELEMENTS", 1000)
    with use(rules_for()):
        assert loss._chunk_length(24, 100) == 8
        assert loss._chunk_length(12, 10) == 12
        assert loss._chunk_length(7, 300) == 3
        assert loss._chunk_length(12, 5000) == 1
    with use(replace(rules_for(), stands_for="NVIDIA H100 80GB HBM3")):
        assert loss._chunk_length(2**20, 2**10) == loss.GPU_CHUNK_ELEMENTS // 2**10


@pytest.mark.parametrize("tokens", [16381, 2 * 8191, 3 * 5 * 7 * 11 * 13 + 1, 16384, 4095])
@pytest.mark.parametrize("vocab", [257, 6400, 51200, 256000])
def test_any_number_of_tokens_has_few_chunks(rules_for, tokens, vocab):
    with use(rules_for()):
        size = loss._chunk_length(tokens, vocab)
    fewest = -(-tokens * vocab // loss.CHUNK_ELEMENTS)
    chunks = -(-tokens // size)
    assert size * vocab <= loss.CHUNK_ELEMENTS and chunks <= 2 * fewest + 1
    # what is padded is less than a token for each chunk
    assert chunks * size - tokens < chunks


def test_tokens_of_weight_zero_have_no_part(rules_for, run):
    x, table, targets, weights = make_arrays()
    weights[:, 5:] = 0
    other_x, other_targets = x.copy(), targets.copy()
    other_x[:, 5:], other_targets[:, 5:] = 7.0, 0
    with use(rules_for(data=1)) as rules:
        values, (dx, dtable) = run(rules, (x, table, targets, weights), 0.1)
        other_values, (_, other_dtable) = run(rules, (other_x, table, other_targets, weights), 0.1)
        nothing, gradients = run(rules, (x, table, targets, 0 * weights), 0.1)
    np.testing.assert_array_equal(values, other_values)
    np.testing.assert_array_equal(dtable, other_dtable)
    assert np.all(np.asarray(dx)[:, 5:] == 0)
    assert nothing == (0, 0) and all(np.all(np.asarray(gradient) == 0) for gradient in gradients)


def test_large_logits_do_not_overflow(rules_for, run):
    x, table, targets, weights = make_arrays()
    with use(rules_for(data=1)) as rules:
        values, gradients = run(rules, (100 * x, table, targets, weights), 0.0)
    np.testing.assert_allclose(values, reference(100 * x, table, targets, weights, 0.0), rtol=1e-5)
    assert all(np.isfinite(gradient).all() for gradient in gradients)


def test_bfloat16_inputs_give_float32_sums(rules_for, run):
    arrays = make_arrays(jnp.bfloat16)
    expected = reference(*(jnp.asarray(array, jnp.float32) for array in arrays[:2]), *arrays[2:], 0.0)
    with use(rules_for(data=1)) as rules:
        values, gradients = run(rules, arrays, 0.0)
    assert [value.dtype for value in values] == [jnp.float32] * 2
    assert [gradient.dtype for gradient in gradients] == [jnp.bfloat16] * 2
    np.testing.assert_allclose(values, expected, rtol=1e-4)
