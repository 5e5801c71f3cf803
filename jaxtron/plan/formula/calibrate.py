"""A machine whose predictions agree with a run that was measured."""

import math
import os
import statistics
from pathlib import Path

from jaxtron.command import write_whole
from jaxtron.config import UserError, dump
from jaxtron.gpus import Gpu
from jaxtron.models.work.profile import JAXTRON, Profile
from jaxtron.plan.formula.prediction import predict
from jaxtron.plan.machine import Machine
from jaxtron.run.configuration import Configuration
from jaxtron.run.metrics import read_metrics
from jaxtron.words import plural

# How fast the GPU itself is; links keep their constants, which one run cannot tell from it.
RATES = ("product_fraction", "attention_fraction", "memory_fraction")
LEAST_FACTOR = 1e-4
PRECISION = 1e-6


def measured_seconds(metrics: Path, config: Configuration, gpu: Gpu, num_gpus: int) -> float:
    """The median `step_seconds` of a run's metrics.jsonl, without its first record, which may include compilation.

    Raises `UserError` where the file is missing, was measured on other devices or with steps of another size than
    these, or has less than two records with a time.
    """
    if not os.path.isfile(metrics):
        raise UserError(f"{metrics} does not exist: give the metrics.jsonl in a run's directory")
    # a line that a kill or a bad disk left otherwise is none
    times = ("step_seconds", "tokens_per_second")
    found = [record for record in read_metrics(metrics) if all(_is_time(record.get(name)) for name in times)]
    for record in found:
        _check_devices(metrics, record, gpu, num_gpus)
    tokens = config.train.global_batch * config.data.sequence_length
    sizes = [record["tokens_per_second"] * record["step_seconds"] for record in found]
    whole = [record["step_seconds"] for record, size in zip(found, sizes, strict=True) if round(size) == tokens]
    if sizes and not whole:
        raise UserError(
            f"{metrics} was measured with steps of {sizes[-1]:,.0f} tokens, and the plan's have {tokens:,} "
            f"(train.global_batch {config.train.global_batch:,} x data.sequence_length "
            f"{config.data.sequence_length:,}): give the run's own config.yaml, or the metrics.jsonl of another run"
        )
    if len(whole) < 2:
        raise UserError(
            f"{metrics} has {plural(len(whole), 'line')} with step_seconds and needs two, for the first one includes "
            "compilation: train for longer, or lower run.log_every"
        )
    return statistics.median(whole[1:])


def _is_time(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value) and value > 0


def _check_devices(metrics: Path, record: dict, gpu: Gpu, num_gpus: int) -> None:
    """`UserError` unless a line was measured on this GPU, and on as many."""
    if not isinstance(record.get("device"), str) or type(record.get("devices")) is not int:
        raise UserError(
            f"{metrics} does not say on which device step {record['step']} was measured: train a few steps anew, "
            "with a Jaxtron that writes it"
        )
    kind, count = record["device"], record["devices"]
    if kind != gpu.device_kind:
        raise UserError(
            f"{metrics} was measured on {kind!r}, and the plan is for {gpu.name}, {gpu.device_kind!r}: give --gpu as "
            "the run had it, or the metrics.jsonl of a run there"
        )
    if count != num_gpus:
        raise UserError(
            f"{metrics} was measured on {plural(count, 'GPU')}, and the plan is for {num_gpus:,}: give --gpus {count} "
            "and the run's own mesh, and plan for more with --machine afterwards"
        )


def calibrate(
    metrics: Path,
    config: Configuration,
    sizes: dict[str, int],
    machine: Machine,
    *,
    gpus_per_node: int = 8,
    profile: Profile = JAXTRON,
) -> Machine:
    """The machine with its compute rates times one factor, so that the step is predicted as long as it was measured.

    `config` and `sizes` (devices by mesh axis) are the run's. Products, attention, memory and launches change, links
    stay. Raises `UserError` where the run was faster than that allows, or slower than a ten-thousandth of the rates.
    """
    wanted = measured_seconds(metrics, config, machine.datasheet, math.prod(sizes.values()))

    def seconds(factor: float) -> float:
        scaled = scale(machine, factor)
        return predict(config, sizes, scaled, gpus_per_node=gpus_per_node, profile=profile).step_seconds

    low, high = LEAST_FACTOR, min(1 / getattr(machine, name) for name in RATES)
    for bound, is_slow, fix in ((high, seconds(high) > wanted, "faster"), (low, seconds(low) < wanted, "slower")):
        if is_slow:
            raise UserError(
                f"{metrics}: {wanted:.4g} s a step is {fix} than the {seconds(bound):.4g} s that the model can explain "
                f"on {machine.gpu}: check --gpu and that the configuration and the devices are the run's"
            )
    while high / low > 1 + PRECISION:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if seconds(middle) > wanted else (low, middle)
    return scale(machine, high)


def scale(machine: Machine, factor: float) -> Machine:
    """The machine whose compute is that many times as fast."""
    rates = {name: min(1.0, getattr(machine, name) * factor) for name in RATES}
    return machine.model_copy(update={**rates, "kernel_seconds": machine.kernel_seconds / factor})


def write_machine(machine: Machine, path: Path) -> None:
    """Writes the constants as YAML that `--machine` reads; `UserError` if it cannot be written."""
    write_whole(path, dump(machine))
