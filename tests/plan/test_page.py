"""The page of a plan: what it is given to show, and what is refused. How it looks and works: test_page_browser.py."""

import base64
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxtron.command import PAGE
from jaxtron.config import UserError
from jaxtron.pipeline.schedules.figures import timeline as spans_of
from jaxtron.plan.__main__ import main
from jaxtron.plan.html import figures
from jaxtron.plan.html import timeline as timelines
from jaxtron.plan.html.figures import plan_data, search_data
from jaxtron.plan.html.page import page_text, write_plan_page, write_search_page
from jaxtron.plan.html.timeline import SLOTS, timeline_data
from jaxtron.plan.request import parse
from tests.support.commands import run_main
from tests.support.made_up_plans import DATA, EXCHANGE, MARKUP, PIPE, TENSOR, made_up_plan, made_up_search


def data_of(page: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert found is not None
    return json.loads(found[1])


def numbers(text: str, kind: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), kind)


@pytest.mark.parametrize(
    ("schedule", "chunks"), [("1f1b", 1), ("interleaved", 2), ("zero_bubble", 1), ("zero_bubble_v", 2)]
)
def test_timelines_are_those_of_the_schedule(schedule: str, chunks: int):
    plan, parts = made_up_plan(schedule=schedule, chunks=chunks)
    found = timeline_data(parts.schedule, plan.prediction)
    starts, codes = numbers(found["starts"], "<f4"), numbers(found["codes"], "<u2")
    microbatches = numbers(found["microbatches"], "<u2")
    spans = spans_of(parts.schedule, durations=plan.prediction.slot_seconds)
    for stage, own in enumerate(spans):
        place = slice(found["offsets"][stage], found["offsets"][stage + 1])
        np.testing.assert_allclose(starts[place], [span.start for span in own], atol=1e-5)
        assert codes[place].tolist() == [SLOTS.index(span.slot) * chunks + span.work.chunk for span in own]
        assert microbatches[place].tolist() == [span.work.microbatch for span in own]
        assert found["busy"][stage] == pytest.approx(sum(span.end - span.start for span in own))
    assert found["end"] == pytest.approx(max(span.end for own in spans for span in own))
    assert found["spans"] == sum(map(len, spans)) == found["offsets"][-1] and found["until"] is None


def test_of_a_step_with_too_many_slots_the_first_are_drawn(monkeypatch):
    monkeypatch.setattr(timelines, "MOST_SPANS", 20)
    plan, parts = made_up_plan()
    found = timeline_data(parts.schedule, plan.prediction)
    assert found["offsets"][-1] == 20 and found["spans"] == 64
    assert numbers(found["starts"], "<f4").max() <= found["until"] < found["end"]


def test_flows_of_a_plan():
    found = plan_data(*made_up_plan())["traffic"]
    assert found["axes"] == ["pipe", "data", "tensor"] and found["sizes"] == [4, 2, 4]
    flows = [(flow["pattern"], flow["dims"], flow["bytes"]) for flow in found["flows"]]
    assert flows == [("ring", [2], TENSOR), ("ring", [1], DATA), ("line", [0], PIPE), ("all", [1, 2], EXCHANGE)]
    # groups that match no axes are told, not drawn
    assert found["unknown"] == 1.0
    around = plan_data(*made_up_plan(schedule="interleaved", chunks=2))["traffic"]["flows"]
    folded = plan_data(*made_up_plan(schedule="zero_bubble_v", chunks=2))["traffic"]["flows"]
    assert (around[2]["pattern"], folded[2]["pattern"]) == ("both", "line")


def test_figures_are_those_of_the_plan():
    plan, parts = made_up_plan()
    found = plan_data(plan, parts, tokens=4096 * 86400 * 10)
    assert found["step"]["days"] == "3.54 billion tokens take 10.0 days"
    assert sum(seconds for _, seconds in found["step"]["parts"]) == pytest.approx(4.0)
    assert sum(row[1] for row in found["bound"]["rows"]) == pytest.approx(3.0)
    assert sum(size for _, size in found["memory"]["classes"]) == plan.memory.total == found["memory"]["total"]
    assert [row[0] for row in found["parameters"]] == [row.name for row in parts.parameters]
    assert found["parameters"][1][1:4] == [[200, 64], ["vocab", "embed"], ["tensor", ""]]


def test_searches_have_every_layout(monkeypatch):
    plan, _ = made_up_plan()
    found = search_data(made_up_search(plan))
    kinds = [row["kind"] for row in found["candidates"]]
    assert kinds == ["compiled"] + ["formula"] * 11 and found["left_out"] == 0
    # compiled: the plan's time, and beside it the formula's
    assert (found["candidates"][0]["seconds"], found["candidates"][0]["formula"]) == (4.0, 0.8)
    assert [row["own"] for row in found["candidates"]].count(True) == 1
    assert "--mesh.tensor 32" in found["candidates"][0]["flags"]
    monkeypatch.setattr(figures, "MOST_CANDIDATES", 5)
    few = search_data(made_up_search(plan))
    assert len(few["candidates"]) == 5 and few["left_out"] == 7


def test_pages_are_whole_and_need_nothing_else(tmp_path: Path):
    plan, parts = made_up_plan(f"a {MARKUP} \udce9")
    path = tmp_path / "report.html"
    write_plan_page(plan, parts, path, command=f"python '{MARKUP}'", text="text")
    text = path.read_text()
    assert text.startswith(PAGE) and "@@style" not in text
    # one ending for each of the three scripts, none from names
    assert text.count("</script") == 2 and "<img" not in text and "&lt;/script&gt;" in text
    assert data_of(text)["command"] == f"python '{MARKUP}'"
    assert not re.search(r"""(src|href)=["'](?!data:|#)""", text) and "default-src 'none'" in text
    assert "search" not in data_of(text)
    write_search_page(made_up_search(plan), parts, path, title="found", command="", text="")
    assert data_of(path.read_text())["plan"]["title"] == plan.title.replace("\udce9", "\udce9")
    write_search_page(made_up_search(), None, path, title="found", command="", text="")
    assert data_of(path.read_text())["plan"] is None


def test_numbers_that_are_none_are_null():
    text = page_text("none", {"rates": [float("nan"), float("inf"), 1.5], "where": {"x": -float("inf")}})
    assert data_of(text) == {"rates": [None, None, 1.5], "where": {"x": None}}


PLAN = "configs/gpt_tiny.yaml --gpu h100 --gpus 8"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            f"{PLAN} --html report.txt",
            "--html report.txt: browsers open files whose names end in .html; give report.html",
        ),
        (f"{PLAN} --html report", "browsers open files whose names end in .html; give report.html"),
        (f"{PLAN} --html report.pdf", "browsers open files whose names end in .html"),
        (f"{PLAN} --html .html", "browsers open files"),
        (f"{PLAN} --html .", "browsers open files"),
        (f"{PLAN} --html", "--html"),
        (f"{PLAN} --html=", "--html"),
        (f"{PLAN} --html {{tmp}}/none/report.html", "there is no folder"),
        (f"{PLAN} --html {{tmp}}/folder.html", "is a folder; give a file"),
        (f"{PLAN} --html {{tmp}}/notes.html", "the file is there, and no earlier result"),
        (f"{PLAN} --html {{tmp}}/notes.html/x.html", "is no folder"),
        (f"{PLAN} --html /dev/null", "--html /dev/null: browsers open files whose names end in .html; give null.html"),
        (f"{PLAN} --html {{tmp}}/a.html --json {{tmp}}/a.html", "both would write this file; give them two names"),
        (f"{PLAN} --html {{tmp}}/a.html --hlo {{tmp}}/../{{name}}/a.html", "both would write this file"),
        (f"{PLAN} --html {{tmp}}/a.html --html {{tmp}}/b.html", "--html is given twice; keep one"),
        (
            "configs/gpt_tiny.yaml --layout --devices 8 --html r.html",
            "has no effect with --layout, only with a plan or",
        ),
        ("configs/gpt_tiny.yaml --schedule --html r.html", "has no effect with --schedule"),
        ("configs/gpt_tiny.yaml --html {tmp}/a.html", "say for which GPU"),
        (f"{PLAN} --search --html report.xml", "browsers open files"),
        (f"{PLAN} --html {{tmp}}/{'x' * 250}.html", "a file's name has at most 251 bytes; give a shorter one"),
    ],
)
def test_bad_names_of_pages(arguments: str, message: str, tmp_path: Path):
    (tmp_path / "folder.html").mkdir()
    (tmp_path / "notes.html").write_text("<html>mine</html>")
    ended = run_main(main, arguments.format(tmp=tmp_path, name=tmp_path.name).split())
    assert ended.code != 0 and len(ended.err.strip().splitlines()) == 1, ended.err
    assert message in ended.err, ended.err
    assert (tmp_path / "notes.html").read_text() == "<html>mine</html>"


def test_an_earlier_page_is_replaced_and_the_command_is_kept(tmp_path: Path):
    page = tmp_path / "my report.HTML"
    write_plan_page(*made_up_plan(), page, command="", text="")
    request = parse(["configs/gpt_tiny.yaml", "--gpu", "h100", "--html", str(page)])
    assert request.html == page
    assert request.command == f"python -m jaxtron.plan configs/gpt_tiny.yaml --gpu h100 --html '{page}'"
    page.write_text("<!doctype html>\n<p>not ours</p>")
    with pytest.raises(UserError, match="no earlier result"):
        parse(["configs/gpt_tiny.yaml", "--gpu", "h100", "--html", str(page)])
