"""How fast the viewer is for whoever sits in front of it, by the browser's own clock.

Measured are pictures per second while a camera moves, how long another class takes to show, and what a viewer that
follows a run in training takes of the processor. It needs a trained run and a Chromium, which draws its page in
software where there is no GPU, on the same cores.
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.results import RESULTS, format_table, hardware, write_section

SECONDS = 10.0
SIDE = 400  # pixels of the page, which is square so that a picture of 128 rows has 128 columns
CLASS_CHANGES = 12
PORT = 18480
#: notes when a picture's file is handed to the page, by the page's clock, and when something is clicked
CLOCK = """
window.pictures = []; window.clicked = 0;
const make = URL.createObjectURL;
URL.createObjectURL = function (thing) {
  if (thing instanceof Blob && thing.type.startsWith("image/")) window.pictures.push([performance.now(), thing]);
  return make.call(URL, thing);
};
document.addEventListener("click", () => { window.clicked = performance.now(); }, true);
"""
#: [[milliseconds, columns, rows], ...] of the pictures; their depths come as PNGs of the same type
PICTURES = """async () => {
  const found = [];
  for (const [time, blob] of window.pictures) {
    const bytes = new Uint8Array(await blob.slice(0, 2).arrayBuffer());
    if (bytes[0] !== 0xff || bytes[1] !== 0xd8) continue;
    const picture = await createImageBitmap(blob);
    found.push([time, picture.width, picture.height]);
  }
  return found;
}"""


@contextmanager
def viewer(run: str, *options: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """`graf view` as a person starts it, and its port."""
    command = [sys.executable, "-m", "graf", "view", run, "--port", str(PORT), *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    try:
        for line in process.stdout:
            if "open http://" in line:
                yield process, int(line.split("http://")[1].split(" ")[0].rpartition(":")[2])
                return
        raise RuntimeError(f"{' '.join(command)} ended with {process.wait()}")
    finally:
        process.terminate()
        process.communicate()


@contextmanager
def open_page(port: int) -> Iterator[Any]:
    """A page of the viewer in a headless Chromium, when the first full picture has come."""
    try:
        from playwright import sync_api
    except ModuleNotFoundError:
        raise SystemExit("playwright is not installed; run: pip install -r requirements-dev.txt") from None
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        raise SystemExit("no Chromium is installed here")
    arguments = ["--headless=new", "--no-sandbox", "--enable-unsafe-swiftshader"]
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=arguments)
        page = browser.new_page(viewport={"width": SIDE, "height": SIDE})
        page.add_init_script(CLOCK)
        page.goto(f"http://localhost:{port}")
        page.wait_for_function("window.pictures.length >= 4")
        page.wait_for_timeout(3000)
        yield page
        browser.close()


def choose(page: Any, label: str, option: str) -> None:
    """Choose in a dropdown of the panel."""
    row = page.locator(f'xpath=//label[normalize-space(text())="{label}"]/ancestor::div[2]')
    row.locator("input[role=combobox]").click()
    page.get_by_role("option", name=option, exact=True).click()


def turn(page: Any, seconds: float) -> list[list[float]]:
    """Orbit without a pause; the pictures that came meanwhile."""
    page.mouse.move(60, SIDE - 60)
    page.mouse.down()
    page.evaluate("window.pictures = []")
    started = time.monotonic()
    while (elapsed := time.monotonic() - started) < seconds:
        page.mouse.move(60 + 40 * math.sin(2 * elapsed), SIDE - 60 + 30 * math.cos(3 * elapsed))
        page.wait_for_timeout(25)
    pictures: list[list[float]] = page.evaluate(PICTURES)
    page.mouse.up()
    page.wait_for_timeout(2000)
    return pictures


def describe_rate(name: str, pictures: Sequence[Sequence[float]]) -> list[str]:
    """A row: rows in motion, size of the pictures, their rate, the longest wait for one."""
    times = [picture[0] for picture in pictures]
    gaps = [after - before for before, after in pairwise(times)]
    rate = 1000 * len(gaps) / (times[-1] - times[0])
    columns, rows = (statistics.median(picture[axis] for picture in pictures) for axis in (1, 2))
    return [name, f"{columns:.0f} x {rows:.0f}", f"{rate:.1f}", f"{max(gaps):.0f}"]


def change_class(page: Any, class_name: str) -> tuple[float, float]:
    """Milliseconds from the click on a class to its first picture, and to the full one."""
    page.evaluate("window.pictures = []")
    choose(page, "class", class_name)
    page.wait_for_timeout(2500)
    clicked = page.evaluate("window.clicked")
    times = [picture[0] - clicked for picture in page.evaluate(PICTURES)]
    return times[0], times[-1]


def processor_seconds(process: subprocess.Popen[str]) -> float:
    """What a process has used of processors so far (Linux)."""
    fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measure_following(run: str) -> float:
    """The share of one core that a viewer takes which follows a run, with a page that nobody moves."""
    with viewer(run, "--follow") as (process, port), open_page(port) as page:
        before, started = processor_seconds(process), time.monotonic()
        page.wait_for_timeout(1000 * 3 * SECONDS)
        return (processor_seconds(process) - before) / (time.monotonic() - started)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and write the section."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", help="run folder of a trained generator")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    with viewer(options.run) as (_, port), open_page(port) as page:
        rates = []
        for rows in ("128", "adaptive"):
            choose(page, "rows in motion", rows)
            page.wait_for_timeout(2000)
            rates.append(describe_rate(rows, turn(page, SECONDS)))
        classes = _class_names(page)
        changes = [change_class(page, classes[(number + 1) % len(classes)]) for number in range(CLASS_CHANGES)]
    following = measure_following(options.run)
    first, full = ([change[which] for change in changes] for which in (0, 1))
    header = ["rows in motion", "pictures", "pictures per second", "longest wait, ms"]
    text = (
        f"{hardware()}. The page is {SIDE} x {SIDE} pixels in a headless Chromium without a GPU, which shares the "
        f"cores; its camera is dragged for {SECONDS:.0f} s, and its own clock says when pictures come.\n\n"
        f"{format_table(header, rates)}\n\n"
        f"Another class is seen {statistics.median(first):.0f} ms after the click (the slowest of {CLASS_CHANGES}: "
        f"{max(first):.0f} ms), and in full after {statistics.median(full):.0f} ms, of which 200 ms are waiting for "
        f"something newer. `graf view --follow` with a page that nobody moves takes {100 * following:.2f}% of one core."
    )
    write_section("The viewer's pace", "python -m benchmarks.viewer RUN", text, options.results)
    return 0


def _class_names(page: Any) -> list[str]:
    """The names in the dropdown, which is left as it was."""
    row = page.locator('xpath=//label[normalize-space(text())="class"]/ancestor::div[2]')
    row.locator("input[role=combobox]").click()
    names: list[str] = [option.inner_text() for option in page.get_by_role("option").all()]
    page.keyboard.press("Escape")
    return names


if __name__ == "__main__":
    sys.exit(main())
