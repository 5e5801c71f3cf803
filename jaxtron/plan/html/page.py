"""A plan or a search as one page: a file that needs no other, for any browser."""

import html
import json
from functools import cache
from pathlib import Path
from typing import Any

from jaxtron.command import PAGE, write_whole
from jaxtron.plan.html.figures import finite, plan_data, search_data
from jaxtron.plan.html.parts import PageParts
from jaxtron.plan.plan import Plan
from jaxtron.plan.search.search import SearchResult

ASSETS = Path(__file__).with_name("assets")
_SCRIPTS = "common tables headline mesh memory timeline traffic search start"


def write_plan_page(
    plan: Plan, parts: PageParts, path: Path, *, command: str, text: str, tokens: float | None = None
) -> None:
    """The page of a compiled plan; `command` made it, `text` was printed. Replaces the file whole."""
    _write(path, plan.title, {"command": command, "text": text, "plan": plan_data(plan, parts, tokens)})


def write_search_page(
    found: SearchResult,
    parts: PageParts | None,
    path: Path,
    *,
    title: str,
    command: str,
    text: str,
    tokens: float | None = None,
) -> None:
    """The page of a search, with the plan of its best layout where that was compiled, of which `parts` are."""
    best = found.best.plan
    plan = None if best is None or parts is None else plan_data(best, parts, tokens)
    _write(path, title, {"command": command, "text": text, "plan": plan, "search": search_data(found)})


def page_text(title: str, data: dict[str, Any]) -> str:
    """The whole page: template, style, scripts and data, in which no text can end the element that it is in."""
    content = json.dumps(finite(data), allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    parts = {
        "beginning": PAGE,
        # half a character, as a file name of another encoding has, cannot be written
        "title": html.escape(title.encode("utf-8", "replace").decode()),
        "style": _asset("page.css"),
        "script": "\n".join(_asset(f"{name}.js") for name in _SCRIPTS.split()),
        "data": content,
    }
    pieces = _asset("page.html").split("@@")
    return "".join(parts[piece] if place % 2 else piece for place, piece in enumerate(pieces))


def _write(path: Path, title: str, data: dict[str, Any]) -> None:
    write_whole(path, page_text(title, data))


@cache
def _asset(name: str) -> str:
    return (ASSETS / name).read_text(encoding="utf-8")
