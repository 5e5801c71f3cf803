"""The layouts of MoE Parallel Folding (2504.14960, Table 3): compiled whole for their H100s, and their memory."""

from pathlib import Path

import pytest

from benchmarks.mixtures import Row, read_rows
from jaxtron.config import load
from jaxtron.gpus import gpu_named
from jaxtron.plan.compiled.rehearsal import rehearse
from jaxtron.plan.formula.memory_model import Estimator
from jaxtron.plan.memory_use import MemoryUse
from jaxtron.run.configuration import Configuration
from jaxtron.sharding.folding import FLAGS

CONFIGS = Path(__file__).parents[2] / "configs"
H100 = gpu_named("h100")
# without folding (experts as wide as tensor, inside replicas) and with it; Table 1 has their speeds
ROWS = [row for row in read_rows() if row.source == "2504.14960 Table 1"]
GPUS = {row.config: row.gpus for row in ROWS}
# the folded ones, and of the others the one whose exchange is the largest
COMPILED = [row for row in ROWS if row.name.endswith("folded") or row.config == "mixtral_8x22b_g8t8"]
# the columns without stages, each model in the order of GPUS: (tensor, expert), experts as wide as tensor
WHOLE = {
    "FSDP": [(8, 1), (2, 1), (8, 1)],
    "FSDP+EP": [(2, 8), (1, 8), (4, 8), (8, 8)],
    "TP+EP+DP": [(4, 8), (4, 4), (8, 8), (8, 8)],
}
MEMORY_MARGIN = 0.06


def configuration(name: str, flags: dict[str, object]) -> Configuration:
    """A file of configs/ with another layout; one sequence a microbatch."""
    file = CONFIGS / f"{name}.yaml"
    replicas = int(str(flags["mesh.data"])) * int(str(flags.get("mesh.fsdp", 1)))
    flags = {"train.microbatches": load(Configuration, file).train.global_batch // replicas, **flags}
    return load(Configuration, file, [word for key, value in flags.items() for word in (f"--{key}", str(value))])


def of_row(row: Row) -> Configuration:
    experts = {"expert": row.expert, "expert_tensor": row.expert_tensor}
    return configuration(row.config, {f"mesh.{flag}": size for flag, size in (row.sizes | experts).items()})


def estimated(config: Configuration) -> MemoryUse:
    sizes = {flag: getattr(config.mesh, flag) for flag in FLAGS}
    return Estimator(config.resolved()).memory(config.resolved(), sizes, H100)


def test_configurations_are_the_folded_layouts() -> None:
    folded = [row for row in ROWS if row.name.endswith("folded")]
    assert len(folded) == 4
    for row in folded:
        assert of_row(row).resolved() == load(Configuration, CONFIGS / f"{row.config}.yaml").resolved(), row.name


@pytest.mark.slow
@pytest.mark.parametrize("row", COMPILED, ids=lambda row: row.name)
def test_a_layout_of_stages_compiles_and_fits(row: Row) -> None:
    """All layers, microbatches and GPUs: layers and ticks are loops, so that a shallower model compiles no faster."""
    config = of_row(row)
    real = rehearse(config, gpu="h100", num_gpus=row.gpus).memory_use
    assert real.fits, real
    found = estimated(config)
    assert abs(found.total - real.total) < MEMORY_MARGIN * H100.memory_bytes
    assert found.activations == real.activations


@pytest.mark.slow
def test_the_other_layouts_of_stages_fit_by_formula() -> None:
    others = [row for row in ROWS if row not in COMPILED]
    assert len(others) == 3 and all(estimated(of_row(row)).fits for row in others)


@pytest.mark.slow
@pytest.mark.parametrize("column", WHOLE)
def test_a_layout_without_stages_fits_by_formula(column: str) -> None:
    """As the paper found; its FSDP runs of 8x70B, over 8 parts of a sequence, are left out."""
    for (name, gpus), (tensor, expert) in zip(GPUS.items(), WHOLE[column], strict=False):
        ways = ("fsdp", "data") if column.startswith("FSDP") else ("data", "fsdp")
        layout = {"tensor": tensor, "expert": expert, "expert_tensor": tensor, "pipe": 1, ways[0]: gpus // tensor}
        flags: dict[str, object] = {f"mesh.{flag}": size for flag, size in {ways[1]: 1, **layout}.items()}
        found = estimated(configuration(name, {**flags, "pipeline.schedule": "1f1b", "pipeline.chunks": 1}))
        # the one that ran out of memory there too
        assert found.fits == ((column, name) != ("TP+EP+DP", "llama_3_8x70b")), name
