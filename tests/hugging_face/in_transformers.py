"""What Hugging Face transformers, and peft, make of directories that we wrote.

    PYTHON tests/hugging_face/in_transformers.py COUNT DIRECTORY ...

It imports nothing of Jaxtron's, so that its Python need not be Jaxtron's. Beside each DIRECTORY lies DIRECTORY.npy,
rows of ids; what is found goes to DIRECTORY.npz: `wrong`, JSON of the names that are missing, left over or of another
shape, `logits` of the rows, and `text`, the COUNT likeliest tokens after each row, which transformers' own loop finds.
A directory in DIRECTORY.peft has adapters for it. The last line says the versions.
"""

import json
import sys
from pathlib import Path

import numpy as np
import peft
import torch
import transformers

# with their cache these do not cut steps to the bounds that they cut them to in whole sequences
STEPS_WITHOUT_BOUNDS = ("mamba2", "nemotron_h")


def try_directory(directory: Path, count: int) -> None:
    """Loads it as any user does, and writes what there is to see."""
    model, found = transformers.AutoModelForCausalLM.from_pretrained(
        directory, output_loading_info=True, attn_implementation="eager", dtype=torch.float32
    )
    wrong = {name: sorted(map(str, names)) for name, names in found.items() if names}
    adapters = Path(f"{directory}.peft")
    if adapters.is_dir():
        model = peft.PeftModel.from_pretrained(model, adapters)
    tokens = torch.tensor(np.load(f"{directory}.npy").astype(np.int64))
    with torch.no_grad():
        logits = model.eval()(input_ids=tokens).logits.float().numpy()
        model.generation_config = transformers.GenerationConfig(pad_token_id=0)
        text = model.generate(
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=count,
            do_sample=False,
            use_cache=model.config.model_type not in STEPS_WITHOUT_BOUNDS,
        )
    np.savez(f"{directory}.npz", wrong=json.dumps(wrong), logits=logits, text=text[:, tokens.shape[1] :].numpy())


if __name__ == "__main__":
    for path in sys.argv[2:]:
        try_directory(Path(path), int(sys.argv[1]))
    print(json.dumps({module.__name__: module.__version__ for module in (torch, transformers, peft)}))
