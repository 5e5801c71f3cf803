"""Families by name: those of the house, packages of a user's own, and what is wrong with one told in a line."""

import sys
from pathlib import Path

import pytest

from jaxtron.config import UserError
from jaxtron.data.batch import TokenBatch
from jaxtron.models.families import FAMILIES, family_named, program_named
from jaxtron.models.program import Program
from jaxtron.plan.__main__ import main as plan
from jaxtron.run.configuration import configuration_of
from jaxtron.train.__main__ import main as train
from tests.support.commands import run_main

TOY = "tests.toy_family"
KNOWN = ", ".join(FAMILIES)
WHOLE = "model.family own.model: "
BARE = "from jaxtron.models.family import Family, FamilyConfig\n"
MADE = "FAMILY = Family(config={}, program='', stacks=dict, num_parameters=int, flops_per_token=float)\n"


@pytest.mark.parametrize("name", [*FAMILIES, TOY])
def test_both_halves_of_a_family_agree(name: str):
    family, program, config = family_named(name), program_named(name), configuration_of(name)()
    assert isinstance(program, Program) and type(config.model) is family.config
    assert family.continues_text == (program.predict is not None)
    assert (family.writes is not None) == (program.steps is not None)
    assert (family.writes == "answer") == (program.answers is not None)
    assert family.text_loss is None or (program.batch is TokenBatch and family.text_loss in program.losses)
    assert config.vocabulary_size() == config.model.vocab_size
    assert family.num_parameters(config.model, 16) > 0 and min(family.stacks(config.model).values()) > 0


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("decodr", "no model.family 'decodr'; did you mean decoder?"),
        ("mamba", f"no model.family 'mamba'; it is one of {KNOWN}, or the dotted name of a package with a module fam"),
        (".decoder", "no model.family '.decoder'; did you mean decoder?"),
        ("own/model", f"no model.family 'own/model'; it is one of {KNOWN}, or the dotted name of a package"),
        ("json", f"model.family json: No module named 'json.family'; it is one of {KNOWN}, or the dotted name of"),
        ("own.nothing", "model.family own.nothing: No module named 'own'"),
    ],
)
def test_no_such_family(name: str, message: str):
    for main in (train, plan):
        ended = run_main(main, ["--model.family", name, "--devices", "8"])
        assert ended.code != 0 and ended.out == "" and ended.err.count("\n") == 1 and message in ended.err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import nowhere\n", WHOLE + "No module named 'nowhere'"),
        ("width = 1\n", WHOLE + "own.model.family has no FAMILY made by jaxtron.models.family.Family"),
        ("FAMILY = 'decoder'\n", WHOLE + "own.model.family has no FAMILY made by"),
        ("x = 1\ny = z\n", "own.model.family cannot be imported: NameError: name 'z' is not defined (/"),
        ("x = (\n", "own.model.family cannot be imported: SyntaxError: "),
        (BARE + "FAMILY = Family(config=FamilyConfig)\n", "own.model.family cannot be imported: "),
        (
            BARE + MADE.format("FamilyConfig") + "object.__setattr__(FAMILY, 'config', dict)\n",
            WHOLE + "the config of its FAMILY is <class 'dict'>, no subclass of FamilyConfig",
        ),
        (
            BARE + "class Own(FamilyConfig):\n    width: int\n" + MADE.format("Own"),
            WHOLE + "Own.width has no default; all settings of a model have one",
        ),
    ],
)
def test_what_is_wrong_with_a_package(tmp_path: Path, monkeypatch, text: str, message: str):
    (tmp_path / "own" / "model").mkdir(parents=True)
    (tmp_path / "own" / "model" / "family.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    family_named.cache_clear()
    ended = run_main(train, ["--model.family", "own.model", "--devices", "8"])
    for name in [name for name in sys.modules if name.partition(".")[0] == "own"]:
        del sys.modules[name]
    assert ended.code != 0 and ended.out == "" and ended.err.count("\n") == 1 and message in ended.err


PROGRAM = """
from dataclasses import dataclass
from typing import Any
from jaxtron.data.batch import rows, weight
from jaxtron.models.program import Program

@dataclass(frozen=True)
class Batch:
    tokens: Any = rows("seq")
    weights: Any = weight("seq", normalizes="tokens")

"""
SAID = "jaxtron.models.family import Family, FamilyConfig\n\nFAMILY = Family(FamilyConfig, 'own.model.program', stacks="
SAID = "from " + SAID + "lambda config: {}, num_parameters=lambda *_: 1, flops_per_token=lambda *_: 1.0"


@pytest.mark.parametrize(
    ("family", "program", "message"),
    [
        ("", "PROGRAM = 1\n", "own.model.program has no PROGRAM made by jaxtron.models.program.Program"),
        ("", "import nowhere_to_be_found\n", "No module named 'nowhere_to_be_found', which own.model.program imports"),
        (
            "",
            PROGRAM + "PROGRAM = Program(Batch, {'loss': 'words'}, print, print)\n",
            "the program's 'loss' is a mean over 'words', which no weight of Batch counts: it is one of tokens",
        ),
        (
            ", text_loss='nll'",
            PROGRAM + "PROGRAM = Program(Batch, {'loss': 'tokens'}, print, print)\n",
            "text_loss 'nll' of its FAMILY is none of its PROGRAM's sums, loss",
        ),
        (
            ", continues_text=True",
            PROGRAM + "PROGRAM = Program(Batch, {'loss': 'tokens'}, print, print)\n",
            "its FAMILY says continues_text, and its PROGRAM has no predict",
        ),
        (
            ", writes='answer'",
            PROGRAM + "PROGRAM = Program(Batch, {'loss': 'tokens'}, print, print)\n",
            "its FAMILY says writes 'answer', and its PROGRAM has no steps",
        ),
        (
            ", writes='answer'",
            PROGRAM + "PROGRAM = Program(Batch, {'loss': 'tokens'}, print, print, steps=print)\n",
            "its FAMILY says writes 'answer', and its PROGRAM has no answers",
        ),
        (", vocabulary='words'", "", "vocabulary 'words' of its FAMILY is no setting of FamilyConfig"),
    ],
)
def test_what_is_wrong_with_a_program(tmp_path: Path, monkeypatch, family: str, program: str, message: str):
    (tmp_path / "own" / "model").mkdir(parents=True)
    (tmp_path / "own" / "model" / "family.py").write_text(f"{SAID}{family})\n")
    (tmp_path / "own" / "model" / "program.py").write_text(program)
    monkeypatch.syspath_prepend(tmp_path)
    family_named.cache_clear()
    program_named.cache_clear()
    with pytest.raises(UserError) as found:
        program_named("own.model")
    for name in [name for name in sys.modules if name.partition(".")[0] == "own"]:
        del sys.modules[name]
    assert message in str(found.value) and "\n" not in str(found.value)
