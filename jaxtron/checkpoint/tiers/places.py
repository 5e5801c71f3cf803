"""Where copies lie on a host: a directory of the user's own for each run, with room for them."""

import json
import os
import shutil
import stat
from pathlib import Path

from jaxtron.checkpoint.config import CheckpointConfig
from jaxtron.checkpoint.processes import gather_texts
from jaxtron.config import UserError, expand_home
from jaxtron.words import readable_bytes

# in a run's directory: which copies are this run's
IDENTITY_FILE = "copies_of"


def homes(config: CheckpointConfig) -> dict[str, Path]:
    """By the tier's name, where copies of all runs of this user lie on this host, as the settings say.

    All processes call this; a `UserError` on all of them where one cannot have such a directory.
    """
    roots = {"memory": config.memory_directory if config.memory_every else None, "local": config.local_directory}
    return {name: _home(f"checkpoint.{name}_directory", root) for name, root in roots.items() if root is not None}


def _home(setting: str, root: str) -> Path:
    """A directory below a root, which only this user may enter; made where it is not there.

    All processes call this; a `UserError` on all of them where one cannot have it.
    """
    above = Path(expand_home(root)).absolute() / f"jaxtron-{os.getuid()}"
    problem = ""
    try:
        above.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = above.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
            problem = f"{above} is somebody else's"
    except (OSError, ValueError) as error:
        problem = getattr(error, "strerror", None) or str(error)
    if problem := next(filter(None, gather_texts(problem)), ""):
        raise UserError(f"{setting} {root}: no copies of the state can be written there: {problem}; choose another")
    return above


def check_room(setting: str, directory: Path, needed: int) -> None:
    """`UserError` on all processes where a host has no room for its processes' copies, `needed` bytes of this one."""
    here = sum(path.stat().st_size for path in directory.iterdir() if path.is_file())
    free = shutil.disk_usage(directory).free + here
    place = f"{os.uname().nodename}:{directory}"
    shares = [json.loads(text) for text in gather_texts(json.dumps([place, needed]))]
    together = sum(share for other, share in shares if other == place)
    problem = f"{readable_bytes(together)} are needed, and {readable_bytes(free)} are free" if free < together else ""
    if problem := next(filter(None, gather_texts(problem)), ""):
        raise UserError(f"{setting}: three copies have no room in {directory}: {problem}; leave it out, or make room")
