"""The page of a plan in a real browser, without a window: what it draws and how it answers pointer and keys."""

import dataclasses
import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jaxtron.plan.__main__ import main
from jaxtron.plan.html.page import write_plan_page, write_search_page
from tests.support.commands import run_main
from tests.support.made_up_plans import DATA, EXCHANGE, MARKUP, PIPE, TENSOR, made_up_plan, made_up_search

CHROMIUM = Path("/usr/bin/chromium")
FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-dev-shm-usage"
)
FRAMES = "() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))"
# how many colours a canvas shows; a blank one has one
COLORS = """canvas => {
  const copy = new OffscreenCanvas(canvas.width, canvas.height).getContext("2d", { willReadFrequently: true });
  copy.drawImage(canvas, 0, 0);
  return new Set(new Uint32Array(copy.getImageData(0, 0, canvas.width, canvas.height).data.buffer)).size;
}"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CHROMIUM.exists(), reason=f"no {CHROMIUM}: apt-get install chromium"),
]
playwright = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install 'jaxtron[browser]'")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as found:
        one = found.chromium.launch(executable_path=str(CHROMIUM), args=FLAGS.split())
        yield one
        one.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of pages: of a plan, of a small one, and of a search."""
    folder = tmp_path_factory.mktemp("pages")
    plan, parts = made_up_plan(f"named {MARKUP}")
    told = {"command": f"python -m jaxtron.plan '{MARKUP}'", "text": f"the report {MARKUP}"}
    write_plan_page(plan, parts, folder / "plan.html", **told)
    large = made_up_plan("large", pipe=64, microbatches=512)
    write_plan_page(*large, folder / "large.html", **told)
    write_search_page(made_up_search(plan), parts, folder / "search.html", title="found", **told)
    write_search_page(made_up_search(), None, folder / "formula.html", title="found", **told)
    return folder


class Opened:
    """A page in the browser, and what went wrong on it."""

    def __init__(self, browser: Any, path: Path, **options: Any) -> None:
        self.wrong: list[str] = []
        self.context = browser.new_context(viewport={"width": 1280, "height": 900}, offline=True, **options)
        self.page = self.context.new_page()
        self.page.on("console", lambda said: self.wrong.append(said.text))
        self.page.on("pageerror", lambda error: self.wrong.append(str(error)))
        self.page.on("request", self._asked)
        self.page.goto(path.as_uri())
        self.settle()

    def _asked(self, request: Any) -> None:
        # its icon is empty, and within it
        if not request.url.startswith("data:") and request.resource_type != "document":
            self.wrong.append(request.url)

    def settle(self) -> None:
        self.page.evaluate(FRAMES)

    def texts(self, selector: str) -> list[str]:
        return self.page.locator(selector).all_inner_texts()


@pytest.fixture
def opened(browser: Any, pages: Path) -> Iterator[Any]:
    found: list[Opened] = []

    def opened(name: str, **options: Any) -> Opened:
        found.append(Opened(browser, pages / f"{name}.html", **options))
        return found[-1]

    yield opened
    for one in found:
        one.context.close()
        assert not one.wrong


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", ["plan", "large", "search", "formula"])
def test_every_picture_is_there_without_errors_and_requests(name: str, scheme: str, opened):
    shown = opened(name, color_scheme=scheme)
    sections = "time mesh memory timeline communication traffic parameters diagnostics command".split()
    expected = ["search", "command"] if name == "formula" else sections
    found = shown.page.evaluate("[...document.querySelectorAll('section')].map(one => one.id)")
    assert {*expected} <= {*found}
    assert ("search" in found) == (name in ("search", "formula"))
    for canvas in shown.page.locator("canvas").all():
        assert canvas.evaluate(COLORS) > 3, canvas.get_attribute("aria-label")
        assert canvas.get_attribute("aria-label")
    if name != "formula":
        assert shown.page.locator("canvas").count() == 3 and shown.page.locator("#stages rect").count() >= 4
        assert shown.texts("#headline .value") == ["4 s", "4,096", "25.0%", "60 GiB"] or name == "large"
    background = shown.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", background)[:3])) > 600) == (scheme == "light")
    # as wide as the window and no wider
    assert shown.page.evaluate("document.documentElement.scrollWidth") <= 1280


def test_names_with_markup_are_text(opened):
    shown = opened("plan")
    assert shown.page.locator("img").count() == 0
    assert MARKUP in shown.page.inner_text("#title") and MARKUP in shown.page.title()
    assert MARKUP in shown.page.inner_text("#command-line") and MARKUP in shown.page.inner_text("#diagnostics")
    assert any(MARKUP in text for text in shown.texts("#parameters td"))


def test_parameters_are_sorted_and_searched(opened):
    shown = opened("plan")
    names = functools.partial(shown.texts, "#parameters tbody td:first-child")
    assert names()[:3] == ["embedding.table", "stack.mlp.up", "stack.mlp.down"]
    head = shown.page.locator("#parameters th", has_text="bytes a device")
    head.locator("button").click()
    assert head.get_attribute("aria-sort") == "descending" and names()[:2] == ["stack.mlp.up", "stack.mlp.down"]
    head.locator("button").press("Enter")
    assert head.get_attribute("aria-sort") == "ascending" and names()[-1] == "stack.mlp.up"
    box = shown.page.locator("#parameters input")
    # no phrase of a row, but both words
    box.fill("kernel MLP")
    assert sorted(names()) == ["stack.mlp.down", "stack.mlp.up"]
    assert "2 of 5 arrays" in shown.page.inner_text("#parameters")
    box.fill("no such thing (")
    assert names() == [] and "0 of 5 arrays" in shown.page.inner_text("#parameters")


def test_timelines_are_zoomed_moved_and_read(opened):
    shown = opened("large")
    canvas = shown.page.locator("#timeline canvas")
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    whole = shown.page.evaluate("page.timeline.range()")
    # a wheel that is not meant for it scrolls the page
    shown.page.mouse.move(box["x"] + 400, box["y"] + 200)
    shown.page.mouse.wheel(0, 40)
    shown.settle()
    assert shown.page.evaluate("page.timeline.range()") == whole
    canvas.scroll_into_view_if_needed()
    canvas.focus()
    box = canvas.bounding_box()
    shown.page.mouse.move(box["x"] + 400, box["y"] + 200)
    for _ in range(20):
        shown.page.mouse.wheel(0, -300)
    shown.settle()
    low, high = shown.page.evaluate("page.timeline.range()")
    assert 0 < low < high < whole[1] and high - low < whole[1] / 100
    shown.page.keyboard.press("ArrowRight")
    assert shown.page.evaluate("page.timeline.range()")[0] > low
    shown.page.keyboard.press("0")
    assert shown.page.evaluate("page.timeline.range()") == whole
    # the first forward of the first stage, by pointer and by keys
    shown.page.get_by_role("button", name="First slots").click()
    shown.page.mouse.move(box["x"] + 70, canvas.bounding_box()["y"] + 26)
    shown.settle()
    assert shown.page.inner_text("#tip").startswith("stage 0, forward of microbatch 0\n0.00")
    canvas.focus()
    for key in ("ArrowDown", "ArrowDown", "ArrowDown", "."):
        shown.page.keyboard.press(key)
    # the pointer's place was the first
    assert re.match(r"stage \d+, forward of microbatch 1: ", shown.page.inner_text("#timeline .readout"))
    before = shown.page.evaluate("page.timeline.range()")
    shown.page.mouse.move(box["x"] + 600, canvas.bounding_box()["y"] + 100)
    shown.page.mouse.down()
    shown.page.mouse.move(box["x"] + 300, canvas.bounding_box()["y"] + 100)
    shown.page.mouse.up()
    assert shown.page.evaluate("page.timeline.range()")[0] > before[0]


def test_traffic_adds_up_and_is_entered(opened):
    shown = opened("plan")
    inside, between = shown.page.evaluate("page.traffic.total()")
    # 32 devices in four nodes, of a stage each; a pipeline's ends have one neighbour
    assert inside == pytest.approx(32 * (TENSOR + DATA + EXCHANGE))
    assert between == pytest.approx(8 * PIPE * 3)
    assert shown.page.evaluate("page.traffic.cells().length") == 32 * 7 + 8 * 6
    large = opened("large")
    assert large.page.evaluate("page.traffic.view().unit") == 8
    assert large.page.evaluate("page.traffic.cells().length") == 64 + 2 * 63
    canvas = large.page.locator("#traffic canvas")
    canvas.scroll_into_view_if_needed()
    canvas.focus()
    for key in ("ArrowRight", "ArrowRight", "ArrowDown"):
        large.page.keyboard.press(key)
    said = large.page.inner_text("#traffic .readout")
    assert said == f"node 1 to itself: {8 * (TENSOR + DATA + EXCHANGE) // 2**30} GiB over NVLink a step"
    large.page.keyboard.press("Enter")
    assert large.page.evaluate("page.traffic.view()") == {"unit": 1, "rows": [8, 16], "columns": [8, 16]}
    large.page.get_by_role("button", name="All devices").click()
    assert large.page.evaluate("page.traffic.view().unit") == 8
    large.page.locator("#traffic select").select_option(index=3)
    assert large.page.evaluate("page.traffic.cells().every(cell => cell[2] === 0)")


def test_meshes_tell_devices(opened):
    shown = opened("plan")
    shown.page.evaluate("page.mesh.point(13)")
    assert shown.page.inner_text("#mesh .readout").startswith("device 13, node 1, GPU 5: pipe 1, data 1, tensor 1;")
    shown.page.locator("#mesh button", has_text="pipe 4").click()
    assert shown.page.locator("#mesh button[aria-pressed=true]").inner_text() == "pipe 4"
    canvas = shown.page.locator("#mesh canvas")
    canvas.focus()
    shown.page.keyboard.press("ArrowRight")
    shown.page.keyboard.press("ArrowDown")
    assert "device 8, node 1, GPU 0" in shown.page.inner_text("#mesh .readout")


def test_layouts_of_a_search_tell_and_give_their_flags(opened):
    shown = opened("search")
    assert shown.page.locator("#scatter circle").count() == 12
    # the best compiled one is shown at first
    assert shown.page.inner_text("#flags").startswith("--mesh.data 1 --mesh.tensor 32")
    point = shown.page.locator("#scatter circle[data-i='5']")
    point.scroll_into_view_if_needed()
    point.hover()
    row = shown.page.evaluate("page.search.rows[5]")
    assert row["mesh"] in shown.page.inner_text("#tip") and "MFU" in shown.page.inner_text("#tip")
    point.click()
    assert shown.page.inner_text("#flags") == row["flags"]
    shown.page.locator("#scatter").focus()
    shown.page.keyboard.press("Home")
    fastest = shown.page.evaluate("page.search.picked()")
    assert fastest["seconds"] == min(one["seconds"] for one in shown.page.evaluate("page.search.rows"))
    shown.page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    shown.page.get_by_role("button", name="Copy the flags").click()
    shown.page.wait_for_selector("text=Copied")
    assert shown.page.evaluate("navigator.clipboard.readText()") == fastest["flags"]
    shown.page.locator("#search input").fill("tensor 7")
    assert shown.page.locator("#scatter circle:not(.faint)").count() == 1
    shown.page.locator("#search tbody tr").first.click()
    assert "--mesh.tensor 7" in shown.page.inner_text("#flags")


def test_dark_and_light_by_the_button(opened):
    shown = opened("plan", color_scheme="light")
    canvas = shown.page.locator("#timeline canvas")
    before, body = canvas.screenshot(), shown.page.evaluate("getComputedStyle(document.body).backgroundColor")
    shown.page.locator("#theme").click()
    shown.settle()
    assert canvas.screenshot() != before
    assert shown.page.evaluate("getComputedStyle(document.body).backgroundColor") != body
    assert shown.page.inner_text("#theme") == "Light"
    # and as the system changes
    other = opened("plan", color_scheme="light")
    first = other.page.locator("#mesh canvas").screenshot()
    other.page.emulate_media(color_scheme="dark")
    other.settle()
    assert other.page.locator("#mesh canvas").screenshot() != first


def test_numbers_that_are_not_known_are_sorted_last(opened):
    shown = opened("plan")
    order = """down => {
      const rows = [{n: 3}, {n: null}, {n: 20}, {n: 1}];
      const found = page.table("made up", [{name: "n", value: row => row.n, right: true}], rows, {sorted: [0, down]});
      return [...found.querySelectorAll("td")].map(cell => cell.textContent);
    }"""
    assert shown.page.evaluate(order, False) == ["1", "3", "20", ""]
    assert shown.page.evaluate(order, True) == ["20", "3", "1", ""]


def test_violent_zooming_on_a_sharp_screen_loses_nothing(opened):
    shown = opened("large", device_scale_factor=2)
    canvas = shown.page.locator("#timeline canvas")
    canvas.scroll_into_view_if_needed()
    canvas.focus()
    box = canvas.bounding_box()
    shown.page.mouse.move(box["x"] + 500, box["y"] + 150)
    for delta in (-100_000, 100_000, -100_000):
        for _ in range(30):
            shown.page.mouse.wheel(0, delta)
        shown.settle()
        low, high = shown.page.evaluate("page.timeline.range()")
        assert 0 <= low < high <= shown.page.evaluate("page.timeline.end")
        assert canvas.evaluate(COLORS) > 3
    for key in ("End", "ArrowRight", "-", "Home", "ArrowLeft", "ArrowUp", ",", "0"):
        shown.page.keyboard.press(key)
    assert shown.page.evaluate("page.timeline.range()") == [0, shown.page.evaluate("page.timeline.end")]
    assert canvas.evaluate("canvas => canvas.width / canvas.clientWidth") == pytest.approx(2, abs=0.01)


@pytest.mark.parametrize("case", ["one device", "a million", "does not fit", "no node is full"])
def test_extreme_plans(case: str, browser: Any, tmp_path: Path):
    plan, parts = made_up_plan(schedule="zero_bubble", microbatches=3)
    if case == "one device":
        plan = dataclasses.replace(plan, num_gpus=1, communication=[], mesh=dict.fromkeys(plan.mesh, 1))
        parts = dataclasses.replace(parts, sizes=dict.fromkeys(parts.sizes, 1), axes=())
    elif case == "a million":
        plan = dataclasses.replace(plan, num_gpus=2**20)
        parts = dataclasses.replace(parts, sizes={"pipe": 4, "data": 2**15, "tensor": 8})
    elif case == "does not fit":
        memory = dataclasses.replace(plan.memory, activations=90 * 2**30)
        plan = dataclasses.replace(plan, memory=memory, hint="--mesh.tensor 8")
    else:
        plan = dataclasses.replace(plan, gpus_per_node=7)
    path = tmp_path / "report.html"
    write_plan_page(plan, parts, path, command="", text="")
    shown = Opened(browser, path)
    assert not shown.wrong and not shown.page.evaluate("page.errors")
    mesh = shown.page.inner_text("#mesh")
    assert {"one device": "1 device in", "a million": "1,048,576 devices"}.get(case, "32 devices") in mesh
    if case == "a million":
        assert "too many devices for a matrix" in shown.page.inner_text("#traffic")
        assert "The first 16,384 devices are drawn" in mesh
    elif case == "one device":
        assert shown.page.locator("#traffic").count() == 0
    elif case == "does not fit":
        text = shown.page.inner_text("#memory")
        assert "136 GiB do not fit: 57 GiB more" in text and "Change first: --mesh.tensor 8" in text
    else:
        assert shown.page.evaluate("page.traffic.total()[1]") > 8 * 3 * PIPE
    shown.context.close()


@pytest.mark.parametrize("width", [360, 760, 2000])
def test_narrow_and_wide_windows(width: int, opened):
    shown = opened("search")
    shown.page.set_viewport_size({"width": width, "height": 700})
    shown.settle()
    assert shown.page.evaluate("document.documentElement.scrollWidth") <= width
    assert all(canvas.evaluate(COLORS) > 3 for canvas in shown.page.locator("canvas").all())


def test_the_command_writes_a_page(browser: Any, tmp_path: Path):
    path = tmp_path / "report.html"
    flags = "--gpu h100 --gpus 8 --mesh.data 2 --mesh.tensor 2 --mesh.pipe 2 --train.microbatches 6 --html"
    ended = run_main(main, ["configs/gpt_tiny.yaml", *flags.split(), path])
    assert ended.code == 0 and f"written   {path}" in ended.out, ended.err
    shown = Opened(browser, path)
    assert not shown.wrong and shown.page.inner_text("#command-line") == (
        f"python -m jaxtron.plan configs/gpt_tiny.yaml {flags} {path}"
    )
    step = re.search(r"prediction: ([\d.]+) (\w+) a step", ended.out)
    assert step is not None and shown.texts("#headline .value")[0] == f"{step[1]} {step[2]}"
    assert shown.page.inner_text("#report-text") or shown.page.text_content("#report-text").strip() in ended.out
    assert shown.page.locator("#parameters tbody tr").count() == 10
    shown.context.close()
