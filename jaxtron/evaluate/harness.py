"""The tasks of lm-evaluation-harness on a model of ours; the one file that needs the extra `eval`.

Its rules are the harness's own (`TemplateLM`): where a text is cut in context and continuation, which token begins a
text without context, how long texts roll in windows. What is here is what it asks of a model: how likely
continuations are, and text that follows a prompt.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxtron.config import UserError
from jaxtron.data.tokenizers import Tokenizer
from jaxtron.generate.protocol import TokenEngine
from jaxtron.generate.settings import SamplingSettings
from jaxtron.generate.streaming import AnswerStream, hidden_tokens

try:
    from lm_eval import simple_evaluate
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window, make_table
except ImportError:
    TemplateLM, simple_evaluate = object, None

# tokens of an answer where a task does not say
MOST_NEW = 256
# what of a task's settings of generation is heard, beside its stops and its length
SAMPLED = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
# a word for the harness that changes nothing here
UNUSED = ("do_sample", "num_beams", "use_cache", "early_stopping")


def check_installed() -> None:
    """A `UserError` unless the harness is there."""
    if simple_evaluate is None:
        raise UserError('--tasks needs lm-evaluation-harness: pip install "jaxtron[eval]"')


@dataclass
class _Answer:
    """A request that is being generated."""

    index: int
    text: str
    stream: AnswerStream


class HarnessModel(TemplateLM):
    """A model as the harness sees it. `add_bos_token` puts the tokenizer's before every text."""

    is_asked = False
    """Whether a task came as far as the model."""

    def __init__(self, engine: TokenEngine, tokenizer: Tokenizer, *, add_bos_token: bool = False) -> None:
        super().__init__()
        self._engine, self._tokenizer = engine, tokenizer
        end = tokenizer.end_of_document
        if end is None:
            raise UserError(
                "the tokenizer has no token that ends a text, which the harness puts before one without context; give "
                "it with --data.end_of_document"
            )
        self._end = end
        bos = tokenizer.special_tokens.get("bos_token")
        self._bos = None if bos is None else tokenizer.token_id(bos)
        self._adds_bos = add_bos_token
        if add_bos_token and self._bos is None:
            raise UserError("--add_bos_token: the tokenizer has no bos_token; leave it out")

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return self._end

    @property
    def prefix_token_id(self) -> int:
        """The token before a text without context."""
        return self._end if self._bos is None else self._bos

    @property
    def max_length(self) -> int:
        """Tokens that the model reads at most."""
        return self._engine.room

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Ids of a text, after the one that begins it where that is asked for."""
        ids = self._tokenizer.encode(string).tolist()
        adds = self._adds_bos and add_special_tokens is not False and ids[:1] != [self._bos]
        return [self._bos, *ids] if adds and self._bos is not None else ids

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[tuple[str, str], list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        """Of each continuation its log-likelihood in nats, and whether each of its tokens was the likeliest.

        Contexts are cut from the left where both are too long.
        """
        self.is_asked = True
        whole = [np.asarray((context + continuation)[-self.max_length - 1 :]) for _, context, continuation in requests]
        # those of about the same length together, the longest first: what does not fit shows at once
        order = sorted(range(len(whole)), key=lambda number: (-len(whole[number]), whole[number].tolist()))
        found: dict[int, tuple[float, bool]] = {}
        for start in range(0, len(order), self._engine.rows):
            some = order[start : start + self._engine.rows]
            scores = self._engine.score([whole[number] for number in some], top=1)
            for number, (logprobs, best, _values) in zip(some, scores, strict=True):
                strings, continuation = requests[number][0], requests[number][2]
                count = len(continuation)
                if not np.isfinite(logprobs).all():
                    raise FloatingPointError("its logits are not finite")
                if count > len(logprobs):
                    raise UserError(
                        f"a continuation of {count:,} tokens is longer than what the model reads, {self.max_length:,}"
                    )
                is_best = bool((best[-count:, 0] == whole[number][-count:]).all()) if count else True
                found[number] = float(logprobs[len(logprobs) - count :].sum()), is_best
                self.cache_hook.add_partial("loglikelihood", strings, found[number])
        return [found[number] for number in range(len(requests))]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Of each text its log-likelihood in nats, in windows that do not overlap."""
        pieces, owners = [], []
        for owner, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0], add_special_tokens=False)
            windows = get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, context_len=1)
            for context, continuation in map(make_disjoint_window, windows):
                pieces.append((("", ""), context, continuation))
                owners.append(owner)
        sums = [0.0] * len(requests)
        for owner, (value, _) in zip(owners, self._loglikelihood_tokens(pieces), strict=True):
            sums[owner] += value
        for request, value in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, value)
        return sums

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """What follows each prompt, up to the first of its stops."""
        self.is_asked = True
        engine, hidden = self._engine, hidden_tokens(self._tokenizer)
        waiting, rows = list(range(len(requests))), dict[int, _Answer]()
        texts = [""] * len(requests)
        while waiting or rows:
            for row in range(engine.rows):
                if row in rows or not waiting:
                    continue
                index = waiting.pop(0)
                prompt, settings = self._asked(*requests[index].args)
                engine.begin(row, prompt, settings)
                stream = AnswerStream(self._tokenizer, settings, room=engine.room - len(prompt), hidden=hidden)
                rows[row] = _Answer(index, "", stream)
            for chosen in engine.step():
                answer = rows[chosen.row]
                answer.text += answer.stream.push(chosen.token)
                if answer.stream.finish_reason is not None:
                    engine.end(chosen.row)
                    del rows[chosen.row]
                    texts[answer.index] = answer.text
                    self.cache_hook.add_partial("generate_until", requests[answer.index].args, answer.text)
        return texts

    def _asked(self, prompt: str, given: Mapping[str, Any]) -> tuple[np.ndarray, SamplingSettings]:
        """Ids of a prompt, cut from the left where there would be no room behind it, and the settings of a task."""
        kwargs: dict[str, Any] = dict(normalize_gen_kwargs(dict(given), MOST_NEW))
        most, until = kwargs.pop("max_gen_toks"), kwargs.pop("until", [])
        sampled = {name: kwargs.pop(name) for name in SAMPLED if name in kwargs}
        unknown = sorted(kwargs.keys() - set(UNUSED))
        if unknown:
            raise UserError(f"a task's generation_kwargs have {unknown[0]}, which is not known here")
        if most >= self.max_length:
            raise UserError(
                f"a task asks for {most:,} new tokens, and the model has room for {self.max_length:,} in all"
            )
        ids = self.tok_encode(prompt)[-(self.max_length - most) :] or [self.prefix_token_id]
        settings = SamplingSettings(
            max_new_tokens=most,
            stop=tuple(text for text in until if text),
            eos_token_ids=(self._end,),
            seed=0,
            **sampled,
        )
        return np.asarray(ids), settings


def evaluate_tasks(
    model: HarnessModel,
    tasks: Sequence[str],
    *,
    task_path: Path | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
) -> dict[str, Any]:
    """The harness's results of tasks by name; `task_path` is a directory of further ones, in YAML.

    `UserError` for tasks that are not known, or whose data cannot be had.
    """
    manager = TaskManager(include_path=None if task_path is None else str(task_path))
    unknown = [name for name in tasks if not manager.match_tasks([name])]
    if unknown:
        where = "" if task_path is None else f" nor in {task_path}"
        raise UserError(
            f"--tasks {unknown[0]}: no such task in lm-evaluation-harness{where}; lm_eval ls tasks lists them"
        )
    try:
        found = simple_evaluate(
            model=model,
            tasks=list(tasks),
            task_manager=manager,
            num_fewshot=num_fewshot,
            limit=limit,
            bootstrap_iters=0,
            log_samples=False,
        )
    except UserError:
        raise
    except Exception as error:
        # of many kinds, by what is wrong with a task's data or its file; what is ours comes later
        if model.is_asked:
            raise
        reason = str(error).strip().splitlines()[:1] or [type(error).__name__]
        raise UserError(
            f"--tasks {' '.join(tasks)}: the harness cannot make them of their files and data: {reason[0]}; without "
            "internet only tasks of local files work"
        ) from None
    assert found is not None
    return dict(found)


def table(results: Mapping[str, Any]) -> str:
    """The harness's own table of results."""
    return make_table(dict(results))


def as_json(results: Mapping[str, Any]) -> str:
    """Results with their versions and settings."""
    kept: Iterable[str] = ("results", "groups", "versions", "n-shot", "n-samples", "configs")
    return json.dumps({name: results[name] for name in kept if name in results}, indent=1, default=str)
