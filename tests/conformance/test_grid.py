"""A sample of the layouts of `make grid`, and that they are of all kinds."""

import json
from pathlib import Path

import pytest

from jaxtron.models.decoder.kinds import KINDS
from jaxtron.pipeline.schedules.named import SCHEDULES
from jaxtron.sharding.folding import FLAGS
from tests.conformance import grid
from tests.conformance.grid import CASES, METHODS, SEED, finished, generated, run
from tests.conformance.subjects import SUBJECTS

# with stages, experts, context and state spaces among them
SAMPLE = (4, 11, 12, 22, 34, 40)


@pytest.mark.slow
@pytest.mark.parametrize("number", SAMPLE)
def test_a_generated_layout_is_one_device(number: int):
    generated(SEED, number).check()


def test_layouts_are_of_all_kinds_and_the_seed_s_alone():
    cases = [generated(SEED, number) for number in range(CASES)]
    assert [str(generated(SEED, number)) for number in (0, 7, 99)] == [str(cases[number]) for number in (0, 7, 99)]
    assert len(set(map(str, cases))) > 0.98 * CASES
    assert {case.subject.name for case in cases} == {subject.name for subject in SUBJECTS}
    assert {case.subject.kind for case in cases} >= set(KINDS) - {"S"}
    meshes = [case.layout.mesh for case in cases]
    for flag in (*FLAGS, "expert", "expert_tensor", "order"):
        assert sum(flag in mesh for mesh in meshes) > 5, flag
    piped = [case.layout.schedule for case in cases if case.layout.num_stages > 1]
    assert set(piped) == set(SCHEDULES) and CASES / 4 < len(piped) < CASES / 2
    assert {case.layout.context.get("method") for case in cases} == {*METHODS, None}
    assert {case.layout.zero for case in cases} == {"none", "optimizer", "parameters"}
    recomputed = {str(case.changes.get("recompute")) for case in cases}
    assert recomputed >= {"none", "full", "selective", "all_but_cores", "('mamba',)"}


def test_a_log_has_what_differs_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def check(case: grid.Case) -> None:
        assert case.number != 1, "it differs"
        if case.number == 2:
            raise RuntimeError("a defect")

    monkeypatch.setattr(grid.Case, "check", check)
    log = tmp_path / "log.jsonl"
    assert len(list(run(log, seed=SEED, cases=2, minutes=1))) == 2
    assert [line["case"] for line in run(log, seed=SEED, cases=4, minutes=1)] == [2, 3]
    outcomes = [line["outcome"].partition(":")[0] for line in finished(log).values()]
    assert outcomes == ["equal", "differs", "failed", "equal"]
    assert not list(run(log, seed=SEED, cases=9, minutes=0)) and len(log.read_text().splitlines()) == 4
    assert all(isinstance(json.loads(line)["seconds"], float) for line in log.read_text().splitlines())
