"""Compares reading a large photo at the scale that it needs with reading it whole: time, memory, and what is measured.

    python benchmarks/decoding.py PACK PHOTO [PHOTO ...] [--megapixels 12]

Each photo is enlarged to a JPEG of so many megapixels first. Both ways take the photos in turn, in one run.
"""

from __future__ import annotations

import argparse
import io
import math
import statistics
import sys
import time
import warnings
from pathlib import Path

import numpy as np
from PIL import Image

PROJECT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(PROJECT))

from engines.base import ENOUGH_SIDE, Template
from engines.face_attributes import FaceAttributesModel
from engines.insightface_engine import InsightFaceEngine
from engines.model_slots import ModelSlots
from errors import FaceError
from face_checks import check_photo
from photos.decode import decode
from pipeline import Pipeline, Trace
from settings import Settings

ROUNDS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("pack", type=Path)
    parser.add_argument("photos", nargs="+", type=Path)
    parser.add_argument("--megapixels", type=float, default=12)
    parsed = parser.parse_args()
    limits = Settings(max_file_bytes=2**26, max_image_pixels=10**8)
    pipeline = Pipeline(
        limits,
        InsightFaceEngine(parsed.pack, threads=0),
        FaceAttributesModel(PROJECT / "models"),
        ModelSlots(1, math.inf),
        decode,
    )

    def read(data: bytes, longest_side: float) -> tuple[float, float, Template | None, dict[str, float | None]]:
        """Seconds, peak MiB of arrays, template and figures of one photo; no template when it is refused."""
        begun = time.perf_counter()
        photo = pipeline._decode(data, longest_side)
        seconds = time.perf_counter() - begun
        try:
            # The second decoding of a small face is timed too.
            faces = pipeline.engine.detect(photo.pixels)
            begun = time.perf_counter()
            photo, faces = pipeline._enlarge(data, photo, faces, Trace(), pipeline.settings)
            seconds += time.perf_counter() - begun
            found = check_photo(photo.pixels, faces, limits, pipeline.reader, photo.reduced_by)
        except FaceError:
            return seconds, photo.pixels.nbytes / 2**20, None, {}
        template = pipeline.engine.embed(photo.pixels, found.face)
        return seconds, photo.pixels.nbytes / 2**20, template, {check.code: check.measured for check in found.checks}

    taken: list[float] = []
    sizes: list[float] = []
    cosines: list[float] = []
    moved: dict[str, list[float]] = {}
    decided = 0
    for path in parsed.photos:
        picture = Image.open(path).convert("RGB")
        times = math.sqrt(parsed.megapixels * 1e6 / (picture.width * picture.height))
        file = io.BytesIO()
        picture.resize((round(picture.width * times), round(picture.height * times)), Image.Resampling.BICUBIC).save(
            file, "JPEG", quality=90
        )
        pairs = [(read(file.getvalue(), ENOUGH_SIDE), read(file.getvalue(), math.inf)) for _ in range(ROUNDS)]
        ours, whole = pairs[0]
        taken.append(statistics.median(one[0] / other[0] for one, other in pairs))
        sizes.append(ours[1] / whole[1])
        decided += (ours[2] is None) != (whole[2] is None)
        if ours[2] is not None and whole[2] is not None:
            cosines.append(float(np.vecdot(ours[2], whole[2])))
            for code, value in ours[3].items():
                other = whole[3].get(code)
                if value is not None and other is not None:
                    moved.setdefault(code, []).append(abs(value - other))
    share, size = statistics.median(taken), statistics.median(sizes)
    below = sum(one < 0.995 for one in cosines)
    print(
        f"{len(taken)} photos of {parsed.megapixels:g} megapixels: decoding takes {share:.2f} of the time, {size:.2f} "
        f"of the memory; {decided} decided otherwise; similarity {statistics.median(cosines):.4f}, at worst "
        f"{min(cosines):.4f}, {below} below 0.995"
    )
    print("largest change of a measure: " + ", ".join(f"{code} {max(all_):.3g}" for code, all_ in moved.items()))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()
