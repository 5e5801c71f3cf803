"""`python -m jaxtron.evaluate RUN_OR_WEIGHTS --text FILE`: perplexity of a trained model on a text; or logits."""

import sys

from jaxtron import interrupts  # noqa: F401  (answers Ctrl-C while the rest is imported)
from jaxtron.command import hand_over, run_command
from jaxtron.config import UserError
from jaxtron.evaluate.request import ALL_USAGE, parse, read_configuration, read_text
from jaxtron.evaluate.tasks_request import is_of_tasks, parse_tasks, read_asked
from jaxtron.evaluate.token_rows import read_token_ids


def main(argv: list[str]) -> int:
    """Prints the figures of the text, and writes them where asked to."""
    if not argv:
        print(f"usage: {ALL_USAGE}\n\n--help lists the flags.")
        return 2
    if is_of_tasks(argv):
        asked = parse_tasks(argv)
        hand_over("jaxtron.evaluate.tasks").run_tasks(asked, read_asked(asked))
        return 0
    request = parse(argv)
    trained, config = read_configuration(request)
    if request.token_ids is not None:
        rows = read_token_ids(request.token_ids, config.vocabulary_size() or 0)
        hand_over("jaxtron.evaluate.logits").write_logits(request, trained, config, rows)
        return 0
    raw = "".join(map(read_text, request.text))
    if not raw:
        raise UserError(f"--text {' '.join(map(str, request.text))} has no text to score; give a file that has")
    stride = request.stride or config.data.sequence_length
    if stride > config.data.sequence_length:
        raise UserError(
            f"--stride {stride} is longer than a sequence of {config.data.sequence_length} tokens: some would never "
            "be scored; lower it"
        )
    hand_over("jaxtron.evaluate.score").score(request, trained, config, raw, stride)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
