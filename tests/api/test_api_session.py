"""A session as a reader uses it: layouts, steps, losses and text, with nothing entered and nothing imported besides."""

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

import jaxtron as jx

ROOT = Path(__file__).parents[2]
MODEL = {"num_layers": 1, "hidden_size": 32, "num_heads": 4, "num_kv_heads": 2, "activation": "swiglu"}
SETTINGS = {
    "model": MODEL,
    "data": {"sequence_length": 32},
    "train": {"global_batch": 8, "microbatches": 2, "precision": "fp32", "steps": 100},
    "optimizer": {"learning_rate": 0.02, "warmup_steps": 0},
}
TEXT = "the cat sat on the mat and ran off. "


def configuration(**mesh: int) -> jx.Configuration:
    return jx.load(SETTINGS, mesh=mesh)


@pytest.fixture(scope="module")
def session() -> jx.Session:
    """On eight devices."""
    return jx.Session(configuration(data=2, fsdp=2, tensor=2))


def test_the_example_of_the_documentation(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    found = re.search(r"```python\n(import jaxtron as jx\n.*?)```", (ROOT / "docs" / "api.md").read_text(), re.S)
    assert found is not None
    lines = [line for line in found[1].splitlines() if line.strip()]
    assert len(lines) <= 12 and sum("import" in line for line in lines) == 1
    monkeypatch.chdir(ROOT)
    names: dict = {}
    # a cell a line that begins one: what is made in one lives in the next
    for cell in re.split(r"\n(?=\S)", found[1].strip()):
        exec(cell, names)
    said = capsys.readouterr().out
    losses = [float(number) for number in re.findall(r"^\d+\.\d+$", said, re.M)]
    assert len(losses) > 3 and losses[-1] < losses[0]
    assert "query" in said and "(-, fsdp+data, tensor, -)" in said


def test_layouts_are_tables(session: jx.Session):
    whole = session.layout()
    one = session.layout("query.kernel")
    assert [row.name for row in session.layout("query")] == [
        name for name in session.run.blueprint.names if ".query." in name
    ]
    row = next(iter(one))
    assert row.shape == (1, 32, 4, 8) and row.split == ((), ("fsdp", "data"), ("tensor",), ())
    assert row.part == (1, 8, 2, 8) and row.bytes == 4 * 8 * 2 * 8 and row.replicas == 1
    assert whole[row.name] == row and len(whole) > len(one) > 0
    assert whole.bytes == sum(leaf.nbytes for leaf in on_device(session)) // 8
    text, html = str(one), one._repr_html_()
    assert row.name in text and row.spec_text in text
    assert html.count("<tr>") == 2 and row.name in html and "<script" not in html
    assert session.layout("*/query/kernel") == session.layout(row.name) == one


def test_pictures_of_what_lies_where(session: jx.Session):
    title = session.draw("mlp/up/kernel").get_suptitle()
    assert "mlp.up.kernel: 1 x 32 x" in title and "8 blocks" in title and "each on 1 device" in title
    batch = session.batch(TEXT)
    assert "4 blocks of 2 x 32, each on 2 devices" in session.draw(batch.tokens).get_suptitle()
    # rows over data and fsdp, positions over tensor, width whole
    assert "8 blocks of 1 x 16 x 32, each on 1 device" in session.draw(("batch", "seq", "embed")).get_suptitle()


def on_device(session: jx.Session) -> list:
    """Parts of all parameters on all devices, copies counted."""
    with session.use():
        shapes = jax.tree.leaves(session.run.blueprint.abstract)
    return [np.empty((8, *shape.sharding.shard_shape(shape.shape)), shape.dtype) for shape in shapes]


@pytest.mark.slow
def test_a_training_by_hand_and_its_text(session: jx.Session, tmp_path: Path):
    state, batch = session.initial_state(), session.batch(TEXT)
    first = session.loss(state, batch)
    assert first == pytest.approx(np.log(257), abs=0.3)
    for _ in range(50):
        state, metrics = session.step(state, batch)
    assert int(state.step) == 50 and float(metrics["loss"]) < 0.05 * first
    assert session.loss(state, batch) < 0.05 * first
    again = session.generate(state, "the cat ", temperature=0.0, max_new_tokens=8)
    assert again == "sat on t"
    # two at once, the second with a stop; the same programs, the same seed
    texts = session.generate(state, ["the cat ", "ran "], temperature=0.0, max_new_tokens=8, stop=["."])
    assert texts == ["sat on t", "off"]
    # saved and opened on another mesh
    run = jx.open_run(session.save(state, tmp_path / "run"), mesh={"data": 1, "fsdp": 1, "tensor": 2})
    assert run.step == 50 and run.session.sizes["tensor"] == 2 and run.metrics == []
    assert run.session.loss(run.state, run.session.batch(TEXT)) == pytest.approx(session.loss(state, batch), rel=1e-4)
    consumed, (state, _) = state, session.step(state, batch)
    for use in (lambda: session.step(consumed, batch), lambda: session.loss(consumed, batch)):
        with pytest.raises(jx.UserError, match="this state was consumed by an earlier step"):
            use()
    with pytest.raises(jx.UserError, match="the state is of another session"):
        session.step(run.state, batch)
    with pytest.raises(jx.UserError, match="the batch lies elsewhere"):
        run.session.loss(run.state, batch)


def test_rows_of_numbers_in_all_forms(session: jx.Session):
    rows = np.arange(8 * 33).reshape(8, 33) % 257
    whole = session.batch(rows)
    for form in (rows.tolist(), jax.numpy.asarray(rows), rows.astype(np.uint16)):
        assert np.array_equal(session.batch(form).tokens, whole.tokens)
    assert np.array_equal(whole.targets, rows[:, 1:]) and float(whole.weights.sum()) == 8 * 32
    shorter = session.batch(rows[:, :-1])
    assert np.array_equal(shorter.tokens, whole.tokens)
    # what follows the last token is not known
    assert np.array_equal(shorter.targets[:, :-1], whole.targets[:, :-1]) and not shorter.weights[:, -1].any()
    own = session.batch(rows[:, :-1], rows[:, :-1], np.zeros((8, 32)))
    assert np.array_equal(own.targets, own.tokens) and not own.weights.any()
    assert whole.tokens.sharding.shard_shape(whole.tokens.shape) == (2, 32)


ROWS = np.zeros((8, 33), int)
BAD: list[tuple[Callable[[jx.Session], object], str]] = [
    (lambda s: s.batch(ROWS[0]), r"tokens has shape \(33,\): give rows of 33 tokens"),
    (lambda s: s.batch(ROWS[:, :20]), r"tokens has shape \(8, 20\)"),
    (lambda s: s.batch(ROWS + 300), "tokens has 300, and the model's tokens are 0 to 256"),
    (lambda s: s.batch(ROWS - 1), "tokens has -1"),
    (lambda s: s.batch(ROWS.astype(float)), "tokens are whole numbers, ids of tokens, not float64"),
    (lambda s: s.batch([[1, 2], [1]]), "tokens has rows of different lengths"),
    (lambda s: s.batch(ROWS + 2**40), "tokens has numbers beyond 32 bits"),
    (lambda s: s.batch(None), "tokens are whole numbers"),
    (lambda s: s.batch(ROWS[:6]), "a batch of 6 rows does not fit: give a multiple of mesh.data x mesh.fsdp = 4"),
    (lambda s: s.batch(np.zeros((0, 33), int)), r"tokens has shape \(0, 33\)"),
    (lambda s: s.batch(ROWS, ROWS), "tokens has rows of 33, and with targets of their own they have 32"),
    (lambda s: s.batch(ROWS, weights=ROWS), r"weights has shape \(8, 33\), and tokens are rows of \(8, 32\)"),
    (lambda s: s.batch(ROWS, weights=ROWS[:, 1:] - np.inf), "weights are finite numbers"),
    (lambda s: s.batch(""), "the text is empty"),
    (lambda s: s.layout("qery"), "no parameter matches 'qery'; did you mean 'query'"),
    (lambda s: s.layout("mlp")["stack.query"], "no parameter 'stack.query' in this layout"),
    (lambda s: s.layout("nobody"), "no parameter matches 'nobody'; names have the parts embedding, positions, table"),
    (lambda s: s.draw("query"), "'query' matches 2 parameters, .*: draw one of them"),
    (lambda s: s.draw(("batch", "sequ")), "draw knows no activation's axis 'sequ'; did you mean 'seq'"),
    (lambda s: s.draw(jax.numpy.zeros(3)), "the array lies elsewhere than the session's mesh"),
    (lambda s: s.batches(-1), r"batches\(-1\): give a whole number of batches"),
    (
        lambda s: jx.Session(configuration(data=3, tensor=5)),
        "mesh.data 3 x mesh.tensor 5 needs 15 devices, there are 8",
    ),
    (lambda s: jx.Session(configuration(data=1, tensor=8)), "model.num_heads 4 is not a multiple of mesh.tensor 8"),
    (lambda s: jx.Session(configuration(), devices=[]), "devices is empty"),
    (lambda s: jx.simulate(0), r"simulate\(0\): give a whole number"),
    (lambda s: jx.simulate(4), "devices 4 comes too late: JAX already runs on 8 cpu devices; restart"),
    (lambda s: jx.open_run("runs/nobody"), "no directory runs/nobody; give the run.directory of a training"),
    (lambda s: jx.open_run(ROOT / "configs"), "has no config.yaml"),
    (lambda s: jx.export("runs/nobody", "x"), "runs/nobody has no config.yaml"),
]


@pytest.mark.parametrize("place", range(len(BAD)))
def test_bad_input_is_one_line(session: jx.Session, place: int):
    use, message = BAD[place]
    with pytest.raises(jx.UserError, match=message) as error:
        use(session)
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_edited_tables_move_arrays_and_change_no_number():
    house = jx.Session(configuration(data=1, tensor=2))
    edited = jx.Session(
        configuration(data=1, tensor=2),
        parameters=house.rules.parameters | {"mlp": ()},
        activations={"mlp": (), "heads": "tensor"},
    )
    assert edited.rules.parameters["mlp"] == () == edited.rules.activations["mlp"]
    up, before = (one.layout("mlp/up/kernel").parameters[0] for one in (edited, house))
    assert up.split[-1] == () and before.split[-1] == ("tensor",) and up.bytes == 2 * before.bytes
    losses = []
    for session in (house, edited):
        state, metrics = session.step(session.initial_state(), session.batch(TEXT))
        losses.append((float(metrics["loss"]), float(metrics["gradient_norm"])))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


EDITS = [
    ({"parameters": {"mpl": ("tensor",)}}, r"parameters\['mpl'\]: no parameter of the model has .* did you mean 'mlp'"),
    ({"parameters": {"mlp": ("tensr",)}}, r"names the flag 'tensr', and the mesh has no such: did you mean 'tensor'"),
    ({"parameters": {"mlp": "fsdp"}}, r"parameters\['mlp'\] cannot be split by 'fsdp' in a table, only by 'tensor'"),
    ({"parameters": {"vocab": ()}}, r"parameters\['vocab'\] is cut by the layers themselves"),
    ({"activations": {"seq": ()}}, r"activations\['seq'\] is cut by the layers themselves and stays as it is"),
    ({"activations": {"batch": ()}}, r"activations\['batch'\] is cut by the layers themselves"),
    ({"activations": {"sequence": ()}}, r"activations\['sequence'\]: no activation has this logical axis"),
]


@pytest.mark.parametrize("place", range(len(EDITS)))
def test_edits_that_cannot_be_are_one_line(place: int):
    tables, message = EDITS[place]
    with pytest.raises(jx.UserError, match=message):
        jx.Session(configuration(data=1, tensor=2), **tables)


def test_tables_of_other_layers_stay():
    model = {"pattern": "M-", "num_kv_heads": None, "mamba": {"num_groups": 1}}
    with pytest.raises(jx.UserError, match="can be edited for decoders of attention and MLPs"):
        jx.Session(jx.load(SETTINGS, model=model, mesh={"data": 1, "tensor": 2}), activations={"mlp": ()})


def test_outside_of_a_mesh_is_one_clear_error(session: jx.Session):
    with pytest.raises(jx.UserError, match="no mesh here: a model is built and called inside `with session.use"):
        session.run.blueprint.build(nnx.Rngs(0))
    with session.use() as rules:
        assert rules is session.rules


# in a process of its own, whose annotations nobody checks: as a reader's
TYPES = """
import jaxtron as jx
jx.simulate(2)
config = jx.load(model={"num_layers": 1, "hidden_size": 16, "num_heads": 2}, train={"global_batch": 2})
session = jx.Session(config)
for use in (
    lambda: jx.load(7),
    lambda: jx.load(config.mesh),
    lambda: jx.simulate("8"),
    lambda: jx.simulate(3),
    lambda: jx.Session(config, parameters=["mlp"]),
    lambda: jx.Session(config, parameters={"mlp": 3}),
    lambda: session.layout(3),
    lambda: session.step({}, None),
    lambda: session.loss(None, None),
    lambda: session.generate("text", "text"),
    lambda: session.batches("3"),
    lambda: jx.rehearse(config, gpu=3),
    lambda: jx.rehearse(config, nodes=0),
    lambda: jx.rehearse(config, gpu="h100", nodes=1, gpus=8),
    lambda: jx.search(config, top=-1),
    lambda: jx.open_run("here", step="last"),
):
    try:
        use()
        print("nothing")
    except jx.UserError as error:
        print(str(error))
"""
SAID = [
    "load takes a YAML file's name, a run's directory, a mapping or a Configuration, not int",
    "load takes a whole Configuration, not its MeshConfig: give it as an override",
    "simulate('8'): give a whole number of devices above 0, such as simulate(8)",
    "devices 3 comes too late: JAX already runs on 2 cpu devices; restart Python and ask for them first",
    "parameters takes a mapping of logical axes to flags, such as {'mlp': ()}, not ['mlp']",
    "parameters['mlp'] takes flags of the mesh, such as ('tensor',) or (), not 3",
    "layout(3): give a pattern of names, such as '*query*', or nothing for all",
    "a state is what session.initial_state(), session.step(state, batch)[0] or jaxtron.open_run give, not dict",
    "a state is what session.initial_state(), session.step(state, batch)[0] or jaxtron.open_run give, not NoneType",
    "a state is what session.initial_state(), session.step(state, batch)[0] or jaxtron.open_run give, not str",
    "batches('3'): give a whole number of batches, or nothing for endless ones",
    "gpu 3: give one of a100, h100, h200, b200, gb200, or a file of XLA's target description",
    "nodes 0: give a whole number above 0",
    "--nodes 1 and --gpus 8: give one of them",
    "top -1: give how many layouts are compiled, 0 for none",
    "no directory here; give the run.directory of a training, such as runs/gpt_tiny",
]


def test_wrong_types_are_one_line():
    ended = subprocess.run([sys.executable, "-c", TYPES], capture_output=True, text=True, timeout=500)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines() == SAID
