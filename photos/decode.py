"""Decodes a photo: judges an upload's bytes by their content, and turns them into upright pixels."""

from __future__ import annotations

import io
import math
import struct
import warnings
from typing import TYPE_CHECKING, NamedTuple

import pi_heif
from PIL import ExifTags, Image, UnidentifiedImageError

from errors import FaceError, too_large
from photos.file_structure import (
    JPEG_SIGNATURE,
    PNG_SIGNATURE,
    JpegStructure,
    is_heic,
    jpeg_structure,
    png_essentials,
)

if TYPE_CHECKING:
    from photos.pixels import Photo

# Judged by content. Every decoder that is reachable is attack surface, hence the short list: what phones and
# browsers send. The JPEG decoder also takes MPO, which some phones send: a JPEG that carries a second picture.
FORMATS = ("JPEG", "PNG", "WEBP", "HEIF")
pi_heif.register_heif_opener(thumbnails=False, depth_images=False, aux_images=False)
# A JPEG cannot be longer. A PNG can: 40 megapixels in one column, which models then enlarge to a square.
MAX_SIDE = 65_535

# Every scan of a progressive JPEG repaints the whole picture, and a few bytes make one: encoders write about ten. So
# many pixels, over all scans, take 1.2 s at worst (100 scans of 12 megapixels, 30 of 40); 100 scans of 40 took 4 s.
MAX_SCANNED_PIXELS = 1_200_000_000
# Of smaller pictures no more scans than of one of this size: there is a price for each.
SCAN_PIXELS = 12_000_000
# The library reads a file's header piece by piece in Python, and joins the pieces of Exif anew with each one: 8 MiB of
# pieces of 300 bytes kept it busy for minutes. Photos have a handful of pieces; a PNG's pixels take three reads for
# every few KiB.
MAX_READS = 50_000
MAX_EXIF_SEGMENTS = 64

_JPEG_END = b"\xff\xd9"
# Neither a marker nor zeros, with which the decoder fills what is missing.
_JPEG_FILLER = b"\x5a\xa5" * 512

_DECODER_ERRORS = (
    OSError,
    SyntaxError,  # the decoder's own word for a broken PNG chunk
    AssertionError,  # ... and for a palette that is missing
    struct.error,
    ValueError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    OverflowError,
    ZeroDivisionError,
    MemoryError,
    RuntimeError,  # HEIC's word for what its own limits forbid
    Image.DecompressionBombError,
)


class Decoded(NamedTuple):
    """One decoded photo, without NumPy: a decoding process does not load it.

    Attributes:
        bgr: height * width * 3 bytes, the channels blue, green, red, row by row, upright.
        height, width: of these pixels.
        reduced_by: 1, 2, 4 or 8: the file's own picture is so many times as wide and as high.
        size: width and height of the file's own picture, upright.
    """

    bgr: bytes
    height: int
    width: int
    reduced_by: int
    size: tuple[int, int]


def decode(data: bytes, *, max_bytes: int, max_pixels: int, longest_side: float = math.inf) -> Photo:
    """Decode one photo, as `decode_bytes` does and with its errors."""
    from photos.pixels import photo_of  # noqa: PLC0415 - NumPy, which decoding processes do without

    return photo_of(*decode_bytes(data, max_bytes=max_bytes, max_pixels=max_pixels, longest_side=longest_side))


def decode_bytes(data: bytes, *, max_bytes: int, max_pixels: int, longest_side: float = math.inf) -> Decoded:
    """Decode one photo, upright, as the first frame of whatever it is.

    Args:
        data: the file's bytes; its name is never looked at.
        max_bytes: the largest file that is read.
        max_pixels: the most pixels (width x height by the header) that are decoded.
        longest_side: the photo is reduced to an eighth, a quarter or a half if its longest side keeps so many pixels.

    Returns:
        The photo's pixels, EXIF orientation applied, transparency laid over white, 16 bits scaled to 8.

    Raises:
        FaceError: `empty_file`, `file_too_large`, `unsupported_format`, `image_too_large`, `unreadable_image`.
    """
    if not data:
        raise FaceError("empty_file")
    if len(data) > max_bytes:
        raise too_large(max_bytes)
    data, jpeg = _looked_into(data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the decoder's remarks on odd metadata are no business of the log
        # The library refuses twice this many pixels before it makes a decoder, and WebP's takes its memory when made.
        Image.MAX_IMAGE_PIXELS = max_pixels
        try:
            image: Image.Image = Image.open(_Metered(data), formats=FORMATS)
        except UnidentifiedImageError as error:
            # A known signature with a broken header is damage, not a foreign format.
            raise FaceError("unreadable_image" if _has_known_signature(data) else "unsupported_format") from error
        except Image.DecompressionBombError as error:
            raise FaceError("image_too_large") from error
        except _DECODER_ERRORS as error:
            raise FaceError("unreadable_image") from error
        with image:
            width, height = image.size
            if max(width, height) > MAX_SIDE:
                raise FaceError("image_too_large", "side_limit", values={"pixels": MAX_SIDE})
            if width * height > max_pixels:
                raise FaceError(
                    "image_too_large",
                    "pixel_limit",
                    values={"width": width, "height": height, "megapixels": f"{max_pixels / 1e6:.3g}"},
                )
            if jpeg is not None and jpeg.scans * max(width * height, SCAN_PIXELS) > MAX_SCANNED_PIXELS:
                raise FaceError("unreadable_image")
            wanted = next(by for by in (8, 4, 2, 1) if by == 1 or max(width, height) >= by * longest_side)
            try:
                # A JPEG is decoded at the reduced scale, a third of the time and less; nothing happens to the others.
                image.draft(None, (max(1, width // wanted), max(1, height // wanted)))
                image.load()
                if jpeg is not None and not jpeg.ends:
                    _require_complete(data, image)
                if jpeg is None and image.size != (width, height):
                    raise ValueError("a HEIC of other pixels than its header says, by which they were judged")
                # At once where pixels can be averaged as they lie: what follows then works on the small copy.
                early = wanted > 1 and image.size == (width, height) and _has_means(image)
                rgb = _rgb(image.reduce(wanted) if early else image)
                if wanted > 1 and rgb.size == (width, height):
                    rgb = rgb.reduce(wanted)
                turn = _turn_of(image)
                upright = rgb if turn is None else rgb.transpose(turn)
                return Decoded(
                    upright.tobytes("raw", "BGR"),
                    upright.height,
                    upright.width,
                    reduced_by=round(max(width, height) / max(rgb.size)),
                    size=(height, width) if turn in _SIDEWAYS else (width, height),
                )
            except _DECODER_ERRORS as error:
                raise FaceError("unreadable_image") from error


def _looked_into(data: bytes) -> tuple[bytes, JpegStructure | None]:
    """Return the bytes for the decoder, and the structure of a JPEG; raises as `decode`."""
    try:
        if data.startswith(PNG_SIGNATURE):
            return png_essentials(data), None
        if data.startswith(JPEG_SIGNATURE):
            structure = jpeg_structure(data)
            if structure.exif_segments > MAX_EXIF_SEGMENTS:
                raise FaceError("unreadable_image")
            return (data if structure.ends else data.removesuffix(b"\xff") + _JPEG_END), structure
    except ValueError as error:
        raise FaceError("unreadable_image") from error
    if data[4:8] == b"ftyp" and not is_heic(data):
        raise FaceError("unsupported_format")
    return data, None


def _require_complete(data: bytes, picture: Image.Image) -> None:
    """Raise ValueError if a JPEG to which its end was added lacks more than that.

    The decoder fills missing data with what follows. So other bytes before the end change the picture of an incomplete
    file, and not of a complete one.
    """
    filled = data.removesuffix(_JPEG_END) + _JPEG_FILLER + _JPEG_END
    with Image.open(io.BytesIO(filled), formats=("JPEG",)) as other:
        other.draft(None, picture.size)
        if other.tobytes() != picture.tobytes():
            raise ValueError("the file is cut off")


class _Metered(io.BytesIO):
    """A file that breaks off after MAX_READS reads."""

    _reads = 0

    def read(self, size: int | None = -1) -> bytes:
        self._reads += 1
        if self._reads > MAX_READS:
            raise OSError("the file is in too many pieces")
        return super().read(size)


def _has_known_signature(data: bytes) -> bool:
    return (
        data.startswith((JPEG_SIGNATURE, PNG_SIGNATURE))
        or (data[:4] == b"RIFF" and data[8:12] == b"WEBP")
        or is_heic(data)
    )


# EXIF orientation -> what undoes it.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


_SIDEWAYS = [_TURNS[orientation] for orientation in (5, 6, 7, 8)]


def _turn_of(file: Image.Image) -> Image.Transpose | None:
    """What turns the file's picture upright, by its EXIF orientation."""
    # The library's own exif_transpose also writes all metadata anew, and fails where an unrelated tag is odd.
    try:
        orientation = file.getexif().get(ExifTags.Base.Orientation)
    except _DECODER_ERRORS:
        return None  # nonsense in the metadata is no reason to refuse good pixels: they are taken as they lie
    return _TURNS.get(orientation) if isinstance(orientation, int) else None


def _has_means(image: Image.Image) -> bool:
    """Whether pixels can be averaged as they lie: they are no places in a palette, and no colour stands for holes."""
    return image.mode in {"L", "LA", "RGB", "RGBA"} and "transparency" not in image.info


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        import numpy as np  # noqa: PLC0415 - few photos have 16 bits

        # The library clips 16-bit greys to 255 instead of scaling them.
        grey = np.asarray(image, dtype=np.float32) / np.float32(257)
        image = Image.fromarray(np.rint(np.clip(grey, 0, 255, out=grey), out=grey).astype(np.uint8))
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.new("RGBA", rgba.size, "white")
        image.alpha_composite(rgba)
    return image if image.mode == "RGB" else image.convert("RGB")
