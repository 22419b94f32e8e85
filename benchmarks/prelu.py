"""Compares embeddings without PRelu, as the service computes them, with onnxruntime's plain run of the same file.

    python benchmarks/prelu.py PACK [PACK ...]

Single embeddings in turn, on one thread and on two: CPU, which is nearly the same on a busy machine, and wall clock.
"""

from __future__ import annotations

import sys
import time
import warnings
from pathlib import Path

import numpy as np
import numpy.typing as npt

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from engines import reduced_precision
from engines.insightface_engine import InsightFaceEngine

ROUNDS = 8


class PlainEngine(InsightFaceEngine):
    """The same engine, whose recogniser runs as its file says."""

    def _take_quicker_session(self, file: Path, threads: int) -> None:
        pass


def compare(pack: Path, threads: int) -> None:
    engines = {"plain": PlainEngine(pack, threads=threads), "without PRelu": InsightFaceEngine(pack, threads=threads)}
    crops = engines["plain"]._some_crops(reduced_precision.photos())
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in engines}
    for _ in range(ROUNDS):
        for crop in crops:
            for name, engine in engines.items():
                begun = time.process_time(), time.perf_counter()
                engine._embedded(None, [crop])
                taken[name].append((time.process_time() - begun[0], time.perf_counter() - begun[1]))
    plain, quicker = (1000 * np.median(taken[name], axis=0) for name in engines)
    cosines = np.vecdot(*(_directions(engine._embedded(None, crops)) for engine in engines.values()))
    print(
        f"{pack}, {threads} threads: CPU {plain[0]:.1f} -> {quicker[0]:.1f} ms ({quicker[0] / plain[0]:.2f}), "
        f"wall {plain[1]:.1f} -> {quicker[1]:.1f} ms ({quicker[1] / plain[1]:.2f}), cosine at worst {cosines.min():.7f}"
    )


def _directions(rows: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    wide = np.asarray(rows, np.float64)
    return np.asarray(wide / np.linalg.norm(wide, axis=1, keepdims=True))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    if len(sys.argv) < 2:
        raise SystemExit(__doc__)
    for path in sys.argv[1:]:
        for count in (1, 2):
            compare(Path(path), count)
