"""The documentation: every relative link and anchor is right, and the site builds without a warning."""

import contextlib
import functools
import importlib
import importlib.machinery
import importlib.util
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

from jaxtron.__main__ import VERBS
from jaxtron.command import run_command
from jaxtron.config import settings
from jaxtron.run.configuration import Configuration

ROOT = Path(__file__).parents[1]
PAGES = [*(ROOT / f"{name}.md" for name in ("README", "ARCHITECTURE", "CONTRIBUTING", "CHANGELOG"))]
PAGES += sorted((ROOT / "docs").rglob("*.md"))
LINK = re.compile(r"\[(?:[^\[\]]|\[[^\]]*\])*\]\(([^)\s]+)\)")
BUILDER = ROOT / "tools" / "docs"
NO_TOOLS = "the documentation's tools are not here: make docs installs them, or DOCS_PYTHON names a Python"


def prose(text: str) -> Iterator[str]:
    """Lines that are neither code nor fences, without what is in backticks."""
    fenced = False
    for line in text.split("\n"):
        if line.lstrip().startswith(("```", "~~~")):
            fenced = not fenced
        elif not fenced and not line.startswith("    "):
            yield line


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    found: set[str] = set()
    for line in prose(text):
        if match := re.match(r"#{1,6} +(.*)", line):
            words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", match[1]).strip().lower()
            base = re.sub(r"[^\w\- ]", "", words).replace(" ", "-")
            anchor, number = base, 0
            while anchor in found:
                number += 1
                anchor = f"{base}-{number}"
            found.add(anchor)
    return found


def broken(page: Path) -> list[str]:
    """What is wrong with the relative links of a page."""
    wrong = []
    for line in prose(page.read_text()):
        for target in LINK.findall(re.sub(r"`[^`]*`", "``", line)):
            place, mark, anchor = target.partition("#")
            if re.match(r"[a-z]+:", place):
                continue
            file = (page.parent / place).resolve() if place else page
            if not file.exists():
                wrong.append(f"{page.name} has a link to {target}: there is no such file")
            elif mark and (file.suffix != ".md" or anchor not in anchors(file.read_text())):
                wrong.append(f"{page.name} has a link to {target}: there is no such heading")
    return wrong


def test_links_and_anchors_are_right():
    wrong = [line for page in PAGES for line in broken(page)]
    assert not wrong, "\n".join(wrong)
    # the pages do have links
    assert sum(len(LINK.findall(page.read_text())) for page in PAGES) > 100


def test_every_page_is_reached_from_the_readme():
    found, ways = set(), [ROOT / "README.md"]
    while ways:
        page = ways.pop()
        found.add(page)
        places = (target.partition("#")[0] for line in prose(page.read_text()) for target in LINK.findall(line))
        pages = {(page.parent / place).resolve() for place in places if place.endswith(".md") and ":" not in place}
        ways += pages - found
    lost = {path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md")}
    lost -= {path.relative_to(ROOT).as_posix() for path in found}
    assert not lost, f"no link leads to {sorted(lost)}"


def test_a_wrong_link_is_noticed(tmp_path: Path):
    (tmp_path / "other.md").write_text("# The `first`, *one*\n\n# Again\n\n# Again\n")
    good = "[a](other.md#the-first-one) [b](other.md#again-1) [`c`](#own) `[d](nowhere)`\n\n    [e](nowhere)\n\n# Own\n"
    page = tmp_path / "page.md"
    page.write_text(good)
    assert broken(page) == []
    page.write_text(f"{good}[a](other.md#second) [b](no.md) [c](#other) [d](../{tmp_path.name}/other.md)\n")
    assert [line.split(": ")[1] for line in broken(page)] == [
        "there is no such heading",
        "there is no such file",
        "there is no such heading",
    ]


@pytest.fixture(scope="module")
def builder() -> ModuleType:
    loader = importlib.machinery.SourceFileLoader("docs_builder", str(BUILDER))
    spec = importlib.util.spec_from_loader(loader.name, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def test_links_out_of_the_pages_become_copies(builder: ModuleType, tmp_path: Path):
    root = tmp_path / "repository"
    (root / "docs" / "deep").mkdir(parents=True)
    (root / "configs").mkdir()
    (root / "configs" / "a.yaml").write_text("seed: 1\n")
    (root / "README.md").write_text("[a](docs/deep/b.md#x) [c](configs/a.yaml)\n\n    [d](nowhere.md)\nwords:\n- one\n")
    (root / "CHANGELOG.md").write_text("| a | `\\|` and \\| |\n")
    (root / "docs" / "deep" / "b.md").write_text(
        "[up](../../README.md) [a](../../configs/a.yaml) [w](https://e.org/)\n"
    )
    (root / "mkdocs.yml").write_text("")
    (root / "notebooks").mkdir()
    (root / "notebooks" / "01_a.py").write_text("# %% [markdown]\n# [up](../README.md) [b](02_b.ipynb)\n")
    (root / "notebooks" / "02_b.py").write_text("# %%\nx = 1\n")
    (root / "build" / "notebooks").mkdir(parents=True)
    drawn = {"cell_type": "code", "source": "f()", "outputs": [{"data": {"image/png": "aGk="}}]}
    (root / "build" / "notebooks" / "02_b.ipynb").write_text(json.dumps({"cells": [drawn]}))
    builder.prepare(root, tmp_path / "built")
    pages = tmp_path / "built" / "pages"
    text = (pages / "index.md").read_text()
    assert text == "[a](deep/b.md#x) [c](files/configs/a.yaml.txt)\n\n    [d](nowhere.md)\nwords:\n\n- one\n"
    assert (
        pages / "deep" / "b.md"
    ).read_text() == "[up](../index.md) [a](../files/configs/a.yaml.txt) [w](https://e.org/)\n"
    assert (pages / "files" / "configs" / "a.yaml.txt").read_text() == "seed: 1\n"
    assert (pages / "notebooks" / "01_a.md").read_text() == "[up](../index.md) [b](02_b.md)\n"
    assert "![output](02_b_1.png)" in (pages / "notebooks" / "02_b.md").read_text()
    assert (pages / "changelog.md").read_text() == "| a | `|` and \\| |\n"
    (root / "README.md").write_text("[a](gone.md)\n")
    with pytest.raises(SystemExit, match="README.md has a link to gone.md, which is not there; mend it"):
        builder.prepare(root, tmp_path / "built")


def test_notebooks_are_pages(builder: ModuleType, tmp_path: Path):
    source = "# ---\n# jupyter: x\n# ---\n\n# %% [markdown]\n# # Title\n#\n# Words $p - 1$.\n\n# %%\nx = 1\n\nx\n"
    assert builder.percent_text(source) == "# Title\n\nWords <i>p - 1</i>.\n\n```python\nx = 1\n\nx\n```\n"
    outputs = [{"data": {"image/png": "aGk="}}, {"text": ["a\n", "b\n"]}, {"data": {"text/html": "<b>c</b>"}}]
    cells = [{"cell_type": "markdown", "source": ["# T"]}, {"cell_type": "code", "source": "f()", "outputs": outputs}]
    text = builder.executed_text({"cells": cells}, "one", tmp_path)
    assert text.startswith("# T\n\n```python\nf()\n```\n\n![output](one_1.png)\n\n```text\na\nb\n```\n\n")
    assert '<div class="output"><b>c</b></div>' in text and (tmp_path / "one_1.png").read_bytes() == b"hi"


def tools() -> str | None:
    """A Python with the documentation's tools, if this machine has one."""
    candidates = [os.environ.get("DOCS_PYTHON", ""), str(ROOT / ".venv-docs" / "bin" / "python"), sys.executable]
    for python in filter(os.path.exists, candidates):
        found = subprocess.run([python, "-c", "import mkdocs, material, mkdocstrings"], capture_output=True)
        if found.returncode == 0:
            return python
    return None


@pytest.mark.slow
def test_a_warning_of_the_builder_s_is_an_error(builder: ModuleType, tmp_path: Path, monkeypatch, capfd):
    python = tools()
    if python is None:
        pytest.skip(NO_TOOLS)
    (tmp_path / "README.md").write_text("# One\n\n[a](docs/two.md#nowhere)\n")
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "two.md").write_text("# Two\n")
    (tmp_path / "mkdocs.yml").write_bytes((ROOT / "mkdocs.yml").read_bytes())
    monkeypatch.setenv("DOCS_PYTHON", python)
    monkeypatch.setattr(builder, "ROOT", tmp_path)
    monkeypatch.setattr(builder, "BUILD", tmp_path / "build")
    assert builder.main() == 1
    assert "'two.md' does not contain an anchor '#nowhere'" in capfd.readouterr().err


@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_asks_nobody_for_anything():
    python = tools()
    if python is None:
        pytest.skip(NO_TOOLS)
    built = subprocess.run([BUILDER], env=os.environ | {"DOCS_PYTHON": python}, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    site = ROOT / "build" / "site"
    names = {path.relative_to(site).as_posix() for path in site.rglob("*.html")}
    assert {
        "index.html",
        "architecture.html",
        "runs.html",
        "reference/sharding.html",
        "decisions/0005-pipelines.html",
    } <= names
    assert 'id="jaxtron.api.session.Session.initial_state"' in (site / "reference" / "jaxtron.html").read_text()
    assert "make_rules" in (site / "reference" / "sharding.html").read_text()
    for path in (*site.rglob("*.html"), *site.rglob("*.css")):
        # links are for readers; what a browser fetches by itself is not
        fetched = re.findall(r'(?:src="|<link[^>]*href="|url\(|@import ")(?:https?:)?//[^")]+', path.read_text())
        assert not fetched, f"{path}: {fetched}"


def cells_of_ours() -> Iterator[tuple[str, str]]:
    """Code of the second column of docs/coming_from.md, after its introduction, and the table's row."""
    for line in (ROOT / "docs" / "coming_from.md").read_text().split("\n"):
        cells = re.split(r"(?<!\\)\|", line)
        if line.startswith("| ") and len(cells) > 3 and not cells[1].startswith("---"):
            for code in re.findall(r"`([^`]+)`", cells[2]):
                yield code, line


def wrong_names(cells: Iterable[tuple[str, str]]) -> list[str]:
    """What the cells name that is not: settings, values of settings with choices, verbs and their flags, files."""
    known, wrong = settings(Configuration), []
    for code, row in cells:
        verb, *words = code.split()
        verb = words.pop(1) if verb == "python" else verb
        verb = verb.removeprefix("jaxtron.")
        for number, word in enumerate(code.split()):
            if not word.startswith("--"):
                continue
            setting, following = known.get(word[2:]), code.split()[number + 1 : number + 2]
            if setting is None and (verb not in VERBS or word not in help_of(verb)):
                wrong.append(f"no flag {word}: {row}")
            elif setting is not None and setting.name in CHOICES and following:
                if not re.search(rf"(^|\W){re.escape(following[0])}(\W|$)", setting.type_text + " FILE.csv"):
                    wrong.append(f"{word} cannot be {following[0]}: {row}")
        if re.fullmatch(r"[\w/]+/\w+(\.py|\.yaml)", code) and not (ROOT / code).exists():
            wrong.append(f"no file {code}: {row}")
        if re.match(r"[a-z]+ ", code) and not code.startswith("python ") and verb not in VERBS:
            wrong.append(f"no verb {verb}: {row}")
    return wrong


# settings whose values are few, and told by their type
CHOICES = {name for name, setting in settings(Configuration).items() if re.match(r"\w+ \| \w+ \|", setting.type_text)}


FURTHER_HELP = {
    "plan": [["--schedule", "--help"]],
    "evaluate": [["--tasks", "--help"]],
    "convert": [["upcycle", "--help"]],
}


@functools.cache
def help_of(verb: str) -> str:
    """All that a verb says of its flags."""
    main = importlib.import_module(f"jaxtron.{verb}.__main__").main
    lines = [["--help"], *FURTHER_HELP.get(verb, [])]
    shown = io.StringIO()
    for words in lines:
        # argparse ends the program
        with contextlib.redirect_stdout(shown), contextlib.suppress(SystemExit):
            run_command(main, words)
    return shown.getvalue()


def test_what_others_come_to_is_there():
    cells = list(cells_of_ours())
    assert len(cells) > 250
    wrong = wrong_names(cells)
    assert not wrong, "\n".join(wrong)


def test_what_is_not_there_is_noticed():
    cells = [
        "--mesh.tenser 2",
        "--context.method rings",
        "plan --gpus_each 3",
        "jaxtron/none.py",
        "planned --gpu a",
        "--x",
    ]
    assert len(wrong_names((cell, "row") for cell in cells)) == len(cells) + 1
    good = ["--mesh.tensor 2", "--context.method ring", "plan --gpu h100", "jaxtron/sharding/rules.py", "nothing"]
    assert wrong_names((cell, "row") for cell in good) == []
