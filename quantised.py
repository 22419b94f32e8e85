"""Owns the 8-bit copy of a recogniser: making it on this machine, checking it against the original, and keeping it.

The copy is onnxruntime's static quantisation (weights and activations in 8 bits, one scale a channel). What it needs to
know of activations it learns from faces in photos that installed packages carry, so that nothing is fetched and no
outside file is trusted: `source` is verified by whoever calls. Measured on 165 photos of 30 people with a MobileFaceNet
recogniser: the copy's embeddings have cosines of 0.994 (at worst 0.987) to the original's, in half its time.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

import weights
from weights import ModelUnavailable

log = logging.getLogger(__name__)

Pixels = npt.NDArray[np.uint8]
Embed = Callable[[Any, Sequence[Pixels]], npt.NDArray[np.float32]]

# package -> a photo in it: one face, and six.
_PHOTOS = (("skimage", "data/astronaut.png"), ("insightface", "data/images/t1.jpg"))
VARIATIONS = 12
# Held-out faces of the packages' photos scored 0.990 on average and 0.980 at worst with a MobileFaceNet, 0.992 and
# 0.982 with a ResNet-100; an error in the conversion, or a recogniser that does not bear 8 bits, falls far below.
LEAST_MEAN_COSINE = 0.98
LEAST_COSINE = 0.95


def photos() -> list[Pixels]:
    """Return the photos of faces that installed packages carry, uint8[h, w, 3] BGR."""
    found = []
    for package, path in _PHOTOS:
        spec = importlib.util.find_spec(package)
        if spec is not None and spec.origin is not None and (Path(spec.origin).parent / path).is_file():
            data = np.frombuffer((Path(spec.origin).parent / path).read_bytes(), np.uint8)
            found.append(np.asarray(cv2.imdecode(data, cv2.IMREAD_COLOR), np.uint8))
    return found


def int8_copy(source: Path, digest: str, folder: Path, crops: Callable[[], list[Pixels]], embed: Embed) -> Path:
    """Return the 8-bit copy of a recogniser, made unless `folder` holds it as it was made.

    Args:
        source: the recogniser's verified file.
        digest: its SHA-256.
        folder: where copies are kept.
        crops: gives aligned faces, uint8[side, side, 3] BGR, to calibrate and to check with.
        embed: runs a session on crops: float32[n, d]; None as the session means the original.

    Raises:
        ModelUnavailable: it cannot be made, or differs too much from the original.
    """
    import onnxruntime  # noqa: PLC0415 - slow to import

    copy = folder / f"{digest[:12]}-onnxruntime-{onnxruntime.__version__}.int8.onnx"
    about = copy.with_suffix(".json")
    try:
        if _is_as_made(copy, about, digest):
            return copy
        folder.mkdir(parents=True, exist_ok=True)
        log.info("Making the 8-bit copy of %s; this is done once", source.name)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            made = Path(scratch) / "int8.onnx"
            held_out = _convert(source, made, crops(), embed)
            cosines = _compared(made, held_out, embed)
            facts = {
                "source_sha256": digest,
                "sha256": weights.digest(made),
                "mean_cosine": round(float(cosines.mean()), 4),
                "least_cosine": round(float(cosines.min()), 4),
            }
            log.info("8-bit and original embeddings of %d held-out faces: %s", len(cosines), facts)
            if not (cosines.mean() >= LEAST_MEAN_COSINE and cosines.min() >= LEAST_COSINE):
                raise ModelUnavailable(
                    f"The 8-bit copy of {source.name} differs too much from it (cosines {facts['mean_cosine']} on "
                    f"average and {facts['least_cosine']} at worst, where {LEAST_MEAN_COSINE} and {LEAST_COSINE} are "
                    "needed): run with EMBEDDING_PRECISION=fp32."
                )
            (Path(scratch) / "about.json").write_text(json.dumps(facts))
            # The description first: a copy without its own is made again.
            (Path(scratch) / "about.json").replace(about)
            made.replace(copy)
    except OSError as error:
        raise ModelUnavailable(
            f"The 8-bit copy of {source.name} cannot be kept in {folder} ({error.strerror}): make that folder "
            "writable, or run with EMBEDDING_PRECISION=fp32."
        ) from error
    return copy


def _is_as_made(copy: Path, about: Path, digest: str) -> bool:
    if not (copy.is_file() and about.is_file()):
        return False
    try:
        facts = json.loads(about.read_text())
        sound = bool(facts["source_sha256"] == digest and facts["sha256"] == weights.digest(copy))
    except (ValueError, KeyError, TypeError):
        sound = False
    if not sound:
        log.warning("The 8-bit copy %s is damaged: it is made again", copy.name)
    return sound


def _convert(source: Path, made: Path, faces: list[Pixels], embed: Embed) -> list[Pixels]:
    """Write the copy, calibrated on every other face; return the faces that took no part."""
    from onnxruntime.quantization import (  # noqa: PLC0415 - only where a copy is made
        CalibrationDataReader,
        QuantFormat,
        QuantType,
        quantize_static,
    )
    from onnxruntime.quantization.shape_inference import quant_pre_process  # noqa: PLC0415

    if len(faces) < 2:
        raise ModelUnavailable(
            "The detector finds no faces in the photos that an 8-bit copy is calibrated with: run with "
            "EMBEDDING_PRECISION=fp32."
        )
    fed: list[dict[str, Any]] = []
    embed(_Feeds(fed), [variation for face in faces[::2] for variation in _variations(face)])

    class Reader(CalibrationDataReader):  # type: ignore[misc]  # onnxruntime carries no types
        def __init__(self) -> None:
            self._feeds = iter(fed)

        def get_next(self) -> dict[str, Any] | None:
            return next(self._feeds, None)

    prepared = made.with_name("prepared.onnx")
    quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
    quantize_static(
        str(prepared),
        str(made),
        Reader(),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        # Unsigned activations with signed weights are what CPUs have instructions for: both signed takes twice as long.
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )
    return [variation for face in faces[1::2] for variation in _variations(face)]


class _Feeds:
    """Stands in for a session, and keeps what it would be run on."""

    def __init__(self, fed: list[dict[str, Any]]) -> None:
        self._fed = fed

    def run(self, _names: object, feeds: dict[str, Any]) -> list[npt.NDArray[np.float32]]:
        self._fed.append(feeds)
        return [np.zeros((len(next(iter(feeds.values()))), 1), np.float32)]


def _compared(made: Path, faces: list[Pixels], embed: Embed) -> npt.NDArray[np.float64]:
    """Return the cosines between the copy's and the original's embeddings."""
    import onnxruntime  # noqa: PLC0415

    copy = onnxruntime.InferenceSession(str(made), providers=["CPUExecutionProvider"])
    ours, theirs = (np.asarray(embed(session, faces), np.float64) for session in (copy, None))
    return np.asarray(np.vecdot(ours, theirs) / np.linalg.norm(ours, axis=1) / np.linalg.norm(theirs, axis=1))


def _variations(face: Pixels) -> Iterator[Pixels]:
    """Yield copies of a face as other photos might show it: mirrored, shifted, lighter and darker, blurred."""
    rng = np.random.default_rng(0)
    side = face.shape[0]
    for number in range(VARIATIONS):
        varied = np.asarray(np.ascontiguousarray(face[:, ::-1] if number % 2 else face), np.float32)
        turn = cv2.getRotationMatrix2D((side / 2, side / 2), rng.uniform(-8, 8), rng.uniform(0.92, 1.1))
        turn[:, 2] += rng.uniform(-0.03, 0.03, 2) * side
        varied = np.asarray(cv2.warpAffine(varied, turn, (side, side), borderMode=cv2.BORDER_REPLICATE), np.float32)
        if number % 4 == 3:
            varied = np.asarray(cv2.GaussianBlur(varied, (0, 0), 1.0), np.float32)
        yield np.clip(varied * rng.uniform(0.6, 1.4) + rng.uniform(-30, 30), 0, 255).astype(np.uint8)
