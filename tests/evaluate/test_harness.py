"""lm-evaluation-harness end to end on tasks of local files: the numbers of a plain loop, on every mesh."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jaxtron.config import UserError, load
from jaxtron.data.tokenizers import ByteTokenizer, HuggingFaceTokenizer
from jaxtron.generate.engine import GenerationEngine
from jaxtron.generate.opening import SpeakingModel
from jaxtron.generate.source import ModelConfiguration
from jaxtron.run.configuration import Configuration
from jaxtron.run.session import make_session
from tests.serve.conftest import serving
from tests.support.fake_engine import FakeEngine
from tests.support.logits import logits
from tests.support.tiny_tokenizer import write_tokenizer

pytest.importorskip("lm_eval", reason="needs the extra eval")
from lm_eval import simple_evaluate  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from jaxtron.evaluate.harness import HarnessModel, evaluate_tasks  # noqa: E402

ROOM = 64
# windows of long texts begin elsewhere by the harness's own adapter of servers
SERVED = ["jx_choice", "jx_answer"]
FLAGS = (
    "--model.num_layers 2 --model.hidden_size 32 --model.num_heads 4 --model.vocab_size 257 --model.initial_std 0.3 "
    "--model.position rotary --train.precision fp32 --data.sequence_length 64 --train.global_batch 8"
)
QUESTIONS = [
    {
        "question": f"Question {number}: what follows {number}?\nAnswer:",
        "choices": [" one", " two", f" {number}"],
        "gold": 1,
    }
    for number in range(5)
]
TEXTS = [
    {"text": "a short text"},
    {"text": "a much longer text, which does not fit into one window of the model. " * 3},
]
TASKS = {
    "choice": """
dataset_path: json
dataset_kwargs: {data_files: {validation: FOLDER/choice.jsonl}}
validation_split: validation
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: gold
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "rolling": """
dataset_path: json
dataset_kwargs: {data_files: {validation: FOLDER/rolling.jsonl}}
validation_split: validation
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}, {metric: bits_per_byte}]
""",
    "answer": """
dataset_path: json
dataset_kwargs: {data_files: {validation: FOLDER/choice.jsonl}}
validation_split: validation
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: " two"
generation_kwargs: {until: ["\\n"], max_gen_toks: 8}
metric_list: [{metric: exact_match}]
""",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tasks and their data."""
    path = tmp_path_factory.mktemp("tasks")
    for name, rows in (("choice", QUESTIONS), ("rolling", TEXTS)):
        (path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, text in TASKS.items():
        (path / f"{name}.yaml").write_text(f"task: jx_{name}\n" + text.replace("FOLDER", str(path)))
    return path


def engine_of(mesh: str = "", count: int = 1) -> GenerationEngine:
    config = load(Configuration, None, f"{FLAGS} --mesh.data 1 {mesh}".split()).resolved()
    session = make_session(config, jax.devices()[:count], trains=False)
    return GenerationEngine(session, session.initial_state().params, rows=4, room=ROOM)


def model(mesh: str = "", count: int = 1) -> HarnessModel:
    return HarnessModel(engine_of(mesh, count), ByteTokenizer())


def scores(results: dict[str, Any]) -> dict[str, dict[str, float]]:
    return {
        task: {name: value for name, value in found.items() if isinstance(value, float)}
        for task, found in results["results"].items()
    }


def plain(texts: list[tuple[str, str]]) -> list[float]:
    """Log-likelihoods of continuations, by a forward of each whole text."""
    config = load(Configuration, None, f"{FLAGS} --mesh.data 1".split()).resolved()
    session = make_session(config, jax.devices()[:1], trains=False)
    params, found = session.initial_state().params, []
    for context, continuation in texts:
        tokens = np.zeros((1, ROOM), np.int32)
        whole = [*context.encode(), *continuation.encode()]
        tokens[0, : len(whole)] = whole
        with session.use():
            of_all = np.asarray(jax.nn.log_softmax(logits(session.trainer, params, tokens)[0, :, :257]))
        first = len(context.encode())
        found.append(sum(float(of_all[place - 1, whole[place]]) for place in range(first, len(whole))))
    return found


@pytest.mark.slow
def test_tasks_give_the_numbers_of_a_plain_loop_on_one_device_and_on_tensor(folder: Path) -> None:
    names = [f"jx_{name}" for name in TASKS]
    one = scores(evaluate_tasks(model(), names, task_path=folder))
    four = scores(evaluate_tasks(model("--mesh.tensor 4", 4), names, task_path=folder))
    assert one.keys() == four.keys() == set(names)
    for task, found in one.items():
        assert found == pytest.approx(four[task], rel=1e-5), task
    values = [plain([(row["question"], choice) for choice in row["choices"]]) for row in QUESTIONS]
    best = [int(np.argmax(row)) for row in values]
    assert one["jx_choice"]["acc,none"] == pytest.approx(np.mean([number == 1 for number in best]))
    lengths = [[len(choice) for choice in row["choices"]] for row in QUESTIONS]
    normed = [int(np.argmax(np.divide(*pair))) for pair in zip(values, lengths, strict=True)]
    assert one["jx_choice"]["acc_norm,none"] == pytest.approx(np.mean([number == 1 for number in normed]))
    # windows: each token once, the first after the end of a text
    assert one["jx_rolling"]["bits_per_byte,none"] > 1


@pytest.mark.slow
def test_log_likelihoods_are_those_of_a_plain_loop() -> None:
    pairs = [(row["question"], choice) for row in QUESTIONS for choice in row["choices"]]
    found = model()._loglikelihood_tokens([(pair, *map(list, map(str.encode, pair))) for pair in pairs])
    np.testing.assert_allclose([value for value, _ in found], plain(pairs), rtol=1e-5)


@pytest.mark.slow
def test_a_server_gives_the_harness_the_same_numbers(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("tenacity", reason="needs lm-eval[api]")
    tokenizer, engine = HuggingFaceTokenizer(write_tokenizer(tmp_path)), engine_of()
    here = scores(evaluate_tasks(HarnessModel(engine, tokenizer), SERVED, task_path=folder))
    configuration = ModelConfiguration(None, Configuration(), engine.room, None, {}, ())
    with serving(SpeakingModel(engine, tokenizer, configuration, (), frozenset())) as (service, port):
        arguments = {
            "base_url": f"http://127.0.0.1:{port}/v1/completions",
            "model": service.name,
            "tokenizer_backend": "remote",
            "max_length": ROOM,
            "num_concurrent": 4,
        }
        manager = TaskManager(include_path=str(folder))
        there = simple_evaluate("local-completions", arguments, tasks=SERVED, task_manager=manager, bootstrap_iters=0)
    assert there is not None
    found = scores(there)
    assert found.keys() == here.keys() == set(SERVED)
    for task, values in here.items():
        assert values == pytest.approx(found[task], rel=1e-5), task


def test_a_task_that_is_not_there_is_told(folder: Path) -> None:
    with pytest.raises(UserError, match="--tasks jx_nothing: no such task in lm-evaluation-harness nor in"):
        evaluate_tasks(object.__new__(HarnessModel), ["jx_nothing"], task_path=folder)


def test_a_task_without_its_data_is_told(tmp_path: Path) -> None:
    task = TASKS["choice"].replace("FOLDER", str(tmp_path))
    (tmp_path / "gone.yaml").write_text(f"task: jx_gone\n{task}")
    asked = HarnessModel(FakeEngine(), ByteTokenizer())
    with pytest.raises(UserError, match=r"--tasks jx_gone: .* of their files and data: .*choice\.jsonl"):
        evaluate_tasks(asked, ["jx_gone"], task_path=tmp_path)
