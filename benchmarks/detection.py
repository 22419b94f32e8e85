"""Compares the order of detection's passes with the full search: what it costs, and which faces it misses.

    python benchmarks/detection.py PACK PHOTO [PHOTO ...]

Each photo is searched both ways in turn, in one run. Selfies, photos in which the full search finds one large face and
nothing else, are also compared with a single look at 640, without the looks at a tilted or unsure face that follow both
ways. Then a second face, cut out of another photo, is put beside each large one: of those that the full search finds,
how many does the quick look end without?
"""

from __future__ import annotations

import sys
import time
import warnings
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt

PROJECT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(PROJECT))

from engines.base import Face
from engines.insightface_engine import InsightFaceEngine, _input_size
from photos.pixels import Pixels
from photos.resampling import to_side

Box = npt.NDArray[np.float32]
WIDTHS = (20, 24, 32, 40, 48, 64, 96)


class FullSearch(InsightFaceEngine):
    """The same engine without its quick look."""

    def _is_one_large_face(self, seen: list[Face], image: Pixels) -> bool:
        return False


def overlap(one: Box, other: Box) -> float:
    """Intersection over union of two boxes."""
    common = float(np.clip(np.minimum(one[2:], other[2:]) - np.maximum(one[:2], other[:2]), 0, None).prod())
    return common / (float(np.prod(one[2:] - one[:2])) + float(np.prod(other[2:] - other[:2])) - common)


def misses(box: Box, faces: list[Face]) -> bool:
    return all(overlap(box, face.box) < 0.3 for face in faces)


def with_second_face(photo: Pixels, large: Box, second: Pixels, width: int) -> tuple[Pixels, Box] | None:
    """Put a face into the wider margin beside the large one; None where there is no room."""
    height = round(width * second.shape[0] / second.shape[1])
    margins = (float(large[0]), photo.shape[1] - float(large[2]))
    if max(margins) < width + 4 or photo.shape[0] < height:
        return None
    left = round((margins[0] - width) / 2 if margins[0] >= margins[1] else float(large[2]) + (margins[1] - width) / 2)
    top = int(np.clip(large[1], 0, photo.shape[0] - height))
    both = photo.copy()
    both[top : top + height, left : left + width] = cv2.resize(second, (width, height), interpolation=cv2.INTER_AREA)
    return both, np.array([left, top, left + width, top + height], np.float32)


def main(pack: str, paths: list[str]) -> None:
    quick, full = InsightFaceEngine(Path(pack), threads=1), FullSearch(Path(pack), threads=1)
    seconds = {"full": 0.0, "quick": 0.0}
    missed = 0
    # Of each selfie, by whether it ends with the quick look: CPU seconds of the search, and of a look at 640.
    selfies: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
    alone = []
    for path in paths:
        photo = np.asarray(cv2.imread(path, cv2.IMREAD_COLOR), np.uint8)
        found = {}
        for name, engine in (("full", full), ("quick", quick)):
            begun = time.process_time()
            found[name] = engine.detect(photo)
            seconds[name] += time.process_time() - begun
        missed += sum(misses(face.box, found["quick"]) for face in found["full"])
        if len(found["full"]) == 1:
            small = to_side(photo, quick.FULL_LOOK_SIDE, enlarging=1.0)[1]
            begun = time.process_time()
            seen = quick._search(small)
            searched = time.process_time()
            quick._look(small, _input_size(small, quick.FULL_LOOK_SIDE))
            if full.LARGE_FACE_SHARE * max(photo.shape[:2]) <= np.ptp(found["full"][0].box[::2]):
                times = searched - begun, time.process_time() - searched
                selfies[quick._is_one_large_face(seen, small)].append(times)
            scale = 640 / max(photo.shape[:2])
            large = np.asarray(cv2.resize(photo, None, fx=scale, fy=scale), np.uint8)
            alone.append((large, found["full"][0].enlarged(scale).box))
    print(
        f"{len(paths)} photos: {seconds['quick'] / seconds['full']:.2f} of the full search's CPU seconds; "
        f"{missed} faces missed"
    )
    for title, chosen in (("", [*selfies[True], *selfies[False]]), (" that end with the quick look", selfies[True])):
        if chosen:
            searches, looks = np.sum(chosen, axis=0)
            print(f"{len(chosen)} selfies{title}: {searches / looks:.2f} of a look at 640")
    tried: Counter[int] = Counter()
    lost: Counter[int] = Counter()
    for index, (photo, box) in enumerate(alone):
        other, cut = alone[index - 1]
        x0, y0, x1, y1 = np.clip(cut, 0, None).astype(int)
        if min(x1 - x0, y1 - y0) < 60:
            continue
        for width in WIDTHS:
            pasted = with_second_face(photo, box, other[y0:y1, x0:x1], width)
            if pasted is not None and not misses(pasted[1], full.detect(pasted[0])):
                tried[width] += 1
                lost[width] += misses(pasted[1], quick.detect(pasted[0]))
    print("A second face pasted beside the first, by its share of the picture's width:")
    for width in WIDTHS:
        if tried[width]:
            print(f"  {width / 640:4.0%}: {lost[width]} of {tried[width]} that the full search finds are lost")


if __name__ == "__main__":
    warnings.simplefilter("ignore", FutureWarning)
    if len(sys.argv) < 3:
        raise SystemExit(__doc__)
    main(sys.argv[1], sys.argv[2:])
