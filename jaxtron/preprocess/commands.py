"""What each subcommand does and prints, once its line was read."""

import json
from collections.abc import Callable
from typing import Any

from jaxtron.data.megatron.gpt_index import order_digest
from jaxtron.preprocess.inspect import inspect, text
from jaxtron.preprocess.merge import merge
from jaxtron.preprocess.request import Inspect, Merge, Order, Tokenize
from jaxtron.preprocess.tokenize import tokenize
from jaxtron.words import plural


def run_tokenize(request: Tokenize) -> None:
    """Text to token files, and what was written."""
    outcome = tokenize(request)
    left_out = f", {plural(outcome.damaged, 'damaged entry', 'damaged entries')} left out" if outcome.damaged else ""
    print(f"{plural(outcome.documents, 'document')}, {plural(outcome.tokens, 'token')}{left_out}")
    print(f"{outcome.text_bytes / 1e6:,.1f} MB of text in {outcome.seconds:.1f} s", end=", ")
    print(f"{outcome.text_bytes / 1e6 / outcome.seconds:,.1f} MB/s")
    for prefix in outcome.prefixes:
        print(f"written   {prefix}.bin and .idx")


def run_merge(request: Merge) -> None:
    """Token files put together."""
    merge(request)
    print(f"written   {request.output}.bin and .idx")


def run_inspect(request: Inspect) -> None:
    """What token files hold."""
    found = inspect(request)
    print(json.dumps(found, indent=1) if request.json else text(found))


def run_order(request: Order) -> None:
    """Digests of Megatron's indices."""
    digest = order_digest(
        request.prefix,
        sequence_length=request.sequence_length,
        samples=request.samples,
        seed=request.seed,
        split=request.split,
    )
    if request.json:
        print(json.dumps(digest, indent=1))
    else:
        for name, index in digest.items():
            print(f"{name:<16}{index['length']:>14,}  {index['sha256']}")


RUN: dict[str, Callable[[Any], None]] = {
    "tokenize": run_tokenize,
    "merge": run_merge,
    "inspect": run_inspect,
    "order": run_order,
}
