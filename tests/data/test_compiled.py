"""Loops that Numba compiles: to the byte what NumPy's ways write, and what happens where they cannot be compiled."""

import os
import subprocess
import sys

import numpy as np
import pytest

from jaxtron.data.megatron import compiled
from jaxtron.data.megatron.blend import build_blend, build_exhaustive_blend
from jaxtron.data.megatron.gpt_index import _compiled_rows, _sample_index

needs_numba = pytest.mark.skipif(compiled.numba() is None, reason="these loops are compiled by Numba")
CUTS = {"documents": compiled.cut_documents, "long": compiled.cut_long, "longer": compiled.cut_longer}


def packed(lengths):
    return np.asarray(lengths, np.int64) << 32 | np.arange(len(lengths))


def cut(loop, lengths, length, extra, num_samples):
    """What a compiled loop writes over rows of rubbish."""
    rows = np.full((num_samples + 1, 2), -7, np.int32)
    assert compiled.run(loop, packed(lengths), length, extra, rows.reshape(-1).view(np.int64))
    return rows


@needs_numba
@pytest.mark.parametrize("loop", CUTS.values(), ids=CUTS)
def test_every_cut_is_numpys(loop):
    """Blocks and what is left of them, empty documents; more samples than there are tokens for, and fewer."""
    rng, seen = np.random.default_rng(0), set()
    for _ in range(150):
        longest = int(rng.choice([1, 3, 40, 1000]))
        lengths = rng.integers(0, longest, int(rng.integers(1, 4 * compiled.BLOCK)), endpoint=True)
        lengths[rng.random(len(lengths)) < rng.choice([0, 0.5, 0.999])] = 0
        length, extra = int(rng.integers(1, 2 * longest, endpoint=True)), int(rng.integers(2))
        full = max(int(lengths.sum()) - extra, 0) // length
        num_samples = max(full + int(rng.choice([0, 0, 1, -1, -full // 2])), 0)
        settings = {"sequence_length": length, "extra": extra, "num_samples": num_samples}
        expected = _sample_index(packed(lengths), **settings)
        found = cut(loop, lengths, length, extra, num_samples)
        assert found.tobytes() == expected.tobytes() and found.dtype == expected.dtype, settings
        seen |= {
            np.sign(num_samples - full),
            "empty last" if not lengths[-1] else "last",
            len(lengths) > compiled.BLOCK,
        }
    assert seen >= {-1, 0, 1, "empty last", "last"}


@needs_numba
@pytest.mark.parametrize("loop", CUTS.values(), ids=CUTS)
def test_documents_as_long_as_there_can_be(loop):
    """Ends far beyond 32 bits, offsets up to the last of them."""
    rng, longest = np.random.default_rng(1), 2**31 - 1
    for length in (2**31 - 2, 2**31 - 1, 2**30 + 7, 2**22 - 1):
        lengths = rng.integers(longest - 5, longest, 2500, endpoint=True)
        num_samples = (int(lengths.sum()) - 1) // length
        expected = _sample_index(packed(lengths), sequence_length=length, extra=1, num_samples=num_samples)
        assert cut(loop, lengths, length, 1, num_samples).tobytes() == expected.tobytes()


@needs_numba
def test_each_share_of_samples_has_its_loop(monkeypatch):
    taken = []
    monkeypatch.setattr(compiled, "run", lambda loop, *arguments: taken.append(loop) or True)
    for share in (0.05, 0.3, 2):
        assert _compiled_rows(np.zeros(1000, np.int64), 4, 1, np.empty((int(1000 * share), 2), np.int32))
    assert taken == [compiled.cut_documents, compiled.cut_long, compiled.cut_longer]


@needs_numba
def test_what_compiled_loops_cannot_write_is_left_to_numpy():
    few = np.array([5 << 32], np.int64)
    assert not _compiled_rows(few, 4, 1, np.empty((2, 2), np.int64))
    # quotients of so many tokens are not exact
    assert not _compiled_rows(few, 2**52, 1, np.empty((2, 2), np.int32))
    assert _compiled_rows(few, 4, 1, np.empty((2, 2), np.int32))


@needs_numba
@pytest.mark.parametrize("count", [1, 2, 12, 15, 16, 17, 100])
def test_blends_are_numpys(monkeypatch, count):
    rng = np.random.default_rng(count)
    weights = (rng.dirichlet(np.full(count, 0.3)) + 1e-12).tolist()
    sizes = [0, *rng.integers(0, 3000, count - 1).tolist()] if count > 1 else [2000]
    sizes[-1] += 1
    both = []
    for least in (0, 1 << 60):
        monkeypatch.setattr(compiled, "LEAST_PLACES", least)
        both.append([build_blend(weights, 20_000), build_blend([1.0] * count, 1000), build_exhaustive_blend(sizes)])
    for found, expected in zip(*both, strict=True):
        for name in ("datasets", "samples"):
            ours, numpys = getattr(found, name), getattr(expected, name)
            assert ours.tobytes() == numpys.tobytes() and ours.dtype == numpys.dtype


def test_without_numba_numpy_builds_all(monkeypatch):
    monkeypatch.setitem(sys.modules, "numba", None)
    compiled.numba.cache_clear()
    try:
        assert compiled.numba() is None and not compiled.run(compiled.blend_few)
        monkeypatch.setattr(compiled, "LEAST_PLACES", 0)
        monkeypatch.setattr(compiled, "LEAST_DOCUMENTS", 0)
        assert build_blend([0.5, 0.25, 0.25], 8).datasets.tolist() == [0, 1, 2, 0, 0, 1, 2, 0]
        assert _sample_index(packed([7, 3]), sequence_length=4, extra=1, num_samples=2).tolist() == [
            [0, 0],
            [0, 4],
            [1, 1],
        ]
    finally:
        compiled.numba.cache_clear()


def test_small_indices_do_not_wait_for_numba(monkeypatch):
    monkeypatch.setattr(compiled, "run", None)
    assert len(build_blend([0.3, 0.7], 1000)) == 1000
    assert len(_sample_index(packed([7, 3]), sequence_length=4, extra=1, num_samples=2)) == 3


@needs_numba
@pytest.mark.parametrize("failure", [RuntimeError("cannot cache function"), OSError(28, "No space left on device")])
def test_a_cache_that_cannot_be_written_is_done_without(monkeypatch, failure):
    compile, kept = compiled._compile, []

    def fails(loop, *, keep):
        kept.append(keep)
        if keep:
            raise failure
        return loop

    monkeypatch.setattr(compiled, "_compile", fails)
    rows = np.empty(2, np.int64)
    assert compiled.run(compiled.cut_documents, packed([9]), 4, 1, rows) and kept == [True, False]
    assert rows.tolist() == [0, 4 << 32] and compile is not fails


@needs_numba
def test_an_installation_that_nobody_may_write():
    """Numba finds no folder to keep machine code in: not beside the file, not the user's."""
    script = """
import numba
from jaxtron.data.megatron import compiled
from jaxtron.data.megatron.blend import build_blend
try:
    numba.njit(cache=True)(compiled.blend_few)
except RuntimeError as error:
    print(str(error)[:21])
compiled.LEAST_PLACES = 0
print(build_blend([0.5, 0.25, 0.25], 8).datasets.tolist())
"""
    environment = {name: value for name, value in os.environ.items() if name != "NUMBA_CACHE_DIR"}
    environment |= {"NUMBA_CACHE_LOCATOR_CLASSES": "UserProvidedCacheLocator"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["cannot cache function", "[0, 1, 2, 0, 0, 1, 2, 0]"]
