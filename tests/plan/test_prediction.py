"""What the model of time predicts: the papers' FLOPs, Jaxtron's communication, pipelines, and calibration."""

import json
import time
from dataclasses import fields, replace
from pathlib import Path

import pytest

from jaxtron.config import UserError
from jaxtron.gpus import GPUS, gpu_named
from jaxtron.models.decoder.cost import embedding_parameters, period_parameters
from jaxtron.models.decoder.work import decoder_work
from jaxtron.models.work.profile import JAXTRON, MEGATRON_2021, MEGATRON_2022, PROFILES, Overlap
from jaxtron.plan.formula.calibrate import calibrate
from jaxtron.plan.formula.prediction import Prediction, predict
from jaxtron.plan.formula.workload import shapes_of
from jaxtron.plan.machine import Machine, machine_named
from jaxtron.run.configuration import Configuration

A100 = machine_named("a100")
KIND = gpu_named("a100").device_kind
ONE = dict.fromkeys(("pipe", "data", "fsdp", "context", "tensor"), 1)
NOTHING_HIDDEN = replace(JAXTRON, overlap=Overlap())


def configuration(*, model: dict | None = None, train: dict | None = None, **sections) -> Configuration:
    base = {"num_layers": 16, "hidden_size": 2048, "num_heads": 16, "vocab_size": 51200, "vocab_multiple": 1024}
    batch = {"global_batch": 32, "microbatches": 4}
    data = {"sequence_length": 1024}
    # sizes are what `predict` is given; a pipeline's settings need stages to be valid
    sections = ({"mesh": {"pipe": 2}} if "pipeline" in sections else {}) | sections
    return Configuration.model_validate(
        {"model": base | (model or {}), "train": batch | (train or {}), "data": data, **sections}
    )


def predicted(config: Configuration, machine: Machine = A100, profile=JAXTRON, **sizes: int) -> Prediction:
    return predict(config, ONE | sizes, machine, profile=profile)


def layer_collectives(config: Configuration, slot: str, profile=JAXTRON, **sizes: int) -> list[tuple[str, float]]:
    work = getattr(decoder_work(config.model, shapes_of(config, ONE | sizes, profile, KIND)).stacks[0].layer, slot)
    return sorted((one.kind, one.size * one.count) for one in work.collectives)


@pytest.mark.parametrize(
    "sizes, sections",
    [
        ({}, {}),
        ({"data": 4, "tensor": 2}, {}),
        ({"data": 2, "fsdp": 4, "tensor": 2}, {"sharding": {"zero": "parameters"}}),
        ({"pipe": 4, "tensor": 2}, {"pipeline": {"schedule": "1f1b"}}),
        ({"pipe": 2, "data": 2}, {"pipeline": {"schedule": "interleaved", "chunks": 4}}),
        ({"pipe": 4}, {"pipeline": {"schedule": "zero_bubble"}}),
        (
            {"pipe": 4, "tensor": 2},
            {"pipeline": {"schedule": "eager_1f1b", "overlap": True}, "mesh": {"pipe": 4, "tensor": 2}},
        ),
        ({"pipe": 4}, {"pipeline": {"schedule": "dualpipe_v", "chunks": 2}, "train": {"microbatches": 8}}),
    ],
)
@pytest.mark.parametrize("profile", PROFILES.values(), ids=PROFILES)
def test_the_parts_add_up(sizes, sections, profile):
    config = configuration(model={"dropout": 0.1, "attention_dropout": 0.1}, **sections)
    found = predicted(config, profile=profile, **sizes)
    parts = {field.name: getattr(found.breakdown, field.name) for field in fields(found.breakdown)}
    assert sum(parts.values()) == pytest.approx(found.step_seconds)
    assert min(parts.values()) >= 0 and parts["products"] > 0
    # without stages only rounding is left
    assert "pipe" in sizes or parts["bubble"] < 1e-9 * found.step_seconds
    assert found.tokens_per_second * found.step_seconds == pytest.approx(32 * 1024)
    assert found.seconds_for(32 * 1024 * 1000) == pytest.approx(1000 * found.step_seconds)


def test_flops_are_those_of_the_papers():
    layers, h, s, v, batch = 16, 2048, 1024, 51200, 32
    tokens = batch * s
    # 2205.05198 Eq. 7, and 2104.04473 Eq. 3
    model = 72 * tokens * layers * h**2 * (1 + s / (6 * h) + v / (12 * layers * h))
    full = 96 * tokens * layers * h**2 * (1 + s / (6 * h) + v / (16 * layers * h))
    # the attention core's forward once more: two products of s x s x h; of a kernel that keeps no scores nothing
    core = 4 * tokens * s * h * layers
    hardware_flops = {
        "none": (model, model),
        "selective": (model + core, model),
        "all_but_cores": (full, full - core),
        "full": (full, full),
    }
    for recompute, hardwares in hardware_flops.items():
        for profile, hardware in zip((JAXTRON, PROFILES["megatron_2024"]), hardwares, strict=True):
            for sizes in ({}, {"data": 2, "tensor": 4}, {"pipe": 4, "fsdp": 2}):
                num_gpus = 1 if not sizes else 8
                found = predicted(configuration(model={"recompute": recompute}), profile=profile, **sizes)
                assert found.model_flops * num_gpus == pytest.approx(model, rel=1e-12)
                assert found.hardware_flops * num_gpus == pytest.approx(hardware, rel=1e-12)
                assert found.mfu == pytest.approx(found.model_flops / found.step_seconds / 312e12)
                assert found.hfu >= found.mfu


def test_parameters_are_those_of_the_formula():
    layers, h, s, v = 16, 2048, 1024, 51200
    model = configuration().model
    # 2104.04473 Eq. 2, without the final norm's 2h there too
    formula = 12 * layers * h**2 * (1 + 13 / (12 * h) + (v + s) / (12 * layers * h))
    assert layers * period_parameters(model) + embedding_parameters(model, s) == pytest.approx(formula, rel=1e-12)
    # of eight tensor parts each has an eighth of all matrices, of what their columns make and of the vocabulary;
    # norms, biases of the stream and positions are whole
    whole = 2 * layers * (2 * h + h) + s * h
    parts = 8 * (layers * period_parameters(model, 8) + embedding_parameters(model, s, 8))
    assert parts == pytest.approx(formula + 7 * whole, rel=1e-12)


def test_a_layer_communicates_as_the_compiled_step_does():
    # tests/plan/test_step_census.py finds the same in the program: each moves b s h numbers
    config = configuration()
    size = 32 // 4 * 1024 * 2048 * 2.0
    two, four = [("all_gather", size)] * 2, [("all_gather", size)] * 2
    reduced = [("reduce_scatter", size)] * 2
    assert layer_collectives(config, "forward", tensor=4) == two + reduced
    backward = layer_collectives(config, "backward", tensor=4) + layer_collectives(config, "weight", tensor=4)
    assert sorted(backward) == two + four + reduced
    assert layer_collectives(config, "forward") == []
    # Megatron before sequence parallelism: an all-reduce a branch, both ways
    for slot in ("forward", "backward"):
        assert layer_collectives(config, slot, MEGATRON_2021, tensor=4) == [("all_reduce", size)] * 2
    # a parallel branch gathers once for both
    parallel = configuration(model={"pattern": "(*-)"})
    assert layer_collectives(parallel, "forward", tensor=4) == [("all_gather", size)] + reduced


def test_weights_are_gathered_at_use_by_fsdp_and_zero_3():
    config = configuration(sharding={"zero": "parameters"})
    parameters = period_parameters(config.model)
    for slot, kind in (("forward", "all_gather"), ("backward", "all_gather"), ("weight", "reduce_scatter")):
        assert layer_collectives(config, slot, fsdp=4, data=2) == [(kind, pytest.approx(2 * parameters))]
    exposed = predicted(config, profile=NOTHING_HIDDEN, fsdp=4, data=2)
    # the tables' are left: the embedding has no product to hide behind
    hidden = predicted(config, profile=JAXTRON, fsdp=4, data=2)
    assert 0 < hidden.breakdown.fsdp < 0.3 * exposed.breakdown.fsdp
    assert exposed.breakdown.data == 0


def test_zero_1_updates_a_part_and_moves_no_more():
    sharded, whole = (
        predicted(configuration(sharding={"zero": zero}), profile=NOTHING_HIDDEN, data=8).breakdown
        for zero in ("optimizer", "none")
    )
    assert sharded.optimizer == pytest.approx(whole.optimizer / 8, rel=0.01)
    # weights come back in 16 bits, where an all-reduce brings gradients back in 32
    assert sharded.data == pytest.approx(0.75 * whole.data, rel=0.01)


def test_a_bubble_is_as_long_as_the_paper_says():
    # every stage alike: no tables to speak of, and messages that take no time
    machine = A100.model_copy(update={"network_seconds": 0.0, "nvlink_seconds": 0.0, "kernel_seconds": 0.0})
    small = {"vocab_size": 8, "vocab_multiple": 8, "position": "none"}

    def bubble(microbatches: int, **pipeline) -> float:
        train = {"global_batch": 8 * microbatches, "microbatches": microbatches}
        config = configuration(model=small, train=train, pipeline=pipeline)
        found = predict(config, ONE | {"pipe": 4}, machine, gpus_per_node=8, profile=JAXTRON).breakdown
        return found.bubble / (found.products + found.memory + found.tensor)

    for count in (8, 32):
        # 2104.04473, sec. 2.2: (p - 1) / m, by v less with v chunks; messages and tables make it a little more
        assert bubble(count, schedule="1f1b") == pytest.approx(3 / count, rel=0.1)
        assert bubble(count, schedule="interleaved", chunks=2) == pytest.approx(3 / (2 * count), rel=0.25)
        assert bubble(count, schedule="zero_bubble") < 0.6 * bubble(count, schedule="1f1b")


def test_a_split_backward_does_the_same_work():
    whole, split = (
        predicted(configuration(pipeline={"schedule": name}), pipe=4, tensor=2).breakdown
        for name in ("1f1b", "zero_bubble")
    )
    assert split.products == pytest.approx(whole.products, rel=1e-9)
    assert split.tensor == pytest.approx(whole.tensor, rel=0.05)
    assert split.bubble < whole.bubble


def test_the_last_stage_has_the_head():
    # a table as large as many layers: one stage is slow and the others wait
    even, uneven = (
        predicted(configuration(model={"vocab_size": vocab}), pipe=4).breakdown for vocab in (1024, 512 * 1024)
    )
    assert uneven.bubble > 3 * even.bubble


def test_hiding_never_hides_more_than_there_is_to_hide_behind():
    config = configuration()
    exposed = predicted(config, profile=NOTHING_HIDDEN, tensor=8).breakdown.tensor
    half, all_of_it = (
        predicted(config, profile=replace(JAXTRON, overlap=Overlap(tensor=part, regather=part)), tensor=8).breakdown
        for part in (0.5, 1.0)
    )
    # the embedding's are left
    assert half.tensor == pytest.approx(exposed / 2, rel=0.03) and all_of_it.tensor < 0.03 * exposed
    # links a thousand times as slow: products last no longer
    slow = A100.model_copy(update={"nvlink_fraction": 1e-3})
    hidden = predicted(config, slow, profile=replace(JAXTRON, overlap=Overlap(tensor=1.0, regather=1.0)), tensor=8)
    shown = predicted(config, slow, profile=NOTHING_HIDDEN, tensor=8)
    assert shown.breakdown.tensor - hidden.breakdown.tensor == pytest.approx(shown.breakdown.products, rel=0.05)


def test_tensor_parallelism_across_nodes_is_dear():
    config = configuration()
    inside = predict(config, ONE | {"tensor": 8}, A100, gpus_per_node=8)
    across = predict(config, ONE | {"tensor": 8}, A100, gpus_per_node=4)
    assert across.breakdown.tensor > 1.5 * inside.breakdown.tensor
    assert across.breakdown.products == inside.breakdown.products


def test_shared_key_value_heads_are_computed_everywhere():
    grouped, few = (
        predicted(configuration(model={"num_kv_heads": heads}), tensor=8, profile=NOTHING_HIDDEN).hardware_flops
        for heads in (8, 1)
    )
    # one key/value head on each of 8 parts, whether it is an own one or a copy
    assert few == pytest.approx(grouped, rel=1e-12)


def test_one_layer_of_the_22b_takes_as_long_as_was_measured():
    """2205.05198, Table 4: milliseconds of a layer, forward and backward; nothing was fitted on it."""
    measured = {
        ("none", MEGATRON_2021): (7.7, 11.9),
        ("none", MEGATRON_2022): (7.2, 11.8),
        ("full", MEGATRON_2021): (7.7, 19.5),
        ("selective", MEGATRON_2022): (7.2, 13.1),
    }
    for (recompute, profile), published in measured.items():
        model = {"num_layers": 48, "hidden_size": 6144, "num_heads": 64, "recompute": recompute}
        drops = {"dropout": 0.1, "attention_dropout": 0.1}
        one, two = (
            predict(
                configuration(
                    model=model | drops | {"num_layers": layers},
                    train={"global_batch": 4, "microbatches": 1},
                    data={"sequence_length": 2048},
                    sharding={"zero": "none"},
                ),
                ONE | {"tensor": 8},
                A100,
                profile=profile,
            )
            for layers in (1, 2)
        )
        layer = 1e3 * (two.step_seconds - one.step_seconds - two.breakdown.optimizer + one.breakdown.optimizer)
        assert layer == pytest.approx(sum(published), rel=0.1)


def test_a_large_pipeline_is_predicted_at_once():
    config = configuration(
        model={"num_layers": 64}, train={"global_batch": 512, "microbatches": 512}, pipeline={"schedule": "1f1b"}
    )
    predicted(config, pipe=64)
    start = time.perf_counter()
    predicted(config, pipe=64)
    # measured: 0.03 s; the limit is what a search can bear, on a busy machine
    assert time.perf_counter() - start < 1


def write_metrics(path: Path, config: Configuration, *seconds: float | None, **run: object) -> Path:
    """Lines of a run of this configuration on one A100, unless it is said otherwise."""
    tokens = config.train.global_batch * config.data.sequence_length
    lines = []
    for step, value in enumerate(seconds, 1):
        line = {"step": step, "step_seconds": value, "device": GPUS["a100"].device_kind, "devices": 1, **run}
        lines.append({**line, "tokens_per_second": None if value is None else tokens / value})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.mark.parametrize("slower", [0.9, 1.7, 6.0])
def test_a_calibrated_machine_predicts_the_run(tmp_path: Path, slower: float):
    config, sizes = configuration(), ONE | {"data": 2, "tensor": 4}
    wanted = slower * predict(config, sizes, A100).step_seconds
    seconds = (60.0, 1.5 * wanted, wanted, None, 0.9 * wanted)
    metrics = write_metrics(tmp_path / "metrics.jsonl", config, *seconds, devices=8)
    machine = calibrate(metrics, config, sizes, A100)
    assert predict(config, sizes, machine).step_seconds == pytest.approx(wanted, rel=1e-4)
    assert (machine.product_fraction < A100.product_fraction) == (slower > 1)
    assert machine.nvlink_fraction == A100.nvlink_fraction


def test_a_run_that_cannot_be_is_refused(tmp_path: Path):
    config = configuration()
    seconds = predicted(config).step_seconds
    fast = write_metrics(tmp_path / "fast.jsonl", config, 9.0, seconds / 4, seconds / 4)
    with pytest.raises(UserError, match="faster than .* on a100: check --gpu"):
        calibrate(fast, config, ONE, A100)
    short = write_metrics(tmp_path / "short.jsonl", config, 9.0, None)
    with pytest.raises(UserError, match="has 1 line with .* needs two"):
        calibrate(short, config, ONE, A100)
    with pytest.raises(UserError, match="does not exist: give the metrics.jsonl"):
        calibrate(tmp_path / "none.jsonl", config, ONE, A100)


def test_a_run_on_other_devices_is_refused(tmp_path: Path):
    config = configuration()
    path = tmp_path / "metrics.jsonl"

    def refused(config: Configuration, sizes: dict[str, int] = ONE) -> str:
        with pytest.raises(UserError) as error:
            calibrate(path, config, sizes, A100)
        return str(error.value)

    a100 = GPUS["a100"].device_kind
    for kind in ("cpu", GPUS["h100"].device_kind, "NVIDIA A100-SXM4-40GB"):
        write_metrics(path, config, 1.0, 1.0, 1.0, device=kind)
        assert f"was measured on {kind!r}, and the plan is for a100, {a100!r}: give --gpu" in refused(config)
    write_metrics(path, config, 1.0, 1.0, 1.0, devices=8)
    assert "was measured on 8 GPUs, and the plan is for 1: give --gpus 8" in refused(config)
    write_metrics(path, config, 1.0, 1.0, 1.0)
    assert "was measured on 1 GPU, and the plan is for 2: give --gpus 1" in refused(config, ONE | {"data": 2})
    tokens = config.train.global_batch * config.data.sequence_length
    message = f"was measured with steps of {tokens:,} tokens, and the plan's have {2 * tokens:,} (train.global_batch"
    larger = configuration(train={"global_batch": 2 * config.train.global_batch})
    assert message in refused(larger)
    # as it was written before lines had a device
    lines = [{"step": step, "loss": 1.0, "step_seconds": 1.0, "tokens_per_second": 1.0} for step in range(1, 4)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert "does not say on which device step 1 was measured: train a few steps anew" in refused(config)
    # one line of another device is enough: a run that went on elsewhere
    write_metrics(path, config, 1.0, 1.0, 1.0)
    here = path.read_text()
    path.write_text(here + write_metrics(tmp_path / "other.jsonl", config, 1.0, device="cpu").read_text())
    assert "was measured on 'cpu'" in refused(config)


def test_what_does_not_fit_the_mesh_is_refused():
    with pytest.raises(UserError, match="model.num_heads 16 is not a multiple of mesh.tensor 32"):
        predicted(configuration(), tensor=32)
    with pytest.raises(UserError, match="too few for mesh.pipe 32"):
        predicted(configuration(train={"microbatches": 32}), pipe=32)


def test_sequence_parallelism_saves_what_it_promises():
    # 2205.05198, Table 4: norms and dropout of the copied stream cost 0.5 of 7.7 ms of a forward
    drops = {"dropout": 0.1, "attention_dropout": 0.1}
    copied, split = (
        predicted(configuration(model=drops), profile=replace(MEGATRON_2021, sequence_sharded=sharded), tensor=8)
        for sharded in (False, True)
    )
    assert split.breakdown.memory < copied.breakdown.memory
    assert split.breakdown.products == copied.breakdown.products
