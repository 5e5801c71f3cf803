"""Runs what a `TasksRequest` asks for, and tells the figures."""

import json
from typing import Any

from jaxtron.command import write_whole
from jaxtron.evaluate.harness import HarnessModel, as_json, check_installed, evaluate_tasks, table
from jaxtron.evaluate.last_words import read_texts, score_last_words
from jaxtron.evaluate.overlap import check_package
from jaxtron.evaluate.pairs import read_wanted_pairs, score_pairs
from jaxtron.evaluate.tasks_request import TasksRequest
from jaxtron.generate.opening import SpeakingModel, open_model
from jaxtron.generate.source import ModelConfiguration
from jaxtron.generate.write import ROOM, finite_logits
from jaxtron.runtime.memory_errors import out_of_memory_as_user_error
from jaxtron.runtime.start import start_runtime

# sequences at a time, where nothing is said
ROWS = 8


def run_tasks(request: TasksRequest, configuration: ModelConfiguration) -> None:
    """Prints the figures, and writes them where asked to."""
    # before the model: a file or a package that is not there is told at once
    texts = None if request.last_words is None else read_texts(request.last_words, request.limit)
    pairs = None if request.pairs is None else read_wanted_pairs(request.pairs, request.limit)
    for score in request.scores:
        check_package(score)
    if request.tasks:
        check_installed()
    config = configuration.config
    start_runtime(config.runtime, devices=config.devices)
    with (
        out_of_memory_as_user_error(ROOM),
        open_model(request.source, configuration, rows=ROWS) as model,
        finite_logits(request.source),
    ):
        if pairs is not None:
            scores = score_pairs(model, pairs, request.scores, request.max_new_tokens)
            print(scores.text())
            figures = json.dumps(scores.json(), indent=1, ensure_ascii=False)
        elif texts is None:
            results = _run_harness(request, model)
            print(table(results))
            figures = as_json(results)
        else:
            found = score_last_words(model.engine, model.tokenizer, texts)
            told = f"accuracy {found.accuracy:.4f}, perplexity {found.perplexity:.4g}"
            print(f"{found.texts:,} texts: {told} of the last word")
            figures = json.dumps(
                {"texts": found.texts, "accuracy": found.accuracy, "perplexity": found.perplexity}, indent=1
            )
    if request.json is not None:
        write_whole(request.json, figures + "\n")


def _run_harness(request: TasksRequest, model: SpeakingModel) -> dict[str, Any]:
    seen = HarnessModel(model.engine, model.tokenizer, add_bos_token=request.add_bos_token)
    return evaluate_tasks(
        seen, request.tasks, task_path=request.task_path, num_fewshot=request.num_fewshot, limit=request.limit
    )
