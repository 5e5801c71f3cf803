"""`jaxtron VERB ...`, the same as `python -m jaxtron.VERB ...`."""

import difflib
import importlib
import sys

from jaxtron import interrupts  # noqa: F401  (answers Ctrl-C while the rest is imported)
from jaxtron.command import run_command
from jaxtron.config import UserError

VERBS = {
    "curate": "take duplicates, evaluation tasks and poor text out of a corpus",
    "preprocess": "text to token files, in parallel; merge and inspect them, prove the order of samples",
    "train": "train a model",
    "launch": "start a training on several hosts, and again when one is lost",
    "evaluate": "perplexity of a trained model on a text",
    "generate": "text that a trained model makes, from prompts or in a conversation",
    "serve": "a trained model at an address, by OpenAI's protocol",
    "convert": "Hugging Face weights to a run and back, adapters, a dense model to a mixture of experts",
    "runs": "the runs of a directory, what one did, and how several differ",
    "doctor": "check this machine, and several together, before a run",
    "plan": "compile and weigh a run, or show its layout, without the machines it is for",
}


def main(argv: list[str] | None = None) -> int:
    """Runs one verb with the rest of the line; the exit code."""
    return run_command(_dispatch, argv)


def _dispatch(argv: list[str]) -> int | None:
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: jaxtron VERB ...\n")
        print("\n".join(f"  {verb:<12}{purpose}" for verb, purpose in VERBS.items()))
        print("\n`jaxtron VERB --help` lists the verb's settings.")
        return 0 if argv else 2
    verb, *rest = argv
    if verb not in VERBS:
        near = difflib.get_close_matches(verb, VERBS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"the verbs are {', '.join(VERBS)}"
        raise UserError(f"unknown verb {verb!r}; {hint}")
    return importlib.import_module(f"jaxtron.{verb}.__main__").main(rest)


if __name__ == "__main__":
    sys.exit(main())
