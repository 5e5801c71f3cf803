"""Blends: Megatron's vectors, and a plain loop in the same arithmetic."""

import numpy as np
import pytest

import jaxtron.data.megatron.blend as blend
from jaxtron.config import UserError
from jaxtron.data.megatron.blend import build_blend, build_exhaustive_blend, component_samples, normalize, parse_blend


@pytest.fixture
def way(way, monkeypatch):
    """Compiled, nothing but the loop makes a blend."""
    if way == "numba":
        monkeypatch.setattr(blend, "_greedy", None)


def slow_blend(shares, length, sizes=None):
    counts, datasets, samples = [0] * len(shares), [], []
    for place in range(length):
        best, most = None, -np.inf
        for number, share in enumerate(shares):
            lag = share * float(max(place, 1)) - float(counts[number])
            if lag > most and (sizes is None or counts[number] < sizes[number]):
                best, most = number, lag
        datasets.append(best)
        samples.append(counts[best])
        counts[best] += 1
    return datasets, samples


@pytest.mark.parametrize(
    ("weights", "datasets", "samples"),
    [
        ([0.5, 0.25, 0.25], [0, 1, 2, 0, 0, 1, 2, 0], [0, 0, 0, 1, 2, 1, 1, 3]),
        ([0.3, 0.7], [1, 0, 1, 1, 0, 1, 1, 0, 1, 1], [0, 0, 1, 2, 1, 3, 4, 2, 5, 6]),
        ([1 / 3] * 3, [0, 1, 2, 0, 1, 2, 0], [0, 0, 0, 1, 1, 1, 2]),
        ([0.1, 0.2, 0.7], [2, 1, 2, 0, 2, 2, 1, 2, 2, 2, 0, 2], [0, 0, 1, 0, 2, 3, 1, 4, 5, 6, 1, 7]),
    ],
)
def test_blends_by_weight_are_megatrons(weights, datasets, samples):
    built = build_blend(weights, len(datasets))
    assert built.datasets.tolist() == datasets and built.datasets.dtype == np.int16
    assert built.samples.tolist() == samples and built.samples.dtype == np.int64


@pytest.mark.parametrize(
    ("sizes", "datasets", "samples"),
    [([3, 1, 2], [0, 2, 1, 0, 2, 0], [0, 0, 0, 1, 1, 2]), ([5, 2], [0, 1, 0, 0, 1, 0, 0], [0, 0, 1, 2, 1, 3, 4])],
)
def test_exhaustive_blends_are_megatrons(sizes, datasets, samples):
    built = build_exhaustive_blend(sizes)
    assert (built.datasets.tolist(), built.samples.tolist()) == (datasets, samples)


# weights that tie often, and weights that hardly ever do
WEIGHTS = [
    [1.0],
    [1, 1],
    [3, 7],
    [1] * 8,
    [1] * 7,
    [0.1, 0.2, 0.7],
    [1e-6, 1],
    [5, 4, 3, 2, 1],
    [1 / 3, 1 / 3, 1 / 3],
    [969, 30, 1],
]


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_any_length_is_a_prefix_of_the_plain_loop(weights):
    datasets, samples = slow_blend(normalize(weights).tolist(), 3000)
    for length in (0, 1, 63, 64, 65, 1000, 3000):
        built = build_blend(weights, length)
        assert built.datasets.tolist() == datasets[:length]
        assert built.samples.tolist() == samples[:length]


@pytest.mark.usefixtures("way")
def test_random_blends_are_those_of_a_plain_loop():
    rng = np.random.default_rng(0)
    for _ in range(40):
        weights = rng.dirichlet(np.full(rng.integers(1, 30), rng.choice([0.3, 1, 10]))) + 1e-12
        length = int(rng.integers(0, 3000))
        built = build_blend(weights.tolist(), length)
        assert (built.datasets.tolist(), built.samples.tolist()) == slow_blend(normalize(weights).tolist(), length)


@pytest.mark.usefixtures("way")
def test_random_exhaustive_blends_are_those_of_a_plain_loop():
    rng = np.random.default_rng(1)
    for _ in range(40):
        sizes = rng.integers(0, rng.choice([2, 10, 400]), rng.integers(1, 20), endpoint=True).tolist()
        total = sum(sizes)
        if not total:
            continue
        built = build_exhaustive_blend(sizes)
        expected = slow_blend([size / float(total) for size in sizes], total, sizes)
        assert (built.datasets.tolist(), built.samples.tolist()) == expected
        assert np.bincount(built.datasets, minlength=len(sizes)).tolist() == sizes


def test_bad_guesses_cost_time_but_change_nothing(monkeypatch):
    expected = build_blend([0.2, 0.3, 0.5], 2000).datasets.tolist()
    rng = np.random.default_rng(2)

    def wild(shares, places):
        counts = rng.integers(0, 50, (len(shares), len(places))).astype(np.float64)
        counts[:, 0] = 0
        return counts

    monkeypatch.setattr(blend, "_guess", wild)
    assert build_blend([0.2, 0.3, 0.5], 2000).datasets.tolist() == expected


def test_chains_meet_soon(monkeypatch):
    """A hundred thousand places of ten datasets take about as many choices as places, in few rounds."""
    walked, rounds = [], []
    step, walk = blend._Chains.step, blend._walk
    monkeypatch.setattr(blend._Chains, "step", lambda chains: walked.append(len(chains.places)) or step(chains))
    monkeypatch.setattr(blend, "_walk", lambda *arguments: rounds.append(1) or walk(*arguments))
    weights = np.random.default_rng(3).dirichlet(np.ones(10)).tolist()
    built = build_blend(weights, 100_000)
    assert sum(walked) < 1.3 * len(built) and len(rounds) < 20
    shares = np.bincount(built.datasets) / len(built)
    np.testing.assert_allclose(shares, weights, atol=1e-4)


def test_how_many_samples_each_dataset_needs():
    assert component_samples([0.3, 0.7], 1000) == [302, 704]
    assert component_samples([1, 1, 1], 10) == [5, 5, 5]
    assert component_samples([3, 7], 1000, surplus=0.0) == [300, 700]
    for weights in WEIGHTS:
        built = build_blend(weights, 2000)
        asked = np.bincount(built.datasets, minlength=len(weights))
        assert (asked <= component_samples(weights, 2000)).all()


@pytest.mark.parametrize(
    ("items", "prefixes", "weights"),
    [
        (["a"], ["a"], None),
        (["a", "b"], ["a", "b"], None),
        (["a", "b", "c"], ["a", "b", "c"], None),
        (["0.3", "a", "0.7", " b "], ["a", "b"], [0.3, 0.7]),
        ([3, "a", 7, "b"], ["a", "b"], [3.0, 7.0]),
        (["1", "2", "3"], ["1", "2", "3"], None),  # an odd number of items has no weights
        (["a", "1", "b", "2"], ["a", "1", "b", "2"], None),
    ],
)
def test_lists_of_paths(items, prefixes, weights):
    assert parse_blend(items) == (prefixes, weights)


def test_bad_blends_are_refused():
    with pytest.raises(UserError, match="'b' is not a weight"):
        parse_blend(["1", "a", "b", "c"])
    for items in ([], [""], ["1", " "]):
        with pytest.raises(UserError, match="are empty"):
            parse_blend(items)
    for weights in ([], [0.0, 1.0], [-1, 1], [float("nan"), 1], [float("inf"), 1], [1] * 32768):
        with pytest.raises(UserError, match="numbers above 0"):
            build_blend(weights, 3)
    for sizes in ([], [0, 0], [-1, 2]):
        with pytest.raises(UserError, match="that have some"):
            build_exhaustive_blend(sizes)
