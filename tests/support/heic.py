"""Makes unusual HEIC files from the pixels of the HEIC file beside this module."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from pathlib import Path

ASTRONAUT = (Path(__file__).parent / "astronaut.heic").read_bytes()


def box(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body) + 8) + kind + body


def full_box(kind: bytes, body: bytes, version: int = 0) -> bytes:
    return box(kind, bytes([version, 0, 0, 0]) + body)


def boxes_of(data: bytes, start: int = 0) -> Iterator[tuple[bytes, bytes]]:
    """Kind and body of every box, those within the boxes of properties included."""
    while start < len(data):
        length, kind = struct.unpack_from(">I4s", data, start)
        body = data[start + 8 : start + length]
        yield kind, body
        if kind in (b"meta", b"iprp", b"ipco"):
            yield from boxes_of(body, 4 if kind == b"meta" else 0)
        start += length


PARTS = dict(boxes_of(ASTRONAUT))
PIXELS = PARTS[b"mdat"]
SIDE = 400
Item = tuple[bytes, Sequence[tuple[int, int]], Sequence[int]]


def heic(
    items: Sequence[Item],
    about: Sequence[int] = (),
    *,
    side: int = SIDE,
    payload: bytes = PIXELS,
    further: bytes = b"",
) -> bytes:
    """A file of these items.

    Args:
        items: of each its kind, its pieces (offset and length in the payload) and its properties, of which there are
            the coding (1), the size (2) and `further` (3); the first item is the photo.
        about: the items (from 1) that the last one describes.
        side: how many pixels the size says.
    """
    head = box(b"ftyp", b"heic\0\0\0\0mif1heic")

    def meta(base: int) -> bytes:
        numbers = range(1, len(items) + 1)
        places = b"".join(
            struct.pack(">HHH", number, 0, len(pieces)) + b"".join(struct.pack(">II", base + at, n) for at, n in pieces)
            for number, (_, pieces, _) in zip(numbers, items, strict=True)
        )
        kinds = b"".join(
            full_box(b"infe", struct.pack(">HH", number, 0) + kind + b"\0", 2)
            for number, (kind, _, _) in zip(numbers, items, strict=True)
        )
        uses = b"".join(
            struct.pack(">HB", number, len(properties)) + bytes(properties)
            for number, (_, _, properties) in zip(numbers, items, strict=True)
        )
        linked = struct.pack(f">HH{len(about)}H", len(items), len(about), *about)
        properties = box(b"hvcC", PARTS[b"hvcC"]) + full_box(b"ispe", struct.pack(">II", side, side)) + further
        return full_box(
            b"meta",
            full_box(b"hdlr", bytes(4) + b"pict" + bytes(13))
            + full_box(b"pitm", struct.pack(">H", 1))
            + full_box(b"iloc", struct.pack(">HH", 0x4400, len(items)) + places)
            + full_box(b"iinf", struct.pack(">H", len(items)) + kinds)
            + (full_box(b"iref", box(b"cdsc", linked)) if about else b"")
            + box(b"iprp", box(b"ipco", properties) + full_box(b"ipma", struct.pack(">I", len(items)) + uses)),
        )

    return head + meta(len(head) + len(meta(0)) + 8) + box(b"mdat", payload)


def heic_of_many(photos: int, metadata: int, pieces: int = 1) -> bytes:
    """So many photos, which all are the same pixels, and share Exif of so many bytes, repeated so many times."""
    items: list[Item] = [(b"hvc1", [(0, len(PIXELS))], [1, 2])] * photos
    items.append((b"Exif", [(len(PIXELS), metadata)] * pieces, []))
    return heic(items, range(1, photos + 1), payload=PIXELS + bytes(metadata))
