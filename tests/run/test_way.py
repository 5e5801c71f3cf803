"""The files on a batch's way to a kernel are those that ARCHITECTURE.md lists: found by running, not by hope."""

import re
import sys
from pathlib import Path
from types import FrameType

import jax

import jaxtron
from jaxtron.run.batches import abstract_batch
from jaxtron.run.configuration import Configuration
from jaxtron.run.session import make_session

ROOT = Path(jaxtron.__file__).parent
# where weights are gathered, tokens embedded, attention and the loss computed, gradients reduced
ARRIVALS = {
    ("sharding/parameters.py", "gather_once"),
    ("sharding/parameters.py", "gather_at_use"),
    ("sharding/parameters.py", "reduce_gradients"),
    ("layers/embedding.py", "look_up"),
    ("kernels/attention/chunked.py", "forward"),
    ("layers/loss.py", "cross_entropy"),
}
CONFIG = {
    "model": {"num_layers": 1, "hidden_size": 16, "num_heads": 2, "vocab_size": 32, "vocab_multiple": 32},
    "data": {"sequence_length": 8},
    "train": {"global_batch": 4, "precision": "fp32", "steps": 1},
    "mesh": {"data": 2},
}


def place_of(frame: FrameType) -> tuple[str, str]:
    """The frame's file below `jaxtron`, empty where it is elsewhere, and its function."""
    path = Path(frame.f_code.co_filename)
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else "", frame.f_code.co_name


def files_on_the_way() -> dict[tuple[str, str], list[str]]:
    """Of each arrival the files on the call stack, outermost first, while the step of a session is traced."""
    model = CONFIG["model"] | {"attention": {"implementation": "xla"}}
    session = make_session(Configuration.model_validate(CONFIG | {"model": model}), jax.devices()[:2])
    state = session.abstract_state()
    with session.use():
        batch = abstract_batch(session.config)
    found: dict[tuple[str, str], list[str]] = {}
    names = {name for _, name in ARRIVALS}

    def note(frame: FrameType | None, event: str, _: object) -> None:
        # by its name first: every call of Python comes by here
        if event != "call" or frame is None or frame.f_code.co_name not in names:
            return
        arrival, files = place_of(frame), []
        if arrival not in ARRIVALS or arrival in found:
            return
        while frame is not None:
            files.insert(0, place_of(frame)[0])
            frame = frame.f_back
        found[arrival] = list(dict.fromkeys(filter(None, files)))

    sys.setprofile(note)
    try:
        session.lower_step(state, batch)
    finally:
        sys.setprofile(None)
    return found


def test_architecture_lists_the_files_that_a_debugger_stops_in() -> None:
    stacks = files_on_the_way()
    assert stacks.keys() == ARRIVALS
    text = (ROOT.parent / "ARCHITECTURE.md").read_text()
    listed = re.findall(r"^ {4}(\S+\.py) ", text.split("## The way back")[0], re.MULTILINE)
    met = dict.fromkeys(file for files in stacks.values() for file in files)
    assert set(listed) == met.keys()
    assert len(listed) < 20
