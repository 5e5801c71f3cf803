"""Writes `golden_processors.json` beside this file: scores as transformers' processors leave them.

    pip install torch==2.14.1 transformers==5.24.0
    python -m tests.generate.make_golden

The suite reads the file alone.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LogitsProcessorList
from transformers.generation import logits_process as rules

VOCAB = 40
CASES: dict[str, dict[str, Any]] = {
    "greedy with a repetition penalty": {"temperature": 0.0, "repetition_penalty": 1.4},
    "no ngram twice": {"temperature": 0.0, "no_repeat_ngram_size": 2},
    "no token twice": {"temperature": 0.0, "no_repeat_ngram_size": 1},
    "no early end": {"temperature": 0.0, "min_new_tokens": 7, "eos_token_ids": [3, 39]},
    "temperature": {"temperature": 0.6},
    "top_k": {"top_k": 7},
    "top_p": {"top_p": 0.8},
    "min_p": {"min_p": 0.1},
    "typical_p": {"typical_p": 0.7},
    "top_k, top_p": {"temperature": 0.7, "top_k": 20, "top_p": 0.9},
    "top_p, min_p": {"temperature": 1.6, "top_p": 0.95, "min_p": 0.2},
    "top_k, typical_p": {"top_k": 15, "typical_p": 0.5},
    "bias": {"temperature": 0.0, "bias": {0: 3.5, 17: -2.25}},
    "everything": {
        "bias": {5: 1.5, 8: -1.0},
        "repetition_penalty": 1.2,
        "no_repeat_ngram_size": 3,
        "min_new_tokens": 6,
        "eos_token_ids": [2],
        "temperature": 0.9,
        "top_k": 25,
        "top_p": 0.97,
        "min_p": 0.03,
        "typical_p": 0.9,
    },
}


def processors(settings: dict[str, Any], prompt_length: int) -> LogitsProcessorList:
    """The processors in the order in which `generate` has them (`_get_logits_processor`)."""
    found = LogitsProcessorList()
    if bias := settings.get("bias"):
        found.append(rules.SequenceBiasLogitsProcessor({(token,): value for token, value in bias.items()}))
    if (penalty := settings.get("repetition_penalty")) is not None:
        found.append(rules.RepetitionPenaltyLogitsProcessor(penalty))
    if size := settings.get("no_repeat_ngram_size"):
        found.append(rules.NoRepeatNGramLogitsProcessor(size))
    if least := settings.get("min_new_tokens"):
        ends = settings["eos_token_ids"]
        found.append(rules.MinNewTokensLengthLogitsProcessor(prompt_length, least, ends, device="cpu"))
    if not (temperature := settings.get("temperature", 1.0)):
        return found
    found.append(rules.TemperatureLogitsWarper(temperature))
    for name, rule in (
        ("top_k", rules.TopKLogitsWarper),
        ("top_p", rules.TopPLogitsWarper),
        ("min_p", rules.MinPLogitsWarper),
        ("typical_p", rules.TypicalLogitsWarper),
    ):
        if name in settings:
            found.append(rule(settings[name]))
    return found


def main() -> None:
    """Writes the file."""
    rng, lines = np.random.default_rng(7), []
    for name, settings in CASES.items():
        logits = np.round(rng.normal(0, 2, VOCAB), 4).astype(np.float32)
        prompt, output = rng.integers(0, 5, 6).tolist(), rng.integers(0, 5, 5).tolist()
        scores = processors(settings, len(prompt))(torch.tensor([prompt + output]), torch.tensor(logits)[None])[0]
        bias = settings.get("bias", {})
        case = {
            "name": name,
            "settings": {key: value for key, value in settings.items() if key != "bias"},
            "logit_bias": bias,
            "prompt": prompt,
            "output": output,
            "logits": [float(f"{value:.4f}") for value in logits.tolist()],
            "scores": [None if value == -np.inf else value for value in scores.tolist()],
        }
        lines.append(json.dumps(case))
    path = Path(__file__).with_name("golden_processors.json")
    path.write_text("[\n" + ",\n".join(lines) + "\n]\n")
    print(f"{len(lines)} cases in {path}")


if __name__ == "__main__":
    main()
