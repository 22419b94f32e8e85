"""The page for the person in front of the camera, in a real Chromium with a camera that shows a photo."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import requests
from fakes import packaged_photo
from running import Service

from engine import Pixels
from settings import PROJECT

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
in_a_browser = [
    pytest.mark.slow,
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="there is no Chromium with its driver on this machine"),
]
PAGE = (PROJECT / "pages" / "try.html").read_text("utf-8")


def test_the_page_loads_nothing_from_elsewhere() -> None:
    assert not re.search(r"(src|href|action)\s*=|url\(|https?://|@import", PAGE)


def test_both_languages_say_everything() -> None:
    for table in ("TEXTS", "CHECKS"):
        (block,) = re.findall(rf"const {table} = \{{\n(.*?)\n\}};", PAGE, re.DOTALL)
        english, arabic = (
            set(re.findall(r"(?:^ +|, |{ )(\w+): \"", part, re.MULTILINE)) for part in block.split("  ar: {")
        )
        assert english == arabic
        assert len(english) > 15


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    service = Service(tmp_path_factory.mktemp("page"))
    service.start()
    yield service
    service.kill()


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The astronaut, nearer, so that the small model's detector sees her in a small frame as well."""
    path = tmp_path_factory.mktemp("photo") / "astronaut.jpg"
    cv2.imwrite(str(path), packaged_photo("skimage", "data", "astronaut.png")[:400, 60:460])
    return path


@pytest.fixture(scope="module")
def camera(photo: Path) -> Path:
    """What the fake camera shows: the photo, still, in a frame of 640x480."""
    frame = np.full((480, 640, 3), 200, np.uint8)
    frame[:, 80:560] = cv2.resize(read_photo(photo), (480, 480))
    path = photo.with_suffix(".mjpeg")
    path.write_bytes(bytes(cv2.imencode(".jpg", frame)[1]) * 20)
    return path


@pytest.fixture
def browser(camera: Path) -> Iterator[Any]:
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service as Driver

    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for flag in (
        "headless=new", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking",
        "disable-component-update", "disable-sync", "use-fake-device-for-media-stream",
        "use-fake-ui-for-media-stream", f"use-file-for-fake-video-capture={camera}", "lang=en", "window-size=420,900",
    ):  # fmt: skip
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Driver(DRIVER))
    driver.set_script_timeout(30)
    yield driver
    driver.quit()


@pytest.fixture
def page(browser: Any, service: Service) -> Any:
    browser.get(f"{service.url}/try")
    return browser


def read_photo(path: Path) -> Pixels:
    return np.asarray(cv2.imread(str(path)), np.uint8)


def until(browser: Any, found: Callable[[], object]) -> None:
    from selenium.webdriver.support.ui import WebDriverWait

    WebDriverWait(browser, 60).until(lambda _: found())


def text(page: Any, name: str) -> str:
    return str(page.find_element("id", name).text)


def click(page: Any, name: str) -> None:
    page.execute_script("document.getElementById(arguments[0]).click()", name)


class TestInABrowser:
    pytestmark = in_a_browser

    def test_the_camera_is_guided_until_the_photo_is_good(self, page: Any) -> None:
        click(page, "camera")
        until(page, lambda: text(page, "status") == "Good. Hold still.")
        assert len(page.find_elements("css selector", "#checks tbody tr")) > 10
        click(page, "capture")
        until(page, lambda: text(page, "status") == "This photo passes every check.")

    def test_a_person_signs_up_from_the_camera_and_is_verified_from_a_file(
        self, page: Any, photo: Path, service: Service
    ) -> None:
        click(page, "camera")
        until(page, lambda: page.find_element("id", "sign-up").is_enabled())
        until(page, lambda: page.execute_script("return document.getElementById('video').videoWidth") > 0)
        click(page, "sign-up")
        until(page, lambda: "Signed up" in text(page, "outcome"))
        page.find_element("id", "file").send_keys(str(photo))
        until(page, lambda: text(page, "status") == "This photo passes every check.")
        click(page, "verify")
        until(page, lambda: "Verified" in text(page, "outcome"))
        click(page, "sign-up")
        until(page, lambda: "This face already exists in the database" in text(page, "outcome"))
        user_id = requests.post(f"{service.url}/verify", files={"file": photo.read_bytes()}, timeout=30).json()[
            "user_id"
        ]
        requests.delete(f"{service.url}/users/{user_id}", timeout=30)

    def test_what_a_photo_lacks_is_said_and_listed_first(self, page: Any, tmp_path: Path, photo: Path) -> None:
        dark = tmp_path / "dark.jpg"
        cv2.imwrite(str(dark), cv2.convertScaleAbs(read_photo(photo), alpha=0.04))
        page.find_element("id", "file").send_keys(str(dark))
        until(page, lambda: page.find_elements("css selector", "#checks tr.failed"))
        assert text(page, "status")
        assert "✗" in page.find_element("css selector", "#checks tbody tr").text

    def test_in_arabic_the_page_reads_from_right_to_left_and_so_do_the_hints(self, page: Any, tmp_path: Path) -> None:
        click(page, "language")
        empty = tmp_path / "empty.jpg"
        cv2.imwrite(str(empty), np.full((300, 300, 3), 127, np.uint8))
        page.find_element("id", "file").send_keys(str(empty))
        until(page, lambda: "ضع وجهك" in text(page, "status"))
        html = page.find_element("css selector", "html")
        assert (html.get_attribute("dir"), html.get_attribute("lang")) == ("rtl", "ar")

    def test_everything_is_reached_by_keyboard_and_has_a_name(self, page: Any) -> None:
        from selenium.webdriver import ActionChains

        unnamed = page.execute_script(
            "return [...document.querySelectorAll('button, input, summary')].filter(one => !one.hidden"
            " && !(one.textContent || one.labels && one.labels.length && one.labels[0].textContent).trim()).length"
        )
        assert unnamed == 0
        reached = set()
        for _ in range(8):
            ActionChains(page).send_keys("\ue004").perform()
            reached.add(page.switch_to.active_element.get_attribute("id"))
        assert {"language", "camera", "file"} <= reached

    def test_the_page_breaks_none_of_its_own_rules(self, page: Any) -> None:
        click(page, "camera")
        until(page, lambda: text(page, "status"))
        assert [entry for entry in page.get_log("browser") if "Content Security" in entry["message"]] == []

    def test_the_page_asks_for_a_key_where_one_is_needed(self, browser: Any, tmp_path: Path, photo: Path) -> None:
        from keys import new_key

        secret, key = new_key("page", ["app"])
        service = Service(tmp_path, API_KEYS=key.line())
        service.start()
        try:
            browser.get(f"{service.url}/try")
            browser.find_element("id", "file").send_keys(str(photo))
            until(browser, lambda: "API key" in text(browser, "status"))
            browser.find_element("id", "key").send_keys(secret, "\ue004")
            until(browser, lambda: text(browser, "status") == "This photo passes every check.")
        finally:
            service.kill()
