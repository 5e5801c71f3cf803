"""Tasks that ask for what stands earlier in a text: copying (2402.01032) and looking numbers up in a phonebook.

Both are conversations whose answers alone have loss (docs/data.md). Of copying: a line of random letters, none of them
twice, and the same line again. Of a phonebook: lines of a name, which is a letter, and a number; an empty line; the
names again in another order, each to be followed by its number.
"""

import json
import random
import string
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jaxtron.command import write_whole
from jaxtron.data.packing import PackedSequence
from jaxtron.data.tokenizers import ByteTokenizer

LETTERS = string.ascii_lowercase
DIGITS = 2
# of the examples to train on, for the losses during training
VALIDATION = 0.02
TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'assistant' %}{% generation %}{{ message.content }}"
    "{% endgeneration %}{% else %}{{ message.content }}{% endif %}{% endfor %}"
)


@dataclass(frozen=True)
class Example:
    """Prompts and answers in turn, each answer with the line feed that ends it.

    `size` is how much there is to remember, letters of a string or people of a phonebook; `given` is the string or
    the book.
    """

    turns: tuple[tuple[str, str], ...]
    size: int
    given: str

    def line(self) -> str:
        """As JSON lines have it."""
        messages = [
            {"role": role, "content": text}
            for turn in self.turns
            for role, text in zip(("user", "assistant"), turn, strict=True)
        ]
        return json.dumps({"messages": messages})

    def sequence(self) -> PackedSequence:
        """Bytes, and which of them the model writes: what training reads of the line by `TEMPLATE`."""
        pieces = [(text, place == 1) for turn in self.turns for place, text in enumerate(turn)]
        encode = ByteTokenizer().encode
        ids = np.concatenate([encode(text) for text, _ in pieces]).astype(np.int32)
        return PackedSequence(ids, np.concatenate([np.full(len(text), written) for text, written in pieces]))


def copying(size: int, draw: random.Random) -> Example:
    """A string of `size` letters, and the same again."""
    line = "".join(draw.sample(LETTERS, size)) + "\n"
    return Example(((line, line),), size, line)


def phonebook(size: int, draw: random.Random) -> Example:
    """`size` people with their numbers, then all of them asked for in another order."""
    names = draw.sample(string.ascii_uppercase, size)
    book = {name: "".join(draw.choices(string.digits, k=DIGITS)) for name in names}
    lines = "".join(f"{name}{number}\n" for name, number in book.items())
    asked = draw.sample(names, size)
    prompts = [f"{lines}\n{asked[0]}", *asked[1:]]
    turns = tuple((prompt, f"{book[name]}\n") for prompt, name in zip(prompts, asked, strict=True))
    return Example(turns, size, lines)


@dataclass(frozen=True)
class Task:
    """Examples of one kind: sizes that training draws from, evenly, and those that are scored."""

    make: Callable[[int, random.Random], Example]
    trained: range
    scored: tuple[int, ...]

    def draw(self, count: int, held_out: int, seed: int) -> tuple[list[Example], list[Example]]:
        """`count` examples to train on, and `held_out` of each scored size, none with a string or book of those."""
        draw = random.Random(f"{self.make.__name__} {seed}")
        train = [self.make(draw.choice(self.trained), draw) for _ in range(count)]
        known = {example.given for example in train}
        others: list[Example] = []
        for size in self.scored:
            end = len(others) + held_out
            while len(others) < end:
                example = self.make(size, draw)
                if example.given not in known:
                    others.append(example)
        return train, others


TASKS = {
    "copying": Task(copying, range(2, 27), (4, 8, 12, 16, 20, 26)),
    "phonebook": Task(phonebook, range(2, 17), (2, 4, 8, 12, 16)),
}


def prepare(folder: Path, name: str, rows: int, held_out: int, seed: int) -> tuple[tuple[object, ...], list[Example]]:
    """Makes examples enough for about `rows` rows of one each, and writes them into a folder.

    Flags of a training on them, and the held-out examples.
    """
    train, others = TASKS[name].draw(rows, held_out, seed)
    lines, template = folder / "train.jsonl", folder / "template.jinja"
    text = "".join(example.line() + "\n" for example in train)
    # a run that goes on reads the file it began with: untouched where it says the same
    if not lines.is_file() or lines.read_text(encoding="utf-8") != text:
        folder.mkdir(parents=True, exist_ok=True)
        template.write_text(TEMPLATE, encoding="utf-8")
        write_whole(lines, text)
    cache = ("--data.cache_directory", folder / "cache", "--data.validation_fraction", VALIDATION)
    return ("--data.format", "chat", "--data.path", lines, "--data.chat.template", template, *cache), others
