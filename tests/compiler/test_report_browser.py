"""report.html in a browser: nothing fails, nothing overflows, in either theme, wide and narrow."""

from __future__ import annotations

import base64
import io
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from report_example import compiled, measured, of_policies, refused

from memcompile.compiler.report import Report
from memcompile.compiler.report_html import render
from memcompile.compiler.results import Results

pytestmark = pytest.mark.browser

FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
WIDTHS = (1440, 360)
# What stands in docs/pictures: the top of the page, so that a picture stays small.
HEIGHTS = {1440: 1180, 360: 1500}
BRIGHT = {"light": True, "dark": False}


def page_of(name: str, folder: Path) -> str:
    """A page of each kind, its kernels beside it."""
    if name == "whole":
        report = compiled()
        for kernel in report.lowered.kernels:
            source = folder / Path(kernel["source"]).name
            source.write_text("// a kernel\n")
            kernel["source"] = str(source)
        return render(report, measured(), "0.1.0")
    if name == "refused":
        return render(refused())
    report = long_names() if name == "long names" else every_memory()
    return render(report, measured() if name == "long names" else Results())


def every_memory() -> Report:
    policies = ("dense", "scout", "hierarchical", "hierarchical:refine=0,keep=no", "window")
    more = ("heavy-hitter", "quest", "hybrid:state_layers=9", "scout")
    return of_policies(*policies, *more, window=1024, max_context=131072)


def long_names() -> Report:
    """Words that cannot be broken at a blank."""
    report = every_memory()
    word = "x" * 300
    report.model, report.notes, report.options = word, [word], {word: word}
    report.declined = refused().declined * 2
    report.declined[0] = type(report.declined[0])(word, word, word, word)
    report.lowered.kernels = [{"name": word, "source": f"/{word}", "calls": {word: 3}}]
    report.lowered.references = [word]
    return report


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    assert chromium and driver, "no chromium or no chromedriver: apt-get install chromium-driver"
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    shown = webdriver.Chrome(options=options, service=Service(driver))
    yield shown
    shown.quit()


def look(browser: Any, page: Path, width: int, theme: str) -> None:
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    media = {"features": [{"name": "prefers-color-scheme", "value": theme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    browser.get(page.as_uri())


@pytest.mark.parametrize("theme", BRIGHT)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", ["whole", "every memory", "refused", "long names"])
def test_a_page_is_quiet_and_fits(
    name: str, width: int, theme: str, browser: Any, tmp_path: Path
) -> None:
    page = tmp_path / "report.html"
    page.write_text(page_of(name, tmp_path), encoding="utf-8")
    look(browser, page, width, theme)
    browser.execute_script("document.querySelectorAll('details').forEach(d => d.open = true)")
    whole = browser.execute_script(
        "const d = document.documentElement; return [d.scrollWidth, d.clientWidth]"
    )
    assert whole[0] <= whole[1] <= width
    # What is wider than its place scrolls inside of it, and what stands outside of such a place
    # ends where the page does.
    outside = browser.execute_script(
        """
        const page = document.documentElement.clientWidth;
        return [...document.querySelectorAll('body *')]
            .filter(e => !e.closest('.scroll table') && !e.closest('svg'))
            .filter(e => e.getBoundingClientRect().right > page + 1)
            .map(e => e.tagName + '.' + e.className)
        """
    )
    assert outside == []
    log = browser.get_log("browser")
    assert log == []
    back = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    red = int(back.partition("(")[2].partition(",")[0])
    assert (red > 128) == BRIGHT[theme]
    drawn = browser.execute_script(
        "return [...document.querySelectorAll('.bars .t')].map(e => e.offsetWidth)"
    )
    assert bool(drawn) == (name != "refused") and all(wide >= 3 for wide in drawn)


def test_keys_reach_all_that_scrolls(browser: Any, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    page.write_text(page_of("every memory", tmp_path), encoding="utf-8")
    look(browser, page, 360, "light")
    reached = browser.execute_script(
        "return [...document.querySelectorAll('.scroll')].every(e => e.tabIndex === 0)"
    )
    assert reached


@pytest.mark.parametrize("theme", BRIGHT)
@pytest.mark.parametrize("width", WIDTHS)
def test_pictures(
    width: int, theme: str, browser: Any, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """The top of bytes-small's report, kept where --pictures says."""
    from PIL import Image

    folder = Path(request.config.getoption("--pictures") or tmp_path)
    page = tmp_path / "report.html"
    page.write_text(page_of("whole", tmp_path), encoding="utf-8")
    look(browser, page, width, theme)
    clip = {"x": 0, "y": 0, "width": width, "height": HEIGHTS[width], "scale": 1}
    taken = browser.execute_cdp_cmd(
        "Page.captureScreenshot", {"format": "png", "captureBeyondViewport": True, "clip": clip}
    )
    picture = folder / f"report-{width}-{theme}.png"
    with Image.open(io.BytesIO(base64.b64decode(taken["data"]))) as shot:
        shot.convert("RGB").quantize(96, dither=Image.Dither.NONE).save(picture, optimize=True)
    assert picture.stat().st_size < 75_000
