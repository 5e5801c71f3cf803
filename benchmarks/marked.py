"""A document's text between two marks, which a benchmark writes anew."""

from dataclasses import dataclass
from pathlib import Path

from jaxtron.config import UserError


@dataclass(frozen=True)
class Marked:
    """A file, and what is around its marks."""

    path: Path
    before: str
    """As far as the first mark, it included."""
    after: str
    """From the second on."""

    def write(self, content: str) -> None:
        """Puts the content between the marks, in place of what is there."""
        between = f"\n{content}\n" if content else "\n"
        self.path.write_text(f"{self.before}{between}{self.after}", encoding="utf-8")


def read_marked(name: str, begin: str, end: str) -> Marked:
    """The file of this name; `UserError` where it has not both marks, in this order."""
    path = Path(name)
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    before, first, rest = text.partition(begin)
    _, second, after = rest.partition(end)
    if not first or not second:
        raise UserError(f"{path} has no {begin} followed by {end}: add the two lines where the tables belong")
    return Marked(path, before + first, second + after)
