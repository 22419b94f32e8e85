"""Looks into a photo's file without decoding it: a JPEG's scans, a PNG's chunks, what a HEIF file holds."""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

JPEG_SIGNATURE = b"\xff\xd8\xff"
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"

# Photos have a handful of pieces, odd PNGs some thousands. Millions of empty ones would keep the walk busy for seconds.
MAX_PIECES = 50_000

_JPEG_START_OF_SCAN = 0xDA
_JPEG_END_OF_IMAGE = 0xD9
_JPEG_APP1 = 0xE1
# A marker among the data of a scan: FF, but neither a stuffed byte (FF 00) nor a restart marker (FF D0 to D7).
_JPEG_MARKER = re.compile(rb"\xff+([^\x00\xd0-\xd7\xff])")

# The ancillary chunks of a PNG that change its picture: transparency, and the orientation in Exif.
_PNG_USEFUL_CHUNKS = (b"tRNS", b"eXIf")

_HEIC_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs"}
_GENERAL_HEIF_BRANDS = {b"mif1", b"mif2", b"msf1", b"miaf"}
_AVIF_BRANDS = {b"avif", b"avis"}


@dataclass(frozen=True)
class JpegStructure:
    """The segments of a JPEG's first picture.

    Attributes:
        scans: how many scans it has. Each one repaints the whole picture.
        exif_segments: how many segments hold Exif.
        ends: whether the marker that ends the picture is there.
    """

    scans: int
    exif_segments: int
    ends: bool


def jpeg_structure(data: bytes) -> JpegStructure:
    """Walk the segments of a JPEG, as its decoder does, up to the end of its first picture.

    Bytes that look like markers within a segment, or behind the picture (a motion photo's video), do not count.

    Raises:
        ValueError: it has more than MAX_PIECES segments.
    """
    scans = exif_segments = 0
    position = 2
    for _ in range(MAX_PIECES):
        marker = _JPEG_MARKER.search(data, position)
        if marker is None:
            return JpegStructure(scans, exif_segments, ends=False)
        kind, position = marker[1][0], marker.end()
        if kind == _JPEG_END_OF_IMAGE:
            return JpegStructure(scans, exif_segments, ends=True)
        if kind == 0x01:  # the one other marker that has no segment
            continue
        length = int.from_bytes(data[position : position + 2], "big")
        scans += kind == _JPEG_START_OF_SCAN
        exif_segments += kind == _JPEG_APP1 and data.startswith(b"Exif\0\0", position + 2)
        position += max(2, length)
    raise ValueError("the file is in too many pieces")


def png_essentials(data: bytes) -> bytes:
    """Return a PNG's picture without the chunks that do not change it: text, colour profile, gamma, animation.

    The decoder refuses a good picture for what is odd in those. A useful chunk whose checksum is wrong is left out, as
    the PNG specification allows; a critical chunk stays as it is, and the decoder judges it.

    Raises:
        ValueError: it has more than MAX_PIECES chunks.
    """
    kept = [PNG_SIGNATURE]
    seen: set[bytes] = set()
    for kind, start, end in _png_chunks(data):
        critical = not kind[:1].islower()
        useful = kind in _PNG_USEFUL_CHUNKS and kind not in seen and _checksum_holds(data, start, end)
        if critical or useful:
            kept.append(data[start:end])
        seen.add(kind)
    return b"".join(kept)


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Yield the type of each chunk up to IEND, and where it begins and ends; the last one may be cut off."""
    start = len(PNG_SIGNATURE)
    for _ in range(MAX_PIECES):
        if start + 8 > len(data):
            return
        end = start + 12 + int.from_bytes(data[start : start + 4], "big")
        kind = data[start + 4 : start + 8]
        yield kind, start, end
        if kind == b"IEND":
            return
        start = end
    raise ValueError("the file is in too many pieces")


def _checksum_holds(data: bytes, start: int, end: int) -> bool:
    return end <= len(data) and zlib.crc32(data[start + 4 : end - 4]) == int.from_bytes(data[end - 4 : end], "big")


def is_heic(data: bytes) -> bool:
    """Whether a file says that it is a HEIC. An AVIF shares the container, and is none whatever its first brand."""
    if data[4:8] != b"ftyp":
        return False
    size = min(int.from_bytes(data[:4], "big"), 4096)
    brands = {data[8:12], *(data[place : place + 4] for place in range(16, size, 4))}
    if data[8:12] in _AVIF_BRANDS or (brands & _AVIF_BRANDS and not brands & _HEIC_BRANDS):
        return False
    return bool(brands & (_HEIC_BRANDS | _GENERAL_HEIF_BRANDS))
