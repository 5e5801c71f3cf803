"""What a user meets: a file, its parent, flags, `--help`, and one line for each mistake."""

import enum
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Literal

import pytest
from pydantic import Field, model_validator

from jaxtron.command import configure, run_command
from jaxtron.config import Config, UserError, dump, load, settings


class Color(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Scaling(Config):
    """A section that may be absent."""

    factor: float = 8.0
    """How far."""


class Mesh(Config):
    """Sizes."""

    data: int = Field(-1, ge=-1, description="replicas")
    tensor: int = Field(1, ge=1, description="parts of a layer")

    @model_validator(mode="after")
    def _check(self) -> "Mesh":
        if self.data == 0:
            raise UserError("mesh.data must not be 0: use -1 to fill")
        return self


class Adam(Config):
    """Adam."""

    kind: Literal["adam"] = "adam"
    learning_rate: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.95)


class Plain(Config):
    """Gradient descent."""

    kind: Literal["plain"] = "plain"
    learning_rate: float = 0.1


class Run(Config):
    """Everything."""

    seed: int = Field(0, ge=0, description="start of all randomness")
    name: str = "run"
    limit: int | None = None
    path: str | tuple[str, ...] = "text"
    folders: tuple[Path, ...] = ()
    style: Literal["none", "cosine", "linear"] = "cosine"
    color: Color = Color.RED
    recompute: Literal["none", "full"] | tuple[Literal["mlp", "norm"], ...] = "none"
    resume: bool = True
    labels: dict[str, int] = {}
    mesh: Mesh = Mesh()
    scaling: Scaling | None = None
    optimizer: Adam | Plain = Field(Adam(), discriminator="kind")


def write(folder: Path, name: str, text: str) -> Path:
    """A YAML file."""
    path = folder / name
    path.write_text(textwrap.dedent(text))
    return path


def message(*overrides: str, path: Path | None = None) -> str:
    """The one line that a bad configuration gets."""
    with pytest.raises(UserError) as caught:
        load(Run, path, overrides)
    line = str(caught.value)
    assert "\n" not in line
    return line


def test_defaults():
    assert load(Run, None) == Run()


def test_flags_of_every_type():
    config = load(
        Run,
        None,
        "--seed=3 --name 1e-4 --limit 12 --mesh.tensor 4 --mesh.data -1 --optimizer.learning_rate 3e-4 "
        "--optimizer.betas 0.8 1 --style none --color blue --resume false --labels.a 1 --labels.b 2 "
        "--scaling.factor 2 --folders a b --path x --recompute mlp norm".split(),
    )
    assert config == Run(
        seed=3,
        name="1e-4",
        limit=12,
        mesh=Mesh(tensor=4),
        optimizer=Adam(learning_rate=3e-4, betas=(0.8, 1.0)),
        style="none",
        color=Color.BLUE,
        resume=False,
        labels={"a": 1, "b": 2},
        scaling=Scaling(factor=2.0),
        folders=(Path("a"), Path("b")),
        path="x",
        recompute=("mlp", "norm"),
    )


@pytest.mark.parametrize(
    "flags",
    ["--folders a b", "--folders a --folders b", "--folders=[a,b]", '--folders ["a","b"]', "--folders=a --folders=b"],
)
def test_ways_to_write_a_list(flags: str):
    assert load(Run, None, flags.split()).folders == (Path("a"), Path("b"))


def test_none_and_bare_switch_and_alternatives(tmp_path: Path):
    path = write(tmp_path, "a.yaml", "limit: 3\nresume: false\nscaling: {factor: 3}\n")
    config = load(Run, path, ["--limit", "none", "--resume", "--scaling", "none", "--optimizer.kind", "plain"])
    assert (config.limit, config.resume, config.scaling, config.optimizer) == (None, True, None, Plain())
    assert load(Run, None, ["--optimizer", "{kind: plain, learning_rate: 1e-2}"]).optimizer == Plain(learning_rate=0.01)


def test_last_flag_wins_and_flag_beats_file(tmp_path: Path):
    path = write(tmp_path, "a.yaml", "seed: 1\nmesh: {tensor: 2}\n")
    config = load(Run, path, ["--seed", "2", "--seed", "3"])
    assert (config.seed, config.mesh.tensor) == (3, 2)


def test_yaml_numbers_and_words(tmp_path: Path):
    path = write(
        tmp_path, "a.yaml", "optimizer: {learning_rate: 1e-4}\nname: no\nseed: 1_000\nlabels: {x: 010}\nlimit: ~\n"
    )
    config = load(Run, path)
    assert (config.optimizer.learning_rate, config.name, config.seed, config.labels["x"]) == (1e-4, "no", 1000, 10)


def test_extends_a_chain_merging_sections(tmp_path: Path):
    (tmp_path / "base").mkdir()
    write(tmp_path / "base", "a.yaml", "seed: 1\nmesh: {data: 2, tensor: 2}\n")
    write(tmp_path, "b.yaml", "extends: base/a.yaml\nmesh: {tensor: 4}\n")
    path = write(tmp_path, "c.yaml", "extends: b.yaml\nname: c\n")
    assert load(Run, path) == Run(seed=1, name="c", mesh=Mesh(data=2, tensor=4))


def test_dump_reads_back(tmp_path: Path):
    config = Run(name="1e-4", limit=None, path=("no", "010"), optimizer=Adam(learning_rate=1e-12), color=Color.BLUE)
    assert load(Run, write(tmp_path, "a.yaml", dump(config))) == config


def test_errors_of_files(tmp_path: Path):
    assert "does not exist" in message(path=tmp_path / "none.yaml")
    path = write(tmp_path, "gpt_tiny.yaml", "seed: 1\n")
    assert f"did you mean {path}?" in message(path=tmp_path / "gpt_tny.yaml")
    assert "Is a directory" in message(path=tmp_path)
    (tmp_path / "binary.yaml").write_bytes(bytes(range(256)))
    assert "not a YAML text file" in message(path=tmp_path / "binary.yaml")
    assert "line 2: not valid YAML" in message(path=write(tmp_path, "a.yaml", "seed: 1\n  mesh: {\n"))
    assert "quote text that begins with *" in message(path=write(tmp_path, "a.yaml", "name: *-\n"))
    assert "quote text that begins with !" in message(path=write(tmp_path, "a.yaml", "name: !up.*\n"))
    assert "expected settings such as `seed: 1`" in message(path=write(tmp_path, "a.yaml", "- 1\n"))
    assert "line 2: seed is set twice" in message(path=write(tmp_path, "a.yaml", "seed: 1\nseed: 2\n"))
    assert "no name of a setting" in message(path=write(tmp_path, "a.yaml", "!!binary aaaa: 1\n"))
    assert "no name of a setting" in message(path=write(tmp_path, "a.yaml", "1_0: 1\n"))
    assert "names what it is a part of" in message(path=write(tmp_path, "a.yaml", "mesh: &a {data: *a}\n"))
    levels = "\n".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]" for n in range(1, 40))
    assert "its aliases stand for more" in message(path=write(tmp_path, "a.yaml", f"a0: &a0 [1, 2]\n{levels}\n"))
    assert "takes one file name" in message(path=write(tmp_path, "a.yaml", "extends: [a, b]\n"))
    write(tmp_path, "b.yaml", "extends: a.yaml\n")
    circle = message(path=write(tmp_path, "a.yaml", "extends: b.yaml\n"))
    assert "extends itself, by way of a.yaml -> b.yaml" in circle


def test_unknown_settings_name_the_nearest(tmp_path: Path):
    assert message("--mesh.tensr", "4") == "unknown setting mesh.tensr (--mesh.tensr); did you mean mesh.tensor?"
    assert message("--tensor", "4") == "unknown setting tensor (--tensor); did you mean mesh.tensor?"
    assert "did you mean optimizer.learning_rate?" in message("--optimizer.lr", "1")
    assert "did you mean mesh.tensor?" in message("--meshh.tensor", "4")
    assert "--help lists the settings" in message("--qqqqqq", "4")
    path = write(tmp_path, "a.yaml", "seed: 1\nmesh:\n  data: 1\n  tensr: 4\n")
    assert message(path=path) == f"unknown setting mesh.tensr ({path} line 4); did you mean mesh.tensor?"
    assert "betas" in message("--optimizer.kind", "plain", "--optimizer.betas", "0.1", "0.2")


def test_ill_typed_settings_give_value_type_and_origin(tmp_path: Path):
    assert message("--mesh.tensor", "four") == "mesh.tensor: expected int >= 1, got 'four' (--mesh.tensor)"
    path = write(tmp_path, "a.yaml", "mesh:\n  tensor: four\n")
    assert message(path=path) == f"mesh.tensor: expected int >= 1, got 'four' ({path} line 2)"
    assert message("--mesh.tensor=0").startswith("mesh.tensor: must be greater than or equal to 1, got 0")
    assert message("--style", "cosin") == "style: expected none | cosine | linear, got 'cosin' (--style)"
    assert message("--color", "green") == "color: expected red | blue, got 'green' (--color)"
    assert message("--optimizer.betas", "1") == "optimizer.betas: expected [float, float], got [1] (--optimizer.betas)"
    assert message("--seed=1.5") == "seed: expected int >= 0, got 1.5 (--seed)"
    assert message("--limit=true") == "limit: expected int | none, got true (--limit)"
    assert message("--resume", "maybe") == "resume: expected true | false, got 'maybe' (--resume)"
    assert message("--mesh", "4") == "mesh: expected {data, tensor}, got 4 (--mesh)"
    assert message("--optimizer.kind", "lion") == "optimizer.kind: expected adam | plain, got 'lion' (--optimizer.kind)"
    assert message("--seed", "x", "--name", "a", "--mesh.tensor", "y", "--z").endswith("(--seed) (and 2 more)")


def test_errors_of_the_models_own_checks():
    assert message("--mesh.data", "0") == "mesh.data must not be 0: use -1 to fill"


def test_errors_of_the_command_line():
    assert message("--seed") == "--seed needs a value: int >= 0"
    assert message("--seed", "--resume") == "--seed needs a value: int >= 0"
    assert "write --name=--..." in message("--name", "--x")
    assert load(Run, None, ["--name=--x=1 --y"]).name == "--x=1 --y"
    assert message("--seed", "1", "2") == "unexpected argument '2': settings are given as --name value"


def test_required_setting():
    class Needy(Config):
        path: str = Field(description="what to read")

    with pytest.raises(UserError, match=r"^path has no value \(text: what to read\): give it in a file or as --path"):
        load(Needy, None)


def help_of(*argv: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert configure(Run, [*argv, "--help"], program="python -m here", purpose="Runs.") is None
    return capsys.readouterr().out


def test_help_lists_every_setting_with_type_default_and_meaning(capsys: pytest.CaptureFixture[str]):
    text = help_of(capsys=capsys)
    assert all(f"--{name} " in text or f"--{name}\n" in text for name, s in settings(Run).items() if not s.is_section)
    assert "start of all randomness (int >= 0; default 0)" in text
    assert max(map(len, text.splitlines())) <= 100


def test_help_shows_the_defaults_of_a_file_and_flags(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = write(tmp_path, "a.yaml", "mesh: {tensor: 4}\n")
    text = help_of(str(path), "--seed", "7", capsys=capsys)
    assert "parts of a layer (int >= 1; default 4)" in text and "(int >= 0; default 7)" in text


def test_configure_takes_the_file_before_or_after_flags(tmp_path: Path):
    path = str(write(tmp_path, "a.yaml", "seed: 5\n"))
    for argv in ([path, "--name", "x"], ["--name", "x", path], ["--name", "x", "--resume", path]):
        config = configure(Run, argv, program="p", purpose="q")
        assert config == Run(seed=5, name="x")
    with pytest.raises(UserError, match="unexpected argument"):
        configure(Run, [path, path], program="p", purpose="q")


def test_run_command(capsys: pytest.CaptureFixture[str]):
    def fail(error: BaseException):
        def main(argv: list[str]) -> int:
            raise error

        return main

    assert run_command(lambda argv: None, []) == 0
    assert run_command(lambda argv: len(argv), ["a", "b"]) == 2
    assert run_command(fail(UserError("no such mesh\nat all")), []) == 2
    assert capsys.readouterr().err == "error: no such mesh at all\n"
    assert run_command(fail(KeyboardInterrupt()), []) == 130
    assert capsys.readouterr().err == "interrupted\n"
    with pytest.raises(ZeroDivisionError):
        run_command(fail(ZeroDivisionError()), [])


def jaxtron(*argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "jaxtron", *argv], capture_output=True, text=True)


def test_the_command_lists_its_verbs():
    result = jaxtron("--help")
    assert result.returncode == 0 and "train" in result.stdout


def test_an_unknown_verb_is_one_line():
    result = jaxtron("trian")
    assert (result.returncode, result.stderr) == (2, "error: unknown verb 'trian'; did you mean train?\n")
