"""The report in a real browser: nothing runs over the edge and nothing lies on anything, on a phone and a desk, light and dark."""

from __future__ import annotations

import base64
import json
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Self

import pytest

from launch import plots
from launch.report_html import Page, Section, Table, Tile, to_html

pytestmark = pytest.mark.slow
WIDTHS = (390, 1280)
SCHEMES: tuple[Literal["light", "dark"], ...] = ("light", "dark")
FOUND = """
// A phone zooms out where something is too wide: then innerWidth grows, the page's own width does not.
const width = document.documentElement.clientWidth, wide = width + 1, found = {over: [], clipped: [], overlaps: []};
const shown = e => e.getClientRects().length > 0 && getComputedStyle(e).visibility !== "hidden";
const scroller = e => { const s = e.closest(".scroll"); return s && getComputedStyle(s).overflowX === "auto" ? s : null; };
const name = e => e.tagName + ":" + e.textContent.trim().slice(0, 40);
if (document.documentElement.scrollWidth > width) found.over.push("page " + document.documentElement.scrollWidth);
for (const e of document.body.querySelectorAll("*")) {
  if (!shown(e)) continue;
  const r = e.getBoundingClientRect();
  if (!scroller(e) && (r.left < -1 || r.right > wide)) found.over.push(name(e));
  if (e.clientWidth && e.scrollWidth > e.clientWidth + 1 && !e.closest("svg") && scroller(e) !== e) found.clipped.push(name(e));
}
const boxes = [], walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (walker.nextNode()) {
  const node = walker.currentNode, e = node.parentElement;
  if (!node.data.trim() || !shown(e)) continue;
  const range = document.createRange();
  range.selectNodeContents(node);
  const around = (scroller(e) || document.documentElement).getBoundingClientRect();
  for (const r of range.getClientRects()) {
    const box = {l: Math.max(r.left, around.left), r: Math.min(r.right, around.right), t: r.top, b: r.bottom, node};
    const svg = e.closest("svg");
    if (svg) {
      const s = svg.getBoundingClientRect();
      if (r.left < s.left - 1 || r.right > s.right + 1 || r.top < s.top - 1 || r.bottom > s.bottom + 1) found.over.push("svg " + name(e));
    }
    if (box.r - box.l > 1 && box.b - box.t > 1) boxes.push(box);
  }
}
boxes.sort((a, b) => a.t - b.t);
for (let i = 0; i < boxes.length; i++)
  for (let j = i + 1; j < boxes.length && boxes[j].t < boxes[i].b - 2; j++) {
    const a = boxes[i], b = boxes[j];
    if (a.node !== b.node && Math.min(a.r, b.r) - Math.max(a.l, b.l) > 2 && Math.min(a.b, b.b) - b.t > 3)
      found.overlaps.push(a.node.data.trim().slice(0, 40) + " | " + b.node.data.trim().slice(0, 40));
  }
found.texts = boxes.length;
return found;
"""
LONG = "a_name_that_nobody_would_give_but_a_program_did_" * 3

FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


def find_browser() -> tuple[str, str] | None:
    """Chromium and its driver, where both are installed."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    return (browser, driver) if browser and driver else None


class Browser:
    """A headless Chromium by the WebDriver protocol: one browser with an empty profile in `profile`."""

    def __init__(self, paths: tuple[str, str], profile: Path, port: int) -> None:
        self._address = f"http://127.0.0.1:{port}"
        self._process = subprocess.Popen([paths[1], f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        options = {"binary": paths[0], "args": [*FLAGS, f"--user-data-dir={profile}"]}
        self._wait()
        made = self._post("/session", {"capabilities": {"alwaysMatch": {"goog:chromeOptions": options}}})
        self._session = f"/session/{made['sessionId']}"

    def _wait(self) -> None:
        for _ in range(300):
            try:
                with urllib.request.urlopen(f"{self._address}/status", timeout=10):
                    return
            except OSError:
                time.sleep(0.1)
        raise RuntimeError("chromedriver does not answer")

    def _post(self, path: str, body: dict[str, Any]) -> Any:
        request = urllib.request.Request(self._address + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=120) as answer:
            return json.load(answer)["value"]

    def tell(self, command: str, **parameters: Any) -> Any:
        """One command of the DevTools protocol."""
        return self._post(f"{self._session}/goog/cdp/execute", {"cmd": command, "params": parameters})

    def show(self, page: Path, width: int, scheme: Literal["light", "dark"]) -> None:
        """Opens a page in a window of this width (CSS pixels)."""
        self.tell("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 600)
        self.tell("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self._post(f"{self._session}/url", {"url": page.resolve().as_uri()})

    def evaluate(self, script: str) -> Any:
        """What a script returns."""
        return self._post(f"{self._session}/execute/sync", {"script": script, "args": []})

    def photograph(self, path: Path) -> None:
        """The whole page as PNG."""
        taken = self.tell("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(taken["data"]))

    def print(self, path: Path) -> None:
        """The page as it is printed, as PDF, on the paper that it asks for."""
        path.write_bytes(base64.b64decode(self.tell("Page.printToPDF", preferCSSPageSize=True, printBackground=True)["data"]))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            request = urllib.request.Request(self._address + self._session, method="DELETE")
            urllib.request.urlopen(request, timeout=60).close()
        finally:
            self._process.terminate()
            self._process.wait(30)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    paths = find_browser()
    if paths is None:
        pytest.skip("no Chromium with its driver here (Debian: apt install chromium chromium-driver)")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with Browser(paths, tmp_path_factory.mktemp("profile"), port) as opened:
        yield opened


def crowded() -> Page:
    """More rungs, longer names and longer texts than a report should have."""
    names = ["teacher", "labels_only", "step_by_step_soft", LONG, *[f"ctranslate2-int8_float16-{n}" for n in range(6)]]
    points = [plots.Point(name, 0.3 + n / 20, (0.2 + n / 20, 0.4 + n / 20), 10.0**n) for n, name in enumerate(names)]
    curve = plots.Curve("label", 0, list(range(500)), [2.0 / (n + 1) for n in range(500)])
    drawn = [
        plots.accuracy_against_size(points),
        plots.accuracy_against_latency([plots.Point(p.label, p.accuracy, p.interval, 1e-4 * (p.cost or 0)) for p in points]),
        plots.curves("Loss", [curve], "loss, nats a token", logarithmic=True),
        plots.bars("Zeros by layer", {f"encoder {n}": 0.3 for n in range(48)}, "zeros, %"),
    ]
    text = f"What is {LONG}? " + "It may be long. " * 30
    tables = [
        Table(["Rung", *[f"Column {n} batch 32" for n in range(12)]], [[name, *["1,234.5"] * 12] for name in names]),
        Table(["Input", "Gold", *names], [[text, "42", *["✓ 42"] * 5, *[f"✗ {LONG}"] * 5]] * 3, "Answers", 12, stacked=True),
        Table(["What", "Value"], [["system", LONG], [LONG, "x"]], "Facts", 2),
    ]
    sections = [Section("Everything", [text], tables, drawn, [text], code=f"stepdown run {LONG} " * 4)]
    tiles = [Tile("Accuracy", "100.0 %", "95 % interval 99.0 to 100.0 %"), *[Tile(LONG, "1,234,567.8 MB", LONG)] * 3]
    return Page(LONG, f"Run folder: /{LONG}/{LONG}", [text, text], [text], sections, tiles)


@pytest.fixture(scope="module", params=["a run", "a crowded one"])
def report(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if request.param == "a run":
        finished: Path = request.getfixturevalue("finished")
        return finished / "runs" / "tiny" / "report.html"
    path = tmp_path_factory.mktemp("crowded") / "report.html"
    path.write_text(to_html(crowded()), encoding="utf-8")
    return path


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("width", WIDTHS)
def test_nothing_runs_over_and_nothing_overlaps(report: Path, browser: Browser, width: int, scheme: Literal["light", "dark"]) -> None:
    browser.show(report, width, scheme)
    for details in ("closed", "open"):
        found: dict[str, Any] = browser.evaluate(FOUND)
        assert found.pop("texts") > 50
        assert found == {"over": [], "clipped": [], "overlaps": []}, (details, found)
        browser.evaluate("for (const e of document.querySelectorAll('details')) e.open = true")


def test_the_scheme_changes_the_colours(report: Path, browser: Browser) -> None:
    seen = []
    for scheme in SCHEMES:
        browser.show(report, 390, scheme)
        seen.append(browser.evaluate("const s = getComputedStyle(document.body); return [s.backgroundColor, s.color]"))
    assert seen[0] != seen[1]
    assert sum(map(int, seen[0][0][4:-1].split(","))) > 600 > 200 > sum(map(int, seen[1][0][4:-1].split(",")))


def test_a_check_that_finds_what_is_wrong(browser: Browser, tmp_path: Path) -> None:
    page = tmp_path / "bad.html"
    page.write_text(
        "<!doctype html><meta name=viewport content='width=device-width'><body>"
        "<p style='width: 900px'>wide</p><p style='position: absolute; top: 90px'>one</p>"
        "<p style='position: absolute; top: 90px'>two</p><div style='width: 40px; overflow: hidden; white-space: nowrap'>cut off here</div>"
    )
    browser.show(page, 390, "light")
    found = browser.evaluate(FOUND)
    assert found["over"] and found["clipped"] and found["overlaps"] == ["one | two"]
