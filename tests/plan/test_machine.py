"""The model of one GPU: products, passes, collectives and messages, and the files that hold its constants."""

from pathlib import Path

import pytest

from jaxtron.config import UserError, dump, load
from jaxtron.gpus import GPUS
from jaxtron.plan.formula.calibrate import scale, write_machine
from jaxtron.plan.machine import CONSTANTS, Group, Machine, Machines, Product, axes_group, machine_named, read_machine

IDEAL = Machine(
    gpu="a100",
    product_fraction=1.0,
    attention_fraction=1.0,
    memory_fraction=1.0,
    nvlink_fraction=1.0,
    network_fraction=1.0,
    kernel_seconds=0.0,
    nvlink_seconds=0.0,
    network_seconds=0.0,
)
CEILINGS = {f"{rate}_fraction": f"{rate}_ceiling" for rate in ("product", "attention", "memory")}
NVLINK, NETWORK = GPUS["a100"].nvlink_bandwidth, GPUS["a100"].network_bandwidth


def efficiency(machine: Machine, m: float, n: float, k: float) -> float:
    product = Product(m, n, k)
    return product.flops / machine.product_seconds(product) / machine.datasheet.peak_flops


def test_every_known_gpu_has_constants():
    assert set(Machines.model_fields) == set(GPUS)
    for name in GPUS:
        assert machine_named(name).gpu == name
    assert machine_named("H100") == machine_named("h100")


def test_gpus_without_published_steps_are_the_h100_by_analogy():
    constants = load(Machines, CONSTANTS)
    for name in ("h200", "b200", "gb200"):
        machine = getattr(constants, name)
        own = {ceiling: getattr(machine, ceiling) for ceiling in CEILINGS.values()}
        assert machine == constants.h100.model_copy(update={"gpu": name, **own})


def test_no_fitted_rate_is_above_its_ceiling():
    for name in GPUS:
        machine = machine_named(name)
        assert all(getattr(machine, fraction) <= getattr(machine, ceiling) for fraction, ceiling in CEILINGS.items())


def test_the_least_of_a_kernel_is_its_flops_or_its_bytes():
    machine, gpu = IDEAL.model_copy(update={"product_ceiling": 0.8, "memory_ceiling": 0.5}), GPUS["a100"]
    peak, bandwidth = gpu.peak_flops, gpu.memory_bandwidth
    assert machine.least_seconds(peak, 0.0) == pytest.approx(1 / 0.8)
    assert machine.least_seconds(peak, 0.0, is_fused=True) == pytest.approx(1 / machine.attention_ceiling)
    # numbers of 32 bits at half the rate, of 8 at twice
    assert machine.least_seconds(peak, 0.0, width=4.0) == pytest.approx(2 / 0.8)
    assert machine.least_seconds(peak, 0.0, width=1.0) == pytest.approx(0.5 / 0.8)
    assert machine.least_seconds(0.0, bandwidth) == machine.least_seconds(peak, bandwidth) == pytest.approx(2.0)


def test_products_reach_more_of_the_peak_the_larger_they_are():
    machine = machine_named("a100")
    found = [efficiency(machine, size, size, size) for size in (128, 512, 2048, 8192, 32768)]
    assert found == sorted(found)
    assert found[0] < 0.05 and 0.9 * machine.product_fraction < found[-1] < machine.product_fraction
    # a short contraction is bound by its output's bytes: attention's scores of heads of 128
    assert efficiency(machine, 2048, 2048, 128) < 0.6 * efficiency(machine, 2048, 2048, 2048)
    assert Product(8, 16, 32, count=3).flops == 2 * 3 * 8 * 16 * 32


def test_an_ideal_product_takes_its_flops_and_its_bytes():
    product = Product(1000, 2000, 500)
    seconds = 2 * 1000 * 2000 * 500 / 312e12 + 2 * (1000 * 500 + 500 * 2000 + 1000 * 2000) / 2.03904e12
    assert IDEAL.product_seconds(product) == pytest.approx(seconds)
    # twice the bytes at half the rate
    assert IDEAL.product_seconds(Product(1000, 2000, 500, width=4, output_width=4)) == pytest.approx(2 * seconds)
    assert IDEAL.pass_seconds(2.03904e12) == pytest.approx(1.0)


def test_rings_inside_a_node_and_between_nodes():
    size = 6e9
    assert IDEAL.collective_seconds("all_gather", size, Group(1, 1)) == 0
    inside = IDEAL.collective_seconds("all_gather", size, Group(8, 8))
    assert inside == pytest.approx(size * 7 / 8 / NVLINK)
    assert IDEAL.collective_seconds("all_reduce", size, Group(8, 8)) == pytest.approx(2 * inside)
    # one GPU of each of 16 nodes: its own card carries it all
    between = IDEAL.collective_seconds("reduce_scatter", size, Group(16, 1))
    assert between == pytest.approx(size * 15 / 16 / NETWORK)
    # whole nodes: eight cards share the same bytes, and NVLink passes them on
    whole = IDEAL.collective_seconds("reduce_scatter", size, Group(128, 8))
    assert whole == pytest.approx(max(between / 8, size * 127 / 128 / NVLINK))


def test_latency_decides_small_collectives():
    machine = machine_named("h100")
    small = [machine.collective_seconds("all_gather", 1024, Group(size, 1)) for size in (2, 16, 256)]
    assert small[1] - small[0] == pytest.approx(3 * machine.network_seconds, rel=0.01)
    assert small[2] - small[0] == pytest.approx(7 * machine.network_seconds, rel=0.01)
    assert machine.message_seconds(0, inside_node=True) < machine.message_seconds(0, inside_node=False)


@pytest.mark.parametrize(
    "sizes, axes, node, group",
    [
        ({"data": 16, "tensor": 8}, ("tensor",), 8, Group(8, 8)),
        ({"data": 16, "tensor": 8}, ("data",), 8, Group(16, 1)),
        ({"data": 16, "tensor": 2}, ("data",), 8, Group(16, 4)),
        ({"data": 4, "fsdp": 4, "tensor": 2}, ("data", "fsdp"), 8, Group(16, 4)),
        ({"pipe": 4, "tensor": 2}, ("pipe",), 8, Group(4, 4)),
        ({"tensor": 16}, ("tensor",), 8, Group(16, 8)),
        ({"tensor": 16}, ("tensor",), 72, Group(16, 16)),
        ({"data": 6}, ("data",), 4, Group(6, 3)),
    ],
)
def test_which_devices_share_a_node(sizes, axes, node, group):
    whole = dict.fromkeys(("pipe", "data", "fsdp", "context", "tensor"), 1) | sizes
    assert axes_group(whole, axes, node) == group


def test_a_machine_file_reads_back(tmp_path: Path):
    path = tmp_path / "ours.yaml"
    machine = scale(machine_named("h200"), 0.9)
    write_machine(machine, path)
    assert read_machine(path) == machine
    assert machine.product_fraction == pytest.approx(0.9 * machine_named("h200").product_fraction)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"gpu": "z100"}, "unknown GPU 'z100'"),
        ({"memory_fraction": 1.2}, "memory_fraction"),
        ({"memory_fraction": 0}, "memory_fraction"),
        ({"speed": 1}, "unknown setting speed"),
    ],
)
def test_a_wrong_machine_file_is_one_line(tmp_path: Path, change, words):
    path = tmp_path / "ours.yaml"
    lines = dump(machine_named("a100")).splitlines()
    kept = [line for line in lines if line.split(":")[0] not in change]
    path.write_text("\n".join([*kept, *(f"{key}: {value}" for key, value in change.items())]) + "\n")
    with pytest.raises(UserError, match=words) as caught:
        read_machine(path)
    assert "\n" not in str(caught.value)


def test_a_missing_machine_file_names_the_gpus(tmp_path: Path):
    with pytest.raises(UserError, match="does not exist; names of GPUs are a100, h100"):
        read_machine(tmp_path / "none.yaml")
