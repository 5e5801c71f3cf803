"""A machine whose predictions agree with a run that was measured."""

import math
import statistics
from pathlib import Path

from jaxtron.config import UserError, dump
from jaxtron.plan.machine import Machine
from jaxtron.plan.practice import JAXTRON, Practice
from jaxtron.plan.prediction import predict
from jaxtron.train.config import Configuration
from jaxtron.train.metrics import read_metrics

# How fast the GPU itself is; links keep their constants, which one run cannot tell from it.
RATES = ("product_fraction", "attention_fraction", "memory_fraction")
LEAST_FACTOR = 1e-4
PRECISION = 1e-6


def measured_seconds(metrics: Path) -> float:
    """The median `step_seconds` of a run's metrics.jsonl, without its first record, which may include compilation.

    Raises `UserError` where the file is missing or has less than two records with a time.
    """
    if not metrics.is_file():
        raise UserError(f"{metrics} does not exist: give the metrics.jsonl in a run's directory")
    found = [record.get("step_seconds") for record in read_metrics(metrics)]
    seconds = [value for value in found if isinstance(value, int | float) and math.isfinite(value) and value > 0]
    if len(seconds) < 2:
        raise UserError(
            f"{metrics} has {len(seconds)} logged steps with step_seconds and needs two, for the first one includes "
            "compilation: train for longer, or lower run.log_every"
        )
    return statistics.median(seconds[1:])


def calibrate(
    metrics: Path,
    config: Configuration,
    sizes: dict[str, int],
    machine: Machine,
    *,
    gpus_per_node: int = 8,
    practice: Practice = JAXTRON,
) -> Machine:
    """The machine with its compute rates times one factor, so that the step is predicted as long as it was measured.

    `config` and `sizes` (devices by mesh axis) are the run's. Products, attention, memory and launches change, links
    stay. Raises `UserError` where the run was faster than that allows, or slower than a ten-thousandth of the rates.
    """
    wanted = measured_seconds(metrics)

    def seconds(factor: float) -> float:
        scaled = scale(machine, factor)
        return predict(config, sizes, scaled, gpus_per_node=gpus_per_node, practice=practice).step_seconds

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
    try:
        path.write_text(dump(machine), encoding="utf-8")
    except OSError as error:
        raise UserError(f"the machine file {path} cannot be written: {error.strerror}") from None
