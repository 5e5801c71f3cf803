"""Two processes with four devices each write one checkpoint, which any number restores."""

import socket
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxtron.checkpoint.restore import restore_newest


def run_two(start_script: Callable, name: str, directory: Path) -> None:
    """Run a script in two processes with four devices each."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    children = [start_script(name, process, port, directory, devices=4) for process in (0, 1)]
    try:
        results = [child.communicate(timeout=300) for child in children]
    finally:
        for child in children:
            child.kill()
    for output, errors in results:
        assert output.endswith("done\n"), errors


def test_a_host_that_lost_its_memory_has_its_part_from_another(tmp_path, start_script):
    run_two(start_script, "copy_in_processes.py", tmp_path)


def test_two_processes_write_one_checkpoint(tmp_path, start_script):
    run_two(start_script, "save_in_processes.py", tmp_path)
    # step 3 was damaged by the script
    restored = restore_newest(
        tmp_path,
        {
            "weight": jax.ShapeDtypeStruct((64, 32), jnp.float32),
            "key": jax.ShapeDtypeStruct((), jax.random.key(0).dtype),
            "step": jax.ShapeDtypeStruct((), jnp.int32),
        },
    )
    assert restored is not None and restored.step == 2 and len(restored.skipped) == 1
    np.testing.assert_array_equal(restored.state["weight"].reshape(-1), np.arange(64 * 32) + 2)
