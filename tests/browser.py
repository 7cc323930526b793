"""Pages in a real browser."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By

CONTRAST = """
const luminance = ([r, g, b]) => [r, g, b].map(v => v / 255)
    .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
const over = (colour, below) => {
    canvas.fillStyle = `rgb(${below})`; canvas.fillRect(0, 0, 1, 1);
    canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data.slice(0, 3)];
};
const background = element => {
    if (element === null) return [255, 255, 255];
    return over(getComputedStyle(element).backgroundColor, background(element.parentElement));
};
const found = [];
for (const element of document.querySelectorAll('body *')) {
    const own = [...element.childNodes].some(node => node.nodeType === 3 && node.textContent.trim());
    if (!own || !element.checkVisibility()) continue;
    const style = getComputedStyle(element), behind = background(element);
    const front = over(element instanceof SVGElement ? style.fill : style.color, behind);
    const [a, b] = [luminance(front), luminance(behind)];
    found.push([(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), element.textContent.trim().slice(0, 40)]);
}
return found;
"""


CUT_OFF = """
return [...document.querySelectorAll('body *')]
    .filter(element => element.checkVisibility() && element.getBoundingClientRect().right > innerWidth + 1)
    .map(element => `${element.tagName} ${element.className} ${element.textContent.trim().slice(0, 40)}`);
"""
PAPER = 717  # of A4 between the margins, in CSS pixels


class Page:
    """A page in headless Chromium, with its requests to the network and its complaints."""

    def __init__(self, driver: webdriver.Chrome) -> None:
        self.driver = driver

    def open(self, path: Path, *, scheme: str = "light", width: int = 1280) -> None:
        self.driver.get_log("browser")
        self.driver.get_log("performance")
        media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
        metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        self.driver.get(path.as_uri())

    def open_as_printed(self, path: Path) -> None:
        """As on A4 with the browser's margins, for a reader whose screen is dark."""
        self.open(path, scheme="dark", width=PAPER)
        media = {"media": "print", "features": [{"name": "prefers-color-scheme", "value": "dark"}]}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", media)

    def requests(self) -> list[str]:
        """The addresses that the page requested, without those of the browser's own start page."""
        messages = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        sent = [m["params"] for m in messages if m["method"] == "Network.requestWillBeSent"]
        return [params["request"]["url"] for params in sent if not params["documentURL"].startswith("chrome://")]

    def complaints(self) -> list[str]:
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def script(self, source: str) -> Any:
        return self.driver.execute_script(source)

    def text(self, selector: str) -> str:
        return " ".join(self.script(f"return document.querySelector({selector!r}).textContent").split())

    def texts(self, selector: str) -> list[str]:
        texts: list[str] = self.script(f"return [...document.querySelectorAll({selector!r})].map(e => e.textContent)")
        return texts

    def count(self, selector: str) -> int:
        return int(self.script(f"return document.querySelectorAll({selector!r}).length"))

    def label(self, selector: str) -> str:
        return str(self.script(f"return document.querySelector({selector!r}).getAttribute('aria-label')"))

    def picture(self, selector: str) -> np.ndarray:
        element = self.driver.find_element(By.CSS_SELECTOR, selector)
        # The driver leaves an element where it is if any of it is in the window, and then takes only that part.
        self.driver.execute_script("arguments[0].scrollIntoView({block: 'start'})", element)
        return np.asarray(Image.open(io.BytesIO(element.screenshot_as_png)).convert("L"))


@contextmanager
def browser(profile: Path) -> Iterator[Page]:
    """Start one; skips the test where there is none."""
    chromium, driver_path = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver_path is None:
        pytest.skip("needs Debian's packages chromium and chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in (
        "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
        "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
        f"--user-data-dir={profile}",
    ):  # fmt: skip
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(driver_path))
    try:
        yield Page(driver)
    finally:
        driver.quit()
