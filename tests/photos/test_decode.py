"""Photos as phones, browsers and attackers send them: what is read, how it is read, and what is refused."""

from __future__ import annotations

import io
import math
import random
import resource
import struct
import zlib
from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from errors import FaceError
from photos.decode import decode
from photos.pixels import Pixels
from tests.support import heic
from tests.support.fakes import packaged_photo

Array = npt.NDArray[Any]

# Quadrants of four colours, higher than wide: no turn or mirroring leaves them as they are.
RED, GREEN, BLUE, YELLOW = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0)


def read(data: bytes, max_pixels: int = 1_000_000) -> Pixels:
    return decode(data, max_bytes=2**20, max_pixels=max_pixels).pixels


def refusal(data: bytes, max_pixels: int = 1_000_000) -> str:
    with pytest.raises(FaceError) as caught:
        read(data, max_pixels)
    return caught.value.code


def quadrants(height: int = 48, width: int = 32) -> Array:
    """uint8[height, width, 3], RGB."""
    picture = np.zeros((height, width, 3), np.uint8)
    middle_y, middle_x = height // 2, width // 2
    picture[:middle_y, :middle_x], picture[:middle_y, middle_x:] = RED, GREEN
    picture[middle_y:, :middle_x], picture[middle_y:, middle_x:] = BLUE, YELLOW
    return picture


def encoded(image: Image.Image | Array, form: str, **options: Any) -> bytes:
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def exif(orientation: int) -> bytes:
    tags = Image.Exif()
    tags[0x0112] = orientation
    tags[0x010F] = "A maker"
    return tags.tobytes()


def assert_shows_quadrants(image: Pixels, tolerance: int = 0) -> None:
    """The middle of each quadrant has its colour, in BGR; a lossy format gets a tolerance."""
    height, width = image.shape[:2]
    assert image.dtype == np.uint8
    assert image.shape[2] == 3
    assert image.flags.c_contiguous
    for colour, y, x in ((RED, 1, 1), (GREEN, 1, 3), (BLUE, 3, 1), (YELLOW, 3, 3)):
        found = image[height * y // 4, width * x // 4].astype(int)
        assert np.abs(found - colour[::-1]).max() <= tolerance, (y, x, found)


LOSSY = 12
GOOD: dict[str, Callable[[Array], bytes]] = {
    "JPEG": lambda rgb: encoded(rgb, "JPEG", quality=95, exif=exif(1)),
    "progressive JPEG": lambda rgb: encoded(rgb, "JPEG", quality=95, progressive=True),
    "PNG": lambda rgb: encoded(rgb, "PNG", exif=exif(1)),
    "palette PNG": lambda rgb: encoded(Image.fromarray(rgb).quantize(16), "PNG"),
    "WebP": lambda rgb: encoded(rgb, "WEBP", quality=95, exif=exif(1)),
    "lossless WebP": lambda rgb: encoded(rgb, "WEBP", lossless=True),
    "MPO": lambda rgb: encoded(rgb, "MPO", quality=95, save_all=True, append_images=[Image.new("RGB", (32, 48))]),
    "animated PNG": lambda rgb: encoded(rgb, "PNG", save_all=True, append_images=[Image.new("RGB", (32, 48))]),
    "animated WebP": lambda rgb: encoded(
        rgb, "WEBP", lossless=True, save_all=True, append_images=[Image.new("RGB", (32, 48))]
    ),
    "RGBA PNG": lambda rgb: encoded(Image.fromarray(rgb).convert("RGBA"), "PNG"),
    "16-bit RGB PNG": lambda rgb: opencv_png(rgb.astype(np.uint16) * 257),
}


def opencv_png(rgb: Array) -> bytes:
    return bytes(cv2.imencode(".png", np.ascontiguousarray(rgb[..., ::-1]))[1])


@pytest.mark.parametrize("form", GOOD)
def test_every_accepted_format_is_read_in_its_colours_and_its_first_frame(form: str) -> None:
    image = read(GOOD[form](quadrants()))
    assert image.shape == (48, 32, 3)
    assert_shows_quadrants(image, LOSSY)


# Orientation -> how the sensor stored an upright picture, by EXIF's own table of the 0th row and the 0th column.
STORED: dict[int, Callable[[Array], Array]] = {
    1: lambda upright: upright,
    2: lambda upright: upright[:, ::-1],
    3: lambda upright: upright[::-1, ::-1],
    4: lambda upright: upright[::-1],
    5: lambda upright: upright.transpose(1, 0, 2),
    6: lambda upright: np.rot90(upright, 1),
    7: lambda upright: np.rot90(upright, 2).transpose(1, 0, 2),
    8: lambda upright: np.rot90(upright, -1),
}


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize(("form", "tolerance"), [("JPEG", LOSSY), ("PNG", 0), ("WEBP", LOSSY)])
def test_a_photo_is_turned_upright_by_its_exif_orientation(form: str, tolerance: int, orientation: int) -> None:
    stored = np.ascontiguousarray(STORED[orientation](quadrants()))
    image = read(encoded(stored, form, quality=95, exif=exif(orientation)))
    assert image.shape == (48, 32, 3)
    assert_shows_quadrants(image, tolerance)


@pytest.mark.parametrize(
    "nonsense",
    [
        exif(0),
        exif(9),
        exif(65535),
        b"Exif\0\0",
        b"Exif\0\0II*\0\xff\xff\xff\xff",
        b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + b"\x01\x12" * 40,
        b"Exif\0\0" + random.Random(1).randbytes(500),
        # an orientation that is a text, and one that is a fraction with the denominator nought
        b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x02\0\0\0\x02x\0\0\0\0\0\0\0",
        b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x05\0\0\0\x01\0\0\0\x1a\0\0\0\0\0\0\0\x06\0\0\0\0",
    ],
)
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_nonsense_in_the_metadata_is_no_reason_to_refuse_good_pixels(form: str, nonsense: bytes) -> None:
    image = read(encoded(quadrants(), form, quality=95, exif=nonsense))
    assert_shows_quadrants(image, LOSSY)


@pytest.mark.parametrize(
    "odd",
    [b"\x01\x09\0\x02\0\0\0\x04abc\0", b"\x01\x1f\0\x02\0\0\0\x04abc\0", b"\x01\x0f\0\x0b\0\0\0\x01abc\0"],
    ids=["a word for a short", "a word for a fraction", "a number for the maker"],
)
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_an_odd_tag_beside_it_does_not_hide_the_orientation(form: str, odd: bytes) -> None:
    metadata = b"Exif\0\0MM\0*\0\0\0\x08\0\x02\x01\x12\0\x03\0\0\0\x01\0\x06\0\0" + odd + bytes(4)
    stored = np.ascontiguousarray(STORED[6](quadrants()))
    assert_shows_quadrants(read(encoded(stored, form, quality=95, exif=metadata)), LOSSY)


@pytest.mark.parametrize(("sixteen", "eight"), [(0, 0), (257 * 100, 100), (257 * 200, 200), (65535, 255)])
def test_sixteen_bits_are_scaled_to_eight_and_not_clipped(sixteen: int, eight: int) -> None:
    grey = np.full((20, 20), sixteen, np.uint16)
    assert read(encoded(grey, "PNG"))[10, 10].tolist() == [eight] * 3
    colour = np.stack([grey, grey // 2, grey * 0], axis=2)
    assert read(opencv_png(colour))[10, 10].tolist() == [0, eight // 2, eight]


def test_a_grey_photo_becomes_three_equal_channels() -> None:
    grey = np.tile(np.arange(0, 256, 8, dtype=np.uint8), (32, 1))
    image = read(encoded(grey, "PNG"))
    assert (image == grey[..., None]).all()
    assert np.abs(read(encoded(grey, "JPEG", quality=95)).astype(int) - grey[..., None]).max() <= LOSSY
    assert read(encoded(Image.new("1", (20, 20), 1), "PNG"))[5, 5].tolist() == [255, 255, 255]


def test_a_cmyk_jpeg_is_read_in_its_colours() -> None:
    assert_shows_quadrants(read(encoded(Image.fromarray(quadrants()).convert("CMYK"), "JPEG", quality=95)), LOSSY)


def test_transparency_is_laid_over_white() -> None:
    rgba = np.dstack([quadrants(), np.full((48, 32), 255, np.uint8)])
    rgba[:24, :16, 3] = 0
    rgba[:24, 16:, 3] = 51
    for form, options in (("PNG", {}), ("WEBP", {"lossless": True, "exact": True})):
        image = read(encoded(rgba, form, **options))
        assert image[12, 8].tolist() == [255, 255, 255]
        assert image[12, 24].tolist() == [204, 255, 204]
        assert image[36, 8].tolist() == list(BLUE[::-1])


def test_a_transparent_palette_colour_is_laid_over_white() -> None:
    palette = Image.fromarray(quadrants()).quantize(4)
    clear: Any = palette.getpixel((8, 12))
    image = read(encoded(palette, "PNG", transparency=clear))
    assert image[12, 8].tolist() == [255, 255, 255]
    assert image[36, 24].tolist() == list(YELLOW[::-1])


@pytest.mark.parametrize(("width", "height"), [(1, 1), (1, 10_000), (10_000, 1)])
def test_a_strip_or_a_speck_is_read_like_any_photo(width: int, height: int) -> None:
    for form in ("PNG", "JPEG", "WEBP"):
        assert read(encoded(Image.new("RGB", (width, height)), form)).shape == (height, width, 3)


@pytest.mark.parametrize("size", [(1, 65_536), (65_536, 1)])
def test_a_side_longer_than_any_jpegs_is_too_large(size: tuple[int, int]) -> None:
    assert refusal(encoded(Image.new("RGB", size), "PNG")) == "image_too_large"


def test_an_empty_file_is_called_empty() -> None:
    assert refusal(b"") == "empty_file"


def test_a_file_over_the_limit_is_refused_unread() -> None:
    with pytest.raises(FaceError) as caught:
        decode(bytes(1001), max_bytes=1000, max_pixels=10)
    assert caught.value.code == "file_too_large"


@pytest.mark.parametrize(
    "data",
    [
        b"Hello, this is no photo.",
        b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n1 0 obj\n<<>>\nendobj\n",
        b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>',
        b"\0\0\0\x18ftypqt  \0\0\0\0qt  ",
        b"MZ" + bytes(200),
        b"\x89PNG",
        *(encoded(quadrants(), form) for form in ("GIF", "BMP", "TIFF", "ICO", "PPM")),
    ],
    ids=lambda data: data[:4].hex(),
)
def test_a_format_that_is_not_accepted_is_refused_by_its_content(data: bytes) -> None:
    assert refusal(data) == "unsupported_format"


@pytest.mark.parametrize("form", GOOD)
@pytest.mark.parametrize("share", [0.1, 0.3, 0.5, 0.7, 0.9])
def test_a_photo_that_breaks_off_is_unreadable_and_never_read_in_part(form: str, share: float) -> None:
    photo = GOOD[form](noise())
    if form == "MPO":  # its second picture may be missing; the first must be whole
        photo = photo[: photo.index(b"\xff\xd9")]
    # An APNG's first frame may be whole although a later one is missing.
    whole_first = photo.find(b"fcTL", photo.find(b"IDAT")) if form == "animated PNG" else len(photo)
    assert refusal(photo[: int(share * min(whole_first, len(photo)))]) == "unreadable_image"


def noise() -> Array:
    return np.random.default_rng(3).integers(0, 256, (48, 32, 3), dtype=np.uint8)


def outcome(data: bytes) -> str:
    try:
        image = read(data)
    except FaceError as error:
        return error.code
    return "read" if image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3 else "misread"


@pytest.mark.parametrize("form", GOOD)
def test_a_damaged_photo_is_read_or_refused_with_a_code_and_never_fails_otherwise(form: str) -> None:
    photo, chance = GOOD[form](quadrants()), random.Random(form)
    for _ in range(300):
        damaged = bytearray(photo)
        for _ in range(chance.choice((1, 1, 4, 30))):
            # Headers and metadata lie in front: half of the damage goes there.
            end = chance.choice((len(damaged), min(len(damaged), 120)))
            damaged[chance.randrange(end)] ^= 1 << chance.randrange(8)
        if photo.startswith(b"\x89PNG") and chance.random() < 0.7:
            mend_checksums(damaged)
        assert outcome(bytes(damaged)) in {"read", "unreadable_image", "unsupported_format", "image_too_large"}


def mend_checksums(png: bytearray) -> None:
    """Make each chunk's checksum right, so that damage gets as far as the decoder."""
    at = 8
    while at + 12 <= len(png):
        end = at + 8 + int.from_bytes(png[at : at + 4], "big")
        if end + 4 > len(png):
            return
        png[end : end + 4] = struct.pack(">I", zlib.crc32(png[at + 4 : end]))
        at = end + 4


def test_a_palette_image_without_its_palette_is_unreadable() -> None:
    assert refusal(png(3, png_chunk(b"IDAT", zlib.compress(bytes(9 * 8))), side=8)) == "unreadable_image"


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(colour_type: int, *chunks: bytes, side: int) -> bytes:
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, colour_type, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + png_chunk(b"IEND", b"")


def claiming(form: str, side: int) -> bytes:
    """A small file whose header claims `side` x `side` pixels."""
    if form == "PNG":
        return png(2, png_chunk(b"IDAT", zlib.compress(bytes(1000))), side=side)
    if form == "JPEG":
        data = bytearray(encoded(quadrants(), "JPEG"))
        frame = data.index(b"\xff\xc0")
        data[frame + 5 : frame + 9] = struct.pack(">HH", side, side)
        return bytes(data)
    data = bytearray(GOOD["animated WebP"](quadrants()))
    canvas = data.index(b"VP8X") + 12
    data[canvas : canvas + 6] = struct.pack("<I", side - 1)[:3] * 2
    return bytes(data)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WebP"])
@pytest.mark.parametrize("side", [1001, 16_000, 60_000])
def test_a_header_that_claims_too_many_pixels_is_refused_before_they_take_memory(form: str, side: int) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert refusal(claiming(form, side)) == "image_too_large"
    grown_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown_kib < 64 * 1024


def test_a_photo_of_just_the_permitted_pixels_is_read() -> None:
    photo = encoded(Image.new("RGB", (100, 50)), "PNG")
    assert read(photo, max_pixels=5000).shape == (50, 100, 3)
    assert refusal(photo, max_pixels=4999) == "image_too_large"


def test_a_webp_that_claims_too_many_pixels_is_refused_before_there_is_a_decoder(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr("PIL._webp.WebPAnimDecoder")
    assert refusal(claiming("WebP", 60_000)) == "image_too_large"


def test_a_jpeg_of_endless_scans_is_refused_before_it_is_decoded() -> None:
    plain = encoded(quadrants(480, 320), "JPEG", progressive=True)
    last = plain.rindex(b"\xff\xda")
    scan = plain[last:-2]
    assert read(plain).shape == (480, 320, 3)
    assert refusal(plain[:-2] + 200 * scan + plain[-2:]) == "unreadable_image"


def test_the_larger_a_jpeg_is_the_fewer_scans_it_may_have() -> None:
    plain = encoded(Image.new("RGB", (5000, 5000)), "JPEG", progressive=True)
    scan = plain[plain.rindex(b"\xff\xda") : -2]
    assert read(plain[:-2] + 5 * scan + plain[-2:], max_pixels=25_000_000).shape == (5000, 5000, 3)
    assert refusal(plain[:-2] + 50 * scan + plain[-2:], max_pixels=25_000_000) == "unreadable_image"


def segments(marker: int, *bodies: bytes) -> bytes:
    """JPEG segments of one kind."""
    return b"".join(b"\xff" + bytes([marker]) + struct.pack(">H", len(body) + 2) + body for body in bodies)


def with_pieces(form: str, pieces: bytes) -> bytes:
    """A photo with these segments or chunks before its pixels."""
    photo = GOOD[form](quadrants())
    start = 2 if form == "JPEG" else 33
    return photo[:start] + pieces + photo[start:]


ENDLESS = {
    "comments": ("JPEG", segments(0xFE, b"") * 200_000),
    "pieces of Exif": ("JPEG", segments(0xE1, b"Exif\0\0" + bytes(200)) * 4000),
    "filling": ("JPEG", b"\xff" * 900_000),
    "texts": ("PNG", png_chunk(b"tEXt", b"a\0b") * 60_000),
    "unknown chunks": ("PNG", png_chunk(b"prVt", b"") * 60_000),
}


@pytest.mark.parametrize("kind", ENDLESS)
def test_a_photo_in_endless_pieces_is_refused_before_they_cost_minutes(kind: str) -> None:
    assert refusal(with_pieces(*ENDLESS[kind])) == "unreadable_image"


PROFILE = png_chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(2**20 - 1)))
ODD_CHUNKS = {
    "colour profiles": PROFILE * 100,
    "texts that inflate": png_chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(2**20 - 1))) * 100,
    "one text that inflates": png_chunk(b"iTXt", b"a\0\1\0\0\0" + zlib.compress(bytes(2**26))),
    "a colour profile that inflates": png_chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(2**26))),
    "a profile that is none": png_chunk(b"iCCP", b"nonsense"),
    "an empty gamma": png_chunk(b"gAMA", b""),
    "a short pixel size": png_chunk(b"pHYs", b"\0\0"),
    "an animation without frames": png_chunk(b"acTL", bytes(3)),
    "a text whose checksum is wrong": png_chunk(b"tEXt", b"a\0b")[:-1] + b"?",
    "Exif whose checksum is wrong": png_chunk(b"eXIf", exif(6)[6:])[:-1] + b"?",
}


@pytest.mark.parametrize("kind", ODD_CHUNKS)
def test_a_png_with_odd_chunks_beside_its_picture_is_read_without_them(kind: str) -> None:
    plain = GOOD["PNG"](quadrants())
    assert (read(plain[:33] + ODD_CHUNKS[kind] + plain[33:]) == read(plain)).all()


def test_what_follows_the_end_of_a_png_is_not_looked_at() -> None:
    plain = GOOD["PNG"](quadrants())
    assert (read(plain + bytes(900_000)) == read(plain)).all()


def test_a_png_whose_header_has_a_wrong_checksum_is_damaged() -> None:
    plain = GOOD["PNG"](quadrants())
    assert refusal(plain[:32] + bytes([plain[32] ^ 1]) + plain[33:]) == "unreadable_image"


MANY_SCANS = b"\xff\xda" * 101
# How often bytes look like the beginning of a scan, where they are none.
FALSE_SCANS = {
    "a motion photo's video behind the picture": lambda photo: photo + b"ftypmp42" + MANY_SCANS,
    "a colour profile": lambda photo: photo[:2] + segments(0xE2, b"ICC_PROFILE\0\1\1" + MANY_SCANS) + photo[2:],
    "a comment": lambda photo: photo[:2] + segments(0xFE, MANY_SCANS) + photo[2:],
    "an application's own data": lambda photo: photo[:2] + segments(0xEB, MANY_SCANS * 100) + photo[2:],
    "Exif in the picture behind the picture": lambda photo: photo + b"Exif\0\0" * 65,
}


@pytest.mark.parametrize("form", ["JPEG", "progressive JPEG"])
@pytest.mark.parametrize("kind", FALSE_SCANS)
def test_bytes_that_only_look_like_scans_do_not_count(kind: str, form: str) -> None:
    plain = GOOD[form](quadrants())
    assert (read(FALSE_SCANS[kind](plain)) == read(plain)).all()


@pytest.mark.parametrize("form", ["JPEG", "progressive JPEG"])
@pytest.mark.parametrize("longest_side", [math.inf, 400])
def test_a_jpeg_that_lacks_only_its_end_is_read(form: str, longest_side: float) -> None:
    whole = GOOD[form](quadrants(800, 600))
    for data in (whole[:-1], whole[:-2]):
        cut, uncut = (
            decode(one, max_bytes=2**20, max_pixels=10**6, longest_side=longest_side).pixels for one in (data, whole)
        )
        assert (cut == uncut).all()


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9, 0.99])
def test_a_jpeg_that_lacks_more_than_its_end_is_damaged(share: float) -> None:
    detailed = encoded(np.random.default_rng(0).integers(0, 256, (300, 400, 3), np.uint8), "JPEG")
    assert refusal(detailed[: int(share * len(detailed))]) == "unreadable_image"
    assert refusal(detailed[:-12]) == "unreadable_image"


@pytest.mark.parametrize(
    "brands", [b"avif\0\0\0\0mif1miaf", b"avis\0\0\0\0avif", b"mif1\0\0\0\0mif1avifmiaf", b"msf1\0\0\0\0avis"]
)
def test_an_avif_is_a_foreign_format_whatever_its_first_brand(brands: bytes) -> None:
    box = (8 + len(brands)).to_bytes(4, "big") + b"ftyp" + brands
    assert refusal(box + bytes(500)) == "unsupported_format"


@pytest.mark.parametrize(
    ("form", "pieces"),
    [
        ("JPEG", segments(0xE2, *(b"ICC_PROFILE\0" + bytes([number, 50]) + bytes(900) for number in range(1, 51)))),
        ("JPEG", segments(0xE1, b"Exif\0\0II*\0", *[b"http://ns.adobe.com/xap/1.0/\0" + bytes(60_000)] * 15)),
        ("JPEG", segments(0xEB, *[bytes(5000)] * 120)),
        ("PNG", png_chunk(b"tEXt", b"a\0b") * 500),
        ("PNG", png_chunk(b"eXIf", b"MM\0*\0\0\0\x08" + bytes(500_000))),
    ],
    ids=["a profile in 50", "15 of XMP", "120 of an application's own", "500 texts", "half a megabyte of Exif"],
)
def test_a_photo_in_as_many_pieces_as_cameras_and_editors_make_is_read(form: str, pieces: bytes) -> None:
    assert_shows_quadrants(read(with_pieces(form, pieces)), LOSSY)


def test_a_png_whose_pixels_come_in_thousands_of_chunks_is_read() -> None:
    plain = encoded(np.random.default_rng(0).integers(0, 256, (300, 400, 3), np.uint8), "PNG")
    start = plain.index(b"IDAT") - 4
    length = int.from_bytes(plain[start : start + 4], "big")
    pixels = plain[start + 8 : start + 8 + length]
    chunks = b"".join(png_chunk(b"IDAT", pixels[at : at + 64]) for at in range(0, length, 64))
    assert (read(plain[:start] + chunks + plain[start + 12 + length :]) == read(plain)).all()


# --- a reduced copy, where the photo is larger than it need be ---


@pytest.mark.parametrize("form", ["JPEG", "progressive JPEG", "PNG", "WebP"])
@pytest.mark.parametrize(("longest_side", "by"), [(1600, 1), (801, 1), (800, 2), (401, 2), (400, 4), (200, 8), (10, 8)])
def test_a_large_photo_is_reduced_as_far_as_its_longest_side_allows(form: str, longest_side: int, by: int) -> None:
    data = GOOD[form](quadrants(1600, 1200))
    photo = decode(data, max_bytes=2**22, max_pixels=10**7, longest_side=longest_side)
    assert (photo.reduced_by, photo.pixels.shape) == (by, (1600 // by, 1200 // by, 3))
    assert_shows_quadrants(photo.pixels, LOSSY)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_reduced_copy_is_turned_upright_once(orientation: int) -> None:
    undo = {
        1: lambda rgb: rgb,
        2: np.fliplr,
        3: lambda rgb: np.rot90(rgb, 2),
        4: np.flipud,
        5: lambda rgb: np.transpose(rgb, (1, 0, 2)),
        6: lambda rgb: np.rot90(rgb, 1),
        7: lambda rgb: np.rot90(np.transpose(rgb, (1, 0, 2)), 2),
        8: lambda rgb: np.rot90(rgb, -1),
    }
    lying = np.ascontiguousarray(undo[orientation](quadrants(1600, 1200)))
    data = encoded(lying, "JPEG", quality=95, exif=exif(orientation))
    photo = decode(data, max_bytes=2**22, max_pixels=10**7, longest_side=400)
    assert (photo.reduced_by, photo.pixels.shape) == (4, (400, 300, 3))
    assert_shows_quadrants(photo.pixels, LOSSY)


def test_a_photo_of_an_odd_size_is_reduced_in_both_directions_alike() -> None:
    photo = decode(encoded(quadrants(1601, 1203), "JPEG"), max_bytes=2**22, max_pixels=10**7, longest_side=400)
    assert photo.reduced_by == 4
    assert photo.pixels.shape == (401, 301, 3)


def test_a_large_jpeg_that_breaks_off_is_unreadable_though_it_is_reduced() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (1600, 1200, 3), np.uint8)
    data = encoded(noise, "JPEG")
    with pytest.raises(FaceError, match="unreadable_image"):
        decode(data[: len(data) // 2], max_bytes=2**24, max_pixels=10**7, longest_side=200)


def test_the_limit_of_pixels_is_the_files_own_and_not_the_copys() -> None:
    with pytest.raises(FaceError, match="image_too_large"):
        decode(encoded(quadrants(1600, 1200), "JPEG"), max_bytes=2**22, max_pixels=10**6, longest_side=100)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "L", "P", "RGB with a see-through colour", "I;16"])
def test_reducing_before_or_after_the_rest_gives_the_same_picture(mode: str) -> None:
    rgba = np.dstack([np.repeat(np.repeat(quadrants(40, 30), 20, 0), 20, 1), np.full((800, 600), 255, np.uint8)])
    rgba[100:300, 100:300, 3] = 60
    picture = Image.fromarray(rgba)
    if mode == "P":
        data = encoded(picture.quantize(32), "PNG")
    elif mode == "RGB with a see-through colour":
        data = encoded(picture.convert("RGB"), "PNG", transparency=RED)
    elif mode == "I;16":
        data = encoded(Image.fromarray(rgba[..., 0].astype(np.uint16) * 257), "PNG")
    else:
        data = encoded(picture.convert(mode), "PNG")
    whole = Image.fromarray(read(data)).reduce(4)
    reduced = decode(data, max_bytes=2**20, max_pixels=10**6, longest_side=200).pixels
    assert np.abs(np.asarray(whole).astype(int) - reduced).max() <= 1


IPHONE = heic.ASTRONAUT


def test_a_photo_in_the_iphones_own_format_is_read_like_any_other() -> None:
    whole = packaged_photo("skimage", "data", "astronaut.png")[:400, 60:460]
    found = decode(IPHONE, max_bytes=2**20, max_pixels=1_000_000)
    assert (found.pixels.shape, found.size, found.reduced_by) == ((400, 400, 3), (400, 400), 1)
    assert np.abs(found.pixels.astype(int) - whole.astype(int)).mean() < 6
    assert decode(IPHONE, max_bytes=2**20, max_pixels=1_000_000, longest_side=200).pixels.shape == (200, 200, 3)


def test_an_iphones_photo_of_too_many_pixels_is_refused_by_its_header() -> None:
    assert refusal(IPHONE, max_pixels=400 * 400 - 1) == "image_too_large"


@pytest.mark.parametrize("length", [16, 40, 400, len(IPHONE) // 2, len(IPHONE) - 1])
def test_an_iphones_photo_that_was_cut_off_is_damaged_and_no_foreign_format(length: int) -> None:
    assert refusal(IPHONE[:length]) == "unreadable_image"


CROP = heic.box(b"clap", struct.pack(">8I", 900, 1, 900, 1, 0, 1, 0, 1))


@pytest.mark.parametrize(
    "lie",
    [
        heic.heic([(b"hvc1", [(0, len(heic.PIXELS))], [1, 2])], side=64),
        heic.heic([(b"hvc1", [(0, len(heic.PIXELS))], [1, 2])], side=900),
        heic.heic([(b"hvc1", [(0, len(heic.PIXELS))], [1, 2, 3])], further=CROP),
    ],
    ids=["fewer", "more", "more by its crop"],
)
def test_a_heic_of_other_pixels_than_its_header_says_is_unreadable(lie: bytes) -> None:
    assert read(heic.heic([(b"hvc1", [(0, len(heic.PIXELS))], [1, 2])])).shape == (400, 400, 3)
    assert refusal(lie) == "unreadable_image"


def test_flipped_bits_in_an_iphones_photo_are_read_or_refused_with_a_code() -> None:
    generator = random.Random(5)
    for _ in range(60):
        data = bytearray(IPHONE)
        for _ in range(3):
            data[generator.randrange(len(data))] ^= 1 << generator.randrange(8)
        try:
            read(bytes(data))
        except FaceError as error:
            assert error.code in ("unreadable_image", "unsupported_format", "image_too_large")  # noqa: PT017
