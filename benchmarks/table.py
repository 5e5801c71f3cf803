"""`python -m benchmarks.table`: the results in benchmarks/results as Markdown tables between two marks of README.md."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import attention, gpu, grouped_matmul, record, ssd
from benchmarks.marked import read_marked
from jaxtron.command import configure, run_command
from jaxtron.config import Config

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
    marked = read_marked(config.readme, BEGIN, END)
    results = [json.loads(file.read_text()) for file in sorted(Path(config.results).glob("*.json"))]
    parts = (training_table(results), attention_tables(results), grouped_tables(results), ssd_tables(results))
    content = "\n\n".join(part for part in parts if part)
    marked.write(content)
    return 0


def training_table(results: Sequence[dict[str, Any]]) -> str:
    """A row for each measured train step, the newest first; empty without any."""
    runs = [result for result in results if result["benchmark"] == "train"]
    for result in results:
        runs += [_section(result, name) for name in result.get("sections", ()) if name.startswith("train")]
    runs = sorted((run for run in runs if run), key=lambda run: run["date"], reverse=True)
    header = (
        *("date", "configuration", "devices", "parameters", "tokens a step", "ms a step", "tokens/s", "MFU"),
        *("planned ms", "peak memory (planned), GiB", "attention", "compile, s", "JAX"),
    )
    return _table(header, [_training_row(run) for run in runs])


def _training_row(run: dict[str, Any]) -> tuple[str, ...]:
    peak, plan = run.get("device_peak_bytes"), run.get("plan") or {}
    # results of before there were plans: the compiler's own sum for the step that ran
    planned = plan.get("program_bytes", run["predicted_peak_bytes"])
    who = [line.removeprefix("attention: ").split(",")[0].split(" (")[0] for line in run.get("attention", ())]
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
        f"{plan['step_milliseconds']:,.1f}" if "step_milliseconds" in plan else "-",
        f"{f'{peak / GIB:.1f}' if peak else '-'} ({planned / GIB:.1f})",
        ", ".join(who) or "-",
        f"{run['compile_seconds']:.0f}",
        run["versions"]["jax"],
    )


def attention_tables(results: Sequence[dict[str, Any]]) -> str:
    """For each GPU its newest ceilings and attention, forward / backward in TFLOP/s; empty without any."""
    return "\n\n".join(part for result in _newest(results) for part in _attention_table(result))


def _newest(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each GPU its last."""
    newest = {result["device"]: result for result in sorted(results, key=lambda r: r["date"]) if "sections" in result}
    return [newest[device] for device in sorted(newest)]


def _attention_table(result: dict[str, Any]) -> list[str]:
    ceilings, cases = _section(result, "ceilings"), attention.merged(gpu.results_of(result, "attention"))
    names = list(dict.fromkeys(name for case in cases for name in case["implementations"]))
    line = f"{result['device']}, {result['date']}"
    if ceilings:
        line += f": bf16 product of {ceilings['matmul_size']} squared {ceilings['matmul_tflops']:.0f} TFLOP/s, "
        line += f"copy {ceilings['copy_gigabytes_per_second']:,.0f} GB/s"
    if cases:
        line += f". Attention, forward / backward in TFLOP/s; the last column is {attention.OURS[0]}'s over the "
        line += f"fastest of the others'{_unfinished(result)}:"
    header = ("mask", "head dimension", "heads / key-value heads", "sequence", *names, "ratio")
    table = _table(header, [_attention_row(case, names) for case in cases])
    return [part for part in (line if ceilings or cases else "", table) if part]


def _attention_row(case: dict[str, Any], names: Sequence[str]) -> tuple[str, ...]:
    mask = "causal" if case["causal"] else "full"
    mask += f", window {case['window']:,}" if case["window"] else ""
    mask += f", {case['documents']} documents" if case["documents"] > 1 else ""
    found, judged = case["implementations"], case["judged"]
    speeds = [_figures(found.get(name, {}), "tflops", ".0f", attention.DIRECTIONS) for name in names]
    heads = f"{case['heads']} / {case['kv_heads']}"
    return (
        mask,
        str(case["head_dim"]),
        heads,
        f"{case['length']:,}",
        *speeds,
        _figures(judged, "ratio", ".2f", attention.DIRECTIONS),
    )


def grouped_tables(results: Sequence[dict[str, Any]]) -> str:
    """For each GPU its newest grouped products, with both gradients, in TFLOP/s; empty without any."""
    return "\n\n".join(part for result in _newest(results) for part in _grouped_table(result))


def _grouped_table(result: dict[str, Any]) -> list[str]:
    cases = grouped_matmul.merged(gpu.results_of(result, "grouped"))
    if not cases:
        return []
    names = list(dict.fromkeys(name for case in cases for name in case["implementations"]))
    line = f"{result['device']}, {result['date']}. Products of rows by expert, forward / gradient of rows / of kernels "
    line += f"in TFLOP/s of the rows without padding; the last columns are {grouped_matmul.OURS[0]}'s over the fastest "
    line += f"other grouped and dense one{_unfinished(result)}:"
    header = ("rows", "experts", "width", "skew", *names, "ratio", "of dense")
    return [line, _table(header, [_grouped_row(case, names) for case in cases])]


def _grouped_row(case: dict[str, Any], names: Sequence[str]) -> tuple[str, ...]:
    found, judged, directions = case["implementations"], case["judged"], grouped_matmul.DIRECTIONS
    return (
        f"{case['pairs']:,}",
        str(case["experts"]),
        f"{case['width']:,} x {case['out']:,}",
        str(case["skew"]),
        *(_figures(found.get(name, {}), "tflops", ".0f", directions) for name in names),
        *(_figures(judged, field, ".2f", directions) for field in ("ratio", "of_dense")),
    )


def ssd_tables(results: Sequence[dict[str, Any]]) -> str:
    """For each GPU its newest state-space duality, in milliseconds; empty without any."""
    return "\n\n".join(part for result in _newest(results) for part in _ssd_table(result))


def _ssd_table(result: dict[str, Any]) -> list[str]:
    cases = ssd.merged(gpu.results_of(result, "ssd"))
    if not cases:
        return []
    names = list(dict.fromkeys(name for case in cases for name in case["implementations"]))
    line = f"{result['device']}, {result['date']}. State-space duality (Mamba-2), forward / forward and backward in "
    line += f"milliseconds; the last column is {ssd.OURS[0]}'s speed over the fastest other{_unfinished(result)}:"
    header = ("rows x positions", "heads", "groups", "state", "documents", *names, "ratio")
    return [line, _table(header, [_ssd_row(case, names) for case in cases])]


def _ssd_row(case: dict[str, Any], names: Sequence[str]) -> tuple[str, ...]:
    found = case["implementations"]
    medians = [
        {of: made.get(of, {}).get("milliseconds", {}) for of in ssd.DIRECTIONS}
        for made in (found.get(name, {}) for name in names)
    ]
    return (
        f"{case['rows']} x {case['length']:,}",
        f"{case['heads']} of {case['width']}",
        str(case["groups"]),
        str(case["size"]),
        str(case["documents"]),
        *(_figures(one, "median", ".3f", ssd.DIRECTIONS) for one in medians),
        _figures(case["judged"], "ratio", ".2f", ssd.DIRECTIONS),
    )


def _unfinished(result: dict[str, Any]) -> str:
    names = [name for name, section in result["sections"].items() if section.get("incomplete")]
    return f" ({', '.join(names)} did not finish)" if names else ""


def _figures(found: dict[str, Any], field: str, form: str, directions: Sequence[str]) -> str:
    """A figure of each direction; a dash for what there is not."""
    numbers = [found.get(direction, {}).get(field) for direction in directions]
    if all(number is None for number in numbers):
        return "-"
    return " / ".join("-" if number is None else format(number, form) for number in numbers)


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
