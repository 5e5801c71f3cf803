"""Which probabilities are dropped: the generator, what a thread draws, what is compiled of it, and how even it is."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import ptx
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxtron.kernels.attention import dropout
from jaxtron.kernels.attention.mosaic_dropout import thread_words, tile_survives
from jaxtron.kernels.attention.spec import AttentionSpec
from jaxtron.kernels.dropout import threshold
from jaxtron.kernels.mosaic import Refs, Target, run_kernel
from jaxtron.plan.compiled.deviceless import gpu_devices

# of a tile: its first query and key, and the seeds
STARTS, SEEDS, RATE = (4096 + 16, 128), (0x12345678, 0x9ABCDEF0), 0.1


def philox(counter: tuple[int, int], seed: int, rounds: int = dropout.ROUNDS) -> tuple[int, int]:
    """The generator on Python's integers."""
    keys = [seed + number * dropout.WEYL & dropout.WORD for number in range(rounds)]
    first, second = dropout.philox(counter, keys, lambda word: divmod(word * dropout.MULTIPLIER, 1 << 32))
    return first, second


@pytest.mark.parametrize(
    ("rounds", "counter", "seed", "words"),
    [
        (7, (0, 0), 0, (0x257A3673, 0xCD26BE2A)),
        (7, (0xFFFFFFFF, 0xFFFFFFFF), 0xFFFFFFFF, (0xAB302C4D, 0x3DC9D239)),
        (7, (0x243F6A88, 0x85A308D3), 0x13198A2E, (0xBEDBBE6B, 0xE4C770B3)),
        (10, (0, 0), 0, (0xFF1DAE59, 0x6CD10DF2)),
    ],
)
def test_the_generator_gives_the_known_answers(rounds, counter, seed, words):
    """Random123's, of philox2x32."""
    assert philox(counter, seed, rounds) == words


def survives(query: int, key: int) -> bool:
    """The definition, a pair at a time."""
    words = philox((query & ~8, (key & ~8) ^ SEEDS[1]), SEEDS[0])
    word = words[1 if query & 8 else 0]
    return (word >> 16 if key & 8 else word & 0xFFFF) >= round(RATE * 65536)


def tile(columns: int, keys_are_rows: bool) -> np.ndarray:
    """`dropout.survives` of a tile."""
    rows, columns = np.arange(64)[:, None], np.arange(columns)[None]
    queries, keys = (columns, rows) if keys_are_rows else (rows, columns)
    seeds = tuple(jnp.uint32(seed) for seed in SEEDS)
    return np.asarray(dropout.survives(jnp.asarray(queries + STARTS[0]), jnp.asarray(keys + STARTS[1]), seeds, RATE))


def test_survivors_are_the_definition():
    found = tile(64, keys_are_rows=False)
    wanted = [[survives(STARTS[0] + query, STARTS[1] + key) for key in range(64)] for query in range(64)]
    np.testing.assert_array_equal(found, wanted)
    assert found.mean() == pytest.approx(1 - RATE, abs=0.02)


@pytest.mark.parametrize("keys_are_rows", [False, True], ids=["queries", "keys"])
@pytest.mark.parametrize("columns", [64, 128])
def test_each_thread_draws_what_its_registers_hold(columns, keys_are_rows):
    """Rows r and r + 8 of a warpgroup's tile, and of each 8 columns two: the tensor cores' layout."""
    found = np.full((64, columns), -1)
    for thread in range(128):
        row, column = thread // 32 * 16 + thread % 32 // 4, thread % 4 * 2
        starts = STARTS[::-1] if keys_are_rows else STARTS

        def call(offset, row=row + starts[0], column=column + starts[1]):
            query, key = (column + offset, row) if keys_are_rows else (row, column + offset)
            return philox((query, key ^ SEEDS[1]), SEEDS[0])

        registers = thread_words(columns, call, lambda word: word << 16 & dropout.WORD, keys_are_rows=keys_are_rows)
        for number, words in enumerate(registers):
            group, half = divmod(number, 2)
            for at, word in enumerate(words):
                found[row + 8 * half, 8 * group + column + at] = word >= threshold(RATE) << 16
    np.testing.assert_array_equal(found, tile(columns, keys_are_rows))


@pytest.mark.parametrize("keys_are_rows", [False, True], ids=["queries", "keys"])
def test_what_is_compiled_is_the_definition(monkeypatch, tmp_path, keys_are_rows):
    """The PTX of a kernel that draws one tile, run here for all its threads."""
    monkeypatch.setenv("MOSAIC_GPU_DUMP_TO", str(tmp_path))
    columns = 64 if keys_are_rows else 128

    def body(refs: Refs) -> None:
        starts, seeds = (refs.given[0], refs.given[1]), tuple(refs.given[at].astype(jnp.uint32) for at in (2, 3))
        fates = tile_survives((64, columns), starts, seeds, RATE, keys_are_rows=keys_are_rows)
        refs.fates[...] = fates.astype(jnp.int32)

    def draw(given):
        fates = jax.ShapeDtypeStruct((64, columns), jnp.int32)
        return run_kernel(
            body,
            inputs={"given": given},
            outputs={"fates": fates},
            scratch={},
            grid={"tile": 1},
            warpgroups=1,
            target=Target(),
            name="draw",
            flops=0,
        )

    mesh = Mesh(np.array(gpu_devices("h100", 1)), ("x",))
    given = jax.ShapeDtypeStruct((4,), jnp.int32, sharding=NamedSharding(mesh, PartitionSpec()))
    jax.jit(draw).lower(given).compile()
    (text,) = (path.read_text() for path in tmp_path.glob("*.ptx"))
    found = np.full(64 * columns, 7, np.uint32)
    ptx.run(text, [np.array([*STARTS, *SEEDS], np.uint32), found])
    np.testing.assert_array_equal(found.reshape(64, columns), tile(columns, keys_are_rows))


def test_pieces_drop_what_the_whole_does():
    """Of a sequence that is cut, from traced offsets too, and of heads and rows by themselves."""
    seeds = jax.random.bits(jax.random.key(0), (2, 3, 2), jnp.uint32)
    spec = AttentionSpec(dropout_rate=0.3, dropout_seeds=seeds)
    whole = np.asarray(dropout.kept(spec, 90, 70))
    for start, end in ((0, 33), (33, 90)):
        piece = jax.jit(lambda at, n=end - start: dropout.kept(dataclasses.replace(spec, q_offset=at), n, 70))(start)
        np.testing.assert_array_equal(piece, whole[:, :, start:end])
    later = dataclasses.replace(spec, kv_offset=40, dropout_seeds=seeds[1:, 2:])
    np.testing.assert_array_equal(dropout.kept(later, 90, 30), whole[1:, 2:, :, 40:])
    assert dropout.kept(AttentionSpec(dropout_rate=0.3), 4, 4) is None


@pytest.mark.parametrize("seeds", ["random", "counting"])
def test_what_is_dropped_is_even(seeds):
    """Rate, means of rows and of columns, and neighbours, each in its standard deviations."""
    size, count = 1024, 4
    drawn = np.random.default_rng(0).integers(0, 1 << 32, (1, count, 2), dtype=np.uint32)
    if seeds == "counting":
        drawn = np.stack([np.arange(count), np.zeros(count)], -1)[None].astype(np.uint32)
    spec = AttentionSpec(dropout_rate=RATE, dropout_seeds=jnp.asarray(drawn))
    kept = 1 - threshold(RATE) / 65536
    variance = kept * (1 - kept)
    masks = np.asarray(dropout.kept(spec, size, size))[0].astype(np.float64) - kept
    figures = {}
    for head, mask in enumerate(masks):
        figures[head, "rate"] = mask.sum() / np.sqrt(variance * mask.size)
        for axis, name in enumerate(("columns", "rows")):
            # of chi squared with `size` degrees of freedom
            figures[head, name] = ((mask.sum(axis) ** 2).sum() / (variance * size) - size) / np.sqrt(2 * size)
        for lag in (1, 8, 16):
            for name, one, other in (
                ("along keys", mask[:, lag:], mask[:, :-lag]),
                ("along queries", mask[lag:], mask[:-lag]),
                ("in calls", mask[lag:, lag:], mask[:-lag, :-lag]),
            ):
                figures[head, name, lag] = (one * other).sum() / (variance * np.sqrt(one.size))
    for head in range(count - 1):
        figures[head, "heads"] = (masks[head] * masks[head + 1]).sum() / (variance * size)
    found = np.array(list(figures.values()))
    # 51 figures: their greatest is above 4 once in 300 times, their mean square above 1.6 once in 400
    assert np.abs(found).max() < 4, max(figures, key=lambda name: abs(figures[name]))
    assert (found**2).mean() < 1.6
