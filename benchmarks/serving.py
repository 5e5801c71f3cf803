"""`python -m benchmarks.serving --benchmark.model RUN_OR_WEIGHTS`: a server under load, as JSON.

It starts `jaxtron.serve` on this machine and asks over HTTP: first one request at a time, then more and more at once,
every prompt other and of another length. Each number of clients comes in turns with one client, so that what they gain
by sharing a batch is a ratio of neighbours.
"""

import concurrent.futures
import contextlib
import http.client
import json
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
from pydantic import Field

from benchmarks import record
from jaxtron.command import configure, run_command
from jaxtron.config import Config, UserError

ADDRESS = re.compile(r"serving .* at http://127\.0\.0\.1:(\d+)/v1")


class LoadConfig(Config):
    """Who is asked, and how much."""

    model: str = ""
    """The directory of a run, or of Hugging Face weights."""
    flags: str = ""
    """Further flags of `serve`."""
    clients: tuple[int, ...] = (8, 32)
    """Requests that are there at once."""
    requests: int = Field(default=32, ge=1)
    """Of a turn."""
    tokens: int = Field(default=32, ge=1)
    """Of an answer."""
    prompt: int = Field(default=48, ge=2)
    """Characters of the longest prompt; the shortest has half."""
    pairs: int = Field(default=5, ge=1)
    """Turns of each number of clients."""
    output: str | None = None
    """A .json file, or a folder that gets <date>-<device>-<name>.json (none: only printed)."""


class ServingBenchmark(Config):
    """What is measured."""

    benchmark: LoadConfig = LoadConfig()


@contextlib.contextmanager
def served(words: list[str]) -> Iterator[int]:
    """The port of a server that runs; `UserError` where it does not start."""
    command = [sys.executable, "-m", "jaxtron.serve", *words, "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if found := ADDRESS.match(line):
                yield int(found[1])
                break
        else:
            raise UserError("the server did not start; its words are above")
    finally:
        process.terminate()
        process.communicate()


def ask(port: int, prompt: str, tokens: int) -> tuple[float, float, int]:
    """Seconds to the first token and to the last of a streamed answer, and how many tokens it has."""
    body = {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "stream": True, "ignore_eos": True}
    begun, first, count = time.perf_counter(), None, 0
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=600)) as connection:
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        if response.status != 200:
            raise UserError(f"the server refused: {response.read().decode()}")
        for line in response:
            if line.startswith(b"data: {"):
                first = first or time.perf_counter() - begun
                count += 1
    return first or 0.0, time.perf_counter() - begun, count


def turn(port: int, prompts: list[str], clients: int, tokens: int) -> dict[str, Any]:
    """Requests and tokens a second of so many clients that have the prompts answered, and what each waited."""
    begun = time.perf_counter()
    with concurrent.futures.ThreadPoolExecutor(clients) as pool:
        answers = list(pool.map(lambda prompt: ask(port, prompt, tokens), prompts))
    seconds = time.perf_counter() - begun
    return {
        "requests_per_second": len(prompts) / seconds,
        "first_token_milliseconds": [1e3 * first for first, _, _ in answers],
        "answer_milliseconds": [1e3 * whole for _, whole, _ in answers],
    }


def measure(port: int, load: LoadConfig) -> dict[str, Any]:
    """Turns of one client and of each number of them."""
    random = np.random.default_rng(0)
    letters = np.array(list("abcdefgh ijklmnop"))

    def prompts(count: int) -> list[str]:
        lengths = random.integers(load.prompt // 2, load.prompt + 1, count)
        return ["".join(random.choice(letters, length)) for length in lengths]

    found: dict[str, Any] = {}
    for clients in load.clients:
        few = max(1, load.requests // clients)
        # what is compiled is compiled here: prompts of every length, as many at once as there will be
        for count in (1, clients):
            turn(port, prompts(load.requests), count, load.tokens)
        alone, together = [], []
        for _ in range(load.pairs):
            alone.append(turn(port, prompts(few), 1, load.tokens))
            together.append(turn(port, prompts(load.requests), clients, load.tokens))
        ratios = [
            many["requests_per_second"] / one["requests_per_second"] for one, many in zip(alone, together, strict=True)
        ]
        found[str(clients)] = {
            "one_client": summary(alone, load.tokens),
            "together": summary(together, load.tokens),
            "together_of_one": middle(ratios),
        }
    return found


def summary(turns: list[dict[str, Any]], tokens: int) -> dict[str, Any]:
    """Medians and quartiles over the turns; of waiting, over all their requests."""
    rates = [one["requests_per_second"] for one in turns]
    waited = {name: [ms for one in turns for ms in one[name]] for name in turns[0] if name != "requests_per_second"}
    return {
        "requests_per_second": middle(rates),
        "tokens_per_second": middle([rate * tokens for rate in rates]),
        **{name: {**middle(each), "p95": round(float(np.percentile(each, 95)), 2)} for name, each in waited.items()},
    }


def middle(found: list[float]) -> dict[str, float]:
    """Median and quartiles."""
    parts = (("p25", 25), ("median", 50), ("p75", 75))
    return {name: round(float(np.percentile(found, part)), 2) for name, part in parts}


def main(argv: list[str]) -> int:
    """Measures what the command line asks, prints the JSON and writes it if asked to."""
    purpose = "Ask a server of text for much at once."
    config = configure(ServingBenchmark, argv, program="python -m benchmarks.serving", purpose=purpose)
    if config is None:
        return 0
    load = config.benchmark
    if not load.model:
        raise UserError("no model; give --benchmark.model, the directory of a run or of Hugging Face weights")
    with served([load.model, *shlex.split(load.flags)]) as port:
        found = measure(port, load)
    result = {
        "benchmark": "serving",
        "name": "serving",
        **record.circumstances("cpu", "cpu", 1),
        "settings": load.model_dump(exclude={"model", "output"}),
        "clients": found,
    }
    print(json.dumps(result, indent=1))
    if load.output:
        record.write(record.destination(load.output, "serving", "cpu"), result)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
