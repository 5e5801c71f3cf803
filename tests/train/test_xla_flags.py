"""Flags of a preset, the user and the environment, and what becomes of them in a run and in a rehearsal."""

import os
import re
import subprocess
from pathlib import Path

import jax
import pytest

from jaxtron.config import UserError
from jaxtron.plan.__main__ import main as plan
from jaxtron.plan.compiled.deviceless import gpu_devices
from jaxtron.runtime.config import RuntimeConfig
from jaxtron.runtime.determinism import set_reductions
from jaxtron.runtime.xla_flags import (
    FSDP_FLAGS,
    JAXLIB,
    TENSOR_FLAGS,
    XLA_PRESETS,
    gpu_flags,
    gpu_options,
    preset_flags,
    refused_option,
    set_xla_flags,
)
from tests.support.commands import run_main

WRONG = "all-gather-to-collective-permute-simplifier"
PIPELINED = ("all_gather", "reduce_scatter", "all_reduce")


SPLITS = pytest.mark.parametrize("split", [{"pipe", "tensor"}, {"fsdp"}], ids=lambda split: "-".join(sorted(split)))


@SPLITS
@pytest.mark.parametrize("preset", [preset for preset in XLA_PRESETS if preset != "none"])
def test_this_jaxlib_starts_with_every_preset(preset, split, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_enable_latency_hiding_scheduler=false")
    set_xla_flags(RuntimeConfig(xla_preset=preset), gpu=True, split=split, cache_directory=tmp_path)
    flags = os.environ["XLA_FLAGS"].split()
    inherited = "--xla_gpu_enable_latency_hiding_scheduler=false"
    # what the user set in the environment wins over the preset
    assert flags == [*(f for f in preset_flags(preset, split=split) if "latency_hiding" not in f), inherited]


def test_presets_by_version():
    assert preset_flags("none", "0.11.2") == ()
    # without it JAX 0.10 computes wrong on GPUs, so even `none` has it
    assert preset_flags("none", "0.10.2") == ("--xla_disable_hlo_passes=all-gather-to-collective-permute-simplifier",)
    for preset in XLA_PRESETS:
        assert preset_flags(preset, "0.10.2")[:1] == preset_flags("none", "0.10.2")
        assert preset_flags(preset, "0.12.0.1") == preset_flags(preset, "0.11.2")


def test_the_compiler_schedules_for_the_memory_of_the_pool(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)
    assert "--xla_gpu_memory_limit_slop_factor=115" in preset_flags("auto")
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.8")
    assert "--xla_gpu_memory_limit_slop_factor=100" in preset_flags("auto")
    assert not any("slop_factor" in flag for flag in preset_flags("none", split={"pipe"}))
    assert "--xla_gpu_memory_limit_slop_factor=130" in preset_flags("auto", split={"pipe", "data"})


def test_halves_of_a_microbatch_stay_apart_where_layers_are_split(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)
    assert set(preset_flags("auto", split={"tensor"})) - set(preset_flags("auto")) == set(TENSOR_FLAGS)
    assert not set(TENSOR_FLAGS) & set(preset_flags("none", split={"tensor"}))
    given = RuntimeConfig(xla_flags="--xla_gpu_dot_merger_threshold_mb=7")
    assert gpu_options(given, "", split={"tensor"})["xla_gpu_dot_merger_threshold_mb"] == 7


def test_gradients_of_weights_that_fsdp_splits_travel_by_themselves():
    plain = set(preset_flags("auto"))
    for split in ({"fsdp"}, {"data", "fsdp"}):
        assert set(preset_flags("auto", split=split)) - plain == set(FSDP_FLAGS)
    assert set(FSDP_FLAGS) < set(preset_flags("auto", split={"pipe", "fsdp"}))
    assert set(preset_flags("auto", split={"fsdp", "tensor"})) - plain == set(TENSOR_FLAGS)
    assert set(preset_flags("auto", split={"fsdp", "context"})) == plain
    assert not set(FSDP_FLAGS) & set(preset_flags("none", split={"fsdp"}))


def test_flags_are_tried_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XLA_FLAGS", "")
    config = RuntimeConfig(xla_flags="--xla_no_such_flag=1")
    expected = f"runtime.xla_flags: jaxlib {JAXLIB} does not start with them: .*--xla_no_such_flag"
    with pytest.raises(UserError, match=expected):
        set_xla_flags(config, gpu=False, cache_directory=tmp_path)
    monkeypatch.setattr(subprocess, "run", None)
    with pytest.raises(UserError, match=expected):
        set_xla_flags(config, gpu=False, cache_directory=tmp_path)
    assert os.environ["XLA_FLAGS"] == ""


def test_flags_that_cannot_take_effect(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XLA_FLAGS", "")
    with pytest.raises(UserError, match="xla_preset latency is for GPUs"):
        set_xla_flags(RuntimeConfig(xla_preset="latency"), gpu=False)
    set_xla_flags(RuntimeConfig(xla_preset="auto"), gpu=False)
    assert os.environ["XLA_FLAGS"] == ""
    monkeypatch.setenv("XLA_FLAGS", "flags.txt")
    with pytest.raises(UserError, match="XLA_FLAGS=flags.txt in the environment is a file"):
        set_xla_flags(RuntimeConfig(), gpu=True)


def test_a_rehearsal_leaves_out_the_passes_that_a_run_leaves_out():
    for version, expected in (("0.10.2", WRONG), ("0.11.2", None), ("0.12.0.1", None)):
        assert gpu_options(RuntimeConfig(), "", version).get("xla_disable_hlo_passes") == expected
        assert (WRONG in " ".join(gpu_flags(RuntimeConfig(), "", version))) == (expected is not None)


@pytest.mark.parametrize(("inherited", "chosen"), [("--xla_disable_hlo_passes=a", ""), ("", "a,b"), ("x", "a,b")])
def test_passes_that_a_user_leaves_out_do_not_bring_back_a_wrong_one(inherited: str, chosen: str):
    config = RuntimeConfig(xla_flags=f"--xla_disable_hlo_passes={chosen}" if chosen else "")
    before, after = gpu_flags(config, inherited, "0.10.2")
    assert "xla_disable_hlo_passes" not in before
    # the last one counts
    assert after.split()[-1] == f"--xla_disable_hlo_passes={chosen or 'a'},{WRONG}"
    assert gpu_options(config, inherited, "0.10.2")["xla_disable_hlo_passes"] == f"{chosen or 'a'},{WRONG}"
    assert WRONG not in " ".join(gpu_flags(config, inherited, "0.11.2"))


def test_pipelined_collectives_by_version():
    old, new = (gpu_options(RuntimeConfig(xla_preset="latency"), "", version) for version in ("0.10.2", "0.11.2"))
    for kind in PIPELINED:
        assert old[f"xla_gpu_enable_pipelined_{kind}"] is True
        assert new[f"xla_gpu_pipeline_{kind}"] == "COLLECTIVE_PIPELINING_MODE_ON"
        assert f"--xla_gpu_pipeline_{kind}=on" in preset_flags("latency", "0.11.2")
    # XLA_FLAGS still takes the old name, which is no option of a compilation
    given = RuntimeConfig(xla_preset="none", xla_flags="--xla_gpu_enable_pipelined_all_gather=false")
    assert gpu_options(given, "", "0.11.2") == {"xla_gpu_pipeline_all_gather": "COLLECTIVE_PIPELINING_MODE_DEFAULT"}


def test_the_environment_wins_over_a_preset_in_a_rehearsal_too():
    options = gpu_options(RuntimeConfig(), "--xla_gpu_enable_latency_hiding_scheduler=false", "0.11.2")
    assert "xla_gpu_enable_latency_hiding_scheduler" not in options


def compile_for_h100(options: dict[str, bool | int | str]) -> None:
    device = jax.sharding.SingleDeviceSharding(gpu_devices("h100", 1, 1)[0])
    jax.jit(abs).lower(jax.ShapeDtypeStruct((4,), "float32", sharding=device)).compile(compiler_options=options)


@pytest.mark.parametrize("preset", XLA_PRESETS)
@SPLITS
def test_the_compiler_takes_every_preset_as_options(preset, split):
    compile_for_h100(gpu_options(RuntimeConfig(xla_preset=preset), "", split=split))


@pytest.mark.parametrize(
    ("flag", "name"),
    [("--xla_gpu_no_such_flag=1", "xla_gpu_no_such_flag"), ("--xla_gpu_autotune_level=much", "xla_gpu_autotune_level")],
)
def test_a_flag_that_the_compiler_refuses_is_one_line(flag: str, name: str):
    with pytest.raises(jax.errors.JaxRuntimeError) as raised:
        compile_for_h100(gpu_options(RuntimeConfig(xla_flags=flag), ""))
    refused = refused_option(raised.value)
    assert refused is not None
    assert re.fullmatch(rf"the compiler of JAX \S+ does not take the flag --{name}.*runtime.xla_flags.*", str(refused))
    assert refused_option(jax.errors.JaxRuntimeError("out of memory")) is None


TINY = (
    "--model.num_layers 1 --model.hidden_size 32 --model.num_heads 2 --data.sequence_length 32 --train.global_batch 8"
)


@pytest.mark.slow
def test_plan_with_a_preset_and_with_an_unknown_flag():
    ended = run_main(plan, [*TINY.split(), "--gpu", "h100", "--runtime.xla_preset", "latency"])
    assert ended.code == 0 and "memory of a GPU" in ended.out, ended
    ended = run_main(plan, [*TINY.split(), "--gpu", "h100", "--runtime.xla_flags=--xla_gpu_no_such_flag=1"])
    assert ended.code == 2 and ended.err.startswith("error: the compiler of JAX"), ended


def test_a_deterministic_run_has_the_flag_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    flag = "--xla_gpu_deterministic_ops"
    before, after = gpu_flags(RuntimeConfig(deterministic=True))
    assert before.split().count(f"{flag}=true") == 1 and flag not in after
    assert flag not in gpu_flags(RuntimeConfig())[0]
    # said already
    assert flag not in gpu_flags(RuntimeConfig(deterministic=True), f"{flag}=true")[0]
    assert gpu_options(RuntimeConfig(deterministic=True), "")["xla_gpu_deterministic_ops"] is True
    with pytest.raises(UserError, match=f"{flag}=false is given: leave one of them out"):
        gpu_flags(RuntimeConfig(deterministic=True, xla_flags=f"{flag}=false"))
    # this jaxlib knows it
    monkeypatch.setenv("XLA_FLAGS", "")
    set_xla_flags(RuntimeConfig(deterministic=True, xla_preset="none"), gpu=True, cache_directory=tmp_path)
    assert f"{flag}=true" in os.environ["XLA_FLAGS"].split()


def test_a_deterministic_run_reduces_outside_of_the_switch(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("NCCL_NVLS_ENABLE", raising=False)
    set_reductions(RuntimeConfig())
    assert "NCCL_NVLS_ENABLE" not in os.environ
    monkeypatch.setenv("NCCL_NVLS_ENABLE", "1")
    set_reductions(RuntimeConfig(deterministic=True))
    assert os.environ["NCCL_NVLS_ENABLE"] == "1"
    monkeypatch.delenv("NCCL_NVLS_ENABLE")
    set_reductions(RuntimeConfig(deterministic=True))
    assert os.environ["NCCL_NVLS_ENABLE"] == "0"
