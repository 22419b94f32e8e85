"""The page for the person in front of the camera, in a real Chromium with a camera that shows a photo."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import requests
from PIL import Image

from api.api_keys import new_api_key
from errors import CODES
from face_checks import HINTS
from gallery.decisions import Gallery
from photos.pixels import Pixels
from settings import PROJECT, Settings
from store.sqlite import SqliteStore
from tests.support.application import make_app
from tests.support.fakes import ScriptedAttributes, ScriptedEngine, packaged_photo
from tests.support.running import Service

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
in_a_browser = [
    pytest.mark.slow,
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="there is no Chromium with its driver on this machine"),
]
PAGE = (PROJECT / "api" / "html" / "try.html").read_text("utf-8")


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
        if table == "CHECKS":
            assert set(HINTS) == english <= set(CODES)


def answer_of(folder: Path, **settings: Any) -> Any:
    store = SqliteStore(folder / "faces.sqlite3")
    store.prepare()
    engine = ScriptedEngine()
    gallery = Gallery(store, engine.name, engine.dimension)
    app = make_app(Settings(data_dir=folder, **settings), engine, ScriptedAttributes(), store, gallery)
    return app.test_client().get("/try")


def test_the_page_may_run_its_own_script_and_reach_this_service_alone(tmp_path: Path) -> None:
    answer = answer_of(tmp_path)
    policy = answer.headers["Content-Security-Policy"]
    assert answer.status_code == 200
    assert "unsafe" not in policy
    assert {"default-src 'none'", "connect-src 'self'", "frame-ancestors 'none'"} <= set(policy.split("; "))
    assert answer.headers["Permissions-Policy"] == "camera=(self)"


def test_try_page_off_takes_the_page_away(tmp_path: Path) -> None:
    answer = answer_of(tmp_path, try_page="off")
    assert (answer.status_code, answer.json["code"]) == (404, "not_found")


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


@contextmanager
def chromium(*further: str, preferences: dict[str, Any] | None = None) -> Iterator[Any]:
    """A browser the size of a phone."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service as Driver

    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for flag in (
        "headless=new", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking",
        "disable-component-update", "disable-sync", "lang=en", "window-size=420,900", *further,
    ):  # fmt: skip
        options.add_argument(f"--{flag}")
    options.add_experimental_option("prefs", {"intl.accept_languages": "en", **(preferences or {})})
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Driver(DRIVER))
    driver.set_script_timeout(30)
    try:
        yield driver
    finally:
        driver.quit()


def camera_flags(camera: Path) -> tuple[str, str]:
    return "use-fake-device-for-media-stream", f"use-file-for-fake-video-capture={camera}"


@pytest.fixture
def browser(camera: Path) -> Iterator[Any]:
    with chromium(*camera_flags(camera), "use-fake-ui-for-media-stream") as driver:
        yield driver


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


def erase(service: Service, photo: Path) -> str:
    """Erase whoever is on the photo; returns who that was."""
    found = requests.post(f"{service.url}/verify", files={"file": photo.read_bytes()}, timeout=30).json()
    requests.delete(f"{service.url}/users/{found['user_id']}", timeout=30).raise_for_status()
    return str(found["user_id"])


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
        erase(service, photo)

    def test_a_sign_up_whose_answer_was_lost_is_safely_sent_again(
        self, page: Any, photo: Path, service: Service
    ) -> None:
        page.find_element("id", "file").send_keys(str(photo))
        until(page, lambda: text(page, "status") == "This photo passes every check.")
        page.execute_script(
            "window.whole = fetch; window.fetch = async (...sent) => { await whole(...sent); throw new TypeError() }"
        )
        click(page, "sign-up")
        until(page, lambda: "The service cannot be reached." in text(page, "outcome"))
        page.execute_script("window.fetch = whole")
        click(page, "sign-up")
        until(page, lambda: "Signed up" in text(page, "outcome"))
        assert erase(service, photo) in text(page, "outcome")

    def test_a_photo_is_drawn_upright_with_its_marks_on_the_face(self, page: Any, tmp_path: Path, photo: Path) -> None:
        orientation = Image.Exif()
        orientation[0x0112] = 6
        lying = Image.open(photo).crop((0, 0, 400, 340)).transpose(Image.Transpose.ROTATE_90)
        lying.save(tmp_path / "lying.jpg", exif=orientation)
        page.find_element("id", "file").send_keys(str(tmp_path / "lying.jpg"))
        until(page, lambda: text(page, "status") == "This photo passes every check.")
        assert page.execute_script("return [picture.width, picture.height]") == [400, 340]
        points = page.execute_script("return photo.analysis.faces[0].landmarks")
        white = "const {data} = picture.getContext('2d').getImageData(...arguments, 1, 1); return Math.min(...data)"
        assert [page.execute_script(white, *map(round, point)) for point in points] == [255] * 5

    def test_the_keyboard_is_never_left_nowhere(self, page: Any) -> None:
        click(page, "camera")
        until(page, lambda: text(page, "status") == "Good. Hold still.")
        page.find_element("id", "capture").send_keys("\ue007")
        until(page, lambda: text(page, "status") == "This photo passes every check.")
        assert page.switch_to.active_element.get_attribute("id") == "camera"

    def test_a_hidden_page_asks_nothing(self, page: Any) -> None:
        click(page, "camera")
        until(page, lambda: text(page, "status") == "Good. Hold still.")
        page.execute_script(
            "window.sent = 0; const whole = fetch; window.fetch = (...all) => { sent += 1; return whole(...all) }"
        )
        shown = page.current_window_handle
        page.switch_to.new_window("tab")
        time.sleep(3)
        page.close()
        page.switch_to.window(shown)
        assert page.execute_script("return sent") <= 1  # one may have been on its way

    def test_an_advice_stands_long_enough_to_be_read(self, page: Any) -> None:
        page.execute_script(
            "window.told = []; let good = true; const check = { code: 'blurred', measured: 1, required: { min: 1 } };"
            "window.fetch = async () => { good = !good; return new Response(JSON.stringify("
            "{ accepted: good, checks: [{ ...check, passed: good, hint: 'Still!' }] })) };"
            "new MutationObserver(() => told.push(performance.now())).observe(statusLine, { childList: true })"
        )
        click(page, "camera")
        until(page, lambda: page.execute_script("return told.length") > 5)
        times = page.execute_script("return told")[2:]  # after the asking and the looking
        assert min(np.diff(times)) > 1400

    @pytest.mark.parametrize("language", ["en", "ar"])
    @pytest.mark.parametrize("width", [320, 180])  # a small phone, and one whose letters are twice as large
    def test_nothing_is_cut_off_on_a_narrow_screen(self, page: Any, tmp_path: Path, language: str, width: int) -> None:
        size = {"width": width, "height": 640, "deviceScaleFactor": 1, "mobile": False}
        page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        if language == "ar":
            click(page, "language")
        page.execute_script("list(arguments[0])", [
            {"code": code, "passed": False, "measured": 0.8765, "required": {"min": 0.9}, "hint": hint}
            for code, hint in HINTS.items()
        ])  # fmt: skip
        sizes = "const { clientWidth, scrollWidth } = document.documentElement; return [clientWidth, scrollWidth]"
        seen, needed = page.execute_script(sizes)
        assert needed == seen <= width

    def test_a_result_takes_the_focus_so_that_it_is_read_out(self, page: Any, photo: Path) -> None:
        page.find_element("id", "file").send_keys(str(photo))
        until(page, lambda: page.find_element("id", "verify").is_enabled())
        click(page, "verify")
        until(page, lambda: "No matching face found" in text(page, "outcome"))
        assert page.switch_to.active_element.get_attribute("id") == "outcome"
        assert text(page, page.switch_to.active_element.get_attribute("aria-describedby")) == "No matching face found"
        assert text(page, "status") == "Not verified"

    def test_an_analysis_that_comes_late_does_not_take_the_results_place(self, page: Any, photo: Path) -> None:
        page.execute_script(
            "const soon = window.fetch; window.late = 0; window.fetch = async (route, ...rest) => {"
            "const answer = await soon(route, ...rest);"
            "if (route === '/analyze') { await new Promise((go) => setTimeout(go, 1500)); late += 1 } return answer }"
        )
        page.find_element("id", "file").send_keys(str(photo))
        until(page, lambda: page.find_element("id", "verify").is_enabled())
        click(page, "verify")
        until(page, lambda: page.execute_script("return late") == 1 and "No matching" in text(page, "outcome"))
        time.sleep(0.2)
        assert text(page, "status") == "Not verified"
        assert page.find_elements("css selector", "#checks tbody tr")

    def test_arabic_digits_are_a_threshold_too(self, page: Any, photo: Path) -> None:
        page.find_element("id", "file").send_keys(str(photo))
        page.execute_script("document.getElementById('more').open = true")
        until(page, lambda: page.find_element("id", "verify").is_enabled())
        page.find_element("id", "threshold").send_keys("\u0660\u066b\u0661")
        click(page, "verify")
        until(page, lambda: "between 0.4 and 1" in text(page, "outcome"))
        page.find_element("id", "threshold").clear()
        page.find_element("id", "threshold").send_keys("\u0660\u066b\u0669")
        click(page, "verify")
        until(page, lambda: "No matching face found" in text(page, "outcome"))

    def test_what_a_photo_lacks_is_said_and_listed_first(self, page: Any, tmp_path: Path, photo: Path) -> None:
        dark = tmp_path / "dark.jpg"
        cv2.imwrite(str(dark), cv2.convertScaleAbs(read_photo(photo), alpha=0.04))
        (tmp_path / "notes.jpg").write_text("no photo at all")
        page.find_element("id", "file").send_keys(str(dark))
        until(page, lambda: page.find_elements("css selector", "#checks tr.failed"))
        assert "✗" in page.find_element("css selector", "#checks tbody tr").text
        assert text(page, "status") in page.find_element("css selector", "#checks .hint").text
        page.find_element("id", "file").send_keys(str(tmp_path / "dark.jpg").replace("dark.jpg", "notes.jpg"))
        until(page, lambda: "Invalid file format" in text(page, "status"))
        assert page.find_elements("css selector", "#checks tbody tr") == []

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
        secret, key = new_api_key("page", ["app"])
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

    def test_a_browser_without_javascript_is_told_so(self, service: Service) -> None:
        with chromium(preferences={"profile.managed_default_content_settings.javascript": 2}) as browser:
            browser.get(f"{service.url}/try")
            (shown,) = [one.text for one in browser.find_elements("css selector", "body > *") if one.text]
            buttons = browser.find_elements("css selector", "button, input, summary")
            assert not any(one.is_displayed() for one in buttons)
        assert "This page needs JavaScript" in shown

    def test_a_camera_that_may_not_be_used_is_put_in_words(self, service: Service, camera: Path) -> None:
        forbidden = {"profile.default_content_setting_values.media_stream_camera": 2}
        with chromium(*camera_flags(camera), preferences=forbidden) as browser:
            browser.get(f"{service.url}/try")
            click(browser, "camera")
            until(browser, lambda: "The camera may not be used" in text(browser, "status"))
            assert browser.find_element("id", "file").is_enabled()

    def test_a_machine_without_a_camera_is_put_in_words(self, service: Service) -> None:
        with chromium("use-fake-device-for-media-stream=device-count=0", "use-fake-ui-for-media-stream") as browser:
            browser.get(f"{service.url}/try")
            click(browser, "camera")
            until(browser, lambda: "No camera was found" in text(browser, "status"))

    def test_a_page_without_https_says_why_it_gets_no_camera(self, service: Service) -> None:
        with chromium("host-resolver-rules=MAP faces.example 127.0.0.1") as browser:
            browser.get(f"http://faces.example:{service.port}/try")
            click(browser, "camera")
            until(browser, lambda: "only to pages on HTTPS" in text(browser, "status"))

    def test_the_camera_asks_one_frame_at_a_time_and_rests_as_long_as_the_service_says(
        self, browser: Any, tmp_path: Path
    ) -> None:
        secret, key = new_api_key("page", ["app"])
        service = Service(tmp_path, API_KEYS=key.line(), RATE_LIMIT_KEY="3/hour")
        service.start()
        try:
            browser.get(f"{service.url}/try")
            browser.execute_script("document.getElementById('key').value = arguments[0]", secret)
            browser.execute_script(
                "window.under = window.most = window.sent = 0; const whole = fetch; window.fetch = async (...sent) => {"
                " window.sent += 1; under += 1; most = Math.max(most, under);"
                " try { return await whole(...sent) } finally { under -= 1 } }"
            )
            click(browser, "camera")
            until(browser, lambda: text(browser, "status").startswith("Too many requests. Please wait and try again."))
            assert re.search(r" Next try in \d+ (seconds?|minutes?)\.$", text(browser, "status"))
            assert browser.find_elements("css selector", ".accepted, #checks tbody tr") == []
            time.sleep(2)  # a page that does not rest has asked again by now
            assert browser.execute_script("return [most, sent]") == [1, 4]
        finally:
            service.kill()
