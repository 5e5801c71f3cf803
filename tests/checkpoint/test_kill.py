"""`kill -9` of a process that saves: what is then restored is whole."""

import random
import time

import jax
import jax.numpy as jnp
import numpy as np

from jaxtron.checkpoint.restore import restore_newest


def test_a_killed_run_leaves_a_whole_checkpoint(tmp_path, start_script):
    generator = random.Random(0)
    abstract_state = {
        "weight": jax.ShapeDtypeStruct((512, 512), jnp.float32),
        "half": jax.ShapeDtypeStruct((1000,), jnp.bfloat16),
    }
    last, line = 0, ""
    for _ in range(3):
        child = start_script("save_in_loop.py", tmp_path)
        assert child.stdout is not None
        for _ in range(3):
            line = child.stdout.readline()
            assert line, child.communicate()[1]
        time.sleep(generator.uniform(0, 0.3))
        child.kill()
        output, _ = child.communicate()
        # a save returns once the one before it is committed
        returned = int((line + output).split("\n")[-2])
        restored = restore_newest(tmp_path, abstract_state)
        assert restored is not None and returned - 1 <= restored.step <= returned + 1
        assert restored.step > last and restored.extra == {"position": restored.step}
        assert all(skipped.reason.startswith("unfinished") for skipped in restored.skipped)
        np.testing.assert_array_equal(restored.state["weight"], restored.step)
        np.testing.assert_array_equal(restored.state["half"], restored.step % 256)
        last = restored.step
