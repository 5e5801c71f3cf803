"""Simulated devices that wait for each other end what they began, also where a machine has few cores."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

# the step of a pipeline beside gathers of weights, over and over
PROGRAM = """
import sys, time
sys.path.insert(0, sys.argv[1])
from jaxtron.runtime.devices import simulate_devices
simulate_devices(8)
import jax, jax.numpy as jnp
from tests.support.equivalence import (
    MODELS, SCANNED, batch_sharding, changed, make_batch, make_params, make_trainer, rules_for, use
)
from jaxtron.pipeline.config import PipelineConfig

pipeline = PipelineConfig(schedule="zero_bubble")
with use(rules_for({"pipe": 2, "fsdp": 2, "tensor": 2}, "optimizer", None)):
    model = changed(MODELS["gpt with dropout"], num_layers=8, **SCANNED)
    trainer = make_trainer(model, pipeline=pipeline, microbatches=3, global_batch=24)
    params = make_params(trainer)
    batch = jax.device_put(make_batch(24, False), batch_sharding())
    run = jax.jit(trainer.loss_and_gradients)
    end = None
    while end is None or time.monotonic() < end:
        jax.block_until_ready(run(params, batch, jnp.int32(5), jnp.float32(1.0)))
        end = end or time.monotonic() + 60
"""


@pytest.mark.slow
def test_devices_do_not_wait_for_each_other_for_ever():
    """Two at once for a minute. With as many threads as two cores one of them was aborted, on JAX 0.11.2."""
    variables = {name: value for name, value in os.environ.items() if name != "PJRT_NPROC"}
    variables["XLA_FLAGS"] = "--xla_cpu_collective_call_terminate_timeout_seconds=20"
    command = [sys.executable, "-c", textwrap.dedent(PROGRAM), str(Path(__file__).parent)]
    processes = [subprocess.Popen(command, env=variables, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    ended = [(process.communicate(timeout=300)[1], process.returncode) for process in processes]
    assert [code for _, code in ended] == [0, 0], ended[0][0][-2000:] + ended[1][0][-2000:]
