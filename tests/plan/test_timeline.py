"""Small scheduled programs played: what takes its time after the other, what is hidden, what is waited for."""

from collections.abc import Hashable, Sequence

import pytest

from jaxtron.plan.compiled import hlo
from jaxtron.plan.compiled.kernels import Kernel, Kernels
from jaxtron.plan.compiled.timeline import Chosen, Played, Player, Travel, TravelTotals


def seconds(kernel: Kernel) -> float:
    """As many as numbers are read or written; of a pass over n numbers, n."""
    return kernel.moved / 8


def played(body: str, computations: str = "", choose=None, **travels: Travel) -> Played:
    """A program of these lines, with arrays %x4 and %x10 of so many numbers."""
    arrays = "  %x4 = f32[4] parameter(0)\n  %x10 = f32[10] parameter(1)\n"
    module = hlo.parse(
        f"HloModule m, is_scheduled=true\n\n{computations}\nENTRY %main () -> f32[] {{\n{arrays}{body}}}\n"
    )
    named = {name.replace("_", "."): travel for name, travel in travels.items()}
    extra = {} if choose is None else {"choose": choose}
    return Player(Kernels(module), seconds, named, **extra).play("main", "top")


def travel(length: float, link: str = "NVLink", axes: str = "data", **changes: bool) -> Travel:
    return Travel(axes, link, 64.0, length, **{"asynchronous": True, **changes})


def exposed(found: Played) -> dict[str, float]:
    return {axes: totals.exposed for axes, totals in found.travels.items()}


def test_kernels_run_one_after_the_other() -> None:
    found = played("  %a = f32[4] negate(%x4)\n  %b = f32[10] negate(%x10)\n  %c = f32[10] copy(%x10)\n")
    assert found.seconds == 24 and set(found.kernels) == {"elementwise", "copies"}
    assert (found.kernels["elementwise"].launches, found.kernels["elementwise"].read) == (2, 4 * 14)
    assert found.runs == {("main", "c"): 1}


START = "  %g = (f32[4], f32[8]) all-gather-start(%x4), dimensions={0}\n"
DONE = "  %g.done = f32[8] all-gather-done(%g)\n"
PASS = "  %a = f32[10] negate(%x10)\n"


@pytest.mark.parametrize(
    ("body", "length", "step", "waited"),
    [
        (START + PASS + DONE, 6.0, 10.0, 0.0),
        (START + PASS + DONE, 25.0, 25.0, 15.0),
        (START + DONE + PASS, 6.0, 16.0, 6.0),
        ("  %g = f32[8] all-gather(%x4), dimensions={0}\n" + PASS, 6.0, 16.0, 6.0),
    ],
)
def test_what_is_started_is_hidden_until_it_is_waited_for(body: str, length: float, step: float, waited: float) -> None:
    found = played(body, g=travel(length))
    assert found.seconds == step
    assert found.travels == {"data": TravelTotals(1, 64.0, length, waited)}


def test_what_the_compiler_starts_and_runs_at_once_is_exposed() -> None:
    found = played(START + PASS + DONE, g=travel(6.0, asynchronous=False))
    assert found.seconds == 16 and exposed(found) == {"data": 6}


TWO = START + START.replace("%g", "%h") + PASS + DONE.replace("%g", "%h") + DONE


def test_a_link_does_one_thing_after_the_other_and_links_do_not_wait_for_each_other() -> None:
    found = played(TWO, g=travel(8.0, axes="fsdp"), h=travel(8.0))
    assert found.seconds == 16 and exposed(found) == {"fsdp": 0, "data": 6}
    # of what is waited for at the end some was before it on the link
    found = played(TWO, g=travel(12.0, axes="fsdp"), h=travel(8.0))
    assert found.seconds == 20 and exposed(found) == {"fsdp": 2, "data": 8}
    found = played(TWO, g=travel(8.0, axes="fsdp"), h=travel(8.0, link="network"))
    assert found.seconds == 10 and exposed(found) == {"fsdp": 0, "data": 0}


def test_messages_between_stages_are_not_waited_for() -> None:
    found = played(START + DONE, g=travel(8.0, axes="pipe", is_message=True))
    assert found.seconds == 0 and found.travels["pipe"] == TravelTotals(1, 64.0, 8.0, 0.0)


def test_copies_beside_other_work_cost_what_is_waited_for() -> None:
    fused = """%row () -> f32[10] {
  %p = f32[3,10] parameter(0)
  %i = s32[] parameter(1)
  ROOT %r = f32[1,10] dynamic-slice(%p, %i, %i), dynamic_slice_sizes={1,10}
}
"""
    start = "  %t = f32[3,10] parameter(2)\n  %n = s32[] parameter(3)\n"
    start += "  %s = ((f32[3,10], s32[]), f32[1,10], u32[]) fusion-start(%t, %n), kind=kLoop, calls=%row\n"
    done, short = "  %s.done = f32[1,10] fusion-done(%s)\n", "  %b = f32[4] negate(%x4)\n"
    # ten numbers and an index
    length = (2 * 40 + 4) / 8
    hidden = played(start + PASS + short + done, fused)
    assert hidden.seconds == 14 and hidden.kernels["buffers"].seconds == 0 and hidden.kernels["buffers"].read == 44
    found = played(start + short + done, fused)
    assert found.seconds == length and found.kernels["buffers"].seconds == length - 4
    # what is no copy has the cores to itself
    at_once = played(
        (start + short + done).replace("%row", "%minus"),
        fused
        + fused.replace("row", "minus")
        .replace("  ROOT %r =", "  %r =")
        .replace("{1,10}\n}", "{1,10}\n  ROOT %m = f32[1,10] negate(%r)\n}"),
    )
    assert at_once.seconds == length + 4


BODIES = """%body () -> f32[] {
  %y = f32[4] parameter(0)
  %a = f32[4] negate(%y)
  %g = (f32[4], f32[8]) all-gather-start(%y), dimensions={0}
  %c = f32[4] copy(%y)
  ROOT %g.done = f32[8] all-gather-done(%g)
}

%condition () -> pred[] {
  %i = s32[] parameter(0)
  ROOT %less = pred[] compare(%i, %i), direction=EQ
}
"""
LOOP = "  %w = f32[8] while(%x4), condition=%condition, body=%body"


def test_loops_run_as_often_as_they_say_and_once_where_they_do_not() -> None:
    known = played(LOOP + ', backend_config={"known_trip_count":{"n":"5"}}\n', BODIES, g=travel(7.0))
    assert known.seconds == 5 * (4 + 7) and known.travels["data"] == TravelTotals(5, 320.0, 35.0, 15.0)
    assert known.kernels["elementwise"].launches == 5 and known.runs == {("body", "c"): 5}
    assert played(LOOP + "\n", BODIES, g=travel(7.0)).seconds == 11
    # what is under way beside a loop is hidden by it
    around = played(
        START.replace("%g", "%h") + LOOP + "\n" + DONE.replace("%g", "%h"), BODIES, g=travel(1.0), h=travel(9.0)
    )
    assert around.seconds == 9 and exposed(around)["data"] == 1
    assert played("  %k = f32[8] call(%x4), to_apply=%body\n", BODIES, g=travel(7.0)).seconds == 11


BRANCHES = "%short () -> f32[] {\n  %y = f32[4] parameter(0)\n  ROOT %a = f32[4] negate(%y)\n}\n\n"
BRANCHES += "%long () -> f32[] {\n  %y = f32[9] parameter(0)\n  ROOT %a = f32[9] negate(%y)\n}\n"
CHOICE = "  %k = f32[] conditional(%x4, %x4, %x4), true_computation=%long, false_computation=%short\n"


def test_a_choice_takes_its_longest_branch_unless_told_how_often_each() -> None:
    assert played(CHOICE, BRANCHES).seconds == 9
    numbered = "  %k = f32[] conditional(%x4, %x4, %x4), branch_computations={%short, %long}\n"
    assert played(numbered, BRANCHES).seconds == 9
    seen = []

    def choose(conditional: hlo.Instruction, place: Hashable) -> Sequence[Chosen]:
        seen.append(place)
        return [Chosen("short", 0.75, "in"), Chosen("long", 0.25, "in")]

    found = played(CHOICE, BRANCHES, choose)
    assert found.seconds == 0.75 * 4 + 0.25 * 9 and found.kernels["elementwise"].launches == 1 and seen == ["top"]
