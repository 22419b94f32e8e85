"""What decoding will cost, judged from the header."""

from __future__ import annotations

import io
from typing import Any

import pytest
from PIL import Image

from photos.decoding_cost import HEIF_NS, JPEG_NS, PNG_NS, WEBP_NS, decoding_seconds
from tests.support.heic import ASTRONAUT

SIZE = (640, 480)


def encoded(kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    Image.new(options.pop("mode", "RGB"), SIZE).save(file, kind, **options)
    return file.getvalue()


@pytest.mark.parametrize(
    ("data", "nanoseconds"),
    [
        (encoded("PNG"), PNG_NS),
        (encoded("JPEG"), JPEG_NS),
        (encoded("JPEG", exif=b"Exif\0\0" + bytes(50_000)), JPEG_NS),
        # A motion photo's video behind the picture may look like scans, and is none.
        (encoded("JPEG") + b"\xff\xda" * 101, JPEG_NS),
        (encoded("WEBP"), WEBP_NS),
        (encoded("WEBP", lossless=True), WEBP_NS),
        (encoded("WEBP", mode="RGBA", exif=b"Exif\0\0x"), WEBP_NS),
    ],
)
def test_the_cost_follows_from_the_pixels_and_the_format(data: bytes, nanoseconds: int) -> None:
    assert decoding_seconds(data, 10**9) == pytest.approx(SIZE[0] * SIZE[1] * nanoseconds / 1e9)


def test_a_heic_file_tells_its_pixels_too() -> None:
    assert decoding_seconds(ASTRONAUT, 10**9) >= 400 * 400 * HEIF_NS / 1e9


def test_the_scans_of_a_progressive_jpeg_count() -> None:
    assert decoding_seconds(encoded("JPEG", progressive=True), 10**9) > decoding_seconds(encoded("JPEG"), 10**9)


def test_a_few_bytes_that_describe_many_pixels_are_expensive() -> None:
    file = io.BytesIO()
    Image.new("RGB", (6320, 6320)).save(file, "WEBP", lossless=True, method=0)
    assert len(file.getvalue()) < 100
    assert decoding_seconds(file.getvalue(), 40_000_000) > 1


@pytest.mark.parametrize("data", [encoded("PNG"), encoded("JPEG"), encoded("WEBP"), ASTRONAUT, b"", b"Hello"])
def test_what_is_not_decoded_costs_nothing(data: bytes) -> None:
    assert decoding_seconds(data, 100) == 0
    for end in range(40):
        assert decoding_seconds(data[:end], 10**9) >= 0
