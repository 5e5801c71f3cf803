"""Shows that directories that `python -m jaxtron.convert` wrote are models of Hugging Face transformers.

    pip install torch transformers safetensors                        # in an environment of its own
    python -m jaxtron.convert --from RUN --to DIRECTORY
    python -m jaxtron.evaluate RUN --token_ids IDS.json --logits LOGITS.npy
    python tests/hugging_face/prove_exports.py DIRECTORY --token_ids IDS.json --logits LOGITS.npy

Loads each without a name missing, left over or of another shape; with tokens and logits of Jaxtron's, compares these,
and the tokens that are most likely after each. The suite does not run it.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
import transformers

TOLERANCE = 2e-5


def prove(directory: Path, ids: Path | None, logits: Path | None) -> bool:
    """Whether all is as it should be; prints what was seen."""
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        directory, output_loading_info=True, attn_implementation="eager", dtype=torch.float32
    )
    wrong = {name: found for name, found in info.items() if found}
    print(
        f"{directory}: {type(model).__name__}, {model.num_parameters():,} parameters, {wrong or 'every name in place'}"
    )
    if ids is None or logits is None:
        return not wrong
    tokens = torch.tensor(json.loads(ids.read_text()))
    with torch.no_grad():
        there = model.eval()(tokens).logits.numpy()
        model.generation_config.eos_token_id = None
        text = model.generate(tokens, max_new_tokens=8, do_sample=False, pad_token_id=0)
    here = np.load(logits)
    apart = float(np.abs(here - there).max())
    same = bool((here.argmax(-1) == there.argmax(-1)).all())
    print(f"  logits up to {np.abs(there).max():.2f}, {apart:.2e} apart; the most likely tokens are the same: {same}")
    print(f"  greedy: {text[:, tokens.shape[1] :].tolist()}")
    return not wrong and same and apart < TOLERANCE


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directories", nargs="+", type=Path)
    parser.add_argument("--token_ids", type=Path)
    parser.add_argument("--logits", type=Path)
    given = parser.parse_args()
    print(f"transformers {transformers.__version__}, torch {torch.__version__}")
    results = [prove(directory, given.token_ids, given.logits) for directory in given.directories]
    sys.exit(0 if all(results) else 1)
