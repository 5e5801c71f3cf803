"""Notebooks run from a clean kernel, and are what their sources say."""

import ast
import importlib.machinery
import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
loader = importlib.machinery.SourceFileLoader("notebook_tool", str(ROOT / "tools" / "notebooks"))
spec = importlib.util.spec_from_loader("notebook_tool", loader)
assert spec is not None
tool = importlib.util.module_from_spec(spec)
loader.exec_module(tool)
SOURCES = sorted((ROOT / "notebooks").glob("*.py"))
NAMED = ("jaxtron.pictures", "jaxtron.plan.schedule", "jaxtron.plan.traffic")
INSTALLS = 'importlib.util.find_spec("jaxtron")'


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)
def test_what_jupyter_opens_is_made_of_the_source(source):
    """`tools/notebooks` writes them anew."""
    assert tool.agrees(source), f"{source.stem}.ipynb is not what tools/notebooks makes of {source.name}: run it"
    notebook = tool.read(source)
    codes = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs for cell in codes)
    # each is a page: it begins with a title, explains, and runs where nothing is installed yet
    assert notebook.cells[0].cell_type == "markdown" and notebook.cells[0].source.startswith("# ")
    assert INSTALLS in codes[0].source
    words = sum(len(cell.source.split()) for cell in notebook.cells if cell.cell_type == "markdown")
    assert words > 200


def test_every_notebook_has_its_source():
    assert {path.stem for path in ROOT.glob("notebooks/*.ipynb")} == {path.stem for path in SOURCES}


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)
def test_notebooks_use_few_names(source):
    """Beside those of `jaxtron` itself the ones that docs/ names: what a reader copies goes on working."""
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("jaxtron."):
            assert node.module in NAMED or node.module.startswith("jaxtron.pipeline.schedules."), node.module
        if isinstance(node, ast.Attribute):
            assert not node.attr.startswith("_"), node.attr


@pytest.mark.slow
@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)
def test_notebook(source, tmp_path):
    notebook = tool.execute(source, tmp_path)
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    said = [output.text for output in outputs if output.output_type == "stream" and output.name == "stderr"]
    assert not said, "a page has no warnings on it"
    assert any("image/png" in output.get("data", {}) or "text/html" in output.get("data", {}) for output in outputs)
