"""Attention over a sequence on several devices equals attention over all of it on one."""

import functools
import itertools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from jaxtron.config import UserError
from jaxtron.kernels.attention import chunked, reference
from jaxtron.kernels.attention.attention import attention
from jaxtron.kernels.attention.mosaic_tiles import Scoring, visits
from jaxtron.kernels.attention.spec import AttentionSpec
from jaxtron.layers import context_parallel
from jaxtron.layers.attention import Sharded
from jaxtron.sharding.config import ContextConfig, MeshConfig, ShardingConfig
from jaxtron.sharding.context import part, positions, starts
from jaxtron.sharding.folding import FLAGS
from jaxtron.sharding.mesh import build_mesh
from jaxtron.sharding.rules import make_rules, use

ROWS, LENGTH, HEADS, KV_HEADS, DIM = 2, 64, 8, 8, 8
METHODS = {
    "ring": ContextConfig(method="ring"),
    "all_gather": ContextConfig(method="all_gather"),
    "all_to_all": ContextConfig(method="all_to_all"),
    "hierarchical": ContextConfig(method="hierarchical", inner=2),
}
SLOW = pytest.mark.slow
SPECS = {
    "causal": AttentionSpec(),
    "full": AttentionSpec(causal=False),
    "window": AttentionSpec(window=11),
    "slopes": AttentionSpec(alibi_slopes=jnp.linspace(0.1, 0.9, HEADS)),
    "soft cap": AttentionSpec(logits_soft_cap=2.0),
    # of less distances than there are
    "distances": AttentionSpec(causal=False, distance_bias=jnp.sin(jnp.arange(HEADS * 21.0)).reshape(HEADS, 21)),
}
SEGMENTS = jnp.asarray(np.repeat([[0, 1, 2, 3], [0, 0, 1, 1]], LENGTH // 4, 1), jnp.int32)


@functools.cache
def inputs(kv_heads: int = KV_HEADS, dtype: str = "float32") -> tuple[jax.Array, ...]:
    """Queries, keys, values, and a cotangent."""
    keys = jax.random.split(jax.random.key(0), 4)
    heads = (HEADS, kv_heads, kv_heads, HEADS)
    return tuple(
        jax.random.normal(key, (ROWS, LENGTH, count, DIM), dtype) for key, count in zip(keys, heads, strict=True)
    )


def whole(spec: AttentionSpec, q, k, v, dout):
    out, lse = reference.forward(q, k, v, spec)
    delta = jnp.swapaxes(jnp.sum(dout * out, -1), 1, 2)
    return out, lse, *reference.backward(q, k, v, lse, delta, dout, spec)


def split(config: ContextConfig, size: int, spec: AttentionSpec, arrays, module=chunked):
    """The same on devices that each have a part, put together again by position."""
    rules = make_rules(build_mesh(MeshConfig(data=1, context=size), jax.devices()[:size]), ShardingConfig(), config)

    segments = {name: getattr(spec, name) for name in ("q_segment_ids", "kv_segment_ids")}

    def local(segments, *arrays):
        q, k, v, dout = (part(config, size, x, 1) for x in arrays)
        own = replace(spec, **{name: x if x is None else part(config, size, x, 1) for name, x in segments.items()})

        def attend(q, k, v, table):
            return attention(q, k, v, replace(own, distance_bias=table), Sharded(module))

        # as a layer calls it, with its own derivative
        (out, lse), pull = jax.vjp(attend, q, k, v, spec.distance_bias)
        *gradients, dtable = pull((dout, jnp.zeros_like(lse)))
        places = (positions(config, size, x.shape[1])[None] for x in (q, k))
        shared = () if dtable is None else (jax.lax.psum(dtable, "context")[None],)
        return *places, *(x[None] for x in (out, jnp.swapaxes(lse, 1, 2), *gradients)), *shared

    specs = {"in_specs": PartitionSpec(), "out_specs": PartitionSpec("context")}
    run = jax.shard_map(local, **specs, axis_names=set(FLAGS), check_vma=False)
    with use(rules):
        q_place, kv_place, *parts = jax.jit(run)(segments, *arrays)

    def joined(x, place):
        """[device, row, position, ...] as [row, position, ...]."""
        order = np.argsort(np.asarray(place).reshape(-1))
        return np.moveaxis(np.asarray(x), 0, 1).reshape(ROWS, -1, *x.shape[3:])[:, order]

    places = (q_place, q_place, q_place, kv_place, kv_place)
    out, lse, *gradients = (joined(x, place) for x, place in zip(parts[:5], places, strict=True))
    return out, np.swapaxes(lse, 1, 2), *gradients, *(np.asarray(table)[0] for table in parts[5:])


def assert_equal(found, expected):
    names = ("out", "lse", "dq", "dk", "dv", "dtable")[: len(expected)]
    for name, one, other in zip(names, found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-5, atol=2e-5, err_msg=name)


@pytest.mark.parametrize(
    "spec",
    [spec if spec in ("causal", "distances") else pytest.param(spec, marks=SLOW) for spec in SPECS],
)
@pytest.mark.parametrize("method", METHODS)
def test_parts_of_a_sequence_equal_the_whole(method: str, spec: str):
    arrays = inputs()
    assert_equal(split(METHODS[method], 4, SPECS[spec], arrays), whole(SPECS[spec], *arrays))


@pytest.mark.parametrize("method", ["ring", *(pytest.param(name, marks=SLOW) for name in METHODS if name != "ring")])
def test_another_sequence_lies_on_the_devices_too(method: str):
    """Cross-attention: three times as many keys as queries, padding behind both."""
    q, _, _, dout = inputs()
    k, v = (jax.random.normal(jax.random.key(key), (ROWS, 3 * LENGTH, KV_HEADS, DIM)) for key in (5, 6))
    text = {"q_segment_ids": jnp.arange(LENGTH) < LENGTH - 9, "kv_segment_ids": jnp.arange(3 * LENGTH) < LENGTH + 5}
    segments = {name: jnp.broadcast_to(x.astype(jnp.int32), (ROWS, *x.shape)) for name, x in text.items()}
    spec = AttentionSpec(causal=False, crosses=True, **segments)
    assert_equal(split(METHODS[method], 4, spec, (q, k, v, dout)), whole(spec, q, k, v, dout))


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 8])
@pytest.mark.parametrize("method", ["ring", "all_gather", "all_to_all"])
def test_any_number_of_devices(method: str, size: int):
    arrays = inputs()
    assert_equal(split(METHODS[method], size, AttentionSpec(), arrays), whole(AttentionSpec(), *arrays))


@pytest.mark.parametrize("method", ["ring", *(pytest.param(name, marks=SLOW) for name in METHODS if name != "ring")])
@pytest.mark.parametrize("causal", [True, pytest.param(False, marks=SLOW)])
def test_documents_do_not_see_each_other(method: str, causal: bool):
    spec = AttentionSpec(causal=causal, q_segment_ids=SEGMENTS, kv_segment_ids=SEGMENTS)
    arrays = inputs()
    assert_equal(split(METHODS[method], 4, spec, arrays), whole(spec, *arrays))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ring", "all_gather"])
def test_few_key_heads(method: str):
    arrays = inputs(kv_heads=2)
    assert_equal(split(METHODS[method], 4, AttentionSpec(), arrays), whole(AttentionSpec(), *arrays))


@pytest.mark.parametrize(
    ("config", "size"), [(METHODS["ring"], 8), (METHODS["all_to_all"], 4), (METHODS["hierarchical"], 8)]
)
def test_pieces_are_the_whole_and_causal_work_is_even(config: ContextConfig, size: int):
    length = LENGTH // size
    inner, outer = config.groups(size)
    pieces = [[int(start) for start in starts(config, size, rank, length)] for rank in range(size)]
    covered = sorted(itertools.chain(*(range(start, start + length // 2) for starts in pieces for start in starts)))
    assert covered == list(range(LENGTH))
    # keys that a ring member's queries see, which its neighbours share out by heads
    work = [0] * outer
    for rank, own in enumerate(pieces):
        work[rank // inner] += sum(start + place + 1 for start in own for place in range(length // 2))
    assert max(work) <= 1.05 * min(work)


class _Counting:
    """Instead of attention, the tiles that our kernels would visit, as an output that merges to their mean."""

    features = frozenset({"log_sum_exp"})
    unsupported_reason = backward = staticmethod(pytest.fail)

    @staticmethod
    def forward(q, k, v, spec):
        block = (128, 128)
        scoring = Scoring.of(spec, spec.scale(q.shape[3]), k.shape[1], block[1])
        bounds = visits(spec, scoring, q.shape[1], k.shape[1], block)
        count = jnp.sum(bounds[..., 1] - bounds[..., 0]) * q.shape[2]
        return jnp.full(q.shape, count, jnp.float32), jnp.zeros((q.shape[0], q.shape[2], q.shape[1]))


@pytest.mark.parametrize("method", ["ring", "all_gather"])
def test_every_device_visits_as_many_tiles(method: str):
    """Where heads are split, devices of a group visit the same, and groups are a ring."""
    size, length, config = 8, 16384, METHODS[method]

    def count(q):
        out, _ = context_parallel.forward(q, q, q, AttentionSpec(), _Counting, config, size)
        return out[0, :, 0, 0]

    with use(make_rules(build_mesh(MeshConfig(data=1), jax.devices()[:1]), ShardingConfig(), config)):
        parts = jax.vmap(count, axis_name="context")(jnp.zeros((size, 1, length // size, 2, 1)))
    # a first half meets one block of each member of the ring, a second half two; all at once if gathered
    weights = (1, 1) if method == "all_gather" else (size, 2 * size)
    tiles = np.asarray(parts).reshape(size, 2, -1).mean(-1) @ np.array(weights)
    assert tiles.min() > 0 and tiles.max() <= 1.05 * tiles.min(), tiles


def test_groups_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match="context.inner 8 must divide mesh.context 12 and be smaller"):
        ContextConfig(method="hierarchical").groups(12)
