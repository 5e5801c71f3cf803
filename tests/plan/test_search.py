"""Searches: what is enumerated, how it is ranked, and that a paper's own layout is not beaten by chance."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from jaxtron.config import UserError, load
from jaxtron.plan.__main__ import main
from jaxtron.plan.candidates import Layout, layouts, own_layout
from jaxtron.plan.machine import machine_named
from jaxtron.plan.prediction import predict
from jaxtron.plan.search import MARGIN, Search, compile_best, search, text, write_json
from jaxtron.train.config import Configuration

A100 = machine_named("a100")
CONFIGS = Path(__file__).parents[2] / "configs"
SMALL = "--model.num_layers 8 --model.hidden_size 512 --model.num_heads 8 --model.vocab_size 1024 "
SMALL += "--train.global_batch 16 --data.sequence_length 256 "


def configuration(flags: str = "", name: str | None = None) -> Configuration:
    return load(Configuration, None if name is None else CONFIGS / f"{name}.yaml", flags.split()).resolved()


@pytest.fixture(scope="module")
def small() -> Search:
    return search(configuration(SMALL + "--mesh.tensor 2"), A100, num_gpus=4, gpus_per_node=4)


@pytest.mark.parametrize(
    "name, num_gpus",
    [
        ("gpt_22b", 8),
        pytest.param("gpt_175b", 64, marks=pytest.mark.slow),
        pytest.param("gpt_530b", 280, marks=pytest.mark.slow),
    ],
)
def test_the_best_is_at_least_as_fast_as_the_papers_layout(name: str, num_gpus: int):
    config = configuration(name=name)
    assert own_layout(config, num_gpus) in set(layouts(config, num_gpus, 8))
    found = search(config, A100, num_gpus=num_gpus, gpus_per_node=8)
    # of those that fit by formula, without the margin
    best = next(one for one in found.candidates if one.memory.fits)
    assert found.own is not None and found.own.memory.fits and found.rank(found.own.layout) is not None
    assert best.formula.step_seconds <= found.own.formula.step_seconds
    # and that is the same model of time as anybody's
    again = predict(best.layout.config(config), best.layout.sizes, A100)
    own = predict(config, config.mesh.shape(num_gpus), A100)
    assert again.step_seconds == best.formula.step_seconds
    assert own.step_seconds == found.own.formula.step_seconds


def test_layouts_use_all_gpus_and_keep_the_batch():
    config = configuration(SMALL)
    found = list(layouts(config, 16, 4))
    assert len(found) == len(set(found))
    assert {layout.tensor for layout in found} == {1, 2, 4}
    assert {layout.pipe for layout in found} == {1, 2, 4, 8}
    assert {layout.recompute for layout in found} == {"none", "selective", "full"}
    assert {layout.zero for layout in found if layout.data > 1} == {"none", "optimizer"}
    assert {layout.pipeline.schedule for layout in found} >= {"1f1b", "interleaved", "zero_bubble", "zero_bubble_v"}
    for layout in found:
        assert layout.data * layout.fsdp * layout.tensor * layout.pipe == 16
        assert layout.data * layout.fsdp * layout.rows * layout.microbatches(16) == 16
        assert layout.pipe * layout.pipeline.chunks <= 8
        # all that is left out is found by the check of a run
        layout.config(config).check_mesh(layout.sizes)


def test_layers_that_do_not_divide_are_cut_as_evenly_as_can_be():
    found = list(layouts(configuration("--model.num_layers 15 --train.global_batch 64"), 8, 8))
    cuts = {(layout.pipe, layout.pipeline.chunks) for layout in found if layout.pipe > 1}
    # 15 of 16 rows are filled, never 15 of 24
    assert cuts == {(2, 1), (2, 2), (2, 4), (4, 1), (4, 2), (8, 1)}
    found = list(layouts(configuration("--model.num_layers 12 --train.global_batch 64"), 8, 8))
    assert {layout.pipeline.chunks for layout in found if layout.pipe == 4} == {1, 3}


def test_candidates_are_ranked_by_time_and_fit(small: Search):
    seconds = [one.formula.step_seconds for one in small.candidates]
    assert seconds == sorted(seconds)
    assert all(one.memory.total <= (1 + MARGIN) * one.memory.capacity for one in small.candidates)
    assert small.num_layouts == small.num_refused + small.num_too_big + len(small.candidates)
    assert small.own is not None and small.own in small.candidates and small.own_problem is None
    assert small.own.layout == own_layout(configuration(SMALL + "--mesh.tensor 2"), 4)


def test_flags_give_the_layout(small: Search):
    base = configuration(SMALL + "--mesh.tensor 2")
    for one in small.candidates[:: max(1, len(small.candidates) // 25)]:
        config = configuration(SMALL + "--mesh.tensor 2 " + one.layout.flags(base))
        assert own_layout(config, 4) == one.layout
        assert predict(config, one.layout.sizes, A100).step_seconds == pytest.approx(one.formula.step_seconds)


def test_flags_undo_a_pipeline():
    base = configuration(
        SMALL + "--mesh.pipe 4 --pipeline.schedule interleaved --pipeline.chunks 2 --train.microbatches 4"
    )
    one = next(layout for layout in layouts(base, 4, 4) if layout.pipe == 1)
    words = "--mesh.pipe 4 --pipeline.schedule interleaved --pipeline.chunks 2 --train.microbatches 4 "
    assert own_layout(configuration(SMALL + words + one.flags(base)), 4) == one


@pytest.mark.slow
def test_an_own_layout_that_does_not_run_or_fit_is_told():
    found = search(configuration(SMALL + "--mesh.data 1 --mesh.tensor 8"), A100, num_gpus=4, gpus_per_node=4)
    assert found.own is None and "needs 8 devices, there are 4" in text(found, "small")
    # scores of four rows of 16k tokens
    found = search(
        configuration(SMALL + "--data.sequence_length 16384 --model.attention_dropout 0.1"),
        A100,
        num_gpus=4,
        gpus_per_node=2,
    )
    assert found.own is not None and not found.own.memory.fits and found.rank(found.own.layout) is None
    assert "own, does not fit" in text(found, "small")


@pytest.mark.parametrize(
    "flags, name, gpus, message",
    [
        ("", "gpt_22b", 1, "no layout of 1 a100 fits: the smallest, one device, .* needs .* use more GPUs"),
        ("--train.global_batch 3 --model.num_layers 2", None, 7, "data x fsdp must divide train.global_batch 3"),
        ("", "gpt_22b", 12, "12 GPUs do not fill nodes of 8: use a multiple of 8"),
    ],
)
def test_searches_without_an_answer_say_what_to_change(flags: str, name: str | None, gpus: int, message: str):
    with pytest.raises(UserError, match=message):
        search(configuration(flags, name), A100, num_gpus=gpus, gpus_per_node=8)


def compiled_as(small: Search, seconds: dict[str, float], too_big: set[str], asked: list[Layout]) -> Any:
    """Plans of a compiler that finds these seconds, by mesh, and these meshes a GPU too big."""

    def compile_layout(config: Configuration) -> Any:
        layout = own_layout(config, 4)
        asked.append(layout)
        found = next(one for one in small.candidates if one.layout == layout)
        more = 2 * found.estimate.capacity if layout.mesh_text in too_big else 0
        memory = replace(found.estimate, temporaries=found.estimate.temporaries + more)
        step = seconds.get(layout.mesh_text, found.formula.step_seconds)
        return SimpleNamespace(prediction=replace(found.formula, step_seconds=step), memory=memory)

    return compile_layout


def test_the_compiled_are_ranked_anew_and_the_unfit_dropped(small: Search, tmp_path: Path):
    meshes = list(dict.fromkeys(one.layout.mesh_text for one in small.candidates))
    asked: list[Layout] = []
    # the first turns out too big, the second slower than the third
    found = compile_best(small, 2, compiled_as(small, {meshes[1]: 9.0}, {meshes[0]}, asked))
    assert [layout.mesh_text for layout in asked] == meshes[:3]
    assert [one.layout.mesh_text for one in found.candidates[:2]] == [meshes[2], meshes[1]]
    assert [one.layout.mesh_text for one in found.unfit] == [meshes[0]]
    assert len(found.candidates) == len(small.candidates) - 1 and found.rank(asked[0]) is None
    told = text(found, "small", tokens=1e9)
    assert "3 compiled, 1 of them did not fit" in told and "1e+09 tokens take" in told
    assert f"type: {found.best.layout.flags(found.config)}" in told
    assert "(rank 2, compiled)" in told and "own" in told
    write_json(found, "small", tmp_path / "found.json")
    plain = json.loads((tmp_path / "found.json").read_text())
    assert [one["rank"] for one in plain["candidates"]] == list(range(1, len(found.candidates) + 1))
    assert plain["candidates"][0]["compiled"] and not plain["unfit"][0]["fits"]
    with pytest.raises(UserError, match="none of the 6 best layouts fits when compiled"):
        compile_best(small, 2, compiled_as(small, {}, set(meshes), asked))


def test_the_reasons_are_differences_of_the_breakdowns(small: Search):
    told = text(small, "small")
    best = small.best
    other = next(one for one in small.candidates if one.layout.sizes != best.layout.sizes)
    difference = best.formula.step_seconds - other.formula.step_seconds
    line = next(line for line in told.splitlines() if f"(rank {small.rank(other.layout)}, " in line)
    assert f": {difference:+.3g} s, of it" in line
    for axis, part in best.layout.sizes.items():
        if part != other.layout.sizes[axis]:
            assert f"{axis} {part} instead of {other.layout.sizes[axis]}" in line


def test_the_command_needs_a_gpu():
    with pytest.raises(UserError, match="say for which GPU: --gpu a100"):
        main(["--search", "--gpus", "8"])


@pytest.mark.slow
def test_the_command_compiles_the_best(capsys: pytest.CaptureFixture, tmp_path: Path):
    path = tmp_path / "found.json"
    flags = SMALL + f"--mesh.tensor 2 --search --gpu a100 --gpus 4 --gpus-per-node 4 --top 2 --json {path}"
    assert main(flags.split()) == 0
    plain = json.loads(path.read_text())
    assert [one["compiled"] for one in plain["candidates"][:3]] == [True, True, False]
    assert plain["candidates"][0]["step_seconds"] <= plain["candidates"][1]["step_seconds"]
    assert "--mesh." in plain["candidates"][0]["flags"] and "compiled" in capsys.readouterr().out
