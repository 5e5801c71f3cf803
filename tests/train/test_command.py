"""What `python -m jaxtron.train` prints and leaves."""

import json
import re
from pathlib import Path

import jax
import pytest

from jaxtron.config import load, settings
from jaxtron.run.configuration import Configuration
from jaxtron.words import printable
from tests.support.command_runs import FinishedRun, contents, history, records, run_here


def test_what_a_run_leaves(finished: FinishedRun):
    lines = [json.loads(line) for line in (finished.directory / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    names = {"loss", "tokens_per_second", "learning_rate", "gradient_norm"}
    assert all(names <= line.keys() and all(line[name] > 0 for name in names) for line in lines)
    assert [line["step"] for line in lines if "validation_loss" in line] == [3, 6]
    assert [line["tokens"] for line in lines] == [step * 8 * 32 for step in range(1, 7)]
    assert all((line["device"], line["devices"]) == (jax.devices()[0].device_kind, 8) for line in lines)
    assert (finished.directory / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in finished.directory.glob("checkpoints/*")) == ["step_00000004", "step_00000006"]


def test_what_a_run_prints(finished: FinishedRun):
    ended, directory = finished.ended, finished.directory
    assert ended.code == 0 and ended.err == ""
    assert re.match(
        rf"starting JAX\nreading the data\n[\d,]+ parameters on 8 cpu \(data 8\), run in {directory}\n", ended.out
    )
    last = json.loads((directory / "metrics.jsonl").read_text().splitlines()[-1])
    saved = (directory / "events.jsonl").read_text().count('"checkpoint"')
    sample, summary = re.search("\nSample\n(.*)\nRun\n(.*)", ended.out, re.DOTALL).groups()
    assert len(sample.encode()) > 40
    assert dict(re.split("  +", line) for line in summary.splitlines()) == {
        "steps": "6 of 6",
        "training loss": f"{last['loss']:.4f}",
        "speed": f"{last['tokens_per_second']:,.0f} tokens/s",
        "validation loss": f"{last['validation_loss']:.4f}",
        "configuration": f"{directory}/config.yaml",
        "metrics": f"{directory}/metrics.jsonl",
        "events": f"{directory}/events.jsonl ({saved} checkpoint, 1 complete)",
        "loss curve": f"{directory}/loss.png",
        "checkpoints": f"{directory}/checkpoints",
    }


def test_a_finished_run_started_again_trains_no_more(finished: FinishedRun):
    before = contents(finished.directory)
    # not even what may change is written down, for nothing was trained with it
    for flags, said in (
        ((), "complete already"),
        (
            ("--train.microbatches", "1", "--checkpoint.every", "5", "--optimizer.learning_rate", "1"),
            "complete already",
        ),
        (("--train.steps", "5"), "beyond train.steps 5: nothing to train; to go on, give more"),
    ):
        ended = run_here(*finished.flags, *flags)
        assert ended.code == 0 and ended.err == ""
        assert f"checkpoint of step 6 found{',' if 'beyond' in said else ':'} {said}" in ended.out
        assert ended.out.partition("Sample")[2] == finished.ended.out.partition("Sample")[2]
        assert contents(finished.directory) == before


def test_its_configuration_starts_the_same_run_and_more_steps_continue_it(finished: FinishedRun, tmp_path: Path):
    saved = finished.directory / "config.yaml"
    config = load(Configuration, saved)
    assert config == load(Configuration, None, finished.flags).resolved()
    again = [str(saved), "--run.directory", str(tmp_path / "run"), "--train.sample_tokens", "0"]
    again += ["--optimizer.decay_steps", "6"]
    assert run_here(*again).code == 0
    assert records(tmp_path / "run") == records(finished.directory)
    ended = run_here(*again[:-2], "--train.steps", "8", "--model.mlp_size", "128")
    assert ended.code == 0 and ended.err == ""
    # the width spelled out is the same width
    assert (
        "checkpoint of step 6 found: continuing with train.steps 6 -> 8, optimizer.decay_steps 6 -> none\n"
        "learning rate of step 7: 0 by the earlier settings, 4.39e-05 now\n"
    ) in ended.out
    assert "steps            8 of 8" in ended.out
    begun, continued = history(tmp_path / "run")
    assert (begun["step"], begun["changes"]) == (0, {})
    assert continued["step"] == 6 and continued["changes"]["train.steps"] == [6, 8]
    assert continued["versions"]["jax"] == jax.__version__
    assert continued["devices"] == {"kind": "cpu", "count": 8, "processes": 1}
    assert load(Configuration, tmp_path / "run" / "config.yaml").train.steps == 8
    assert records(tmp_path / "run")[:6] == records(finished.directory)
    assert [line["step"] for line in records(tmp_path / "run")] == [1, 2, 3, 4, 5, 6, 7, 8]


GPT_TINY = str(Path(__file__).parents[2] / "configs" / "gpt_tiny.yaml")


@pytest.mark.parametrize("arguments", [["--help"], [GPT_TINY, "--help"]])
def test_help(arguments: list[str]):
    ended = run_here(*arguments)
    assert ended.code == 0 and ended.err == ""
    entries = re.split(r"^  --", ended.out, flags=re.MULTILINE)[1:]
    texts = {entry.split()[0]: " ".join(entry.split()[1:]) for entry in entries}
    known = {name: setting for name, setting in settings(Configuration).items() if not setting.is_section}
    assert texts.keys() == known.keys()
    for name, setting in known.items():
        assert setting.meaning and setting.meaning in texts[name]
        assert re.search(r"\(.+; (default .+|required)\)", texts[name]), texts[name]
    steps = "400" if GPT_TINY in arguments else "1000"
    assert texts["train.steps"] == f"Optimizer steps of the run. (int >= 1; default {steps})"


def test_a_sample_cannot_steer_the_terminal():
    assert printable("a\n\tb\x1b[2J\x07é\x85") == "a\n\tb\ufffd[2J\ufffdé\ufffd"
