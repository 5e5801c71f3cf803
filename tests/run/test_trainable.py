"""Patterns of train.trainable: what they leave frozen, and what is refused."""

from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from jaxtron.config import UserError, load
from jaxtron.plan.layout import layout_text, parameter_rows
from jaxtron.run.configuration import Configuration
from jaxtron.run.session import make_session
from jaxtron.run.trainable import frozen_names

TABLE, KERNEL, BIAS = "embedding.table", "stack.periods.layers.1.mlp.up.kernel", "stack.periods.layers.1.mlp.up.bias"
NAMES = [TABLE, "final_norm.scale", "head.table", "stack.periods.layers.0.norm.scale", KERNEL, BIAS]
SMALL = (
    "--model.num_layers 2 --model.hidden_size 32 --model.num_heads 4 --model.vocab_size 60 --data.sequence_length 16"
)


@pytest.mark.parametrize(
    ("patterns", "trained"),
    [
        (["*"], NAMES),
        (["head.*"], ["head.table"]),
        (["!embedding.*"], NAMES[1:]),
        (["*norm*", "*.bias"], ["final_norm.scale", "stack.periods.layers.0.norm.scale", BIAS]),
        (["stack.*", "!*.kernel", "!*.bias"], ["stack.periods.layers.0.norm.scale"]),
        (["stack.periods.layers.[1-9].*"], [KERNEL, BIAS]),
    ],
    ids=str,
)
def test_what_matches_is_trained(patterns: list[str], trained: list[str]):
    assert frozen_names(patterns, NAMES) == [name for name in NAMES if name not in trained]


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (["heads.*"], "^train.trainable 'heads.*' matches no parameter; did you mean head.table"),
        (["head.*", "!finalnorm.*"], "'!finalnorm.*' matches no parameter; did you mean final_norm.scale"),
        (["*mlp.down*"], f"did you mean {KERNEL} or {BIAS}"),
        (["stack.periods.layers.17.*"], "layers of a stack are one array .* here 0 or 1; plan"),
        (["HEAD.*"], "plan --layout lists the names, which begin with embedding or final_norm or head or stack$"),
        (["x" * 5000], "matches no parameter"),
        (["!*"], "^train.trainable '!\\*' leaves nothing to train"),
        (["head.*", "!head.*"], "leaves nothing to train"),
        (["head.*", "!embedding.*"], "^train.trainable '!embedding.\\*' takes nothing from what 'head.\\*' trains"),
    ],
)
def test_a_pattern_without_effect_is_refused(patterns: list[str], message: str):
    with pytest.raises(UserError, match=message) as found:
        frozen_names(patterns, NAMES)
    assert len(str(found.value)) < 400


def test_what_is_no_parameter_is_told():
    with pytest.raises(UserError, match="'router.bias' matches no parameter; it names a buffer"):
        frozen_names(["router.bias"], NAMES, ["router.bias"])


def test_a_star_that_the_shell_took_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "notes.txt").touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="'notes.txt' matches no parameter; it is a file here: quote patterns"):
        frozen_names(["notes.txt"], NAMES)


def test_names_that_match_most_come_first():
    with pytest.raises(UserError, match=f"did you mean {BIAS}"):
        frozen_names(["down.bias"], NAMES)


@pytest.mark.parametrize("patterns", [["[]"], ["!"], ["[head.table, '!']"]], ids=str)
def test_no_pattern_is_refused_before_jax(patterns: list[str]):
    with pytest.raises(UserError, match=r"^train.trainable \[.*\] has no pattern, or an empty one"):
        load(Configuration, None, ["--train.trainable", *patterns])


def session(*flags: str):
    config = load(Configuration, None, [*SMALL.split(), *flags])
    return make_session(config, jax.devices()[: config.mesh.data * config.mesh.fsdp * config.mesh.pipe])


@pytest.mark.parametrize("zero", ["none", "optimizer", "parameters"])
def test_frozen_parameters_lie_as_they_are_used(zero: str):
    """In the step's type, and without the parts of an optimizer state that they have not."""
    flags = ["--mesh.data", "2", "--mesh.fsdp", "2", "--sharding.zero", zero]
    whole = session(*flags)
    some = session(*flags, "--train.trainable", "*norm*", "*.bias")
    with whole.use():
        before = {row.name: row for row in parameter_rows(whole.blueprint)}
    with some.use():
        after = {row.name: row for row in parameter_rows(some.blueprint)}
        text = layout_text(some.blueprint)
    assert before.keys() == after.keys()
    for name, row in after.items():
        if row.status == "trained":
            assert row == before[name] and (name.endswith(".bias") or "norm" in name)
            continue
        # fsdp splits weights at use, data does so only where zero says parameters
        assert {flag for flags in row.split for flag in flags} & {"data", "fsdp"} == (
            {"data", "fsdp"} if zero == "parameters" else {"fsdp"}
        )
        copies = 2 if zero == "optimizer" else 1
        assert row.bytes == before[name].bytes * copies // 2 and row.replicas == before[name].replicas * copies
    state = some.abstract_state()
    assert {leaf.dtype for leaf in jax.tree.leaves(state.frozen)} == {jnp.dtype(jnp.bfloat16)}
    counters = 1
    assert len(jax.tree.leaves(state.optimizer)) == 2 * len(jax.tree.leaves(state.params)) + counters
    trained = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    assert f"parameters, {trained:,} of them trained; " in text and " frozen kernel " in text


def test_names_are_those_of_every_mesh():
    frozen = ["--train.trainable", "stack.periods.layers.0.*"]
    meshes = (["--mesh.data", "1", "--mesh.pipe", "2", "--train.microbatches", "2"], ["--mesh.data", "2"])
    found = []
    for flags in meshes:
        one = session(*flags, *frozen)
        with one.use():
            found.append({name: spec.status for name, spec in one.blueprint.names.items()})
    assert found[0] == found[1] and set(found[0].values()) == {"trained", "frozen"}
