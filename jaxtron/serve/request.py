"""The flags of `serve`: a model, where it is reached, and what one request may ask for."""

from dataclasses import dataclass
from pathlib import Path

from jaxtron.command import FlagParser, file_path, natural, positive, positive_number
from jaxtron.config import UserError, expand_home, settings
from jaxtron.generate.source import ModelSource, add_model_flags, split_source, taken
from jaxtron.run.configuration import Configuration

PROGRAM = "python -m jaxtron.serve"
USAGE = f"{PROGRAM} RUN_OR_WEIGHTS [--port 8000] [--flag value ...]"
MODEL_FLAGS = ("rows", "room", "step", "chat_template")
ROWS = 8


@dataclass(frozen=True)
class Limits:
    """What one request may take."""

    body_bytes: int = 4 * 2**20
    prompt_tokens: int | None = None
    """None: what the model has room for."""
    new_tokens: int | None = None
    seconds: float = 600.0
    """From its arrival to its last token."""
    waiting: int = 256
    """Sequences that wait for a row; more are refused."""


@dataclass(frozen=True)
class ServeRequest:
    """A model, an address, and the limits of requests."""

    source: ModelSource
    host: str = "127.0.0.1"
    port: int = 8000
    name: str = ""
    api_key: str | None = None
    limits: Limits = Limits()


def parse(argv: list[str]) -> ServeRequest:
    """The request of a command line; a `UserError` for what is missing or cannot be."""
    found, rest = _parser().parse_known_args(argv)
    word, path, overrides = split_source(rest, USAGE)
    given = {name: value for name, value in vars(found).items() if value is not None}
    model = {name: given.pop(name) for name in MODEL_FLAGS if name in given}
    limits = {name: given.pop(flag) for flag, name in _LIMITS.items() if flag in given}
    if given.get("port", 0) > 65535:
        raise UserError(f"--port {given['port']} must be at most 65535; 0 takes a free one")
    if "api_key_file" in given:
        given["api_key"] = _read_key(given.pop("api_key_file"))
    # of a repository its own, for its copy's directory is a number
    given.setdefault("name", path.resolve().name if Path(expand_home(word)) == path else word)
    return ServeRequest(source=ModelSource(path, overrides, **model), limits=Limits(**limits), **given)


_LIMITS = {
    "body_limit": "body_bytes",
    "prompt_limit": "prompt_tokens",
    "token_limit": "new_tokens",
    "time_limit": "seconds",
    "queue_limit": "waiting",
}


def _read_key(path: Path) -> str:
    try:
        key = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read --api_key_file {path}: {getattr(error, 'strerror', None) or error}") from None
    if not key or not key.isascii() or len(key.split()) != 1:
        raise UserError(f"--api_key_file {path} must have one word of ASCII in it")
    return key


def _parser() -> FlagParser:
    purpose = (
        "A model at an address, by OpenAI's protocol: /v1/completions, /v1/chat/completions, /v1/models, and /health, "
        "/tokenize, /detokenize, /tokenizer_info. Requests that come together are answered together."
    )
    further = (
        f"Of training's settings it takes {taken()} (python -m jaxtron.train --help). It needs pip install "
        '"jaxtron[serve]". Ctrl-C or SIGTERM lets requests end and takes no more. docs/generation.md tells more.'
    )
    parser = FlagParser(PROGRAM, purpose, usage=USAGE, further=further, others=settings(Configuration))
    add = parser.add_argument
    add("--host", metavar="ADDRESS", help="0.0.0.0 is reached from elsewhere: give a key (none: 127.0.0.1)")
    add("--port", type=natural, metavar="N", help="0 takes a free one (none: 8000)")
    add("--name", metavar="NAME", help="of the model to those who ask (none: the directory's)")
    add("--api_key_file", type=file_path, metavar="FILE", help="has a key that every request must bear (none: no key)")
    add_model_flags(parser)
    add("--body_limit", type=positive, metavar="BYTES", help="of a request (none: 4 MiB)")
    add("--prompt_limit", type=positive, metavar="T", help="tokens of a prompt (none: what there is room for)")
    add("--token_limit", type=positive, metavar="T", help="tokens of an answer (none: what there is room for)")
    add("--time_limit", type=positive_number, metavar="SECONDS", help="of a request (none: 600)")
    add("--queue_limit", type=positive, metavar="N", help="sequences that may wait for a row (none: 256)")
    return parser
