"""Tells from an aligned crop what hides a face."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from engines.model_files import ModelUnavailable
from photos.pixels import Pixels


@dataclass(frozen=True)
class Covering:
    """How probable each covering of a face is (0...1).

    Attributes:
        mask: a mask over mouth and nose, or the mouth alone.
        sunglasses: lenses that hide the eyes.
        other: a hand, scarf, phone or anything else over eyes, nose or mouth.
        hidden: the most hidden of eyes, nose and mouth, whatever hides it.
    """

    mask: float
    sunglasses: float
    other: float
    hidden: float


class CoveringClassifier(Protocol):
    """What the gates ask about coverings."""

    def classify(self, aligned: Pixels) -> Covering:
        """Judge uint8[160, 160, 3] BGR, eyes 44 pixels apart. Thread-safe."""


class CoveringModel:
    """The classifier that ships in `models/covering.onnx` (trained by `training/`, described in its model card)."""

    def __init__(self, folder: Path) -> None:
        """Load and warm it, on one thread: it takes about a millisecond.

        Args:
            folder: holds covering.onnx.

        Raises:
            ModelUnavailable: the file is missing or damaged.
        """
        import onnxruntime  # noqa: PLC0415 - slow to import, and not needed to parse the command line
        from onnxruntime.capi.onnxruntime_pybind11_state import (  # noqa: PLC0415
            Fail,
            InvalidArgument,
            InvalidGraph,
            InvalidProtobuf,
            NoSuchFile,
        )

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        path = folder / "covering.onnx"
        try:
            self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
            self._input = self._session.get_inputs()[0].name
            self.classify(np.full((160, 160, 3), 127, np.uint8))
        except (NoSuchFile, InvalidProtobuf, InvalidArgument, InvalidGraph, Fail, ValueError) as error:
            raise ModelUnavailable(
                f"The covering classifier {path} is missing or damaged. It is part of this project: restore it "
                "(git checkout models/covering.onnx)."
            ) from error

    def classify(self, aligned: Pixels) -> Covering:
        """Judge uint8[160, 160, 3] BGR, eyes 44 pixels apart. Thread-safe."""
        (probabilities,) = self._session.run(None, {self._input: aligned[None]})
        mask, sunglasses, other, *regions = (float(one) for one in probabilities[0])
        return Covering(mask=mask, sunglasses=sunglasses, other=other, hidden=max(regions))
