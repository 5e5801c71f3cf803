"""METRO-LM: what its samples are made of, what is drawn between its encoders, its losses beside a plain reference."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxtron.checkpoint.names import parts
from jaxtron.config import UserError
from jaxtron.data.batch import TokenBatch, stack_samples
from jaxtron.layers.inputs import LayerInputs, row_keys
from jaxtron.layers.relations.distance import signed_buckets
from jaxtron.models.metro.batch import MetroBatch
from jaxtron.models.metro.config import MetroConfig
from jaxtron.models.metro.data import samples_of_text
from jaxtron.models.metro.sampling import draw
from jaxtron.run.configuration import configuration_of
from jaxtron.run.session import make_trainer
from jaxtron.run.step import batch_sharding
from jaxtron.sharding.rules import current, use
from tests.support.equivalence import make_params, rules_for

LENGTH, VOCAB, ROWS = 24, 68, 4
CLASSIFY, SEPARATE, MASK, PAD = range(64, 68)
# the token that the smaller encoder fills in wherever its head's bias says so
FILLED = 7
SMALL = {
    "family": "metro",
    "num_layers": 2,
    "auxiliary_layers": 1,
    "hidden_size": 16,
    "num_heads": 2,
    "vocab_size": VOCAB,
    "vocab_multiple": 8,
    "distance_buckets": 8,
    "max_distance": 10,
    "masked_share": 0.3,
}


def config(**changes) -> MetroConfig:
    return MetroConfig.model_validate(SMALL | changes)


class Texts(list[TokenBatch]):
    """A source of samples that are there already."""

    sequence_length = LENGTH


def batch_of(*lengths: int) -> MetroBatch:
    random = np.random.default_rng(0)
    tokens = [random.integers(0, 64, LENGTH, dtype=np.int32) for _ in lengths]
    weighs = [(np.arange(LENGTH) < size).astype(np.float32) for size in lengths]
    texts: Any = Texts(TokenBatch(row, row, weight) for row, weight in zip(tokens, weighs, strict=True))
    samples = samples_of_text(config(), texts, None)
    return stack_samples([samples[index] for index in range(len(lengths))])


def test_samples_have_their_share_of_masks():
    batch = batch_of(24, 10, 1, 0)
    texts = [22, 10, 1, 0]
    assert batch.places.shape == (4, 8)
    for row, size in enumerate(texts):
        tokens, targets, in_text = batch.tokens[row], batch.targets[row], batch.segments[row] == 1
        assert in_text.sum() == size + 2 == batch.weights[row].sum()
        assert targets[0] == CLASSIFY and targets[size + 1] == SEPARATE and (targets[~in_text] == PAD).all()
        places = batch.places[row][batch.place_weights[row] == 1]
        assert len(places) == {22: 7, 10: 3, 1: 1, 0: 0}[size] == len(set(places.tolist()))
        assert (batch.places[row][len(places) :] == -1).all()
        assert np.flatnonzero(tokens == MASK).tolist() == places.tolist()
        others = np.setdiff1d(np.arange(LENGTH), places)
        assert (tokens[others] == targets[others]).all() and (targets[1 : size + 1] < 64).all()


def test_any_token_of_a_text_is_masked_as_likely_as_another():
    texts: Any = Texts(
        TokenBatch(np.zeros(LENGTH, np.int32), np.zeros(LENGTH, np.int32), np.ones(LENGTH, np.float32))
        for _ in range(2000)
    )
    samples = samples_of_text(config(), texts, None)
    masked = np.mean([samples[index].tokens == MASK for index in range(2000)], 0)
    # five standard deviations
    bound = 5 * np.sqrt(7 / 22 * 15 / 22 / 2000)
    assert np.abs(masked[1:23] - 7 / 22).max() < bound and not masked[[0, 23]].any()


def test_distances_are_in_buckets_alike_on_both_sides():
    """8 buckets, of which 3 are for keys after a query, 3 for those before it and one for itself."""
    assert signed_buckets(8, 10).tolist() == [0] * 8 + [1, 2, 3, 4, 5] + [6] * 8
    # the published ones of 32: 8 near distances, then 8.., logarithms rounded up, the last at 127
    half = signed_buckets(32, 128)[128:] - 15
    assert half[:10].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9] and half[127] == half[128] == 15
    edges = [8 * (127 / 8) ** (step / 7) for step in range(8)]
    for distance in range(9, 127):
        assert half[distance] == 8 + next(step for step, edge in enumerate(edges) if distance <= edge)


def predicted(rows: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What leads to logits: the same at every place."""
    random = np.random.default_rng(3)
    x, table, bias = (0.6 * random.standard_normal(shape, np.float32) for shape in (4, (16, 4), 16))
    return np.broadcast_to(x, (rows, 8, 4)), table, bias


@functools.cache
def drawn(tensor: int) -> np.ndarray:
    """Tokens of a vocabulary of 13, padded to 16."""
    rows = 512
    x, table, bias = predicted(rows)
    with use(rules_for({"tensor": tensor})):
        mesh, split = current().mesh, PartitionSpec(current().axes("tensor"))
        given = [
            jax.device_put(array, NamedSharding(mesh, spec))
            for array, spec in ((x, PartitionSpec()), (table, split), (bias, split))
        ]

        def run(x, table, bias):
            return draw(x, table, bias, 13, LayerInputs(keys=row_keys(jax.random.key(0), jnp.arange(rows))))

        return np.asarray(jax.jit(run)(*given))


def test_tokens_are_drawn_as_often_as_their_probability_says():
    x, table, bias = predicted(1)
    logits = (table @ x[0, 0] + bias)[:13]
    wanted = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    found = np.bincount(drawn(1).ravel(), minlength=13) / drawn(1).size
    assert len(found) == 13
    assert (np.abs(found - wanted) < 5 * np.sqrt(wanted * (1 - wanted) / drawn(1).size)).all()
    # neither places nor rows draw the same
    assert len({row.tobytes() for row in drawn(1)}) > 256
    columns = drawn(1).T
    assert np.mean(columns[0] == columns[1]) == pytest.approx((wanted**2).sum(), abs=0.1)


def test_parts_of_the_vocabulary_draw_what_the_whole_draws():
    assert np.array_equal(drawn(4), drawn(1))


@functools.cache
def trainer_and_params(fills: bool = False, **changes):
    whole = configuration_of("metro").model_validate(
        {
            "model": SMALL | changes,
            "data": {"sequence_length": LENGTH},
            "train": {"precision": "fp32", "global_batch": ROWS},
            "mesh": {"data": 1},
        }
    )
    with use(rules_for({})):
        trainer = make_trainer(whole.resolved())
        params = make_params(trainer)
    if fills:
        head = params["auxiliary_end"]["masked"]
        bias = np.array(head["bias"])
        bias[FILLED] = 60.0
        head["bias"] = jax.device_put(bias, head["bias"].sharding)
    return trainer, params


def evaluated(batch: MetroBatch) -> tuple[dict[str, float], dict[str, float], dict[str, np.ndarray]]:
    """Sums, counts and parameters of a model whose smaller encoder always fills in the same token."""
    trainer, params = trainer_and_params(fills=True)
    with use(rules_for({})):
        sums, counted = jax.jit(trainer.evaluate)(params, jax.device_put(batch, batch_sharding()))
    return {n: float(v) for n, v in sums.items()}, {n: float(v) for n, v in counted.items()}, named(params)


def named(tree) -> dict[str, np.ndarray]:
    """Leaves by their path with `/`; on one device layers lie in the model's order."""
    return {"/".join(parts(path)): np.asarray(leaf) for path, leaf in jax.tree.leaves_with_path(tree)}


class Plain:
    """The model in NumPy, a row at a time and without padding."""

    def __init__(self, params: dict[str, np.ndarray]) -> None:
        self.params = {name: value.astype(np.float64) for name, value in params.items()}

    def norm(self, x: np.ndarray, name: str, layer: int | None = None) -> np.ndarray:
        scale, bias = (self.at(f"{name}/{part}", layer) for part in ("scale", "bias"))
        return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * scale + bias

    def at(self, name: str, layer: int | None = None) -> np.ndarray:
        return self.params[name] if layer is None else self.params[name][layer]

    def linear(self, x: np.ndarray, name: str, layer: int | None = None) -> np.ndarray:
        kernel, bias = self.at(f"{name}/kernel", layer), self.at(f"{name}/bias", layer)
        return np.tensordot(x, kernel, kernel.ndim - bias.ndim) + bias

    def embed(self, tokens: np.ndarray) -> np.ndarray:
        table, positions = self.at("embedding/tokens/table"), self.at("embedding/tokens/positions")
        return self.norm(table[tokens] + positions[: len(tokens)], "embedding/norm")

    def encode(self, x: np.ndarray, name: str, layers: int) -> np.ndarray:
        places = np.arange(len(x))
        # 8 buckets of distances up to 10
        buckets = signed_buckets(8, 10)[np.clip(places - places[:, None], -10, 10) + 10]
        bias = self.at(f"{name}_end/distances/table")[buckets]
        for layer in range(layers):
            path = f"{name}/layers"
            q, k, v = (self.linear(x, f"{path}/attention/{part}", layer) for part in ("query", "key", "value"))
            scores = np.einsum("shd,thd->sth", q, k) / np.sqrt(q.shape[-1]) + bias
            scores = np.exp(scores - scores.max(1, keepdims=True))
            mixed = np.einsum("sth,thd->shd", scores / scores.sum(1, keepdims=True), v)
            kernel, shift = (self.at(f"{path}/attention/output/{part}", layer) for part in ("kernel", "bias"))
            x = self.norm(x + np.einsum("shd,hde->se", mixed, kernel) + shift, f"{path}/attention_norm", layer)
            inner = np.maximum(self.linear(x, f"{path}/mlp/up", layer).reshape(len(x), -1), 0)
            x = self.norm(x + self.linear(inner, f"{path}/mlp/down", layer), f"{path}/mlp_norm", layer)
        return x

    def nll(self, x: np.ndarray, name: str, targets: np.ndarray) -> float:
        """Summed over places."""
        path = f"{name}_end/masked"
        x = self.norm(np.maximum(self.linear(x, f"{path}/transform"), 0), f"{path}/norm")
        logits = (x @ self.at("embedding/tokens/table").T + self.at(f"{path}/bias"))[:, :VOCAB]
        largest = logits.max(1)
        log_z = np.log(np.exp(logits - largest[:, None]).sum(1)) + largest
        return float((log_z - logits[np.arange(len(targets)), targets]).sum())


def test_losses_are_those_of_a_plain_reference():
    batch = batch_of(24, 15, 9, 3)
    # what is filled in was there at one of the places
    batch.targets[0, batch.places[0, 0]] = FILLED
    sums, counts, params = evaluated(batch)
    plain, wanted = Plain(params), dict.fromkeys(sums, 0.0)
    for row in range(ROWS):
        size = int(batch.segments[row].sum())
        tokens, targets = batch.tokens[row, :size], batch.targets[row, :size]
        places = batch.places[row][batch.places[row] >= 0]
        found = plain.encode(plain.embed(tokens), "auxiliary", 1)
        wanted["auxiliary"] += plain.nll(found[places], "auxiliary", targets[places])
        filled = tokens.copy()
        filled[places] = FILLED
        replaced = filled != targets
        x = plain.encode(plain.embed(filled), "main", 2)
        wanted["correction"] += plain.nll(x[places], "main", targets[places])
        logits = plain.linear(x, "detection")[:, 0]
        wanted["detection"] += 50 * (np.log1p(np.exp(logits)) - replaced * logits).sum()
        wanted["replaced"] += replaced.sum()
        wanted["detection_accuracy"] += ((logits > 0) == replaced).sum()
    assert counts == {"masked tokens": batch.place_weights.sum(), "tokens": batch.segments.sum()}
    assert wanted["replaced"] == batch.place_weights.sum() - 1
    assert sums == pytest.approx(wanted, rel=1e-4)


def gradients(batch: MetroBatch, **changes) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    trainer, params = trainer_and_params(**changes)
    with use(rules_for({})):
        scalars = jax.device_put((jnp.int32(3), jnp.float32(1)), NamedSharding(current().mesh, PartitionSpec()))
        given = (params, jax.device_put(batch, batch_sharding()), *scalars)
        reported, found = jax.jit(trainer.loss_and_gradients)(*given)
        return {name: np.asarray(value) for name, value in reported.items()}, named(found)


@pytest.mark.slow
def test_what_is_drawn_has_no_gradient():
    """The smaller encoder learns from its own loss alone, whatever the larger one's losses weigh."""
    batch = batch_of(24, 15, 9, 3)
    _, one = gradients(batch)
    _, alone = gradients(batch, detection_weight=0.0, correction_weight=0.0)
    own = [name for name in one if name.startswith("auxiliary")]
    assert len(own) > 10 and all(np.abs(one[name]).max() > 0 for name in own if "key/bias" not in name)
    for name in own:
        np.testing.assert_allclose(one[name], alone[name], rtol=1e-5, atol=1e-7, err_msg=name)
    main = [name for name in one if name.startswith(("main", "detection"))]
    assert all(not alone[name].any() for name in main) and all(one[name].any() for name in main if "key" not in name)


def test_what_does_not_fit_is_told():
    whole = configuration_of("metro").model_validate({"model": SMALL, "data": {"sequence_length": LENGTH}})
    sizes = {"pipe": 1, "data": 1, "fsdp": 1, "context": 1, "tensor": 2}
    whole.check_model(sizes)
    threes = SMALL | {"hidden_size": 24, "num_heads": 3, "vocab_multiple": 24}
    odd = configuration_of("metro").model_validate({"model": threes, "data": {"sequence_length": LENGTH}})
    with pytest.raises(UserError, match="room for 8 masked places, which mesh.tensor 3 does not divide"):
        odd.check_model(sizes | {"tensor": 3})
