"""`python -m jaxtron.preprocess curate`: duplicates, evaluation tasks and poor text taken out of a corpus."""

from jaxtron.command import configure
from jaxtron.preprocess.curate.config import Curation
from jaxtron.preprocess.curate.report import summary
from jaxtron.preprocess.curate.run import curate

__all__ = ["Curation", "curate", "main"]

PROGRAM = "python -m jaxtron.preprocess curate"
PURPOSE = (
    "Filter, deduplicate and decontaminate JSONL or Parquet. Writes documents/ (the input's own lines, in order), "
    "dropped.jsonl (every document that went, why, and for which other) and report.json to the output folder. "
    "The same command goes on where a run was ended."
)


def main(arguments: list[str]) -> int:
    """Curates what the command line says, and prints a summary."""
    config = configure(Curation, arguments, program=PROGRAM, purpose=PURPOSE)
    if config is not None:
        print(summary(curate(config)))
    return 0
