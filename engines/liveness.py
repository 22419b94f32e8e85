"""Tells a person before the camera from a picture of one, by InsightFace's add-on."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Protocol

import cv2

from engines.base import Face
from engines.model_files import ModelUnavailable
from photos.pixels import Pixels

logger = logging.getLogger(__name__)


class Liveness(Protocol):
    """Tells a live face from a picture of one."""

    def score(self, image: Pixels, face: Face) -> float | None:
        """Return the probability (0...1) that a face in uint8[h, w, 3] BGR is live; None if it cannot be judged.

        Thread-safe.
        """


class AddOnLiveness:
    """InsightFace's RGB liveness model: one photo, an 80x80 aligned crop, one probability.

    Args:
        models_dir: the model lies in its addons/liveness.onnx; fetched there from InsightFace's releases if it is
            missing, and checked against the SHA-256 that the library names, before it is loaded.

    Raises:
        ModelUnavailable: the file cannot be had, is another one, or is no such model.
    """

    def __init__(self, models_dir: Path) -> None:
        # Other runs do not pay for these.
        from insightface.addons.catalog import ADDON_CATALOG, ensure_addon  # noqa: PLC0415
        from insightface.addons.liveness import Liveness as AddOn  # noqa: PLC0415
        from requests.exceptions import RequestException  # noqa: PLC0415

        from engines.onnx_files import ORT_ERRORS  # noqa: PLC0415

        self._failures: tuple[type[Exception], ...] = (OSError, ValueError, RuntimeError, cv2.error, *ORT_ERRORS)
        artifact = ADDON_CATALOG["liveness"]
        try:
            path = ensure_addon("liveness", models_dir)
            self._model = AddOn(path, providers=["CPUExecutionProvider"])
        except RequestException as error:
            raise ModelUnavailable(
                f"LIVENESS needs InsightFace's model, which could not be fetched ({type(error).__name__}). Put "
                f"{artifact.url} (SHA-256 {artifact.sha256}) into {models_dir / 'addons' / artifact.filename}. "
                "It comes under InsightFace's terms for models: non-commercial research, unless you have a licence."
            ) from error
        except self._failures as error:
            raise ModelUnavailable(f"LIVENESS: the model cannot be used: {error}") from error
        logger.info("Liveness: InsightFace's add-on. Its terms: non-commercial research, unless you have a licence.")

    def score(self, image: Pixels, face: Face) -> float | None:
        try:
            found = self._model.predict(image, face.landmarks)
        except self._failures as error:
            logger.warning("Liveness could not be judged: %s", type(error).__name__)
            return None
        score = found.get("live_score")
        return None if score is None or not math.isfinite(score) else float(score)
