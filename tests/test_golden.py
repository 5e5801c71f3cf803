"""Every recipe's resolved settings that differ from the defaults, and its layout, as text for a reviewer of a change.

`pytest tests/test_golden.py --update-golden` writes the files anew.
"""

import difflib
from pathlib import Path

import jax
import pytest
import yaml

from jaxtron.config import load
from jaxtron.plan.layout import layout_text
from jaxtron.run.attention import select_attention
from jaxtron.run.configuration import configuration_type
from jaxtron.run.session import RunSession
from jaxtron.sharding.config import MeshConfig
from jaxtron.sharding.mesh import build_mesh
from jaxtron.sharding.rules import make_rules

ROOT = Path(__file__).parent
RECIPES = sorted((ROOT.parent / "configs").glob("*.yaml"))
MESH = MeshConfig(data=2, fsdp=2, tensor=2)


def describe(path: Path) -> str:
    config = load(configuration_type([str(path)]), path).resolved()
    # the recipe's own batches and stages do not matter
    rules = make_rules(build_mesh(MESH, jax.devices()), config.sharding)
    attention = select_attention(config, 1, jax.devices()[0].device_kind)
    session = RunSession(config, rules, attention)
    with session.use():
        layout = layout_text(session.blueprint)
    settings = yaml.safe_dump(config.model_dump(mode="json", exclude_defaults=True), sort_keys=False, width=100)
    return f"{settings}\n{layout}\n"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_is_as_recorded(path: Path, request: pytest.FixtureRequest) -> None:
    golden = ROOT / "golden" / f"{path.stem}.txt"
    today = describe(path)
    if request.config.getoption("--update-golden"):
        golden.parent.mkdir(exist_ok=True)
        golden.write_text(today)
    recorded = golden.read_text() if golden.exists() else ""
    difference = "\n".join(difflib.unified_diff(recorded.splitlines(), today.splitlines(), "recorded", "today", n=1))
    assert not difference, f"{difference}\nif this is meant: pytest tests/test_golden.py --update-golden"
