"""Faults of synchronization in the text of every Mosaic kernel, and what shows each in Pallas' interpreter."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    """`old`, which is once in the text of a function, becomes `new`."""

    function: str
    """Module below `jaxtron.kernels` and name in it."""
    old: str
    new: str = "None"
    seen: str = "race"
    """What finds it: the detector, or an error where the interpreter itself watches."""


def waits(function: str, *names: str) -> dict[str, Fault]:
    """Without a wait for one of these barriers."""
    return {f"no wait for {name}": Fault(function, f"plgpu.barrier_wait({name})") for name in names}


def early(function: str, product: str, freed: str, indent: int = 4) -> Fault:
    """A place is given back as soon as the product that reads it was issued."""
    arrival = f"plgpu.barrier_arrive({freed})"
    return Fault(function, f"{product})\n{' ' * indent}{arrival}", f"{product}, issued=lambda: {arrival})")


FENCE, LAST = "plgpu.commit_smem()", "plgpu.wait_smem_to_gmem(0)"
READ = "plgpu.wait_smem_to_gmem(0, wait_read_only=True)"
FORWARD, KEYS, QUERIES = (f"attention.mosaic_{name}:" for name in ("forward", "backward", "queries"))
BLOCKS = "block_products.mosaic:"
PIPELINE = "grouped_matmul.mosaic_pipeline:"
CHUNKS, ALONG, MARCH, INPUTS, OUTPUTS = (
    f"ssd.mosaic_{name}:" for name in ("chunks", "forward", "march", "inputs", "outputs")
)
REFILL = Fault(
    FORWARD + "copy_keys", "pl.when(index >= shape.stages)(functools.partial(plgpu.barrier_wait, free.at[slot]))"
)
REFILL_STAGE = Fault(
    CHUNKS + "keep_full", "pl.when(index >= stages)(functools.partial(plgpu.barrier_wait, free.at[stage]))"
)
FAULTS: dict[str, dict[str, Fault]] = {
    "attention forward": {
        **waits(FORWARD + "_step", "refs.k_ready.at[slot]", "refs.v_ready.at[slot]"),
        **waits(FORWARD + "_compute", "ready"),
        "stages filled before they are free": REFILL,
        "arrivals that nobody sees": Fault(
            FORWARD + "copy_keys", "\n        plgpu.barrier_wait(refs.v_free.at[slot])", "", seen="error"
        ),
        "keys freed early": Fault(
            FORWARD + "_step",
            "issued=take_turn)\n    plgpu.barrier_arrive(refs.k_free.at[slot])",
            "issued=lambda: (take_turn(), plgpu.barrier_arrive(refs.k_free.at[slot])))",
        ),
        "values freed early": early(
            FORWARD + "_step", "target.product(narrow, refs.v_shared.at[slot], out", "refs.v_free.at[slot]"
        ),
        "no fence": Fault(FORWARD + "_store", FENCE),
        "the output may not have left": Fault(FORWARD + "_store", LAST, seen="error"),
    },
    "attention backward": {
        **waits(KEYS + "_compute", "ready"),
        **waits(KEYS + "_step", "refs.q_ready.at[slot]", "refs.dout_ready.at[slot]"),
        "stages filled before they are free": Fault(
            KEYS + "_copy_queries",
            "pl.when(index >= _stages(refs))(functools.partial(plgpu.barrier_wait, free.at[slot]))",
        ),
        "queries freed early": early(KEYS + "_step", "target.product(ds, q, dk", "refs.q_free.at[slot]"),
        "no fence behind the statistics": Fault(KEYS + "_step", FENCE),
        "no meeting in a step": Fault(KEYS + "_add_to_dq", "_meet(refs)"),
        "no meeting at the end": Fault(KEYS + "_compute", "_meet(refs)"),
        "no fence before the meeting": Fault(KEYS + "_add_to_dq", f"{FENCE}\n    _meet", "_meet"),
        "one place for two": Fault(KEYS + "_add_to_dq", "lax.rem(index, jnp.int32(2))", "0"),
        "sums overwritten before they leave": Fault(KEYS + "_add_to_dq", READ),
        "no fence before sums leave": Fault(
            KEYS + "_add_to_dq", f"shared[...] = part\n    {FENCE}", "shared[...] = part"
        ),
        "no fence before gradients leave": Fault(KEYS + "_compute", FENCE),
        "gradients may not have left": Fault(KEYS + "_compute", f"\n    {LAST}\n", "\n", seen="error"),
    },
    "attention backward, queries": {
        **waits(QUERIES + "_compute", "ready"),
        **waits(QUERIES + "_step", "refs.k_ready.at[slot]", "refs.v_ready.at[slot]"),
        "stages filled before they are free": REFILL,
        "keys freed early": early(
            QUERIES + "_step", "target.product(ds, refs.k_shared.at[slot], dq", "refs.k_free.at[slot]"
        ),
        "no fence": Fault(QUERIES + "_compute", FENCE),
        "the gradient may not have left": Fault(QUERIES + "_compute", LAST, seen="error"),
    },
    "products of blocks": {
        **waits(BLOCKS + "_Scaled._multiply", "refs.ready.at[stage]"),
        "no fence before a stage is free": Fault(BLOCKS + "_Scaled._multiply", FENCE),
    },
    "grouped products": {
        **waits(PIPELINE + "Block._multiply", "refs.ready.at[stage]"),
        **waits(PIPELINE + "_copy", "refs.free.at[stage]"),
        "arrivals that nobody sees": Fault(
            PIPELINE + "_copy", "plgpu.barrier_wait(refs.free.at[_stage(index)])", seen="error"
        ),
        "two products under way": Fault(PIPELINE + "Block._multiply", "plgpu.wgmma_wait(1)", "plgpu.wgmma_wait(2)"),
        "pieces overwritten before they leave": Fault(
            PIPELINE + "Block.store", "plgpu.wait_smem_to_gmem(min(number, 1), wait_read_only=True)"
        ),
        "one place for two": Fault(PIPELINE + "Block.store", "number % 2", "0"),
        "no fence": Fault(PIPELINE + "Block.store", FENCE),
        "the result may not have left": Fault(PIPELINE + "Block.run", LAST, seen="error"),
    },
    "state-space duality forward": {
        **waits(ALONG + "_compute", "refs.ready.at[stage]"),
        "stages filled before they are free": REFILL_STAGE,
        "arrivals that nobody sees": Fault(
            CHUNKS + "keep_full", "plgpu.barrier_wait(free.at[stage_of(index, stages)])", seen="error"
        ),
        "freed early": early(ALONG + "_compute", "refs.weighted, state", "refs.free.at[stage]", indent=8),
        "no first meeting": Fault(ALONG + "_compute", "keep(state, 0)\n    meet(refs.meeting)", "keep(state, 0)"),
        "no meeting before the state": Fault(
            ALONG + "_compute", "index, stage)\n        meet(refs.meeting)", "index, stage)"
        ),
        "no meeting after the state": Fault(
            ALONG + "_compute", "index + 1))\n        meet(refs.meeting)", "index + 1))"
        ),
        "no fence behind the state": Fault(ALONG + "_compute", FENCE),
        "no fence behind the output": Fault(ALONG + "_outputs", FENCE),
        "overwritten before it leaves": Fault(ALONG + "_outputs", READ),
        "the output may not have left": Fault(ALONG + "_compute", LAST, seen="error"),
    },
    "state-space duality from chunk to chunk": {
        **waits(MARCH + "_step", "refs.ready.at[stage]"),
        "freed early": early(MARCH + "_step", "refs.weighted.at[place], state * left", "refs.free.at[stage]"),
        "no meeting": Fault(MARCH + "_step", "meet(refs.meeting)"),
        "one place for two": Fault(MARCH + "_step", "stage_of(index, 2)", "0"),
        "no fence in a step": Fault(MARCH + "_step", FENCE),
        "no fence behind the state": Fault(MARCH + "_keep", FENCE),
        "overwritten before it leaves": Fault(MARCH + "_keep", "plgpu.wait_smem_to_gmem(2, wait_read_only=True)"),
        "states may not have left": Fault(MARCH + "_block", LAST, seen="error"),
    },
    # what sums over heads is the same code in both
    "state-space duality by inputs": {
        **waits(CHUNKS + "sum_over_heads", "refs.once"),
        "stages filled before they are free": REFILL_STAGE,
        "no fence before the sum leaves": Fault(CHUNKS + "sum_over_heads", FENCE),
        "the sum may not have left": Fault(CHUNKS + "sum_over_heads", LAST, seen="error"),
        **waits(INPUTS + "_step", "refs.ready.at[stage]"),
        "overwritten before it leaves": Fault(INPUTS + "_step", READ),
        "no fence": Fault(INPUTS + "_step", FENCE),
    },
    "state-space duality by outputs": {
        **waits(OUTPUTS + "_step", "refs.ready.at[stage]"),
        "overwritten before it leaves": Fault(OUTPUTS + "_step", READ),
        "no fence": Fault(OUTPUTS + "_step", FENCE),
    },
}
