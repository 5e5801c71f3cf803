"""Searches: what is enumerated, how it is ranked, and that a paper's own layout is not beaten by chance."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from jaxtron.config import UserError, load
from jaxtron.plan.__main__ import main
from jaxtron.plan.formula.prediction import predict
from jaxtron.plan.machine import Group, axes_group, machine_named
from jaxtron.plan.plan import Plan
from jaxtron.plan.search.candidates import LEAST_PART, CandidateLayout, layouts, own_layout
from jaxtron.plan.search.ranking import ranking_text, write_ranking
from jaxtron.plan.search.search import MARGIN, SearchResult, compile_best, search
from jaxtron.run.configuration import Configuration
from jaxtron.sharding.folding import FLAGS
from jaxtron.words import readable_bytes

A100, H100 = machine_named("a100"), machine_named("h100")
CONFIGS = Path(__file__).parents[2] / "configs"
SMALL = "--model.num_layers 8 --model.hidden_size 512 --model.num_heads 8 --model.vocab_size 1024 "
SMALL += "--train.global_batch 16 --data.sequence_length 256 "


def configuration(flags: str = "", name: str | None = None) -> Configuration:
    return load(Configuration, None if name is None else CONFIGS / f"{name}.yaml", flags.split()).resolved()


# enough layouts to rank
FEW = SMALL + "--model.num_layers 4 --train.global_batch 8 --mesh.tensor 2 "


@pytest.fixture(scope="module")
def small() -> SearchResult:
    return search(configuration(FEW), A100, num_gpus=4, gpus_per_node=4)


@pytest.mark.parametrize(
    "name, num_gpus",
    [
        pytest.param("gpt_22b", 8, marks=pytest.mark.slow),
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
    assert {layout.recompute for layout in found} == {"none", "selective", "all_but_cores", "full"}
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


def test_long_sequences_are_split_and_short_ones_are_not():
    assert {layout.context for layout in layouts(configuration(SMALL), 16, 4)} == {1}
    long = f"--data.sequence_length {4 * LEAST_PART}"
    found = list(layouts(configuration(SMALL + long), 16, 4))
    assert len(found) == len(set(found)) and {layout.context for layout in found} == {1, 2, 4}
    for layout in found[::20]:
        assert layout.data * layout.fsdp * layout.tensor * layout.pipe * layout.context == 16
        layout.config(configuration(SMALL + long)).check_mesh(layout.sizes)
    # parts of a sequence share the state as copies of it do
    levels = {layout.zero for layout in found if layout.context > 1 and layout.data == 1}
    assert levels == {"none", "optimizer", "parameters"}
    assert "parameters" not in {layout.zero for layout in found if layout.context == 1}
    # what is dropped does not depend on the pieces
    drops = configuration(f"{SMALL}{long} --model.attention_dropout 0.1")
    assert {layout.context for layout in layouts(drops, 16, 4)} == {1, 2, 4}


def test_the_own_number_of_parts_is_tried_however_short_they_are():
    config = configuration(SMALL + "--mesh.context 4")
    found = list(layouts(config, 8, 4))
    own = own_layout(config, 8)
    assert own.sizes == {"pipe": 1, "data": 2, "fsdp": 1, "context": 4, "tensor": 1} and own in found
    assert {layout.context for layout in found} == {1, 4}


def test_attention_over_parts_is_the_configurations_where_it_can_be():
    # heads 8: eight ways are all that all_to_all can split, so beside tensor 2 a ring does it
    config = configuration(SMALL + "--data.sequence_length 65536 --mesh.context 8 --context.method all_to_all")
    found = {(layout.context, layout.tensor, layout.attention.method) for layout in layouts(config, 16, 2)}
    assert (8, 1, "all_to_all") in found and (8, 2, "ring") in found and (1, 1, "ring") in found
    one = next(layout for layout in layouts(config, 16, 2) if layout.context == 1)
    assert "--context.method ring" in one.flags(config) and "--mesh.context 1" in one.flags(config)
    assert "context 1 instead of 8" in one.differences(own_layout(config, 16))


def test_fsdp_is_tried_inside_of_context_where_not_both_lie_in_a_node():
    base = SMALL + "--data.sequence_length 65536 --train.global_batch 8 --mesh.data 1 --mesh.fsdp 2 --mesh.context 4"
    config = configuration(base)
    found = list(layouts(config, 8, 4))
    inside = [layout for layout in found if layout.order != FLAGS]
    assert inside and all(one.fsdp > 1 and one.context > 1 for one in inside) and len(set(found)) == len(found)
    assert {layout.order for layout in layouts(config, 8, 8)} == {FLAGS}
    one = next(one for one in inside if (one.fsdp, one.context) == (2, 4))
    assert one.mesh_text == "context 4 x fsdp 2" and "mesh.order context-fsdp instead of fsdp-context" in str(
        one.differences(own_layout(config, 8))
    )
    assert "--mesh.order pipe data context fsdp tensor" in one.flags(config)
    # what its flags give is its own
    again = configuration(f"{base} {one.flags(config)}")
    assert own_layout(again, 8) == one and one in set(layouts(again, 8, 4))
    # and what crosses nodes is what the order says
    usual, inner = (
        [axes_group(layout.config(config).mesh.refined(layout.sizes).sizes, (flag,), 4) for flag in ("fsdp", "context")]
        for layout in (own_layout(config, 8), one)
    )
    assert (usual, inner) == ([Group(2, 1), Group(4, 4)], [Group(2, 2), Group(4, 2)])


def test_a_recipe_of_long_sequences_is_its_own_layout():
    """`llama3_8b_128k` on its 64 GPUs: the layout of the file, and neighbours of it."""
    config = configuration(name="llama3_8b_128k")
    own = own_layout(config, 64)
    assert own.sizes == {"pipe": 1, "data": 1, "fsdp": 8, "context": 8, "tensor": 1} and own.flags(config) == ""
    found = set(layouts(config, 64, 8))
    assert own in found and {layout.context for layout in found} == {1, 2, 4, 8, 16}
    # by formula it takes what a plan without a compiler's overlap says
    assert (
        predict(own.config(config), own.sizes, H100).step_seconds
        == predict(config, config.mesh.shape(64), H100).step_seconds
    )


def test_a_search_ranks_layouts_that_split_sequences():
    words = f"--model.num_layers 2 --data.sequence_length {2 * LEAST_PART} --mesh.data 1 --mesh.context 2"
    config = configuration(f"{SMALL}{words} --train.global_batch 2")
    found = search(config, H100, num_gpus=2, gpus_per_node=2)
    assert found.own is not None and found.own_problem is None and found.rank(found.own.layout) is not None
    assert {one.layout.context for one in found.candidates} == {1, 2}
    assert "context 2" in ranking_text(found, "small")


def test_layers_of_several_kinds_are_searched() -> None:
    """A pattern that never repeats is cut between any two layers, and its kinds keep what they keep on every mesh."""
    flags = "--model.num_layers 1 --model.pattern M-MM-- --model.position none --model.hidden_size 512 "
    flags += "--model.vocab_size 1024 --data.sequence_length 256 --train.global_batch 16 --train.microbatches 4 "
    config = configuration(flags + "--model.recompute full --mesh.pipe 2")
    found = search(config, H100, num_gpus=2, gpus_per_node=2)
    assert found.own is not None and found.own.memory.fits and found.best.prediction.step_seconds > 0
    assert found.best.prediction.step_seconds <= found.own.prediction.step_seconds
    meshes = {one.layout.mesh_text for one in found.candidates}
    assert meshes == {"data 2", "fsdp 2", "tensor 2", "pipe 2"} and found.num_refused == found.num_too_big == 0
    assert {one.layout.pipeline.chunks for one in found.candidates if one.layout.pipe == 2} == {1, 3}
    kept = {one.layout.recompute: one.memory.activations for one in found.candidates if one.layout.pipe == 1}
    assert kept["full"] < kept["none"]


def test_candidates_are_ranked_by_time_and_fit(small: SearchResult):
    seconds = [one.formula.step_seconds for one in small.candidates]
    assert seconds == sorted(seconds)
    assert all(one.memory.total <= (1 + MARGIN) * one.memory.capacity for one in small.candidates)
    assert small.num_layouts == small.num_refused + small.num_too_big + len(small.candidates)
    assert small.own is not None and small.own in small.candidates and small.own_problem is None
    assert small.own.layout == own_layout(configuration(FEW), 4)


def test_flags_give_the_layout(small: SearchResult):
    base = configuration(FEW)
    for one in small.candidates[:: max(1, len(small.candidates) // 25)]:
        config = configuration(FEW + one.layout.flags(base))
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
    assert (
        found.own is None
        and "needs 8 devices, there are 4; change the mesh, set one axis to -1, or plan for them: --gpus 8"
        in ranking_text(found, "small")
    )
    # scores of four rows of 16k tokens
    found = search(
        configuration(SMALL + "--data.sequence_length 16384 --model.attention.implementation materialized"),
        A100,
        num_gpus=4,
        gpus_per_node=2,
    )
    assert found.own is not None and not found.own.memory.fits and found.rank(found.own.layout) is None
    assert "own, does not fit" in ranking_text(found, "small")


@pytest.mark.parametrize(
    "flags, name, gpus, message",
    [
        (
            "",
            "gpt_22b",
            1,
            "no layout of 1 a100 fits: the smallest, one device, .* [24] microbatches, .* GiB a GPU; use more GPUs",
        ),
        (
            "--train.global_batch 3 --model.num_layers 2",
            None,
            7,
            "train.global_batch 3 must be a multiple of data x fsdp",
        ),
        ("", "gpt_22b", 12, "12 GPUs do not fill nodes of 8: use a multiple of 8"),
    ],
)
def test_searches_without_an_answer_say_what_to_change(flags: str, name: str | None, gpus: int, message: str):
    with pytest.raises(UserError, match=message):
        search(configuration(flags, name), A100, num_gpus=gpus, gpus_per_node=8)


def compiled_as(small: SearchResult, seconds: dict[str, float], too_big: set[str], asked: list[CandidateLayout]) -> Any:
    """Plans of a compiler that finds these seconds, by mesh, and these meshes a GPU too big."""

    def compile_layout(config: Configuration) -> Any:
        layout = own_layout(config, 4)
        asked.append(layout)
        found = next(one for one in (*small.candidates, small.own) if one.layout == layout)
        more = 2 * found.estimate.capacity if layout.mesh_text in too_big else 0
        memory = replace(found.estimate, temporaries=found.estimate.temporaries + more)
        step = seconds.get(layout.mesh_text, found.formula.step_seconds)
        breakdown = replace(found.formula.breakdown, bubble=step - found.formula.step_seconds)
        prediction = replace(found.formula, step_seconds=step, breakdown=breakdown)
        return Mock(spec=Plan, prediction=prediction, memory=memory)

    return compile_layout


def meshes_of(small: SearchResult) -> list[str]:
    """Of the candidates, in order; the own layout's is not among the first."""
    meshes = list(dict.fromkeys(one.layout.mesh_text for one in small.candidates))
    assert small.own is not None and small.own.layout.mesh_text not in meshes[:3]
    return meshes


def test_the_compiled_are_ranked_among_themselves_and_the_unfit_dropped(small: SearchResult, tmp_path: Path):
    meshes, asked = meshes_of(small), []
    # the first turns out too big, the second slower than the third
    found = compile_best(small, 2, compiled_as(small, {meshes[1]: 9.0}, {meshes[0]}, asked))
    assert [layout.mesh_text for layout in asked] == [*meshes[:3], small.own.layout.mesh_text]
    own = small.own.layout
    assert {one.layout.mesh_text for one in found.compiled} == {meshes[1], meshes[2], own.mesh_text}
    assert [one.layout.mesh_text for one in found.unfit] == [meshes[0]]
    assert len(found.candidates) == len(small.candidates) - 4 and found.rank(asked[0]) is None
    # a compiled time is ranked beside compiled ones, a formula's beside formulas'
    for ranking, is_compiled in ((found.compiled, True), (found.candidates, False)):
        seconds = [one.prediction.step_seconds for one in ranking]
        assert seconds == sorted(seconds) and all((one.plan is not None) is is_compiled for one in ranking)
    told = ranking_text(found, "small", tokens=1e9)
    assert "4 compiled, 1 of them too big" in told and "1.00 billion tokens take" in told
    assert f"type: {found.best.layout.flags(found.config)}" in told
    write_ranking(found, "small", tmp_path / "found.json")
    plain = json.loads((tmp_path / "found.json").read_text())
    assert all(one["compiled"] for one in (*plain["compiled"], *plain["unfit"], plain["own"]))
    assert not any(one["compiled"] for one in plain["by_formula"]) and not plain["unfit"][0]["fits"]
    assert [one["own"] for one in plain["compiled"]].count(True) == 1
    everything = {*meshes, own.mesh_text}
    with pytest.raises(UserError, match="none of the 6 best layouts fits when compiled"):
        compile_best(small, 2, compiled_as(small, {}, everything, asked))


@pytest.mark.parametrize(
    "own_seconds, gain",
    [
        (2.0, "50.0% less time than the configuration's own layout (1 s, 2 s, compiled)\n"),
        (
            1.005,
            "0.5% less time than the configuration's own layout (1 s, 1 s, compiled): too little to tell them apart",
        ),
        (1.0, "the configuration's own layout is the fastest of those compiled"),
        (0.5, "the configuration's own layout is the fastest of those compiled"),
    ],
)
def test_the_own_layout_is_compiled_and_the_gain_over_it_is_of_compiled_steps(
    small: SearchResult, own_seconds: float, gain: str
):
    meshes, own = meshes_of(small), small.own.layout
    # by formula the own layout is slower; what its formula says plays no part
    assert small.own.formula.step_seconds > small.best.formula.step_seconds
    found = compile_best(small, 1, compiled_as(small, {meshes[0]: 1.0, own.mesh_text: own_seconds}, set(), []))
    assert found.own.plan is not None and found.own in found.compiled and len(found.compiled) == 2
    told = ranking_text(found, "small")
    assert gain in told
    by_formula = told[told.index("by formula, of each mesh") : told.index("type: ")]
    assert own.mesh_text + " " not in by_formula and "own" in told[: told.index("by formula, of each mesh")]
    assert ("nothing, it is the configuration as it is" in told) == (own_seconds <= 1.0)


def test_an_own_layout_too_big_when_compiled_is_told_with_the_compilers_bytes(small: SearchResult):
    own = small.own.layout.mesh_text
    found = compile_best(small, 1, compiled_as(small, {}, {own}, []))
    told = ranking_text(found, "small")
    assert (
        found.own in found.unfit and f"own layout does not fit: {readable_bytes(found.own.memory.total)} a GPU" in told
    )
    assert "own, does not fit" in told


def test_how_far_formulas_are_off_says_what_else_may_be_faster(small: SearchResult):
    meshes = meshes_of(small)
    # twice its formula: all whose formula is at most as long may be faster, the own layout is not
    first = small.candidates[0].formula.step_seconds
    own = {small.own.layout.mesh_text: 2 * small.own.formula.step_seconds}
    told = ranking_text(compile_best(small, 1, compiled_as(small, own | {meshes[0]: 2 * first}, set(), [])), "small")
    assert "compiled steps take 2.00 times as long as their formulas say" in told and "would be faster" not in told
    told = ranking_text(compile_best(small, 1, compiled_as(small, own | {meshes[0]: 3 * first}, set(), [])), "small")
    assert "compiled steps take 2.00 to 3.00 times" in told and "would be faster than the first" in told


def test_the_reasons_are_differences_of_the_breakdowns(small: SearchResult):
    told = ranking_text(small, "small")
    best = small.best
    other = next(one for one in small.candidates if one.layout.sizes != best.layout.sizes)
    difference = best.formula.step_seconds - other.formula.step_seconds
    line = next(line for line in told.splitlines() if f"(rank {small.rank(other.layout)}" in line)
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
    assert len(plain["compiled"]) == 3 and plain["own"] in plain["compiled"]
    assert plain["compiled"][0]["step_seconds"] <= plain["compiled"][1]["step_seconds"]
    assert "--mesh." in plain["compiled"][0]["flags"] and "compiled" in capsys.readouterr().out
