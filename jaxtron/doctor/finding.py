"""What a check finds: one line, and what mends it."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

Level = Literal["good", "doubt", "fault"]


@dataclass(frozen=True)
class Finding:
    """A sentence of one check; a fault would end or spoil the run, a doubt may, and both have a mend."""

    check: str
    level: Level
    text: str
    mend: str = ""
    host: str = ""

    def line(self, width: int) -> str:
        """As a person reads it."""
        where = f"{self.host}: " if self.host else ""
        return f"{self.level:<5}  {self.check:<{width}}  {where}{self.text}{f'; {self.mend}' if self.mend else ''}"


def good(check: str, text: str) -> Finding:
    """Nothing to do."""
    return Finding(check, "good", text)


def doubt(check: str, text: str, mend: str) -> Finding:
    """Something that may be meant, or costs time."""
    return Finding(check, "doubt", text, mend)


def fault(check: str, text: str, mend: str) -> Finding:
    """Something that a run would not survive, or suffer from."""
    return Finding(check, "fault", text, mend)


def exit_code(findings: Iterable[Finding]) -> int:
    """1 where there is a fault."""
    return int(any(finding.level == "fault" for finding in findings))


def report(findings: Sequence[Finding]) -> list[str]:
    """The lines of a report; its last says how it is."""
    width = max((len(finding.check) for finding in findings), default=0)
    counts = {level: sum(finding.level == level for finding in findings) for level in ("fault", "doubt")}
    parts = [f"{count} {level}{'s' if count > 1 else ''}" for level, count in counts.items() if count]
    return [*(finding.line(width) for finding in findings), f"doctor: {' and '.join(parts) or 'nothing wrong'}"]


def as_json(findings: Sequence[Finding]) -> dict[str, object]:
    """The same for programs."""
    return {"ok": not exit_code(findings), "findings": [asdict(finding) for finding in findings]}
