"""What can be posted, from outside, to a running service: fuzzed against its own description, mutated and gigantic
photos, requests that two servers read differently, and crowds of slow ones. Each gets a code; none is a 500."""

from __future__ import annotations

import contextlib
import io
import json
import random
import re
import socket
import struct
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given
from hypothesis import settings as example_settings
from hypothesis import strategies as st
from PIL import Image
from requests.structures import CaseInsensitiveDict
from schemathesis.checks import CHECKS

from api.openapi import describe
from api.web_server import allow_descriptors
from settings import Settings
from tests.support.conforming import assert_described
from tests.support.heic import ASTRONAUT as HEIC
from tests.support.heic import heic_of_many
from tests.support.running import ASTRONAUT, Service, read_answer

pytestmark = pytest.mark.slow

API = describe(Settings())
# The process takes 0.3 GB by itself, and the worst photo of 40 megapixels 0.7 more, until it is answered.
MEMORY_KIB = 1_300_000
LINUX = Path("/proc/self/status").exists()


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    service = Service(tmp_path_factory.mktemp("hostile"), MODEL_THREADS="1", MODEL_SLOTS="2")
    service.start()
    yield service
    service.kill()


@pytest.fixture(autouse=True)
def unharmed(service: Service) -> Iterator[None]:
    """After each test the service reads a good photo, within its memory, and has kept nothing of the bad ones."""
    yield
    assert service.post("/analyze").json()["status"] == "success", "".join(service.lines[-20:])
    assert list(service.uploads.iterdir()) == []
    said = "".join(service.lines)
    assert "Traceback" not in said
    assert "uncaptured python exception" not in said
    if LINUX:
        status = Path(f"/proc/{service.process.pid}/status").read_text(encoding="ascii")
        peak = re.search(r"VmHWM:\s+(\d+) kB", status)
        assert peak is not None
        assert int(peak[1]) < MEMORY_KIB


def analyze(service: Service, photo: bytes, name: str = "photo.jpg") -> str:
    """Post one photo; its code, "accepted" if it passes, of an answer that is as described and no 5xx."""
    answer = service.post("/analyze", files={"file": (name, photo)})
    assert_described(API, "POST", "/analyze", answer.status_code, answer.headers, answer.content)
    assert answer.status_code < 500, answer.text
    return str(answer.json().get("code") or "accepted")


# --- the running service against its description ---

ALL: Any = schemathesis.openapi.from_dict(API).get_all_operations()
OPERATIONS = [one.ok() for one in ALL]
CHECKED = [CHECKS.get_one(name) for name in CHECKS.get_all_names() if name not in {
    "ignored_auth",  # this service has no keys; tests/test_access.py has those
    "positive_data_acceptance",  # a form in order can still hold a photo that is none
}]  # fmt: skip
PHOTOS = [ASTRONAUT, ASTRONAUT[:2000], b"", b"Hello!", b"\xff\xd8\xff", b"RIFF\0\0\0\0WEBPVP8 "]
schemathesis.openapi.format("binary", st.sampled_from(PHOTOS))


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda one: one.label)
@pytest.mark.parametrize("mode", list(schemathesis.GenerationMode), ids=lambda mode: mode.value)
def test_whatever_fits_the_description_or_breaks_it_is_answered_as_described(
    service: Service, operation: Any, mode: schemathesis.GenerationMode
) -> None:
    if mode.is_negative and operation.label in NOTHING_TO_BREAK:
        return

    @example_settings(
        max_examples=25,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(operation.as_strategy(generation_mode=mode))
    def fuzz(case: Any) -> None:
        answer = case.call(base_url=service.url)
        # A request that breaks the description may also be too large, which schemathesis does not count as a refusal.
        refused = {"negative_data_rejection"} if answer.status_code == 413 else set()
        case.validate_response(answer, checks=[check for check in CHECKED if check.__name__ not in refused])
        headers = CaseInsensitiveDict({name: values[0] for name, values in answer.headers.items()})
        assert_described(API, case.method, case.path, answer.status_code, headers, answer.content)

    fuzz()


# Nothing of these is read but headers that any text may be in.
NOTHING_TO_BREAK = {"GET /", "GET /health", "GET /openapi.json", "GET /docs", "GET /try"}


# --- mutated photos ---


def encoded(form: str, image: Image.Image | None = None, **options: Any) -> bytes:
    file = io.BytesIO()
    (image or Image.open(io.BytesIO(ASTRONAUT)).convert("RGB").resize((256, 256))).save(file, form, **options)
    return file.getvalue()


def other_frame() -> dict[str, Any]:
    return {"save_all": True, "append_images": [Image.new("RGB", (256, 256), "red")]}


FORMS: dict[str, Callable[[], bytes]] = {
    "JPEG": lambda: encoded("JPEG"),
    "progressive JPEG": lambda: encoded("JPEG", progressive=True, exif=bytes(600)),
    "MPO": lambda: encoded("MPO", **other_frame()),
    "PNG": lambda: encoded("PNG"),
    "APNG": lambda: encoded("PNG", **other_frame()),
    "WebP": lambda: encoded("WEBP", exif=b"Exif\0\0II*\0" + bytes(100)),
    "lossless WebP": lambda: encoded("WEBP", lossless=True),
    "animated WebP": lambda: encoded("WEBP", **other_frame()),
    "HEIC": lambda: HEIC,
}
REFUSED_AS_A_FILE = {"unreadable_image", "unsupported_format", "image_too_large", "empty_file"}


@pytest.mark.parametrize("form", FORMS)
def test_a_photo_that_breaks_off_anywhere_is_refused_with_a_code(service: Service, form: str) -> None:
    photo = FORMS[form]()
    ends = [*range(0, 64, 16), *(len(photo) * part // 5 for part in range(1, 5))]
    whole_before = {"MPO", "APNG", "animated WebP"}  # of several pictures the first may be whole
    for end in ends:
        assert analyze(service, photo[:end]) in REFUSED_AS_A_FILE or form in whole_before


@pytest.mark.parametrize("form", FORMS)
def test_a_photo_with_flipped_bits_is_read_or_refused_with_a_code(service: Service, form: str) -> None:
    photo, chance = FORMS[form](), random.Random(form)
    for number in range(8):
        damaged = bytearray(photo)
        for _ in range(chance.choice((1, 3, 20))):
            damaged[chance.randrange(len(damaged) if number % 2 else 200)] ^= 1 << chance.randrange(8)
        assert analyze(service, bytes(damaged))


# --- gigantic and odd photos ---


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def flat_png(width: int, height: int, *, colour: int, depth: int = 8, channels: int, before: bytes = b"") -> bytes:
    """A PNG of one colour: a few kilobytes, however many pixels."""
    row = b"\0" + b"\xb0" * ((width * channels * depth + 7) // 8)
    deflate = zlib.compressobj(9)
    pixels = b"".join([deflate.compress(row) for _ in range(height)]) + deflate.flush()
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + before + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


SIDE = 6320  # 40 megapixels, by a hair less
PALETTE = chunk(b"PLTE", bytes(range(256)) * 3) + chunk(b"tRNS", bytes(200))
GIGANTIC: dict[str, Callable[[], bytes]] = {
    "RGB": lambda: flat_png(SIDE, SIDE, colour=2, channels=3),
    "RGBA": lambda: flat_png(SIDE, SIDE, colour=6, channels=4),
    "RGBA of 16 bits": lambda: flat_png(SIDE, SIDE, colour=6, depth=16, channels=4),
    "grey of 16 bits": lambda: flat_png(SIDE, SIDE, colour=0, depth=16, channels=1),
    "black and white": lambda: flat_png(SIDE, SIDE, colour=0, depth=1, channels=1),
    "a palette with transparency": lambda: flat_png(SIDE, SIDE, colour=3, channels=1, before=PALETTE),
    "the longest column": lambda: flat_png(610, 65_535, colour=2, channels=3),
    "the longest row": lambda: flat_png(65_535, 610, colour=6, channels=4),
    "1 x 10,000": lambda: flat_png(1, 10_000, colour=2, channels=3),
    "10,000 x 1": lambda: flat_png(10_000, 1, colour=2, channels=3),
    "3000 x 2": lambda: flat_png(3000, 2, colour=2, channels=3),
    "1 x 1": lambda: flat_png(1, 1, colour=2, channels=3),
    "a CMYK JPEG": lambda: encoded("JPEG", Image.new("CMYK", (SIDE, SIDE), (9, 9, 9, 9))),
    "a WebP": lambda: encoded("WEBP", Image.new("RGBA", (SIDE, SIDE), (9, 9, 9, 99)), lossless=True, method=0),
}


@pytest.mark.parametrize("kind", GIGANTIC)
def test_a_photo_of_any_shape_and_depth_within_the_limits_is_read(service: Service, kind: str) -> None:
    assert analyze(service, GIGANTIC[kind]()) == "no_face"


def claiming(form: str, side: int) -> bytes:
    """A small file whose header claims `side` x `side` pixels."""
    if form == "PNG":
        return flat_png(side, 1, colour=2, channels=3).replace(
            chunk(b"IHDR", struct.pack(">IIBBBBB", side, 1, 8, 2, 0, 0, 0)),
            chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)),
        )
    data = bytearray(encoded("WEBP", **other_frame()))
    canvas = data.index(b"VP8X") + 12
    data[canvas : canvas + 6] = struct.pack("<I", side - 1)[:3] * 2
    return bytes(data)


def test_a_line_of_forty_million_pixels_is_too_large(service: Service) -> None:
    assert analyze(service, flat_png(40_000_000, 1, colour=2, channels=3)) == "image_too_large"


@pytest.mark.parametrize("form", ["PNG", "WebP"])
def test_a_header_that_claims_fifty_thousand_pixels_a_side_is_judged_by_it(service: Service, form: str) -> None:
    assert analyze(service, claiming(form, 50_000)) in {"image_too_large", "unreadable_image"}


def progressive_of_many_scans(scans: int, side: int) -> bytes:
    plain = encoded("JPEG", Image.new("RGB", (side, side), (128, 60, 200)), progressive=True)
    return plain[:-2] + plain[plain.rindex(b"\xff\xda") : -2] * scans + plain[-2:]


ODD: dict[str, tuple[Callable[[], bytes], set[str]]] = {
    "a PNG that is also a ZIP": (lambda: ASTRONAUT + b"PK\3\4" + bytes(100), {"accepted"}),
    "a JPEG that is also a page": (
        lambda: encoded("JPEG", comment=b"<script>alert(1)</script><?php system($_GET[0]); ?>"),
        {"accepted", "face_too_small", "face_cut_off"},
    ),
    "a page that is also a JPEG": (lambda: b"<script></script>" + encoded("JPEG"), {"unsupported_format"}),
    "a GIF that is also a JPEG": (lambda: b"GIF89a" + encoded("JPEG"), {"unsupported_format"}),
    "a JPEG that begins as a PNG": (lambda: b"\x89PNG\r\n\x1a\n" + encoded("JPEG"), {"unreadable_image"}),
    "a script": (lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(id) run", {"unsupported_format"}),
    "scans without end": (lambda: progressive_of_many_scans(200, 100), {"unreadable_image"}),
    "ninety scans": (lambda: progressive_of_many_scans(80, 3400), {"no_face"}),
    "ninety scans of 40 megapixels": (lambda: progressive_of_many_scans(80, SIDE), {"unreadable_image"}),
    "a HEIC that unfolds to 6 GB": (lambda: heic_of_many(900, 7_000_000), {"unreadable_image"}),
    "a HEIC that unfolds to 20 GB": (lambda: heic_of_many(100, 7_000_000, 30), {"unreadable_image"}),
    "nothing but zeros": (lambda: bytes(8 * 2**20), {"unsupported_format"}),
    "nothing but noise": (lambda: np.random.default_rng(0).bytes(2**20), {"unsupported_format"}),
}


@pytest.mark.parametrize("kind", ODD)
def test_an_odd_file_is_judged_by_its_content_whatever_its_name(service: Service, kind: str) -> None:
    make, codes = ODD[kind]
    assert analyze(service, make(), "photo.php") in codes


@pytest.mark.parametrize("orientation", [*range(10), 65535])
def test_a_photo_is_understood_in_every_orientation(service: Service, orientation: int) -> None:
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # EXIF -> the library's name of the turn
    upright = Image.open(io.BytesIO(ASTRONAUT)).convert("RGB")
    lying = upright.transpose(Image.Transpose(undo[orientation])) if orientation in undo else upright
    tags = Image.Exif()
    tags[0x0112] = orientation
    assert analyze(service, encoded("JPEG", lying, quality=95, exif=tags.tobytes())) == "accepted"


# --- requests ---

HELLO = b" HTTP/1.1\r\nHost: here\r\n"
SECOND = b"GET /hidden HTTP/1.1\r\nHost: here\r\n\r\n"


def chunked(body: bytes, header: bytes = b"Transfer-Encoding: chunked\r\n") -> bytes:
    return b"POST /verify" + HELLO + header + b"\r\n" + body


SMUGGLING = {
    "two kinds of length": chunked(b"0\r\n\r\n" + SECOND, b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n"),
    "two lengths": b"POST /verify HTTP/1.1\r\nHost: here\r\nContent-Length: 0\r\nContent-Length: 9\r\n\r\n" + SECOND,
    "a list of lengths": b"POST /verify HTTP/1.1\r\nHost: here\r\nContent-Length: 0, 9\r\n\r\n" + SECOND,
    "a length with a sign": b"POST /verify HTTP/1.1\r\nHost: here\r\nContent-Length: +9\r\n\r\n" + SECOND,
    "a length of 5000 digits": b"GET / HTTP/1.1\r\nHost: here\r\nContent-Length: " + b"1" * 5000 + b"\r\n\r\n",
    "a length in Arabic-Indic digits": "GET / HTTP/1.1\r\nHost: h\r\nContent-Length: \u0663\r\n\r\n".encode() + SECOND,
    "an unknown coding": chunked(b"0\r\n\r\n" + SECOND, b"Transfer-Encoding: xchunked\r\n"),
    "chunked and identity": chunked(b"0\r\n\r\n" + SECOND, b"Transfer-Encoding: chunked, identity\r\n"),
    "a coding behind a vertical tab": chunked(b"0\r\n\r\n" + SECOND, b"Transfer-Encoding: \x0bchunked\r\n"),
    "a space before the colon": chunked(b"0\r\n\r\n" + SECOND, b"Transfer-Encoding : chunked\r\n"),
    "a chunk of 0x5": chunked(b"0x5\r\nhello\r\n0\r\n\r\n" + SECOND),
    "a chunk of -1": chunked(b"-1\r\nhello\r\n0\r\n\r\n" + SECOND),
    "a chunk of 1_0": chunked(b"1_0\r\nhello\r\n0\r\n\r\n" + SECOND),
    "a chunk longer than it says": chunked(b"5\r\nhelloXX0\r\n\r\n" + SECOND),
    "a coding before there were any": b"POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + SECOND,
    "a version to come": b"POST / HTTP/9.9\r\nHost: here\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + SECOND,
    "the next version's first words": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + SECOND,
    "chunks by line feeds": chunked(b"5\nhello\n0\n\n" + SECOND),
    "a chunk header without end": chunked(b"1" * 300_000),
    "an extension without end": chunked(b"5;a=" + b"b" * 300_000),
    "a trailer without end": chunked(b"0\r\n" + b"X: y\r\n" * 50_000),
    "chunks of a byte": chunked(b"1\r\na\r\n" * 50_000),
    "NUL in a header": b"GET / HTTP/1.1\r\nHost: here\r\nX: a\0b\r\n\r\n",
    "a bare CR in a header": b"GET / HTTP/1.1\r\nHost: here\r\nX: a\rb\r\n\r\n",
    "no host": b"GET / HTTP/1.1\r\n\r\n" + SECOND,
    "two hosts": b"GET / HTTP/1.1\r\nHost: here\r\nHost: there\r\n\r\n" + SECOND,
    "an address that is none": b"GET http://[ HTTP/1.1\r\nHost: here\r\n\r\n" + SECOND,
    "a method in small letters": b"get / HTTP/1.1\r\nHost: here\r\n\r\n" + SECOND,
}


@pytest.mark.parametrize("shape", SMUGGLING)
def test_a_request_that_two_servers_could_read_differently_is_refused_and_nothing_behind_it_is_read(
    service: Service, shape: str
) -> None:
    with service.connect(SMUGGLING[shape]) as connection:
        received = b""
        try:
            while data := connection.recv(65536):
                received += data
        except ConnectionResetError:
            pass  # closed while we were sending; the answer came before
    head, _, body = received.partition(b"\r\n\r\n")
    assert re.match(rb"HTTP/1\.[01] 400 ", head)
    answer, end = json.JSONDecoder().raw_decode(body.decode())
    assert (answer["code"], body[end:]) == ("bad_request", b"")


def test_a_client_that_asks_before_it_sends_is_told_to_go_on_or_why_not(service: Service) -> None:
    asking = b"POST /analyze" + HELLO + b"Expect: 100-continue\r\nContent-Length: %d\r\n\r\n"
    assert service.raw(asking % 80_000_000)[0] == 413
    with service.connect(asking % 5) as connection:
        assert connection.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(b"Hello")
        assert read_answer(connection)[0] == 400


ADDRESSES: dict[str, tuple[bytes, int]] = {
    "an absolute address": (b"GET http://evil/" + HELLO + b"\r\n", 200),
    "two slashes": (b"GET //evil/" + HELLO + b"\r\n", 404),
    "a star": (b"OPTIONS *" + HELLO + b"\r\n", 404),
    "a tunnel": (b"CONNECT evil:443" + HELLO + b"\r\n", 404),
    "a trace": (b"TRACE /" + HELLO + b"X-API-Key: secret\r\n\r\n", 405),
    "a broken escape": (b"GET /%zz%ff%00" + HELLO + b"\r\n", 404),
    "a host that is none": (b"GET /docs HTTP/1.1\r\nHost: a/../b?<x>:99999999\r\n\r\n", 200),
    "10,000 headers": (b"GET /" + HELLO + b"X: 1\r\n" * 10_000 + b"\r\n", 200),
    "thousands of cookies": (b"GET /" + HELLO + b"Cookie: " + b"a=b;" * 50_000 + b"\r\n\r\n", 200),
    "thousands of languages": (b"GET /x" + HELLO + b"Accept-Language: " + b"a;q=0.1," * 30_000 + b"\r\n\r\n", 404),
    "thousands of etags": (b"GET /docs" + HELLO + b"If-None-Match: " + b'"a",' * 50_000 + b"\r\n\r\n", 200),
    "thousands of ranges": (b"GET /docs" + HELLO + b"Range: bytes=" + b"0-1," * 50_000 + b"\r\n\r\n", 200),
    "a form of 30,000 fields": (
        b"POST /verify" + HELLO + b"Content-Type: application/x-www-form-urlencoded\r\n"
        b"Content-Length: 120000\r\n\r\n" + b"a=b&" * 30_000,
        400,
    ),
    "a boundary of 200,000 letters": (
        b"POST /verify" + HELLO + b"Content-Type: multipart/form-data; boundary=" + b"x" * 200_000
        + b"\r\nContent-Length: 3\r\n\r\n--x",
        400,
    ),
    "a boundary in UTF-16": (
        b"POST /verify" + HELLO + b"Content-Type: multipart/form-data; boundary*=utf-16''%ff%fe\r\n"
        b"Content-Length: 3\r\n\r\n--x",
        400,
    ),
}  # fmt: skip


@pytest.mark.parametrize("shape", ADDRESSES)
def test_an_odd_request_is_answered_as_any_other(service: Service, shape: str) -> None:
    sent, expected = ADDRESSES[shape]
    status, headers, body = service.raw(sent)
    assert status == expected
    assert b"secret" not in body
    if status != 200:
        assert set(json.loads(body)) == {"status", "code", "message", "request_id"}
        assert headers["content-type"] == "application/json"


def form(*parts: bytes, boundary: bytes = b"frontier") -> bytes:
    body = b"".join(b"--" + boundary + b"\r\n" + part + b"\r\n" for part in parts) + b"--" + boundary + b"--\r\n"
    head = b"POST /analyze HTTP/1.1\r\nHost: here\r\nContent-Length: %d\r\n" % len(body)
    return head + b"Content-Type: multipart/form-data; boundary=" + boundary + b"\r\n\r\n" + body


FILE = b'Content-Disposition: form-data; name="file"; filename="a"\r\n'
ODD_FORMS: dict[str, tuple[bytes, set[str]]] = {
    "a part of endless headers": (form(FILE + b"X: y\r\n" * 500_000 + b"\r\nHello!"), {"bad_request"}),
    "a part whose header never ends": (form(FILE + b"X: " + b"y" * 3_000_000), {"bad_request"}),
    "nothing but line feeds": (form(FILE + b"\r\n" + b"\r\n" * 2_000_000), {"unsupported_format"}),
    "boundaries that are almost right": (form(FILE + b"\r\n" + b"\r\n--frontie" * 300_000), {"unsupported_format"}),
    "a preamble of megabytes": (form(b"\r\n" * 1_000_000 + FILE + b"\r\nHello!"), {"no_file", "bad_request"}),
    "a name in an unknown charset": (
        form(b"Content-Disposition: form-data; name*=x-none''f%ff; filename*=utf-16''%00\r\n\r\nHello!"),
        {"no_file"},
    ),
    "a coded part": (form(FILE + b"Content-Transfer-Encoding: base64\r\n\r\n/9j/"), {"unsupported_format"}),
    "a form within the form": (
        form(FILE + b"Content-Type: multipart/mixed; boundary=b\r\n\r\n--b\r\n\r\nx\r\n--b--"),
        {"unsupported_format"},
    ),
    "a disposition without a name": (form(b"Content-Disposition: form-data\r\n\r\nHello!"), {"no_file", "bad_request"}),
    "no disposition": (form(b"X: y\r\n\r\nHello!"), {"no_file", "bad_request"}),
    "NUL, newline and quotes in names": (
        form(b'Content-Disposition: form-data; name="file\\"\0"; filename="\0\n\\"a"\r\n\r\nHello!'),
        {"unknown_field"},
    ),
}


@pytest.mark.parametrize("kind", ODD_FORMS)
def test_an_odd_form_is_refused_with_a_code(service: Service, kind: str) -> None:
    sent, codes = ODD_FORMS[kind]
    status, _, body = service.raw(sent)
    assert 400 <= status < 500
    assert json.loads(body)["code"] in codes


def test_a_crowd_of_slow_uploads_keeps_nobody_else_from_being_served(service: Service) -> None:
    request = form(FILE + b"\r\n" + ASTRONAUT)
    crowd: list[socket.socket] = [service.connect(request[: 200 + number]) for number in range(300)]
    try:
        for _ in range(3):
            for connection in crowd:
                connection.sendall(b"\0")
            assert requests.get(service.url + "/", timeout=30).status_code == 200
            assert analyze(service, ASTRONAUT) == "accepted"
    finally:
        for connection in crowd:
            connection.close()


@pytest.mark.parametrize("sent", [b"", b"POST /analyze HTTP/1.1\r\nHost: h", form(FILE)[:150] + b"\0" * 100_000])
def test_more_connections_than_there_are_places_keep_nobody_from_being_served(service: Service, sent: bytes) -> None:
    allow_descriptors()
    crowd = [service.connect(sent) for _ in range(1100)]
    try:
        for _ in range(3):
            for connection in crowd:
                with contextlib.suppress(OSError):  # closed, to make room
                    connection.sendall(b"\0")
            assert requests.get(service.url + "/", timeout=30).status_code == 200
            assert analyze(service, ASTRONAUT) == "accepted"
    finally:
        for connection in crowd:
            connection.close()


def test_a_slow_upload_that_ends_is_answered(service: Service) -> None:
    request = form(FILE + b"\r\n" + ASTRONAUT)
    with service.connect(b"") as connection:
        for start in range(0, len(request), 20_000):
            connection.sendall(request[start : start + 20_000])
            time.sleep(0.05)
        status, _, body = read_answer(connection)
    assert (status, json.loads(body)["accepted"]) == (200, True)
