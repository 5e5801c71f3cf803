"""What a stage computes: the work of its table's entries, no more, counted in the compiled program."""

import functools

import jax
import jax.numpy as jnp
import pytest

from jaxtron.plan.compiled import hlo
from jaxtron.plan.compiled.flops import Branches, ProductWork, work
from jaxtron.run.batches import abstract_batch
from jaxtron.run.configuration import Configuration
from jaxtron.run.session import make_session

LAYERS, HIDDEN, LENGTH, ROWS, MICROBATCHES, VOCAB = 4, 32, 16, 2, 4, 64
TOKENS = ROWS * LENGTH
# a transformer layer's matrices have 12 hidden^2 elements; attention multiplies [S, S] by [S, D] twice a head
WEIGHTS = 2 * 12 * HIDDEN**2 * TOKENS
ATTENTION = 2 * 2 * LENGTH * HIDDEN * TOKENS
# the loss's gradient is formed in the forward: three products with the table
HEAD = 3 * 2 * HIDDEN * VOCAB * TOKENS


@functools.cache
def program(schedule: str, pipe: int, chunks: int = 1, recompute: str = "none") -> ProductWork:
    config = Configuration.model_validate(
        {
            "model": {
                "num_layers": LAYERS,
                "hidden_size": HIDDEN,
                "num_heads": 4,
                "vocab_size": VOCAB,
                "vocab_multiple": VOCAB,
                "recompute": recompute,
                "unroll": 1,
            },
            "data": {"sequence_length": LENGTH},
            "train": {"global_batch": ROWS * MICROBATCHES, "microbatches": MICROBATCHES, "precision": "fp32"},
            "mesh": {"pipe": pipe, "data": 1},
            "pipeline": {"schedule": schedule, "chunks": chunks} if pipe > 1 else {},
        }
    ).resolved()
    session = make_session(config, jax.devices()[:pipe])
    with session.use():
        trainer = session.trainer
        scalars = (jax.ShapeDtypeStruct((), jnp.int32), jax.ShapeDtypeStruct((), jnp.float32))
        lowered = jax.jit(trainer.loss_and_gradients).lower(
            trainer.abstract_state().params, abstract_batch(config), *scalars
        )
        return work(hlo.parse(lowered.compile().as_text()))


def branches(program: ProductWork) -> set[tuple[int, ...]]:
    """The work of each choice that has any, ends included."""
    return {tuple(branch.most for branch in choice.branches) for choice in program.choices} - {(0, 0)}


def test_one_stage_does_what_the_model_costs() -> None:
    assert program("1f1b", 1) == ProductWork(MICROBATCHES * (3 * LAYERS * (WEIGHTS + ATTENTION) + HEAD), ())


@pytest.mark.parametrize(
    ("schedule", "chunks"),
    [
        ("1f1b", 1),
        ("interleaved", 2),
        *(pytest.param(name, 1, marks=pytest.mark.slow) for name in ("gpipe", "eager_1f1b")),
    ],
)
def test_a_stage_computes_its_entries_and_nothing_when_idle(schedule: str, chunks: int) -> None:
    forward = LAYERS // (2 * chunks) * (WEIGHTS + ATTENTION)
    found = program(schedule, 2, chunks)
    # outside the choices nothing runs on every stage; idle is free; the head is a choice inside the forward
    assert found.flops == 0
    assert branches(found) == {(0, forward + HEAD), (0, 2 * forward)}
    (head,) = {choice.branches for choice in largest(found, forward + HEAD).choices if choice.branches[1].most}
    assert [branch.most for branch in head] == [0, HEAD]


def largest(program: ProductWork, flops: int) -> ProductWork:
    return next(branch for choice in program.choices for branch in choice.branches if branch.most == flops)


@pytest.mark.parametrize("recompute", ["none", pytest.param("full", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("schedule", "chunks"), [("zero_bubble", 1), pytest.param("zero_bubble_v", 2, marks=pytest.mark.slow)]
)
def test_a_split_backward_does_the_work_of_a_whole_one(schedule: str, chunks: int, recompute: str) -> None:
    layers = LAYERS // (2 * chunks)
    # the layer's last product, 4 of 12 hidden^2, is not computed again: its output is the next layer's input
    again = WEIGHTS * 8 // 12 + ATTENTION if recompute == "full" else 0
    inputs, weights = layers * (WEIGHTS + 2 * ATTENTION + again), layers * WEIGHTS
    found = program(schedule, 2, chunks, recompute)
    assert branches(found) - {(0, layers * (WEIGHTS + ATTENTION) + HEAD)} <= {(0, inputs), (0, weights)}
    assert (0, inputs) in branches(found)
    # where every stage has weight gradients to do there is no choice
    assert found.flops % weights == 0 and ((0, weights) in branches(found) or found.flops)


def test_work_is_counted_by_branch_and_trip() -> None:
    def function(x: jax.Array, chosen: jax.Array) -> jax.Array:
        def step(x: jax.Array, _: None) -> tuple[jax.Array, None]:
            return jax.lax.cond(chosen, lambda x: jnp.tanh(x @ x), lambda x: x, x) @ x, None

        return jax.lax.scan(step, x, None, length=5)[0]

    text = jax.jit(function).lower(jnp.ones((4, 4)), jnp.bool_(True)).compile().as_text()
    product = 2 * 4**3
    assert work(hlo.parse(text)) == ProductWork(
        5 * product, (Branches(5, (ProductWork(0, ()), ProductWork(product, ()))),)
    )
