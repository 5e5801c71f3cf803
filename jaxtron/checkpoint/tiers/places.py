"""Where copies lie on a host: a directory of the user's own for each run, with room for them."""

import json
import os
import shutil
import stat
from pathlib import Path

from jaxtron.checkpoint.processes import gather_texts
from jaxtron.config import UserError, expand_home
from jaxtron.words import readable_bytes

# in a run's directory: which copies are this run's
IDENTITY_FILE = "copies_of"


def home(setting: str, root: str, run: str) -> Path:
    """The directory for a run's copies below a root, which only this user may enter; made where it is not there.

    All processes call this; a `UserError` on all of them where one cannot have it.
    """
    above = Path(expand_home(root)).absolute() / f"jaxtron-{os.getuid()}"
    problem = ""
    try:
        above.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = above.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
            problem = f"{above} is somebody else's"
        else:
            (above / run).mkdir(mode=0o700, exist_ok=True)
    except (OSError, ValueError) as error:
        problem = getattr(error, "strerror", None) or str(error)
    if problem := next(filter(None, gather_texts(problem)), ""):
        raise UserError(f"{setting} {root}: no copies of the state can be written there: {problem}; choose another")
    return above / run


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
