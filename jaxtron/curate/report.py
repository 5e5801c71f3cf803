"""What a curation did, in numbers: `report.json`, and a table of it."""

import json
from typing import Any

import numpy as np

from jaxtron.curate.config import STEPS
from jaxtron.curate.work import Job, load
from jaxtron.curate.write import Tally

SHOWN_JACCARD = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 1.0)


def make_report(job: Job) -> dict[str, Any]:
    """Totals, reasons with examples, input files, and what the steps went by; bytes are UTF-8 bytes of text."""
    total = Tally()
    files: dict[str, Tally] = {part.path: Tally() for part in job.parts}
    for part in job.parts:
        tally = Tally(**json.loads(job.path("written", f"{part.number:05d}.json").read_text()))
        total.add(tally)
        files[part.path].add(tally)
    report: dict[str, Any] = {
        **_numbers(total),
        "examples": {reason: total.examples[reason] for reason in sorted(total.examples)},
        "files": [{"file": path, **_numbers(tally)} for path, tally in files.items()],
        "settings": job.config.model_dump(
            mode="json", exclude={step for step in STEPS if step not in job.config.steps}
        ),
    }
    if job.bands is not None:
        curve = {str(jaccard): round(float(job.bands.probability(jaccard)), 4) for jaccard in SHOWN_JACCARD}
        report["near"] = {
            "bands": job.bands.bands,
            "rows": job.bands.rows,
            "probability_of_a_candidate_by_jaccard": curve,
        }
    if "decontaminate" in job.config.steps:
        report["decontaminate"] = _ngrams(job)
    return report


def summary(report: dict[str, Any]) -> str:
    """A few lines for a person."""
    lines = [
        _line("read", report["documents"], report["bytes"]),
        *(_line(f"  {reason}", *numbers.values()) for reason, numbers in report["dropped"].items()),
        _line("written", report["kept"]["documents"], report["kept"]["bytes"]),
    ]
    if report["cut"]["documents"]:
        lines.append(_line("  of cut documents, cut", report["cut"]["documents"], report["cut"]["bytes"]))
    return "\n".join(lines)


def _numbers(tally: Tally) -> dict[str, Any]:
    return {
        "documents": tally.documents,
        "bytes": tally.bytes,
        "kept": {"documents": tally.kept_documents, "bytes": tally.kept_bytes},
        "cut": {"documents": tally.cut_documents, "bytes": tally.cut_bytes},
        "dropped": {
            reason: {"documents": tally.dropped[reason][0], "bytes": tally.dropped[reason][1]}
            for reason in sorted(tally.dropped)
        },
    }


def _ngrams(job: Job) -> dict[str, int]:
    counts = load(job.path("decisions", "all") / "counts.npy")
    common = counts > job.config.decontaminate.max_count
    return {
        "task_ngrams": len(counts),
        "found": int(np.count_nonzero(counts)),
        "left_alone_as_common": int(np.count_nonzero(common)),
    }


def _line(name: str, documents: int, size: int) -> str:
    noun = "document " if documents == 1 else "documents"
    return f"{name:<44}{documents:>14,} {noun}{size / 1e6:>14,.3f} MB"
