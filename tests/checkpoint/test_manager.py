"""Saving and restoring: bit-exact on any mesh, in the background, the newest kept."""

import threading

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxtron.checkpoint import record as records
from jaxtron.checkpoint.config import CheckpointConfig
from jaxtron.checkpoint.manager import Checkpoints
from jaxtron.checkpoint.names import signature
from jaxtron.checkpoint.restore import restore_part, step_path
from jaxtron.checkpoint.storage import RecordingHandler
from jaxtron.config import UserError


@pytest.fixture
def checkpoints(tmp_path):
    made = []

    def make(**settings) -> Checkpoints:
        made.append(Checkpoints(tmp_path / "checkpoints", CheckpointConfig(**settings)))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture
def held_commit(monkeypatch) -> threading.Event:
    """Commits wait until this event is set."""
    release = threading.Event()
    finalize = RecordingHandler.finalize

    def held(self, directory):
        assert release.wait(20)
        finalize(self, directory)

    monkeypatch.setattr(RecordingHandler, "finalize", held)
    return release


def test_round_trip_is_bit_exact_on_every_mesh(
    checkpoints, make_state, abstract, assert_same, data_mesh, tensor_mesh, one_device
):
    state = make_state(data_mesh, seed=5)
    extra = {"position": {"epoch": 1, "index": 12345678901}, "seed": 7, "model": "gpt"}
    written = checkpoints()
    with jax.set_mesh(data_mesh):
        written.save(5, state, extra)
    written.wait()
    for mesh in (data_mesh, tensor_mesh, one_device):
        wanted = abstract(state, mesh)
        with jax.set_mesh(mesh):
            restored = checkpoints().restore(wanted)
        assert restored is not None
        assert (restored.step, restored.extra, restored.skipped) == (5, extra, ())
        assert_same(restored.state, state)
        for leaf, like in zip(jax.tree.leaves(restored.state), jax.tree.leaves(wanted), strict=True):
            assert leaf.sharding.is_equivalent_to(like.sharding, leaf.ndim)


def test_padding_is_not_saved_and_restored_as_zeros(checkpoints, data_mesh, odd_mesh, one_device):
    # five rows on eight devices: the last three have padding alone
    values = {"own": np.arange(1, 16, dtype=np.float32).reshape(5, 3), "even": np.arange(8, dtype=np.float32)}
    sizes = {8: 8, 3: 6, 1: 5}

    def place(mesh, value):
        rows = sizes[mesh.size] if value.ndim == 2 else len(value)
        padded = np.pad(value, [(0, rows - len(value))] + [(0, 0)] * (value.ndim - 1))
        spec = P(*mesh.axis_names) if len(padded) % mesh.size == 0 else P()
        return jax.device_put(padded, NamedSharding(mesh, spec))

    on_disk = signature(jax.tree.map(jnp.asarray, values))
    steps = checkpoints(keep=9)
    meshes = data_mesh, odd_mesh, one_device
    for step, mesh in enumerate(meshes):
        steps.save(step, {name: place(mesh, value) for name, value in values.items()}, {}, on_disk)
        steps.wait()
        assert records.read(step_path(steps.directory, step)).arrays == on_disk
        # read without any of this: all that is there is the parameter's own
        as_numpy = {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in values}
        written = ocp.PyTreeCheckpointer().restore(step_path(steps.directory, step), restore_args=as_numpy)
        for name, value in values.items():
            np.testing.assert_array_equal(written[name], value)
        for other in meshes:
            like = {name: place(other, value) for name, value in values.items()}
            abstract = jax.tree.map(
                lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), like
            )
            restored = steps.restore(abstract, on_disk=on_disk)
            assert restored is not None and restored.step == step
            jax.tree.map(np.testing.assert_array_equal, restored.state, like)
    with pytest.raises(UserError, match=r"own has shape \[5, 3\] there and \[8, 3\] here"):
        steps.restore({name: place(data_mesh, value) for name, value in values.items()})


def test_files_do_not_depend_on_the_mesh_that_wrote_them(
    tmp_path, make_state, abstract, assert_same, data_mesh, tensor_mesh, one_device
):
    expected = make_state(one_device, seed=1)
    for mesh in (tensor_mesh, one_device):
        written = Checkpoints(tmp_path / f"{mesh.size}", CheckpointConfig())
        written.save(1, make_state(mesh, seed=1), {})
        restored = written.restore(abstract(expected, data_mesh))
        assert restored is not None
        assert_same(restored.state, expected)
        written.close()


def test_buffers_may_be_donated_right_after_save(
    checkpoints, make_state, abstract, assert_same, data_mesh, held_commit
):
    train_step = jax.jit(
        lambda state: jax.tree.map(lambda leaf: leaf if leaf.dtype == state["key"].dtype else leaf * 0 + 3, state),
        donate_argnums=0,
    )
    written = checkpoints()
    state = make_state(data_mesh, seed=2)
    with jax.set_mesh(data_mesh):
        written.save(2, state, {})
        for _ in range(3):
            state = jax.block_until_ready(train_step(state))
    held_commit.set()
    restored = written.restore(abstract(state, data_mesh))
    assert restored is not None
    assert_same(restored.state, make_state(data_mesh, seed=2))


def test_extra_may_change_right_after_save(checkpoints, make_state, abstract, one_device, held_commit):
    written, state, extra = checkpoints(), make_state(one_device), {"position": [1]}
    written.save(1, state, extra)
    extra["position"].append(2)
    held_commit.set()
    restored = written.restore(abstract(state, one_device))
    assert restored is not None and restored.extra == {"position": [1]}


def test_the_newest_are_kept(checkpoints, make_state, one_device, tmp_path):
    written = checkpoints(keep=2)
    for step in (1, 2, 30, 400):
        written.save(step, make_state(one_device), {})
    written.wait()
    assert written.steps() == [30, 400] and written.latest_step() == 400
    on_disk = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert on_disk == ["step_00000030", "step_00000400"]
    assert checkpoints().steps() == [30, 400]


def test_the_last_good_one_stays_until_the_next_is_committed(checkpoints, make_state, one_device, held_commit):
    written, state = checkpoints(keep=1), make_state(one_device)
    held_commit.set()
    written.save(1, state, {})
    written.wait()
    held_commit.clear()
    written.save(2, state, {})
    # not blocked by the commit, which has not happened: step 1 must still be there
    assert written.steps() == [1] and (written.directory / "step_00000001" / "jaxtron.json").exists()
    assert not (written.directory / "step_00000002").exists()
    held_commit.set()
    written.wait()
    assert written.steps() == [2] and not (written.directory / "step_00000001").exists()


def test_synchronous_saves_are_on_disk_when_they_return(checkpoints, make_state, one_device):
    written = checkpoints(asynchronous=False)
    written.save(3, make_state(one_device), {})
    assert (written.directory / "step_00000003" / "jaxtron.json").exists()


def test_saving_a_step_twice_keeps_the_first(checkpoints, make_state, abstract, assert_same, one_device):
    written, state = checkpoints(), make_state(one_device, seed=1)
    written.save(1, state, {})
    written.save(1, make_state(one_device, seed=2), {})
    restored = written.restore(abstract(state, one_device))
    assert restored is not None
    assert_same(restored.state, state)


def test_an_empty_directory_restores_nothing(checkpoints, make_state, abstract, one_device):
    assert checkpoints().restore(abstract(make_state(one_device), one_device)) is None
    assert checkpoints().latest_step() is None and checkpoints().steps() == []


def test_resume_off_never_overwrites(checkpoints, make_state, abstract, one_device):
    state = make_state(one_device)
    wanted = abstract(state, one_device)
    assert checkpoints(resume=False).restore(wanted) is None
    checkpoints(asynchronous=False).save(1, state, {})
    with pytest.raises(UserError, match="up to step 1 and --checkpoint.resume is off"):
        checkpoints(resume=False).restore(wanted)


def test_a_checkpoint_that_a_run_replaces_while_it_is_read_is_read_anew(
    checkpoints, make_state, abstract, assert_same, one_device, monkeypatch, caplog
):
    written = checkpoints(keep=1, asynchronous=False)
    written.save(1, make_state(one_device, seed=1), {})
    verify = records.verify

    def slow(directory, files, **shares):
        if directory.name == "step_00000001":
            # the run goes on meanwhile
            written.save(2, make_state(one_device, seed=2), {})
        verify(directory, files, **shares)

    monkeypatch.setattr(records, "verify", slow)
    wanted = {"parameters": abstract(make_state(one_device), one_device)["parameters"]}
    found = restore_part(written.directory, wanted)
    assert found.step == 2 and found.skipped == () and caplog.text == ""
    assert_same(found.state["parameters"], make_state(one_device, seed=2)["parameters"])


def test_without_writes_no_directory_is_made(tmp_path, make_state, abstract, one_device):
    looked_at = Checkpoints(tmp_path / "checkpoints", CheckpointConfig(), writes=False)
    assert looked_at.restore(abstract(make_state(one_device), one_device)) is None
    looked_at.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("below", ["", "deeper"])
def test_an_unwritable_directory_is_one_line(tmp_path, below):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="cannot be written to .*choose another --run.directory") as caught:
        Checkpoints(tmp_path / "file" / below, CheckpointConfig())
    assert "\n" not in str(caught.value)


def test_a_directory_that_reads_as_a_pattern_is_refused(tmp_path):
    with pytest.raises(UserError, match="rename it"):
        Checkpoints(tmp_path / "run[1]", CheckpointConfig())
    assert not (tmp_path / "run[1]").exists()


def test_a_failing_save_is_one_line(checkpoints, make_state, one_device, monkeypatch):
    def full(self, directory):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(RecordingHandler, "finalize", full)
    written = checkpoints()
    written.save(1, make_state(one_device), {})
    with pytest.raises(UserError, match="step 1 could not be written to .*No space left on device") as caught:
        written.wait()
    assert "\n" not in str(caught.value) and written.steps() == []


def test_another_model_is_refused(checkpoints, make_state, abstract, one_device):
    written, state = checkpoints(), make_state(one_device)
    written.save(1, state, {})
    parameters = state["parameters"]
    others = {
        "parameters.embed has shape \\[64, 32\\] there and \\[128, 32\\] here": {"embed": jnp.zeros((128, 32))},
        "parameters.embed is float32 there and bfloat16 here": {"embed": jnp.zeros((64, 32), jnp.bfloat16)},
        "it has no parameters.head, of float32\\[2\\] here": {"head": jnp.zeros(2)},
        "it has parameters.layers.0.bias, of float32\\[3\\], which is not in": {
            "layers": [parameters["layers"][0] | {}]
        },
    }
    others[list(others)[-1]]["layers"][0].pop("bias")
    for message, change in others.items():
        wanted = abstract(state | {"parameters": parameters | change}, one_device)
        with pytest.raises(UserError, match=f"step_00000001 is of another model: {message}.*another --run") as caught:
            written.restore(wanted)
        assert "\n" not in str(caught.value)
    # refused, not damaged
    assert written.restore(abstract(state, one_device)) is not None
