"""What a run ends with: losses, a sample of text, and where everything is."""

from collections import Counter
from pathlib import Path
from typing import Protocol, runtime_checkable

import jax
import numpy as np
from jaxtyping import Int32, Integer
from rich.console import Console

from jaxtron.run.metrics import ARRAYS_FILE, EVENTS_FILE, read_metrics
from jaxtron.run.session import RunSession
from jaxtron.train.divergence import diverged
from jaxtron.train.hooks import HookList
from jaxtron.train.loop import TrainOutcome
from jaxtron.train.plots import LOAD_FILE, LOSS_FILE
from jaxtron.train.setup import Run
from jaxtron.train.validation import validate
from jaxtron.typing import PyTree
from jaxtron.words import printable

FILES = {
    "configuration": "config.yaml",
    "metrics": "metrics.jsonl",
    "arrays": ARRAYS_FILE,
    "events": EVENTS_FILE,
    "loss curve": LOSS_FILE,
    "expert load": LOAD_FILE,
    "checkpoints": "checkpoints",
}


@runtime_checkable
class Sampler(Protocol):
    """What draws `num_tokens` tokens after a prompt, all below `vocab`; a `FloatingPointError` where it cannot."""

    def __call__(
        self, session: RunSession, params: PyTree, prompt: Integer[np.ndarray, "P"], *, num_tokens: int, vocab: int
    ) -> Int32[np.ndarray, "N"]:
        """Draw them."""
        ...


def finish(run: Run, outcome: TrainOutcome, sampler: Sampler, hooks: HookList) -> None:
    """Tell the hooks that the run is complete, and print the summary (process 0).

    Every process takes part in validating and sampling.
    """
    text = sample_text(run, outcome, sampler)
    found = (outcome.validation or validate(run, outcome.state)) | validate(run, outcome.state, "test")
    if outcome.step > run.step:
        # a command that took no step leaves the run as it is
        hooks.event("complete", outcome.step)
    if jax.process_index() != 0:
        return
    metrics = run.directory / "metrics.jsonl"
    records = read_metrics(metrics) if metrics.exists() else []
    rows = [("steps", f"{outcome.step} of {max(outcome.step, run.config.train.steps)}")]
    skipped, bad = ((records[-1] if records else {}).get(name, 0) for name in ("skipped_steps", "bad_steps"))
    if skipped > bad:
        rows.append(("skipped steps", f"{skipped - bad:,.0f} (their gradients overflowed float16)"))
    if bad:
        rows.append(("bad steps", f"{bad:,.0f} (not applied: {run.directory / FILES['events']})"))
    if records:
        rows.append(("training loss", f"{records[-1]['loss']:.4f}"))
        rows.append(("speed", f"{records[-1]['tokens_per_second']:,.0f} tokens/s"))
    if outcome.copies is not None and outcome.seconds > 0:
        count, seconds = outcome.copies
        rows.append(("copies", f"{count:,} ({seconds / outcome.seconds:.2%} of the time)"))
    rows += [(name.replace("_", " "), f"{value:.4f}") for name, value in found.items()]
    for what, name in FILES.items():
        if (run.directory / name).exists():
            rows.append((what, f"{run.directory / name}{_events(run.directory) if name == EVENTS_FILE else ''}"))
    console = Console(highlight=False, markup=False, soft_wrap=True)
    if text:
        console.print("\nSample", style="bold")
        console.print(printable(text))
    console.print("\nRun", style="bold")
    # names of scores may be longer than those that every run has
    width = max(17, 2 + max(len(what) for what, _ in rows))
    for what, value in rows:
        console.print(f"{what:<{width}}{value}")


def _events(directory: Path) -> str:
    """How many of each, over all commands of the run."""
    counts = Counter(record["event"] for record in read_metrics(directory / EVENTS_FILE) if "event" in record)
    return f" ({', '.join(f'{count:,} {event}' for event, count in counts.items())})" if counts else ""


def sample_text(run: Run, outcome: TrainOutcome, sampler: Sampler) -> str:
    """A sample of text after a few tokens of the validation data; empty where none is asked for.

    A `UserError` where the state cannot predict any token.
    """
    source = run.data.validation if len(run.data.validation) else run.data.train
    if run.config.train.sample_tokens == 0 or not run.config.family.continues_text:
        return ""
    prompt = np.asarray(source[0].tokens[: min(16, run.config.data.sequence_length)])
    try:
        tokens = sampler(
            run.session,
            outcome.state.model,
            prompt,
            num_tokens=run.config.train.sample_tokens,
            vocab=run.data.tokenizer.vocab_size,
        )
    except FloatingPointError as error:
        raise diverged(run.checkpoints, outcome.step, f"no text after step {outcome.step}, {error}") from None
    return run.data.tokenizer.decode(np.concatenate([prompt, tokens]))
