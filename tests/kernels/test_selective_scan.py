"""Every implementation of the selective scan against float64, every gradient by name. One suite for all."""

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
from jaxtron.kernels.selective_scan import xla
from jaxtron.kernels.selective_scan.backend import IMPLEMENTATIONS, select_backend
from jaxtron.kernels.selective_scan.selective_scan import (
    SelectiveScan,
    backward,
    final_state,
    forward,
    gradient_summary,
)
from jaxtron.kernels.selective_scan.spec import check, through

# greatest error as a share of the greatest value: sums of up to 1000 positions in float32; in bfloat16 x, B, C are
# exact, and results are rounded to 8 bits
TOLERANCE = {"float32": 3e-5, "bfloat16": 0.004}
NAMES = ("x", "dt", "A", "B", "C", "D", "initial", "resets", "dy", "dfinal")
GRADIENTS = ("dx", "ddt", "dA", "dB", "dC", "dD", "dinitial")
# results with positions
ALONG = ("y", "dx", "ddt", "dB", "dC")


@dataclass(frozen=True)
class Case:
    """Sizes; `resets` are positions of the first row, and one earlier in the next ones."""

    length: int = 130
    rows: int = 2
    channels: int = 12
    size: int = 5
    dtype: str = "float32"
    resets: tuple[int, ...] = ()
    dt: tuple[float, float] = (0.01, 0.3)
    """Smallest and largest; logarithms are uniform between them."""
    padding: int = 0
    """Positions at the end with dt 0 and gradients of 0, whatever else is there."""
    poisoned: bool = False
    """x, B and C are `POISON` there, and nobody asks for results there."""


POISON = 1e3
PACKED = (1, 50, 51, 63, 64, 65, 127, 128, 255, 256, 257, 383)
CASES = {
    "one position": Case(1),
    "packed and padded, dt of every size": Case(390, resets=PACKED, padding=61, dt=(1e-5, 10.0)),
}
LENGTHS = (2, 3, 63, 64, 65, 100, 127, 128, 129, 255, 256, 257, 300, 511, 640, 999, 1000)
SLOW_CASES = {
    "bfloat16": Case(dtype="bfloat16", resets=(77,)),
    "packed": Case(390, resets=PACKED),
    "smallest dt": Case(dt=(1e-7, 1e-6)),
    "largest dt": Case(dt=(1.0, 5.0)),
    "no state passes": Case(129, resets=(0, 64, 128), rows=1),
    "one channel, one number": Case(70, channels=1, size=1),
    "128 numbers": Case(300, channels=8, size=128),
    **{f"length {length}": Case(length, resets=(length // 2, length - 1)) for length in LENGTHS},
}


def given(case: Case) -> dict[str, Any]:
    """What the functions are called with, by name."""
    generator = np.random.default_rng(case.length)

    def normal(*shape: int, dtype: Any = "float32") -> np.ndarray:
        return generator.normal(size=shape).astype(dtype)

    by_channel, by_number = (case.rows, case.length, case.channels), (case.rows, case.length, case.size)
    state, dtype = (case.rows, case.size, case.channels), jnp.dtype(case.dtype)
    dt, dy = np.exp(generator.uniform(*np.log(case.dt), size=by_channel)), normal(*by_channel, dtype=dtype)
    real = case.length - case.padding
    dt[:, real:], dy[:, real:] = 0.0, 0.0
    arrays = {
        "x": normal(*by_channel, dtype=dtype),
        "dt": dt.astype(np.float32),
        "A": -generator.uniform(0.5, 8.0, size=(case.channels, case.size)).astype(np.float32),
        "B": normal(*by_number, dtype=dtype),
        "C": normal(*by_number, dtype=dtype),
        "D": normal(case.channels),
        "initial": normal(*state),
        "resets": documents(case.rows, case.length, case.resets) if case.resets else None,
        "dy": dy,
        "dfinal": normal(*state),
    }
    if case.poisoned:
        for name in ("x", "B", "C"):
            arrays[name][:, real:] = POISON
    return arrays


def wanted(arrays: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """y, the final state and every gradient in float64, by the definition and its adjoint, position by position."""
    wide = (np.asarray(arrays[name], np.float64) for name in NAMES if name != "resets")
    x, dt, A, B, C, D, state, dy, asked = wide
    left = np.exp(np.einsum("bsp,pn->bsnp", dt, A))
    if arrays["resets"] is not None:
        left = np.where(arrays["resets"][..., None, None], 0.0, left)
    y, dx, ddt, dB, dC, dA = (np.zeros_like(array) for array in (x, x, dt, B, C, A))
    before = []
    for t in range(x.shape[1]):
        before.append(state)
        state = left[:, t] * state + np.einsum("bn,bp->bnp", B[:, t], dt[:, t] * x[:, t])
        y[:, t] = np.einsum("bn,bnp->bp", C[:, t], state) + D * x[:, t]
        dC[:, t] = np.einsum("bnp,bp->bn", state, dy[:, t])
    final = state
    for t in reversed(range(x.shape[1])):
        asked = asked + np.einsum("bn,bp->bnp", C[:, t], dy[:, t])
        by_exponent = asked * left[:, t] * before[t]
        added = np.einsum("bnp,bn->bp", asked, B[:, t])
        dx[:, t] = dt[:, t] * added + D * dy[:, t]
        ddt[:, t] = x[:, t] * added + np.einsum("bnp,pn->bp", by_exponent, A)
        dA += np.einsum("bnp,bp->pn", by_exponent, dt[:, t])
        dB[:, t] = np.einsum("bnp,bp->bn", asked, dt[:, t] * x[:, t])
        asked = asked * left[:, t]
    gradients = (dx, ddt, dA, dB, dC, (x * dy).sum((0, 1)), asked)
    return {"y": y, "final": final, **dict(zip(GRADIENTS, gradients, strict=True))}


def results(arrays: Mapping[str, Any], implementation: SelectiveScan) -> dict[str, jax.Array]:
    """y, the final state, every gradient, and both summaries."""
    *inputs, initial, resets, dy, dfinal = (arrays[name] for name in NAMES)
    x, dt, A, B, C, _ = inputs
    y, final, states = forward(*inputs, initial, resets, implementation)
    gradients = backward(*inputs, states, dy, dfinal, resets, implementation)
    return {
        "y": y,
        "final": final,
        **dict(zip(GRADIENTS, gradients, strict=True)),
        "final_state": final_state(x, dt, A, B, initial, resets, implementation),
        "gradient_summary": gradient_summary(dt, A, C, dy, dfinal, resets, implementation),
    }


def errors(made: Mapping[str, Any], case: Case) -> dict[str, float]:
    """Of each result the greatest error as a share of the greatest value."""
    exact = wanted(given(case))
    exact |= {"final_state": exact["final"], "gradient_summary": exact["dinitial"]}
    assert set(made) == set(exact)
    unread = ALONG if case.poisoned else ()
    return greatest_errors(made, exact, unread, case.length - case.padding)


def assert_right(made: Mapping[str, Any], case: Case) -> None:
    """Every result, by name, and the type of every gradient."""
    arrays = given(case)
    for name in GRADIENTS:
        assert made[name].dtype == arrays[name[1:]].dtype, name
    assert made["y"].dtype == arrays["x"].dtype and made["final"].dtype == jnp.float32
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
    """Whatever large numbers it has: as long as its dt is 0."""
    case, run = Case(150, padding=61, resets=(70,), poisoned=True), compiled(name)
    arrays = given(case)
    assert_right(run(arrays), case)
    # the slightest step of it would be seen
    arrays["dt"] = np.maximum(arrays["dt"], 1e-6)
    assert errors(run(arrays), case)["final"] > 0.1


@pytest.mark.parametrize("resets", [(), (70,)], ids=["one document", "two"])
def test_the_final_state_is_what_is_left_of_the_first_and_what_was_added(resets: tuple[int, ...]) -> None:
    """What a sequence in pieces rests on."""
    arrays = given(Case(resets=resets))
    x, dt, A, B = (jnp.asarray(arrays[name]) for name in ("x", "dt", "A", "B"))
    added = final_state(x, dt, A, B, jnp.zeros_like(arrays["initial"]), arrays["resets"], xla)
    made = through(dt, A, arrays["resets"]) * arrays["initial"] + added
    np.testing.assert_allclose(made, wanted(arrays)["final"], rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_results_do_not_depend_on_how_long_blocks_and_chunks_are(monkeypatch) -> None:
    for kept, positions in ((50, 20), (300, 300)):
        monkeypatch.setattr(xla, "KEPT", kept)
        monkeypatch.setattr(xla, "most_positions", lambda A, most=positions: most)
        check_case(Case(resets=(33, 64)), "xla")


@pytest.mark.slow
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_inside_a_region_whose_axes_are_manual(name: str) -> None:
    """Rows differ from device to device, A and D do not: their gradients are each device's own."""
    case, shared = Case(70, resets=(9,)), ("A", "D")
    arrays = given(case)
    mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    split, whole = PartitionSpec("data"), PartitionSpec()

    def body(arrays: Mapping[str, Any]) -> dict[str, jax.Array]:
        made = results(arrays, IMPLEMENTATIONS[name])
        return {key: array[None] if key in ("dA", "dD") else array for key, array in made.items()}

    specs = {key: whole if key in shared else split for key in arrays}
    run = jax.jit(jax.shard_map(body, mesh=mesh, in_specs=(specs,), out_specs=split), compiler_options=OPTIONS)
    made = run(arrays)
    assert_right({key: made[key].sum(0) if key in ("dA", "dD") else made[key] for key in made}, case)


@pytest.mark.slow
def test_memory_of_plain_jax_is_linear_in_the_length() -> None:
    def temporary(length: int) -> int:
        arrays = given(Case(1, rows=1, channels=512, size=16, dtype="bfloat16"))
        shapes = {
            key: None if array is None else shape(*array.shape, dtype=array.dtype) for key, array in arrays.items()
        }
        along = ("x", "dt", "B", "C", "dy")
        shapes |= {key: shape(1, length, *arrays[key].shape[2:], dtype=arrays[key].dtype) for key in along}
        compiled = jax.jit(functools.partial(results, implementation=xla)).lower(shapes).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    short, middle, long = (temporary(length) for length in (2048, 4096, 8192))
    assert long - middle == pytest.approx(2 * (middle - short), rel=0.1)
    # states of all positions would be 32 MiB a 1,024 of them
    assert (long - middle) / 4 < 12 * 2**20


def shape(*sizes: int, dtype: Any = "float32") -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, dtype)


FITS = {"x": shape(2, 30, 8), "dt": shape(2, 30, 8), "A": shape(8, 4), "B": shape(2, 30, 4), "C": shape(2, 30, 4)}
REFUSED = {
    r"of x \(2, 30\) and A": {"x": shape(2, 30)},
    r"x \(2, 0, 8\): there must be a position": {"x": shape(2, 0, 8)},
    r"dt is \(2, 30, 1\) and must be \(2, 30, 8\)": {"dt": shape(2, 30, 1)},
    r"C is \(2, 30, 3\) and must be \(2, 30, 4\)": {"C": shape(2, 30, 3)},
    "of float32 x, bfloat16 B": {"B": shape(2, 30, 4, dtype="bfloat16")},
    "with bfloat16 dt and float32 A": {"dt": shape(2, 30, 8, dtype="bfloat16")},
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_does_not_fit_together_is_refused(message: str) -> None:
    check(**FITS)
    with pytest.raises(UserError, match=message):
        check(**{**FITS, **REFUSED[message]})


def test_which_implementation_is_selected() -> None:
    assert select_backend("auto", "cpu").implementation is xla
    assert select_backend("reference", "cpu").implementation is IMPLEMENTATIONS["reference"]
    known = "model.mamba.implementation mosaic is not known to selective scan: use one of auto, xla, reference"
    with pytest.raises(UserError, match=known):
        select_backend("mosaic", "cpu")
