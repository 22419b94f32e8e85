"""Estimates from a photo's header how long its decoding will take, before any of it is done."""

from __future__ import annotations

import struct

from photos.file_structure import jpeg_structure

# Measured with `photos.decode.decode` on one core, nanoseconds for each pixel of the file's own picture: JPEG 4.5 to
# 6.5 (it is decoded reduced) and 1 more for each scan of a progressive one, PNG 13 to 33, lossy WebP 16 to 27, lossless
# WebP 16 to 33, HEIC up to 60.
JPEG_NS, JPEG_SCAN_NS = 6, 1
PNG_NS = 33
WEBP_NS = 33
HEIF_NS = 60
# A JPEG's frame header comes after at most this many other segments; photos have a handful.
MAX_JPEG_SEGMENTS = 256
MAX_JPEG_SCANS = 100
# A HEIC file gives the size of each of its pictures; it can describe the same one many times.
MAX_HEIF_SIZES = 64


def decoding_seconds(data: bytes, max_pixels: int) -> float:
    """Estimate the CPU seconds that decoding takes; 0 for a file that is refused without decoding.

    Args:
        data: the file's bytes.
        max_pixels: the most pixels that are decoded; a photo with more is refused.
    """
    try:
        pixels, nanoseconds = _size_and_rate(data)
    except (struct.error, IndexError, ValueError):  # ValueError: a file in too many pieces
        return 0.0
    return pixels * nanoseconds / 1e9 if pixels <= max_pixels else 0.0


def _size_and_rate(data: bytes) -> tuple[int, int]:
    """The picture's pixels, and nanoseconds for each; struct.error or IndexError if the header is cut off."""
    if data.startswith(b"\x89PNG"):
        width, height = struct.unpack_from(">II", data, 16)
        return width * height, PNG_NS
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return _webp_pixels(data), WEBP_NS
    if data.startswith(b"\xff\xd8"):
        scans = min(jpeg_structure(data).scans, MAX_JPEG_SCANS)
        return _jpeg_pixels(data), JPEG_NS + (JPEG_SCAN_NS * scans if scans > 1 else 0)
    if data[4:8] == b"ftyp":
        return _heif_pixels(data), HEIF_NS
    return 0, 0


def _webp_pixels(data: bytes) -> int:
    kind = data[12:16]
    if kind == b"VP8X":  # 24 bits each, less one
        width, height = (int.from_bytes(data[at : at + 3], "little") + 1 for at in (24, 27))
    elif kind == b"VP8L":  # 14 bits each, less one
        (packed,) = struct.unpack_from("<I", data, 21)
        width, height = (packed & 0x3FFF) + 1, (packed >> 14 & 0x3FFF) + 1
    else:
        width, height = (side & 0x3FFF for side in struct.unpack_from("<HH", data, 26))
    return int(width * height)


def _jpeg_pixels(data: bytes) -> int:
    at = 2
    for _ in range(MAX_JPEG_SEGMENTS):
        while data[at] == 0xFF and data[at + 1] == 0xFF:  # fill bytes
            at += 1
        marker = data[at + 1]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            height, width = struct.unpack_from(">HH", data, at + 5)
            return int(width * height)
        at += 2 + int(struct.unpack_from(">H", data, at + 2)[0])
    return 0


def _heif_pixels(data: bytes) -> int:
    largest, at = 0, 0
    for _ in range(MAX_HEIF_SIZES):
        at = data.find(b"ispe", at) + 4
        if at < 4:
            break
        width, height = struct.unpack_from(">4xII", data, at)
        largest = max(largest, width * height)
    return largest
