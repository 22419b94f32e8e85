"""The page for the person in front of the camera, in a real Chromium with a camera that shows a photo."""

from __future__ import annotations

import base64
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
from api.html_pages import page_texts, read_page_file, try_page_html
from benchmarks.challenges import FIRST_DEG, GROWN, STRAIGHT_DEG, TURNED_DEG
from challenge.motion import MAX_FIRST_YAW_DEG, MAX_STRAIGHT_DEG, MIN_GROWTH, MIN_TURN_DEG
from engines import compact_pack
from errors import CODES
from face_checks import HINTS
from gallery.decisions import Gallery
from photos.pixels import Pixels
from settings import PROJECT, Settings
from store.sqlite import SqliteStore
from tests.support.application import make_app
from tests.support.fakes import ScriptedAttributes, ScriptedEngine, packaged_photo
from tests.support.filming import TURN_DEG, frames_of
from tests.support.running import SOMEBODY, Service

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
in_a_browser = [
    pytest.mark.slow,
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="there is no Chromium with its driver on this machine"),
]
PAGE, SCRIPT = try_page_html(), read_page_file("try.js")
TEXTS = page_texts()
HEIC = PROJECT / "tests" / "support" / "astronaut.heic"
READY = "This photo passes every check."
# In place of the service: frames are refused, or accepted in turns, as `window.good` says.
ANSWERED_FRAMES = """
    window.good = () => false;
    const check = { code: 'blurred', measured: 1, required: { min: 32 } };
    window.fetch = async () => { const passed = good(); return new Response(JSON.stringify(
        { accepted: passed, checks: [{ ...check, passed, hint: passed ? null : 'Still!' }] })) };
"""


def test_the_page_loads_nothing_from_elsewhere() -> None:
    assert not re.search(r"(src|href|action)\s*=|url\(|https?://|@import", PAGE)


def test_every_language_says_everything() -> None:
    for texts in TEXTS.values():
        assert {kind: set(said) for kind, said in texts.items()} == {
            kind: set(said) for kind, said in TEXTS["en"].items()
        }
    assert set(TEXTS["en"]["checks"]) == set(HINTS) <= set(CODES)
    assert {"en", "ar"} <= set(TEXTS)


def test_the_page_says_what_is_in_its_texts_and_nothing_there_is_left_unsaid() -> None:
    named = set(re.findall(r'data-(?:text|label)="(\w+)"', PAGE + try_page_html(updates_people=True)))
    quoted = set(re.findall(r'"(\w+)"', SCRIPT))
    assert named <= set(TEXTS["en"]["page"]) <= named | quoted | {"language"}
    assert set(re.findall(r'say\("(\w+)"\)', SCRIPT)) <= set(TEXTS["en"]["page"])


def test_the_page_knows_the_compact_model_by_its_name() -> None:
    assert f'COMPACT_MODEL = "{compact_pack.IDENTITY.name}"' in SCRIPT


def test_page_guide_and_benchmark_take_the_same_steps_for_done_and_the_judge_asks_for_less() -> None:
    of_the_page = dict(re.findall(r"\b(\w+) = ([\d.]+)", SCRIPT))
    names = {"FIRST_DEG": FIRST_DEG, "STRAIGHT_DEG": STRAIGHT_DEG, "TURNED_DEG": TURNED_DEG, "CLOSER": GROWN}
    assert {name: float(of_the_page[name]) for name in names} == names
    guide = " ".join((PROJECT / "docs" / "clients.md").read_text().split())
    assert (
        f"done when `head_turned` measures {TURNED_DEG:g} degrees, a look straight below {STRAIGHT_DEG:g} (the first "
        f"one below {FIRST_DEG:g}), and coming closer when the face is {GROWN:g} times as large"
    ) in guide
    assert TURNED_DEG > MIN_TURN_DEG
    assert STRAIGHT_DEG < MAX_STRAIGHT_DEG
    assert FIRST_DEG < MAX_FIRST_YAW_DEG
    assert GROWN > MIN_GROWTH


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


@pytest.mark.parametrize(("setting", "said"), [("off", "privacy"), ("on_verify", "privacyOfUpdates")])
def test_the_page_says_whether_a_verification_may_keep_something(tmp_path: Path, setting: str, said: str) -> None:
    answer = answer_of(tmp_path, update_template=setting)
    assert re.findall(r'data-text="(privacy\w*)"', answer.text) == [said]


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
    """Erase the person on the photo; returns the user_id."""
    found = requests.post(f"{service.url}/verify", files={"file": photo.read_bytes()}, timeout=30).json()
    requests.delete(f"{service.url}/users/{found['user_id']}", timeout=30).raise_for_status()
    return str(found["user_id"])


def choose(page: Any, photo: Path, then: str = READY) -> None:
    """Choose a file, and wait until the page says `then`."""
    page.find_element("id", "file").send_keys(str(photo))
    until(page, lambda: then in text(page, "status"))


def next_steps(page: Any) -> set[str]:
    """The ids of the buttons that stand out as the next step."""
    return set(page.execute_script("return [...document.querySelectorAll('.buttons > .main')].map((one) => one.id)"))


def click(page: Any, name: str) -> None:
    page.execute_script("document.getElementById(arguments[0]).click()", name)


# A camera that shows what the page asks for: `poses` has a picture for each sentence. Like a person, it sways, so that
# no frame is quite like another, and takes a moment to follow.
ACTING_CAMERA = """
const [poses, wait, done] = arguments, canvas = document.createElement("canvas"), pen = canvas.getContext("2d");
const pictures = {};
canvas.width = 360; canvas.height = 480;
window.pose = "Look straight at the camera.";
new MutationObserver(() => {
  const words = statusLine.textContent;
  if (poses[words]) setTimeout(() => { window.pose = words; }, wait);
}).observe(statusLine, { childList: true });
navigator.mediaDevices.getUserMedia = async () => canvas.captureStream(25);
Promise.all(Object.entries(poses).map(async ([words, base64]) => {
  const bytes = Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0));
  pictures[words] = await createImageBitmap(new Blob([bytes]));
})).then(() => {
  let turn = 0;  // along a spiral, which comes to no place twice
  setInterval(() => {
    turn += 0.12;
    pen.drawImage(pictures[window.pose], (2 + 0.4 * turn) * Math.cos(turn), (2 + 0.4 * turn) * Math.sin(turn));
  }, 40);
  done();
});
"""
STEP_WORDS = {
    "look_straight": "Look straight at the camera.",
    "turn_left": "Turn your head to the left.",
    "turn_right": "Turn your head to the right.",
    "come_closer": "Come closer to the camera.",
}


def acting_camera(page: Any, what: str, wait_ms: int = 300) -> None:
    """Give the page a camera before which a `head` or a `flat` print does what the page asks for."""
    frames = frames_of(list(STEP_WORDS), what, turn_deg=TURN_DEG + 6)
    frames[3] = frames_of(["come_closer"], what)[0]
    poses = {words: base64.b64encode(frame).decode() for words, frame in zip(STEP_WORDS.values(), frames, strict=True)}
    page.execute_async_script(ACTING_CAMERA, poses, wait_ms)


class TestInABrowser:
    pytestmark = in_a_browser

    def test_the_camera_guides_and_takes_the_photo_by_itself_after_a_good_second(self, page: Any) -> None:
        page.execute_script(
            "window.told = {}; new MutationObserver(() => { told[statusLine.textContent] = performance.now() })"
            ".observe(statusLine, { childList: true })"
        )
        click(page, "camera")
        until(page, lambda: text(page, "status") == READY)
        told = page.execute_script("return told")
        assert told["Looking at the photo…"] - told["Good. Hold still."] >= 1000
        assert not page.execute_script("return Boolean(stream)")
        assert next_steps(page) == {"sign-up", "verify"}
        assert "Sign up" in text(page, "next")

    def test_a_photo_is_taken_by_hand_before_everything_is_good(self, page: Any) -> None:
        page.execute_script("window.real = fetch;" + ANSWERED_FRAMES)
        click(page, "camera")
        until(page, lambda: text(page, "status") == "Still!")
        assert "Sharpness: 1 (Limit: ≥ 32)" in text(page, "detail")
        assert next_steps(page) == {"capture"}
        page.execute_script("window.fetch = real")
        click(page, "capture")
        until(page, lambda: text(page, "status") == READY)

    def test_good_moments_that_do_not_last_take_no_photo(self, page: Any) -> None:
        page.execute_script(ANSWERED_FRAMES + "window.turn = 0; window.good = () => (turn += 1) % 3 > 0")
        click(page, "camera")
        until(page, lambda: page.execute_script("return turn > 20"))
        assert page.execute_script("return Boolean(stream)")

    def test_the_photo_is_shown_as_the_preview_was_and_sent_as_the_camera_sees(self, page: Any, photo: Path) -> None:
        side = "return getComputedStyle(document.getElementById(arguments[0])).transform"
        mirrored = "matrix(-1, 0, 0, 1, 0, 0)"
        click(page, "camera")
        until(page, lambda: page.execute_script(side, "video") == mirrored)
        until(page, lambda: text(page, "status") == READY)
        assert page.execute_script(side, "picture") == mirrored
        seen = page.execute_script("return photo.analysis.faces[0].landmarks")
        choose(page, photo)
        assert page.execute_script(side, "picture") == "none"
        expected = page.execute_script("return photo.analysis.faces[0].landmarks")
        shown = np.asarray(expected) * 480 / 400 + (80, 0)
        assert np.abs(np.asarray(seen) - shown).max() < 20  # a mirrored nose lies 90 pixels away

    def test_a_person_signs_up_from_the_camera_and_is_verified_from_a_file(
        self, page: Any, photo: Path, service: Service
    ) -> None:
        click(page, "camera")
        until(page, lambda: page.find_element("id", "sign-up").is_enabled())
        click(page, "sign-up")
        until(page, lambda: "Signed up" in text(page, "outcome"))
        assert next_steps(page) == {"camera"}
        choose(page, photo)
        click(page, "verify")
        until(page, lambda: "Verified" in text(page, "outcome"))
        assert next_steps(page) == {"add-photo", "choose"}
        click(page, "sign-up")
        until(page, lambda: "This face already exists in the database" in text(page, "outcome"))
        assert next_steps(page) == {"verify"}
        erase(service, photo)

    def test_the_verified_photo_or_a_new_one_is_added_to_the_person_once_each(
        self, page: Any, tmp_path: Path, photo: Path, service: Service
    ) -> None:
        darker = tmp_path / "darker.jpg"
        cv2.imwrite(str(darker), cv2.convertScaleAbs(read_photo(photo), alpha=0.8))
        user_id = requests.post(f"{service.url}/signUp", files={"file": photo.read_bytes()}, timeout=30).json()[
            "user_id"
        ]
        choose(page, photo)
        assert not page.find_element("id", "add-photo").is_displayed()
        click(page, "verify")
        until(page, lambda: text(page, "status") == "Verified")
        for chosen, photos in ((None, 2), (None, 2), (darker, 3)):
            if chosen is not None:
                choose(page, chosen)
            page.find_element("id", "add-photo").click()
            until(page, lambda: text(page, "status") == "Photo added")
            assert f"Photos kept of you: {photos}" in text(page, "detail")
            assert user_id in text(page, "detail")
            assert next_steps(page) == {"choose"}
        told = requests.get(f"{service.url}/users/{user_id}", timeout=30).json()
        assert told["photos"] == 3
        erase(service, photo)
        click(page, "add-photo")
        until(page, lambda: "Nobody is enrolled" in text(page, "outcome"))
        assert not page.find_element("id", "add-photo").is_displayed()
        assert next_steps(page) == {"verify"}

    def test_a_photo_of_another_person_is_not_added_and_the_page_says_why(
        self, page: Any, tmp_path: Path, photo: Path, service: Service
    ) -> None:
        stranger = tmp_path / "stranger.png"
        stranger.write_bytes(SOMEBODY)
        requests.post(f"{service.url}/signUp", files={"file": photo.read_bytes()}, timeout=30).raise_for_status()
        choose(page, photo)
        click(page, "verify")
        until(page, lambda: text(page, "status") == "Verified")
        choose(page, stranger)
        click(page, "add-photo")
        until(page, lambda: text(page, "next") == TEXTS["en"]["page"]["nextOtherPerson"])
        assert text(page, "status") == "Photo not added"
        assert "No matching face found" in text(page, "detail")
        assert next_steps(page) == {"choose", "verify"}
        page.execute_script(
            "window.fetch = async () => new Response("
            "JSON.stringify({ code: 'duplicate_face', message: 'This face exists' }), { status: 409 })"
        )
        click(page, "add-photo")
        until(page, lambda: text(page, "next") == TEXTS["en"]["page"]["nextSomebodyElse"])
        assert next_steps(page) == {"choose"}
        erase(service, photo)

    def test_after_a_verification_that_fails_no_photo_can_be_added(
        self, page: Any, photo: Path, service: Service
    ) -> None:
        requests.post(f"{service.url}/signUp", files={"file": photo.read_bytes()}, timeout=30).raise_for_status()
        choose(page, photo)
        click(page, "verify")
        until(page, lambda: page.find_element("id", "add-photo").is_displayed())
        erase(service, photo)
        click(page, "verify")
        until(page, lambda: text(page, "status") == "Not verified")
        assert not page.find_element("id", "add-photo").is_displayed()

    def test_a_sign_up_whose_answer_was_lost_is_safely_sent_again(
        self, page: Any, photo: Path, service: Service
    ) -> None:
        choose(page, photo)
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
        choose(page, tmp_path / "lying.jpg")
        assert page.execute_script("return [picture.width, picture.height]") == [400, 340]
        points = page.execute_script("return photo.analysis.faces[0].landmarks")
        white = "const {data} = picture.getContext('2d').getImageData(...arguments, 1, 1); return Math.min(...data)"
        assert [page.execute_script(white, *map(round, point)) for point in points] == [255] * 5

    def test_the_keyboard_is_never_left_nowhere(self, page: Any) -> None:
        click(page, "camera")
        until(page, lambda: page.find_element("id", "capture").is_displayed())
        page.execute_script("document.getElementById('capture').focus()")
        until(page, lambda: text(page, "status") == READY)
        assert page.switch_to.active_element.get_attribute("id") == "camera"

    def test_a_hidden_page_asks_nothing(self, page: Any) -> None:
        page.execute_script(ANSWERED_FRAMES)
        click(page, "camera")
        until(page, lambda: text(page, "status") == "Still!")
        page.execute_script(
            "window.sent = 0; const whole = fetch;"
            "window.fetch = (...all) => { sent += document.hidden; return whole(...all) }"
        )
        shown = page.current_window_handle
        page.switch_to.new_window("tab")
        time.sleep(3)
        page.close()
        page.switch_to.window(shown)
        assert page.execute_script("return sent") <= 1  # one may have been on its way

    def test_an_advice_stands_long_enough_to_be_read(self, page: Any) -> None:
        page.execute_script(
            ANSWERED_FRAMES + "window.told = []; let turn = 0; window.good = () => (turn += 1) % 2 > 0;"
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
        checks = [
            {"code": code, "passed": passed, "measured": 0.8765, "required": {"min": 0.9}, "hint": hint}
            for code, hint in HINTS.items()
            for passed in (False, True)
        ]
        page.execute_script(
            "const body = { checks: arguments[0], from: 'en' }; list(body); tell(...advice({ body }));"
            "for (const one of document.querySelectorAll('details')) one.open = true",
            checks,
        )
        sizes = "const { clientWidth, scrollWidth } = document.documentElement; return [clientWidth, scrollWidth]"
        seen, needed = page.execute_script(sizes)
        assert needed == seen <= width

    def test_a_result_takes_the_focus_so_that_it_is_read_out(self, page: Any, photo: Path) -> None:
        page.find_element("id", "file").send_keys(str(photo))
        until(page, lambda: page.find_element("id", "verify").is_enabled())
        click(page, "verify")
        until(page, lambda: "No matching face found" in text(page, "outcome"))
        assert page.switch_to.active_element.get_attribute("id") == "outcome"
        described = page.switch_to.active_element.get_attribute("aria-describedby").split()
        assert [text(page, name) for name in described] == [
            "No matching face found",
            TEXTS["en"]["page"]["nextNoMatch"],
        ]
        assert next_steps(page) == {"sign-up", "choose"}
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

    def test_what_a_photo_lacks_is_large_beside_it_and_what_passed_is_folded_away(
        self, page: Any, tmp_path: Path, photo: Path
    ) -> None:
        dark = tmp_path / "dark.jpg"
        cv2.imwrite(str(dark), cv2.convertScaleAbs(cv2.GaussianBlur(read_photo(photo), (0, 0), 5), alpha=0.2))
        page.find_element("id", "file").send_keys(str(dark))
        until(page, lambda: page.find_elements("css selector", ".bad .measure"))
        failed = page.execute_script("return photo.analysis.checks.filter((check) => !check.passed)")
        assert text(page, "status") == failed[0]["hint"]
        assert all(check["hint"] in text(page, "outcome") for check in failed)
        assert page.find_element("id", "picture").is_displayed()
        assert len(page.find_elements("css selector", "#checks tbody tr")) > 10
        assert not any(row.is_displayed() for row in page.find_elements("css selector", "#checks tbody tr"))
        assert text(page, "checks-summary").startswith("Checks passed: ")
        assert not page.find_element("id", "sign-up").is_enabled()
        assert next_steps(page) == {"choose"}

    @pytest.mark.parametrize(
        ("name", "content"), [("notes.jpg", b"no photo at all"), ("notes.txt", b"no photo"), ("empty.jpg", b"")]
    )
    def test_a_file_that_is_no_photo_disables_the_buttons_and_tells_the_formats(
        self, page: Any, tmp_path: Path, photo: Path, name: str, content: bytes
    ) -> None:
        (tmp_path / name).write_bytes(content)
        choose(page, photo)
        choose(page, tmp_path / name, "This file is no photo")
        assert "JPEG, PNG, WebP or HEIC" in text(page, "detail")
        assert not any(page.find_element("id", one).is_enabled() for one in ("sign-up", "verify"))
        assert page.find_elements("css selector", "#checks tbody tr") == []
        choose(page, photo)
        assert page.find_element("id", "sign-up").is_enabled()

    def test_a_photo_that_the_browser_cannot_show_is_verified_all_the_same(self, page: Any) -> None:
        choose(page, HEIC)
        assert text(page, "invitation") == "The browser cannot show this file."
        click(page, "verify")
        until(page, lambda: "No matching face found" in text(page, "outcome"))

    def test_a_photo_is_dropped_anywhere_on_the_page(self, page: Any, photo: Path) -> None:
        page.execute_script(
            "const bytes = Uint8Array.from(atob(arguments[0]), (one) => one.charCodeAt(0));"
            "window.dataTransfer = new DataTransfer();"
            "dataTransfer.items.add(new File([bytes], 'me.jpg', { type: 'image/jpeg' }));"
            "window.drag = (name) => document.body.dispatchEvent("
            " new DragEvent(name, { dataTransfer, bubbles: true, cancelable: true }))",
            base64.b64encode(photo.read_bytes()).decode(),
        )
        page.execute_script("drag('dragover')")
        drop = page.find_element("css selector", ".drop")
        assert drop.text == "Drop the photo here."
        taken = "return !drag('drop')"  # the browser would open the file in place of the page
        assert page.execute_script(taken)
        until(page, lambda: text(page, "status") == READY)
        assert not drop.is_displayed()

    def test_another_language_keeps_the_result_and_asks_nothing_again(
        self, page: Any, tmp_path: Path, photo: Path, service: Service
    ) -> None:
        choose(page, photo)
        click(page, "sign-up")
        until(page, lambda: "Signed up" in text(page, "outcome"))
        page.execute_script(
            "window.sent = 0; const whole = fetch; fetch = (...all) => { sent += 1; return whole(...all) }"
        )
        click(page, "language")
        user_id = page.find_element("css selector", ".user bdi").text
        assert text(page, "status") == TEXTS["ar"]["page"]["signedUp"]
        assert text(page, "next") == TEXTS["ar"]["page"]["nextSignedUp"]
        click(page, "sign-up")
        until(page, lambda: TEXTS["ar"]["messages"]["duplicate_face"] in text(page, "outcome"))
        click(page, "language")
        assert "This face already exists in the database" in text(page, "outcome")
        assert page.execute_script("return sent") == 1
        assert erase(service, photo) == user_id
        empty = tmp_path / "empty.jpg"
        cv2.imwrite(str(empty), np.full((300, 300, 3), 127, np.uint8))
        choose(page, empty, HINTS["no_face"])
        click(page, "language")
        assert text(page, "status") == TEXTS["ar"]["hints"]["no_face"]

    @pytest.mark.parametrize("clipboard", [True, False], ids=["clipboard", "as without HTTPS"])
    def test_the_user_id_can_be_copied(self, service: Service, photo: Path, clipboard: bool) -> None:
        with chromium() as page:
            page.get(f"{service.url}/try")
            if not clipboard:
                page.execute_script("Object.defineProperty(navigator, 'clipboard', { value: undefined })")
            choose(page, photo)
            click(page, "sign-up")
            until(page, lambda: "Signed up" in text(page, "outcome"))
            page.find_element("id", "copy").click()
            until(page, lambda: text(page, "copy") == "Copied")
            page.execute_script("document.getElementById('more').open = true")
            page.find_element("id", "user-id").send_keys("\ue009v")
            copied = page.find_element("id", "user-id").get_attribute("value")
        assert copied == erase(service, photo)

    def test_the_model_to_start_with_is_named_and_no_other(self, page: Any) -> None:
        until(page, lambda: "The compact model runs here." in text(page, "model"))
        page.execute_script('window.fetch = async () => new Response(\'{"model": "auraface-v1"}\'); return showModel()')
        until(page, lambda: not page.find_element("id", "model").is_displayed())

    @pytest.mark.parametrize(("motion", "expected"), [("no-preference", "taken"), ("reduce", "none")])
    def test_nothing_moves_where_little_motion_is_wanted(self, page: Any, motion: str, expected: str) -> None:
        page.execute_cdp_cmd(
            "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-reduced-motion", "value": motion}]}
        )
        moving = "return [getComputedStyle(picture).animationName,"
        ring = " getComputedStyle(document.querySelector('.held')).transitionDuration]"
        assert page.execute_script(moving + ring) == [expected, "0s" if motion == "reduce" else "0.45s"]

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
            until(browser, lambda: text(browser, "status") == READY)
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

    def test_a_person_does_the_steps_of_a_challenge_without_touching_a_button(
        self, page: Any, photo: Path, service: Service
    ) -> None:
        acting_camera(page, "head")
        choose(page, photo)
        click(page, "prove")
        click(page, "sign-up")
        until(page, lambda: "Turn your head" in text(page, "status"))
        assert re.search(r"[2-6] / [56]", text(page, "detail"))
        assert page.execute_script("return document.querySelector('.arrow').getAttribute('d')").startswith("M")
        until(page, lambda: "Signed up" in text(page, "outcome"))
        assert not page.execute_script("return Boolean(stream)")
        erase(service, photo)

    def test_a_person_does_the_steps_to_add_a_photo(self, page: Any, photo: Path, service: Service) -> None:
        requests.post(f"{service.url}/signUp", files={"file": photo.read_bytes()}, timeout=30).raise_for_status()
        acting_camera(page, "head")
        choose(page, photo)
        click(page, "verify")
        until(page, lambda: text(page, "status") == "Verified")
        page.execute_script(
            "window.sent = []; const whole = fetch; window.fetch = (route, all) => {"
            " if (all.body.has('challenge_id')) sent.push([route, all.body.getAll('frame').length]);"
            " return whole(route, all) }"
        )
        click(page, "prove")
        click(page, "add-photo")
        until(page, lambda: "Turn your head" in text(page, "status"))
        until(page, lambda: text(page, "status") == "Photo added")
        ((route, frames),) = page.execute_script("return sent")
        assert route.endswith("/photos")
        assert frames >= 5
        erase(service, photo)

    def test_the_steps_are_asked_for_when_the_service_requires_them(
        self, page: Any, photo: Path, service: Service
    ) -> None:
        acting_camera(page, "head")
        choose(page, photo)
        page.execute_script(
            "const whole = fetch, said = { status: 'error', code: 'challenge_required', message: '', checks: [] };"
            "window.fetch = async (route, all) => route === '/signUp' && !all.body.has('challenge_id')"
            " ? Response.json(said, { status: 422 }) : whole(route, all)"
        )
        click(page, "verify")
        until(page, lambda: "Not verified" in text(page, "outcome"))
        click(page, "sign-up")
        # Without a challenge the sign-up is refused, so the steps were done.
        until(page, lambda: "Signed up" in text(page, "outcome"))
        erase(service, photo)

    def test_a_film_of_all_steps_in_a_fixed_order_ends_the_challenge(self, page: Any, photo: Path) -> None:
        acting_camera(page, "head")
        choose(page, photo)
        click(page, "prove")
        page.execute_script(
            # The film goes on as it was made, whatever the page asks for.
            "const words = arguments[0], pose = () => words[Math.floor(performance.now() / 1500) % words.length];"
            "Object.defineProperty(window, 'pose', { get: pose, set: () => {} })",
            [STEP_WORDS[step] for step in ("look_straight", "turn_left", "look_straight", "turn_right")],
        )
        challenge = "challenge_id: 'x', expires_in: 60, frames: { min: 5, max: 12 }"
        steps = ["look_straight", "turn_right", "turn_left", "turn_right", "come_closer"]
        page.execute_script(
            "const whole = fetch; window.fetch = async (route, all) => route === '/challenges'"
            f" ? Response.json({{ {challenge}, steps: {steps} }}) : whole(route, all)"
        )
        click(page, "verify")
        until(page, lambda: "The steps were not finished." in text(page, "outcome"))

    def test_steps_for_which_there_is_no_camera_ask_for_no_challenge_and_say_why(self, page: Any, photo: Path) -> None:
        choose(page, photo)
        page.execute_script(
            "window.asked = []; const whole = fetch;"
            "window.fetch = (route, all) => { asked.push(route); return whole(route, all) };"
            "navigator.mediaDevices.getUserMedia = async () => { throw new DOMException('', 'NotAllowedError') }"
        )
        click(page, "prove")
        click(page, "verify")
        until(page, lambda: "The steps were not finished." in text(page, "status"))
        assert "The camera may not be used." in text(page, "detail")
        assert page.execute_script("return asked") == []

    def test_a_route_that_takes_no_challenge_gets_the_photo_alone(
        self, page: Any, photo: Path, service: Service
    ) -> None:
        acting_camera(page, "head")
        choose(page, photo)
        page.execute_script(
            "const whole = fetch, said = { status: 'error', code: 'unknown_field', message: '' };"
            "window.fetch = async (route, all) => route === '/signUp' && all.body.has('challenge_id')"
            " ? Response.json(said, { status: 400 }) : whole(route, all)"
        )
        click(page, "prove")
        click(page, "sign-up")
        until(page, lambda: "Signed up" in text(page, "outcome"))
        erase(service, photo)

    def test_a_challenge_can_be_left_and_the_photo_stays(self, page: Any, photo: Path) -> None:
        acting_camera(page, "flat")
        choose(page, photo)
        click(page, "prove")
        click(page, "verify")
        until(page, lambda: "Turn your head" in text(page, "status") or "Come closer" in text(page, "status"))
        click(page, "camera")
        until(page, lambda: "The steps were not finished." in text(page, "outcome"))
        assert next_steps(page) == {"verify"}
        assert page.find_element("id", "verify").is_enabled()
