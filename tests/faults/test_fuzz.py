"""A sample of the damaged inputs of `make fuzz`, and that what they are to find is found."""

import random
from collections import Counter

import pytest

from tests.faults import mutations
from tests.faults.bounds import TooLong, bounded
from tests.faults.fuzz import ACCEPTED, FINDING, REFUSED, SEED, Bench, bench, summary
from tests.faults.inputs import TARGETS, Flags, Target

SHORT, LONG = 212, 3000


@pytest.fixture(scope="module")
def one():
    """A bench that the tests of the file share."""
    with bench() as found:
        yield found


def check(one: Bench, numbers: range) -> None:
    verdicts = [one.run(SEED, number) for number in numbers]
    wrong = [f"{found.case} {found.target}: {found.why}" for found in verdicts if found.verdict == FINDING]
    assert not wrong, "\n".join(wrong)
    counts = Counter(found.verdict for found in verdicts)
    # most damage is noticed, and some of it is none
    assert counts[REFUSED] > counts[ACCEPTED] > 0


def test_a_sample_of_damaged_inputs(one: Bench):
    check(one, range(SHORT))


@pytest.mark.slow
def test_thousands_of_damaged_inputs(one: Bench):
    check(one, range(SHORT, LONG))


def raises(error: BaseException):
    def read() -> None:
        raise error

    return read


def loops() -> None:
    while True:
        pass


@pytest.mark.parametrize(
    ("target", "why"),
    [
        (Target("a defect", "text.txt", raises(KeyError("a"))), "a traceback: KeyError"),
        (Target("a panic", "text.txt", raises(BaseException("a"))), "a panic: BaseException"),
        (Target("an exit", "text.txt", raises(SystemExit(3))), "a traceback: SystemExit"),
        (Target("memory", "text.txt", lambda: bytearray(1 << 40)), "a traceback: MemoryError"),
        (Target("silence", "text.txt", lambda: None, rule=lambda path: "it is wrong"), "taken for good: it is wrong"),
        (Target("another result", "text.txt", lambda: random.random(), is_whole=True), "gives something else"),
        (Target("nameless", "text.txt", ("train", "nowhere.yaml"), named=("text.txt",)), "does not name text.txt"),
    ],
    ids=lambda value: value.name if isinstance(value, Target) else "",
)
def test_what_is_wrong_is_a_finding(one: Bench, target: Target, why: str):
    found = one.run(SEED, 1, target)
    assert found.verdict == FINDING and why in found.why
    assert "1 a" in summary([vars(found) | {"target": "a"}]) and one.run(SEED, 0).verdict != FINDING


def test_a_case_has_bounds():
    with pytest.raises(TooLong), bounded(seconds=0.2):
        loops()
    with pytest.raises(MemoryError), bounded(most=1 << 28):
        bytearray(1 << 30)
    with bounded() as spent:
        block = bytearray(64 << 20)
        block[:] = b"a" * len(block)
    assert spent.bytes > 100 << 20


def test_a_case_is_its_seed_s_and_changes_nothing_for_the_next(one: Bench):
    first, again = one.run(SEED, 7), one.run(SEED, 7)
    assert (first.verdict, first.why) == (again.verdict, again.why)
    target = next(found for found in TARGETS if found.name == "index")
    assert isinstance(target, Target)
    whole = (one.folder / target.file).read_bytes()
    one.run(SEED, 3, target)
    assert (one.folder / target.file).read_bytes() == whole


def test_every_damage_changes_something(one: Bench):
    for target in TARGETS:
        if isinstance(target, Flags):
            continue
        content = (one.folder / target.file).read_bytes()
        made = {target.damaged(content, random.Random(number)) for number in range(30)}
        assert len(made - {content}) > 15, target.name


def test_aliases_that_stand_for_more_than_anyone_means(one: Bench):
    """Small files that Python would write out for ever."""
    target = next(found for found in TARGETS if found.name == "configuration")
    assert isinstance(target, Target)
    for text in (mutations.bomb(40), "a: &a {b: *a}\n", "a: &a [*a, *a]\n"):
        changed = Target(
            "aliases", target.file, target.read, (lambda _, __, text=text: text.encode(),), is_text_only=True
        )
        found = one.run(SEED, 0, changed)
        assert found.verdict == REFUSED and "alias" in found.why, found
