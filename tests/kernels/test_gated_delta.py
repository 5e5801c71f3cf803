"""Every implementation of the gated delta rule against float64, every gradient by name. One suite for all."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec
from scans import OPTIONS, documents, greatest_errors, with_each

from jaxtron.config import UserError
from jaxtron.kernels.gated_delta import xla
from jaxtron.kernels.gated_delta.backend import IMPLEMENTATIONS, select_backend
from jaxtron.kernels.gated_delta.gated_delta import (
    GatedDeltaRule,
    backward,
    final_state,
    forward,
    gradient_summary,
    through,
)
from jaxtron.kernels.gated_delta.spec import check

# greatest error as a share of the greatest value: decays from sums of logarithms, which lose digits beside large ones;
# in bfloat16 q, k and v are exact, and results are rounded to 8 bits
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.004}
NAMES = ("q", "k", "v", "g", "beta", "initial", "resets", "do", "dfinal")
ALONG = ("q", "k", "v", "g", "beta", "resets", "do")
GRADIENTS = ("dq", "dk", "dv", "dg", "dbeta", "dinitial")
# results with positions
BY_POSITION = ("o", "dq", "dk", "dv")


@dataclass(frozen=True)
class Case:
    """Sizes; `resets` are positions of the first row, and one earlier in the next ones."""

    length: int = 130
    rows: int = 2
    heads: int = 4
    groups: int = 2
    width: int = 6
    size: int = 8
    dtype: str = "float32"
    resets: tuple[int, ...] = ()
    decay: tuple[float, float] = (0.001, 1.0)
    """Smallest and largest -g; logarithms are uniform between them."""
    beta: tuple[float, float] = (0.0, 1.0)
    alike: float = 0.0
    """How much all keys have in common: 1, they are one and the same."""
    padding: int = 0
    """Positions at the end with g and beta 0 and gradients of 0, whatever else is there."""
    poisoned: bool = False
    """q, k and v are `POISON` there, and nobody asks for results there."""


POISON = 1e3
PACKED = (1, 50, 51, 63, 64, 65, 127, 128, 255, 256, 257, 290)
CASES = {
    "one position": Case(1),
    "packed and padded, decays of every size": Case(300, resets=PACKED, padding=41, decay=(1e-5, 10.0)),
}
LENGTHS = (2, 3, 63, 64, 65, 100, 127, 128, 129, 255, 256, 257, 300, 511, 640, 999, 1000)
SLOW_CASES = {
    "bfloat16": Case(dtype="bfloat16", resets=(77,)),
    "no decay": Case(decay=(1e-9, 1e-8)),
    # in a chunk the logarithm falls to thousands below 0, and its exponential to nothing
    "hardly anything is left": Case(decay=(2.0, 90.0)),
    "every write whole": Case(beta=(1.0, 1.0), decay=(1e-4, 1e-3)),
    # powers of the triangular system's matrix would be as large as 1e18
    "one key": Case(alike=1.0, beta=(0.9, 1.0), decay=(1e-5, 1e-4)),
    "nothing is written": Case(beta=(0.0, 0.0)),
    "no state passes": Case(129, resets=(0, 64, 128), rows=1),
    "one group": Case(groups=1, heads=3),
    "a group a head": Case(groups=4, width=16, size=3),
    **{f"length {length}": Case(length, resets=(length // 2, length - 1)) for length in LENGTHS},
}


def given(case: Case) -> dict[str, Any]:
    """What the functions are called with, by name."""
    generator = np.random.default_rng(case.length)

    def normal(*shape: int, dtype: Any = "float32") -> np.ndarray:
        return generator.normal(size=shape).astype(dtype)

    by_head, by_group = (case.rows, case.length, case.heads), (case.rows, case.length, case.groups, case.size)
    state, dtype = (case.rows, case.heads, case.size, case.width), jnp.dtype(case.dtype)
    k = (1 - case.alike) * normal(*by_group) + case.alike * normal(case.size)
    g, do = -np.exp(generator.uniform(*np.log(case.decay), size=by_head)), normal(*by_head, case.width, dtype=dtype)
    beta, real = generator.uniform(*case.beta, size=by_head), case.length - case.padding
    for array in (g, beta, do):
        array[:, real:] = 0.0
    arrays = {
        "q": (normal(*by_group) / case.size**0.5).astype(dtype),
        "k": (k / np.linalg.norm(k, axis=-1, keepdims=True)).astype(dtype),
        "v": normal(*by_head, case.width, dtype=dtype),
        "g": g.astype(np.float32),
        "beta": beta.astype(np.float32),
        "initial": normal(*state),
        "resets": documents(case.rows, case.length, case.resets) if case.resets else None,
        "do": do,
        "dfinal": normal(*state),
    }
    if case.poisoned:
        for name in ("q", "k", "v"):
            arrays[name][:, real:] = POISON
    return arrays


def wanted(case: Case) -> dict[str, np.ndarray]:
    """Outputs, the final state, every gradient in float64, by the definition and its adjoint, position by position."""
    arrays = given(case)
    q, k, v, g, beta, state, do, asked = (np.asarray(arrays[name], np.float64) for name in NAMES if name != "resets")
    q, k = (np.repeat(array, case.heads // case.groups, axis=2) for array in (q, k))
    left = np.exp(g)
    if arrays["resets"] is not None:
        left = np.where(arrays["resets"][..., None], 0.0, left)
    o, dq, dk, dv, dg, dbeta = (np.zeros_like(array) for array in (v, q, k, v, g, beta))
    before = []
    for t in range(case.length):
        before.append(state)
        state = left[:, t, :, None, None] * state
        written = beta[:, t, :, None] * (v[:, t] - np.einsum("bhn,bhnp->bhp", k[:, t], state))
        state = state + np.einsum("bhn,bhp->bhnp", k[:, t], written)
        o[:, t] = np.einsum("bhn,bhnp->bhp", q[:, t], state)
        dq[:, t] = np.einsum("bhnp,bhp->bhn", state, do[:, t])
    final = state
    for t in reversed(range(case.length)):
        asked = asked + np.einsum("bhn,bhp->bhnp", q[:, t], do[:, t])
        decayed = left[:, t, :, None, None] * before[t]
        missing = v[:, t] - np.einsum("bhn,bhnp->bhp", k[:, t], decayed)
        by_written = np.einsum("bhn,bhnp->bhp", k[:, t], asked)
        dv[:, t] = beta[:, t, :, None] * by_written
        dbeta[:, t] = (by_written * missing).sum(-1)
        dk[:, t] = np.einsum("bhnp,bhp->bhn", asked, beta[:, t, :, None] * missing)
        dk[:, t] -= np.einsum("bhnp,bhp->bhn", decayed, dv[:, t])
        asked = asked - np.einsum("bhn,bhp->bhnp", k[:, t], dv[:, t])
        dg[:, t] = (asked * decayed).sum((-2, -1))
        asked = asked * left[:, t, :, None, None]

    def by_group(array: np.ndarray) -> np.ndarray:
        return array.reshape(*array.shape[:2], case.groups, -1, case.size).sum(3)

    gradients = (by_group(dq), by_group(dk), dv, dg, dbeta, asked)
    return {"o": o, "final": final, **dict(zip(GRADIENTS, gradients, strict=True))}


def results(arrays: Mapping[str, Any], implementation: GatedDeltaRule) -> dict[str, jax.Array]:
    """Outputs, the final state, every gradient, and both summaries."""
    *inputs, initial, resets, do, dfinal = (arrays[name] for name in NAMES)
    q, k, v, g, beta = inputs
    o, final, states = forward(*inputs, initial, resets, implementation)
    gradients = backward(*inputs, states, do, dfinal, resets, implementation)
    return {
        "o": o,
        "final": final,
        **dict(zip(GRADIENTS, gradients, strict=True)),
        "final_state": final_state(k, v, g, beta, initial, resets, implementation),
        "gradient_summary": gradient_summary(q, k, g, beta, do, dfinal, resets, implementation),
    }


def errors(made: Mapping[str, Any], case: Case) -> dict[str, float]:
    """Of each result the greatest error as a share of the greatest value."""
    exact = wanted(case)
    exact |= {"final_state": exact["final"], "gradient_summary": exact["dinitial"]}
    assert set(made) == set(exact)
    unread = {"dg", "dbeta", *(BY_POSITION if case.poisoned else ())}
    return greatest_errors(made, exact, unread, case.length - case.padding)


def assert_right(made: Mapping[str, Any], case: Case) -> None:
    """Every result, by name, and the type of every gradient."""
    arrays = given(case)
    for name in GRADIENTS:
        assert made[name].dtype == arrays[name[1:]].dtype, name
    assert made["o"].dtype == arrays["v"].dtype and made["final"].dtype == jnp.float32
    found = errors(made, case)
    assert all(error <= TOLERANCE[case.dtype] for error in found.values()), found


def compiled(name: str) -> Any:
    return jax.jit(functools.partial(results, implementation=IMPLEMENTATIONS[name]), compiler_options=OPTIONS)


def check_case(case: Case, name: str) -> None:
    assert_right(compiled(name)(given(case)), case)


@with_each(CASES, lambda case: IMPLEMENTATIONS)
def test_outputs_states_and_every_gradient(case: Case, name: str) -> None:
    check_case(case, name)


@pytest.mark.slow
@with_each(SLOW_CASES, lambda case: IMPLEMENTATIONS)
def test_every_length_and_size(case: Case, name: str) -> None:
    check_case(case, name)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_padding_leaves_no_trace(name: str) -> None:
    """Whatever large numbers it has: as long as its beta and g are 0."""
    case, run = Case(150, padding=61, resets=(70,), poisoned=True), compiled(name)
    arrays = given(case)
    assert_right(run(arrays), case)
    # the slightest write of it would be seen
    arrays["beta"] = np.maximum(arrays["beta"], 1e-6)
    assert errors(run(arrays), case)["final"] > 0.1


@pytest.mark.parametrize("resets", [(), (70,)], ids=["one document", "two"])
def test_the_final_state_is_what_is_left_of_the_first_and_what_was_added(resets: tuple[int, ...]) -> None:
    """What a sequence in pieces rests on: the same forward, and its transpose back."""
    arrays = given(Case(resets=resets))
    q, k, v, g, beta, do = (jnp.asarray(arrays[name]) for name in ("q", "k", "v", "g", "beta", "do"))
    nothing, exact = jnp.zeros_like(arrays["initial"]), wanted(Case(resets=resets))
    matrix = through(k, g, beta, arrays["resets"], xla)
    added = final_state(k, v, g, beta, nothing, arrays["resets"], xla)
    made = jnp.einsum("bhnm,bhmp->bhnp", matrix, arrays["initial"]) + added
    np.testing.assert_allclose(made, exact["final"], rtol=1e-5, atol=1e-5)
    asked = gradient_summary(q, k, g, beta, do, nothing, arrays["resets"], xla)
    made = jnp.einsum("bhmn,bhmp->bhnp", matrix, arrays["dfinal"]) + asked
    np.testing.assert_allclose(made, exact["dinitial"], rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_results_do_not_depend_on_how_long_blocks_and_chunks_are(monkeypatch) -> None:
    for kept, positions in ((50, 20), (300, 300)):
        monkeypatch.setattr(xla, "KEPT", kept)
        monkeypatch.setattr(xla, "CHUNK", positions)
        check_case(Case(resets=(33, 64)), "xla")


@pytest.mark.slow
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_inside_a_region_whose_axes_are_manual(name: str) -> None:
    case = Case(70, resets=(9,))
    mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    body = functools.partial(results, implementation=IMPLEMENTATIONS[name])
    run = jax.shard_map(body, mesh=mesh, in_specs=PartitionSpec("data"), out_specs=PartitionSpec("data"))
    assert_right(jax.jit(run, compiler_options=OPTIONS)(given(case)), case)


@pytest.mark.slow
def test_memory_of_plain_jax_is_linear_in_the_length() -> None:
    def temporary(length: int) -> int:
        arrays = given(Case(1, rows=1, heads=8, groups=4, width=64, size=64, dtype="bfloat16"))
        shapes = {
            key: None if array is None else shape(*array.shape, dtype=array.dtype) for key, array in arrays.items()
        }
        shapes |= {
            key: shape(1, length, *arrays[key].shape[2:], dtype=arrays[key].dtype) for key in ALONG if key != "resets"
        }
        compiled = jax.jit(functools.partial(results, implementation=xla)).lower(shapes).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    short, middle, long = (temporary(length) for length in (2048, 4096, 8192))
    assert long - middle == pytest.approx(2 * (middle - short), rel=0.1)
    # states of all positions would be 128 MiB a 1,024 of them
    assert (long - middle) / 4 < 12 * 2**20


def shape(*sizes: int, dtype: Any = "float32") -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, dtype)


FITS = {"k": shape(2, 30, 2, 8), "v": shape(2, 30, 4, 6), "g": shape(2, 30, 4), "beta": shape(2, 30, 4)}
REFUSED = {
    r"of k \(2, 30, 16\) and v": {"k": shape(2, 30, 16)},
    "0 positions": {"v": shape(2, 0, 4, 6)},
    "4 heads and 3 groups: .* heads must be a multiple of groups": {"k": shape(2, 30, 3, 8)},
    r"beta is \(2, 30, 1\) and must be \(2, 30, 4\)": {"beta": shape(2, 30, 1)},
    r"q is \(2, 30, 2, 9\) and must be \(2, 30, 2, 8\)": {"q": shape(2, 30, 2, 9)},
    "of bfloat16 k, float32 v": {"k": shape(2, 30, 2, 8, dtype="bfloat16")},
    "with bfloat16 g and float32 beta": {"g": shape(2, 30, 4, dtype="bfloat16")},
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_does_not_fit_together_is_refused(message: str) -> None:
    check(**FITS)
    with pytest.raises(UserError, match=message):
        check(**{**FITS, **REFUSED[message]})


def test_which_implementation_is_selected() -> None:
    assert select_backend("auto", "cpu").implementation is xla
    assert select_backend("reference", "cpu").implementation is IMPLEMENTATIONS["reference"]
