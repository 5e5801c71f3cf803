"""Sizes that no machine has are refused before anything is made, by name and in one line."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxtron.data.batch import SEQUENCE, TokenBatch, row_bytes
from jaxtron.plan.__main__ import main as plan
from jaxtron.run import sizes
from jaxtron.run.configuration import Configuration
from jaxtron.run.sizes import bytes_on_a_device, check_batch_fits, device_memory, machine_memory
from tests.support.command_runs import run_here, small
from tests.support.commands import run_main


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--model.vocab_size 2147483647", "and model.vocab_size 2,147,483,647 would take"),
        ("--model.hidden_size 400000", "training state of model.num_layers 1, model.hidden_size 400,000, model.mlp"),
        ("--model.mlp_size 1000000000", "model.mlp_size 1,000,000,000 and"),
        ("--model.num_layers 4000000000", "model.num_layers: must be less than or equal to 65536, got 4000000000"),
        ("--model.hidden_size 2000000000 --model.num_layers 100", "model.hidden_size 2,000,000,000, model.mlp_size"),
        ("--train.global_batch 2000000000", "train.global_batch 2,000,000,000 x data.sequence_length 32 would take"),
        (
            "--train.global_batch 2000000000 --data.sequence_length 4096",
            "is 8.2e+12 tokens a step, more than the 1e+12",
        ),
    ],
)
def test_one_line_before_anything_is_made(flags, message, tmp_path):
    ended = run_here(*small(tmp_path), *flags.split())
    assert ended.code == 2 and ended.err.count("\n") == 1 and message in ended.err, ended
    assert not (tmp_path / "run").exists()


def test_plans_of_what_cannot_be_counted():
    for kind in ("--layout", "--schedule", "--gpu h100", "--search --gpu h100"):
        ended = run_main(plan, [*kind.split(), "--model.hidden_size", "2000000040", "--model.num_layers", "99"])
        assert ended.code == 2 and "model.hidden_size 2,000,000,040" in ended.err and ended.out == "", ended
        assert "parameters, more than the 1e+15 that can be counted: lower them" in ended.err


def test_bytes_are_those_of_one_device():
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Explicit,) * 2)
    split = jax.ShapeDtypeStruct((8, 6), jnp.bfloat16, sharding=NamedSharding(mesh, P("a", "b")))
    whole = jax.ShapeDtypeStruct((8, 6), jnp.float32, sharding=NamedSharding(mesh, P()))
    assert [bytes_on_a_device(leaf) for leaf in (split, whole)] == [2 * 3 * 2, 8 * 6 * 4]
    # far beyond what 64 bits count
    assert bytes_on_a_device(jax.ShapeDtypeStruct((2**40, 2**40), jnp.float32)) == 2**82


def test_simulated_devices_share_the_memory_of_the_machine(monkeypatch, tmp_path):
    assert device_memory() == machine_memory() // jax.local_device_count()
    monkeypatch.setattr(sizes, "CGROUP_LIMIT", tmp_path / "memory.max")
    whole = machine_memory()
    for text, expected in (("max\n", whole), ("1048576\n", 2**20), (f"{2**62}\n", whole)):
        (tmp_path / "memory.max").write_text(text)
        assert machine_memory() == expected


def test_what_fits_just_so_is_taken(monkeypatch):
    rows, config = jax.device_count() * 10, Configuration.model_validate({"data": {"sequence_length": 7}})
    monkeypatch.setattr(sizes, "device_memory", lambda: 10 * row_bytes(TokenBatch, {SEQUENCE: 7}))
    check_batch_fits("train.global_batch", rows, config)
    with pytest.raises(sizes.UserError, match="train.global_batch 88 x data.sequence_length 7"):
        check_batch_fits("train.global_batch", rows + jax.device_count(), config)
