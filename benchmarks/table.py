"""`python -m benchmarks.table`: the results in benchmarks/results as Markdown tables between two marks of README.md."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import record
from jaxtron.command import configure, run_command
from jaxtron.config import Config, UserError

BEGIN, END = "<!-- benchmarks -->", "<!-- /benchmarks -->"
GIB = 2**30


class TableConfig(Config):
    """What is read, and what is written."""

    results: str = str(record.RESULTS)
    """Folder of results."""
    readme: str = str(record.ROOT / "README.md")
    """File with the two marks."""


def main(argv: list[str]) -> int:
    """Puts the tables into the file, in place of what is between its marks."""
    purpose = f"Write the benchmarks' tables between {BEGIN} and {END}."
    config = configure(TableConfig, argv, program="python -m benchmarks.table", purpose=purpose)
    if config is None:
        return 0
    path = Path(config.readme)
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise UserError(f"{path} has no {BEGIN} followed by {END}: add the two lines where the tables belong")
    results = [json.loads(file.read_text()) for file in sorted(Path(config.results).glob("*.json"))]
    content = "\n\n".join(part for part in (training_table(results), attention_tables(results)) if part)
    path.write_text(f"{before}{begin}\n{content}\n{end}{after}" if content else f"{before}{begin}\n{end}{after}")
    return 0


def training_table(results: Sequence[dict[str, Any]]) -> str:
    """A row for each measured train step, the newest first; empty without any."""
    runs = [result if result["benchmark"] == "train" else _section(result, "train") for result in results]
    runs = sorted((run for run in runs if run), key=lambda run: run["date"], reverse=True)
    header = (
        *("date", "configuration", "devices", "parameters", "tokens a step", "ms a step", "tokens/s", "MFU"),
        *("peak memory (predicted), GiB", "compile, s", "JAX"),
    )
    return _table(header, [_training_row(run) for run in runs])


def _training_row(run: dict[str, Any]) -> tuple[str, ...]:
    peak = run.get("device_peak_bytes")
    mesh = " x ".join(f"{axis} {size}" for axis, size in run["mesh"].items() if size > 1)
    return (
        run["date"],
        run["name"],
        f"{run['device_count']} {run['device']}{f' ({mesh})' if mesh else ''}",
        f"{1e-6 * run['parameters']:,.1f}M",
        f"{run['tokens_per_step']:,}",
        f"{run['step_milliseconds']['median']:,.1f}",
        f"{run['tokens_per_second']:,.0f}",
        "-" if run["mfu"] is None else f"{100 * run['mfu']:.1f} %",
        f"{f'{peak / GIB:.1f}' if peak else '-'} ({run['predicted_peak_bytes'] / GIB:.1f})",
        f"{run['compile_seconds']:.0f}",
        run["versions"]["jax"],
    )


def attention_tables(results: Sequence[dict[str, Any]]) -> str:
    """For each GPU its newest ceilings and attention, forward / backward in TFLOP/s; empty without any."""
    newest = {result["device"]: result for result in sorted(results, key=lambda r: r["date"]) if "sections" in result}
    return "\n\n".join(part for device in sorted(newest) for part in _attention_table(newest[device]))


def _attention_table(result: dict[str, Any]) -> list[str]:
    ceilings, rows = _section(result, "ceilings"), {}
    sections = [_section(result, name) for name in ("attention_jax", "attention_torch")]
    cases = [case for section in sections if section for case in section["cases"]]
    names = list(dict.fromkeys(case["implementation"] for case in cases))
    for case in cases:
        mask = "causal" if case["causal"] else "full"
        row = rows.setdefault((mask, str(case["head_dim"]), f"{case['length']:,}"), dict.fromkeys(names, "-"))
        if "error" not in case:
            row[case["implementation"]] = f"{case['forward_tflops']:.0f} / {case['backward_tflops']:.0f}"
    line = f"{result['device']}, {result['date']}"
    if ceilings:
        line += f": bf16 product of {ceilings['matmul_size']} squared {ceilings['matmul_tflops']:.0f} TFLOP/s, "
        line += f"copy {ceilings['copy_gigabytes_per_second']:,.0f} GB/s"
    if rows:
        line += ". Attention, forward / backward in TFLOP/s:"
    table = _table(("mask", "head dimension", "sequence", *names), [(*key, *row.values()) for key, row in rows.items()])
    return [part for part in (line if ceilings or rows else "", table) if part]


def _section(result: dict[str, Any], name: str) -> dict[str, Any] | None:
    """A section's result, or None where it was not measured."""
    return result.get("sections", {}).get(name, {}).get("result")


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return ""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    sys.exit(run_command(main))
