"""Compares the 8-bit copy of a pack's recogniser with the original: time, similarity, and what becomes of matches.

    python benchmarks/precision.py PACK [DIR]

DIR holds a sub-folder of photos per person. Times are medians of single embeddings in turn, with one and two threads.
"""

from __future__ import annotations

import shutil
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import numpy.typing as npt

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import images
import quantised
from engine import Vector
from insightface_engine import InsightFaceEngine

ROUNDS = 15


def fnmr(templates: npt.NDArray[np.float32], owners: npt.NDArray[np.str_], fmr: float) -> str:
    """The false non-match rate where one in 1/fmr impostor pairs matches, with its 95 % interval (Wilson)."""
    cosines = templates @ templates.T
    same = owners[:, None] == owners[None, :]
    upper = np.triu(np.ones_like(same), 1)
    genuine, impostor = cosines[same & upper], cosines[~same & upper]
    missed, n = int((genuine < np.quantile(impostor, 1 - fmr)).sum()), len(genuine)
    share, z = missed / n, 1.96
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * np.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return f"{100 * share:.2f} % ({100 * (middle - half):.2f}-{100 * (middle + half):.2f}, {n} pairs)"


def main(pack: str, people: str | None) -> None:
    crops = []
    with tempfile.TemporaryDirectory() as scratch:
        shutil.copytree(pack, f"{scratch}/pack")
        for threads in (1, 2):
            whole, small = (
                InsightFaceEngine(Path(scratch, "pack"), threads=threads, precision=one) for one in ("fp32", "int8")
            )
            crops = [whole._aligned(photo, face) for photo in quantised.photos() for face in whole.detect(photo)]
            taken: dict[str, list[float]] = {"fp32": [], "int8": []}
            for _ in range(ROUNDS):
                for crop in crops:
                    for name, engine in (("fp32", whole), ("int8", small)):
                        begun = time.perf_counter()
                        engine._embedded(None, [crop])
                        taken[name].append(time.perf_counter() - begun)
            fp32, int8 = (1000 * statistics.median(taken[name]) for name in ("fp32", "int8"))
            print(f"{threads} threads: fp32 {fp32:.1f} ms, int8 {int8:.1f} ms, ratio {int8 / fp32:.2f}")
        if people is None:
            return
        owners: list[str] = []
        found: dict[str, list[Vector]] = {"fp32": [], "int8": []}
        for path in sorted(Path(people).glob("*/*")):
            photo = images.decode(path.read_bytes(), max_bytes=2**26, max_pixels=10**8).pixels
            faces = whole.detect(photo)
            if faces:
                owners.append(path.parent.name)
                found["fp32"].append(whole.embed(photo, faces[0]))
                found["int8"].append(small.embed(photo, faces[0]))
        ours, theirs = np.stack(found["int8"]), np.stack(found["fp32"])
        cosines = np.vecdot(ours, theirs)
        mean, worst = cosines.mean(), cosines.min()
        print(f"{len(cosines)} photos: cosine of int8 to fp32 {mean:.4f} on average, {worst:.4f} at worst")
        for fmr in (1e-2, 1e-3, 1e-4):
            for name in ("fp32", "int8"):
                print(f"FNMR at FMR {fmr:g}, {name}: {fnmr(np.stack(found[name]), np.array(owners), fmr)}")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    if len(sys.argv) not in (2, 3):
        raise SystemExit(__doc__)
    main(sys.argv[1], sys.argv[2] if len(sys.argv) == 3 else None)
