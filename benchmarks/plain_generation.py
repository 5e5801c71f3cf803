"""A random model of Hugging Face transformers that goes on from prompts, on the CPU, when it is told to.

    PYTHON benchmarks/plain_generation.py FOLDER SETTINGS

It imports PyTorch and transformers alone, so that their Python need not be Jaxtron's.
`benchmarks.generation_transformers` starts it; SETTINGS is JSON: `model` has the keys of a Llama's configuration,
`prompts` rows of ids of equal length, `threads` how many it may use. FOLDER gets the model. Of each line on standard
input, a number of tokens, it answers with a JSON: seconds, processor seconds, and the most likely tokens that follow
each prompt.
"""

import json
import sys
import time
from typing import Any

import torch
import transformers


def make_model(settings: dict[str, Any]) -> Any:
    """A Llama with random weights, wide enough that one token is likelier than another."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**settings["model"], initializer_range=0.1, pad_token_id=0, eos_token_id=None)
    return transformers.LlamaForCausalLM(config).to(torch.float32).eval()


def main(folder: str, words: str) -> None:
    """Answers until its input ends."""
    settings = json.loads(words)
    torch.set_num_threads(settings["threads"])
    model = make_model(settings)
    model.save_pretrained(folder)
    prompts = torch.tensor(settings["prompts"])
    mask = torch.ones_like(prompts)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    print(json.dumps(versions | {"threads": torch.get_num_threads()}), flush=True)
    for line in sys.stdin:
        count = int(line)
        wall, processor = time.perf_counter(), time.process_time()
        with torch.inference_mode():
            made = model.generate(
                prompts, attention_mask=mask, max_new_tokens=count, min_new_tokens=count, do_sample=False
            )
        said = {
            "seconds": time.perf_counter() - wall,
            "processor": time.process_time() - processor,
            "tokens": made[:, prompts.shape[1] :].tolist(),
        }
        print(json.dumps(said), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
