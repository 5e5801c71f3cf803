"""A plan and a search as a reader of a notebook has them."""

import json
from pathlib import Path

import pytest

import jaxtron as jx

SMALL = {
    "model": {"num_layers": 1, "hidden_size": 128, "num_heads": 4},
    "data": {"sequence_length": 128},
    "train": {"global_batch": 4},
}


@pytest.mark.slow
def test_a_plan_shows_itself(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    config = jx.load(SMALL, mesh={"data": 1, "tensor": 2})
    plan = jx.rehearse(config, gpu="h100", gpus=2)
    # two GPUs are asked for, and the mesh fills them
    assert plan.config.mesh == config.mesh and plan.fits
    assert plan.memory.total == sum(plan.memory.classes.values())
    parts = plan.times
    assert parts.pop("step") == pytest.approx(sum(parts.values()))
    assert {row.key.axes for row in plan.collectives} == {("tensor",)}
    assert "HloModule" in plan.hlo
    text, html = str(plan), plan._repr_html_()
    assert repr(plan) == text and "memory of a GPU: fits" in text and "memory of a GPU: fits" in html
    for row in plan.collectives:
        assert row.key.kind in html
    assert json.loads(plan.save(tmp_path / "plan.json").read_text())["memory"]["total"] == plan.memory.total
    assert plan.save(tmp_path / "step.hlo").read_text() == plan.hlo
    page = plan.save(tmp_path / "plan.html").read_text()
    assert (
        page.startswith("<!doctype html>") and "jaxtron.rehearse(config, gpu='h100', gpus=2, gpus_per_node=2)" in page
    )
    assert plan.compare(plan) == "changes: none"
    for what in ("memory", "timeline", "traffic", "mesh"):
        assert plan.draw(what).get_axes(), what
    with pytest.raises(jx.UserError, match="give memory, timeline, traffic or mesh"):
        plan.draw("step")
    out, _ = capfd.readouterr()
    assert out == ""


def test_layouts_are_ranked_and_the_best_is_a_configuration():
    found = jx.search(SMALL, gpu="h100", gpus=4, top=0)
    assert len(found) > 3
    steps = [one.prediction.step_seconds for one in found.candidates]
    assert steps == sorted(steps)
    session = jx.Session(found.best)
    assert session.mesh.size == 4 and session.config.model.num_layers == 1
    assert found.config(1).mesh != found.best.mesh or found.config(1) != found.best
    html = found._repr_html_()
    assert html.count("<tr>") == 1 + min(20, len(found)) and found.candidates[0].layout.mesh_text in html
    with pytest.raises(jx.UserError, match=r"no candidate \d+: there are \d+ candidates, from 0 on"):
        found.config(len(found))


BAD = [
    ({"gpu": "h1000"}, "h1000"),
    ({"nodes": 1, "gpus": 8}, "--nodes 1 and --gpus 8: give one of them"),
    ({"gpus": 12}, "--gpus 12 do not fill nodes of 8"),
    ({"gpus": 10**9}, "cannot be planned"),
    ({"machine": "no/such.yaml"}, "machine file no/such.yaml does not exist"),
    ({"parameters": {"vocab": ()}}, r"parameters\['vocab'\] is cut by the layers themselves"),
]


@pytest.mark.parametrize("place", range(len(BAD)))
def test_bad_requests_are_one_line(place: int):
    given, message = BAD[place]
    with pytest.raises(jx.UserError, match=message) as error:
        jx.rehearse(SMALL, **given)
    assert "\n" not in str(error.value)
