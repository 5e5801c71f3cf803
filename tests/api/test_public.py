"""The package's public names: found when they are asked for, with nothing done before that."""

import json
import subprocess
import sys

import pytest

import jaxtron
from jaxtron import Configuration, UserError, load

# what importing does to a process: modules, output, descriptors, environment, signals
IMPORTED = """
import json, os, signal, sys, time
before = dict(os.environ), signal.getsignal(signal.SIGINT), sys.stderr, sorted(os.listdir("/proc/self/fd"))
start = time.process_time()
import jaxtron as jx
seconds = time.process_time() - start
assert before == (dict(os.environ), signal.getsignal(signal.SIGINT), sys.stderr, sorted(os.listdir("/proc/self/fd")))
own = sorted(name for name in sys.modules if name.startswith("jaxtron"))
names = dir(jx)
config = jx.load(mesh={"tensor": 2})
late = [name for name in ("jax", "flax", "numpy") if name in sys.modules]
print(json.dumps([own, names, config.mesh.tensor, seconds, late]))
"""


def test_importing_does_nothing():
    ended = subprocess.run([sys.executable, "-c", IMPORTED], capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr == ""
    own, names, tensor, seconds, late = json.loads(ended.stdout)
    assert own == ["jaxtron"] and set(jaxtron.__all__) <= set(names)
    assert tensor == 2 and seconds < 1
    # reading settings needs no JAX either
    assert "jax" not in late and "flax" not in late


def test_every_public_name_is_there_and_says_what_it_is():
    for name in jaxtron.__all__:
        assert len(getattr(jaxtron, name).__doc__) > 40, name
    for name, member in vars(jaxtron.Session).items():
        if not name.startswith("_"):
            assert member.__doc__, name
    with pytest.raises(AttributeError, match="no attribute 'Sesion'; did you mean Session"):
        jaxtron.Sesion  # noqa: B018  (asking is the test)
    # the stub for editors names the same
    stub = (jaxtron.__file__ or "") + "i"
    with open(stub) as file:
        assert {line.split(" as ")[1].strip() for line in file if " as " in line} == set(jaxtron.__all__)


def test_settings_over_a_file_a_mapping_and_a_configuration(tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text("seed: 3\nmodel: {num_layers: 2, hidden_size: 64}\nmesh: {tensor: 2}\n")
    config = load(path, model={"num_heads": 4}, **{"mesh.data": 2, "train": {"steps": 5}})
    assert (config.seed, config.model.num_layers, config.model.num_heads) == (3, 2, 4)
    assert (config.mesh.data, config.mesh.tensor, config.train.steps) == (2, 2, 5)
    again = load(config, model={"hidden_size": 128}, mesh=load(mesh={"fsdp": 2}).mesh)
    # of a section's own values those that it was given
    assert (again.model.hidden_size, again.model.num_layers, again.mesh.fsdp, again.mesh.tensor) == (128, 2, 2, 2)
    assert load({"seed": 4, "mesh": {"pipe": 1}}, seed=5).seed == 5
    assert load() == Configuration()
    # what is given stays as it was
    given = {"model": {"num_layers": 2}}
    assert load(given, model={"num_layers": 3}).model.num_layers == 3 and given == {"model": {"num_layers": 2}}
    assert load(config, seed=8).seed == 8 and config.seed == 3
    # a notebook shows what was set, not all that there is
    assert "num_heads: 4" in config._repr_html_() and "dropout" not in config._repr_html_()
    assert load(data={"path": tmp_path / "text.txt"}).data.path == str(tmp_path / "text.txt")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("seed: 9\n")
    assert load(tmp_path / "run").seed == 9


def test_numbers_of_numpy_are_numbers():
    np = pytest.importorskip("numpy")
    sizes = {"hidden_size": np.int64(64), "num_heads": np.int32(4)}
    assert load(model=sizes, optimizer={"learning_rate": np.float32(0.5)}).model.hidden_size == 64


def test_what_an_override_makes_useless_is_left_out_with_a_warning(tmp_path):
    path = tmp_path / "long.yaml"
    path.write_text("mesh: {context: 2}\ncontext: {method: all_gather}\n")
    with pytest.warns(UserWarning, match="left out: context.method all_gather .* has no effect with mesh.context 1"):
        assert load(path, mesh={"context": 1}).context.method == "ring"


BAD = [
    (("no/such.yaml",), {}, "configuration file no/such.yaml does not exist"),
    (("configs/gpt_tny.yaml",), {}, "did you mean configs/gpt_tiny.yaml"),
    ((), {"meshh": {"tensor": 2}}, "unknown setting meshh"),
    ((), {"mesh": {"tensr": 2}}, r"unknown setting mesh.tensr \(mesh=\); did you mean mesh.tensor"),
    ((), {"mesh": 2}, "mesh"),
    ((), {"mesh": {"tensor": "two"}}, r"mesh.tensor: expected int, got 'two' \(mesh=\)"),
    ((), {"mesh": {"tensor": 0}}, "mesh.tensor must be a positive number or -1, not 0"),
    ((), {"mesh": {"tensor": True}}, "mesh.tensor: expected int, got true"),
    ((), {"seed": 1.5}, "seed: expected"),
    ((), {"optimizer": {"learning_rate": float("nan")}}, "optimizer.learning_rate"),
    ((), {"model": {"family": "nobody"}}, "no model.family 'nobody'"),
    ((), {"context": {"method": "all_gather"}}, "context.method all_gather has no effect with mesh.context 1"),
    (({"seed": {}},), {}, "seed"),
    ((), {"checkpoint": {"initialize_from": "/no/such"}, "model": {"num_heads": 5}}, "num_heads"),
]


@pytest.mark.parametrize("place", range(len(BAD)))
def test_bad_settings_are_one_line(place: int):
    arguments, overrides, message = BAD[place]
    with pytest.raises(UserError, match=message) as error:
        load(*arguments, **overrides)
    assert "\n" not in str(error.value)
