"""Rounds of an exchange: every token at every device once, however uneven, and no more than a round has room for."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from jaxtron.kernels.grouped_matmul import reference
from jaxtron.kernels.grouped_matmul.config import tiled_rows
from jaxtron.layers.moe.config import MoeConfig
from jaxtron.layers.moe.exchange import Exchange, Turn, is_left, make_dispatch, make_turn
from jaxtron.layers.moe.groups import collect, collect_weights, make_groups, spread, spread_weights

TOKENS, EXPERTS, TOP_K, DEVICES = 40, 12, 4, 3


def an_exchange(rows: int, pairs: int, *, is_grouped: bool = True) -> Exchange:
    return Exchange(
        num_experts=EXPERTS,
        top_k=TOP_K,
        expert=(),
        num_devices=DEVICES,
        expert_tensor=(),
        gathers=False,
        rows=rows,
        pairs=pairs,
        has_rounds=True,
        grouped=reference if is_grouped else None,
    )


def choices(skew: float) -> np.ndarray:
    """Of each token, different experts, the first ones more often; some go nowhere."""
    random = np.random.default_rng(0)
    scores = random.gumbel(size=(TOKENS, EXPERTS)) - skew * np.arange(EXPERTS)
    chosen = np.argsort(-scores, -1)[:, :TOP_K].astype(np.int32)
    return np.where(random.random(chosen.shape) < 0.1, EXPERTS, chosen)


def rounds(exchange: Exchange, chosen: np.ndarray) -> list[Turn]:
    dispatch = make_dispatch(exchange, jnp.asarray(chosen))
    first, left, found = jnp.zeros_like(dispatch.counts), 1, []
    while left:
        found.append(make_turn(exchange, dispatch, first))
        first = found[-1].stop
        left = int(is_left(exchange, dispatch, first))
        assert left == int(dispatch.further) or len(found) > 1
    return found


@pytest.mark.parametrize("skew", [0.0, 0.6])
@pytest.mark.parametrize(("rows", "pairs"), [(40, 160), (16, 160), (40, 11), (9, 13), (1, 4)])
def test_a_token_goes_to_a_device_once_with_all_its_experts_there(rows: int, pairs: int, skew: float) -> None:
    chosen = choices(skew)
    wanted = {(token, expert // 4) for token, expert in zip(*_pairs(chosen), strict=True)}
    seen: list[tuple[int, int]] = []
    for turn in rounds(an_exchange(rows, pairs), chosen):
        of_rows = np.asarray(turn.pairs)
        for device, taken in enumerate(of_rows[row][of_rows[row] < chosen.size] for row in range(DEVICES)):
            tokens = taken // TOP_K
            assert np.sum(chosen[tokens] // 4 == device) <= pairs
            seen += [(int(token), device) for token in tokens]
        # each way is the other's transpose
        back = np.asarray(turn.rows)
        here = np.flatnonzero(back < of_rows.size)
        np.testing.assert_array_equal(of_rows.reshape(-1)[back[here]], here)
        assert here.size == np.sum(of_rows < chosen.size)
    assert len(seen) == len(set(seen)) and set(seen) == wanted


def test_a_bucket_of_an_expert_has_a_row_for_each_pair() -> None:
    chosen = choices(0.6)
    found = rounds(an_exchange(7, 7, is_grouped=False), chosen)
    taken = np.concatenate([np.asarray(turn.pairs) for turn in found], 1)
    for expert in range(EXPERTS):
        np.testing.assert_array_equal(taken[expert][taken[expert] < chosen.size], np.flatnonzero(chosen == expert))


def test_pairs_lie_in_tiles_of_one_expert_and_come_back_as_sums() -> None:
    random = np.random.default_rng(1)
    chosen = choices(0.3)
    total = int(np.sum(chosen < EXPERTS))
    groups = make_groups(jnp.asarray(chosen), EXPERTS, total)
    rows, weights = random.standard_normal((TOKENS, 8), np.float32), random.random(chosen.shape, np.float32)
    tiles, of_tiles = spread(groups, jnp.asarray(rows)), spread_weights(groups, jnp.asarray(weights))
    assert tiles.shape == (tiled_rows(total, EXPERTS), 8) and of_tiles.shape == (tiles.shape[0], 1)
    experts = np.repeat(np.asarray(groups.tile_experts), tiles.shape[0] // groups.tile_experts.size)
    for token, choice in zip(*np.nonzero(chosen < EXPERTS), strict=True):
        place = int(groups.targets[token, choice])
        assert experts[place] == chosen[token, choice] and of_tiles[place, 0] == weights[token, choice]
        np.testing.assert_array_equal(tiles[place], rows[token])
    np.testing.assert_allclose(collect(groups, tiles), rows * np.sum(chosen < EXPERTS, 1)[:, None], rtol=1e-6)
    np.testing.assert_array_equal(collect_weights(groups, of_tiles), np.where(chosen < EXPERTS, weights, 0))
    # what is between them is zeros
    assert np.count_nonzero(np.asarray(of_tiles)) == total


def _pairs(chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    tokens, columns = np.nonzero(chosen < EXPERTS)
    return tokens, chosen[tokens, columns]


@pytest.mark.parametrize(
    ("groups", "top_groups", "own"), [(1, 1, 2), (1, 1, 4), (4, 2, 1), (4, 2, 2), (4, 2, 4), (4, 3, 8), (2, 1, 8)]
)
def test_even_choices_reach_a_device_as_often_as_counting_them_says(groups: int, top_groups: int, own: int) -> None:
    config = MoeConfig(num_experts=8, top_k=3, groups=groups, top_groups=top_groups)
    size = config.num_experts // groups
    hits = []
    for opened in itertools.combinations(range(groups), top_groups):
        experts = [expert for expert in range(config.num_experts) if expert // size in opened]
        hits += [min(chosen) < own for chosen in itertools.combinations(experts, config.top_k)]
    assert config.reach(own) == pytest.approx(np.mean(hits))


def test_a_round_has_a_third_less_rows_where_tokens_travel_once() -> None:
    config = MoeConfig(num_experts=64, top_k=8, buckets="device")
    found = config.round_of(4096, 8, None)
    pairs = config.model_copy(update={"buckets": "expert"}).round_of(4096, 8, None)
    assert found.pairs == 8 * pairs.rows == 1.25 * 4096
    assert found.rows / found.pairs == pytest.approx(0.68, abs=0.005)
    # the pairs of a token are not parted
    assert config.model_copy(update={"slots": 1e-6, "top_k": 16}).round_of(64, 4, None).pairs == 16
