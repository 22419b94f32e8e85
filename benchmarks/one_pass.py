"""Compares one pass through the models with the older flow, on the same pack and photos.

    python benchmarks/one_pass.py PACK PHOTO [PHOTO ...]

The older flow runs every model of the pack on every face before any check, and twice for a sign-up (once for the
checks, once for the embedding). Both take the photos in turn, in one run; CPU seconds of the whole process count, so
that neither the machine's other load nor the number of threads does.
"""

from __future__ import annotations

import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np

PROJECT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(PROJECT))

from engines.face_attributes import FaceAttributesModel
from engines.insightface_engine import InsightFaceEngine
from errors import FaceError
from face_checks import check_photo
from photos.pixels import Pixels
from settings import Settings

ROUNDS = 3


def cpu_seconds(work: Callable[[Pixels], object], photo: Pixels) -> float:
    """CPU seconds of one call."""
    begun = time.process_time()
    work(photo)
    return time.process_time() - begun


def main(pack: str, paths: list[str]) -> None:
    """Print the ratio of CPU seconds, ours to the older flow's, for accepted and for refused photos."""
    from insightface.app import FaceAnalysis

    older = FaceAnalysis(name=str(Path(pack).resolve()), providers=["CPUExecutionProvider"])
    older.prepare(0)
    engine, reader, limits = (
        InsightFaceEngine(Path(pack), threads=0),
        FaceAttributesModel(PROJECT / "models"),
        Settings(),
    )

    def twice(photo: Pixels) -> None:
        older.get(photo)
        older.get(photo)

    def once(photo: Pixels) -> bool:
        try:
            face = check_photo(photo, engine.detect(photo), limits, reader).face
        except FaceError:
            return False
        engine.embed(photo, face)
        return True

    ratios: dict[bool, list[float]] = {True: [], False: []}
    for path in paths:
        photo = np.asarray(cv2.imread(path, cv2.IMREAD_COLOR), np.uint8)
        accepted = once(photo)
        twice(photo)
        pairs = [(cpu_seconds(once, photo), cpu_seconds(twice, photo)) for _ in range(ROUNDS)]
        ratios[accepted].append(statistics.median(ours / theirs for ours, theirs in pairs))
    for accepted, found in ratios.items():
        if found:
            word = "accepted" if accepted else "refused"
            print(f"{word}: {len(found)} photos, CPU seconds {statistics.median(found):.2f} of the older flow's")


if __name__ == "__main__":
    warnings.simplefilter("ignore", FutureWarning)
    if len(sys.argv) < 3:
        raise SystemExit(__doc__)
    main(sys.argv[1], sys.argv[2:])
